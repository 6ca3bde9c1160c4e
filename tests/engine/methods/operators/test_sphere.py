"""Operators that return weights: the spherical family and passthrough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from operator_runs import near, random_deltas, total
from torch import Tensor

from merge_search.engine.methods.operators import OPERATORS, OperatorContext, completed_options, load_operator
from merge_search.engine.methods.operators.sphere import angle, unit
from merge_search.errors import RecipeError
from merge_search.recipe import Group, Operator


def run(name: str, deltas: Sequence[Tensor], base: Tensor | None = None, **rest: Any) -> Tensor:
    """Return merged weights, with `options` over the defaults and every coefficient 1 unless given."""
    operator = Operator(name=name, options=rest.pop("options", {}))
    fields: dict[str, Any] = {
        "experts": tuple(f"e{i}" for i in range(len(deltas))),
        "active": tuple(bool(d.any()) for d in deltas),
        "coefficients": (1.0,) * len(deltas),
        "options": completed_options(operator, OPERATORS[name]),
        "base": torch.zeros_like(deltas[0]) if base is None else base,
        **rest,
    }
    merged = load_operator(OPERATORS[name])(
        OperatorContext(name="w", group=Group("w", 0, "mlp"), deltas=tuple(deltas), **fields)
    )
    assert isinstance(merged, Tensor)
    return merged


def circle(degrees: float, length: float = 1.0) -> Tensor:
    radians = torch.deg2rad(torch.tensor(degrees))
    return length * torch.stack([torch.cos(radians), torch.sin(radians)])


def test_slerp_ends_are_exact_and_the_middle_halves_the_angle() -> None:
    a, b = circle(0), circle(90)
    for t, wanted in ((0.0, a), (1.0, b)):
        assert torch.equal(run("slerp", [a, b], options={"t": t}), wanted)
    near(run("slerp", [a, b]), circle(45))
    near(run("slerp", [a, b], coefficients=(1.0, 2.0)), circle(60))


def test_slerp_of_one_expert_starts_at_the_base() -> None:
    base, expert = circle(0), circle(90)
    near(run("slerp", [expert - base], base, coefficients=(1 / 3,)), circle(30))
    near(run("slerp", [expert - base], base, coefficients=(1.0,)), expert)
    near(run("slerp", [expert - base], base, coefficients=(1.0,), scale=0.5), (base + expert) / 2)


def test_slerp_is_straight_within_two_degrees_as_in_mergekit_and_nuslerp_is_not() -> None:
    """cos 1.5 degrees is 0.99966. The middle of the chord is cos 0.75 degrees from the origin, that of the arc 1."""
    for degrees, chord in ((1.5, 0.999914), (10.0, 1.0)):
        middle = run("slerp", [circle(0), circle(degrees)])
        assert float(middle.norm()) == pytest.approx(chord, abs=2e-6)
        assert float(run("nuslerp", [circle(0), circle(degrees)]).norm()) == pytest.approx(1.0, abs=2e-6)


def test_nuslerp_of_one_expert_starts_at_the_base_or_at_a_delta_of_zero() -> None:
    base, expert = circle(0), circle(90)
    weights = {"space": "weights"}
    near(run("nuslerp", [expert - base], base, coefficients=(1 / 3,), options=weights), circle(30))
    near(run("nuslerp", [expert - base], base, coefficients=(0.25,)), 0.75 * base + 0.25 * expert)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "karcher"])
def test_the_scale_multiplies_a_merged_delta(name: str) -> None:
    base, deltas = torch.ones(4), random_deltas(2, (4,))
    whole = run(name, deltas, base, options={"space": "delta"})
    near(run(name, deltas, base, options={"space": "delta"}, scale=0.5), (base + whole) / 2)


def test_karcher_takes_no_step_to_an_antipode_and_none_after_one_below_the_tolerance() -> None:
    delta = {"space": "delta"}
    near(run("karcher", [circle(0), circle(180)], coefficients=(2.0, 1.0), options=delta), circle(0))
    vectors = [circle(0), circle(10), circle(50)]
    chords = run("multislerp", vectors, options=delta)
    near(run("karcher", vectors, options={**delta, "tolerance": 1.0}), chords)
    near(run("karcher", vectors, options=delta), circle(20))


def test_karcher_of_a_zero_delta_and_an_expert_without_weight_is_the_base() -> None:
    base, deltas = torch.ones(2), [torch.zeros(2), circle(30)]
    near(run("karcher", deltas, base, coefficients=(1.0, 0.0), options={"space": "delta"}), base)


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "multislerp", "karcher"])
@pytest.mark.parametrize("other", [-1.0, 1.0, 1.0 + 1e-6, 0.0])
def test_antipodal_parallel_and_zero_vectors_give_finite_weights(name: str, other: float) -> None:
    delta = random_deltas(1, (3, 4))[0]
    merged = run(name, [delta, other * delta], options={"space": "delta"})
    wanted = (1 + other) / 2 * delta
    if other == 0.0 and name in ("multislerp", "karcher"):
        wanted = delta  # without direction: left out
    near(merged, wanted)


def test_nuslerp_by_row_and_by_column_rotates_each_by_itself() -> None:
    a, b = torch.stack([circle(0), circle(10)]), torch.stack([circle(90), circle(50)])
    rows = torch.stack([circle(45), circle(30)])
    near(run("nuslerp", [a, b], options={"axis": "row"}), rows)
    near(run("nuslerp", [a.T, b.T], options={"axis": "column"}), rows.T)
    near(run("nuslerp", [a.T, b.T], options={"axis": "row"}, transposed=True), rows.T)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_means_of_directions_have_the_mean_norm(name: str) -> None:
    merged = run(name, [circle(0, 1.0), circle(60, 2.0), circle(30, 3.0)], options={"space": "delta"})
    near(merged, circle(30, 2.0), atol=1e-5)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_directions_that_cancel_give_the_plain_mean(name: str) -> None:
    deltas = [circle(0, 2.0), circle(120), circle(240)]
    near(run(name, deltas, options={"space": "delta"}), total(deltas) / 3)


def test_karcher_mean_makes_the_sum_of_tangents_vanish() -> None:
    vectors = [unit(v) for v in random_deltas(3, (6,), seed=3)]
    merged = unit(run("karcher", vectors, options={"space": "delta", "steps": 100, "tolerance": 1e-7}))
    tangents = []
    for v in vectors:
        across = v - (v @ merged) * merged
        tangents.append(angle(v, merged) * unit(across))
    near(total(tangents), torch.zeros(6), atol=1e-5)


def test_karcher_of_identical_models_is_that_model() -> None:
    base, delta = torch.randn(4, 5, generator=torch.Generator().manual_seed(2)), random_deltas(1, (4, 5))[0]
    near(run("karcher", [delta] * 3, base), base + delta)


def test_small_angles_keep_their_digits() -> None:
    u, v = unit(torch.tensor([1.0, 0.0])), unit(torch.tensor([1.0, 1e-5]))
    assert float(angle(u, v)) == pytest.approx(1e-5, rel=1e-5)


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "multislerp", "karcher"])
def test_spherical_operators_refuse_negative_coefficients_and_treat_zeros_as_the_base(name: str) -> None:
    base, deltas = torch.ones(4), random_deltas(2, (4,))
    with pytest.raises(RecipeError, match=r"coefficients >= 0, got -1 for expert 'e1'"):
        run(name, deltas, base, coefficients=(1.0, -1.0))
    assert torch.equal(run(name, deltas, base, coefficients=(0.0, 0.0)), base)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_the_base_counts_among_the_experts_by_its_weight_and_a_negative_one_leaves_the_base(name: str) -> None:
    base, experts = circle(0), [circle(30), circle(60)]
    deltas = [e - base for e in experts]
    near(run(name, deltas, base, options={"space": "weights", "base_weight": 1.0}), circle(30), atol=1e-5)
    assert torch.equal(run(name, deltas, base, options={"space": "weights", "base_weight": -0.5}), base)


def test_passthrough_copies_stored_values_exactly() -> None:
    stored = {"e0": torch.tensor([1.0, 2.0, 3.0]).bfloat16(), "e1": torch.tensor([1e-20, 1e4, 0.1]).bfloat16()}
    base = torch.tensor([1e6, 1.0, 1.0])
    deltas = [t.float() - base for t in stored.values()]
    assert torch.equal(run("passthrough", deltas, base), base)
    copied = run(
        "passthrough", deltas, base, options={"expert": "e1"}, stored=stored.__getitem__, coefficients=(0.0, 0.0)
    )
    assert torch.equal(copied, stored["e1"].float())
    with pytest.raises(RecipeError, match=r"no expert is called 'maths'; known: e0, e1"):
        run("passthrough", deltas, base, options={"expert": "maths"})


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "multislerp", "karcher"])
def test_permuting_experts_and_coefficients_leaves_the_weights_alone(name: str) -> None:
    a, b = random_deltas(2, (4, 5))
    base = torch.ones(4, 5)
    near(run(name, [a, b], base, coefficients=(1.0, 3.0)), run(name, [b, a], base, coefficients=(3.0, 1.0)))


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "multislerp", "karcher", "passthrough"])
def test_zero_deltas_give_the_base_bit_for_bit(name: str) -> None:
    base = torch.randn(3, 5, generator=torch.Generator().manual_seed(4))
    assert torch.equal(run(name, [torch.zeros(3, 5)] * 2, base), base)
