"""LoRA pairs of adapters as the engine reads them, and merges of adapters as pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import here
from safetensors.torch import load_file
from tiny_adapters import PEFT_WARNS, save_adapter, save_adapters

from merge_search.engine.checkpoints.checkpoint import Checkpoint, Expert
from merge_search.engine.checkpoints.compatibility import without_factors
from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.streaming.engine import StreamingEngine
from merge_search.errors import RecipeError
from merge_search.presets import preset
from merge_search.recipe import Models, Recipe
from merge_search.rules import use_rule_files

pytestmark = PEFT_WARNS
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_product_of_a_pair_is_what_the_adapter_changes(save_model, tmp_path: Path, options: dict[str, Any]) -> None:
    base = save_model("llama", tie_word_embeddings=False)
    expert = Expert(Checkpoint(base), save_adapter(base, tmp_path / "adapter", **options))
    assert expert.factors_problem == ""
    with_pairs = 0
    for name in expert.base.info.tensors:
        delta, found = expert.tensor(name) - expert.base.tensor(name), expert.factors(name)
        if found is None:
            assert name == "lm_head.weight" or not delta.any()
        else:
            torch.testing.assert_close(found.delta(), delta, rtol=1e-4, atol=1e-5)
            with_pairs += 1
    assert with_pairs >= 2


def test_an_embedding_saved_whole_with_other_numbers_has_no_pair(save_model, tmp_path: Path) -> None:
    base, other = save_model("llama"), save_model("llama", name="other", seed=1)
    adapter = save_adapter(other, tmp_path / "adapter", target_modules=["embed_tokens"])
    assert Expert(Checkpoint(other), adapter).factors("model.embed_tokens.weight") is not None
    assert Expert(Checkpoint(base), adapter).factors("model.embed_tokens.weight") is None


def test_a_matrix_stored_in_by_out_has_the_transposed_pair(save_model, tmp_path: Path) -> None:
    base = save_model("gpt2")
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    expert = Expert(Checkpoint(base), save_adapter(base, tmp_path / "adapter", **options))
    name = "transformer.h.0.attn.c_attn.weight"
    found = expert.factors(name)
    assert found is not None
    assert found.transpose
    torch.testing.assert_close(found.delta(), expert.tensor(name) - expert.base.tensor(name), rtol=1e-4, atol=1e-5)


def test_experts_without_pairs_are_named_with_the_reason(save_model, tmp_path: Path) -> None:
    base, whole = save_model("llama"), save_model("llama", name="whole", seed=1)
    good = save_adapter(base, tmp_path / "good")
    dora = save_adapter(base, tmp_path / "dora", use_dora=True)
    reasons = without_factors(base, {"good": good, "whole": whole, "dora": dora})
    assert reasons.keys() == {"whole", "dora"}
    assert "is a whole model and no LoRA adapter" in reasons["whole"]
    assert "is a DoRA adapter, whose magnitudes scale whole rows" in reasons["dora"]


def test_adapters_of_single_parameters_are_not_merged_as_pairs(save_model, tmp_path: Path) -> None:
    base = save_model("mixtral")
    adapter = save_adapter(base, tmp_path / "a", target_modules=[], target_parameters=["experts.down_proj"])
    assert "by itself (target_parameters)" in without_factors(base, {"a": adapter})["a"]


# ------------------------------------------------------------------------------------------------ merges


def recipe_of(base: Path, experts: dict[str, str], **rest: Any) -> Recipe:
    return preset("copa", Models(base=str(base), experts=experts), densities=0.5, **rest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resident_mapped_and_streamed_adapters_give_the_same_bits(save_model, tmp_path: Path, dtype: str) -> None:
    base = save_model("llama", dtype=dtype)
    experts = save_adapters(base, tmp_path, 2) | {"c": str(save_adapter(base, tmp_path / "c", r=2, lora_alpha=3))}
    recipe = recipe_of(base, experts, coefficients={"a": 1.0, "b": 0.5, "c": {"*": 0.25, "mlp": 2.0}})
    pool = ModelPool(recipe.models, device="cpu")
    wanted = dict(MergeEngine(pool, compile=False).merged(recipe))
    mapped = dict(MergeEngine(ModelPool(recipe.models, device="cpu", memory=0.0)).merged(recipe))
    streamed = dict(StreamingEngine(ModelPool(recipe.models, device="cpu", streaming=True)).merged(recipe))
    changed = [n for n, t in wanted.items() if not torch.equal(t, pool.base(n))]
    assert len(changed) == 4
    for name, tensor in wanted.items():
        assert torch.equal(tensor, mapped[name]), name
        assert torch.equal(tensor, streamed[name]), name


def test_a_tensor_that_only_one_adapter_changes_is_merged_from_that_one(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    experts = {
        "a": str(save_adapter(base, tmp_path / "a", target_modules=["q_proj"])),
        "b": str(save_adapter(base, tmp_path / "b", target_modules=["v_proj"])),
    }
    both = recipe_of(base, experts)
    engine = MergeEngine(ModelPool(both.models, device="cpu"), compile=False)
    alone = both.model_copy(update={"models": Models(base=str(base), experts={"a": experts["a"]})})
    alone = alone.model_copy(update={"coefficients": {"a": 1.0}, "densities": {"a": 0.5}})
    name = "model.layers.0.self_attn.q_proj.weight"
    one = dict(MergeEngine(ModelPool(alone.models, device="cpu"), compile=False).merged(alone))[name]
    assert torch.equal(dict(engine.merged(both))[name], one)


def test_modules_that_adapters_save_whole_are_averaged(save_model, tmp_path: Path) -> None:
    base = save_model("llama", tie_word_embeddings=False)
    experts = save_adapters(base, tmp_path, 2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    recipe = recipe_of(base, experts)
    pool = ModelPool(recipe.models, device="cpu")
    merged = dict(MergeEngine(pool, compile=False).merged(recipe))["lm_head.weight"]
    mean = (pool.expert("a", "lm_head.weight") + pool.expert("b", "lm_head.weight")) / 2
    torch.testing.assert_close(merged, mean, rtol=1e-5, atol=1e-5)


def test_whole_models_are_refused_before_a_weight_is_read(save_model, tmp_path: Path) -> None:
    base, whole = save_model("llama"), save_model("llama", name="whole", seed=1)
    adapter = save_adapter(base, tmp_path / "adapter")
    recipe = recipe_of(base, {"x": str(adapter), "y": str(whole)})
    engine = MergeEngine(ModelPool(recipe.models, device="cpu"), compile=False)
    (problem,) = engine.check(recipe)
    assert problem.startswith("operator: 'copa' merges LoRA adapters as pairs, but expert 'y' has none: ")
    assert "task_arithmetic, ties, tsv_m" in problem
    with pytest.raises(RecipeError, match="expert 'y' has none"):
        next(engine.merged(recipe))
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    data = (whole / "model.safetensors").read_bytes()
    (whole / "model.safetensors").write_bytes(data[:-64] + b"\xff" * 64)  # NaN, which a reader would refuse
    done = here("merge", tmp_path / "recipe.json", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert "expert 'y' has none" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_command_merges_adapters_as_pairs(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    recipe = recipe_of(base, save_adapters(base, tmp_path, 2))
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    here("merge", tmp_path / "recipe.json", tmp_path / "out")
    wanted = dict(MergeEngine(ModelPool(recipe.models, device="cpu"), compile=False).merged(recipe))
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(tensor, wanted[name]), name


OUTSIDE = """
from merge_search.rules import operator

@operator("products", decomposing=True, needs_factors=True, uses_density=True)
def products(context):
    "every pair's product times its density"
    factors = [context.factors(expert) for expert in context.experts]
    return [0 * base if f is None else d * f.delta()
            for f, d, base in zip(factors, context.densities, context.deltas)]
"""


def test_an_operator_from_outside_may_merge_pairs_and_read_densities(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    (tmp_path / "own.py").write_text(OUTSIDE)
    use_rule_files([tmp_path / "own.py"])
    try:
        models = Models(base=str(base), experts=save_adapters(base, tmp_path, 2))
        settings = {"operator": {"name": "products"}, "densities": {"a": 0.5, "b": 0.25}}
        pool = ModelPool(models, device="cpu")
        found = dict(MergeEngine(pool, compile=False).merged(Recipe.from_dict({"models": models, **settings})))
        wanted = preset("task_arithmetic", models, coefficients={"a": 0.5, "b": 0.25})
        for name, tensor in MergeEngine(pool, compile=False).merged(wanted):
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    finally:
        use_rule_files([])
