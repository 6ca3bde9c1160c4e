"""The key `transform`, which every family has: what varies, what counts, and what a point decodes to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge_search.catalogue import build_space, names
from merge_search.errors import SpaceError
from merge_search.recipe import Group, Transform
from merge_search.space import Categorical, Integer, SearchSpace, SpaceContext
from merge_search.testing import SearchSpaceCase, SearchSpaceConformance, example_context


def after(transform: Transform) -> tuple[Group, ...]:
    """Groups of a base with as many layers as ``layers`` names."""
    layers = str(transform.options.get("layers", "")).split()
    return example_context(len(layers) or 2).groups


CONTEXT = replace(example_context(2), groups_after=after)
STACKS: list[Any] = ["none", {"stack": {"layers": ["0 1 1", "0 0 1 1"]}}, {"mal": {"passes": {"bounds": [1, 4]}}}]


def build(transform: object, kind: str = "blockwise", context: SpaceContext = CONTEXT, **options: Any) -> SearchSpace:
    return build_space(kind, {**options, "transform": transform}, context, folder=Path())


@pytest.mark.parametrize(
    ("transform", "kind"),
    [
        (STACKS, "blockwise"),
        ("mal", "uniform"),
        ({"stack": {"layers": ["0 1 1", "1 0"]}}, "compatibility"),
        (["none", {"smile": {"rank": [2, 8], "gate_rank": {"bounds": [1, 4]}}}], "uniform"),
    ],
    ids=["several", "fixed", "options", "nothing to merge"],
)
class TestTransformed(SearchSpaceConformance):
    @pytest.fixture
    def case(self, transform: object, kind: str) -> SearchSpaceCase:
        wrong = [
            lambda: build([]),
            lambda: build("stck"),
            lambda: build({"stack": {"layer": "0 1"}}),
            lambda: build({"stack": {"layers": 3}}),
            lambda: build({"none": {"layers": "0"}}),
            lambda: build(["mal", "mal"]),
            lambda: build([["mal"]]),
        ]
        return SearchSpaceCase(lambda: build(transform, kind), CONTEXT, wrong)


def test_the_family_has_the_blocks_of_the_deepest_result_and_only_those_that_count_are_written() -> None:
    space = build(STACKS)
    assert space.parameters["transform"] == Categorical(("none", "stack", "mal"))
    assert space.parameters["transform.stack.layers"] == Categorical(("0 1 1", "0 0 1 1"))
    assert space.parameters["transform.mal.passes"] == Integer(1, 4)
    assert "coefficient.maths.block.3" in space.parameters
    point = {n: (d.choices[0] if isinstance(d, Categorical) else d.low) for n, d in space.parameters.items()}
    point |= {"coefficient.maths.block.2": 0.75, "coefficient.maths.block.3": 1.25}
    plain = space.decode(point)
    deep = space.decode({**point, "transform": "stack", "transform.stack.layers": "0 0 1 1"})
    three = space.decode({**point, "transform": "stack"})
    assert plain.transform is None
    assert deep.transform == Transform(name="stack", options={"layers": "0 0 1 1"})
    assert [{"block.2", "block.3"} & set(r.coefficients["maths"]) for r in (plain, three, deep)] == [  # type: ignore[arg-type]
        set(),
        {"block.2"},
        {"block.2", "block.3"},
    ]


def test_an_option_at_its_default_is_not_written_so_equal_merges_have_equal_fingerprints() -> None:
    space = build([{"mal": {"passes": {"bounds": [1, 4]}}}], "uniform", presets=["task_arithmetic"])
    recipe = space.decode({"transform.mal.passes": 2, "coefficient": 0.5})
    assert recipe.transform == Transform(name="mal")
    assert space.encode(recipe) == {"transform.mal.passes": 2, "coefficient": 0.5}


def test_only_options_of_the_chosen_transform_count_and_no_coefficient_where_nothing_is_merged() -> None:
    space: Any = build(["none", {"mal": {"passes": {"bounds": [1, 4]}}}, {"alone": {"model": ["maths", "code"]}}])
    point = {n: (d.choices[0] if isinstance(d, Categorical) else d.low) for n, d in space.parameters.items()}
    own = {"transform", "transform.mal.passes", "transform.alone.model"}
    family = frozenset(space.parameters) - own
    assert space.active(point) == family | {"transform"}
    assert space.active({**point, "transform": "mal"}) == family | {"transform", "transform.mal.passes"}
    assert space.active({**point, "transform": "alone"}) == {"transform", "transform.alone.model"}


def test_first_points_take_the_transforms_in_turn() -> None:
    space = build(["none", "mal"], "uniform", presets=["task_arithmetic"])
    found = [space.decode(p).transform for p in space.initial_points()]
    assert found[:4] == [None, Transform(name="mal"), None, Transform(name="mal")]


def test_the_same_transform_with_other_options_is_another_choice() -> None:
    space = build([{"stack": {"layers": "0 1 1"}}, {"stack": {"layers": "0 0 1"}}], "uniform")
    assert space.parameters["transform"] == Categorical(("stack(layers=0 1 1)", "stack(layers=0 0 1)"))
    assert [t and t.options["layers"] for t in space.transforms] == ["0 1 1", "0 0 1"]


def test_a_space_without_the_key_is_the_family_itself() -> None:
    assert "@transform" not in names("search_spaces")
    assert type(build_space("uniform", {}, CONTEXT, folder=Path())).__name__ == "Uniform"
    with pytest.raises(SpaceError, match="did you mean 'stack'"):
        build("stak")


def test_where_nothing_is_merged_coefficients_are_no_part_of_the_recipe() -> None:
    space = build(["none", {"smile": {"rank": [2, 8]}}])
    low = {n: (d.choices[0] if isinstance(d, Categorical) else d.low) for n, d in space.parameters.items()}
    high = {n: (d.choices[-1] if isinstance(d, Categorical) else d.high) for n, d in space.parameters.items()}
    own = {"transform": "smile", "transform.smile.rank": 8}
    assert space.decode({**low, **own}) == space.decode({**high, **own})
    assert space.decode({**low, **own}).coefficients == {}
    assert space.decode({**low, "transform": "none"}) != space.decode({**high, "transform": "none"})
    found = space.encode(space.decode({**high, **own}))
    assert found is not None
    assert {name: found[name] for name in own} == own


def test_problems_of_the_transform_and_of_the_family_come_together() -> None:
    with pytest.raises(SpaceError) as error:
        build("stck", "compatibility", presets=["tie"])
    assert len(error.value.problems) == 2
    assert "did you mean 'stack'" in error.value.problems[0]
    assert "did you mean 'ties'" in error.value.problems[1]


@pytest.mark.parametrize(("n", "is_said"), [(64, False), (65, True)])
def test_results_that_are_not_checked_before_the_search_are_said(n: int, is_said: bool) -> None:
    space = build({"stack": {"layers": [" ".join(["0"] * i) for i in range(1, n + 1)]}})
    assert len(space.transforms) == 64
    assert any("the first 64 results are checked" in note for note in space.notes) == is_said
