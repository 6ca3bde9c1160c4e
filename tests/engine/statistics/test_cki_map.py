"""CKI's learned map: its formula by hand, its gradient, its training, and splices that are limited to some tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from token_bench import N_FIT, Bench, apply, row_loss, snapshot
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.methods.assess import AssessContext, cki, cki_learned
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.engine.statistics.cki_map import Training
from merge_search.engine.statistics.rows import TaskRows, Work
from merge_search.errors import RecipeError
from merge_search.merge_recipe import merge_recipe
from merge_search.presets import preset
from merge_search.recipe import Group, Models, Recipe, groups_named
from merge_search.rules import MEASURES, STATISTICS, statistic_named

ONE = torch.tensor([[0.40, -0.20, 0.10, 0.00], [0.30, -0.50, 0.05, -0.10]])
TWO = torch.tensor([[0.10, 0.30, -0.10, 0.20], [-0.60, -0.40, 0.00, 0.20]])
DEFAULTS: dict[str, Any] = dict(MEASURES["cki_learned"].options)


def splice(measure: str, by: str = "score", /, **options: Any) -> dict[str, Any]:
    return {"kind": by, "score": {"measure": measure, "options": options}}


def toy(maps: dict[str, Tensor], experts: dict[str, Tensor] | None = None) -> MemoryTensors:
    """Base zero; the same map for every expert, by the name of its statistic."""
    experts = experts or {"a": ONE, "b": TWO}
    statistics = {(kind, e, "w"): m for kind, m in maps.items() for e in experts}
    return MemoryTensors({"w": torch.zeros(2, 4)}, {e: {"w": t} for e, t in experts.items()}, statistics=statistics)


def merged(tensors: MemoryTensors, **recipe: Any) -> Tensor:
    whole = Recipe.from_dict({"models": tensors.models, **recipe})
    return dict(MergeEngine(tensors, compile=False).merged(whole))["w"]


# --- the formula


@pytest.mark.parametrize("kind", ["dual", "local", "recommender"])
@pytest.mark.parametrize("order", ["given", "reversed"])
@pytest.mark.parametrize("by", ["score", "argmax"])
def test_the_untrained_map_is_the_rule_without_a_map(kind: str, order: str, by: str) -> None:
    changed = {
        "bins": 4,
        **({"kind": kind} if kind != "dual" else {}),
        **({"order": order} if order != "given" else {}),
    }
    name = "cki_map@" + ",".join(f"{k}={v}" for k, v in sorted(changed.items()))
    tensors = toy({name: cki_learned.start(DEFAULTS, (2, 4), transposed=False, seed=0)})
    plain = merged(tensors, splice=splice("cki", by, kind=kind, order=order, bins=4))
    torch.testing.assert_close(merged(tensors, splice=splice("cki_learned", by, **changed)), plain)


def test_the_released_form_splices_by_a_sigmoid_of_mixed_disagreements() -> None:
    """w_loc = sigmoid(g (D A^T + b)) of raw D = |W_i - W_j|; w = 1 - w_glo (1 - w_loc), as published."""
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 4, generator=draw), torch.randn(4, generator=draw)
    tensors = toy({"cki_map@bins=4,gain=5.0,inputs=raw": torch.cat([a.T, b[None]])})
    found = merged(tensors, splice=splice("cki_learned", bins=4, gain=5.0, inputs="raw"))
    local = torch.sigmoid(5.0 * ((ONE - TWO).abs() @ a.T + b))
    w = 1 - 0.698531 * (1 - local)  # w_glo as METHODS of the released code give it for these matrices
    torch.testing.assert_close(found, w * ONE + (1 - w) * TWO, rtol=1e-5, atol=1e-6)


def test_matrices_stored_the_other_way_round_are_mixed_along_their_inputs() -> None:
    draw = torch.Generator().manual_seed(2)
    d, parameters = torch.randn(2, 4, generator=draw), torch.randn(5, 4, generator=draw)
    straight = cki_learned.logits(2.0, parameters, d, transposed=False)
    assert torch.equal(cki_learned.logits(2.0, parameters, d.mT.contiguous(), transposed=True), straight.mT)
    assert cki_learned.start(DEFAULTS, (7, 3), transposed=True, seed=0).shape == (8, 7)
    assert cki_learned.start(DEFAULTS, (7, 3), transposed=False, seed=0).shape == (4, 3)


@pytest.mark.parametrize(("form", "shape"), [("diagonal", (2, 4)), ("scalar", (2, 1))])
def test_smaller_maps_are_full_maps_with_zeros_beside_the_diagonal(form: str, shape: tuple[int, int]) -> None:
    parameters = torch.linspace(-1, 2, shape[0] * shape[1]).reshape(shape)
    full = torch.cat([torch.diag(parameters[0].expand(4)), parameters[1].expand(4)[None]])
    small, large = (cki_learned.logits(1.5, p, ONE, transposed=False) for p in (parameters, full))
    torch.testing.assert_close(small, large)
    assert cki_learned.start({**DEFAULTS, "map": form}, (2, 4), transposed=False, seed=0).shape == shape


def test_a_drawn_start_depends_on_its_seed_and_has_the_released_limits() -> None:
    options = {**DEFAULTS, "start": "xavier"}
    first, again, other = (cki_learned.start(options, (8, 50), transposed=False, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.9 * (6 / 100) ** 0.5 < float(first[:-1].abs().max()) <= (6 / 100) ** 0.5
    assert float(first[-1].abs().max()) <= 50**-0.5


def test_three_experts_share_one_map_and_the_one_far_away_weighs_least() -> None:
    near, far = ONE, {"a": ONE, "b": ONE + 0.01, "c": ONE + 5.0}
    tensors = toy({"cki_map@kind=local": cki_learned.start(DEFAULTS, (2, 4), transposed=False, seed=0)}, far)
    found = merged(tensors, splice=splice("cki_learned", kind="local"))
    assert torch.equal(found, merged(tensors, splice=splice("cki", kind="local", standardise="all")))
    assert float((found - near).abs().max()) < 0.6  # the mean is 1.67 away
    turned = torch.cat([-torch.eye(4), torch.zeros(1, 4)])
    tensors = toy({"cki_map@kind=local": turned}, far)
    assert float((merged(tensors, splice=splice("cki_learned", kind="local")) - near).abs().min()) > 3.0


def test_a_map_of_other_experts_is_refused() -> None:
    tensors = toy({"cki_map": torch.zeros(5, 4)}, {"a": ONE, "b": TWO, "c": ONE + TWO})
    recipe = preset("cki_learned", Models(base="base", experts={e: e for e in "ba"}))
    with pytest.raises(RecipeError, match="is trained for the experts a, b, c in this order, and the recipe has b, a"):
        dict(MergeEngine(tensors, compile=False).merged(recipe))


# --- training


class Experts:
    """Base and experts of a float64 model, as a statistic reads them."""

    def __init__(self, base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]]) -> None:
        self._base, self._experts = base, experts
        self.models = Models(base="base", experts={e: e for e in experts})

    def base(self, name: str) -> Tensor:
        return self._base[name]

    def expert(self, expert: str, name: str) -> Tensor:
        return self._experts[expert][name]

    def is_transposed(self, name: str) -> bool:
        return name == "3.weight"  # as if it were stored so


@pytest.mark.parametrize("experts", ["ab", "abc"])
@pytest.mark.parametrize("kind", ["dual", "recommender"])
def test_the_gradient_of_the_map_is_that_of_central_differences_in_float64(experts: str, kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    layers = [torch.nn.Embedding(11, 4), torch.nn.Linear(4, 5), torch.nn.GELU(), torch.nn.Linear(5, 11)]
    model = torch.nn.Sequential(*layers).double()
    views = {n: p.detach() for n, p in model.named_parameters()}
    weights = [{n: torch.randn(v.shape, generator=draw).double() for n, v in views.items()} for _ in range(4)]
    ids = torch.randint(11, (6,), generator=draw)
    groups = {n: Group(n, 0, "mlp") for n in views}

    def loss(rows: Sequence[int]) -> Tensor:
        return torch.nn.functional.cross_entropy(model(ids[:-1]), ids[1:])

    models: Any = Experts(weights[0], dict(zip(experts, weights[1:], strict=False)))
    work = Work(model, views, groups, (TaskRows("one", (0,), loss, "f"),), models=models)
    training = Training(work, {**DEFAULTS, "kind": kind, "gain": 2.0, "c": 1.0})
    assert set(training.spliced) == set(views)
    for spliced in training.spliced.values():  # away from the start, which is symmetric
        spliced.parameters.data += 0.3 * torch.randn(spliced.parameters.shape, generator=draw).double()
    training.write()
    training.backward({"one": [0]})
    step = 1e-5
    for name, spliced in training.spliced.items():
        gradient = spliced.parameters.grad
        assert gradient is not None
        for at in ([0, 0], [-1, -1], [1, 0]):
            i, j = at
            ends = []
            for sign in (1, -1):
                spliced.parameters.data[i, j] += sign * step
                training.write()
                ends.append(float(loss([0]).detach()))
                spliced.parameters.data[i, j] -= sign * step
            numeric = (ends[0] - ends[1]) / (2 * step)
            assert float(gradient[i, j]) == pytest.approx(numeric, rel=1e-5, abs=1e-9), (name, at)


def test_training_lowers_the_loss_is_counted_and_leaves_the_live_weights_alone(bench: Bench) -> None:
    before = snapshot(bench.live)
    bench.tasks.rows = {t: [rows[0]] * len(rows) for t, rows in bench.tasks.rows.items()}  # there is something to learn
    kind = "cki_map@epochs=6,step_size=0.05"
    found = bench.statistics.get(kind, "a", "lm_head.weight")
    assert found is not None
    assert found.shape == (17, 16)
    assert not torch.equal(found, cki_learned.start(DEFAULTS, (24, 16), transposed=False, seed=0))
    kept = len(N_FIT)  # a fifth of four or three rows is one
    assert bench.statistics.questions == 3 * 6 * (sum(N_FIT.values()) - kept) + 7 * kept
    assert all(torch.equal(v, before[n]) for n, v in bench.live.views.items())
    assert bench.statistics._path(kind, "a") == bench.statistics._path(kind, "b")
    losses = {}
    for name, epochs in (("untrained", 0), ("trained", 6)):
        options = {"epochs": epochs, "step_size": 0.05}
        apply(bench, preset("cki_learned", bench.pool.models, splice=splice("cki_learned", **options)))
        per_task = [torch.stack([row_loss(bench.live.model, r) for r in rows]) for rows in bench.tasks.rows.values()]
        losses[name] = float(sum(x.mean() for x in per_task).detach()) / len(per_task)  # type: ignore[union-attr]
    assert losses["trained"] < losses["untrained"] - 0.02
    again = Bench(bench.pool, bench.live, bench.folder)
    assert torch.equal(again.statistics.get(kind, "b", "lm_head.weight"), found)  # type: ignore[arg-type]
    assert again.statistics.questions == 0


def test_an_epoch_that_makes_the_rows_that_were_kept_worse_is_not_taken(bench: Bench) -> None:
    """Random rows have nothing in common, and steps of this size destroy a map."""
    found = bench.statistics.get("cki_map@epochs=3,step_size=1.0", "a", "lm_head.weight")
    assert torch.equal(found, cki_learned.start(DEFAULTS, (24, 16), transposed=False, seed=0))  # type: ignore[arg-type]


def test_a_tensor_that_one_expert_left_alone_has_no_map_and_the_other_expert_is_taken(bench: Bench) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    assert bench.statistics.get("cki_map@epochs=1", "a", name) is None
    recipe = preset("cki_learned", bench.pool.models, splice=splice("cki_learned", epochs=1))
    torch.testing.assert_close(apply(bench, recipe)[name], bench.pool.expert("a", name))


def test_names_of_maps_say_what_differs_and_numbers_are_read_back() -> None:
    row = MEASURES["cki_learned"]
    assert row.statistics_asked({}) == ("cki_map",)
    (kind,) = row.statistics_asked({"step_size": 1e-05, "only": "head+last", "epochs": 3, "gain": 1.0})
    assert kind == "cki_map@epochs=3,only=head+last,step_size=1e-05"
    parsed = statistic_named(kind)
    assert parsed is not None
    assert parsed[0].options == {**STATISTICS["cki_map"].options, "step_size": 1e-5, "only": "head+last", "epochs": 3}
    assert statistic_named("cki_map@epochs=2.5") is None
    assert statistic_named("cki_map@map=round") is None


# --- some tensors alone


@pytest.mark.parametrize("measure", ["cki", "cki_learned"])
@pytest.mark.parametrize(("rest", "expert"), [("first", "a"), ("last", "b"), ("base", "")])
def test_a_splice_of_the_head_leaves_all_other_tensors_to_one_model(
    bench: Bench, measure: str, rest: str, expert: str
) -> None:
    more = {"epochs": 1} if measure == "cki_learned" else {"standardise": "all"}
    recipe = preset("cki_soft", bench.pool.models, splice=splice(measure, only="head", rest=rest, **more))
    found = apply(bench, recipe)
    for name in bench.pool.groups:
        of_rest = bench.pool.expert(expert, name) if expert else bench.pool.base(name)
        assert torch.allclose(found[name], of_rest, atol=1e-6) == (name != "lm_head.weight"), name
    between = sorted([bench.pool.expert(e, "lm_head.weight") for e in "ab"], key=lambda t: float(t[0, 0]))
    assert float(between[0][0, 0]) < float(found["lm_head.weight"][0, 0]) < float(between[1][0, 0])
    streamed = MergeEngine(bench.pool, compile=False)
    assert all(torch.equal(t, found[n]) for n, t in streamed.merged(recipe))
    if measure == "cki_learned":
        (kind,) = MEASURES["cki_learned"].statistics_asked(recipe.splice.score.options)  # type: ignore[union-attr]
        assert [n for n in bench.pool.groups if bench.statistics.get(kind, "a", n) is not None] == ["lm_head.weight"]


def test_the_last_block_is_named_without_its_number() -> None:
    groups = [Group("x", 0, "mlp"), Group("y", 3, "attention"), Group("z", None, "head")]
    assert groups_named("last", groups) == {"block.3"}
    assert groups_named("head+block.0", groups) == {"head", "block.0"}
    assert groups_named("", groups) is None


def test_a_splice_limited_to_tensors_that_are_not_there_is_refused(bench: Bench) -> None:
    recipe = preset("cki_soft", bench.pool.models, splice=splice("cki", only="last+tail"))
    (problem,) = MergeEngine(bench.pool).check(recipe)
    assert "'cki' is limited to 'last+tail', and no tensor answers to the key 'tail'" in problem
    assert MergeEngine(bench.pool).check(preset("cki_soft", bench.pool.models, splice=splice("cki", only="last"))) == []


def test_a_learner_moves_what_is_left_to_one_expert_and_nothing_that_is_left_to_the_base(bench: Bench) -> None:
    engine = MergeEngine(bench.pool)
    name = "model.layers.1.mlp.up_proj.weight"
    for rest, experts in (("first", ("a",)), ("base", ())):
        recipe = preset("cki_soft", bench.pool.models, splice=splice("cki", only="head", rest=rest))
        found, parts = engine.parts(recipe, name)
        assert found == experts
        assert parts.shape == (len(experts), *bench.pool.base(name).shape)


# --- afterwards


def test_an_exported_merge_trains_further(bench: Bench, tmp_path: Path) -> None:
    """Adam steps of transformers' own model on what was exported lower its loss."""
    recipe = preset("cki_hard", bench.pool.models, splice=splice("cki", "argmax", standardise="all"))
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    merge_recipe(tmp_path / "recipe.json", tmp_path / "out", device="cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").train()
    rows = [row for task in bench.tasks.rows.values() for row in task]
    adam, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(8):
        loss = torch.stack([model(input_ids=r[None], labels=r[None], use_cache=False).loss for r in rows]).mean()
        losses.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert losses[-1] < losses[0] - 0.2


def test_scores_of_the_map_are_shares_between_zero_and_one() -> None:
    context = AssessContext(torch.zeros(2, 4), [ONE, TWO], [ONE, TWO], (), {**DEFAULTS, "bins": 4}, 2)
    found, terms = cki_learned.inputs(context)
    assert terms == pytest.approx([0.698531, 1 - 0.698531], abs=1e-6)
    assert float(found[0].mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(found[0].std(unbiased=False)) == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(cki.distances([ONE, TWO])[0], (ONE - TWO).abs())
