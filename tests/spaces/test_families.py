"""What each family of search spaces varies: axes, keys of tensors, depth curves, factors, files, a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from small_spaces import CONTEXT, FILTERS, build, make_context, quick

from merge_search import catalogue
from merge_search.recipe import Group, value_for
from merge_search.rules import MEASURES
from merge_search.space import SearchSpace
from merge_search.testing import SearchSpaceCase, SearchSpaceConformance
from search_spaces.parts.grouping import Slots


def test_axes_are_reduced_to_distinct_valid_combinations() -> None:
    space = build(
        "compatibility",
        assess=["magnitude", "variance"],
        select=["all", "top_k", "bernoulli"],
        splice=["sum", "count", "mask", "argmax"],
    )
    assert space.parameters["method"].choices == (
        "all/sum",
        "magnitude/all/argmax",
        "magnitude/top_k/sum",
        "magnitude/top_k/count",
        "magnitude/top_k/argmax",
        "bernoulli/sum",
        "bernoulli/count",
        "magnitude/bernoulli/argmax",
        "variance/top_k/sum",
        "variance/top_k/count",
    )
    assert any("variance scores all experts alike" in n for n in space.notes)


def test_axes_decode_to_the_stages_they_name() -> None:
    space = build(
        "compatibility",
        assess=["fisher"],
        select=[{"kind": "top_k", "scope": "model"}, "rank_probability"],
        resolve=["none", "sum"],
        splice=[{"kind": "softmax", "temperature": 0.5}],
        coefficients={"per": "expert"},
    )
    choices = space.parameters["method"].choices
    assert "fisher/top_k(scope=model)/sum/softmax(temperature=0.5)" in choices
    numbers = {n: 0.5 for n in space.parameters if n != "method"}
    recipe = space.decode({"method": "fisher/rank_probability/softmax(temperature=0.5)", **numbers})
    assert recipe.assess.measure == "fisher"
    assert (recipe.select.kind, recipe.select.epsilon, recipe.rescale.kind) == (
        "rank_probability",
        0.07,
        "inverse_probability",
    )
    assert (recipe.splice.kind, recipe.splice.temperature) == ("softmax", 0.5)


def test_one_expert_is_never_weighed_against_itself() -> None:
    alone = make_context(3, ("maths",))
    space = build("compatibility", alone, select=["top_k"], splice=["sum", "score", "argmax", "count"])
    assert "method" not in space.parameters


@pytest.mark.parametrize("name", [n for n, m in MEASURES.items() if not (m.is_constant or m.after_mask)])
def test_every_measure_that_tells_something_apart_can_be_an_axis(name: str) -> None:
    space = build("compatibility", assess=[name], select=[{"kind": "top_k", "scope": "model"}], splice=["sum"])
    point = dict.fromkeys(space.parameters, 0.5)
    assert space.decode(point).assess.measure == name


def test_one_number_per_tensor_ranks_tensors_and_not_parameters() -> None:
    space = build("compatibility", assess=["apl"], select=["top_k", "bernoulli"], splice=["sum", "score"])
    assert space.parameters["method"].choices == ("bernoulli/sum", "apl/bernoulli/score")
    assert "apl is one number per tensor: within a tensor top_k has nothing to choose by; left out" in space.notes


def test_methods_that_ask_about_every_part_of_the_model_say_how_often() -> None:
    entries = ["apl_paper", "apl_exact", {"apl_exact": {"form": "ablation", "partition": "model"}}]
    space = build("compatibility", presets=entries, coefficients={"per": "expert"})
    parts = len({group.key("block") for group in CONTEXT.groups})
    told = [note for note in space.notes if "asks every fit row" in note]
    assert len(told) == 2
    assert f"'apl_exact' asks every fit row of an expert up to {1 + parts} times" in told[0]
    assert "'apl_exact(form=ablation, partition=model)' asks every fit row of an expert up to 2 times" in told[1]


def test_tensors_get_the_coefficient_of_their_cell() -> None:
    space = build("compatibility", presets=["task_arithmetic"], coefficients={"per": "block_kind"})
    point = dict.fromkeys(space.parameters, 0.5) | {"coefficient.code.block.2.mlp": 0.7, "coefficient.code.rest": 0.1}
    recipe = space.decode(point)
    by_tensor = {g.tensor: recipe.coefficient("code", g) for g in CONTEXT.groups}
    assert by_tensor["model.layers.2.mlp.up_proj.weight"] == 0.7
    assert by_tensor["model.layers.2.input_layernorm.weight"] == 0.1
    assert by_tensor["lm_head.weight"] == 0.1
    assert by_tensor["model.layers.3.mlp.up_proj.weight"] == 0.5


@quick
@given(labels=st.lists(st.sampled_from("abc"), min_size=27, max_size=27))
def test_any_labelling_of_tensors_is_spread_exactly(labels: list[str]) -> None:
    by_tensor = {g.tensor: label for g, label in zip(CONTEXT.groups, labels, strict=True)}
    values = {"a": 0.1, "b": 0.2, "c": 0.3}
    spread = Slots(CONTEXT, lambda g: by_tensor[g.tensor]).spread(values)
    for group in CONTEXT.groups:
        assert value_for(spread, group) == values[by_tensor[group.tensor]]


def test_keys_are_as_coarse_as_the_labels_allow() -> None:
    by_block = Slots(CONTEXT, lambda g: str(g.block)).spread({str(b): 0.1 * b for b in range(6)} | {"None": 0.9})
    assert isinstance(by_block, dict)
    assert set(by_block) == {*(f"block.{b}" for b in range(6)), "*"}
    numbers = {"norm": 1, "attention": 2, "mlp": 3, "embedding": 4, "head": 5}
    by_kind = Slots(CONTEXT, lambda g: g.kind).spread(numbers)
    assert set(by_kind) == {"norm", "attention", "mlp", "embedding", "*"}


def test_norms_in_blocks_that_share_the_rest_do_not_fall_under_the_last_norm() -> None:
    def label(group: Group) -> str:
        if group.kind == "norm":
            return "last" if group.block is None else "rest"
        return "rest" if group.kind == "head" else "other"

    spread = Slots(CONTEXT, label).spread({"rest": 0.1, "last": 0.2, "other": 0.3})
    assert value_for(spread, Group("model.layers.4.input_layernorm.weight", 4, "norm")) == 0.1
    assert value_for(spread, Group("model.norm.weight", None, "norm")) == 0.2


def test_no_parameter_stands_for_tensors_that_are_not_there() -> None:
    bare = make_context(4, outside=False)
    assert len(build("blockwise", bare).parameters) == 3 * 4
    assert len(build("module_kind", bare).parameters) == 3 * 3


def test_depth_curve_is_linear_between_its_knots() -> None:
    context = make_context(7, ("maths",))
    space = build("depth_curve", context, knots=3)
    recipe = space.decode(
        {"coefficient.maths.knot.0": 0.0, "coefficient.maths.knot.1": 0.9, "coefficient.maths.knot.2": 0.3}
    )
    blocks = [recipe.coefficient("maths", Group("t", b, "mlp")) for b in range(7)]
    assert blocks == pytest.approx([0.0, 0.3, 0.6, 0.9, 0.7, 0.5, 0.3])
    assert recipe.coefficient("maths", Group("e", None, "embedding")) == 0.0
    assert recipe.coefficient("maths", Group("h", None, "head")) == 0.3


def test_lowrank_is_the_product_of_strength_depth_and_kind() -> None:
    """Rank one, four knots on six blocks (0, 2, 3, 5): the anchor is the second knot, attention the reference."""
    space = build("lowrank")
    point = dict.fromkeys(space.parameters, 1.0) | {"strength.code": 0.5, "depth.knot.3": 1.6, "kind.mlp": 0.4}
    recipe = space.decode(point)
    assert recipe.coefficient("code", Group("a", 2, "attention")) == 0.5
    assert recipe.coefficient("code", Group("m", 2, "mlp")) == pytest.approx(0.5 * 0.4)
    assert recipe.coefficient("code", Group("m", 5, "mlp")) == pytest.approx(0.5 * 1.6 * 0.4)
    assert recipe.coefficient("code", Group("m", 4, "mlp")) == pytest.approx(0.5 * 1.3 * 0.4)
    assert recipe.coefficient("maths", Group("a", 5, "attention")) == pytest.approx(1.6)


def test_lowrank_of_rank_two_runs_from_first_to_last_block_and_comes_back() -> None:
    space = build("lowrank", rank=2)
    assert len(space.parameters) == 2 * (3 + 2 + 2)
    point = space.initial_points()[0]
    strengths = {"maths": (0.2, 0.9), "code": (1.1, 0.3), "stories": (0.5, 0.5)}
    point |= {f"strength.{e}.{r}": v[r] for e, v in strengths.items() for r in (0, 1)}
    point |= {"kind.0.mlp": 0.5, "kind.1.norm": 1.5, "depth.0.knot.1": 1.2}
    recipe = space.decode(point)
    assert recipe.coefficient("code", Group("a", 0, "attention")) == pytest.approx(1.1)
    assert recipe.coefficient("code", Group("a", 5, "attention")) == pytest.approx(0.3)
    assert recipe.coefficient("maths", Group("m", 0, "mlp")) == pytest.approx(0.1)
    assert space.encode(recipe) == pytest.approx(point, rel=1e-6)


def test_expert_choice_takes_each_block_whole() -> None:
    space = build("expert_choice", span=2)
    recipe = space.decode({"choice.0": "maths", "choice.1": "base", "choice.2": "code", "choice.rest": "stories"})
    chosen = {
        b: [e for e in CONTEXT.experts if recipe.coefficient(e, Group("t", b, "mlp")) == 1.0]
        for b in (0, 1, 2, 3, 4, 5, None)
    }
    assert chosen == {0: ["maths"], 1: ["maths"], 2: [], 3: [], 4: ["code"], 5: ["code"], None: ["stories"]}
    assert {recipe.coefficient(e, g) for e in CONTEXT.experts for g in CONTEXT.groups} == {0.0, 1.0}


def test_df_merge_keeps_the_factor_of_its_formula_and_its_ablation_is_task_arithmetic() -> None:
    point = {"coefficient.maths": 0.25, "coefficient.code": 0.5, "coefficient.stories": 1.0}
    full = build("df_merge").decode(point)
    assert full.scale == 3.0
    assert full.splice.score is not None
    assert (full.splice.score.measure, full.splice.score.options["at"]) == ("fisher", "scaled")
    plain = build("df_merge", fisher=False).decode(point)
    assert (plain.splice.kind, plain.scale, plain.coefficients["code"]) == ("sum", 1.0, 0.5)


def test_mergekit_file_is_read_with_layers_filters_and_densities(tmp_path: Path) -> None:
    path = tmp_path / "evolve.yaml"
    genome = {
        "models": ["hub/Maths-7B", "/elsewhere/code"],
        "merge_method": "ties",
        "base_model": "/elsewhere/base",
        "layer_granularity": 3,
        "filters": FILTERS,
    }
    path.write_text(yaml.safe_dump({"genome": genome, "tasks": [{"name": "t"}], "limit": 10}))
    space = build("mergekit_genome", file=str(path), models={"hub/Maths-7B": "maths"})
    assert "weight.code.layers.0.mlp" in space.parameters
    assert not any(n.startswith("weight.maths") for n in space.parameters)
    assert any("limit" in n for n in space.notes)
    assert any("stories: coefficient 0" in n for n in space.notes)
    point = space.initial_points()[0] | {"weight.code.layers.1.other": 3.0, "density.maths.layers.0.mlp": 0.25}
    recipe = space.decode(point)
    assert recipe.coefficient("code", CONTEXT.groups[-1]) == 3.0
    assert recipe.coefficient("code", CONTEXT.groups[0]) == 1.0
    assert recipe.coefficient("stories", CONTEXT.groups[0]) == 0.0
    assert recipe.density("maths", CONTEXT.groups[3]) == 0.25
    assert (recipe.select.scope, recipe.select.vectors, recipe.splice.kind) == ("tensor", True, "coefficient")


USER_SPACE = """
from merge_search.errors import SpaceError
from merge_search.space import Float


