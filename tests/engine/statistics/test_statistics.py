"""Statistics from data: their values by hand, and the methods that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from token_bench import N_FIT, OWNERS, Bench, NextTokens, apply, row_loss
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.methods.assess.fisher import interpolated
from merge_search.engine.statistics.provider import DataStatistics
from merge_search.engine.statistics.store import FOLDER
from merge_search.presets import preset
from merge_search.recipe import Assess, Recipe


def mean_over_tasks(gradients: dict[str, dict[str, Tensor]], rule: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    tasks = list(gradients.values())
    return {n: torch.stack([rule(t[n]).mean(0) for t in tasks]).mean(0) for n in tasks[0]}


# --- values by hand


@pytest.mark.parametrize(
    ("kind", "c", "rule"),
    [
        ("fisher", 1.0, torch.square),
        ("fisher@0.25", 0.25, torch.square),
        ("gradient", 0.0, lambda g: g),
        ("absolute_gradient", 0.0, torch.abs),
    ],
)
def test_gradient_statistics_are_means_over_rows_then_over_tasks(
    bench: Bench, kind: str, c: float, rule: Callable[[Tensor], Tensor]
) -> None:
    for expert in "ab":
        wanted = mean_over_tasks(bench.gradients(expert, c), rule)
        for name in bench.pool.groups:
            found = bench.statistics.get(kind, expert, name)
            assert found is not None
            torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-7, msg=f"{expert} {name}")
    assert bench.statistics.questions == 3 * sum(N_FIT.values())


def test_the_fisher_of_a_batch_of_rows_would_be_another_number(bench: Bench) -> None:
    """The squares of each row differ from the square of their mean, so the test above can tell them apart."""
    gradients = bench.gradients("a")["one"]["lm_head.weight"]
    assert not torch.allclose(gradients.square().mean(0), gradients.mean(0).square(), rtol=0.1)


def inputs_of(bench: Bench, expert: str, task: str, module: str) -> Tensor:
    """Return all inputs of a module over the rows of a task, by torch's own hooks: shape (tokens, in)."""
    model, seen = bench.model(expert), []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for ids in bench.tasks.rows[task]:
        row_loss(model, ids)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1, 1) for x in seen])


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "lm_head"])
def test_gram_matrices_and_norms_are_those_of_the_experts_inputs(bench: Bench, module: str) -> None:
    for expert in "ab":
        xs = [inputs_of(bench, expert, t, module).double() for t, e in OWNERS.items() if e == expert]
        gram = torch.stack([x.T @ x / len(x) for x in xs]).mean(0)
        found = bench.statistics.get("gram", expert, f"{module}.weight")
        torch.testing.assert_close(found, gram.float(), rtol=1e-5, atol=1e-6)
        norm = bench.statistics.get("activation_norm", expert, f"{module}.weight")
        torch.testing.assert_close(norm, gram.diagonal().sqrt().float()[None], rtol=1e-5, atol=1e-6)
    assert bench.statistics.questions == 2 * sum(N_FIT.values())


def test_rows_of_an_embedding_are_met_by_their_tokens_and_vectors_by_one(bench: Bench) -> None:
    ids = torch.cat(bench.tasks.rows["one"])
    share = torch.bincount(ids, minlength=24) / len(ids)
    found = bench.statistics.get("activation_norm", "a", "model.embed_tokens.weight")
    torch.testing.assert_close(found, share.sqrt()[:, None])
    assert bench.statistics.get("activation_norm", "a", "model.norm.weight") == torch.ones(1)
    assert bench.statistics.get("gram", "a", "model.embed_tokens.weight") is None


