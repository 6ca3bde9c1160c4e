"""Every element-wise preset gives the values derived by hand from its formula, on one 2 x 4 matrix and two experts."""

from __future__ import annotations

import pytest
import torch

from merge_search.engine.engine import MergeEngine
from merge_search.engine.methods.operators import OPERATORS
from merge_search.engine.passes.planner import Planner
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.errors import RecipeError
from merge_search.presets import PRESETS, preset
from merge_search.recipe import Models, Recipe

ONE = torch.tensor([[0.40, -0.20, 0.10, 0.00], [0.30, -0.50, 0.05, -0.10]])
TWO = torch.tensor([[0.10, 0.30, -0.10, 0.20], [-0.60, -0.40, 0.00, 0.20]])
FISHER = (torch.tensor([[1.0, 2, 0.5, 1], [4, 1, 1, 0]]), torch.tensor([[1.0, 1, 0.5, 3], [1, 1, 2, 1]]))
KINDS = ("fisher", "fisher@0.6", "fisher@0.3", "fisher@0.5", "external", "gradient", "absolute_gradient")


@pytest.fixture
def toy() -> MemoryTensors:
    """Base zero, so that weights are deltas; statistics of every kind."""
    statistics = {(kind, e, "w"): f for e, f in zip(("a", "b"), FISHER, strict=True) for kind in KINDS}
    return MemoryTensors({"w": torch.zeros(2, 4)}, {"a": {"w": ONE}, "b": {"w": TWO}}, statistics=statistics)


def merged(tensors: MemoryTensors, recipe: Recipe) -> list[float]:
    return dict(MergeEngine(tensors, compile=False).merged(recipe))["w"].flatten().tolist()


TIES = {"densities": 0.5, "scale": 1.0}
CKI4 = {"kind": "dual", "bins": 4}
GOLDEN = [
    ("average", {}, [0.25, 0.05, 0, 0.1, -0.15, -0.45, 0.025, 0.05]),
    ("linear", {"coefficients": {"a": 3, "b": 1}}, [0.325, -0.075, 0.05, 0.05, 0.075, -0.475, 0.0375, -0.025]),
    ("task_arithmetic", {"coefficients": {"a": 0.6, "b": 0.3}}, [0.27, -0.03, 0.03, 0.06, 0, -0.42, 0.03, 0]),
    ("ties", TIES, [0.4, 0.3, 0, 0.2, -0.6, -0.45, 0, 0]),
    ("ties_sum", TIES, [0.4, 0.3, 0, 0.2, -0.6, -0.9, 0, 0]),
    ("ties_mergekit", {"coefficients": {"a": 2, "b": 1}}, [0.4, -0.2, 0, 0.2, 0.3, -7 / 15, 0, 0]),
    (
        "breadcrumbs",
        {"coefficients": 1.0, "densities": 0.25, "select": {"kind": "band", "gamma": 0.25}},
        [0, 0.1, 0, 0.2, 0.3, 0, 0, 0],
    ),
    ("magmax", {"scale": 1.0}, [0.4, 0.3, -0.1, 0.2, -0.6, -0.5, 0.05, 0.2]),
    ("magnitude_hard", {}, [0.4, 0.3, 0.1, 0.2, -0.6, -0.5, 0.05, 0.2]),
    ("magnitude_soft", {}, [0.34, 0.1, 0, 0.2, -0.3, -41 / 90, 0.05, 0.1]),
    ("emr_unified", {}, [0.4, 0.3, -0.1, 0.2, -0.6, -0.5, 0.05, 0.2]),
    ("consensus", {"coefficients": 1.0}, [0, 0.1, 0, 0, -0.3, -0.9, 0, 0.1]),
    ("sce", {"densities": 0.5}, [0.2125, 0.3, 0, 0, -0.6, 0, 0, 0.2]),
    ("ram", {}, [0.25, 0.05, 0, 0.2, -0.15, -0.45, 0.05, 0.05]),
    ("ram_plus", {}, [0.25, 0.05, 0, 0.204, -0.15, -0.45, 0.051, 0.05]),
    ("cabs", {}, [0.4, 0.3, 0, 0, -0.6, -0.5, 0, 0]),
    ("external", {"densities": 0.5, "coefficients": 1.0}, [0.5, 0.1, 0, 0.2, 0.3, 0, 0, 0]),
    ("df_merge", {"coefficients": {"a": 0.6, "b": 0.3}}, [0.27, -0.1, 0.03, 0.09, 0.216, -0.42, 0.02, 0.12]),
    ("base", {}, [0.0] * 8),
    ("expert", {"expert": "b"}, TWO.flatten().tolist()),
]


