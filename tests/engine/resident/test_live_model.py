"""The model computes with, saves and hashes exactly the weights written through its views, for every architecture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_search.engine.checkpoints.hashing import hash_folder
from merge_search.engine.resident.live_model import LiveModel
from merge_search.errors import WeightsError

ARCHITECTURES = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "gpt2": ("gpt2", {}),
    "mixtral, fused experts": ("mixtral", {}),
    "gpt-neox, renamed head": ("gpt_neox", {}),
    "bert": ("bert", {}),
    "vit, renamed": ("vit", {}),
    "t5": ("t5", {}),
}
ZOO = os.environ.get("MERGE_SEARCH_ZOO")


@pytest.mark.parametrize(("kind", "config"), ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_writing_through_the_views_then_saving_gives_exactly_what_was_written(
    save_model, tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    base = save_model(kind, **config)
    live = LiveModel.load(base)
    assert list(live.views) == [n for n in live.views if n in load_file(base / "model.safetensors")]
    assert set(live.views) == set(load_file(base / "model.safetensors"))
    assert live.hash() == hash_folder(base)
    torch.manual_seed(1)
    written = {name: torch.randn(view.shape, dtype=view.dtype) for name, view in live.views.items()}
    with torch.no_grad():
        for name, view in live.views.items():
            view.copy_(written[name])
    live.model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[n], written[n]) for n in saved)
    assert live.hash() == hash_folder(tmp_path / "saved") != hash_folder(base)


def test_a_fresh_model_answers_as_the_live_one_after_writing(save_model, tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    live = LiveModel.load(save_model("mixtral"), task="causal")
    with torch.no_grad():
        for view in live.views.values():
            view.mul_(0.5)
    live.model.save_pretrained(tmp_path / "saved")
    fresh = MixtralForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        assert torch.equal(live.model(tokens).logits, fresh(tokens).logits)


def test_the_live_model_is_ready_to_be_judged_and_not_to_be_trained(save_model) -> None:
    folder = save_model("llama")
    file = folder / "generation_config.json"
    file.write_text(
        json.dumps({"do_sample": True, "temperature": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    )
    live = LiveModel.load(folder)
    assert not live.model.training
    assert not any(p.requires_grad for p in live.model.parameters())
    assert not live.model.generation_config.do_sample
    assert live.model.generation_config.temperature in (None, 1.0)
    assert live.model.generation_config.eos_token_id == 2
    assert live.tokenizer is None


def test_a_dtype_never_reaches_the_rotary_buffers(save_model) -> None:
    live = LiveModel.load(save_model("llama"), dtype="bfloat16")
    assert {v.dtype for v in live.views.values()} == {torch.bfloat16}
    assert {b.dtype for b in live.model.buffers()} == {torch.float32}


def test_the_dtype_of_the_files_counts_and_not_that_of_the_config(save_model) -> None:
    folder = save_model("llama", dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    live = LiveModel.load(folder)
    assert {v.dtype for v in live.views.values()} == {torch.bfloat16}
    assert live.hash() == hash_folder(folder)


def test_a_live_model_does_not_see_its_files_change(save_model) -> None:
    folder = save_model("llama")
    live = LiveModel.load(folder)
    before = live.hash()
    with (folder / "model.safetensors").open("r+b") as f:
        f.seek(-64, os.SEEK_END)
        f.write(b"\0" * 64)
    assert live.hash() == before != hash_folder(folder)


def edit(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a folder. ``__`` in a name stands for a dot."""
    held = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model__norm__weight": None}, "the model has tensors that the files lack: model.norm.weight"),
        ({"model__more__weight": torch.ones(2)}, "the files have tensors that the model lacks: model.more.weight"),
        ({"model__norm__weight": torch.ones(17)}, "transformers cannot load the base"),
        (
            {"model__norm__weight": torch.ones(16, dtype=torch.bfloat16)},
            "'model.norm.weight' would be exported as BF16 but .* as F32",
        ),
    ],
)
def test_a_base_that_would_load_with_other_values_than_on_disk_is_refused(
    save_model, change: dict[str, Any], reason: str
) -> None:
    folder = save_model("llama")
    edit(folder, **change)
    with pytest.raises(WeightsError, match=reason):
        LiveModel.load(folder)


def test_mixed_dtypes_are_fine_once_a_dtype_is_chosen(save_model) -> None:
    folder = save_model("llama")
    edit(folder, model__norm__weight=torch.ones(16, dtype=torch.bfloat16))
    assert {v.dtype for v in LiveModel.load(folder, dtype="float32").views.values()} == {torch.float32}


def test_an_architecture_that_transformers_does_not_know_is_refused(save_model) -> None:
    folder = save_model("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MyOwnModel"]}))
    with pytest.raises(WeightsError, match="got 'MyOwnModel'; models that bring their own code are not run"):
        LiveModel.load(folder)


def test_a_missing_pooler_is_zero_and_noted(save_model) -> None:
    live = LiveModel.load(save_model("bert_encoder"))
    assert live.notes == [
        "the model has tensors that the files lack, which is left as it is: pooler.dense.bias, pooler.dense.weight"
    ]
    assert live.model.pooler.dense.weight.count_nonzero() == 0
    assert not any("pooler" in name for name in live.views)


def test_tensors_without_a_place_in_the_model_are_hashed_as_the_base_has_them(save_model) -> None:
    folder = save_model("bert")
    edit(folder, bert__pooler__dense__weight=torch.ones(16, 16), bert__pooler__dense__bias=torch.ones(16))
    live = LiveModel.load(folder)
    assert live.absent == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    assert live.hash() == hash_folder(folder)
    assert live.hash(live.views) == hash_folder(folder, live.views)


def test_a_tied_head_that_is_stored_twice_has_one_view(save_model) -> None:
    folder = save_model("llama", tie_word_embeddings=True)
    edit(folder, lm_head__weight=load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone())
    live = LiveModel.load(folder)
    assert "lm_head.weight" not in live.views
    assert live.model.lm_head.weight.data_ptr() == live.views["model.embed_tokens.weight"].data_ptr()


@pytest.mark.zoo
@pytest.mark.skipif(ZOO is None, reason="MERGE_SEARCH_ZOO is not set")
@pytest.mark.parametrize("name", ["lm/base", "encoder/base"])
def test_real_checkpoints_hash_alike_on_disk_and_live(name: str) -> None:
    live = LiveModel.load(Path(str(ZOO)) / name)
    assert live.hash() == hash_folder(Path(str(ZOO)) / name)
    assert live.tokenizer is not None