def test_a_tied_embedding_has_the_gradient_of_both_uses_and_no_gram_matrix(make_models: Any, tmp_path: Path) -> None:
    bench = Bench(*make_models(tie_word_embeddings=True), tmp_path / "s")
    wanted = mean_over_tasks(bench.gradients("b"), torch.square)
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(bench.statistics.get("fisher", "b", name), wanted[name], rtol=1e-4, atol=1e-7)
    assert bench.statistics.get("gram", "b", name) is None
    norm = bench.statistics.get("activation_norm", "b", name)
    assert norm is not None
    assert norm.shape == (1, 16)


def test_experts_that_a_model_stacks_have_statistics_under_their_names_on_disk(
    make_models: Any, tmp_path: Path
) -> None:
    pool, live = make_models("mixtral")
    live.model.set_experts_implementation("eager")
    bench = Bench(pool, live, tmp_path / "s")
    stem = "model.layers.0.block_sparse_moe."
    for n in (0, 1, 2):
        first, third = (bench.statistics.get("gram", "a", f"{stem}experts.{n}.{w}.weight") for w in ("w1", "w3"))
        assert first is not None
        assert third is not None
        assert torch.equal(first, third)  # one input
        assert first.shape == (16, 16)
    assert bench.statistics.get("gram", "a", f"{stem}gate.weight") is not None
    fisher = bench.statistics.get("fisher", "a", f"{stem}experts.1.w2.weight")
    assert fisher is not None
    assert float(fisher.sum()) > 0


