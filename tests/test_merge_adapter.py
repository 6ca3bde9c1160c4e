"""Merges of LoRA adapters written as LoRA adapters: peft makes of them what the dense merge is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import here
from safetensors.torch import load_file, save
from tiny_adapters import PEFT_WARNS, peft_merged, save_adapter, save_adapters
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.pool import ModelPool
from merge_search.presets import preset
from merge_search.recipe import Models, Recipe

pytestmark = PEFT_WARNS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A base, and three adapters of different ranks, scales and modules."""
    from tiny_lm import make_model

    folder = tmp_path_factory.mktemp("models")
    make_model(tie_word_embeddings=False).save_pretrained(folder / "base")
    experts = {
        "a": save_adapter(folder / "base", folder / "a", seed=1),
        "b": save_adapter(folder / "base", folder / "b", seed=2, r=3, lora_alpha=5, use_rslora=True),
        "c": save_adapter(folder / "base", folder / "c", seed=3, r=2, target_modules=["q_proj", "embed_tokens"]),
    }
    return Models(base=str(folder / "base"), experts={e: str(f) for e, f in experts.items()})


def written(recipe: Recipe, folder: Path, *options: str) -> str:
    """Write the adapter `folder / out` by the command line; what the command says."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(recipe.to_json())
    return here("merge", folder / "recipe.json", folder / "out", "--adapter", *options).stdout


def refused(recipe: Recipe, folder: Path, *options: str) -> str:
    (folder / "recipe.json").write_text(recipe.to_json())
    done = here("merge", folder / "recipe.json", folder / "out", "--adapter", *options, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert not (folder / "out").exists()
    return " ".join(done.stderr.split())


def dense(recipe: Recipe, maps: Path | None = None) -> dict[str, Tensor]:
    pool = ModelPool(recipe.models, device="cpu", map_folders=[maps] if maps else [])
    return dict(MergeEngine(pool, compile=False).merged(recipe))


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of any entry."""
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


LINEAR: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"coefficients": {"a": {"*": 0.5, "block.1": -0.25}, "b": 0.75, "c": 0.0}},
    "average": {},
    "linear": {"coefficients": {"a": 0.5, "b": 1.5, "c": 1.0}},
    "count": {"splice": {"kind": "count", "unique_boost": 0.5}, "scale": {"*": 0.5, "mlp": 2.0}},
    "energy": {"splice": {"kind": "score", "score": {"measure": "energy"}}},
    "allocated": {"allocate": {"kind": "importance", "measure": "magnitude", "coefficient_power": 1.0}},
}
COPA: dict[str, dict[str, Any]] = {
    "copa": {"densities": 0.5, "coefficients": {"a": 1.0, "b": 0.5, "c": {"*": 2.0, "embedding": 0.5}}},
    "copa_released": {"scale": 0.25},
    "core": {},
    "core, iso_cts": {"operator": {"name": "core", "options": {"rule": "iso_cts"}}, "coefficients": {"a": 0.5}},
    "copa, own A": {"operator": {"name": "copa", "options": {"cross": False, "gauge": "svd"}}, "densities": 0.7},
}


@pytest.mark.parametrize("case", [*LINEAR, *COPA])
def test_peft_makes_of_the_adapter_what_the_merge_is(models: Models, tmp_path: Path, case: str) -> None:
    settings = {**LINEAR, **COPA}[case]
    name = case.split(",")[0] if case in (*COPA, "task_arithmetic", "average", "linear") else "task_arithmetic"
    recipe = preset(name, models, **settings)
    said = written(recipe, tmp_path)
    wanted, base = dense(recipe), load_file(Path(models.base) / "model.safetensors")
    assert distance(wanted, base) > 0.05
    assert distance(peft_merged(Path(models.base), tmp_path / "out"), wanted) < 2e-5
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    rank = {"average": 4 + 3 + 2, "linear": 9, "copa": 4, "copa_released": 4}.get(case, config["r"])
    assert config["r"] == rank
    n_tensors = 4 if case == "task_arithmetic" else 5  # without c, the embedding is the base's
    assert f"A LoRA adapter of rank {rank} on {n_tensors} tensors: the merge itself, but for rounding" in said


def test_the_adapter_is_an_expert_of_the_next_merge_and_its_folder_says_what_it_is(
    models: Models, tmp_path: Path
) -> None:
    recipe = preset("copa", models)
    written(recipe, tmp_path)
    alone = preset("task_arithmetic", Models(base=models.base, experts={"x": str(tmp_path / "out")}), coefficients=1.0)
    assert distance(dense(alone), dense(recipe)) < 2e-5
    card = (tmp_path / "out/README.md").read_text()
    assert f"base_model: {models.base}\nlibrary_name: peft\n" in card
    assert "--adapter` gives this adapter again" in card
    again = here("merge", tmp_path / "out/recipe.json", tmp_path / "again", "--adapter").stdout
    assert "the merge itself" in again
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[n]) for n, t in first.items())


