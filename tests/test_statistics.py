"""Statistics from data: their values by hand, the cache, the live model given back, the methods that use them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from merge_search.engine.engine import MergeEngine
from merge_search.engine.live import LiveModel
from merge_search.engine.pool import ModelPool
from merge_search.engine.statistics import provider
from merge_search.engine.statistics.provider import RECENT, DataStatistics
from merge_search.engine.statistics.store import FOLDER, FolderStatistics
from merge_search.errors import NonFiniteError, RecipeError, WeightsError
from merge_search.evaluation import Split
from merge_search.presets import preset
from merge_search.recipe import Assess, Models, Recipe
from merge_search.search.baselines import baselines
from merge_search.search.prepare import prepare
from merge_search.search.workbench import Workbench, statistics_of
from merge_search.study_file import read_study_file

N_FIT = {"one": 4, "two": 3, "three": 3}
NAME = "model.norm.weight"
OWNERS = {"one": "a", "two": "b", "three": "b"}


class NextTokens:
    """Tasks of random token rows: mean -log p of each row's later tokens. Row k of a task is k + 5 tokens long."""

    def __init__(self, live: LiveModel) -> None:
        self.live = live
        draw = torch.Generator().manual_seed(7)
        self.rows = {
            t: [torch.randint(3, 24, (k + 5,), generator=draw) for k in range(n)] for t, n in N_FIT.items()
        }  # fmt: skip
        self.name = "questions"
        self.broken = False

    def fingerprint(self) -> str:
        return self.name

    def fit_tasks(self) -> dict[str, int]:
        return {t: len(rows) for t, rows in self.rows.items()}

    def losses(self, task: str) -> tuple[str, ...]:
        return ("gold",)

    def loss(self, task: str, rows: Sequence[int], kind: str = "gold") -> Tensor:
        assert kind == "gold"
        losses = [row_loss(self.live.model, self.rows[task][r]) for r in rows]
        return torch.stack(losses).mean() * (torch.nan if self.broken else 1.0)

    def predict(self, task: str, rows: Sequence[int]) -> list[Any]:
        raise AssertionError("statistics ask for losses only")

    def set_pseudo_labels(self, task: str, labels: Mapping[int, Any]) -> None:
        raise AssertionError("statistics ask for losses only")


def row_loss(model: Any, ids: Tensor) -> Tensor:
    return cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:])