def test_an_expert_without_a_task_takes_all_and_a_row_is_drawn_by_the_seed(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    alone = DataStatistics(bench.pool, bench.live, [bench.tasks], {"one": "a"}, folder=folder, n_rows=2, seed=1)
    rows = {e: {t.task: t.rows for t in tasks} for e, tasks in alone._rows_by_expert(None).items()}
    assert list(rows["a"]) == ["one"]
    assert list(rows["b"]) == ["one", "two", "three"]
    assert all(len(set(drawn)) == 2 for drawn in rows["b"].values())
    again = DataStatistics(bench.pool, bench.live, [bench.tasks], {}, folder=folder, n_rows=2, seed=1)
    assert {t.task: t.rows for t in again._rows_by_expert(None)["a"]} == rows["b"]


def deltas(bench: Bench, name: str) -> list[Tensor]:
    return [bench.pool.expert(e, name) - bench.pool.base(name) for e in "ab"]


def test_fisher_merging_is_the_fisher_weighted_mean(bench: Bench) -> None:
    merged = apply(bench, preset("fisher", bench.pool.models))
    fishers = [mean_over_tasks(bench.gradients(e), torch.square) for e in "ab"]
    for name in bench.pool.groups:
        if any(not bool(d.any()) for d in deltas(bench, name)):
            continue  # an expert that did not change the tensor has no weight
        weights = [f[name] / f[name].norm() + 1e-6 for f in fishers]
        experts = [bench.pool.expert(e, name) for e in "ab"]
        wanted = (weights[0] * experts[0] + weights[1] * experts[1]) / (weights[0] + weights[1])
        torch.testing.assert_close(merged[name], wanted, rtol=1e-3, atol=1e-4)


def test_df_merge_weighs_by_the_fisher_at_the_scaled_models(bench: Bench) -> None:
    recipe = preset("df_merge", bench.pool.models, coefficients={"a": 0.3, "b": 0.7})
    merged = apply(bench, recipe)
    fishers = [mean_over_tasks(bench.gradients(e, c), torch.square) for e, c in (("a", 0.3), ("b", 0.7))]
    name = "model.layers.1.mlp.up_proj.weight"
    (tau_a, tau_b), (f_a, f_b) = deltas(bench, name), [f[name] + 1e-12 for f in fishers]
    wanted = bench.pool.base(name) + 2 * (f_a * 0.3 * tau_a + f_b * 0.7 * tau_b) / (f_a + f_b)
    torch.testing.assert_close(merged[name], wanted, rtol=1e-3, atol=1e-4)
    assert set(bench.statistics.files()) == {
        f"{FOLDER}/fisher@0.3/a.safetensors",
        f"{FOLDER}/fisher@0.7/b.safetensors",
    }


def test_fisher_information_between_anchors_is_the_geometric_mean_with_the_floor() -> None:
    """By hand: sqrt((1e-4 + f) f) - f = 1e-8 for f = 1e-12, and 1e-4 ^ 0.75 x 1e-8 ^ 0.25 = 1e-5 where f is small."""
    one, two = torch.tensor([1e-4, 0.0, 1e-4, 3e-6]), torch.tensor([0.0, 0.0, 1e-8, 3e-6])
    found = interpolated([one, two], [0.5, 0.5], 1e-12)
    torch.testing.assert_close(found, torch.tensor([1e-8, 0.0, 1e-6, 3e-6]), rtol=2e-4, atol=1e-16)
    found = interpolated([one, two], [0.75, 0.25], 1e-20)
    torch.testing.assert_close(found[2:], torch.tensor([1e-5, 3e-6]), rtol=1e-4, atol=0.0)
    assert interpolated([one], [1.0], 1e-12) is one


def test_df_merge_with_anchors_measures_at_them_once_and_interpolates_logarithms(bench: Bench) -> None:
    """F at 0.6 is F(0.5)^0.8 F(1)^0.2, up to the floor; 0.5 is an anchor itself."""
    options = {"at": "scaled", "floor": 1e-12, "anchors": 0.5}
    splice = {"kind": "score", "score": {"measure": "fisher", "options": options}}

    def recipe(a: float, b: float) -> Recipe:
        return preset("df_merge", bench.pool.models, coefficients={"a": a, "b": b}, splice=splice)

    merged = apply(bench, recipe(0.6, 0.5))
    low, high, f_b = (
        mean_over_tasks(bench.gradients(e, c), torch.square) for e, c in (("a", 0.5), ("a", 1.0), ("b", 0.5))
    )
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        tau_a, tau_b = deltas(bench, name)
        f_a = (low[name].double() + 1e-12) ** 0.8 * (high[name].double() + 1e-12) ** 0.2
        weighted = (f_a * 0.6 * tau_a + (f_b[name] + 1e-12) * 0.5 * tau_b) / (f_a + f_b[name] + 1e-12)
        wanted = bench.pool.base(name) + 2 * weighted
        torch.testing.assert_close(merged[name], wanted.float(), rtol=1e-3, atol=1e-4)
    anchors = {"fisher@0.5/a", "fisher@1.0/a", "fisher@0.5/b"}
    assert set(bench.statistics.files()) == {f"{FOLDER}/{name}.safetensors" for name in anchors}
    asked = bench.statistics.questions
    apply(bench, recipe(0.9, 0.5))
    assert bench.statistics.questions == asked
    apply(bench, recipe(0.9, 0.25))  # b needs the base, at its three and three rows
    assert bench.statistics.questions == asked + 3 * 6


class ThreeAnswers(NextTokens):
    """The last token of a row is one of three."""

    def answers(self, task: str, row: int) -> tuple[Tensor, Tensor]:
        losses = torch.stack([row_loss(self.live.model, ids) for ids in self.variants(task, row)])
        return losses, (-losses.detach()).softmax(0)

    def variants(self, task: str, row: int) -> list[Tensor]:
        ids = self.rows[task][row]
        return [torch.cat([ids[:-1], torch.tensor([y])]) for y in (4, 5, 6)]


def test_the_true_fisher_is_the_mean_over_all_answers_by_their_probability(bench: Bench, tmp_path: Path) -> None:
    tasks = ThreeAnswers(bench.live)
    found = DataStatistics(bench.pool, bench.live, [tasks], OWNERS, folder=tmp_path / "true")
    model = bench.model("b", 0.25)
    by_task = {}
    for task in ("two", "three"):
        rows = []
        for row in range(N_FIT[task]):
            losses = torch.stack([row_loss(model, ids) for ids in tasks.variants(task, row)])
            gradients = []
            for loss in losses:
                model.zero_grad(set_to_none=False)
                loss.backward(retain_graph=True)
                gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
            p = torch.softmax(-losses.detach(), 0)
            rows.append({n: sum(p[y] * gradients[y][n] ** 2 for y in range(3)) for n in gradients[0]})
        by_task[task] = {n: torch.stack([r[n] for r in rows]) for n in rows[0]}
    wanted = mean_over_tasks(by_task, lambda squares: squares)
    for name in bench.pool.groups:
        value = found.get("true_fisher@0.25", "b", name)
        assert value is not None
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-7)
    n_rows = N_FIT["two"] + N_FIT["three"]
    assert found.questions == n_rows * (1 + 2 * 3)


