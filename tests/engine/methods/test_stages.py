"""The pipeline's identities, and that chunks give the bits of the definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from merge_search.engine.contracts import Tensors
from merge_search.engine.engine import MergeEngine
from merge_search.engine.execute import runner as fused
from merge_search.engine.reference import merge_tensor
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.errors import NonFiniteError, RecipeError
from merge_search.presets import PRESETS, preset
from merge_search.recipe import Group, Recipe

NO_DATA = [name for name, p in PRESETS.items() if not p.needs_data and not {"operator", "post"} & set(p.settings)]


def models(shapes, dtype=torch.float32, experts=("a", "b", "c"), seed=0, scale=1.0):
    """A random base and experts with deltas of a tenth of its size; names w0, w1, ..."""
    generator = torch.Generator().manual_seed(seed)
    base = {f"w{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}
    others = {
        e: {n: (t.float() + 0.1 * scale * torch.randn(t.shape, generator=generator)).to(dtype) for n, t in base.items()}
        for e in experts
    }
    return MemoryTensors(base, others)


def merged(tensors, recipe, **options):
    return dict(MergeEngine(tensors, compile=False, **options).merged(recipe))


def deltas(tensors, name):
    return {e: tensors.expert(e, name).float() - tensors.base(name).float() for e in tensors.models.experts}


def recipe(tensors, **settings):
    return Recipe.model_validate({"models": tensors.models, **settings})


# --- one definition, several ways to run it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NO_DATA)
def test_chunks_give_the_bits_of_the_definition(name, dtype, monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 37)
    tensors = models([(13, 17), (31,), (1,), (1, 1), (), (0, 4), (4, 3, 5)], dtype)
    made = preset(name, tensors.models, seed=5)
    for key, out in merged(tensors, made).items():
        assert out.dtype == dtype
        assert torch.equal(out, merge_tensor(made, tensors, key)), key


def test_tensors_longer_than_a_chunk_and_than_exact_tables_give_the_bits_of_the_definition():
    tensors = models([(601, 701)], torch.bfloat16)
    assert tensors.base("w0").numel() > fused.CHUNK
    for name in ("ties", "dare", "della", "breadcrumbs", "pcb"):
        made = preset(name, tensors.models)
        assert torch.equal(merged(tensors, made)["w0"], merge_tensor(made, tensors, "w0")), name


def test_inputs_in_any_layout_and_mixed_dtypes_are_read_right():
    plain = models([(12, 20)], torch.bfloat16)
    strided = MemoryTensors(
        {"w0": plain.base("w0").T.contiguous().T},
        {e: {"w0": plain.expert(e, "w0").float().T.contiguous().T} for e in plain.models.experts},
    )
    made = preset("ties", plain.models)
    assert torch.equal(merged(plain, made)["w0"], merged(strided, made)["w0"])


def test_a_warm_engine_gives_the_bits_of_a_cold_one():
    tensors = models([(40, 50), (60,)])
    warm = MergeEngine(tensors, compile=False)
    recipes = [preset(n, tensors.models, seed=1) for n in NO_DATA]
    for made in recipes + recipes[::-1]:
        for name, out in warm.merged(made):
            assert torch.equal(out, merge_tensor(made, tensors, name))


def test_a_cache_too_small_to_hold_anything_changes_nothing():
    tensors = models([(40, 50)])
    made = preset("della", tensors.models)
    assert torch.equal(merged(tensors, made, cache_bytes=0)["w0"], merged(tensors, made)["w0"])


def test_the_merge_is_stored_in_the_dtype_the_recipe_asks_for():
    tensors = models([(8, 8)], torch.bfloat16)
    wide = merged(tensors, preset("average", tensors.models, dtype="float32"))["w0"]
    assert wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), merged(tensors, preset("average", tensors.models))["w0"])


# --- identities


def test_sum_of_everything_is_task_arithmetic_and_the_average_with_one_over_m():
    tensors = models([(9, 11)])
    d = deltas(tensors, "w0")
    out = merged(tensors, recipe(tensors, coefficients={"a": 0.5, "b": -0.25, "c": 2.0}))["w0"]
    assert torch.allclose(out, tensors.base("w0") + 0.5 * d["a"] - 0.25 * d["b"] + 2.0 * d["c"], atol=1e-6)
    mean = sum(tensors.expert(e, "w0") for e in "abc") / 3
    assert torch.allclose(merged(tensors, preset("average", tensors.models))["w0"], mean, atol=1e-6)


def test_a_normalised_linear_merge_is_the_weighted_mean_and_depends_on_ratios_alone():
    tensors = models([(9, 11)])
    weights = {"a": 0.6, "b": 0.3, "c": 0.1}
    mean = sum(w * tensors.expert(e, "w0") for e, w in weights.items())
    out = merged(tensors, preset("linear", tensors.models, coefficients=weights))["w0"]
    assert torch.allclose(out, mean, atol=1e-6)
    eightfold = {e: 8 * w for e, w in weights.items()}
    assert torch.equal(merged(tensors, preset("linear", tensors.models, coefficients=eightfold))["w0"], out)


def test_softmax_goes_from_the_winner_to_the_mean_of_survivors_as_its_temperature_rises():
    tensors = models([(9, 11)])

    def at(temperature):
        splice = {"kind": "softmax", "temperature": temperature}
        return merged(tensors, recipe(tensors, splice=splice))["w0"]

    hard = merged(tensors, recipe(tensors, splice={"kind": "argmax"}))["w0"]
    assert torch.allclose(at(1e-4), hard, atol=1e-5)
    assert torch.allclose(at(1e6), merged(tensors, recipe(tensors, splice={"kind": "count"}))["w0"], atol=1e-5)


def test_score_splicing_with_equal_scores_is_the_mean_of_survivors():
    tensors = models([(9, 11)])
    settings = {"select": {"kind": "top_k"}, "densities": dict.fromkeys("abc", 0.4)}
    by_score = recipe(tensors, **settings, splice={"kind": "score", "score": {"measure": "ones"}})
    by_mask = recipe(tensors, **settings, splice={"kind": "mask"})
    assert torch.equal(merged(tensors, by_score)["w0"], merged(tensors, by_mask)["w0"])


def test_one_expert_kept_whole_is_that_expert():
    tensors = models([(9, 11)], experts=("a",))
    out = merged(tensors, preset("ties", tensors.models, densities=1.0))["w0"]
    assert torch.allclose(out, tensors.expert("a", "w0"), atol=1e-6)


def test_half_precision_experts_come_back_bit_for_bit():
    tensors = models([(50, 60)], torch.bfloat16, experts=("a",))
    out = merged(tensors, preset("task_arithmetic", tensors.models, coefficients=1.0))["w0"]
    assert torch.equal(out, tensors.expert("a", "w0"))


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in NO_DATA
        if n not in ("cabs", "magmax", "magnitude_hard", "emr_unified", "cki_soft", "cki_hard", "cki_recommender")
    ],
)
def test_the_order_of_the_experts_changes_no_bit(name):
    """Except where it has a meaning: exclusive selection, ties of argmax, CKI."""
    one = models([(20, 30), (7,)], torch.bfloat16)
    coefficients = {"a": 0.5, "b": 1.0, "c": 0.25}
    expected = merged(one, preset(name, one.models, coefficients=coefficients))
    for order in itertools.permutations("abc"):
        other = MemoryTensors(
            {n: one.base(n) for n in one.groups}, {e: {n: one.expert(e, n) for n in one.groups} for e in order}
        )
        got = merged(other, preset(name, other.models, coefficients=coefficients))
        assert all(torch.equal(got[n], expected[n]) for n in expected), order


@pytest.mark.parametrize("name", NO_DATA)
def test_where_no_expert_changed_a_tensor_the_base_is_returned_bit_for_bit(name):
    tensors = models([(6, 7), (5,)], torch.bfloat16, scale=0.0)
    tensors.base("w0")[0, 0] = -0.0
    for e in tensors.models.experts:
        tensors.expert(e, "w0")[0, 0] = 0.0  # another bit pattern, the same number
    for n, out in merged(tensors, preset(name, tensors.models)).items():
        assert torch.equal(out.view(torch.int16), tensors.base(n).view(torch.int16))


@pytest.mark.parametrize("splice", ["count", "mask", "score", "softmax", "argmax", "coefficient"])
def test_identical_experts_are_returned_whatever_the_splice(splice):
    one = models([(6, 7)], experts=("a",))
    expert = {"w0": one.expert("a", "w0")}
    tensors = MemoryTensors({"w0": one.base("w0")}, {"a": expert, "b": expert, "c": expert})
    out = merged(tensors, recipe(tensors, splice={"kind": splice}))["w0"]
    assert torch.allclose(out, expert["w0"], atol=1e-6)


# --- stages


def test_an_expert_that_left_a_tensor_alone_is_in_no_denominator():
    one = models([(6, 7)], experts=("a",))
    frozen = {"w0": one.base("w0")}
    tensors = MemoryTensors({"w0": one.base("w0")}, {"a": {"w0": one.expert("a", "w0")}, "b": frozen})
    for splice in ("count", "mask", "coefficient"):
        out = merged(tensors, recipe(tensors, splice={"kind": splice}))["w0"]
        assert torch.allclose(out, tensors.expert("a", "w0"), atol=1e-6)
    half = merged(tensors, preset("average", tensors.models))["w0"]
    assert torch.allclose(half, (tensors.base("w0") + tensors.expert("a", "w0")) / 2, atol=1e-6)


def test_a_coefficient_of_zero_still_votes_unless_votes_are_weighted():
    base = {"w": torch.zeros(1, 2)}
    tensors = MemoryTensors(base, {"a": {"w": torch.tensor([[1.0, 1.0]])}, "b": {"w": torch.tensor([[-2.0, 0.5]])}})
    settings = {"coefficients": {"b": 0.0}, "splice": {"kind": "sum"}}
    silent = merged(tensors, recipe(tensors, **settings, resolve={"kind": "sum"}))["w"]
    assert silent.tolist() == [[0.0, 1.0]]
    weighted = merged(tensors, recipe(tensors, **settings, resolve={"kind": "sum", "weighted": True}))["w"]
    assert weighted.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("compile", [False, True])
def test_a_negative_coefficient_votes_and_agrees_with_the_opposite_sign_where_votes_are_weighted(compile):
    # weighted votes: (2, -1, 0.5), (-2, -1, 0.5), (2, 1, 0.5): elected +, -, +
    a, b, c = [[2.0, -2.0, 2.0]], [[1.0, 1.0, -1.0]], [[1.0, 1.0, 1.0]]
    long = 400  # long enough for a compiled loop
    tensors = MemoryTensors(
        {"w": torch.zeros(long, 3)}, {e: {"w": torch.tensor(v * long)} for e, v in {"a": a, "b": b, "c": c}.items()}
    )
    settings = {"coefficients": {"a": 1.0, "b": -1.0, "c": 0.5}, "resolve": {"kind": "sum", "weighted": True}}

    def at(splice):
        made = recipe(tensors, **settings, splice={"kind": splice})
        return dict(MergeEngine(tensors, compile=compile).merged(made))["w"][-1].tolist()

    assert at("sum") == [2.5, -3.0, 3.5]
    assert at("count") == pytest.approx([2.5 / 2, -3.0 / 2, 3.5 / 3])
    # divided by the coefficients that agree: 1 + 0.5; 1 - 1 = 0, left out; 1 - 1 + 0.5
    assert at("coefficient") == pytest.approx([2.5 / 1.5, 0.0, 3.5 / 0.5])


@pytest.mark.parametrize(("tie", "expected"), [("plus", 1.0), ("minus", -1.0), ("drop", 0.0), ("majority", -1.0)])
def test_an_exact_tie_is_settled_as_the_recipe_says(tie, expected):
    one, two = torch.tensor([[1.0, -3.0, -4.0]]), torch.tensor([[-1.0, -3.0, 1.0]])
    tensors = MemoryTensors({"w": torch.zeros(1, 3)}, {"a": {"w": one}, "b": {"w": two}})
    out = merged(tensors, recipe(tensors, resolve={"kind": "sum", "tie": tie}, splice={"kind": "count"}))["w"]
    assert out.tolist() == [[expected, -3.0, -4.0]]


def test_election_by_count_gives_every_expert_one_vote():
    values = {"a": -5.0, "b": 1.0, "c": 2.0}
    tensors = MemoryTensors({"w": torch.zeros(1, 1)}, {e: {"w": torch.full((1, 1), v)} for e, v in values.items()})
    by_sum = merged(tensors, recipe(tensors, resolve={"kind": "sum"}))["w"]
    by_count = merged(tensors, recipe(tensors, resolve={"kind": "count"}))["w"]
    assert (by_sum.item(), by_count.item()) == (-5.0, 3.0)


def test_vectors_stay_whole_unless_asked_for():
    tensors = models([(10, 10), (10,)])
    settings = {
        "select": {"kind": "top_k"},
        "densities": dict.fromkeys("abc", 0.1),
        "rescale": {"kind": "inverse_density"},
    }
    whole = recipe(tensors)
    out = merged(tensors, recipe(tensors, **settings))
    assert torch.equal(out["w1"], merged(tensors, whole)["w1"])
    cut = merged(tensors, recipe(tensors, **{**settings, "select": {"kind": "top_k", "vectors": True}}))
    assert int((cut["w1"] != tensors.base("w1")).sum()) <= 3


@pytest.mark.parametrize("kind", ["match_l1", "match_l2"])
def test_matching_restores_the_norm_of_the_whole_delta(kind):
    tensors = models([(30, 40)], experts=("a",))
    settings = {"select": {"kind": "top_k"}, "densities": {"a": 0.3}, "rescale": {"kind": kind}}
    out = merged(tensors, recipe(tensors, **settings))["w0"] - tensors.base("w0")
    order = 1 if kind == "match_l1" else 2
    assert float(out.norm(order)) == pytest.approx(float(deltas(tensors, "w0")["a"].norm(order)), rel=1e-4)


def test_a_row_scope_keeps_the_share_of_every_row():
    tensors = models([(12, 20)], experts=("a",))
    out = merged(tensors, recipe(tensors, select={"kind": "top_k", "scope": "row"}, densities={"a": 0.25}))["w0"]
    assert ((out != tensors.base("w0")).sum(1) == 5).all()


def test_a_model_scope_ranks_tensors_together():
    one = models([(10, 10), (10, 10)], experts=("a",))
    expert = {"w0": one.expert("a", "w0"), "w1": one.base("w1") + 100 * (one.expert("a", "w1") - one.base("w1"))}
    tensors = MemoryTensors({n: one.base(n) for n in one.groups}, {"a": expert})
    out = merged(tensors, recipe(tensors, select={"kind": "top_k", "scope": "model"}, densities={"a": 0.4}))
    changed = {n: int((out[n] != tensors.base(n)).sum()) for n in out}
    assert sum(changed.values()) == 80
    assert changed["w1"] > 75


def test_a_model_scope_over_tensors_that_an_expert_left_alone_still_breaks_ties_by_position():
    base = {n: torch.zeros(2, 3) for n in ("w0", "w1", "w2")}
    tensors = MemoryTensors(base, {"a": {"w0": torch.zeros(2, 3), "w1": torch.ones(2, 3), "w2": torch.ones(2, 3)}})
    out = merged(tensors, recipe(tensors, select={"kind": "top_k", "scope": "model"}, densities={"a": 8 / 12}))
    assert [int(out[n].sum()) for n in base] == [0, 6, 2]


def test_balanced_masks_keep_the_same_number_in_every_block():
    tensors = models([(6, 10)], experts=("a", "b"))
    made = preset("cabs", tensors.models, densities=0.5)
    out = merged(tensors, made)["w0"] - tensors.base("w0")
    a = merged(tensors, preset("cabs", tensors.models, densities=0.5, coefficients={"a": 1.0, "b": 0.0}))["w0"]
    kept = a != tensors.base("w0")
    assert (kept[:, :8].view(6, 2, 4).sum(-1) == 2).all()
    assert (kept[:, 8:].sum(-1) == 1).all()
    assert torch.allclose(out[kept], deltas(tensors, "w0")["a"][kept], atol=1e-6)


def test_soft_thresholds_give_the_top_score_its_whole_delta_and_the_cut_none():
    one = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    tensors = MemoryTensors({"w": torch.zeros(1, 4)}, {"a": {"w": one}})
    settings = {"select": {"kind": "soft_threshold"}, "densities": {"a": 0.75}}
    assert merged(tensors, recipe(tensors, **settings))["w"].tolist() == [[4.0, 1.5, 0.0, 0.0]]


@pytest.mark.parametrize("compile", [False, True])
def test_winsorising_clips_the_sizes_of_a_delta_at_both_ends_and_keeps_its_signs(compile):
    one = torch.tensor([[0.1, 1.0, -2.0, 3.0, -9.0]])
    long = 400  # long enough for a compiled loop
    tensors = MemoryTensors({"w": torch.zeros(long, 5)}, {"a": {"w": one.repeat(long, 1)}})

    def at(share):
        made = recipe(tensors, winsorise=share)
        return dict(MergeEngine(tensors, compile=compile).merged(made))["w"][-1].tolist()

    assert at(0.0) == one[0].tolist()
    assert at(0.1) == one[0].tolist()  # less than the share of one value
    assert at(0.25) == [1.0, 1.0, -2.0, 3.0, -3.0]


def test_winsorising_as_released_clips_at_the_sorted_sizes_numbers_nq_and_n_less_nq_less_one():
    one = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0]])
    tensors = MemoryTensors({"w": torch.zeros(1, 8)}, {"a": {"w": one}})

    def at(share):
        return merged(tensors, recipe(tensors, winsorise=share, winsorise_limits="released"))["w"].tolist()[0]

    assert at(0.125) == [2.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -7.0]  # numbers 1 and 6, from 0
    assert at(0.2) == [2.0, -2.0, 3.0, -4.0, 5.0, -6.0, 6.0, -6.0]  # numbers 1 and 5
    assert at(0.0) == one.tolist()[0]


def test_winsorising_as_released_takes_values_of_the_deltas_however_many_there_are():
    tensors = models([(300, 300), (200, 150), (70,)], torch.bfloat16, experts=("a", "b"))
    made = recipe(tensors, winsorise=0.01, winsorise_limits="released", dtype="float32", select={"scope": "model"})
    for limited in (made, made.model_copy(update={"select": made.select.model_copy(update={"scope": "tensor"})})):
        together = [["w0", "w1"]] if limited.select.scope == "model" else [["w0"], ["w1"]]
        out = merged(tensors, limited)
        for names in together:
            clipped = {}
            for e in "ab":
                sizes = torch.cat([deltas(tensors, n)[e].abs().flatten() for n in names]).sort().values
                n = len(sizes)
                clipped[e] = float(sizes[int(n * 0.01)]), float(sizes[int(n * 0.99 - 1)])
            for name in names:
                total = sum(d.sign() * d.abs().clamp(*clipped[e]) for e, d in deltas(tensors, name).items())
                assert torch.allclose(out[name], tensors.base(name).float() + total, atol=1e-6)


def test_winsorising_as_released_is_exact_where_a_histogram_holds_many_values_in_a_bin():
    """1 to 90 000: numbers 900 and 89 099, from 0, are 901 and 89 100."""
    order = torch.randperm(90_000, generator=torch.Generator().manual_seed(0))
    tensors = MemoryTensors({"w": torch.zeros(300, 300)}, {"a": {"w": 1.0 + order.float().view(300, 300)}})
    out = merged(tensors, recipe(tensors, winsorise=0.01, winsorise_limits="released"))["w"]
    assert (float(out.min()), float(out.max())) == (901.0, 89_100.0)


def test_selection_by_mass_keeps_the_fewest_that_reach_it():
    one = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    tensors = MemoryTensors({"w": torch.zeros(1, 4)}, {"a": {"w": one}})
    out = merged(tensors, recipe(tensors, select={"kind": "mass"}, densities={"a": 0.7}))["w"]
    assert out.tolist() == [[4.0, 3.0, 0.0, 0.0]]


def test_proportional_selection_is_unbiased_with_inverse_probability():
    generator = torch.Generator().manual_seed(0)
    delta = torch.rand((500, 400), generator=generator)
    tensors = MemoryTensors({"w": torch.zeros(500, 400)}, {"a": {"w": delta}})
    settings = {"select": {"kind": "proportional"}, "rescale": {"kind": "inverse_probability"}, "densities": {"a": 0.3}}
    out = merged(tensors, recipe(tensors, **settings))["w"]
    assert float((out != 0).double().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(out.double().mean()) == pytest.approx(float(delta.double().mean()), rel=0.01)


def test_densities_coefficients_and_scale_may_differ_by_group():
    one = models([(8, 8), (8, 8)], experts=("a",))
    groups = {"w0": Group("w0", 0, "attention"), "w1": Group("w1", 1, "mlp")}
    tensors = MemoryTensors(
        {n: one.base(n) for n in groups}, {"a": {n: one.expert("a", n) for n in groups}}, groups=groups
    )
    made = recipe(tensors, coefficients={"a": {"*": 1.0, "block.1": 0.5}}, scale={"*": 1.0, "mlp": 4.0})
    out = merged(tensors, made)
    assert torch.allclose(out["w0"], tensors.expert("a", "w0"), atol=1e-6)
    assert torch.allclose(out["w1"], tensors.base("w1") + 2 * deltas(tensors, "w1")["a"], atol=1e-6)


# --- what cannot be merged


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    tensors = models([(4, 4)])
    tensors.expert("b", "w0")[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"'w0' of expert 'b'"):
        merged(tensors, preset("average", tensors.models))


def test_a_result_too_large_for_its_dtype_is_refused_by_name():
    tensors = models([(4, 4)], torch.float16)
    with pytest.raises(NonFiniteError, match=r"'w0' \(recipe 'task_arithmetic', stored as torch.float16\)"):
        merged(tensors, preset("task_arithmetic", tensors.models, coefficients=1e6))


def test_a_measure_that_needs_data_says_so():
    class NoStatistics(Tensors):
        """The same tensors without the optional members."""

        def __init__(self, inner):
            self.models, self.groups, self.device, self.inner = inner.models, inner.groups, inner.device, inner

        def shape(self, name):
            return self.inner.shape(name)

        def base(self, name):
            return self.inner.base(name)

        def expert(self, expert, name):
            return self.inner.expert(expert, name)

    tensors = models([(4, 4)])
    with pytest.raises(RecipeError, match="needs statistics from data"):
        merged(NoStatistics(tensors), preset("fisher", tensors.models))
    with pytest.raises(RecipeError, match="'fisher' of expert 'a' is needed for tensor 'w0'"):
        merged(tensors, preset("fisher", tensors.models))


# --- by hand


def by_hand(*deltas, **settings):
    """The merge of experts a, b, c with these deltas on a base of zeros, compiled or not."""
    experts = {e: {"w": torch.tensor(d)} for e, d in zip("abc", deltas, strict=False)}
    tensors = MemoryTensors({"w": torch.zeros_like(experts["a"]["w"])}, experts)
    made = recipe(tensors, **settings)
    plain, compiled = (dict(MergeEngine(tensors, compile=c).merged(made))["w"] for c in (False, True))
    assert torch.equal(plain, compiled)
    return plain.tolist()


ABOVE_HALF = {"select": {"kind": "threshold", "threshold": 0.5, "vectors": True}}


def test_a_threshold_drops_what_is_equal_to_it():
    assert by_hand([0.5, 0.625, -0.75], **ABOVE_HALF) == [0.0, 0.625, -0.75]


def test_a_band_by_row_drops_the_largest_and_keeps_the_next():
    select = {"kind": "band", "scope": "row", "gamma": 0.25}
    assert by_hand([[1.0, 4.0, 3.0, 2.0]], select=select, densities={"a": 0.5}) == [[0.0, 0.0, 3.0, 2.0]]


def test_a_gate_keeps_for_all_experts_what_enough_of_them_select():
    gated = {"select": {**ABOVE_HALF["select"], "gate": 2}}
    found = by_hand([1.0, 1.0, 1.0], [1.0, 1.0, 0.125], [1.0, 0.125, 0.125], **gated)
    assert found == [3.0, 2.125, 0.0]


def test_an_exclusive_selection_gives_an_entry_to_the_first_expert_that_selects_it():
    exclusive = {"select": {**ABOVE_HALF["select"], "exclusive": True}}
    found = by_hand([1.0, 0.125, 0.125], [0.125, 2.0, 0.125], [4.0, 4.0, 4.0], **exclusive)
    assert found == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(("ties", "winner"), [("first", 2.0), ("last", -2.0)])
def test_argmax_takes_the_largest_score_and_of_equal_ones_the_first_or_the_last(ties, winner):
    splice = {"kind": "argmax", "score": {"measure": "magnitude"}, "ties": ties}
    assert by_hand([2.0, 2.0, 3.0], [-2.0, 3.0, 2.0], splice=splice) == [winner, 3.0, 3.0]


def test_argmax_takes_an_expert_with_a_score_of_zero_where_no_other_takes_part():
    """The rank of b's first entry is 0 in its row, and a's is dropped."""
    splice = {"kind": "argmax", "score": {"measure": "rank"}}
    assert by_hand([[0.125, 3.0]], [[1.0, 2.0]], splice=splice, **ABOVE_HALF) == [[1.0, 3.0]]


@pytest.mark.parametrize("kind", ["softmax", "score", "argmax", "mask", "count", "coefficient"])
def test_where_no_expert_takes_part_the_base_stays(kind):
    score = {"score": {"measure": "magnitude"}} if kind in ("softmax", "score", "argmax") else {}
    assert by_hand([0.125, 1.0], [0.25, 0.125], splice={"kind": kind, **score}, **ABOVE_HALF) == [0.0, 1.0]


def test_a_dropped_tie_leaves_no_expert_in_the_denominator():
    """Of the first entry, 1 and -1 cancel: neither agrees. Of the second, 3 wins, and it is divided by one expert."""
    resolve = {"kind": "sum", "tie": "drop"}
    assert by_hand([1.0, 3.0], [-1.0, -1.0], resolve=resolve, splice={"kind": "count"}) == [0.0, 3.0]
    lone = by_hand([1.0, 3.0], [-1.0, -1.0], resolve=resolve, splice={"kind": "argmax", "score": {"measure": "ones"}})
    assert lone == [0.0, 3.0]
