"""Slopes against automatic differentiation in double precision, finite differences, and full gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from merge_search.engine.engine import MergeEngine
from merge_search.engine.execute.parts import linearity_problems
from merge_search.engine.learners.granularity import make_granularity
from merge_search.engine.learners.slopes import Parts, Slopes
from merge_search.engine.methods.operators import OPERATORS
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.engine.resident.live_model import LiveModel
from merge_search.errors import RecipeError
from merge_search.presets import PRESETS, preset
from merge_search.recipe import Group, Recipe
from merge_search.testing.rule import whole_pairs

IDS = torch.tensor([[1, 5, 9, 3, 17, 2], [1, 4, 4, 20, 11, 6], [1, 23, 8, 12, 7, 19]])
TIES = {
    "select": {"kind": "top_k"}, "resolve": {"kind": "sum"}, "splice": {"kind": "count"}, "scale": 0.8,
    "densities": {"a": 0.5, "b": 0.3}, "coefficients": {"a": 0.9, "b": {"*": 0.6, "block.1": 1.1}},
}  # fmt: skip
ARITHMETIC = {"coefficients": {"a": 0.4, "b": {"*": 0.7, "mlp": 0.2}}}


def token_loss(model: Any, parameters: dict[str, Tensor] | None = None) -> Tensor:
    inputs = {"input_ids": IDS, "use_cache": False}
    out = model(**inputs) if parameters is None else functional_call(model, parameters, (), inputs, tie_weights=True)
    return torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def recorded(engine: MergeEngine, live: LiveModel, recipe: Recipe, *, rows: bool = False, **options: Any) -> Slopes:
    slopes = Slopes(Parts(engine, recipe, **options), live.model, live.views, rows=rows)
    engine.apply(recipe, live.views)
    with slopes.recording():
        token_loss(live.model).backward()
    return slopes


def reference(engine: MergeEngine, live: LiveModel, recipe: Recipe) -> dict[str, Tensor]:
    """Return d loss / d coefficient per expert, tensor and row, by float64 autograd through base + sum lambda part."""
    double = copy.deepcopy(live.model).double()
    leaves, weights = {}, {}
    for name, group in engine.tensors.groups.items():
        experts, parts = engine.parts(recipe, name)
        base = engine.tensors.base(name).double()
        leaf = torch.zeros(2, base.shape[0], dtype=torch.float64)
        for i, expert in enumerate(recipe.models.experts):
            leaf[i] = recipe.coefficient(expert, group)
        leaf.requires_grad_(True)
        weights[name] = base
        for expert, part in zip(experts, parts, strict=True):
            i = list(recipe.models.experts).index(expert)
            weights[name] = weights[name] + part.double() * leaf[i].reshape(-1, *[1] * (base.ndim - 1))
        leaves[name] = leaf
    token_loss(double, weights).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("settings", [ARITHMETIC, TIES], ids=["task arithmetic", "ties"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_slopes_are_those_of_automatic_differentiation(make_models, tied: bool, settings: dict[str, Any]) -> None:
    pool, live = make_models(tie_word_embeddings=tied)
    engine = MergeEngine(pool)
    recipe = Recipe(models=pool.models, **settings)
    wanted = reference(engine, live, recipe)
    by_row = recorded(engine, live, recipe, rows=True).values
    by_tensor = recorded(engine, live, recipe).values
    assert by_row.keys() == wanted.keys() == set(pool.groups)
    for name, slopes in by_row.items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(slopes, wanted[name], rtol=2e-4, atol=2e-5 * scale)
        torch.testing.assert_close(by_tensor[name], slopes.sum(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("per", ["expert", "block", "block_kind", "tensor", "row"])
def test_grouped_slopes_are_central_differences_of_the_engines_own_merges(make_models, tmp_path, per: str) -> None:
    """The loss is taken in float64 at weights that the engine merged from the recipes that a granularity writes."""
    pool, live = make_models()
    engine = MergeEngine(pool)
    recipe = Recipe(models=pool.models, **ARITHMETIC)
    parts = Parts(engine, recipe)
    granularity = make_granularity(per, parts, recipe, map_folder=tmp_path / "maps")
    at = granularity.recipe(granularity.start)
    gradient = granularity.gradient(recorded(engine, live, at, rows=granularity.needs_rows).values)
    double = copy.deepcopy(live.model).double()

    def value(vector: Tensor) -> float:
        merged = engine.merged(granularity.recipe(vector))
        with torch.no_grad():
            return float(token_loss(double, {name: t.double() for name, t in merged}))

    eps = 2e-2
    largest = gradient.abs().topk(min(3, len(gradient))).indices.tolist()
    for k in {*largest, 0, len(gradient) - 1}:
        step = torch.zeros_like(granularity.start)
        step[k] = eps
        difference = (value(granularity.start + step) - value(granularity.start - step)) / (2 * eps)
        assert float(gradient[k]) == pytest.approx(difference, rel=1e-2, abs=1e-2 * float(gradient.abs().max()) + 1e-5)


def test_fused_experts_get_the_slopes_of_the_tensors_on_disk(make_models, tmp_path) -> None:
    pool, live = make_models("mixtral")
    recipe = Recipe(models=pool.models, **ARITHMETIC)
    engine = MergeEngine(pool)
    found = recorded(engine, live, recipe, rows=True).values
    for parameter in live.model.parameters():
        parameter.requires_grad_(True)
    token_loss(live.model).backward()
    gradients = LiveModel.load(pool.base_folder)  # its views name the gradients as on disk
    with torch.no_grad():
        for mine, other in zip(gradients.model.parameters(), live.model.parameters(), strict=True):
            mine.copy_(other.grad)
    assert any("experts.2.w3" in name for name in found)
    assert set(found) == set(pool.groups)
    for name, slopes in found.items():
        for i, expert in enumerate("ab"):
            delta = pool.expert(expert, name) - pool.base(name)
            wanted = (delta * gradients.views[name]).reshape(len(delta), -1).sum(1)
            torch.testing.assert_close(slopes[i].float(), wanted, rtol=1e-4, atol=1e-6)


def test_bfloat16_models_have_the_slopes_of_float32_within_their_precision(make_models, tmp_path) -> None:
    pool, live = make_models(dtype="bfloat16")
    recipe = Recipe(models=pool.models, **ARITHMETIC)
    engine = MergeEngine(pool)
    slopes = recorded(engine, live, recipe)
    wanted = {name: g.sum(1) for name, g in reference(engine, live, recipe).items()}
    found = torch.cat([slopes.values[n] for n in wanted])
    exact = torch.cat(list(wanted.values()))
    assert float((found - exact).norm() / exact.norm()) < 0.05
    assert all(p.grad is None and not p.requires_grad for p in live.model.parameters())


def test_parts_that_do_not_fit_the_cache_are_computed_again_with_the_same_slopes(make_models) -> None:
    pool, live = make_models()
    engine = MergeEngine(pool)
    recipe = Recipe(models=pool.models, **TIES)
    kept = recorded(engine, live, recipe, rows=True)
    for limit in (0, 5000):
        remade = recorded(engine, live, recipe, rows=True, cache_bytes=limit)
        assert remade.parts._cache.held <= limit
        assert all(torch.equal(kept.values[n], remade.values[n]) for n in kept.values)


def test_backward_passes_add_up_and_leave_no_gradient_behind(make_models) -> None:
    pool, live = make_models()
    engine = MergeEngine(pool)
    recipe = Recipe(models=pool.models, **ARITHMETIC)
    once = recorded(engine, live, recipe)
    twice = Slopes(once.parts, live.model, live.views)
    seen = []
    with twice.recording():
        for share in (0.25, 0.75):
            (token_loss(live.model) * share).backward()
            seen += [p.grad for p in live.model.parameters()]
    assert seen
    assert all(g is None for g in seen)
    for name, value in once.values.items():
        torch.testing.assert_close(twice.values[name], value, rtol=1e-5, atol=1e-8)
    twice.clear()
    assert not any(bool(v.any()) for v in twice.values.values())


def test_an_expert_that_left_a_tensor_alone_has_no_slope_there(make_models) -> None:
    pool, live = make_models()
    recipe = Recipe(models=pool.models, **ARITHMETIC)
    values = recorded(MergeEngine(pool), live, recipe).values
    assert values["model.layers.0.self_attn.q_proj.weight"][1] == 0
    assert values["model.layers.0.self_attn.q_proj.weight"][0] != 0


# --- parts


def memory(n: int = 3) -> MemoryTensors:
    draw = torch.Generator().manual_seed(3)
    shapes = {"w": (6, 8), "v": (5,), "u": (7, 4), "s": ()}
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    experts = {
        f"e{i}": {name: t + 0.3 * torch.randn(t.shape, generator=draw) for name, t in base.items()} for i in range(n)
    }
    groups = {"w": Group("w", 0, "mlp"), "v": Group("v", 0, "norm"), "u": Group("u", 1, "attention")}
    return MemoryTensors(base, experts, groups=groups, factors=whole_pairs(base, experts))


def assert_linear(recipe: Recipe, tensors: MemoryTensors) -> None:
    """Assert that base + sum lambda part is the engine's merge, with different coefficients for every tensor."""
    values = {e: {"*": 0.3 + i, "w": -0.4 * i, "u": 0.9, "v": 0.25} for i, e in enumerate(recipe.models.experts)}
    recipe = recipe.model_copy(update={"coefficients": values, "scale": {"*": 0.7, "w": 1.3}})
    engine = MergeEngine(tensors, compile=False)
    for name, merged in engine.merged(recipe):
        experts, parts = engine.parts(recipe, name)
        total = tensors.base(name).clone()
        for expert, part in zip(experts, parts, strict=True):
            total += recipe.coefficient(expert, tensors.groups[name]) * part
        torch.testing.assert_close(total, merged, rtol=1e-5, atol=1e-5, msg=f"tensor {name}")


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if not p.needs_data])
def test_parts_add_up_to_the_merge_for_every_preset_that_is_linear_and_the_others_are_refused(name: str) -> None:
    tensors = memory(2 if PRESETS[name].experts[1] == 2 else 3)
    density = None if PRESETS[name].density is None else 0.5
    recipe = preset(name, tensors.models, **({"expert": "e0"} if name == "expert" else {}))
    if density is not None:
        recipe = recipe.model_copy(update={"densities": dict.fromkeys(tensors.models.experts, density)})
    if linearity_problems(recipe):
        with pytest.raises(RecipeError, match="linear in its coefficients"):
            Parts(MergeEngine(tensors), recipe)
    else:
        assert_linear(recipe, tensors)