def test_without_a_list_of_answers_the_true_fisher_is_the_empirical_one(bench: Bench) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    true, empirical = (bench.statistics.get(kind, "a", name) for kind in ("true_fisher", "fisher"))
    assert true is not None
    assert empirical is not None
    assert torch.equal(true, empirical)
    assert bench.statistics.questions == 2 * 3 * N_FIT["one"]


def test_regmean_is_the_least_squares_match_of_the_experts_outputs(bench: Bench) -> None:
    """With alpha 1 and hardly any ridge, W minimises sum_i tr((W - W_i) G_i (W - W_i)^T): its gradient is zero."""
    operator = {"name": "regmean", "options": {"alpha": 1.0, "ridge": 1e-9}}
    recipe = Recipe.model_validate(
        {"models": bench.pool.models, "operator": operator, "coefficients": {"a": 1.0, "b": 1.0}}
    )
    merged = apply(bench, recipe)
    name = "model.layers.1.mlp.gate_proj.weight"
    pull = torch.zeros_like(merged[name], dtype=torch.float64)
    size = 0.0
    for expert, tasks in (("a", ["one"]), ("b", ["two", "three"])):
        xs = [inputs_of(bench, expert, t, name.removesuffix(".weight")).double() for t in tasks]
        gram = torch.stack([x.T @ x / len(x) for x in xs]).mean(0)
        term = (merged[name].double() - bench.pool.expert(expert, name).double()) @ gram
        pull, size = pull + term, size + float(term.norm())
    assert float(pull.norm()) < 1e-4 * size
    average = sum(bench.pool.expert(e, "model.embed_tokens.weight") for e in "ab") / 2
    torch.testing.assert_close(merged["model.embed_tokens.weight"], average)


def test_apl_ranks_tensors_by_the_cosine_of_gradient_and_delta(bench: Bench) -> None:
    """The tensor whose delta points most along the gradient keeps the largest share."""
    recipe = preset("apl", bench.pool.models)
    engine = MergeEngine(bench.pool)
    g = mean_over_tasks(bench.gradients("a", 0.0), lambda x: x)
    effect = {
        n: abs(float(torch.cosine_similarity(g[n].double().flatten(), deltas(bench, n)[0].double().flatten(), dim=0)))
        for n in bench.pool.groups
    }
    matrices = [n for n in bench.pool.groups if bench.pool.base(n).ndim == 2]
    ranked = sorted(matrices, key=effect.__getitem__)
    density = {
        n: dict(zip(s.experts, s.densities, strict=True))["a"]
        for n in matrices
        for s in [engine._planner.settings(recipe, n)]
    }
    assert [density[n] for n in ranked] == sorted(density.values())
    assert density[ranked[0]] < density[ranked[-1]]
    engine.apply(recipe, bench.live.views)


