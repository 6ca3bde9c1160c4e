"""An exported folder is complete or absent; it loads as the model that was written, and its files are canonical."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_search.engine.checkpoints.checkpoint import Checkpoint
from merge_search.engine.checkpoints.hashing import hash_folder
from merge_search.engine.checkpoints.headers import read_checkpoint
from merge_search.engine.checkpoints.writer import export_folder
from merge_search.engine.resident.live_model import LiveModel
from merge_search.engine.resident.pool import ModelPool
from merge_search.errors import InputError, NonFiniteError, WeightsError
from merge_search.recipe import Models, Recipe

Tensors = Iterator[tuple[str, torch.Tensor]]


def recipe(base: Path, **settings: Any) -> Recipe:
    return Recipe(models=Models(base=str(base), experts={"x": "x"}), **settings)


def halved(base: Path) -> Tensors:
    """Yield every tensor of a checkpoint, the last one first, halved where floating."""
    checkpoint = Checkpoint(base)
    for name in reversed(list(checkpoint.info.tensors)):
        t = checkpoint.tensor(name)
        yield name, t * 0.5 if t.is_floating_point() else t


def export(out: Path, base: Path, tensors: Tensors | None = None, **options: Any) -> str:
    settings = {"recipe": recipe(base), "card": "# A merge\n", **options}
    return export_folder(out, base_folder=base, tensors=halved(base) if tensors is None else tensors, **settings)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "bert", "gpt_neox"])
def test_the_exported_folder_loads_as_the_live_model_bit_for_bit(save_model, tmp_path: Path, kind: str) -> None:
    base = save_model(kind)
    live = LiveModel.load(base)
    with torch.no_grad():
        for name, tensor in halved(base):
            live.views[name].copy_(tensor)
    digest = export(tmp_path / "out", base)
    assert digest == hash_folder(tmp_path / "out") == live.hash()
    again = LiveModel.load(tmp_path / "out")
    tokens = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        assert torch.equal(again.model(tokens).logits, live.model(tokens).logits)


def test_auto_classes_load_it_without_a_warning(save_model, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = save_model("llama", dtype="bfloat16")
    export(tmp_path / "out", base)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    expected = dict(halved(base))
    assert {n: t.dtype for n, t in model.state_dict().items()} == dict.fromkeys(expected, torch.bfloat16)
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())


def test_the_weight_file_is_what_safetensors_writes(save_model, tmp_path: Path) -> None:
    base = save_model("bert")
    mixed = {
        **load_file(base / "model.safetensors"),
        "ids": torch.arange(5),
        "half": torch.ones(3, dtype=torch.float16),
    }
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    export(tmp_path / "out", base)
    save_file(dict(halved(base)), tmp_path / "reference", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "reference").read_bytes()


def test_shards_and_index_hold_the_same_weights(save_model, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = save_model("llama")
    one, many = export(tmp_path / "one", base), export(tmp_path / "many", base, shard_bytes=3000)
    assert one == many
    info = read_checkpoint(tmp_path / "many")
    assert len(info.files) > 3
    assert all(f.stat().st_size < 5500 for f in info.files)  # the largest tensor is 4 KiB
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == info.n_bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert all(torch.equal(model.state_dict()[n], t) for n, t in halved(base))


def test_exactly_the_bases_names_are_written_and_a_tied_head_once(save_model, tmp_path: Path) -> None:
    base = save_model("llama", tie_word_embeddings=True)
    export(tmp_path / "a", base)
    assert read_checkpoint(tmp_path / "a").tensors.keys() == read_checkpoint(base).tensors.keys()
    held = load_file(base / "model.safetensors")
    save_file({**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    merged = ((n, t) for n, t in halved(base) if n != "lm_head.weight")
    export(tmp_path / "b", base, merged, left_out=["lm_head.weight"])
    assert "lm_head.weight" not in read_checkpoint(tmp_path / "b").tensors
    LiveModel.load(tmp_path / "b")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_pooler_that_is_never_computed_stays_the_bases(save_model, tmp_path: Path, dtype: Any) -> None:
    """Scored and exported weights have the same hash although the model does not use some of them."""
    base, expert = save_model("bert"), save_model("bert", name="expert", seed=1)
    held = load_file(base / "model.safetensors")
    save_file(
        {**held, "bert.pooler.dense.weight": torch.ones(16, 16)}, base / "model.safetensors", metadata={"format": "pt"}
    )
    pool = ModelPool(Models(base=str(base), experts={"x": str(expert)}), device="cpu")
    live = LiveModel.load(base, dtype=dtype)
    assert "bert.pooler.dense.weight" in pool.copied_names
    with torch.no_grad():
        for name in pool.groups:
            live.views[name].copy_(pool.expert("x", name))
    merged = ((name, pool.expert("x", name)) for name in pool.groups)
    digest = export(tmp_path / "out", base, chain(merged, pool.copied()), recipe=recipe(base, dtype=dtype))
    assert digest == live.hash()


def test_a_dtype_of_the_recipe_is_that_of_files_and_config(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    export(tmp_path / "out", base, recipe=recipe(base, dtype="bfloat16"))
    assert {t.dtype for t in read_checkpoint(tmp_path / "out").tensors.values()} == {"BF16"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert {**config, "dtype": "float32"} == json.loads((base / "config.json").read_text())


def test_settings_and_tokenizer_are_the_bases_files_byte_for_byte(save_model, save_tokenizer, tmp_path: Path) -> None:
    base = save_model("llama")
    save_tokenizer(base, ["a", "b"])
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "README.md").write_text("the base's own card")
    (base / "modeling_custom.py").write_text("code")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    export(tmp_path / "out", base, extra=lambda: {"merge.yaml": "models: []\n", "copy.txt": base / "README.md"})
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    found = {f.name for f in (tmp_path / "out").iterdir()}
    added = {"README.md", "recipe.json", "merge.yaml", "copy.txt", "model.safetensors"}
    assert found == {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", *added}
    assert (tmp_path / "out" / "README.md").read_text() == "# A merge\n"
    assert (tmp_path / "out" / "copy.txt").read_text() == "the base's own card"
    assert Recipe.from_json((tmp_path / "out" / "recipe.json").read_text()) == recipe(base)


def test_files_have_the_users_permissions(save_model, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        export(tmp_path / "out", save_model("llama"))
    finally:
        os.umask(old)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "out").iterdir()} == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_an_existing_folder_is_never_touched_unless_it_is_empty(save_model, tmp_path: Path) -> None:
    base, out = save_model("llama"), tmp_path / "out"
    out.mkdir()
    export(out, base)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(InputError, match="not empty; nothing was touched"):
        export(out, base)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file or link"):
        export(tmp_path / "file", base)


def test_too_little_disk_space_is_reported_before_anything_is_written(
    save_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shutil import _ntuple_diskusage

    base = save_model("llama")
    monkeypatch.setattr("shutil.disk_usage", lambda _: _ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match="GiB are free there; nothing was written"):
        export(tmp_path / "out", base)
    assert leftovers(tmp_path) == []


def leftovers(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.name.startswith("out"))


def broken(base: Path, how: str) -> Tensors:
    for i, (name, tensor) in enumerate(halved(base)):
        if how == "missing" and i == 3:
            continue
        if how == "error" and i == 5:
            raise RuntimeError("the merge failed")
        if how == "interrupt" and i == 5:
            raise KeyboardInterrupt
        yield (
            name,
            tensor.reshape(-1)[1:]
            if how == "shape" and i == 2
            else tensor * (float("nan") if how == "nan" and i == 4 else 1),
        )
    if how == "twice":
        yield name, tensor
    if how == "unknown":
        yield "more.weight", tensor


@pytest.mark.parametrize(
    ("how", "error", "reason"),
    [
        ("missing", WeightsError, r"1 tensors of the base were not given \(model\."),
        ("twice", WeightsError, "was given twice"),
        ("unknown", WeightsError, "'more.weight' is not a tensor of the base"),
        ("shape", WeightsError, "must have shape"),
        ("nan", NonFiniteError, "must be finite"),
        ("error", RuntimeError, "the merge failed"),
        ("interrupt", KeyboardInterrupt, None),
    ],
)
def test_a_failure_leaves_nothing_behind(
    save_model, tmp_path: Path, how: str, error: type[BaseException], reason: str | None
) -> None:
    base = save_model("llama")
    with pytest.raises(error, match=reason):
        export(tmp_path / "out", base, broken(base, how))
    assert leftovers(tmp_path) == []


def test_a_value_too_large_for_the_dtype_is_refused(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    tensors = ((n, t + 1e5) for n, t in halved(base))
    with pytest.raises(NonFiniteError, match="NaN or infinity as F16"):
        export(tmp_path / "out", base, tensors, recipe=recipe(base, dtype="float16"))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_kill_in_the_middle_leaves_no_folder_of_that_name_and_the_next_export_works(
    save_model, tmp_path: Path
) -> None:
    base = save_model("llama")
    script = f"""
        import os, signal
        from merge_search.engine.checkpoints.checkpoint import Checkpoint
        from merge_search.engine.checkpoints.writer import export_folder
        from merge_search.recipe import Models, Recipe
        base = {str(base)!r}
        checkpoint = Checkpoint(base)
        def tensors():
            for i, name in enumerate(checkpoint.info.tensors):
                if i == 7:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield name, checkpoint.tensor(name)
        recipe = Recipe(models=Models(base=base, experts={{"x": "x"}}))
        export_folder({str(tmp_path / "out")!r}, base_folder=base, tensors=tensors(), recipe=recipe, card="")
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (partial,) = leftovers(tmp_path)
    assert partial.startswith("out.tmp-")
    assert export(tmp_path / "out", base) == hash_folder(tmp_path / "out")