class OneKnob:
    def __init__(self, options, context):
        if options["high"] <= 0:
            raise SpaceError("space.high: must be positive")
        self.context = context
        self.parameters = {"strength": Float(0.0, options["high"])}

    def decode(self, point):
        return self.context.recipe(coefficients={e: point["strength"] for e in self.context.experts})

    def encode(self, recipe):
        if recipe.models != self.context.models:
            return None
        return {"strength": recipe.coefficients[self.context.experts[0]]}

    def initial_points(self):
        return []
"""


class TestAUsersOwn(SearchSpaceConformance):
    """A space in a user's file, which inherits nothing, keeps what `merge_search.testing` says of search spaces."""

    @pytest.fixture
    def case(self, tmp_path: Path) -> SearchSpaceCase:
        (tmp_path / "mine.py").write_text(USER_SPACE)

        def build_own(**options: Any) -> SearchSpace:
            return catalogue.build_space("mine.py:OneKnob", options, CONTEXT, folder=tmp_path)

        return SearchSpaceCase(lambda: build_own(high=2.0), CONTEXT, wrong=[lambda: build_own(high=-1.0)])

    def test_its_recipes_are_those_of_its_own_code(self, case: SearchSpaceCase) -> None:
        recipe = case.build().decode({"strength": 0.5})
        assert (recipe.coefficients["code"], recipe.seed, recipe.dtype) == (0.5, 5, "bfloat16")


