"""Properties of all tensor operators and post rules: shapes, stacks, zero deltas, options, use by the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_runs import MLP, TAU_1, TOY, grams, near, random_deltas, run, total

from merge_search.engine.engine import MergeEngine
from merge_search.engine.methods.operators import (
    OPERATORS,
    POSTS,
    load_operator,
    operator_problems,
)
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.errors import NonFiniteError, RecipeError
from merge_search.memory import BudgetedCache, MemoryBudget
from merge_search.recipe import Group, Models, Operator, Recipe

SHAPES = [(7,), (5, 9), (9, 5), (3, 4, 6), (1, 8), (6, 1, 4)]
DECOMPOSING = sorted(name for name, info in OPERATORS.items() if info.decomposing)


# --- what holds for all


def settings(name: str, n: int, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"statistic": grams(n, shape[-1])} if name == "regmean" and len(shape) == 2 else {}


@pytest.mark.parametrize("name", DECOMPOSING)
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_are_finite_float32_and_have_the_deltas_shape(name: str, shape: tuple[int, ...]) -> None:
    deltas = random_deltas(3, shape)
    before = [d.clone() for d in deltas]
    parts = run(name, deltas, torch.ones(shape), **settings(name, 3, shape))
    again = run(name, deltas, torch.ones(shape), **settings(name, 3, shape))
    assert len(parts) == 3
    for part, same, delta, old in zip(parts, again, deltas, before, strict=True):
        assert part.shape == shape
        assert part.dtype == torch.float32
        assert torch.isfinite(part).all()
        assert torch.equal(part, same)
        assert torch.equal(delta, old)


@pytest.mark.parametrize("name", DECOMPOSING)
@pytest.mark.parametrize("shape", SHAPES)
def test_permuting_the_experts_permutes_the_parts(name: str, shape: tuple[int, ...]) -> None:
    deltas, order = random_deltas(3, shape), [2, 0, 1]
    rest = settings(name, 3, shape)
    parts = run(name, deltas, **rest)
    moved = run(name, [deltas[i] for i in order], experts=tuple(f"e{i}" for i in order), **rest)
    for place, i in enumerate(order):
        near(moved[place], parts[i], atol=1e-6)


@pytest.mark.parametrize("name", DECOMPOSING)
@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 4, 6)])
def test_zero_deltas_have_zero_parts(name: str, shape: tuple[int, ...]) -> None:
    for part in run(name, [torch.zeros(shape)] * 2, torch.ones(shape), **settings(name, 2, shape)):
        assert not part.any()


@pytest.mark.parametrize("name", sorted(POSTS))
@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 4, 6)])
def test_post_rules_leave_a_combined_delta_of_zeros_alone(name: str, shape: tuple[int, ...]) -> None:
    assert not run(name, random_deltas(2, shape), combined=torch.zeros(shape)).any()


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi"])
def test_opposite_deltas_stay_finite(name: str) -> None:
    delta = random_deltas(1, (4, 6))[0]
    for part in run(name, [delta, -delta]):
        assert torch.isfinite(part).all()


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi", "regmean"])
def test_a_stack_is_merged_matrix_by_matrix(name: str) -> None:
    deltas = random_deltas(2, (3, 4, 6))
    rest = (
        {"statistic": lambda kind, expert: torch.eye(6).expand(3, 6, 6) * (1 + int(expert[1]))}
        if name == "regmean"
        else {}
    )
    one = {"statistic": lambda kind, expert: torch.eye(6) * (1 + int(expert[1]))} if name == "regmean" else {}
    parts = run(name, deltas, **rest)
    for k in range(3):
        for part, single in zip(parts, run(name, [d[k] for d in deltas], **one), strict=True):
            near(part[k], single)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "svc", "iso_spectrum"])
def test_a_matrix_of_zeros_in_a_stack_harms_no_other(name: str) -> None:
    deltas = random_deltas(2, (3, 4, 6))
    for d in deltas:
        d[1] = 0.0
    if name in POSTS:
        found = run(name, deltas, combined=total(deltas))
        near(found[0], run(name, [d[0] for d in deltas], combined=total(deltas)[0]))
    else:
        found = total(run(name, deltas))
        near(found[0], total(run(name, [d[0] for d in deltas])))
    assert not found[1].any()


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi", "regmean", "arcee_fusion", "svc"])
def test_transposed_storage_gives_the_transposed_result(name: str) -> None:
    deltas = random_deltas(2, (4, 6))
    flipped = [d.T.contiguous() for d in deltas]
    rest = settings(name, 2, (4, 6))
    if name in POSTS:
        near(run(name, flipped, combined=total(flipped), transposed=True), run(name, deltas, combined=total(deltas)).T)
        return
    for part, turned in zip(run(name, deltas, **rest), run(name, flipped, transposed=True, **rest), strict=True):
        near(turned, part.T)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi"])
def test_embeddings_are_averaged_where_the_options_say_so(name: str) -> None:
    deltas = random_deltas(2, (4, 6))
    for part, delta in zip(
        run(name, deltas, options={"embeddings": False}, group=Group("w", None, "head")), deltas, strict=True
    ):
        near(part, delta / 2)


def test_a_delta_with_nan_is_named() -> None:
    deltas = random_deltas(2, (4, 6))
    deltas[1][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="tensor 'w' of expert 'e1'"):
        run("tsv_m", deltas)


def test_parts_are_made_once_per_tensor_and_options() -> None:
    deltas, cache = random_deltas(2, (6, 8)), BudgetedCache(MemoryBudget(10**6))
    first = run("tsv_m", deltas, cache=cache)
    again = run("tsv_m", deltas, cache=cache, coefficients=(0.2, 0.3), scale=2.0)
    assert all(a is b for a, b in zip(first, again, strict=True))
    other = run("tsv_m", deltas, cache=cache, options={"rank_share": 0.5})
    assert not torch.equal(total(other), total(first))
    back = run("tsv_m", deltas, cache=cache)
    assert all(torch.equal(a, b) for a, b in zip(first, back, strict=True))


def test_large_matrices_are_worked_in_float32_with_the_same_result() -> None:
    deltas = random_deltas(2, (300, 260))  # above the size up to which float64 is used
    u, s, vh = torch.linalg.svd(total(deltas).double(), full_matrices=False)
    near(total(run("iso_c", deltas)), s.mean() * u @ vh, atol=1e-5)
    values = torch.cat([torch.linalg.svdvals(d.double())[:130] for d in deltas]).sort(descending=True).values
    near(torch.linalg.svdvals(total(run("tsv_m", deltas))), values, atol=1e-5)


# --- names and options


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (Operator(name="tsvm"), "did you mean 'tsv_m'"),
        (Operator(name="tsv_m", options={"rank_shar": 1}), "no option 'rank_shar'; did you mean 'rank_share'"),
        (Operator(name="tsv_m", options={"rank_share": "all"}), "must be a number, got 'all'"),
        (Operator(name="karcher", options={"space": "spaces"}), "must be one of weights, delta, got 'spaces'"),
        (Operator(name="model_stock", options={"clamp": 1}), "must be true or false, got 1"),
        (Operator(name="nuslerp"), "takes 1 to 2 experts, the recipe has 3"),
    ],
)
def test_problems_with_an_operator_are_named(operator: Operator, message: str) -> None:
    (problem,) = operator_problems(operator, OPERATORS, "operator", 3)
    with pytest.raises(RecipeError, match=message):
        raise RecipeError(problem)


@pytest.mark.parametrize("table", [OPERATORS, POSTS])
def test_every_entry_names_a_function_a_source_and_a_first_scale(table: dict[str, Any]) -> None:
    for info in table.values():
        assert callable(load_operator(info))
        assert info.summary
        assert info.paper
        assert info.scales
        assert all(info.options[option] in allowed for option, allowed in info.choices.items())


@pytest.mark.parametrize(
    ("name", "options"),
    [("tsv_m", {"rank_share": 0.0}), ("iso_cts", {"common": 1.5}), ("wudi", {"ridge": -1.0}), ("nearswap", {"t": 0.0})],
)
def test_numbers_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="must be"):
        run(name, TOY, options=options)


def test_svc_needs_a_positive_floor() -> None:
    with pytest.raises(RecipeError, match="alpha must be > 0, got 0"):
        run("svc", TOY, combined=TAU_1, options={"alpha": 0.0})


# --- through the engine


def test_the_engine_applies_coefficients_scale_and_post_rules_to_the_parts() -> None:
    base = {"w": torch.randn(6, 8, generator=torch.Generator().manual_seed(5)), "b": torch.ones(6)}
    deltas, vectors = random_deltas(2, (6, 8)), random_deltas(2, (6,))
    experts = {f"e{i}": {"w": base["w"] + deltas[i], "b": base["b"] + vectors[i]} for i in range(2)}
    tensors = MemoryTensors(base, experts, groups={"w": MLP, "b": Group("b", 0, "mlp")})
    engine = MergeEngine(tensors, compile=False)
    models = Models(base="memory", experts=dict.fromkeys(experts, "memory"))
    recipe = Recipe(models=models, operator=Operator(name="tsv_m"), coefficients={"e0": 0.5, "e1": 2.0}, scale=0.7)
    merged = dict(engine.merged(recipe))
    kept = [experts[e]["w"] - base["w"] for e in experts]
    parts = run("tsv_m", kept)
    near(merged["w"], base["w"] + 0.7 * (0.5 * parts[0] + 2.0 * parts[1]))
    near(merged["b"], base["b"] + 0.7 * (0.5 * vectors[0] + 2.0 * vectors[1]) / 2)
    after = dict(engine.merged(recipe.model_copy(update={"post": (Operator(name="norm_match"),)})))
    length = sum(float(d.norm()) for d in kept) / 2
    near((after["w"] - base["w"]).norm(), 0.7 * length, atol=1e-4)
