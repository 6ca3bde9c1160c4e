"""The tables of rules: complete, light, and true: what a row says is what the engine does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import alone
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.passes.measurements import Measurements
from merge_search.engine.passes.settings import Assessment, Scope
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.errors import RecipeError
from merge_search.presets import PRESETS, preset
from merge_search.recipe import Assess, Models, Recipe, Select
from merge_search.rules import (
    GRANULARITIES,
    MEASURES,
    OPERATORS,
    POSTS,
    SELECTIONS,
    SPLICES,
    STATISTICS,
    TRANSFORMS,
    Measure,
    RuleTable,
)
from merge_search.rules.table import load

TABLES: list[RuleTable[Any]] = [GRANULARITIES, MEASURES, OPERATORS, POSTS, SELECTIONS, SPLICES, STATISTICS, TRANSFORMS]
ROWS = [pytest.param(t, name, id=f"{t.kind}-{name}") for t in TABLES for name in t]
EXPERTS = ("a", "b", "c")
KINDS = ("gradient", "absolute_gradient", "activation_norm", "fisher", "external")


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Recorded(MemoryTensors):
    """Tensors with every statistic, which remember the kinds that were asked for."""

    def statistic(self, kind: str, expert: str, name: str) -> Tensor | None:
        self.asked.add(kind)
        special = {"effect": (2,), "cki_map": (self.shape(name)[-1] + 1, self.shape(name)[-1])}
        shape = special.get(kind.partition("@")[0], self.shape(name))
        return drawn(sum(map(ord, kind + expert)), *shape).abs()

    asked: set[str]


def make(n_experts: int = 3, **changes: Tensor) -> Recorded:
    base = {"w": drawn(0, 24, 16)}
    experts = {e: {"w": base["w"] + 0.1 * drawn(i + 1, 24, 16)} for i, e in enumerate(EXPERTS[:n_experts])}
    made = Recorded(base, {e: {"w": changes.get(e, t["w"])} for e, t in experts.items()})
    made.asked = set()
    return made


TENSORS = make()


def merged(settings: dict[str, Any], tensors: MemoryTensors = TENSORS) -> Tensor:
    ((_, out),) = MergeEngine(tensors, compile=False).merged(Recipe.from_dict({"models": tensors.models, **settings}))
    return out


def selecting(kind: str, **fields: Any) -> dict[str, Any]:
    """Settings under which a selection leaves some parameters out."""
    usual = {k: v for k, v in SELECTIONS[kind].usual.items() if k not in fields}
    needs = {"threshold": 0.05} if kind == "threshold" else {}
    densities = fields.pop("densities", dict.fromkeys(EXPERTS, 0.4))
    measure = fields.pop("measure", "magnitude")
    seed = fields.pop("seed", 0)
    select = {"kind": kind, **usual, **needs, **fields}
    return {"select": select, "densities": densities, "assess": {"measure": measure}, "seed": seed}


# ------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_every_row_has_a_summary_and_a_function_that_can_be_found(table: RuleTable[Any], name: str) -> None:
    row = table[name]
    assert row.name == name
    assert row.summary
    assert not row.is_outside
    if table in (SELECTIONS, SPLICES, GRANULARITIES):
        assert not row.target  # `engine.methods.stages` and `engine.learners.granularity` have their formulas
    else:
        assert callable(load(row))
    assert set(row.choices) <= set(row.options)


def test_the_list_shows_every_rule() -> None:
    shown = alone("list").stdout  # in a process of its own, whose console is wide enough for every line
    for table in TABLES:
        for row in table.values():
            assert row.name in shown
            assert row.summary.split(":")[0][:40] in shown


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    assert MEASURES.unknown("magnitud") == "unknown measure 'magnitud'; did you mean 'magnitude'?"
    assert SELECTIONS.unknown("top_k") == ""
    with pytest.raises(RecipeError) as refused:
        Recipe.from_dict({"models": TENSORS.models, "select": {"kind": "topk"}, "splice": {"kind": "maximum"}})
    assert refused.value.problems == [
        "select.kind: must name a selection, got 'topk'; did you mean 'top_k'?",
        "splice.kind: must name a splice, got 'maximum'; known: argmax, coefficient, count, mask, score, softmax, sum",
    ]


def test_a_row_names_any_function_of_any_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_measures.py").write_text("def ranking(context):\n    return [t.abs() for t in context.deltas]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    row = Measure(name="own", summary="|delta|", target="own_measures:ranking", cheap=True)
    monkeypatch.setitem(MEASURES._rows, "own", row)
    assert torch.equal(merged(selecting("top_k", measure="own")), merged(selecting("top_k")))


# ------------------------------------------------------------------------------------------------ selections

SELECTING = list(SELECTIONS)


@pytest.mark.parametrize("kind", SELECTING)
def test_a_selection_depends_on_densities_scores_and_seed_where_its_row_says_so(kind: str) -> None:
    row, plain = SELECTIONS[kind], merged(selecting(kind))
    others: dict[str, Callable[[], Tensor]] = {
        "uses_density": lambda: merged(selecting(kind, densities=dict.fromkeys(EXPERTS, 0.7))),
        "uses_scores": lambda: merged(selecting(kind, measure="tall_ratio")),
        "is_random": lambda: merged(selecting(kind, seed=1)),
    }
    assert {flag: not torch.equal(plain, other()) for flag, other in others.items()} == {
        flag: getattr(row, flag) for flag in others
    }


@pytest.mark.parametrize("kind", SELECTING)
def test_hard_masks_are_zeros_and_ones(kind: str) -> None:
    alone = make(1)
    out = merged(selecting(kind, densities={"a": 0.4}), alone)
    base, whole = alone.base("w"), alone.expert("a", "w")
    kept = torch.isclose(out, whole)
    assert bool((kept | torch.isclose(out, base)).all()) == SELECTIONS[kind].is_hard


@pytest.mark.parametrize("kind", SELECTING)
def test_counts_are_rounded_where_the_row_says_so(kind: str) -> None:
    densities = dict.fromkeys(EXPERTS, 153.7 / 384)  # of 24 rows of 16
    nearest, down = (merged(selecting(kind, densities=densities, rounding=word)) for word in ("nearest", "down"))
    assert torch.equal(nearest, down) != SELECTIONS[kind].rounds


@pytest.mark.parametrize("kind", [k for k in SELECTING if SELECTIONS[k].is_random])
def test_the_rescale_of_a_random_selection_keeps_the_mean(kind: str) -> None:
    rescale = {"kind": SELECTIONS[kind].rescale}
    settings = selecting(
        kind, densities=dict.fromkeys(EXPERTS, 0.6), measure="ones" if kind == "proportional" else "magnitude"
    )
    found = [merged({**settings, "rescale": rescale, "seed": seed}) for seed in range(300)]
    whole = merged({})
    error = (torch.stack(found).mean(0) - whole).abs().mean()
    assert error < 0.1 * (whole - TENSORS.base("w")).abs().mean()


@pytest.mark.parametrize("kind", SELECTING)
@pytest.mark.parametrize("scope", ["row", "tensor", "model"])
def test_what_a_selection_cannot_rank_or_share_out_is_refused(kind: str, scope: str) -> None:
    engine, row = MergeEngine(TENSORS, compile=False), SELECTIONS[kind]

    def problems(**fields: Any) -> list[str]:
        return engine.check(Recipe.from_dict({"models": TENSORS.models, **selecting(kind, **fields)}))

    assert bool(problems(scope=scope)) == (scope not in row.scopes)
    assert bool(problems(scope=row.scopes[0], exclusive=True)) == (not row.takes_exclusive)


@pytest.mark.parametrize("kind", [k for k in SELECTING if SELECTIONS[k].compares])
def test_one_number_per_tensor_is_refused_within_a_tensor_and_ranks_tensors(kind: str) -> None:
    engine = MergeEngine(TENSORS, compile=False)
    within = Recipe.from_dict({"models": TENSORS.models, **selecting(kind, measure="apl", scope="tensor")})
    (problem,) = engine.check(within)
    assert f"'apl' is one number per tensor: within a tensor '{kind}' has nothing to choose by" in problem
    if "model" in SELECTIONS[kind].scopes:
        assert not engine.check(
            within.model_copy(update={"select": within.select.model_copy(update={"scope": "model"})})
        )


# ------------------------------------------------------------------------------------------------ splices


@pytest.mark.parametrize("kind", list(SPLICES))
def test_a_splice_depends_on_scores_and_coefficients_as_its_row_says(kind: str) -> None:
    row = SPLICES[kind]

    def combined(factor: float = 1.0, measure: str = "magnitude", **rest: Any) -> Tensor:
        coefficients = {"a": 0.7 * factor, "b": 0.4 * factor, "c": 1.1 * factor}
        settings = {"splice": {"kind": kind}, "coefficients": coefficients, "assess": {"measure": measure}, **rest}
        return merged(settings) - TENSORS.base("w")

    plain = combined()
    assert torch.equal(plain, combined(measure="tall_ratio")) != row.is_scored
    near = {"atol": 1e-5, "rtol": 1e-4}
    assert torch.allclose(combined(2.0), plain, **near) == row.divides_by_coefficients
    if row.is_linear:
        assert torch.allclose(combined(2.0), 2 * plain, **near)
    if row.with_hard_masks:
        top, other = {"kind": "top_k"}, row.with_hard_masks
        densities = dict.fromkeys(EXPERTS, 0.5)
        mine, its = (merged({"splice": {"kind": k}, "select": top, "densities": densities}) for k in (kind, other))
        torch.testing.assert_close(mine, its)
    one = merged({"splice": {"kind": kind}}, make(1)) - TENSORS.base("w")
    if row.is_plain_of_all:
        torch.testing.assert_close(one, TENSORS.expert("a", "w") - TENSORS.base("w"))


@pytest.mark.parametrize("kind", list(SPLICES))
def test_the_order_of_the_experts_matters_where_the_row_says_so(kind: str) -> None:
    one, other = (Models(base="memory", experts=dict.fromkeys(order, "memory")) for order in ("abc", "cba"))
    settings = {"splice": {"kind": kind, "score": {"measure": "ones"}}}
    found = [merged({**settings, "models": models}) for models in (one, other)]
    assert torch.equal(*found) != SPLICES[kind].ordered


# ------------------------------------------------------------------------------------------------ measures

BEFORE_MASKS = [name for name, m in MEASURES.items() if not m.after_mask]


def scores(name: str, tensors: Recorded = TENSORS, seed: int = 0, **options: Any) -> list[Tensor]:
    experts = tuple(tensors.models.experts)
    measurements = Measurements(tensors)
    coefficients = options.pop("coefficients", (0.5,) * len(experts))
    assessment = Assessment.resolve(Assess(measure=name, options=options), Scope(experts, Select(), 0.0, seed))
    found = measurements.whole_scores(assessment, "w", coefficients)
    return [t.expand(24 * 16) for t in found]


@pytest.mark.parametrize("name", BEFORE_MASKS)
def test_scores_are_what_the_row_of_a_measure_says(name: str) -> None:
    row, found = MEASURES[name], scores(name)
    flat = [bool((t == t[0]).all()) for t in found]
    assert all(torch.equal(t, found[0]) for t in found) == row.shared
    assert all(flat) == (row.per_tensor or row.is_constant)
    assert all(torch.equal(a, b) for a, b in zip(found, scores(name, seed=1), strict=True)) != row.is_random
    if row.bounded:
        assert all(bool((t >= 0).all()) for t in found)


@pytest.mark.parametrize("name", BEFORE_MASKS)
def test_a_measure_asks_for_the_statistics_of_its_row(name: str) -> None:
    tensors = make()
    scores(name, tensors)
    assert tensors.asked == set(MEASURES[name].statistics_asked({}))
    assert bool(tensors.asked) == MEASURES[name].needs_data


def test_options_decide_what_a_measure_needs() -> None:
    assert MEASURES["trust_region"].statistics_asked({"zero_shot": True}) == ()
    assert MEASURES["external"].statistics_asked({"name": "lrp"}) == ("lrp",)
    fisher = MEASURES["fisher"]
    assert fisher.depends_on_coefficients({"at": "scaled"})
    assert not fisher.depends_on_coefficients({})
    assert not MEASURES["external"].depends_on_coefficients({"name": "scaled"})
    tensors = make()
    scores("fisher", tensors, at="scaled", coefficients=(0.25, 0.5, 0.75))
    assert tensors.asked == {"fisher@0.25", "fisher@0.5", "fisher@0.75"}


# ------------------------------------------------------------------------------------------------ recipes of before

HASHES = {"base": "0", "z": "1", "a": "2"}
PINNED = {
    "base": "cc500a9d119dbf9b",
    "expert": "07f4789119fb2569",
    "average": "0b459e75a2a602ea",
    "linear": "c98b9c3951408c8d",
    "task_arithmetic": "4108131fc61293e8",
    "ties": "a0b9b9ef759c1f46",
    "ties_sum": "f6cae16358a10dc7",
    "ties_mergekit": "7b0b57af67ec770b",
    "dare": "a19bca99ed49cca7",
    "dare_ties": "c29614becddce300",
    "della": "c2bd8e7a5e809e8a",
    "breadcrumbs": "4719fcc3d554c07a",
    "magmax": "318858d3613dff09",
    "emr_unified": "b0a35937dbd09460",
    "consensus": "349bcc9d2fd78d68",
    "pcb": "38821843c1280882",
    "pcb_paper": "7afb25242e9391b1",
    "fisher": "da11a498c7fa6469",
    "df_merge": "a6681a46ea7d90a7",
    "cki_soft": "878df7cfc0db4ffa",
    "cki_hard": "d0061235429d5e35",
    "cki_recommender": "077723448dadbdb7",
    "apl": "8b30324c4604025f",
    "trust_region": "9320c30ec99b9f28",
    "sce": "69c454d526709d89",
    "ram": "91c081cef718940b",
    "ram_plus": "5632970752a5a329",
    "cabs": "2dd6ddd84f0a7d31",
    "external": "2725ae97aea4c9c9",
    "magnitude_soft": "6da885e25dc9c564",
    "magnitude_hard": "4c6eb6600d72b878",
    "tsv_m": "1ca1522fa6a0da2c",
    "iso_c": "acb90e137fc8370a",
    "iso_cts": "bddafefe907d232b",
    "wudi": "85c12d856268dbde",
    "model_stock": "4a1466d2bcb796c5",
    "karcher": "5a4e116859bf0f3a",
    "multislerp": "7d3baf99b715946e",
    "slerp": "04b95b430a6e856d",
    "nuslerp": "b34e65f55445a89f",
    "nearswap": "cd2f2e53313f6d7a",
    "arcee_fusion": "4b818fdadc70872d",
    "regmean": "e1404f0850189763",
    "svc": "2736c97e2b6515de",
    "select.all": "95b81c9ebfccca4e",
    "select.top_k": "c4c35573999006f8",
    "select.threshold": "e5526de802ee2a2e",
    "select.band": "a44f9a009c499706",
    "select.bernoulli": "5e7f35c774d9cfb7",
    "select.rank_probability": "fc3e3e64cd30ccaa",
    "select.proportional": "7f3a82037d86b14b",
    "select.soft_threshold": "ffa67bc3e96d2b66",
    "select.n_m": "11afc2384b7b6253",
    "select.mass": "523134286b89732c",
    "splice.sum": "95b81c9ebfccca4e",
    "splice.count": "2631e97bc854dafe",
    "splice.mask": "195e3a1d97a70f93",
    "splice.coefficient": "aff972dd519d4686",
    "splice.score": "78f9419c04430a64",
    "splice.softmax": "d971fe8635fa3e48",
    "splice.argmax": "fbaa4b0ca0058bdd",
}
"""sha256 of canonical text and fingerprint, as the version that had the kinds in its recipes wrote them."""
EARLIER: dict[str, dict[str, Any]] = {
    "pcb": {"winsorise_limits": "interpolated"},
    "pcb_paper": {
        "assess": {"measure": "pcb_paper"},
        "select": {"kind": "top_k", "scope": "model"},
        "splice": {"kind": "score"},
    },
    "cki_soft": {"splice": {"kind": "score", "score": {"measure": "cki"}}},
    "cki_hard": {"splice": {"kind": "argmax", "score": {"measure": "cki"}}},
    "cki_recommender": {
        "splice": {"kind": "softmax", "score": {"measure": "cki", "options": {"kind": "recommender"}}},
    },
}
"""Settings that a preset had in that version, where it has others now."""


@pytest.mark.parametrize("name", PINNED)
def test_recipes_keep_their_text_and_fingerprint(name: str) -> None:
    models = Models(base="b", experts={"z": "one", "a": "two"}, hashes=HASHES)
    if name in PRESETS:
        plain = name in ("base", "expert")
        numbers: dict[str, Any] = (
            {} if plain else {"densities": {"z": 0.25, "a": {"*": 0.5, "block.1": 0.75}}, "seed": 7}
        )
        numbers |= {"expert": "a"} if name == "expert" else {}
        recipe = preset(name, models, **numbers, **EARLIER.get(name, {}))
    else:
        stage, _, kind = name.partition(".")
        recipe = Recipe.from_dict(
            {"models": models, stage: {"kind": kind}, "maps": {"a": "f" * 64}, "dtype": "bfloat16"}
        )
    assert hashlib.sha256((recipe.to_json() + recipe.fingerprint).encode()).hexdigest()[:16] == PINNED[name]
