"""Search spaces are flat, bounded and identifiable: points and recipes correspond, published recipes are points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_spaces import CONTEXT, FILTERS, GENOME, build, make_context, quick

from merge_search.errors import SpaceError
from merge_search.presets import PRESETS, preset
from merge_search.recipe import Models, Recipe, Splice
from merge_search.space import Categorical, Float, SearchSpace
from merge_search.testing import SearchSpaceCase, SearchSpaceConformance
from search_spaces import CATALOGUE

EXACT: dict[str, tuple[str, dict[str, Any], int]] = {
    "compatibility": ("compatibility", {}, 1 + 3 * 7 + 3),
    "compatibility_block_kind": (
        "compatibility",
        {"presets": ["ties_mergekit"], "coefficients": {"per": "block_kind"}, "density": {"per": "block"}},
        3 * 13 + 3 * 7,
    ),
    "compatibility_kinds": (
        "compatibility",
        {"presets": ["ties", "task_arithmetic"], "coefficients": {"per": "kind"}, "density": {"per": "kind"}},
        1 + 3 * 5 * 2,
    ),
    "compatibility_axes": (
        "compatibility",
        {
            "assess": ["magnitude", "fisher"],
            "select": ["all", "top_k", "bernoulli"],
            "splice": ["sum", "argmax"],
            "coefficients": {"per": "expert"},
        },
        1 + 3 + 3,
    ),
    "uniform": ("uniform", {}, 3),
    "uniform_plain": ("uniform", {"presets": ["task_arithmetic"]}, 1),
    "uniform_operators": ("uniform", {"presets": ["task_arithmetic", "tsv_m", "iso_c"]}, 2),
    "compatibility_operators": (
        "compatibility",
        {"presets": ["tsv_m", "ties"], "density": {"per": "expert"}},
        1 + 3 * 7 + 3,
    ),
    "blockwise": ("blockwise", {}, 3 * 7),
    "blockwise_ties": ("blockwise", {"preset": "ties", "density": {"per": "expert"}}, 3 * 7 + 3),
    "module_kind": ("module_kind", {}, 3 * 5),
    "depth_curve": ("depth_curve", {}, 3 * 4),
    "depth_curve_ties": ("depth_curve", {"preset": "ties", "knots": 3, "density_knots": 2}, 3 * 3 + 3 * 2),
    "expert_choice": ("expert_choice", {}, 7),
    "expert_choice_spans": ("expert_choice", {"span": 4, "base": False}, 3),
    "df_merge": ("df_merge", {}, 3),
    "df_merge_plain": ("df_merge", {"fisher": False}, 3),
    "df_merge_anchors": ("df_merge", {"anchors": 0.5, "answers": "all"}, 3),
    "compatibility_fixed_density": (
        "compatibility",
        {"presets": ["pcb"], "coefficients": {"per": "expert", "bounds": [0.5, 3]}, "density": 0.1},
        3,
    ),
    "blockwise_fixed_density": ("blockwise", {"preset": "ties", "density": {"fixed": 0.3}}, 3 * 7),
    "genome": (
        "mergekit_genome",
        {"genome": {**GENOME, "merge_method": "task_arithmetic", "layer_granularity": 2}},
        3 * 3,
    ),
    "genome_negative": (
        "mergekit_genome",
        {"genome": {**GENOME, "merge_method": "task_arithmetic", "allow_negative_weights": True}},
        3,
    ),
    "genome_linear": (
        "mergekit_genome",
        {"genome": {"models": GENOME["models"], "merge_method": "linear", "layer_granularity": 3}},
        2 * 2,
    ),
    "genome_ties": (
        "mergekit_genome",
        {"genome": {**GENOME, "merge_method": "ties", "layer_granularity": 3, "filters": FILTERS}},
        2 * 3 * (2 + 3),
    ),
    "genome_dare": (
        "mergekit_genome",
        {"genome": {**GENOME, "merge_method": "dare_ties", "normalize": False, "layer_granularity": 6}},
        3 * 2,
    ),
}

ROUNDED: dict[str, tuple[str, dict[str, Any], int]] = {
    "lowrank": ("lowrank", {"bounds": [0.1, 1.5]}, 3 + 3 + 2),
    "genome_smooth": (
        "mergekit_genome",
        {"genome": {**GENOME, "merge_method": "ties", "layer_granularity": 2, "smooth": True}},
        3 * 2 + 3 * 3,
    ),
}

ALL = {**EXACT, **ROUNDED}


@st.composite
def points(draw: st.DrawFn, space: SearchSpace) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, domain in space.parameters.items():
        if isinstance(domain, Categorical):
            out[name] = draw(st.sampled_from(domain.choices))
        else:
            assert isinstance(domain, Float)
            out[name] = draw(st.floats(domain.low, domain.high).map(lambda x: x + 0.0))
    return out


def active_part(space: Any, point: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in point.items() if n in space.active(point)}


SPACES = {name: build(kind, **options) for name, (kind, options, _) in ALL.items()}


@pytest.mark.parametrize("name", ALL)
def test_dimension_is_what_the_formula_says(name: str) -> None:
    space = SPACES[name]
    assert isinstance(space, SearchSpace)
    assert len(space.parameters) == ALL[name][2]


class TestFamilies(SearchSpaceConformance):
    """Every family keeps what `merge_search.testing` says of search spaces."""

    @pytest.fixture(params=ALL)
    def case(self, request: pytest.FixtureRequest) -> SearchSpaceCase:
        kind, options, _ = ALL[request.param]
        return SearchSpaceCase(
            lambda: build(kind, **options), CONTEXT, wrong=[lambda: build(kind, **options, no_such_option=1)]
        )


def test_every_family_of_the_catalogue_is_exercised() -> None:
    assert {kind for kind, _, _ in ALL.values()} == {name for name in CATALOGUE if not name.startswith("@")}


@pytest.mark.parametrize("name", EXACT)
@quick
@given(data=st.data())
def test_decoding_and_encoding_are_inverse_to_the_bit(name: str, data: st.DataObject) -> None:
    space = SPACES[name]
    point = data.draw(points(space))
    recipe = space.decode(point)
    again = space.encode(recipe)
    assert again is not None
    assert list(again) == list(space.parameters)
    assert active_part(space, again) == active_part(space, point)
    assert space.decode(again) == recipe
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("name", ROUNDED)
@quick
@given(data=st.data())
def test_where_equations_are_solved_they_are_inverse_up_to_rounding(name: str, data: st.DataObject) -> None:
    space = SPACES[name]
    point = data.draw(points(space))
    again = space.encode(space.decode(point))
    assert again is not None
    assert list(again) == list(space.parameters)
    assert again == pytest.approx(point, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("rank", [2, 3])
def test_factors_of_several_terms_come_back_from_their_recipe(rank: int) -> None:
    space = build("lowrank", rank=rank, knots=5)
    _, _, *inner = SearchSpaceCase(lambda: space, CONTEXT).points(space)  # at the corners terms are proportional
    for point in inner:
        assert space.encode(space.decode(point)) == pytest.approx(point, rel=1e-6)


@pytest.mark.parametrize("name", EXACT)
@quick
@given(data=st.data())
def test_different_points_are_different_merges(name: str, data: st.DataObject) -> None:
    space = SPACES[name]
    one, two = data.draw(points(space)), data.draw(points(space))
    same = active_part(space, one) == active_part(space, two)
    assert (space.decode(one).fingerprint == space.decode(two).fingerprint) == same


@pytest.mark.parametrize("name", EXACT)
def test_every_parameter_changes_the_recipe_where_it_is_active(name: str) -> None:
    space = SPACES[name]
    point = {n: d.choices[0] if isinstance(d, Categorical) else math.sqrt(0.5) for n, d in space.parameters.items()}
    if "preset" in point and name.startswith("compatibility"):
        point["preset"] = "ties"
    seen = {space.decode(point).fingerprint}
    for parameter in space.active(point):
        domain = space.parameters[parameter]
        moved = {**point, parameter: domain.choices[1] if isinstance(domain, Categorical) else 0.5}
        if moved[parameter] != point[parameter]:
            fingerprint = space.decode(moved).fingerprint
            assert fingerprint not in seen, parameter
            seen.add(fingerprint)


@pytest.mark.parametrize("name", ALL)
def test_initial_points_are_inside_distinct_and_few(name: str) -> None:
    space = SPACES[name]
    starts = space.initial_points()
    fingerprints = [space.decode(p).fingerprint for p in starts]
    assert len(set(fingerprints)) == len(starts)
    assert 6 <= len(starts) <= 12
    assert all(list(p) == list(space.parameters) for p in starts)
    assert all(space.encode(space.decode(p)) is not None for p in starts)


def test_initial_points_are_uniform_recipes_over_all_methods() -> None:
    space = build("compatibility")
    starts = space.initial_points()
    assert {p["preset"] for p in starts} == set(space.parameters["preset"].choices)
    for point in starts:
        assert all(isinstance(c, float) for c in space.decode(point).coefficients.values())


def test_sums_over_many_experts_start_at_smaller_strengths() -> None:
    many = make_context(2, tuple("abcdef"))
    space = build("uniform", many, presets=["task_arithmetic", "magnitude_hard"])
    first = {p["preset"]: p["coefficient"] for p in reversed(space.initial_points())}
    assert first["magnitude_hard"] == 0.7
    assert first["task_arithmetic"] == pytest.approx(0.35)


@pytest.mark.parametrize(
    "name", ["task_arithmetic", "ties", "dare", "della", "magnitude_soft", "magnitude_hard", "ties_mergekit"]
)
def test_published_recipes_are_points_and_their_scale_goes_into_the_coefficients(name: str) -> None:
    space = build(
        "compatibility",
        presets=["task_arithmetic", "ties", "dare", "della", "magnitude_soft", "magnitude_hard", "ties_mergekit"],
    )
    published = preset(name, CONTEXT.models, seed=5, dtype="bfloat16")
    point = space.encode(published)
    assert point is not None
    assert point["preset"] == name
    expected = PRESETS[name].coefficient * PRESETS[name].scale
    assert point["coefficient.maths.block.0"] == pytest.approx(expected)
    if PRESETS[name].density is not None:
        assert point["density.code"] == PRESETS[name].density


def test_recipes_outside_the_space_have_no_point() -> None:
    space = build("uniform", presets=["task_arithmetic", "ties"])
    same = {"seed": 5, "dtype": "bfloat16"}
    assert space.encode(preset("task_arithmetic", CONTEXT.models, coefficients=0.5, **same)) is not None
    assert space.encode(preset("task_arithmetic", CONTEXT.models, coefficients=1.6, **same)) is None
    assert (
        space.encode(
            preset("task_arithmetic", CONTEXT.models, coefficients={"maths": 0.5, "code": 0.4, "stories": 0.5}, **same)
        )
        is None
    )
    assert space.encode(preset("dare", CONTEXT.models, **same)) is None
    assert space.encode(preset("task_arithmetic", CONTEXT.models, coefficients=0.5, seed=6, dtype="bfloat16")) is None
    assert space.encode(preset("base", CONTEXT.models, **same)) is None
    other = Models(base="models/other", experts=dict(CONTEXT.models.experts))
    assert space.encode(preset("task_arithmetic", other, coefficients=0.5, **same)) is None


def test_splicing_that_forgets_the_size_of_coefficients_gets_it_back_as_scale() -> None:
    """theta = theta_0 + mean(c) * sum c_i x_i / sum c_i: doubling all coefficients doubles the delta."""
    space = build("compatibility", presets=["ties_mergekit"], coefficients={"per": "expert"})
    one = {"coefficient.maths": 0.2, "coefficient.code": 0.4, "coefficient.stories": 0.6}
    densities = dict.fromkeys((f"density.{e}" for e in CONTEXT.experts), 0.5)
    single = space.decode({**one, **densities})
    double = space.decode({**{k: 2 * v for k, v in one.items()}, **densities})
    assert single.scale == pytest.approx(0.4)
    assert double.scale == pytest.approx(0.8)
    with pytest.raises(SpaceError, match="must not change sign"):
        build("compatibility", presets=["ties_mergekit"], coefficients={"bounds": [-0.5, 1.0]})


def test_presets_that_differ_only_in_searched_numbers_stand_once() -> None:
    space = build("compatibility", presets=["task_arithmetic", "average", "linear", "dare"])
    assert space.parameters["preset"].choices == ("task_arithmetic", "dare")
    assert any("'average'" in n for n in space.notes)
    assert any("'linear'" in n for n in space.notes)


def test_a_fixed_density_is_that_of_every_recipe_and_no_parameter() -> None:
    space = build(
        "compatibility", presets=["pcb", "ties", "task_arithmetic"], coefficients={"per": "expert"}, density=0.1
    )
    names = [f"coefficient.{e}" for e in CONTEXT.experts]
    assert list(space.parameters) == ["preset", *names]
    for point in space.initial_points():
        recipe = space.decode(point)
        wanted = {} if point["preset"] == "task_arithmetic" else dict.fromkeys(CONTEXT.experts, 0.1)
        assert recipe.densities == wanted
        assert space.encode(recipe) == point
    other = space.decode({"preset": "ties", **dict.fromkeys(names, 0.7)}).model_copy(
        update={"densities": dict.fromkeys(CONTEXT.experts, 0.2)}
    )
    assert space.encode(other) is None
    published = preset("pcb", CONTEXT.models, seed=CONTEXT.seed, dtype=CONTEXT.dtype)  # 0.1, coefficients 1 x scale 1.2
    assert space.encode(published) == {"preset": "pcb", **dict.fromkeys(names, 1.2)}


@pytest.mark.parametrize(
    ("density", "problem"),
    [
        (0, "greater than 0"), (1.5, "less than or equal to 1"), (True, "density"),
        ({"fixed": 0.1, "per": "block"}, "a fixed density is not searched; leave out per, or fixed"),
    ],
)  # fmt: skip
def test_a_fixed_density_must_be_one_and_stand_alone(density: Any, problem: str) -> None:
    with pytest.raises(SpaceError, match=problem):
        build("compatibility", presets=["pcb"], density=density)


def test_the_exact_form_of_an_interpolated_recipe_is_df_merge_itself() -> None:
    space, exact = build("df_merge", anchors=0.5), build("df_merge")
    point = {f"coefficient.{e}": c for e, c in zip(CONTEXT.experts, (0.2, 0.6, 1.0), strict=True)}
    recipe = space.decode(point)
    assert recipe.splice.score is not None
    assert recipe.splice.score.options["anchors"] == 0.5
    assert space.exact_form(recipe) == exact.decode(point).model_copy(update={"preset": recipe.preset})
    assert exact.exact_form(exact.decode(point)) is None
    assert build("df_merge", fisher=False).exact_form(recipe.model_copy(update={"splice": Splice()})) is None
    assert build("uniform").exact_form(recipe) is None


@pytest.mark.parametrize(
    "name", [n for n, space in SPACES.items() if any(k.startswith("density") for k in space.parameters)]
)
def test_densities_are_searched_on_a_logarithmic_scale(name: str) -> None:
    densities = [d for n, d in SPACES[name].parameters.items() if n.startswith("density")]
    assert all(isinstance(d, Float) and d.log for d in densities)


@pytest.mark.parametrize("name", ["genome", "genome_ties", "genome_linear", "genome_smooth"])
def test_weights_of_a_mergekit_genome_hold_all_of_the_strength(name: str) -> None:
    space = SPACES[name]
    assert {space.decode(p).scale for p in space.initial_points()} == {1.0}


def test_weights_of_a_normalised_genome_are_relative_within_the_ratio() -> None:
    genome = {"models": GENOME["models"], "merge_method": "linear"}
    space = build("mergekit_genome", genome=genome, ratio=[0.2, 4])
    assert set(space.parameters.values()) == {Float(0.2, 4.0, log=True)}
    for ratio in ([0.2, 0.9], [1.1, 4], [0.2, 1], [1, 4], [-0.5, 4], [0, 4]):
        with pytest.raises(SpaceError, match="ratios must be positive, on both sides of 1"):
            build("mergekit_genome", genome=genome, ratio=ratio)


def test_the_starts_of_a_normalised_genome_also_emphasise_each_model_in_turn() -> None:
    space = build("mergekit_genome", genome={"models": GENOME["models"], "merge_method": "linear"})
    weights = [(1.0, p["weight.code"], p["weight.stories"]) for p in space.initial_points()]
    third = pytest.approx(1 / 3)
    assert weights[:4] == [(1.0, 1.0, 1.0), (1.0, third, third), (1.0, 3.0, 1.0), (1.0, 1.0, 3.0)]


def test_factors_over_depth_reach_zero_only_where_terms_have_anchors_of_their_own() -> None:
    one, two = build("lowrank"), build("lowrank", rank=2)
    assert one.parameters["depth.knot.0"] == Float(0.3, 1.7)
    assert two.parameters["depth.0.knot.1"] == Float(0.0, 1.7)


def test_tensors_outside_blocks_follow_the_first_block_or_the_last_in_factors() -> None:
    space = build("lowrank")
    point = {**space.initial_points()[0], "depth.knot.0": 0.5, "depth.knot.3": 1.5, "strength.code": 1.0}
    recipe = space.decode(point)
    by_kind = {g.kind: recipe.coefficient("code", g) for g in CONTEXT.groups if g.block is None}
    assert by_kind == {"embedding": pytest.approx(0.5), "norm": pytest.approx(1.5), "head": pytest.approx(1.5)}
