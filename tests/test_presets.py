"""Every element-wise preset gives the values derived by hand from its formula, on one 2 x 4 matrix and two experts."""

from __future__ import annotations

import math

import pytest
import torch

from merge_search.engine.engine import MergeEngine
from merge_search.engine.methods.assess import AssessContext, pcb_paper
from merge_search.engine.methods.operators import OPERATORS
from merge_search.engine.passes.measurements import Measurements
from merge_search.engine.passes.planner import Planner
from merge_search.engine.passes.settings import ResolvedRecipe
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.errors import RecipeError
from merge_search.presets import PRESETS, preset
from merge_search.recipe import Models, Recipe
from merge_search.rules import MEASURES, SELECTIONS, SPLICES
from merge_search.testing.rule import whole_pairs

ONE = torch.tensor([[0.40, -0.20, 0.10, 0.00], [0.30, -0.50, 0.05, -0.10]])
TWO = torch.tensor([[0.10, 0.30, -0.10, 0.20], [-0.60, -0.40, 0.00, 0.20]])
FISHER = (torch.tensor([[1.0, 2, 0.5, 1], [4, 1, 1, 0]]), torch.tensor([[1.0, 1, 0.5, 3], [1, 1, 2, 1]]))
KINDS = ("fisher", "fisher@0.6", "fisher@0.3", "fisher@0.5", "external", "gradient", "absolute_gradient")


@pytest.fixture
def toy() -> MemoryTensors:
    """Base zero, so that weights are deltas; statistics of every kind."""
    statistics = {(kind, e, "w"): f for e, f in zip(("a", "b"), FISHER, strict=True) for kind in KINDS}
    base, experts = {"w": torch.zeros(2, 4)}, {"a": {"w": ONE}, "b": {"w": TWO}}
    return MemoryTensors(base, experts, statistics=statistics, factors=whole_pairs(base, experts))


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


def test_df_merge_with_anchors_gives_the_golden_values_where_the_information_is_the_same(toy):
    """At anchors, DF-Merge's; between them both coefficients are 0.45, so it is 0.9 of the Fisher-weighted mean."""
    options = {"at": "scaled", "floor": 1e-12, "anchors": 0.3}
    splice = {"kind": "score", "score": {"measure": "fisher", "options": options}}
    at = preset("df_merge", toy.models, coefficients={"a": 0.6, "b": 0.3}, splice=splice)
    assert merged(toy, at) == pytest.approx([0.27, -0.1, 0.03, 0.09, 0.216, -0.42, 0.02, 0.12], abs=6e-5)
    between = preset("df_merge", toy.models, coefficients=0.45, splice=splice)
    mean = [0.25, -0.0333, 0, 0.15, 0.12, -0.45, 0.0167, 0.2]
    assert merged(toy, between) == pytest.approx([0.9 * x for x in mean], abs=6e-5)


def test_pcb_paper_gives_the_values_of_the_paper_form(toy):
    expected = [0.4, 0.0781, 0, 0.2, -0.4507, -0.4730, 0, 0]
    assert merged(toy, preset("pcb_paper", toy.models, densities=0.5)) == pytest.approx(expected, abs=6e-5)


BY_TENSOR = {"scope": "tensor", "centred": False}


def test_pcb_paper_takes_all_tensors_of_a_model_as_one(toy):
    """The same numbers as one matrix of the toy: its first row a matrix, its second one a vector."""
    cut = MemoryTensors(
        {"w0": torch.zeros(1, 4), "w1": torch.zeros(4)},
        {e: {"w0": t[:1], "w1": t[1]} for e, t in (("a", ONE), ("b", TWO))},
    )
    out = dict(MergeEngine(cut, compile=False).merged(preset("pcb_paper", cut.models, densities=0.5)))
    expected = [0.4, 0.0781, 0, 0.2, -0.4507, -0.4730, 0, 0]
    assert torch.cat([out["w0"].flatten(), out["w1"]]).tolist() == pytest.approx(expected, abs=6e-5)


def paper_scores(deltas: list[torch.Tensor]) -> list[torch.Tensor]:
    """The paper's formula over flat models."""
    double = [t.double() for t in deltas]

    def shares(x: torch.Tensor, times: int = 1) -> torch.Tensor:
        return (times * x / (x.norm() or 1)).softmax(0)

    return [shares(t * t, len(double)) * sum(shares(t * other) for other in double) for t in double]