def test_activation_norms_choose_what_is_kept(bench: Bench) -> None:
    recipe = Recipe(
        models=bench.pool.models, assess=Assess(measure="activation_norm"), select={"kind": "top_k"},
        densities={"a": 0.25, "b": 0.25}, coefficients={"a": 1.0, "b": 0.0},
    )  # fmt: skip
    merged = apply(bench, recipe)
    name = "model.layers.0.mlp.down_proj.weight"
    x = inputs_of(bench, "a", "one", name.removesuffix(".weight"))
    tau = deltas(bench, name)[0]
    score = tau.abs() * x.square().mean(0).sqrt()
    kept = score >= score.flatten().topk(round(0.25 * tau.numel())).values[-1]
    torch.testing.assert_close(merged[name], bench.pool.base(name) + torch.where(kept, tau, 0.0))
    plain = tau.abs() >= tau.abs().flatten().topk(round(0.25 * tau.numel())).values[-1]
    assert not torch.equal(kept, plain)


# --- prompts


class Prompts(NextTokens):
    """Tasks of which nobody knows the right answers."""

    def losses(self, task: str) -> tuple[str, ...]:
        return ("pseudo",)

    def loss(self, task: str, rows: Sequence[int], kind: str = "gold") -> Tensor:
        raise AssertionError("a right answer was read")

    def predict(self, task: str, rows: Sequence[int]) -> list[Any]:
        return [int(self.live.model(input_ids=self.rows[task][r][None]).logits[0, -1].argmax()) for r in rows]


def test_gram_matrices_of_prompts_read_no_answer_and_count_one_question_a_prompt(bench: Bench, tmp_path: Path) -> None:
    found = DataStatistics(bench.pool, bench.live, [Prompts(bench.live)], OWNERS, folder=tmp_path / "p")
    assert "no task has a differentiable loss" in found.problem("fisher", "a")
    assert found.problem("prompt_gram@prompts=64", "a") == ""
    module = "model.layers.1.mlp.down_proj"
    xs = [inputs_of(bench, "b", t, module).double() for t in ("two", "three")]
    gram = found.get("prompt_gram@prompts=64", "b", f"{module}.weight")
    torch.testing.assert_close(gram, torch.stack([x.T @ x / len(x) for x in xs]).mean(0).float(), rtol=1e-5, atol=1e-6)
    shares = [torch.bincount(torch.cat(bench.tasks.rows[t]), minlength=24) for t in ("two", "three")]
    looked_up = found.get("prompt_gram@prompts=64", "b", "model.embed_tokens.weight")
    torch.testing.assert_close(looked_up, torch.stack([s / s.sum() for s in shares]).mean(0)[:, None])
    assert found.get("prompt_gram@prompts=64", "b", "model.norm.weight") is None
    assert found.questions == N_FIT["two"] + N_FIT["three"]


def test_fewer_prompts_are_another_statistic(bench: Bench) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    few, many = (bench.statistics.get(f"prompt_gram@prompts={n}", "a", name) for n in (2, 64))
    assert few is not None
    assert many is not None
    assert not torch.equal(few, many)
    assert bench.statistics.questions == 2 + N_FIT["one"]


def test_a_tied_matrix_has_the_tokens_that_look_it_up(make_models: Any, tmp_path: Path) -> None:
    bench = Bench(*make_models(tie_word_embeddings=True), tmp_path / "s")
    found = bench.statistics.get("prompt_gram", "b", "model.embed_tokens.weight")
    assert found is not None
    assert found.shape == (24, 1)


def test_gram_matrices_that_would_fill_the_disk_are_refused_before_a_question(bench: Bench, tmp_path: Path) -> None:
    """Two experts, two layers: six matrices of 16 inputs and one of 24 are 4 (6 16^2 + 24^2) bytes a layer."""
    size = 2 * 2 * 4 * (6 * 16**2 + 24**2)
    small, enough = (
        DataStatistics(bench.pool, bench.live, [bench.tasks], OWNERS, folder=tmp_path / str(n), max_gib=n / 2**30)
        for n in (size - 1, size)
    )
    for kind in ("gram", "prompt_gram@prompts=64"):
        assert "raise it where disk and device have the room" in small.problem(kind, "a")
        assert enough.problem(kind, "a") == ""
    assert small.problem("fisher", "a") == ""
