"""Experts are read against a base, tensor by tensor; adapters give peft's bits; the pool refuses unfit models."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import PEFT_WARNS, peft_merged, save_adapter

from merge_search.engine.checkpoints.checkpoint import Checkpoint, Expert, tied_aliases
from merge_search.engine.checkpoints.compatibility import check_models
from merge_search.engine.checkpoints.hashing import hash_folder
from merge_search.engine.resident.pool import ModelPool
from merge_search.errors import WeightsError
from merge_search.recipe import Models


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def bits(t: torch.Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes()


def models(base: Path, **experts: Path) -> Models:
    return Models(base=str(base), experts={n: str(f) for n, f in experts.items()})


# ------------------------------------------------------------------------------------------ adapters


def make_adapter(folder: Path, out: Path, dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
    """Write a LoRA adapter with random factors into `out`. Return the base after peft's merge_and_unload with it."""
    return peft_merged(folder, save_adapter(folder, out, **options))


LLAMA_OPTIONS = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "modules to save": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "gate_proj"]},
}


@PEFT_WARNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", LLAMA_OPTIONS.values(), ids=LLAMA_OPTIONS.keys())
def test_an_adapter_gives_the_bits_of_pefts_merge(
    save_model, tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    base = save_model("llama", dtype=str(dtype).removeprefix("torch."), tie_word_embeddings=False)
    expected = make_adapter(base, tmp_path / "adapter", dtype, **options)
    assert check_models(base, {"x": tmp_path / "adapter"}) == []
    checkpoint = Checkpoint(base)
    expert = Expert(checkpoint, tmp_path / "adapter")
    changed = [n for n in checkpoint.info.tensors if expert.changes(n)]
    assert 2 <= len(changed) < len(checkpoint.info.tensors)
    for name in checkpoint.info.tensors:
        assert bits(expert.tensor(name)) == bits(expected[name]), name
        assert (bits(expert.tensor(name)) != bits(checkpoint.tensor(name))) == (name in changed)


@PEFT_WARNS
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_gpt2_is_transposed(save_model, tmp_path: Path, use_dora: bool) -> None:
    base = save_model("gpt2")
    options = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["c_attn", "c_fc"],
        "fan_in_fan_out": True,
        "use_dora": use_dora,
        "bias": "all",
    }
    expected = make_adapter(base, tmp_path / "adapter", torch.float32, **options)
    expert = Expert(Checkpoint(base), tmp_path / "adapter")
    for name in expert.base.info.tensors:
        assert bits(expert.tensor(name)) == bits(expected[name]), name


RENAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "vit, renamed modules": (
        "vit",
        {
            "r": 2,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "fc1"],
            "modules_to_save": ["classifier"],
        },
    ),
    "vit, dora": ("vit", {"r": 2, "use_dora": True, "target_modules": ["q_proj", "fc2"]}),
    "vit, patterns of modules": (
        "vit",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "fc1"],
            "rank_pattern": {"layers.1.attention.q_proj": 3},
            "alpha_pattern": {"fc1": 5},
        },
    ),
    "gpt_neox, head saved whole": (
        "gpt_neox",
        {"r": 2, "target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]},
    ),
    "mixtral, fused experts saved whole": (
        "mixtral",
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["experts"]},
    ),
    "mixtral, router saved whole": ("mixtral", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["gate"]}),
    "mixtral, stacked experts and router": (
        "mixtral",
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"],
        },
    ),
    "mixtral, one stack, patterns of parameters": (
        "mixtral",
        {
            "r": 3,
            "target_modules": [],
            "target_parameters": ["gate_up_proj"],
            "rank_pattern": {"layers.1.mlp.experts.gate_up_proj": 1},
            "alpha_pattern": {"layers.0.mlp.experts.gate_up_proj": 7},
        },
    ),
    "gpt_oss, experts stored the other way": (
        "gpt_oss",
        {
            "r": 2,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": ["v_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    "llama, parameters of linear layers": (
        "llama",
        {"r": 2, "lora_alpha": 3, "target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]},
    ),
}


@PEFT_WARNS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "options"), RENAMED.values(), ids=RENAMED.keys())
def test_an_adapter_of_modules_with_other_names_on_disk_gives_the_bits_of_pefts_merge(
    save_model, tmp_path: Path, kind: str, options: dict[str, Any], dtype: str
) -> None:
    import peft
    import transformers

    base = save_model(kind, dtype=dtype)
    config = json.loads((base / "config.json").read_text())
    load = getattr(transformers, config["architectures"][0]).from_pretrained
    torch.manual_seed(3)
    adapted = peft.get_peft_model(load(base), peft.LoraConfig(**options))
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    expected = weights(tmp_path / "merged")
    assert check_models(base, {"x": tmp_path / "adapter"}) == []
    expert = Expert(Checkpoint(base), tmp_path / "adapter")
    changed = [n for n in expert.base.info.tensors if expert.changes(n)]
    assert 2 <= len(changed) < len(expert.base.info.tensors)
    for name in expert.base.info.tensors:
        assert bits(expert.tensor(name)) == bits(expected[name]), name
        assert (bits(expert.tensor(name)) != bits(expert.base.tensor(name))) == (name in changed)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@PEFT_WARNS