# --- options of published methods


@pytest.mark.parametrize("kind", ["compatibility", "uniform"])
def test_a_preset_takes_options_of_its_rules_and_numbers_of_its_stages(kind: str) -> None:
    entries = [
        {"tsv_m": {"rank_share": 0.3}},
        {"tsv_m": {"rank_share": 0.5}},
        {"breadcrumbs": {"gamma": 0.05}},
        {"cki_soft": {"gain": 2, "kind": "local"}},
        {"pcb": {"winsorise": 0.02, "inter": "es"}},
        "ties",
    ]
    space = build(kind, presets=entries)
    names = [
        "tsv_m(rank_share=0.3)", "tsv_m(rank_share=0.5)", "breadcrumbs(gamma=0.05)", "cki_soft(gain=2, kind=local)",
        "pcb(winsorise=0.02, inter=es)", "ties",
    ]  # fmt: skip
    assert list(space.parameters["preset"].choices) == names
    recipes = {point["preset"]: space.decode(point) for point in space.initial_points()}
    assert recipes["tsv_m(rank_share=0.5)"].operator.options == {"rank_share": 0.5}
    assert recipes["breadcrumbs(gamma=0.05)"].select.gamma == 0.05
    assert recipes["cki_soft(gain=2, kind=local)"].splice.score.options == {
        "standardise": "all", "gain": 2, "kind": "local",
    }  # fmt: skip
    pcb = recipes["pcb(winsorise=0.02, inter=es)"]
    assert (pcb.winsorise, pcb.assess.options) == (0.02, {"inter": "es"})