@pytest.mark.parametrize(("name", "settings", "expected"), GOLDEN, ids=[g[0] for g in GOLDEN])
def test_preset_gives_the_values_of_its_formula(toy, name, settings, expected):
    assert merged(toy, preset(name, toy.models, **settings)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("inter", "expected"),
    [
        ("nlp", [0.3970, 0, 0, 0, -0.6, -0.4616, 0.05, 0]),
        ("vision", [0.3876, 0, 0, 0, -0.6, -0.4554, 0.05, 0]),
        ("es", [0.3846, 0, 0, 0, -0.6, -0.45, 0.05, 0]),
    ],
)
def test_pcb_gives_the_values_of_each_released_inter_term(toy, inter, expected):
    assess = {"measure": "pcb", "options": {"inter": inter}}
    recipe = preset("pcb", toy.models, densities=0.5, scale=1.0, winsorise=0.0, assess=assess)
    assert merged(toy, recipe) == pytest.approx(expected, abs=6e-5)


def test_pcb_paper_gives_the_values_of_the_paper_form(toy):
    expected = [0.4, 0.0781, 0, 0.2, -0.4507, -0.4730, 0, 0]
    assert merged(toy, preset("pcb_paper", toy.models, densities=0.5)) == pytest.approx(expected, abs=6e-5)


def test_fisher_weighs_by_the_given_information(toy):
    plain = {"kind": "score", "score": {"measure": "fisher", "options": {"normalise": False}}}
    expected = [0.25, -0.0333, 0, 0.15, 0.12, -0.45, 0.0167, 0.2]
    assert merged(toy, preset("fisher", toy.models, splice=plain)) == pytest.approx(expected, abs=6e-5)
    one, two = (f / f.norm() for f in FISHER)
    both = ((one * ONE + two * TWO) / (one + two)).flatten().tolist()
    assert merged(toy, preset("fisher", toy.models)) == pytest.approx(both, abs=1e-5)


def cki(kind: str, splice: str, **options: float) -> dict[str, object]:
    return {"kind": splice, "score": {"measure": "cki", "options": {"kind": kind, "bins": 4, **options}}}


@pytest.mark.parametrize(
    ("name", "splice", "expected"),
    [
        ("cki_soft", cki("dual", "score"), [0.2914, -0.0850, 0.0142, 0.0858, 0.2417, -0.4509, 0.0241, 0.0086]),
        ("cki_hard", cki("dual", "argmax"), [0.4, -0.2, 0.1, 0, 0.3, -0.5, 0, -0.1]),
    ],
)
def test_cki_gives_the_values_of_the_dual_rule(toy, name, splice, expected):
    assert merged(toy, preset(name, toy.models, splice=splice)) == pytest.approx(expected, abs=6e-5)


def test_cki_recommender_gives_the_values_of_its_softmax(toy):
    w = torch.tensor([[0.5389, 0.5579, 0.5285, 0.5285], [0.5792, 0.5184, 0.5137, 0.5389]])
    expected = (w * ONE + (1 - w) * TWO).flatten().tolist()
    recipe = preset("cki_recommender", toy.models, splice=cki("recommender", "softmax"))
    assert merged(toy, recipe) == pytest.approx(expected, abs=1e-4)


def test_cki_global_rule_prefers_the_opposite_entropy_when_its_sign_is_turned(toy):
    share = 0.698531
    for sign, w in ((1.0, share), (-1.0, 1 - share)):
        expected = (w * ONE + (1 - w) * TWO).flatten().tolist()
        recipe = preset("cki_soft", toy.models, splice=cki("global", "score", sign=sign))
        assert merged(toy, recipe) == pytest.approx(expected, abs=1e-5)


def test_cki_of_three_experts_prefers_agreement_with_the_mean():
    base = {"w": torch.zeros(2, 4)}
    tensors = MemoryTensors(base, {"a": {"w": ONE}, "b": {"w": ONE * 1.01}, "c": {"w": TWO}})
    recipe = preset("cki_soft", tensors.models, splice=cki("local", "softmax", gain=3.0))
    near_two = (torch.tensor(merged(tensors, recipe)).view(2, 4) - TWO).abs().mean()
    average = (torch.tensor(merged(tensors, preset("average", tensors.models))).view(2, 4) - TWO).abs().mean()
    assert near_two > average


def test_della_keeps_by_rank_in_the_row(toy):
    """Keep probabilities of expert a at density 0.7, epsilon 0.15: recovered from what survivors are divided by."""
    select = {"kind": "rank_probability", "scope": "row", "epsilon": 0.15}
    expected = torch.tensor([[0.85, 0.75, 0.65, 0.55], [0.75, 0.85, 0.55, 0.65]])
    only = MemoryTensors({"w": torch.zeros(2, 4)}, {"a": {"w": ONE}})
    seen = torch.zeros(2, 4)
    for seed in range(12):
        recipe = preset("della", only.models, densities=0.7, scale=1.0, select=select, seed=seed)
        out = torch.tensor(merged(only, recipe)).view(2, 4)
        seen = torch.where(out != 0, ONE / out, seen)
    known = ONE != 0
    assert torch.allclose(seen[known], expected[known], atol=1e-6)


