"""What is measured once and kept."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from merge_search.engine.contracts import SHORT_RANKS
from merge_search.engine.engine import MergeEngine
from merge_search.engine.execute.runner import Runner
from merge_search.engine.kernels import n_m_masks as balanced
from merge_search.engine.kernels.n_m_masks import balanced_masks, counts_of
from merge_search.engine.kernels.ranks import row_ranks
from merge_search.engine.methods.assess import cki
from merge_search.engine.methods.assess.cki import entropy
from merge_search.engine.passes import measurements
from merge_search.engine.passes.byte_cache import ByteCache
from merge_search.engine.passes.measurements import Measurements
from merge_search.engine.passes.settings import Assessment, Scope
from merge_search.engine.passes.survivors import MAJORITY_SAMPLE, Samples
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.memory import MemoryBudget
from merge_search.presets import preset
from merge_search.recipe import Assess, Select


def tensors(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(shape, generator=generator)}
    return MemoryTensors(
        base, {e: {"w": base["w"] + 0.1 * torch.randn(shape, generator=generator)} for e in ("a", "b")}
    )


@pytest.mark.parametrize("columns", [1, 5, SHORT_RANKS, SHORT_RANKS + 1])
def test_stored_ranks_are_exact(columns):
    models = tensors((3, columns))
    scope = Scope(("a", "b"), Select(kind="rank_probability", scope="row"), 0.0, 0)
    (found, _) = Measurements(models, cache_bytes=2**30).ranks(Assessment.resolve(Assess(), scope), "w")
    delta = models.expert("a", "w") - models.base("w")
    assert found.dtype == (torch.int16 if columns <= SHORT_RANKS else torch.float32)
    assert torch.equal(found.reshape(3, columns).int(), row_ranks(delta.abs()))


def test_two_densities_that_keep_the_same_counts_have_the_same_masks():
    assert counts_of(0.25, 10, 4) == counts_of(0.3, 10, 4) == (1, 1)
    assert counts_of(0.8, 10, 4) == (3, 2)
    models = tensors((4, 10))
    engine = MergeEngine(models, compile=False)
    low = dict(engine.merged(preset("cabs", models.models, densities=0.25)))
    high = dict(engine.merged(preset("cabs", models.models, densities=0.8)))
    again = dict(engine.merged(preset("cabs", models.models, densities=0.3)))
    assert torch.equal(low["w"], again["w"])
    assert not torch.equal(low["w"], high["w"])


@pytest.mark.parametrize("block_size", [2, 4, 16, 17])
def test_ties_in_a_block_go_to_the_lowest_index_whatever_its_size(block_size):
    scores = torch.randint(1, 4, (5, 3 * block_size), generator=torch.Generator().manual_seed(1)).float()
    (mask,) = balanced_masks([scores], [0.5], block_size, exclusive=False)
    keep = max(1, round(0.5 * block_size))
    for block, kept in zip(scores.reshape(-1, block_size).tolist(), mask.reshape(-1, block_size).tolist(), strict=True):
        order = sorted(range(block_size), key=lambda i: (-block[i], i))
        assert [i in order[:keep] for i in range(block_size)] == kept


@pytest.mark.parametrize("exclusive", [False, True])
def test_masks_and_reductions_made_in_parts_are_those_of_the_whole(exclusive, monkeypatch):
    models = tensors((50, 33))
    scores = [models.expert(e, "w").abs() for e in ("a", "b")]
    whole = balanced_masks(scores, [0.3, 0.6], 4, exclusive=exclusive)
    scope = Scope(("a", "b"), Select(kind="soft_threshold"), 0.05, 0)
    pcb = Assessment.resolve(Assess(measure="pcb"), scope)
    numbers = Measurements(models, cache_bytes=0).numbers(pcb, "w")
    monkeypatch.setattr(balanced, "_PART", 100)  # three rows
    monkeypatch.setattr(measurements, "_CHUNK", 97)
    in_parts = balanced_masks(scores, [0.3, 0.6], 4, exclusive=exclusive)
    assert all(map(torch.equal, in_parts, whole))
    assert Measurements(models, cache_bytes=0).numbers(pcb, "w") == numbers


@pytest.mark.parametrize("bins", [1, 3, 10, 256])
def test_the_entropy_counts_as_float64_comparisons_do(bins):
    weights = torch.randn(5000, generator=torch.Generator().manual_seed(bins))
    low, high = float(weights.min()), float(weights.max())
    edges = [low + b * (high - low) / bins for b in range(1, bins + 1)]
    near = torch.tensor(edges, dtype=torch.float64).to(torch.float32).clamp(low, high)
    weights = torch.cat(
        [weights, near, torch.nextafter(near, torch.tensor(low)), torch.nextafter(near, torch.tensor(high))]
    )
    counts = torch.zeros(bins + 1, dtype=torch.float64)
    for w in weights.tolist():  # Python's floats are float64
        counts[sum(w >= edge for edge in edges)] += 1
    shares = (counts[:bins] / len(weights)).tolist()
    assert entropy(weights, bins) == -sum(p * math.log(p) for p in shares if p > 0)
    assert entropy(weights.double(), bins) == entropy(weights, bins)


def test_kept_tensors_are_counted_once_and_those_not_asked_for_go_first():
    cache, entry = ByteCache(MemoryBudget(100)), [torch.zeros(10)]
    cache.put("a", entry)
    cache.put("a", [torch.zeros(15)])
    assert cache.held == 60
    cache.put("b", entry)
    assert cache.get("a") is not None
    cache.put("c", entry)
    assert (cache.get("b"), cache.get("c"), cache.held) == (None, entry, 100)
    cache.drop("a")
    cache.drop("a")
    assert (cache.get("a"), cache.held) == (None, 40)
    cache.put("d", [torch.zeros(26)])
    assert (cache.get("d"), cache.held) == (None, 40)


def test_of_scores_that_depend_on_the_coefficients_only_the_last_are_stored():
    models = tensors((4, 6))
    generator, kinds = torch.Generator().manual_seed(3), ("fisher@0.5", "fisher@0.25")
    given = {(kind, e, "w"): torch.rand(4, 6, generator=generator) for kind in kinds for e in ("a", "b")}
    models = MemoryTensors(
        {"w": models.base("w")}, {e: {"w": models.expert(e, "w")} for e in ("a", "b")}, statistics=given
    )
    engine = MergeEngine(models, compile=False)
    for coefficient, kind in ((0.5, kinds[0]), (0.25, kinds[1]), (0.5, kinds[0])):
        (merged,) = dict(engine.merged(preset("df_merge", models.models, coefficients=coefficient))).values()
        f = [given[kind, e, "w"].double() + 1e-12 for e in ("a", "b")]
        delta = [(models.expert(e, "w") - models.base("w")).double() for e in ("a", "b")]
        mean = coefficient * (f[0] * delta[0] + f[1] * delta[1]) / (f[0] + f[1])
        assert torch.allclose(merged.double(), models.base("w").double() + 2 * mean, atol=1e-6)
        assert engine._measurements.stored.held == 2 * 4 * 6 * 4


@pytest.mark.parametrize("shape", [(3, 5), (MAJORITY_SAMPLE + 1, 2)])
def test_samples_are_evenly_spaced_and_kept(shape):
    models = tensors(shape)
    samples = Samples(Measurements(models, cache_bytes=2**20))
    base, b = samples.entries("w", ["b"])
    step = 1 if models.base("w").numel() <= MAJORITY_SAMPLE else 3
    assert torch.equal(base, models.base("w").reshape(-1)[::step])
    assert torch.equal(b, models.expert("b", "w").reshape(-1)[::step])
    assert samples.entries("w", ["a", "b"])[2].data_ptr() == samples.entries("w", ["b"])[1].data_ptr()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_kept_softmax_weights_give_the_bits_of_those_made_in_the_pass(compile, count):
    generator = torch.Generator().manual_seed(count)
    base = {"w": torch.randn(40, 33, generator=generator).bfloat16()}
    experts = {f"e{i}": {"w": base["w"] + 0.1 * torch.randn(40, 33, generator=generator)} for i in range(count)}
    experts["e0"]["w"][:3] = base["w"][:3].float()
    models = MemoryTensors(base, experts)
    engine = MergeEngine(models, compile=compile)
    score, kinds = {"measure": "cki", "options": {"kind": "recommender"}}, []
    for coefficient, temperature in ((0.5, 1.0), (0.6, 1.0), (0.7, 1.0), (0.7, 0.01), (0.8, 0.01), (0.8, 1.0)):
        splice = {"kind": "softmax", "temperature": temperature, "score": score}
        made = preset("cki_recommender", models.models, coefficients=coefficient, splice=splice)
        kinds.append(engine._planner.plan(made, "w").structure.splice)
        (found,) = dict(engine.merged(made)).values()
        (expected,) = dict(MergeEngine(models, compile=False).merged(made)).values()
        assert torch.equal(found, expected)
    assert kinds == ["softmax", "score", "score", "softmax", "score", "softmax"]


def test_of_what_does_not_fit_the_first_tensors_are_kept_and_the_others_pass_by():
    models = tensors((8, 100))
    names = [f"w{i}" for i in range(5)]
    models = MemoryTensors(
        {n: models.base("w") for n in names}, {e: {n: models.expert(e, "w") for n in names} for e in ("a", "b")}
    )
    made, each = Measurements(models, cache_bytes=7000), 2 * 800 * 2  # int16
    scope = Scope(("a", "b"), Select(kind="rank_probability", scope="row"), 0.0, 0)
    assessment = Assessment.resolve(Assess(), scope)
    first = {n: made.ranks(assessment, n) for n in names}
    assert made.stored.held == 2 * each
    again = {n: made.ranks(assessment, n) for n in names}
    assert [again[n] is first[n] for n in names] == [True, True, False, False, False]
    assert made.ranks(assessment, "w4") is again["w4"]  # held until it is another tensor's turn
    assert all(torch.equal(x, y) for n in names for x, y in zip(first[n], again[n], strict=True))


def test_one_tensor_that_does_not_fit_is_not_held_for_every_candidate():
    made = Measurements(tensors((8, 100)), cache_bytes=100)
    scopes = [Scope(("a", "b"), Select(kind="rank_probability", scope="row"), share / 100, 0) for share in range(9)]
    held = [[weakref.ref(t) for t in made.ranks(Assessment.resolve(Assess(), scope), "w")] for scope in scopes]
    alive = [all(t() is not None for t in ranks) for ranks in held]
    assert alive == [False] * 5 + [True] * 4


def test_what_is_kept_is_decided_by_shapes_and_moves_no_tensor():
    class Read(MemoryTensors):
        def base(self, name):
            names.append(name)
            return super().base(name)

    names: list[str] = []
    base = {n: torch.zeros(2, 3) for n in "uvw"}
    made = Measurements(Read(base, {"a": base}), cache_bytes=48)
    assert [made.has_room(n, 1) for n in "uvw"] == [True, True, False]
    assert names == []


def test_the_disagreement_of_chunks_put_together_is_that_of_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    deltas = [0.1 * torch.randn(1000, generator=generator) + 3.0 for _ in range(3)]
    alike = [torch.full((1000,), v) for v in (0.1, 0.2, 0.4)]
    for chunk in (2000, 97):
        monkeypatch.setattr(cki, "_CHUNK", chunk)
        for (mean, spread), d in zip(cki._spreads(deltas), cki.distances(deltas), strict=True):
            assert mean == pytest.approx(float(d.double().mean()), rel=1e-12)
            assert spread == pytest.approx(float(d.double().std(correction=0)), rel=1e-12)
        assert [spread for _, spread in cki._spreads(alike)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("compile", [False, True])
def test_an_expert_that_left_a_tensor_alone_counts_in_the_variance(compile):
    models = tensors((20, 30))
    base, alone = {"w": models.base("w")}, {"c": {"w": models.base("w").clone()}}
    models = MemoryTensors(base, {e: {"w": models.expert(e, "w")} for e in ("a", "b")} | alone)
    runner = Runner(torch.device("cpu"), compile=compile)
    scope = Scope(("a", "b", "c"), Select(), 0.0, 0)
    variance = Assessment.resolve(Assess(measure="variance"), scope)
    made = Measurements(models, cache_bytes=0, runner=runner).whole_scores(variance, "w")
    deltas = torch.stack([models.expert(e, "w").double() - base["w"].double() for e in ("a", "b", "c")])
    expected = deltas.var(0, correction=0).reshape(-1)
    assert len(made) == 2  # of the active experts
    assert all(torch.allclose(a.double(), expected, rtol=1e-4, atol=1e-9) for a in made)


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_the_bound_of_keep_probabilities_holds_and_is_near(scope):
    models = tensors((50, 40))
    engine = MergeEngine(models, compile=False)
    select = {"kind": "rank_probability", "scope": scope, "epsilon": 0.2}
    made = preset("della", models.models, densities=0.3, coefficients=1.0, scale=1.0, select=select)
    p = engine._planner.plan(made, "w")
    (found,) = dict(engine.merged(made)).values()
    deltas = [models.expert(e, "w") - models.base("w") for e in ("a", "b")]
    limit = float(models.base("w").abs().max()) + sum(float(d.abs().max()) for d in deltas) / 0.1
    assert float(found.abs().max()) <= p.bound <= 1.01 * limit
    nothing = preset("della", models.models, densities=0.2, coefficients=1.0, select=select)
    assert engine._planner.plan(nothing, "w").bound == math.inf