@pytest.mark.parametrize("name", sorted(n for n, i in OPERATORS.items() if i.decomposing and not i.statistics))
def test_parts_add_up_for_operators_that_give_one_part_per_expert(name: str) -> None:
    tensors = memory()
    assert_linear(Recipe(models=tensors.models, operator={"name": name}), tensors)


def test_unique_boosts_are_part_of_the_parts() -> None:
    tensors = memory()
    settings = {"select": {"kind": "top_k"}, "splice": {"kind": "count", "unique_boost": 0.5}}
    densities = dict.fromkeys(tensors.models.experts, 0.4)
    assert_linear(Recipe(models=tensors.models, densities=densities, **settings), tensors)


def test_factors_of_an_allocation_are_part_of_the_parts() -> None:
    tensors = memory()
    rule = {"kind": "importance", "measure": "magnitude", "coefficient_power": 0.5, "spread": 0.3}
    densities = dict.fromkeys(tensors.models.experts, 0.5)
    recipe = Recipe(models=tensors.models, densities=densities, select={"kind": "top_k"}, allocate=rule)
    values = {e: {"*": 0.3 + i, "w": -0.4 * i} for i, e in enumerate(tensors.models.experts)}
    recipe = recipe.model_copy(update={"coefficients": values})
    engine = MergeEngine(tensors, compile=False)
    factors = []
    for name, merged in engine.merged(recipe):
        total = tensors.base(name).clone()
        experts, parts = engine.parts(recipe, name)
        for expert, part in zip(experts, parts, strict=True):
            total += recipe.coefficient(expert, tensors.groups[name]) * part
            factors.append(float((part / (tensors.expert(expert, name) - tensors.base(name))).max()))
        torch.testing.assert_close(total, merged, rtol=1e-5, atol=1e-5)
    assert max(factors) > 1.01


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"splice": {"kind": "coefficient"}}, "splice 'coefficient' divides by the coefficients"),
        ({"resolve": {"kind": "sum", "weighted": True}}, "a weighted election depends on the coefficients"),
        ({"operator": {"name": "karcher"}}, "operator 'karcher' gives no part per expert"),
        ({"post": [{"name": "norm_match"}]}, "post rule 'norm_match' is not linear"),
        (
            {"splice": {"kind": "score", "score": {"measure": "fisher", "options": {"at": "scaled"}}}},
            "at the scaled model",
        ),
    ],
)  # fmt: skip
def test_merges_that_are_not_linear_in_their_coefficients_are_refused_by_name(
    settings: dict[str, Any], words: str
) -> None:
    tensors = memory()
    with pytest.raises(RecipeError, match=words):
        MergeEngine(tensors).parts(Recipe(models=tensors.models, **settings), "w")