def test_dare_keeps_or_drops_whole_entries_and_is_unbiased():
    delta = torch.full((400, 500), 0.25)
    tensors = MemoryTensors({"w": torch.zeros(400, 500)}, {"a": {"w": delta}})
    out = torch.tensor(merged(tensors, preset("dare", tensors.models, densities=0.2, coefficients=1.0)))
    assert set(out.tolist()) == {0.0, 1.25}
    assert float(out.double().mean()) == pytest.approx(0.25, abs=5 * 1.25 * (0.16 / 200_000) ** 0.5)


def test_trust_region_drops_the_entries_where_gradients_meet_other_deltas(toy):
    omega = (FISHER[0].abs() * TWO.abs() + FISHER[1].abs() * ONE.abs()).flatten()
    expected = (0.3 * (ONE + TWO)).flatten()
    expected[omega.topk(2).indices] = 0
    recipe = preset("trust_region", toy.models, select={"kind": "band", "scope": "model", "gamma": 0.25}, densities=1.0)
    assert merged(toy, recipe) == pytest.approx(expected.tolist(), abs=1e-6)


def apl_tensors():
    """Deltas of ones; the gradient of ``strong`` points along its delta, that of ``weak`` mostly across: cosine 1/8."""
    names = ("strong", "weak")
    across = torch.ones(64, 64)
    across[:, 36:] = -1.0
    gradient = {("gradient", "a", "strong"): torch.full((64, 64), 0.01), ("gradient", "a", "weak"): across}
    deltas = {"a": {n: torch.ones(64, 64) for n in names}}
    return MemoryTensors({n: torch.zeros(64, 64) for n in names}, deltas, statistics=gradient)


def test_apl_gives_tensors_that_move_along_the_gradient_more_density_and_weight_whatever_the_sizes():
    tensors = apl_tensors()
    recipe = preset("apl", tensors.models, coefficients=1.0)
    planner = Planner(tensors)
    strong, weak = planner.settings(recipe, "strong"), planner.settings(recipe, "weak")
    assert (strong.densities[0], weak.densities[0]) == pytest.approx((0.7, 0.3), abs=1e-6)
    ratio = (1 / 8) ** 0.5
    assert (strong.coefficients[0], weak.coefficients[0]) == pytest.approx(
        (2 / (1 + ratio), 2 * ratio / (1 + ratio)), rel=1e-5
    )


def test_apl_without_normalising_ranks_by_the_plain_inner_product():
    tensors = apl_tensors()
    rule = {**PRESETS["apl"].settings["allocate"], "options": {"normalise": False}}
    recipe = preset("apl", tensors.models, coefficients=1.0, allocate=rule)
    planner = Planner(tensors)
    ratio = (0.01 * 4096 / (4096 / 8)) ** 0.5  # of |<gradient, delta>|
    assert planner.settings(recipe, "strong").coefficients[0] == pytest.approx(2 * ratio / (1 + ratio), rel=1e-5)


def test_every_preset_makes_a_recipe_that_survives_json_and_merges(toy):
    for name, p in PRESETS.items():
        if (p.needs_data and "operator" in p.settings) or p.experts[1] == 1:
            continue
        recipe = preset(name, toy.models, **({"expert": "a"} if name == "expert" else {}))
        assert Recipe.from_json(recipe.to_json()) == recipe, name
        assert all(abs(v) < 3 for v in merged(toy, recipe)), name


def test_every_grid_point_of_every_preset_is_a_valid_recipe(toy):
    for name, p in PRESETS.items():
        models = Models(base="b", experts={"a": "x"}) if p.experts[1] == 1 else toy.models
        for point in p.grid:
            values = dict(point)
            settings = values.pop("settings", {})
            arguments = {
                {"coefficient": "coefficients", "density": "densities"}.get(k, k): v for k, v in values.items()
            }
            assert preset(name, models, **arguments, **settings).preset == name


def test_every_preset_names_its_source():
    for name, p in PRESETS.items():
        assert p.name == name
        assert p.summary
        assert p.paper


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match="did you mean 'ties'"):
        preset("tiess", Models(base="b", experts={"a": "x"}))


def test_a_preset_for_several_experts_refuses_one():
    with pytest.raises(RecipeError, match="'consensus' needs 2"):
        preset("consensus", Models(base="b", experts={"a": "x"}))


def test_the_expert_preset_needs_the_name_of_an_expert(toy):
    with pytest.raises(RecipeError, match="needs expert="):
        preset("expert", toy.models, expert="c")


def test_overrides_replace_fields_and_errors_name_the_preset(toy):
    assert preset("ties", toy.models, seed=3).seed == 3
    with pytest.raises(RecipeError, match="preset 'ties'"):
        preset("ties", toy.models, densities=1.5)


def test_presets_know_which_operators_make_one_delta_per_expert() -> None:
    for p in PRESETS.values():
        if "operator" in p.settings:
            assert p.is_linear == OPERATORS[p.settings["operator"]["name"]].decomposing, p.name
        else:
            assert p.is_linear