class Bench:
    """A pool whose statistics come from `NextTokens`."""

    def __init__(self, pool: ModelPool, live: LiveModel, folder: Path, **settings: Any) -> None:
        self.pool, self.live, self.folder, self.tasks = pool, live, folder, NextTokens(live)
        self.statistics = DataStatistics(pool, live, [self.tasks], OWNERS, folder=folder, **settings)
        pool.statistics = self.statistics

    def model(self, expert: str, c: float = 1.0) -> Any:
        """base + c delta, made apart from the engine, with gradients."""
        model = LiveModel.load(self.pool.base_folder)
        with torch.no_grad():
            for name, view in model.views.items():
                base = self.pool.base(name).float()
                view.copy_(
                    base + c * (self.pool.expert(expert, name).float() - base)
                    if c != 1
                    else self.pool.expert(expert, name)
                )
        model.model.requires_grad_(True)
        return model.model

    def gradients(self, expert: str, c: float = 1.0) -> dict[str, dict[str, Tensor]]:
        """Task -> tensor -> gradient of every row: shape (rows, *shape)."""
        model, found = self.model(expert, c), {}
        for task in (t for t, e in OWNERS.items() if e == expert):
            rows = []
            for ids in self.tasks.rows[task]:
                model.zero_grad(set_to_none=False)
                row_loss(model, ids).backward()
                rows.append(
                    {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
                )
            found[task] = {n: torch.stack([r[n] for r in rows]) for n in rows[0]}
        return found


@pytest.fixture
def bench(make_models: Any, tmp_path: Path) -> Bench:
    return Bench(*make_models(), tmp_path / "study.statistics")


def mean_over_tasks(gradients: dict[str, dict[str, Tensor]], rule: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    tasks = list(gradients.values())
    return {n: torch.stack([rule(t[n]).mean(0) for t in tasks]).mean(0) for n in tasks[0]}


def snapshot(live: LiveModel) -> dict[str, Tensor]:
    return {name: view.clone() for name, view in live.views.items()}


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
    """Squares of each row, not the square of their mean: the two differ, so the test above can tell them apart."""
    gradients = bench.gradients("a")["one"]["lm_head.weight"]
    assert not torch.allclose(gradients.square().mean(0), gradients.mean(0).square(), rtol=0.1)


def inputs_of(bench: Bench, expert: str, task: str, module: str) -> Tensor:
    """All inputs of a module over the rows of a task, by torch's own hooks: shape (tokens, in)."""
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
    rows = {e: {t.task: t.rows for t in tasks} for e, tasks in alone._rows.items()}
    assert list(rows["a"]) == ["one"]
    assert list(rows["b"]) == ["one", "two", "three"]
    assert all(len(set(drawn)) == 2 for drawn in rows["b"].values())
    again = DataStatistics(bench.pool, bench.live, [bench.tasks], {}, folder=folder, n_rows=2, seed=1)
    assert {t.task: t.rows for t in again._rows["a"]} == rows["b"]


# --- methods


def apply(bench: Bench, recipe: Recipe) -> dict[str, Tensor]:
    MergeEngine(bench.pool).apply(recipe, bench.live.views)
    return snapshot(bench.live)


def deltas(bench: Bench, name: str) -> list[Tensor]:
    return [bench.pool.expert(e, name) - bench.pool.base(name) for e in "ab"]


def test_fisher_merging_is_the_fisher_weighted_mean(bench: Bench) -> None:
    merged = apply(bench, preset("fisher", bench.pool.models))
    fishers = [mean_over_tasks(bench.gradients(e), torch.square) for e in "ab"]
    for name in bench.pool.groups:
        if any(not bool(d.any()) for d in deltas(bench, name)):
            continue  # an expert that left the tensor has no vote
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
    """The tensor whose delta points most along the gradient keeps most."""
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


# --- the live model, the cache


def test_measuring_in_the_middle_of_a_merge_changes_no_bit_of_it(
    bench: Bench, make_models: Any, tmp_path: Path
) -> None:
    recipe = preset("fisher", bench.pool.models)
    cold = apply(bench, recipe)
    assert bench.statistics.questions > 0
    warm = Bench(bench.pool, bench.live, bench.folder)
    MergeEngine(bench.pool).apply(preset("average", bench.pool.models), bench.live.views)
    again = apply(warm, recipe)
    assert warm.statistics.questions == 0
    assert all(torch.equal(cold[n], again[n]) for n in cold)
    assert not any(p.requires_grad or p.grad is not None for p in bench.live.model.parameters())


def test_an_engine_sees_that_its_weights_were_touched_and_they_are_right(bench: Bench) -> None:
    engine, recipe = MergeEngine(bench.pool), preset("average", bench.pool.models)
    engine.apply(recipe, bench.live.views)
    before = snapshot(bench.live)
    bench.statistics.get("gram", "a", "lm_head.weight")
    assert all(torch.equal(before[n], v) for n, v in bench.live.views.items())
    assert engine.apply(recipe, bench.live.views).skipped == 0
    assert engine.apply(recipe, bench.live.views).written == 0


def test_a_measurement_that_fails_says_so_and_gives_the_model_back(bench: Bench) -> None:
    before = snapshot(bench.live)
    bench.tasks.broken = True
    with pytest.raises(NonFiniteError, match="measuring 'fisher' of expert 'a': gradients must be finite"):
        bench.statistics.get("fisher", "a", "lm_head.weight")
    assert all(torch.equal(before[n], v) for n, v in bench.live.views.items())
    assert not list(bench.folder.glob("*"))
    bench.tasks.broken = False
    assert bench.statistics.get("fisher", "a", "lm_head.weight") is not None


@pytest.mark.parametrize("kind", ["fisher", "gradient", "absolute_gradient", "activation_norm", "gram"])
def test_what_is_found_is_bit_for_bit_what_was_measured(bench: Bench, kind: str) -> None:
    warm = Bench(bench.pool, bench.live, bench.folder)
    for name in bench.pool.groups:
        cold, found = bench.statistics.get(kind, "b", name), warm.statistics.get(kind, "b", name)
        assert (cold is None) == (found is None)
        assert cold is None or found is None or torch.equal(cold, found)
    assert warm.statistics.questions == 0
    assert len(list(bench.folder.iterdir())) == 1


@pytest.mark.parametrize(
    "change", ["rows", "seed", "questions", "dtype", "version", "weights"]
)  # fmt: skip
def test_another_key_is_measured_again(
    bench: Bench, change: str, make_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"n_rows": 3}
    bench = Bench(bench.pool, bench.live, bench.folder, **settings)
    bench.statistics.get("gram", "b", "lm_head.weight")
    pool, live = bench.pool, bench.live
    if change == "weights":
        path = Path(pool.models.experts["b"]) / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.5
        save_file(tensors, path, metadata={"format": "pt"})
        pool = ModelPool(pool.models, device="cpu")
    if change == "version":
        monkeypatch.setattr(provider, "VERSION", 2)
    settings |= {"rows": {"n_rows": 2}, "seed": {"seed": 1}, "dtype": {"dtype": "float32"}}.get(change, {})
    other = Bench(pool, live, bench.folder, **settings)
    other.tasks.name = "other questions" if change == "questions" else other.tasks.name
    other.statistics.get("gram", "b", "lm_head.weight")
    assert other.statistics.questions == (4 if change == "rows" else 6)
    assert len(list(bench.folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_measured_again_with_a_warning(
    bench: Bench, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = "lm_head.weight"
    cold = bench.statistics.get("fisher", "a", name)
    assert cold is not None
    (path,) = bench.folder.iterdir()
    data = path.read_bytes()
    bad = {"cut": data[: len(data) // 2], "empty": b"", "flipped": data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]}
    path.unlink()  # the old one is mapped
    path.write_bytes(bad[damage])
    warm = Bench(bench.pool, bench.live, bench.folder)
    with caplog.at_level(logging.WARNING):
        found = warm.statistics.get("fisher", "a", name)
    assert "measured again" in caplog.text
    assert found is not None
    assert torch.equal(cold, found)
    assert path.read_bytes() == data


def test_files_beyond_the_bound_go_the_longest_unused_first_and_are_measured_again(bench: Bench) -> None:
    first = bench.statistics.get("fisher@0.25", "a", NAME)
    (path,) = bench.folder.glob("*.safetensors")
    os.utime(path, ns=(1, 1))
    given = bench.folder / "external" / "a.safetensors"
    given.parent.mkdir()
    given.write_bytes(path.read_bytes())
    bound = 1.5 * path.stat().st_size / 2**30
    small = DataStatistics(bench.pool, bench.live, [bench.tasks], OWNERS, folder=bench.folder, max_gib=bound)
    kept = [(kind, e) for kind in ("fisher", "gradient") for e in ("a", "b")]
    for kind, expert in kept:
        small.get(kind, expert, NAME)
    assert not path.exists()
    assert given.is_file()
    assert len(list(bench.folder.glob("*.safetensors"))) == len(kept)  # in use by this process, whatever they take
    again = small.get("fisher@0.25", "a", NAME)
    assert torch.equal(first, again)


def test_files_at_scaled_models_stay_bounded_while_a_search_goes_on(bench: Bench) -> None:
    small = DataStatistics(bench.pool, bench.live, [bench.tasks], OWNERS, folder=bench.folder, max_gib=1e-9)
    for i in range(14):
        small.get(f"fisher@{(i + 1) / 16!r}", "a", NAME)
    assert len(list(bench.folder.glob("*.safetensors"))) == RECENT * len(bench.pool.models.experts) < 14


def test_a_folder_that_cannot_be_written_costs_the_file_not_the_trial(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.folder.write_text("a file, not a folder")
    with caplog.at_level(logging.WARNING):
        found = bench.statistics.get("gram", "a", "lm_head.weight")
    assert found is not None
    assert "kept in memory" in caplog.text
    asked = bench.statistics.questions
    assert torch.equal(found, bench.statistics.get("gram", "a", "lm_head.weight"))  # type: ignore[arg-type]
    assert bench.statistics.questions == asked


# --- checks before work, files of others, exports


def test_a_recipe_that_cannot_have_its_data_is_refused_before_any_weight(bench: Bench) -> None:
    fisher = preset("fisher", bench.pool.models)
    regmean = Recipe.model_validate(
        {"models": bench.pool.models, "operator": {"name": "regmean"}, "coefficients": {"a": 1.0, "b": 1.0}}
    )
    engine = MergeEngine(bench.pool)
    assert engine.check(fisher) == engine.check(regmean) == []
    assert bench.statistics.questions == 0
    bench.tasks.rows = {}
    bare = Bench(bench.pool, bench.live, bench.folder)
    bare.tasks.rows = {}
    for recipe, who in ((fisher, "measure 'fisher'"), (regmean, "operator: 'regmean'")):
        (problem,) = engine.check(recipe)
        assert who in problem
        assert "give tasks a training split, or set splits.fit" in problem
    bench.pool.statistics = None
    assert "none were measured" in engine.check(regmean)[0]


def test_scores_of_others_are_read_from_the_studys_folder(bench: Bench) -> None:
    recipe = preset("external", bench.pool.models)
    engine = MergeEngine(bench.pool)
    assert len(engine.check(recipe)) == 2
    assert "there is no file" in engine.check(recipe)[0]
    draw = torch.Generator().manual_seed(1)
    for expert in "ab":
        (bench.folder / "external").mkdir(parents=True, exist_ok=True)
        scores = {n: torch.rand(bench.pool.base(n).shape, generator=draw) for n in bench.pool.groups}
        save_file(scores, bench.folder / "external" / f"{expert}.safetensors")
    assert engine.check(recipe) == []
    engine.apply(recipe, bench.live.views)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (bench.live.views[name] != bench.pool.base(name)).float().mean()
    assert float(moved) > 0.7
    assert bench.statistics.questions == 0
    assert f"{FOLDER}/external/a.safetensors" in bench.statistics.files()
    scores["lm_head.weight"][0] = torch.nan
    save_file(scores, bench.folder / "external" / "b.safetensors")
    with pytest.raises(WeightsError, match=r"'lm_head.weight' must be floating and finite"):
        FolderStatistics(bench.folder).get("external", "b", "lm_head.weight")


def test_a_recipe_names_no_place_outside_the_folder(bench: Bench) -> None:
    assert FolderStatistics(bench.folder).path("../external", "a") is None
    assert "there is no file" in bench.statistics.problem("fisher@nan", "a")


def test_an_export_merges_again_from_its_own_files_and_a_study_from_its_cache(bench: Bench, tmp_path: Path) -> None:
    recipe = preset("df_merge", bench.pool.models)
    merged = apply(bench, recipe)
    for target, source in bench.statistics.files().items():
        copy = tmp_path / "export" / target
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(Path(source).read_bytes())
    pool = ModelPool(bench.pool.models, device="cpu")
    with pytest.raises(RecipeError, match="none were measured"):
        list(MergeEngine(pool).merged(recipe))
    cached = DataStatistics(pool, None, [bench.tasks], OWNERS, folder=bench.folder)
    for source in (FolderStatistics(tmp_path / "export" / FOLDER), cached):  # cached last: the check below asks it
        pool.statistics = source
        assert MergeEngine(pool).check(recipe) == []
        assert all(torch.equal(t, merged[n]) for n, t in MergeEngine(pool).merged(recipe))
    other = preset("df_merge", bench.pool.models, coefficients={"a": 0.1, "b": 0.1})
    assert "was not measured in this study" in MergeEngine(pool).check(other)[0]


def test_matrices_stored_the_other_way_round_keep_their_inputs(tmp_path: Path) -> None:
    """GPT-2 stores (in, out): the Gram matrix is (in, in), RegMean's gradient is zero there too."""
    config = transformers.GPT2Config(
        vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_inner=40, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    models = Models(base=str(tmp_path / "base"), experts={e: str(tmp_path / e) for e in "ab"})
    bench = Bench(ModelPool(models, device="cpu"), LiveModel.load(tmp_path / "base"), tmp_path / "s")
    (name,) = [n for n in bench.pool.groups if n.endswith("mlp.c_fc.weight")]
    assert bench.pool.base(name).shape == (16, 40)
    grams = [bench.statistics.get("gram", e, name) for e in "ab"]
    norm = bench.statistics.get("activation_norm", "a", name)
    assert norm is not None
    assert grams[0] is not None
    torch.testing.assert_close(norm, grams[0].diagonal().sqrt()[:, None])
    operator = {"name": "regmean", "options": {"alpha": 1.0, "ridge": 1e-9}}
    recipe = Recipe.model_validate({"models": models, "operator": operator, "coefficients": {"a": 1.0, "b": 1.0}})
    merged = apply(bench, recipe)[name].double()
    terms = [
        g.double() @ (merged - bench.pool.expert(e, name)) for g, e in zip(grams, "ab", strict=True) if g is not None
    ]
    assert float(sum(terms).norm()) < 1e-3 * float(terms[0].norm())  # type: ignore[union-attr]


# --- in a study


def test_a_study_measures_on_its_fit_rows_charges_for_them_and_starts_from_presets_with_data(
    demo: Path, tmp_path: Path
) -> None:
    """The demo's real models and tasks, through lm-eval."""
    tasks = {"demo_maths": "maths", "demo_spelling": "spelling"}
    experts = {e: str(demo / "models" / e) for e in tasks.values()}
    lm_eval = {
        "evaluator": "lm_eval",
        "tasks": list(tasks),
        "include_path": str(demo / "tasks"),
        "limit": 30,
        "fit_limit": 6,
    }
    study = {
        "study": {"name": "tiny"},
        "models": {"base": str(demo / "models" / "base"), "experts": experts, "dtype": "float32"},
        "space": {"type": "uniform"}, "evaluate": [lm_eval], "splits": {"search": 0.6, "fit": 0.3},
        "search": {"baselines": ["fisher", "ties"]}, "device": "cpu",
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    plan = prepare(read_study_file(tmp_path / "study.yaml"))
    bench = Workbench(plan, device="cpu")
    assert "fisher" not in baselines(plan.context, plan.baselines, can_measure=bench.can_measure)
    bench.offer_statistics(tasks)
    recipe = baselines(plan.context, plan.baselines, can_measure=bench.can_measure)["fisher"]
    plain = bench.score(preset("average", plan.context.models), Split.SEARCH)
    first = bench.score(recipe, Split.SEARCH)
    second = bench.score(recipe, Split.SEARCH)
    n_fit = sum(plan.evaluators[0].fit_tasks().values())  # type: ignore[attr-defined]
    assert 0 < n_fit <= 12
    assert first.evaluation.cost.questions == plain.evaluation.cost.questions + 3 * n_fit
    assert second.evaluation.cost.questions == plain.evaluation.cost.questions
    assert first.weights_sha256 == second.weights_sha256 != plain.weights_sha256
    assert len(list((tmp_path / "tiny.statistics").glob("*.safetensors"))) == 2
    pool = ModelPool(plan.context.models, device="cpu")
    pool.statistics = statistics_of(plan, pool, tasks, None)  # an export: nothing is bound
    exported = dict(MergeEngine(pool).merged(recipe))
    assert all(torch.equal(exported[n], bench.views[n]) for n in exported)
