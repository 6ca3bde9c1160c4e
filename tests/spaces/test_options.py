"""Options of methods as parameters of a space: what is searched, what a point means, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_spaces import CONTEXT, build, make_context

from merge_search.errors import SpaceError
from merge_search.presets import PRESETS, add_preset, preset
from merge_search.recipe import Recipe
from merge_search.rules.table import collecting
from merge_search.space import Categorical, Float, Integer
from merge_search.testing import SearchSpaceCase, SearchSpaceConformance

SAME: dict[str, Any] = {"seed": CONTEXT.seed, "dtype": CONTEXT.dtype}

SPACES: dict[str, tuple[str, dict[str, Any]]] = {
    "operators": (
        "uniform",
        {"presets": [{"tsv_m": {"rank_share": {"bounds": [0.2, 1]}}}, "ties", {"wudi": {"steps": "search"}}]},
    ),
    "stages": (
        "uniform",
        {
            "presets": [
                {"ties": {"allocate": "magnitude", "spread": "search", "coefficient_power": [0, 1], "tie": "search"}},
                {"dare": {"rescale": ["inverse_density", "match_l1"], "allocate": ["magnitude", "rank"]}},
                {"breadcrumbs": {"gamma": "search", "winsorise": "search"}},
            ]
        },
    ),
    "post": (
        "compatibility",
        {"presets": ["ties", {"iso_c": {"power": "search", "post": [{"norm_match": {}}]}}], "coefficients": {},
         "post": [{"svc": {"alpha": [0.05, 0.1]}}]},
    ),
    "axes": (
        "compatibility",
        {
            "assess": ["magnitude", {"measure": "fisher", "options": {"power": "search", "normalise": True}}],
            "select": ["top_k", {"kind": "rank_probability", "epsilon": "search"}],
            "splice": [
                "sum", {"kind": "softmax", "temperature": "search"}, {"kind": "count", "unique_boost": [0, 0.1]},
            ],
            "post": ["svc"],
            "coefficients": {},
        },
    ),
    "mixing": (
        "compatibility",
        {
            "select": ["all"],
            "splice": [{"kind": "score", "score": {"measure": "cki", "options": {"gain": "search", "bins": 16}}}],
            "coefficients": {},
        },
    ),
    "fisher": ("uniform", {"presets": [{"fisher": {"at": "search", "power": "search"}}]}),
    "blockwise": ("blockwise", {"preset": {"tsv_m": {"rank_share": "search"}}, "post": [{"svc": {"alpha": "search"}}]}),
    "module_kind": ("module_kind", {"preset": {"model_stock": {"scope": "search"}}}),
    "depth_curve": ("depth_curve", {"preset": {"ties": {"winsorise": "search"}}, "density_knots": 2}),
    "df_merge": ("df_merge", {"options": {"power": "search", "scale": "search"}}),
}  # fmt: skip


class TestFamiliesWithOptions(SearchSpaceConformance):
    """A space with searched options keeps what `merge_search.testing` says of search spaces."""

    @pytest.fixture(params=SPACES)
    def case(self, request: pytest.FixtureRequest) -> SearchSpaceCase:
        kind, options = SPACES[request.param]
        return SearchSpaceCase(lambda: build(kind, **options), CONTEXT)


def active_part(space: Any, point: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in point.items() if n in space.active(point)}


@pytest.mark.parametrize("name", SPACES)
def test_points_and_recipes_correspond_and_equal_merges_have_one_fingerprint(name: str) -> None:
    kind, options = SPACES[name]
    space = build(kind, **options)
    parts, fingerprints = [], []
    for point in SearchSpaceCase(lambda: space, CONTEXT).points(space):
        recipe = space.decode(point)
        again = space.encode(recipe)
        assert again is not None
        assert active_part(space, again) == pytest.approx(active_part(space, point))
        assert space.decode(again).fingerprint == space.decode(space.encode(space.decode(again))).fingerprint
        parts.append(active_part(space, point))
        fingerprints.append(recipe.fingerprint)
    for i, (part, fingerprint) in enumerate(zip(parts, fingerprints, strict=True)):
        for other, theirs in zip(parts[:i], fingerprints[:i], strict=True):
            assert (fingerprint == theirs) == (part == other)


# ------------------------------------------------------------------------------------------------------ parameters


def test_a_searched_option_is_a_parameter_that_counts_where_its_preset_is_chosen() -> None:
    space = build(*("uniform",), **SPACES["operators"][1])
    assert list(space.parameters) == ["preset", "tsv_m.rank_share", "wudi.steps", "coefficient", "density"]
    assert space.parameters["preset"] == Categorical(("tsv_m", "ties", "wudi"))
    assert space.parameters["tsv_m.rank_share"] == Float(0.2, 1.0)
    assert space.parameters["wudi.steps"] == Integer(10, 1000, log=True)
    point = {"preset": "tsv_m", "tsv_m.rank_share": 0.5, "wudi.steps": 20, "coefficient": 0.7, "density": 0.3}
    assert space.active(point) == {"preset", "tsv_m.rank_share", "coefficient"}
    assert space.active({**point, "preset": "ties"}) == {"preset", "coefficient", "density"}
    recipe = space.decode(point)
    assert recipe.operator.options == {"rank_share": 0.5}
    assert space.decode({**point, "wudi.steps": 700, "density": 0.9}).fingerprint == recipe.fingerprint
    assert space.decode({**point, "preset": "wudi"}).operator.options == {"steps": 20}


def test_the_published_preset_is_a_point_whose_option_is_not_written() -> None:
    """So the baseline and the point are one trial."""
    space = build("uniform", presets=["ties", {"tsv_m": {"rank_share": [0.25, 1]}}])
    published = preset("tsv_m", CONTEXT.models, coefficients=0.5, **SAME)
    point = space.encode(published)
    assert (point["preset"], point["tsv_m.rank_share"]) == ("tsv_m", 1.0)
    assert space.decode(point) == published
    assert space.decode(point).fingerprint == published.fingerprint
    outside = build("uniform", presets=["ties", {"tsv_m": {"rank_share": {"bounds": [0.2, 0.5]}}}])
    assert outside.encode(published) is None
    first = next(p for p in outside.initial_points() if p["preset"] == "tsv_m")
    assert first["tsv_m.rank_share"] == 0.5  # the nearest to the published value


def test_a_fixed_value_that_a_preset_has_anyway_is_the_preset() -> None:
    (same, *_) = build("uniform", presets=[{"tsv_m": {"rank_share": 1}}]).initial_points()
    one, two = (build("uniform", presets=[p]) for p in ("tsv_m", {"tsv_m": {"rank_share": 1}}))
    assert one.decode(same).fingerprint == two.decode(same).fingerprint


def test_initial_points_have_published_options_first_and_then_others() -> None:
    space = build("uniform", presets=[{"wudi": {"steps": "search", "solver": "search"}}])
    points = space.initial_points()
    assert (points[0]["wudi.steps"], points[0]["wudi.solver"]) == (300, "adam")
    assert len({p["wudi.steps"] for p in points}) == len(points)
    assert {p["wudi.solver"] for p in points} == {"adam", "closed"}
    words = build("uniform", presets=[{"dare": {"rescale": ["match_l1", "inverse_density", "match_l2"]}}])
    order = [p["dare.rescale"] for p in words.initial_points()]
    assert order[:4] == ["inverse_density", "match_l2", "match_l1", "inverse_density"]  # the published one first


def test_an_option_of_a_measure_that_selects_and_weighs_is_set_in_both_places() -> None:
    space = build("uniform", presets=[{"pcb_paper": {"scope": "search"}}])
    point = {**space.initial_points()[0], "pcb_paper.scope": "tensor"}
    recipe = space.decode(point)
    assert recipe.assess.options == {"centred": True}
    assert recipe.splice.score.options == {}
    assert space.encode(recipe)["pcb_paper.scope"] == "tensor"
    halfway = Recipe.from_dict({**recipe.to_dict(), "splice": PRESETS["pcb_paper"].settings["splice"]})
    assert space.encode(halfway) is None


def test_the_scale_of_a_merge_follows_the_option_that_decides_about_it() -> None:
    """Fisher information at the scaled experts depends on the coefficients, so the scale stays with the template."""
    space = build("uniform", presets=[{"fisher": {"at": "search"}}])
    recipes = {at: space.decode({"fisher.at": at, "coefficient": 0.5}) for at in ("expert", "scaled")}
    assert recipes["scaled"].splice.score.options == {"normalise": True, "at": "scaled"}
    assert {at: r.scale for at, r in recipes.items()} == {"expert": 1.0, "scaled": 1.0}
    assert {at: space.encode(r)["fisher.at"] for at, r in recipes.items()} == {at: at for at in recipes}


# --------------------------------------------------------------------------------------------- allocation and stages


def test_allocation_is_an_option_of_every_preset_that_selects() -> None:
    space = build("uniform", presets=[{"ties": {"allocate": "magnitude", "spread": "search", "floor": 0.05}}])
    name = "ties(allocate=magnitude, floor=0.05)"
    assert space.parameters[f"{name}.spread"] == Float(0.0, 0.6)
    recipe = space.decode({f"{name}.spread": 0.25, "coefficient": 1.0, "density": 0.2})
    assert recipe.allocate.model_dump() == {
        "kind": "importance", "measure": "magnitude", "options": {}, "spread": 0.25, "floor": 0.05,
        "coefficient_power": 0.0,
    }  # fmt: skip
    assert recipe.select == preset("ties", CONTEXT.models).select
    searched = build("uniform", presets=[{"apl": {"allocate": ["apl", "magnitude"], "spread": [0.2, 0.4]}}])
    point = {"apl.allocate": "magnitude", "apl.spread": 0.4, "coefficient": 0.3, "density": 0.5}
    assert searched.decode(point).allocate.measure == "magnitude"
    off = build("uniform", presets=[{"apl": {"allocate": "none"}}])
    assert off.decode({"coefficient": 0.3, "density": 0.5}).allocate.kind == "constant"


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("ties", {"winsorise": 0.02}, ("winsorise",)),
        ("dare", {"rescale": "match_l2"}, ("rescale", "kind")),
        ("ties", {"scope": "row"}, ("select", "scope")),
        ("della", {"epsilon": 0.2}, ("select", "epsilon")),
        ("cabs", {"block_size": 8}, ("select", "block_size")),
        ("ram", {"threshold": 0.001}, ("select", "threshold")),
        ("ties", {"gate": 2}, ("select", "gate")),
        ("ties", {"tie": "drop"}, ("resolve", "tie")),
        ("cki_recommender", {"temperature": 0.5}, ("splice", "temperature")),
        ("ram_plus", {"boost_cap": 0.5}, ("splice", "boost_cap")),
        ("magmax", {"ties": "first"}, ("splice", "ties")),
        ("apl", {"coefficient_power": 1.5}, ("allocate", "coefficient_power")),
        ("fisher", {"normalise": False}, None),
        ("regmean", {"alpha": 0.1}, ("operator", "options", "alpha")),
        ("iso_cts", {"common": 0.5}, ("operator", "options", "common")),
        ("wudi", {"steps": 20}, ("operator", "options", "steps")),
        ("svc", {"alpha": 1.0}, ("post", 0, "options", "alpha")),
    ],
)
def test_options_go_to_their_places_in_the_recipe(name: str, options: dict[str, Any], field: Any) -> None:
    space = build("uniform", presets=[{name: options}])
    recipe = space.decode(space.initial_points()[0])
    (value,) = options.values()
    if field is None:
        assert recipe.splice.score.options == {}  # as by default
        return
    where: Any = recipe.model_dump()
    for key in field:
        where = where[key]
    assert where == value
    plain = preset(name, CONTEXT.models).model_dump()
    changed = [k for k, v in recipe.model_dump().items() if v != plain[k]]
    assert set(changed) <= {field[0], "coefficients", "scale", "seed", "dtype", "densities"}


# ------------------------------------------------------------------------------------------------------ post rules


def test_post_rules_of_the_space_stand_on_top_of_every_choice_and_share_their_options() -> None:
    space = build(
        "uniform", presets=["ties", "svc", "tsv_m"], post=["norm_match", {"svc": {"alpha": [0.05, 0.1], "cap": 2}}]
    )
    assert space.parameters["post.svc.alpha"] == Categorical((0.05, 0.1))
    assert space.parameters["preset"] == Categorical(("ties", "svc", "tsv_m"))
    added = [("norm_match", {}), ("svc", {"cap": 2.0, "alpha": 0.05})]
    for name, before in (("ties", []), ("svc", [("svc", {})]), ("tsv_m", [])):
        point = {"preset": name, "post.svc.alpha": 0.05, "coefficient": 0.5, "density": 0.2}
        assert [(p.name, p.options) for p in space.decode(point).post] == [*before, *added]
        assert "post.svc.alpha" in space.active(point)


def test_a_preset_with_and_without_a_post_rule_are_two_choices() -> None:
    space = build("uniform", presets=["ties", {"ties": {"post": [{"svc": {"alpha": "search"}}], "scale": [1, 2]}}])
    assert list(space.parameters)[:3] == ["preset", "ties(post=svc).post.svc.alpha", "ties(post=svc).scale"]
    point = {"preset": "ties(post=svc)", "ties(post=svc).post.svc.alpha": 0.2, "ties(post=svc).scale": 2.0,
             "coefficient": 0.5, "density": 0.2}  # fmt: skip
    recipe = space.decode(point)
    assert ([p.model_dump() for p in recipe.post], recipe.scale) == ([{"name": "svc", "options": {"alpha": 0.2}}], 2.0)
    assert space.encode(recipe) == point
    assert space.decode({**point, "preset": "ties"}).post == ()


def test_two_rules_of_one_name_have_their_own_options() -> None:
    space = build("uniform", presets=["ties"], post=[{"svc": {"alpha": [0.1, 1]}}, {"svc": {"alpha": [0.2, 0.5]}}])
    point = {"post.svc.alpha": 1.0, "post.svc.1.alpha": 0.5, "coefficient": 0.5, "density": 0.2}
    assert [p.options["alpha"] for p in space.decode(point).post] == [1.0, 0.5]


def test_a_splice_that_forgets_the_size_of_coefficients_keeps_it_as_scale_under_a_post_rule() -> None:
    space = build("uniform", presets=["ties_mergekit"], post=["svc"])
    assert space.decode({"coefficient": 0.4, "density": 0.2}).scale == pytest.approx(0.4)


# ------------------------------------------------------------------------------------------------------- the axes


def test_options_of_entries_are_shared_by_all_methods_that_read_them() -> None:
    space = build("compatibility", **SPACES["axes"][1])
    assert [n for n in space.parameters if not n.startswith(("coefficient", "density"))] == [
        "method", "splice.softmax.temperature", "splice.count.unique_boost", "select.rank_probability.epsilon",
        "assess.fisher.power",
    ]  # fmt: skip
    numbers = {n: 0.5 for n in space.parameters if n.startswith(("coefficient", "density"))}
    point = {
        "method": "fisher(normalise=True)/rank_probability/softmax", "splice.softmax.temperature": 2.0,
        "splice.count.unique_boost": 0.1, "select.rank_probability.epsilon": 0.25, "assess.fisher.power": 0.5,
        **numbers,
    }  # fmt: skip
    recipe = space.decode(point)
    assert recipe.assess.options == {"normalise": True, "power": 0.5}
    assert (recipe.select.epsilon, recipe.select.scope) == (0.25, "row")
    assert (recipe.splice.temperature, recipe.splice.unique_boost) == (2.0, 0.0)
    assert space.active(point) == {*point} - {"splice.count.unique_boost"}
    plain = {**point, "method": "magnitude/top_k/sum"}
    assert space.active(plain) == {"method", *numbers}


def test_options_that_the_canonical_form_does_not_read_are_no_parameters() -> None:
    space = build(
        "compatibility",
        select=["all", "bernoulli"],
        assess=[{"measure": "cki", "options": {"gain": "search"}}],
        splice=[{"kind": "count", "unique_boost": "search"}, {"kind": "argmax", "ties": "search"}],
    )
    space_of_all = build("compatibility", select=["all"], splice=["sum", {"kind": "argmax", "unique_boost": "search"}])
    assert not [n for n in space_of_all.parameters if "boost" in n]
    by_name = {m: space.active({"method": m}) for m in space.parameters["method"].choices}
    searched = {"assess.cki.gain", "splice.count.unique_boost", "splice.argmax.ties"}
    assert {m: names & searched for m, names in by_name.items()} == {
        "all/sum": set(),
        "cki/all/argmax": {"assess.cki.gain", "splice.argmax.ties"},
        "bernoulli/count": {"splice.count.unique_boost"},
        "cki/bernoulli/argmax": {"assess.cki.gain", "splice.argmax.ties"},
    }


def test_options_of_the_space_belong_to_every_combination_that_reads_them() -> None:
    options = {"winsorise": "search", "allocate": "magnitude", "spread": [0.1, 0.4], "rescale": "match_l1"}
    space = build("compatibility", select=["all", "top_k"], splice=["sum"], coefficients={}, options=options)
    point = {"method": "magnitude/top_k/sum", "options.winsorise": 0.02, "options.spread": 0.4}
    numbers = {n: 0.5 for n in space.parameters if n.startswith(("coefficient", "density"))}
    recipe = space.decode({**point, **numbers})
    assert (recipe.winsorise, recipe.allocate.spread, recipe.allocate.measure) == (0.02, 0.4, "magnitude")
    assert recipe.rescale.kind == "match_l1"
    assert space.encode(recipe) == {**point, **numbers}
    whole = {**point, **numbers, "method": "all/sum"}
    assert {n for n in space.active(whole) if n.startswith("options")} == {"options.winsorise"}
    assert space.decode(whole).rescale.kind == "none"


def test_wrong_options_of_the_space_are_refused_with_their_place() -> None:
    with pytest.raises(SpaceError) as refused:
        build(
            "compatibility",
            select=["top_k", {"kind": "band", "gamma": "search"}],
            options={"winsorise": 9, "gamma": "search", "gama": 1},
            post=["xx"],
        )
    assert refused.value.problems == [
        "space.options: option 'winsorise' of 'winsorise' must lie in [0, 0.49], got 9",
        "space.options: options.gamma is searched in an entry, too",
        "space.options: no method here has an option 'gama'; did you mean 'gamma'?",
        "space.post.0: unknown post 'xx'; known: iso_spectrum, norm_match, svc",
    ]
    with pytest.raises(SpaceError, match=r"space.options: options of presets stand in their entries"):
        build("compatibility", presets=["ties"], options={"winsorise": 0.1})


# ------------------------------------------------------------------------------------------------- values and ranges


@pytest.mark.parametrize(
    ("preset_name", "option", "written", "domain"),
    [
        ("tsv_m", "rank_share", "search", Float(0.1, 1.5)),
        ("tsv_m", "rank_share", {"bounds": None}, Float(0.1, 1.5)),
        ("tsv_m", "rank_share", {"bounds": [1, 2], "log": True}, Float(1.0, 2.0, log=True)),
        ("tsv_m", "rank_share", [1, 0.5], Categorical((1.0, 0.5))),
        ("tsv_m", "embeddings", "search", Categorical((False, True))),
        ("wudi", "steps", {"bounds": [5, 50]}, Integer(5, 50, log=True)),
        ("wudi", "steps", {"bounds": [5, 50], "log": False}, Integer(5, 50)),
        ("wudi", "steps", {"bounds": [0, 50]}, Integer(0, 50)),
        ("wudi", "steps", [50, 100], Categorical((50, 100))),
        ("wudi", "norm", "search", Categorical(("squared", "plain"))),
        ("cki_soft", "sign", "search", Categorical((1.0, -1.0))),
        ("svc", "cap", "search", Float(1.0, 10.0, log=True)),
    ],
)
def test_what_a_study_file_writes_becomes_a_domain(preset_name: str, option: str, written: Any, domain: Any) -> None:
    space = build("uniform", presets=[{preset_name: {option: written}}])
    assert space.parameters[f"{preset_name}.{option}"] == domain


def test_search_is_plain_text_where_any_text_is_allowed() -> None:
    space = build("uniform", presets=[{"external": {"name": "search"}}])
    assert space.decode({"coefficient": 0.5, "density": 0.5}).assess.options == {"name": "search"}


WRONG: list[tuple[Any, str]] = [
    ({"tsv_m": {"rank_share": [0.3]}}, "or more values to choose from, got [0.3]; to fix it, write rank_share: 0.3"),
    ({"tsv_m": {"rank_share": []}}, "a list needs two or more values to choose from, got an empty list"),
    ({"tsv_m": {"rank_share": [0.5, 1, 1.0]}}, "1.0 stands twice in [0.5, 1, 1.0]"),
    ({"tsv_m": {"rank_share": [0.5, "x"]}}, "must be a number, got 'x'"),
    ({"tsv_m": {"rank_share": [0.5, None]}}, "must be a number, a text, true or false, got None"),
    ({"tsv_m": {"rank_share": 200}}, "option 'rank_share' of 'tsv_m' must lie in [0.001, 100], got 200"),
    ({"tsv_m": {"rank_share": {"bounds": [0.5, 200]}}}, "must lie in [0.001, 100], got 200"),
    ({"tsv_m": {"rank_share": {"bounds": [1, 0.5]}}}, "bounds must have low < high, got [1, 0.5]"),
    ({"tsv_m": {"rank_share": {"bounds": [0.5, 0.5]}}}, "bounds must have low < high, got [0.5, 0.5]"),
    ({"tsv_m": {"rank_share": {"bounds": [0.5]}}}, "bounds must be [low, high], got [0.5]"),
    ({"tsv_m": {"rank_share": {"bounds": "all"}}}, "bounds must be [low, high], got 'all'"),
    ({"tsv_m": {"rank_share": {"bound": [0.5, 1]}}}, "unknown key 'bound'; did you mean 'bounds'?"),
    ({"tsv_m": {"rank_share": {"log": True}}}, "a range needs bounds: {bounds: [low, high]}, got {'log': True}"),
    ({"tsv_m": {"rank_share": {"bounds": [0.5, 1], "log": 1}}}, "log must be true or false, got 1"),
    ({"tsv_m": {"rank_share": float("nan")}}, "must be finite, got nan"),
    ({"tsv_m": {"embeddings": {"bounds": [0, 1]}}}, "has no range; list values to choose from: false, true"),
    ({"external": {"name": {"bounds": [0, 1]}}}, "has no range; list the values to choose from"),
    ({"tsv_m": {"embeddings": 1}}, "must be true or false, got 1"),
    ({"wudi": {"steps": 2.5}}, "must be a whole number, got 2.5"),
    ({"wudi": {"lr": "1e-5"}}, "must be a number, got '1e-5'; YAML reads that as text, write 1.0e-5"),
    ({"wudi": {"lr": {"bounds": [0, 1], "log": True}}}, "a logarithmic scale needs a lower bound above 0, got 0"),
    ({"cki_soft": {"sign": 0.5}}, "option 'sign' of 'cki' must be 1 or -1, got 0.5"),
    ({"cki_soft": {"kind": "locl"}}, "must be one of dual, local, global, recommender, got 'locl'"),
    ({"tsv_m": {3: 1}}, "'tsv_m' has no option 3"),
    ({"tsv_m": {"rank_share": None}}, "must be a number, a text, true or false, got None"),
    ({"tsv_m": None}, "write NAME or {NAME: {option: value}}, got {'tsv_m': None}"),
    ({"ties": {"gama": 1}}, "'ties' has no option 'gama'; known: allocate, boost_cap"),
    ({"breadcrumbs": {"gama": 1}}, "'breadcrumbs' has no option 'gama'; did you mean 'gamma'?"),
    ({"ties": {"spread": 0.2}}, "'ties' has no option 'spread' unless it allocates: add allocate: MEASURE"),
    ({"ties": {"scale": 0.2}}, "'ties' has no option 'scale': its coefficients hold all of the strength"),
    ({"tsv_m": {"allocate": "apl"}}, "option 'allocate' of 'tsv_m': an operator has no densities to allocate"),
    ({"ties": {"allocate": "apll"}}, "option 'allocate' of 'ties' must be one of none, magnitude"),
    ({"ties": {"allocate": "search"}}, "name a measure, or list measures to choose from"),
    ({"ties": {"post": "svc"}}, "post: write a list of post rules, for example [svc], got 'svc'"),
    ({"ties": {"post": ["svd"]}}, "post.0: unknown post 'svd'; did you mean 'svc'?"),
    ({"ties": {"post": [{"svc": {"alpa": 1}}]}}, "post.0: 'svc' has no option 'alpa'; did you mean 'alpha'?"),
    ({"ties": {"post": [{"svc": 1}]}}, "post.0: write NAME or {NAME: {option: value}}, got {'svc': 1}"),
    ({"proportional": {}}, "space.presets: no preset is called 'proportional'"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "message"), WRONG)
def test_wrong_options_of_a_preset_are_refused_with_their_place(entry: Any, message: str) -> None:
    with pytest.raises(SpaceError) as refused:
        build("uniform", presets=["task_arithmetic", entry])
    (problem,) = refused.value.problems
    assert message in problem
    assert problem.startswith("space.presets.1: " if "no preset" not in message else "space.presets: ")


def test_wrong_options_are_refused_all_at_once() -> None:
    entries = [entry for entry, _ in WRONG]
    with pytest.raises(SpaceError) as refused:
        build("uniform", presets=entries, post=["xx", {"svc": {"alpha": 99}}])
    problems = refused.value.problems
    assert len(problems) == len(WRONG) + 2
    assert problems[-2] == "space.post.0: unknown post 'xx'; known: iso_spectrum, norm_match, svc"
    assert problems[-1] == "space.post.1: option 'alpha' of 'svc' must lie in [0.001, 10], got 99"


@pytest.mark.parametrize(
    ("axis", "entry", "message"),
    [
        ("select", {"kind": "top_k", "epsilon": "search"}, "'top_k' does not read 'epsilon': nothing to search"),
        ("select", {"kind": "band", "gamma": 1.5}, "option 'gamma' of 'band' must lie in [0, 0.99], got 1.5"),
        ("select", {"kind": "band", "gamma": [0.1]}, "a list needs two or more values"),
        ("select", {"kind": "mass", "scope": ["row", "tensor"]}, "must be one of tensor, model, got 'row'"),
        ("splice", {"kind": "softmax", "temperature": {"bounds": [2, 1]}}, "bounds must have low < high"),
        ("splice", {"kind": "score", "score": {"measure": "fisher", "options": {"power": [9, 1]}}}, "lie in [0, 4]"),
        ("assess", {"measure": "fisher", "options": {"powr": [0.5, 1]}}, "no option 'powr'; did you mean 'power'?"),
        ("resolve", {"kind": "none", "tie": "search"}, "'none' does not read 'tie'"),
    ],
)  # fmt: skip
def test_wrong_options_of_an_axis_are_refused_with_their_place(axis: str, entry: Any, message: str) -> None:
    options: dict[str, Any] = {axis: [entry]}
    with pytest.raises(SpaceError) as refused:
        build("compatibility", **options)
    (problem,) = refused.value.problems
    assert problem.startswith(f"space.{axis}.0: ")
    assert message in problem


# -------------------------------------------------------------------------------------------------------- the page


def test_the_examples_of_the_page_are_spaces_that_decode_and_encode() -> None:
    page = (Path(__file__).parents[2] / "docs" / "study-file.md").read_text()
    section = page.split("### Options of methods")[1].split("## evaluate")[0]
    presets, axes = (yaml.safe_load(text)["space"] for text in re.findall(r"```yaml\n(.*?)```", section, re.DOTALL))
    named = {"tsv_m(embeddings=False).rank_share", "assess.fisher.power"}  # on the page
    assert all(f"`{name}`" in section for name in named)
    for options in (presets, axes):
        space = build(options.pop("type"), **options)
        named -= space.parameters.keys()
        for point in space.initial_points():
            assert active_part(space, space.encode(space.decode(point))) == pytest.approx(active_part(space, point))
    assert not named
    rows = re.findall(r"^\| `rank_share: (.*?)` \|", section, re.MULTILINE)
    assert len(rows) == 4
    for written in rows:
        build("uniform", presets=[{"tsv_m": {"rank_share": yaml.safe_load(written)}}])


# ----------------------------------------------------------------------------------------------- what stands twice


def test_one_preset_with_different_searches_is_refused_and_with_different_fixed_options_is_two() -> None:
    with pytest.raises(SpaceError, match=r"space.presets.1: 'tsv_m' stands twice .*put them into one entry"):
        build("uniform", presets=["tsv_m", {"tsv_m": {"rank_share": "search"}}])
    entries = [{"tsv_m": {"embeddings": e, "rank_share": "search"}} for e in (False, True)]
    space = build("uniform", presets=entries)
    assert list(space.parameters)[:3] == [
        "preset", "tsv_m(embeddings=False).rank_share", "tsv_m(embeddings=True).rank_share",
    ]  # fmt: skip
    with pytest.raises(SpaceError, match="'top_k' stands twice"):
        build("compatibility", select=["top_k", {"kind": "top_k", "rounding": "search"}])
    assert list(build("uniform", presets=["ties", "ties", {"ties": {}}]).parameters) == ["coefficient", "density"]


def test_a_preset_that_is_one_point_of_another_is_left_out() -> None:
    space = build("uniform", presets=[{"tsv_m": {"rank_share": 0.5}}, {"tsv_m": {"rank_share": "search"}}, "ties"])
    assert space.parameters["preset"] == Categorical(("tsv_m", "ties"))
    assert "'tsv_m(rank_share=0.5)' is one point of 'tsv_m', whose options are searched; it is left out" in space.notes
    apart = build("uniform", presets=[{"tsv_m": {"rank_share": 2}}, {"tsv_m": {"rank_share": "search"}}])
    assert apart.parameters["preset"] == Categorical(("tsv_m(rank_share=2)", "tsv_m"))


@pytest.mark.parametrize(("name", "option"), [("coefficient", "rank_share"), ("density", "winsorise")])
def test_a_name_cannot_be_that_of_two_parameters(name: str, option: str) -> None:
    settings = {"coefficient": {"operator": {"name": "tsv_m"}}, "density": PRESETS["ties"].settings}[name]
    with collecting() as rows:
        add_preset(name, "-", settings)
    ((table, row),) = rows
    table.add(row)
    try:
        context = make_context(2, (option, "b"))
        with pytest.raises(SpaceError, match=f"{name}.{option} is the name of two parameters"):
            build("compatibility", context, presets=[{name: {option: "search"}}], coefficients={})
    finally:
        table.remove(row)