def test_pcb_paper_over_the_model_keeps_and_weighs_what_the_formula_says_in_a_model_of_many_parameters():
    """So many that a histogram ranks them, and that scores differ in their last digits. Expert c left w1 as it is."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"w0": (300, 250), "w1": (200,)}
    experts = {e: {n: torch.randn(s, generator=draw) for n, s in shapes.items()} for e in "abc"}
    experts["c"]["w1"] = torch.zeros(200)
    tensors = MemoryTensors({n: torch.zeros(s) for n, s in shapes.items()}, experts)
    flat = [torch.cat([experts[e][n].flatten() for n in shapes]) for e in "abc"]
    scores = paper_scores(flat)
    measurements, n = Measurements(tensors), len(flat[0])
    resolved = ResolvedRecipe.resolve(preset("pcb_paper", tensors.models, densities=0.1))
    for assessment, less in ((resolved.mixing, 0.0), (resolved.assess, 3.0)):
        for name, place in (("w0", slice(0, 75_000)), ("w1", slice(75_000, None))):
            found = measurements.scores(assessment, name)
            for expected, score in zip(scores[: len(found)], found, strict=True):
                assert torch.allclose(score.double(), expected[place] * n**2 - less, rtol=1e-6, atol=1e-7)
    kept = [s >= s.topk(n // 10).values[-1] for s in scores]
    top, total = (sum(k * s * f for k, s, f in zip(kept, scores, x, strict=True)) for x in (flat, [1, 1, 1]))
    expected = torch.where(total > 0, top / total.clamp(min=1e-300), 0)
    out = dict(MergeEngine(tensors, compile=False).merged(resolved.recipe))
    found = torch.cat([out[name].flatten() for name in shapes])
    is_near = (found - expected).abs() < 1e-4
    assert is_near.double().mean() > 0.999  # a few stand in the bin of the cut


def test_pcb_paper_scores_are_shares_of_two_softmaxes_times_the_square_of_the_number_of_entries():
    """a^2 / |a^2| = (1, 0), b^2 / |b^2| = (0, 1), ab = (0, 0), M = 2, two entries."""
    (a, b) = pcb_paper.scores(
        AssessContext(torch.zeros(1, 2), [torch.tensor([[3.0, 0]]), torch.tensor([[0, -1.0]])], [], [], BY_TENSOR, 2)
    )
    intra = [math.exp(2) / (math.exp(2) + 1), 1 / (math.exp(2) + 1)]
    inter = [math.e / (math.e + 1) + 1 / 2, 1 / (math.e + 1) + 1 / 2]
    expected = [4 * x * y for x, y in zip(intra, inter, strict=True)]
    assert a.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert b.flatten().tolist() == pytest.approx(expected[::-1], rel=1e-6)


def test_fisher_weighs_by_the_given_information(toy):
    plain = {"kind": "score", "score": {"measure": "fisher", "options": {"normalise": False}}}
    expected = [0.25, -0.0333, 0, 0.15, 0.12, -0.45, 0.0167, 0.2]
    assert merged(toy, preset("fisher", toy.models, splice=plain)) == pytest.approx(expected, abs=6e-5)
    one, two = (f / f.norm() for f in FISHER)
    both = ((one * ONE + two * TWO) / (one + two)).flatten().tolist()
    assert merged(toy, preset("fisher", toy.models)) == pytest.approx(both, abs=1e-5)


def cki(kind: str, splice: str, **options: float | str) -> dict[str, object]:
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


def test_cki_hard_in_the_other_order_takes_the_second_expert_whole_where_its_entropy_is_smaller(toy):
    """w_glo 0.301469 of the second one is below 1/2, so w = 1 - w_glo (1 - w_loc) is above 1/2 everywhere."""
    recipe = preset("cki_hard", toy.models, splice=cki("dual", "argmax", order="reversed"))
    assert merged(toy, recipe) == pytest.approx(TWO.flatten().tolist())
    assert any(
        point.get("settings", {}).get("splice", {}).get("score", {}).get("options", {}).get("order") == "reversed"
        for point in PRESETS["cki_hard"].grid
    )


@pytest.mark.parametrize("kind", ["dual", "local", "global", "recommender"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cki_in_the_other_order_is_cki_of_the_experts_exchanged(toy, kind, sign):
    exchanged = MemoryTensors({"w": torch.zeros(2, 4)}, {"b": {"w": TWO}, "a": {"w": ONE}})
    other = preset("cki_soft", toy.models, splice=cki(kind, "score", sign=sign, order="reversed"))
    given = preset("cki_soft", exchanged.models, splice=cki(kind, "score", sign=sign))
    assert merged(toy, other) == pytest.approx(merged(exchanged, given), abs=1e-6)
    same = preset("cki_soft", toy.models, splice=cki(kind, "score", sign=sign))
    is_symmetric = kind == "global"
    assert (merged(toy, other) == pytest.approx(merged(toy, same), abs=1e-4)) == is_symmetric


def test_cki_global_rule_prefers_the_opposite_entropy_when_its_sign_is_turned(toy):
    share = 0.698531
    for sign, w in ((1.0, share), (-1.0, 1 - share)):
        expected = (w * ONE + (1 - w) * TWO).flatten().tolist()
        recipe = preset("cki_soft", toy.models, splice=cki("global", "score", sign=sign))
        assert merged(toy, recipe) == pytest.approx(expected, abs=1e-5)


THREE = {"a": [0.0, 0, 0, 3], "b": [0.0, 3, 0, 0], "c": [0.0, 3, 3, 0]}
"""Mean [0, 2, 1, 1], distances from it a: [0, 2, 1, 2], b: [0, 1, 1, 1], c: [0, 1, 2, 1]."""
STANDARDISED = {
    "expert": [
        [z / 11**0.5 for z in (-5, 3, -1, 3)],  # mean 5/4, variance 11/16
        [z / 3**0.5 for z in (-3, 1, 1, 1)],  # mean 3/4, variance 3/16
        [z * 2**0.5 for z in (-1, 0, 1, 0)],  # mean 1, variance 1/2
    ],
    "all": [[z * 2**0.5 for z in of_expert] for of_expert in ((-1, 1, 0, 1), (-1, 0, 0, 0), (-1, 0, 1, 0))],  # 1, 1/2
}
"""The distances less their mean, over their standard deviation: of each expert, or of all of them."""
ENTROPY = [-(0.5**0.5), -(0.5**0.5), 2**0.5]
"""Standardised: with two bins, three of four weights are in the first one for a and b, and two of four for c."""


def softmax_mean(logits: list[list[float]]) -> list[float]:
    """Entry by entry, the mean of `THREE` weighed by the softmax of one list of logits per expert."""
    columns = zip(zip(*logits, strict=True), zip(*THREE.values(), strict=True), strict=True)
    return [sum(math.exp(u) * w for u, w in zip(*c, strict=True)) / sum(math.exp(u) for u in c[0]) for c in columns]


@pytest.mark.parametrize("splice", ["score", "softmax"])
@pytest.mark.parametrize("standardise", STANDARDISED)
@pytest.mark.parametrize(("kind", "sign"), [("local", 1), ("global", 1), ("global", -1), ("dual", 1), ("dual", -1)])
def test_cki_of_three_experts_gives_the_softmax_of_its_two_views(splice, standardise, kind, sign):
    tensors = MemoryTensors({"w": torch.zeros(1, 4)}, {e: {"w": torch.tensor([w])} for e, w in THREE.items()})
    far = [[2.0 * z for z in of_expert] if kind != "global" else [0.0] * 4 for of_expert in STANDARDISED[standardise]]
    information = [sign * 0.4 * h if kind != "local" else 0.0 for h in ENTROPY]
    expected = softmax_mean([[h - z for z in of_expert] for h, of_expert in zip(information, far, strict=True)])
    options = {} if standardise == "expert" else {"standardise": standardise}
    view = cki(kind, splice, gain=2.0, sign=sign, **{"bins": 2, **options})
    assert merged(tensors, preset("cki_soft", tensors.models, splice=view)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("name", "splice"), [("cki_soft", "score"), ("cki_recommender", "softmax")])
def test_cki_of_two_that_agree_and_one_far_away_trusts_the_two(name, splice):
    """1, 1 and 100: distances from the mean 33, 33 and 66, mean 44, standard deviation 11 sqrt(2)."""
    sizes = {"a": 1.0, "b": 1.0, "c": 100.0}
    signs = torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, -1.0]])
    tensors = MemoryTensors({"w": torch.zeros(2, 4)}, {e: {"w": s * signs} for e, s in sizes.items()})
    outlier = 1 / (1 + 2 * math.exp(3 / 2**0.5))
    expected = ((1 - outlier + 100 * outlier) * signs).flatten().tolist()
    assert merged(tensors, preset(name, tensors.models)) == pytest.approx(expected, rel=1e-5)
    earlier = preset("cki_soft", tensors.models, splice=cki("dual", splice))  # a recipe without the option
    assert merged(tensors, earlier) == pytest.approx((34 * signs).flatten().tolist(), rel=1e-5)


def test_cki_of_two_that_agree_and_one_far_away_takes_the_first_of_the_two_where_it_takes_one():
    sizes = {"c": 100.0, "a": 1.0, "b": 1.01}
    tensors = MemoryTensors({"w": torch.zeros(2, 4)}, {e: {"w": s * ONE} for e, s in sizes.items()})
    taken = torch.tensor(merged(tensors, preset("cki_hard", tensors.models))).view(2, 4)
    assert torch.allclose(taken, 1.01 * ONE)  # nearer to the mean 34.003


def test_cki_still_weighs_an_entry_where_all_of_three_experts_are_far_from_their_mean():
    """2, -1 and -1 at one of 40 000 entries: 282 and 141 standard deviations, whose exp is zero in float32."""
    experts = {e: {"w": torch.zeros(200, 200)} for e in "abc"}
    for (e, value), rest in zip({"a": 2.0, "b": -1.0, "c": -1.0}.items(), (1e-6, 2e-6, 3e-6), strict=True):
        experts[e]["w"][3, 3], experts[e]["w"][3, 4] = value, rest
    tensors = MemoryTensors({"w": torch.zeros(200, 200)}, experts)
    assert merged(tensors, preset("cki_soft", tensors.models))[3 * 200 + 3] == pytest.approx(-1.0, rel=1e-5)


@pytest.mark.parametrize("name", ["cki_soft", "cki_hard", "cki_recommender"])
def test_how_cki_standardises_changes_no_bit_of_two_experts(toy, name):
    made = preset(name, toy.models)
    score = made.splice.score.model_copy(
        update={"options": {k: v for k, v in made.splice.score.options.items() if k != "standardise"}}
    )
    earlier = made.model_copy(update={"splice": made.splice.model_copy(update={"score": score})})
    assert earlier.fingerprint != made.fingerprint
    assert merged(toy, earlier) == merged(toy, made)


def test_cki_standardises_over_each_expert_or_over_all(toy):
    with pytest.raises(RecipeError, match="'standardise' of 'cki' must be one of expert, all, got 'both'"):
        merged(toy, preset("cki_soft", toy.models, splice=cki("dual", "score", standardise="both")))


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


@pytest.mark.parametrize("zero_shot", [False, True])
def test_trust_region_multiplies_no_gradient_by_the_delta_of_its_own_expert(zero_shot):
    """1 (10 + 100) + 2 (1 + 100) + 3 (1 + 10) of gradients; 2 (1 10 + 1 100 + 10 100) of deltas alone."""
    gradients, sizes = {"a": 1.0, "b": 2.0, "c": 3.0}, {"a": -1.0, "b": 10.0, "c": 100.0}
    statistics = {("absolute_gradient", e, "w"): torch.full((1, 2), g) for e, g in gradients.items()}
    experts = {e: {"w": torch.full((1, 2), d)} for e, d in sizes.items()}
    tensors = MemoryTensors({"w": torch.zeros(1, 2)}, experts, statistics=statistics)
    recipe = preset(
        "trust_region", tensors.models, assess={"measure": "trust_region", "options": {"zero_shot": zero_shot}}
    )
    resolved = ResolvedRecipe.resolve(recipe)
    (omega, *others) = Measurements(tensors).scores(resolved.assess, "w")
    assert omega.tolist() == [2220.0] * 2 if zero_shot else [345.0] * 2
    assert all(torch.equal(omega, other) for other in others)


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
        assert all(abs(v) < 6 for v in merged(toy, recipe)), name


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


def test_presets_need_data_where_a_rule_of_theirs_does() -> None:
    for name, p in PRESETS.items():
        expert = {"expert": "x"} if name == "expert" else {}
        recipe = preset(name, Models(base="b", experts={"x": "x", "y": "y"}), **expert)
        scored = [recipe.assess] if SELECTIONS[recipe.select.kind].uses_scores else []
        scored += [recipe.splice.score or recipe.assess] if SPLICES[recipe.splice.kind].is_scored else []
        kinds = [kind for a in scored for kind in MEASURES[a.measure].statistics_asked(a.options)]
        if recipe.operator is not None:
            kinds = list(OPERATORS[recipe.operator.name].statistics)
        elif recipe.allocate.kind == "importance":
            kinds += MEASURES[recipe.allocate.measure].statistics_asked(recipe.allocate.options)
        assert p.needs_data == bool(kinds), name


def test_the_grid_of_a_preset_has_its_published_numbers() -> None:
    for name, p in PRESETS.items():
        for key in ("coefficient", "density", "scale"):
            assert not p.grid or getattr(p, key) in [entry.get(key, getattr(p, key)) for entry in p.grid], (name, key)