def test_coefficients_by_row_are_in_the_factors(models: Models, tmp_path: Path) -> None:
    import hashlib

    draw = torch.Generator().manual_seed(0)
    base = load_file(Path(models.base) / "model.safetensors")
    data = save({n: torch.rand(t.shape[0], generator=draw) for n, t in base.items()})
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "maps").mkdir()
    (tmp_path / f"maps/{digest}.safetensors").write_bytes(data)
    for name in ("task_arithmetic", "copa"):
        recipe = preset(name, models, maps={"a": digest, "c": digest})
        written(recipe, tmp_path)
        assert distance(peft_merged(Path(models.base), tmp_path / "out"), dense(recipe, tmp_path / "maps")) < 2e-5
        assert (tmp_path / f"out/maps/{digest}.safetensors").exists()
        (tmp_path / "out").rename(tmp_path / name)


def test_matrices_stored_in_by_out_are_written_for_peft(tmp_path: Path) -> None:
    from tiny_lm import make_model

    base = tmp_path / "base"
    make_model("gpt2").save_pretrained(base)
    experts = save_adapters(base, tmp_path, 2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    for name in ("average", "copa"):
        recipe = preset(name, Models(base=str(base), experts=experts))
        written(recipe, tmp_path / name)
        assert distance(peft_merged(base, tmp_path / name / "out"), dense(recipe)) < 2e-5


@pytest.mark.parametrize("name", ["average", "ties"])
def test_an_adapter_of_smaller_rank_is_the_nearest_one_and_its_error_is_told(
    models: Models, tmp_path: Path, name: str
) -> None:
    recipe = preset(name, models)
    said = written(recipe, tmp_path, "--rank", "2")
    wanted, base = dense(recipe), load_file(Path(models.base) / "model.safetensors")
    found = peft_merged(Path(models.base), tmp_path / "out")
    left_out = total = 0.0
    for tensor, merged in wanted.items():
        values = torch.linalg.svdvals((merged - base[tensor]).double()) if merged.ndim == 2 else torch.zeros(1)
        error = (found[tensor] - merged).double().square().sum()
        torch.testing.assert_close(error, values[2:].double().square().sum(), rtol=1e-3, atol=1e-6)
        left_out, total = left_out + float(error), total + float(values.double().square().sum())
    assert f"differ from the merge's by {(left_out / total) ** 0.5:.2%} (relative Frobenius norm)" in said
    assert left_out > 0.01 * total
    assert f"by {(left_out / total) ** 0.5:.2%}" in (tmp_path / "out/README.md").read_text()


def test_a_rank_that_is_large_enough_leaves_nothing_out(models: Models, tmp_path: Path) -> None:
    recipe = preset("tsv_m", models)
    written(recipe, tmp_path, "--rank", "32")
    assert distance(peft_merged(Path(models.base), tmp_path / "out"), dense(recipe)) < 2e-5


def test_what_is_no_sum_of_pairs_is_refused_with_every_reason(models: Models, tmp_path: Path) -> None:
    text = refused(preset("ties", models), tmp_path)
    assert "selection 'top_k' leaves single entries out" in text
    assert "signs are elected entry by entry" in text
    assert "--rank R writes the nearest adapter of that rank" in text
    text = refused(preset("tsv_m", models, post=[{"name": "norm_match"}]), tmp_path)
    assert "operator 'tsv_m' works on the whole matrix" in text
    assert "post rule 'norm_match'" in text
    for settings in ({"winsorise": 0.1}, {"splice": {"kind": "argmax"}}):
        assert "so that the merge is no sum of pairs" in refused(
            preset("task_arithmetic", models, **settings), tmp_path
        )
    assert "the rank must be at least 1, got 0" in refused(preset("average", models), tmp_path, "--rank", "0")


def test_whole_models_and_modules_saved_whole_are_refused(models: Models, tmp_path: Path) -> None:
    from tiny_lm import make_model

    make_model(seed=1, tie_word_embeddings=False).save_pretrained(tmp_path / "whole")
    base = Path(models.base)
    head = save_adapter(base, tmp_path / "head", target_modules=["q_proj"], modules_to_save=["lm_head"])
    experts = {"a": models.experts["a"], "w": str(tmp_path / "whole"), "h": str(head)}
    text = refused(preset("average", Models(base=models.base, experts=experts)), tmp_path)
    assert "every expert must be a LoRA adapter, but expert 'w' has no pairs" in text
    assert "expert 'h' saves tensors whole (lm_head.weight)" in text


def test_a_merge_on_another_base_is_refused(models: Models, tmp_path: Path) -> None:
    recipe = preset("average", models, transform={"name": "stack", "options": {}})
    assert "transform 'stack' changes the base" in refused(recipe, tmp_path)


def test_options_that_do_not_go_together_are_refused(models: Models, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(preset("average", models).to_json())
    done = here("merge", tmp_path / "recipe.json", tmp_path / "out", "--rank", "2", check=False)
    assert done.returncode == 2
    assert "--rank is the rank of a LoRA adapter" in done.stderr
