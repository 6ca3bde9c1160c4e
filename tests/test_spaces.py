"""Search spaces are flat, bounded and identifiable: points and recipes correspond, and the file's mistakes are named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merge_search import catalogue
from merge_search.engine.assess import MEASURES as ENGINE_MEASURES
from merge_search.errors import SpaceError
from merge_search.presets import PRESETS, preset
from merge_search.recipe import Group, Models, Recipe, value_for
from merge_search.space import Categorical, Float, SearchSpace, SpaceContext
from search_spaces import CATALOGUE
from search_spaces.grouping import Slots
from search_spaces.methods import MEASURES, SHARED


def make_context(
    n_blocks: int = 6, experts: tuple[str, ...] = ("maths", "code", "stories"), *, outside: bool = True
) -> SpaceContext:
    groups = []
    for i in range(n_blocks):
        groups += [
            Group(f"model.layers.{i}.input_layernorm.weight", i, "norm"),
            Group(f"model.layers.{i}.self_attn.q_proj.weight", i, "attention"),
            Group(f"model.layers.{i}.self_attn.o_proj.weight", i, "attention"),
            Group(f"model.layers.{i}.mlp.up_proj.weight", i, "mlp"),
        ]
    if outside:
        groups += [
            Group("model.embed_tokens.weight", None, "embedding"),
            Group("model.norm.weight", None, "norm"),
            Group("lm_head.weight", None, "head"),
        ]
    models = Models(base="models/base", experts={e: f"models/{e}" for e in experts})
    return SpaceContext(models, tuple(groups), seed=5, dtype="bfloat16")


CONTEXT = make_context()


def build(kind: str, context: SpaceContext = CONTEXT, **options: Any) -> Any:
    return catalogue.load("search_spaces", kind)(options, context)


GENOME = {"models": ["maths", "models/code", "stories"], "base_model": "models/base"}
FILTERS = ["self_attn", "mlp"]

EXACT: dict[str, tuple[str, dict[str, Any], int]] = {
    "compatibility": ("compatibility", {}, 1 + 3 * 7 + 3),
    "compatibility_block_kind": ("compatibility", {"presets": ["ties_mergekit"], "coefficients": {"per": "block_kind"}, "density": {"per": "block"}}, 3 * 13 + 3 * 7),
    "compatibility_kinds": ("compatibility", {"presets": ["ties", "task_arithmetic"], "coefficients": {"per": "kind"}, "density": {"per": "kind"}}, 1 + 3 * 5 * 2),
    "compatibility_axes": ("compatibility", {"assess": ["magnitude", "fisher"], "select": ["all", "top_k", "bernoulli"], "splice": ["sum", "argmax"], "coefficients": {"per": "expert"}}, 1 + 3 + 3),
    "uniform": ("uniform", {}, 3),
    "uniform_plain": ("uniform", {"presets": ["task_arithmetic"]}, 1),
    "uniform_operators": ("uniform", {"presets": ["task_arithmetic", "tsv_m", "iso_c"]}, 2),
    "compatibility_operators": ("compatibility", {"presets": ["tsv_m", "ties"], "density": {"per": "expert"}}, 1 + 3 * 7 + 3),
    "blockwise": ("blockwise", {}, 3 * 7),
    "blockwise_ties": ("blockwise", {"preset": "ties", "density": {"per": "expert"}}, 3 * 7 + 3),
    "module_kind": ("module_kind", {}, 3 * 5),
    "depth_curve": ("depth_curve", {}, 3 * 4),
    "depth_curve_ties": ("depth_curve", {"preset": "ties", "knots": 3, "density_knots": 2}, 3 * 3 + 3 * 2),
    "expert_choice": ("expert_choice", {}, 7),
    "expert_choice_spans": ("expert_choice", {"span": 4, "base": False}, 3),
    "df_merge": ("df_merge", {}, 3),
    "df_merge_plain": ("df_merge", {"fisher": False}, 3),
    "genome": ("mergekit_genome", {"genome": {**GENOME, "merge_method": "task_arithmetic", "layer_granularity": 2}}, 3 * 3),
    "genome_negative": ("mergekit_genome", {"genome": {**GENOME, "merge_method": "task_arithmetic", "allow_negative_weights": True}}, 3),
    "genome_linear": ("mergekit_genome", {"genome": {"models": GENOME["models"], "merge_method": "linear", "layer_granularity": 3}}, 2 * 2),
    "genome_ties": ("mergekit_genome", {"genome": {**GENOME, "merge_method": "ties", "layer_granularity": 3, "filters": FILTERS}}, 2 * 3 * (2 + 3)),
    "genome_dare": ("mergekit_genome", {"genome": {**GENOME, "merge_method": "dare_ties", "normalize": False, "layer_granularity": 6}}, 3 * 2),
}  # fmt: skip

ROUNDED: dict[str, tuple[str, dict[str, Any], int]] = {
    "lowrank": ("lowrank", {"bounds": [0.1, 1.5]}, 3 + 3 + 2),
    "genome_smooth": ("mergekit_genome", {"genome": {**GENOME, "merge_method": "ties", "layer_granularity": 2, "smooth": True}}, 3 * 2 + 3 * 3),
}  # fmt: skip

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


quick = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
SPACES = {name: build(kind, **options) for name, (kind, options, _) in ALL.items()}


@pytest.mark.parametrize("name", ALL)
def test_dimension_is_what_the_formula_says(name: str) -> None:
    space = SPACES[name]
    assert isinstance(space, SearchSpace)
    assert len(space.parameters) == ALL[name][2]


def test_every_family_of_the_catalogue_is_exercised() -> None:
    assert {kind for kind, _, _ in ALL.values()} == set(CATALOGUE)


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


def test_measures_are_those_of_the_engine_that_tell_parameters_apart() -> None:
    assert set(MEASURES) == {n for n, m in ENGINE_MEASURES.items() if n != "ones" and not m.after_mask}
    assert set(SHARED) == {n for n in MEASURES if ENGINE_MEASURES[n].shared}


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
    assert set(Slots(CONTEXT, lambda g: g.kind).spread({"norm": 1, "attention": 2, "mlp": 3, "embedding": 4, "head": 5})) == {
        "norm", "attention", "mlp", "embedding", "*",
    }  # fmt: skip


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "slerp"}, "genome.merge_method: slerp has no place"),
        ({"merge_method": "tise"}, "genome.merge_method"),
        ({"normalize": True}, "genome.normalize"),
        ({"tokenizer_source": "union"}, "genome.tokenizer_source"),
        ({"layer_granularity": 4}, r"genome.layer_granularity: must divide the 6 blocks \(1, 2, 3, 6\), got 4"),
        ({"filters": ["self_atn"]}, "genome.filters: no tensor .*did you mean 'self_attn'"),
        ({"lambda": 1.0}, "genome.lambda: unknown key"),
        ({"smoth": True}, "genome.smoth: unknown key; did you mean 'smooth'"),
        ({"models": ["maths", "poems"]}, "'poems' is none of the study's experts"),
        ({"models": ["maths", "models/maths"]}, "expert 'maths' stands twice"),
        ({"base_model": "models/code"}, "genome.base_model: 'models/code' is not the base"),
        ({"base_model": None}, "genome.base_model: is missing"),
        ({"merge_method": "ties", "allow_negative_weights": True}, "genome.allow_negative_weights"),
        ({"merge_method": "linear", "normalize": False}, "genome.normalize: false would scale the base"),
        ({"merge_method": "linear", "models": ["maths"], "base_model": None}, "0 dimensions and needs at least 1"),
    ],
)
def test_what_a_mergekit_file_asks_in_vain_is_named_by_its_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        build("mergekit_genome", genome={**GENOME, "merge_method": "task_arithmetic", **change})


def test_a_mergekit_file_needs_to_be_there_and_to_have_a_genome(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="no such file"):
        build("mergekit_genome", file=str(tmp_path / "no.yaml"))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("models: []\n")
    with pytest.raises(SpaceError, match="needs a mapping under the key 'genome'"):
        build("mergekit_genome", file=str(wrong))
    with pytest.raises(SpaceError, match="'mathz' is neither 'base' nor an expert; did you mean 'maths'"):
        build("mergekit_genome", genome={**GENOME, "merge_method": "ties"}, models={"models/code": "mathz"})
    with pytest.raises(SpaceError, match="either file"):
        build("mergekit_genome")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("compatibility", {"coeficients": {}}, "space.coeficients: unknown key; did you mean 'coefficients'"),
        (
            "compatibility",
            {"coefficients": {"pre": "block"}},
            "space.coefficients.pre: unknown key; did you mean 'per'",
        ),
        ("compatibility", {"coefficients": {"bounds": [1, 0]}}, "low < high"),
        ("compatibility", {"density": {"bounds": [0, 1]}}, r"densities must lie in \(0, 1\]"),
        ("compatibility", {"presets": ["tie"]}, "no preset is called 'tie'; did you mean 'ties'"),
        ("compatibility", {"presets": ["expert"]}, "has no coefficients to search"),
        ("compatibility", {"presets": ["ties"], "assess": ["magnitude"]}, "not both"),
        ("compatibility", {"assess": ["magnitud"]}, "no assessment is called 'magnitud'; did you mean 'magnitude'"),
        (
            "compatibility",
            {"select": ["topk"]},
            "space.select.0: no select kind is called 'topk'; did you mean 'top_k'",
        ),
        ("compatibility", {"select": ["threshold"]}, "give the number"),
        ("compatibility", {"assess": ["variance"], "select": ["all"], "splice": ["argmax"]}, "no combination"),
        ("uniform", {"presets": []}, "space.presets"),
        ("depth_curve", {"knots": 7}, "at most one knot per block, 6 here, got 7"),
        ("depth_curve", {"density_knots": 3}, "reads no density"),
        ("blockwise", {"density": {"per": "expert"}}, "reads no density"),
        ("lowrank", {"rank": 4}, "at most the number of experts and of knots, 3 here, got 4"),
        ("expert_choice", {"span": 0}, "space.span"),
    ],
)
def test_wrong_options_are_refused_with_place_and_hint(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        build(kind, **options)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(SpaceError) as caught:
        build("compatibility", coeficients={}, density={"bounds": [0, 2]}, presets=[])
    assert len(caught.value.problems) == 3


def test_spaces_say_when_they_are_large_and_refuse_to_be_absurd() -> None:
    assert build("blockwise").notes == []
    assert "303 dimensions" in build("blockwise", make_context(100)).notes[0]
    with pytest.raises(SpaceError, match="at most 100000 can be searched"):
        build("blockwise", make_context(1100, tuple(f"e{i}" for i in range(100))))


def test_models_without_blocks_are_told_what_fits() -> None:
    flat = make_context(0)
    for kind in ("blockwise", "depth_curve", "lowrank", "compatibility"):
        with pytest.raises(SpaceError, match="blocks"):
            build(kind, flat)
    assert len(build("uniform", flat).parameters) == 3


def test_a_point_outside_the_space_is_refused_with_all_its_faults() -> None:
    with pytest.raises(SpaceError) as caught:
        build("uniform").decode({"preset": "nothing", "coefficient": 9.0})
    assert len(caught.value.problems) == 3


USER_SPACE = """
from merge_search.space import Float


class OneKnob:
    def __init__(self, options, context):
        self.context = context
        self.parameters = {"strength": Float(0.0, options["high"])}

    def decode(self, point):
        return self.context.recipe(coefficients={e: point["strength"] for e in self.context.experts})

    def encode(self, recipe):
        return {"strength": recipe.coefficients[self.context.experts[0]]}

    def initial_points(self):
        return []
"""


def test_a_space_of_ones_own_is_found_by_file_and_class(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USER_SPACE)
    kind = catalogue.load("search_spaces", "mine.py:OneKnob", folder=tmp_path)
    space = kind({"high": 2.0}, CONTEXT)
    assert isinstance(space, SearchSpace)
    recipe = space.decode({"strength": 0.5})
    assert (recipe.coefficients["code"], recipe.seed, recipe.dtype) == (0.5, 5, "bfloat16")
    assert space.encode(recipe) == {"strength": 0.5}