def test_adapters_that_cannot_be_mapped_are_refused_with_every_reason(save_model, tmp_path: Path) -> None:
    base = save_model("llama", tie_word_embeddings=True)
    adapter = tmp_path / "adapter"
    make_adapter(base, adapter, torch.float32, r=2, target_modules=["q_proj"])
    factors = load_file(adapter / "adapter_model.safetensors")
    head = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(2, 16),
        "base_model.model.lm_head.lora_B.weight": torch.ones(64, 2),
    }
    other = {"base_model.model.vision.q.lora_A.weight": torch.ones(2, 16)}
    save_file({**factors, **head, **other}, adapter / "adapter_model.safetensors")
    edit_json(adapter / "adapter_config.json", lora_bias=True, init_lora_weights="pissa_niter_4", r=3)
    text = "\n".join(check_models(base, {"x": adapter}))
    assert "adapters with lora_bias are not supported" in text
    assert "init_lora_weights='pissa_niter_4' changes the base's own weights" in text
    assert "ties its head to the embedding" in text
    assert "'vision.q.weight', but neither the base's files nor the model" in text
    with pytest.raises(WeightsError, match="says r=3, lora_alpha=8, the factors have rank 2"):
        Expert(Checkpoint(base), adapter)


@PEFT_WARNS
def test_factors_of_parameters_that_do_not_fit_are_refused_with_every_reason(save_model, tmp_path: Path) -> None:
    import peft
    import transformers

    base, adapter = save_model("mixtral"), tmp_path / "adapter"
    options: dict[str, Any] = {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    peft.get_peft_model(
        transformers.MixtralForCausalLM.from_pretrained(base), peft.LoraConfig(**options)
    ).save_pretrained(adapter)
    assert check_models(base, {"x": adapter}) == []
    hashed = hash_folder(adapter)
    edit_json(adapter / "adapter_config.json", r=3)
    text = "\n".join(check_models(base, {"x": adapter}))
    assert "says r=3, lora_alpha=8, the factors have rank 6 for 3 experts" in text
    edit_json(adapter / "adapter_config.json", r=2, target_parameters=["experts.down_proj"])
    assert hash_folder(adapter) != hashed
    text = "\n".join(check_models(base, {"x": adapter}))
    assert "factors B [48, 6] and A [6, 16] of 3 experts do not give the base's shape [16, 24]" in text
    edit_json(adapter / "adapter_config.json", target_parameters=["experts.other"])
    text = "\n".join(check_models(base, {"x": adapter}))
    assert "target_parameters ['experts.other'] must be parameters of the base's model, but the model has none" in text
    edit_json(adapter / "adapter_config.json", target_parameters=["input_layernorm.weight"])
    assert "has 1 dimensions, where peft adapts 2 or 3" in "\n".join(check_models(base, {"x": adapter}))
    edit_json(base / "config.json", architectures=["MyOwnModel"])
    text = "\n".join(check_models(base, {"x": adapter}))
    assert "but the base's config.json names no model that transformers knows" in text


def test_another_kind_of_adapter_is_refused(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    save_file({"base_model.model.model.norm.weight": torch.ones(16)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert any("peft_type must be 'LORA', got 'IA3'" in p for p in check_models(base, {"x": tmp_path}))
    assert any("must be a whole model, found a LoRA adapter" in p for p in check_models(tmp_path, {"x": base}))


# ------------------------------------------------------------------------------------------ vocabularies


def test_rows_are_matched_by_token_and_the_rest_stays_the_bases(save_model, save_tokenizer) -> None:
    tokens = [f"t{i}" for i in range(62)]
    base = save_model("llama", tie_word_embeddings=True)
    expert = save_model("llama", name="expert", seed=1, dtype="bfloat16", tie_word_embeddings=True)
    save_tokenizer(base, tokens, added={"<pad>": 62, "<only-base>": 63})
    save_tokenizer(expert, tokens, added={"<only-expert>": 62, "<pad>": 64})
    rows = weights(expert)["model.embed_tokens.weight"]
    longer = torch.cat([rows, torch.full((1, 16), 5.0, dtype=rows.dtype)])
    save_file({**weights(expert), "model.embed_tokens.weight": longer}, expert / "model.safetensors")
    edit_json(expert / "config.json", vocab_size=65)
    assert check_models(base, {"x": expert}) == []
    found = Expert(Checkpoint(base), expert, name="x")
    embedding, ours = found.tensor("model.embed_tokens.weight"), weights(base)["model.embed_tokens.weight"]
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding[:62], longer[:62].float())
    assert embedding[62].tolist() == [5.0] * 16  # <pad> moved from row 64 to row 62
    assert torch.equal(embedding[63], ours[63])  # the base's own token: no delta
    assert found.notes == [
        "expert 'x', tensor 'model.embed_tokens.weight': 63 of 64 rows are matched by token; "
        "1 tokens that only the expert has are left out"
    ]


# ------------------------------------------------------------------------------------------ pool


def test_the_pool_holds_the_bits_of_the_files(save_model) -> None:
    base = save_model("llama", shards="5KB")
    a, b = save_model("llama", name="a", seed=1), save_model("llama", name="b", seed=2, dtype="bfloat16")
    pool = ModelPool(models(base, a=a, b=b), device="cpu")
    assert pool.placement_report.startswith("resident on cpu: base and 2 experts need 0.00 GiB, ")
    assert list(pool.groups) == list(Checkpoint(base).info.tensors)
    for name in pool.groups:
        assert bits(pool.base(name)) == bits(weights(base)[name])
        assert bits(pool.expert("a", name)) == bits(weights(a)[name])
        assert bits(pool.expert("b", name)) == bits(weights(b)[name])
    assert pool.hashes() == {"base": hash_folder(base), "a": hash_folder(a), "b": hash_folder(b)}


def test_the_pool_falls_back_to_mapped_files_with_the_same_bits(save_model) -> None:
    base, a = save_model("llama"), save_model("llama", name="a", seed=1)
    pool = ModelPool(models(base, a=a), device="cpu", memory=1e-6)
    assert pool.placement == "mapped"
    assert "0.00 GiB were allowed" in pool.placement_report
    for name in pool.groups:
        assert bits(pool.expert("a", name)) == bits(weights(a)[name])


def test_a_resident_pool_does_not_see_files_change_under_it(save_model) -> None:
    base, a = save_model("llama"), save_model("llama", name="a", seed=1)
    pool = ModelPool(models(base, a=a), device="cpu")
    before = {n: bits(pool.expert("a", n)) for n in pool.groups}
    with (a / "model.safetensors").open("r+b") as f:
        f.seek(-64, os.SEEK_END)
        f.write(b"\0" * 64)
    assert {n: bits(pool.expert("a", n)) for n in pool.groups} == before


def test_frozen_tensors_share_the_bases_memory(save_model) -> None:
    base, a = save_model("llama"), save_model("llama", name="a", seed=1)
    save_file({**weights(a), "model.norm.weight": weights(base)["model.norm.weight"]}, a / "model.safetensors")
    pool = ModelPool(models(base, a=a), device="cpu")
    assert pool.expert("a", "model.norm.weight").data_ptr() == pool.base("model.norm.weight").data_ptr()
    assert pool.expert("a", "lm_head.weight").data_ptr() != pool.base("lm_head.weight").data_ptr()


@pytest.mark.parametrize("memory", [None, 1e-6])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_place(save_model, bad: float, memory: float | None) -> None:
    base, a = save_model("llama"), save_model("llama", name="a", seed=1)
    broken = weights(a)
    broken["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(broken, a / "model.safetensors")
    pattern = (
        r"a/model\.safetensors: .* in 1 of 384 entries of expert 'a', tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"
    )
    with pytest.raises(WeightsError, match=pattern):
        ModelPool(models(base, a=a), device="cpu", memory=memory)


def test_an_expert_equal_to_the_base_is_refused(save_model) -> None:
    base, same = save_model("llama"), save_model("llama", name="same")
    wider = save_model("llama", name="wider")
    for twin in (same, wider):
        with pytest.raises(WeightsError, match=f"expert '{twin.name}' equals the base in every tensor"):
            ModelPool(models(base, **{twin.name: twin}), device="cpu")


def test_models_that_do_not_fit_are_refused_with_all_problems(save_model, tmp_path: Path) -> None:
    base, bert = save_model("llama"), save_model("bert", name="bert")
    with pytest.raises(WeightsError, match=r"(?s)cannot be merged:.*expert 'b'.*model_type.*expert 'gone'"):
        ModelPool(models(base, b=bert, gone=tmp_path / "gone dir"))


def test_integers_and_masks_are_copied_from_the_base_and_not_merged(save_model) -> None:
    base, a = save_model("gpt2"), save_model("gpt2", name="a", seed=1)
    mask = torch.ones(1, 1, 32, 32).tril()
    extra = {"transformer.h.0.attn.bias": mask, "transformer.ids": torch.arange(4)}
    save_file({**weights(base), **extra}, base / "model.safetensors")
    pool = ModelPool(models(base, a=a), device="cpu")  # the expert may lack them
    assert {n: bits(t) for n, t in pool.copied()} == {n: bits(t) for n, t in extra.items()}
    assert not set(extra) & set(pool.groups)


def test_a_tied_head_that_is_stored_twice_counts_once(save_model) -> None:
    base = save_model("llama", tie_word_embeddings=True)
    save_file(
        {**weights(base), "lm_head.weight": weights(base)["model.embed_tokens.weight"].clone()},
        base / "model.safetensors",
    )
    assert tied_aliases(Checkpoint(base)) == {"lm_head.weight": "model.embed_tokens.weight"}
    untied = save_model("llama", name="untied", tie_word_embeddings=False)
    assert tied_aliases(Checkpoint(untied)) == {}


def test_a_hash_given_with_the_models_is_checked(save_model) -> None:
    base, a = save_model("llama"), save_model("llama", name="a", seed=1)
    good = {"base": hash_folder(base), "a": hash_folder(a)}
    ModelPool(models(base, a=a).model_copy(update={"hashes": good}), device="cpu")
    with pytest.raises(WeightsError, match=r"'a' must be the model with sha256 0000.*weights were changed"):
        ModelPool(models(base, a=a).model_copy(update={"hashes": {**good, "a": "0" * 64}}), device="cpu")


def test_the_hash_is_the_documented_rule(tmp_path: Path, save_model) -> None:
    save_file(
        {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor(3, dtype=torch.int64)}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text("{}")
    text = b"a|I64|" + (3).to_bytes(8, "little") + b"b|F32|1,2" + bytes.fromhex("0000803f00000040")
    assert hash_folder(tmp_path) == hashlib.sha256(text).hexdigest()
    assert hash_folder(save_model("llama", name="one")) == hash_folder(save_model("llama", name="many", shards="5KB"))


def test_a_file_cut_off_while_it_is_in_use_is_an_error_and_not_a_number(save_model) -> None:
    folder = save_model("llama")
    checkpoint = Checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors: tensor 'model\.norm\.weight' cannot be read"):
        checkpoint.tensor("model.norm.weight")
