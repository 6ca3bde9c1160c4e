"""Coefficients learned through the merge, and their maps: plain numbers that give the same model bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from merge_search.engine.checkpoints.writer import export_folder
from merge_search.engine.engine import MergeEngine
from merge_search.engine.learners.fit import (
    FitSettings,
    Fitted,
    TaskLoss,
    fit,
)
from merge_search.engine.reference import merge_tensor
from merge_search.engine.resident.coefficient_maps import FOLDER, map_files, n_rows, read_map, write_map
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.engine.resident.live_model import LiveModel
from merge_search.engine.resident.pool import ModelPool
from merge_search.errors import InputError, NonFiniteError, RecipeError, WeightsError
from merge_search.recipe import Group, Recipe

N_ROWS = 20


def distillation(pool: ModelPool, live: LiveModel) -> dict[str, TaskLoss]:
    """Task ``a``: answer as expert a does, over random token rows; likewise ``b``. A real loss with a known minimum."""
    draw = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 24, (N_ROWS, 6), generator=draw)
    tasks = {}
    for expert in pool.models.experts:
        teacher = LiveModel.load(pool.models.experts[expert]).model
        with torch.no_grad():
            wanted = teacher(input_ids=rows).logits.softmax(-1)

        def loss(asked: Any, wanted: Tensor = wanted) -> Tensor:
            log_p = live.model(input_ids=rows[list(asked)]).logits.log_softmax(-1)
            return -(wanted[list(asked)] * log_p).sum(-1).mean()

        tasks[expert] = TaskLoss(N_ROWS, loss)
    return tasks


def learn(pool: ModelPool, live: LiveModel, recipe: Recipe, folder: Path, **settings: Any) -> Fitted:
    chosen = FitSettings(**{"steps": 12, "batch_rows": 10, "step_size": 0.03, **settings})
    tasks = distillation(pool, live)
    return fit(MergeEngine(pool), live.model, live.views, recipe, tasks, chosen, map_folder=folder)


@pytest.mark.parametrize("per", ["expert", "block", "block_kind", "tensor", "row"])
def test_fitting_lowers_the_loss_and_the_recipe_alone_makes_the_model_that_is_live(
    make_models, tmp_path: Path, per: str
) -> None:
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": 0.1, "b": 0.1})
    fitted = learn(pool, live, recipe, tmp_path / FOLDER, per=per)
    assert fitted.losses[-2:].mean() < fitted.losses[:2].mean() - 0.005
    assert fitted.tasks == ("a", "b")
    assert fitted.questions == 3 * 12 * 2 * 10
    n_tensors, outputs = len(pool.groups), sum(n_rows(pool.base(n).shape) for n in pool.groups)
    counts = {"expert": 2, "block": 2 * 5, "block_kind": 2 * 9, "tensor": 2 * n_tensors, "row": 2 * outputs}
    assert fitted.n_coefficients == counts[per]  # outside the two blocks: embedding, final norm, head
    again = ModelPool(pool.models, device="cpu", map_folders=[tmp_path / FOLDER])
    read = Recipe.from_json(fitted.recipe.to_json())
    for name, merged in MergeEngine(again).merged(read):
        assert torch.equal(merged, live.views[name]), name
        assert torch.equal(merged, merge_tensor(read, again, name)), name


def test_a_clamped_fit_steps_against_the_slope_and_stays_within_its_bounds(make_models, tmp_path: Path) -> None:
    """Adam's first step is the step size against the sign of the slope, here by central differences of the loss."""
    pool, live = make_models()
    tasks, engine = distillation(pool, live), MergeEngine(pool)

    def loss(a: float, b: float) -> float:
        engine.apply(Recipe(models=pool.models, coefficients={"a": a, "b": b}), live.views)
        with torch.no_grad():
            return sum(task.loss(range(N_ROWS)).double().item() for task in tasks.values())

    signs = np.sign([loss(0.31, 0.3) - loss(0.29, 0.3), loss(0.3, 0.31) - loss(0.3, 0.29)])
    start = Recipe(models=pool.models, coefficients={"a": 0.3, "b": 0.3})
    settings = {"per": "expert", "steps": 1, "step_size": 1e-3, "batch_rows": N_ROWS, "average": 0.0}
    free = learn(pool, live, start, tmp_path, **settings)
    assert list(free.recipe.coefficients.values()) == pytest.approx(0.3 - 1e-3 * signs, abs=1e-8)
    clamped = learn(pool, live, start, tmp_path, **settings, clamp=(0.2995, 0.3005))
    assert list(clamped.recipe.coefficients.values()) == pytest.approx(0.3 - 5e-4 * signs, abs=1e-12)
    with pytest.raises(InputError, match=r"clamp must be \[low, high\] with low < high, got \[1, 0\]"):
        FitSettings(clamp=(1, 0))


def test_the_same_fit_twice_gives_the_same_bits_and_another_seed_others(make_models, tmp_path: Path) -> None:
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": 0.3, "b": 0.2})
    first = learn(pool, live, recipe, tmp_path, per="tensor", steps=5)
    second = learn(pool, live, recipe, tmp_path, per="tensor", steps=5)
    other = learn(pool, live, recipe, tmp_path, per="tensor", steps=5, seed=1)
    assert first.recipe == second.recipe
    assert np.array_equal(first.losses, second.losses)
    assert other.recipe != first.recipe


def test_the_live_weights_of_every_step_are_those_of_the_recipe_so_far(make_models, tmp_path: Path) -> None:
    """Step losses are the losses of the engine's own merges, and a fit of k steps is the beginning of one of k + 1."""
    pool, live = make_models()
    settings = {"select": {"kind": "top_k"}, "resolve": {"kind": "sum"}, "splice": {"kind": "mask"}, "scale": 0.9}
    recipe = Recipe(models=pool.models, densities={"a": 0.5, "b": 0.6}, **settings)
    short = learn(pool, live, recipe, tmp_path, per="row", steps=2, batch_rows=N_ROWS, average=0.0)
    long = learn(pool, live, recipe, tmp_path, per="row", steps=3, batch_rows=N_ROWS, average=0.0)
    assert np.array_equal(long.losses[:2], short.losses)
    engine = MergeEngine(ModelPool(pool.models, device="cpu", map_folders=[tmp_path]))
    engine.apply(short.recipe, live.views)
    tasks = distillation(pool, live)
    with torch.no_grad():
        found = [float(task.loss(range(N_ROWS))) for task in tasks.values()]
    assert long.losses[2] == pytest.approx(found, rel=1e-5)


def test_the_coefficients_of_the_last_steps_are_averaged(make_models, tmp_path: Path) -> None:
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": 0.1, "b": 0.3})

    def found(steps: int, average: float) -> np.ndarray[Any, Any]:
        fitted = learn(pool, live, recipe, tmp_path, per="expert", steps=steps, average=average)
        return np.array([fitted.recipe.coefficients[e] for e in "ab"])

    alone = {steps: found(steps, 0.0) for steps in (2, 3, 4)}
    assert found(4, 0.5) == pytest.approx((alone[3] + alone[4]) / 2, abs=1e-6)
    assert found(4, 0.75) == pytest.approx((alone[2] + alone[3] + alone[4]) / 3, abs=1e-6)
    assert abs(alone[3] - alone[4]).min() > 1e-3
    for name, merged in MergeEngine(pool).merged(
        learn(pool, live, recipe, tmp_path, per="expert", steps=4, average=0.5).recipe
    ):
        assert torch.equal(merged, live.views[name])


@pytest.mark.parametrize("per", ["expert", "row"])
def test_a_fit_takes_the_steps_of_adam_through_a_merge_by_autograd(make_models, tmp_path: Path, per: str) -> None:
    """AdaMerging written out: base + sum lambda delta by `functional_call`, torch's Adam, a pull to the start.

    A row's coefficient is a number of its own plus one that all rows of its tensor share.
    """
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": 0.1, "b": 0.3})
    options = {"per": per, "steps": 5, "batch_rows": N_ROWS, "pull": 0.2, "average": 0.0}
    fitted = learn(pool, live, recipe, tmp_path, **options)
    base = {name: pool.base(name) for name in pool.groups}
    start = {n: torch.tensor([[0.1], [0.3]]).repeat(1, n_rows(t.shape)) for n, t in base.items()}
    if per == "expert":
        start = dict.fromkeys(base, torch.tensor([[0.1], [0.3]]))
    leaves = {id(t): t.clone().requires_grad_(True) for t in start.values()}
    shared = {i: torch.zeros(2, 1, requires_grad=per == "row") for i in leaves}
    adam = torch.optim.Adam([t for t in (*leaves.values(), *shared.values()) if t.requires_grad], lr=0.03)
    teachers = [LiveModel.load(folder).model for folder in pool.models.experts.values()]
    rows = torch.randint(0, 24, (N_ROWS, 6), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = torch.stack([t(input_ids=rows).logits.softmax(-1) for t in teachers])
    for _ in range(5):
        weights = {}
        values = {i: leaves[i] + shared[i] for i in leaves}
        for name, t in base.items():
            delta = torch.stack([pool.expert(e, name) - t for e in "ab"])
            weights[name] = t + (values[id(start[name])].reshape(2, -1, *[1] * (t.ndim - 1)) * delta).sum(0)
        logits = functional_call(live.model, weights, (), {"input_ids": rows, "use_cache": False}).logits
        loss = -(wanted * logits.log_softmax(-1)).sum(-1).mean()
        pulls = sum(0.1 * (values[id(t)] - t).square().sum() for t in {id(t): t for t in start.values()}.values())
        adam.zero_grad()
        (loss + pulls).backward()
        adam.step()
    for i, expert in enumerate("ab"):
        rows_of_map = read_map(tmp_path, fitted.recipe.maps[expert]) if per == "row" else {}
        for name in base:
            own = leaves[id(start[name])][i].detach()
            expected = own + shared[id(start[name])][i].detach()
            found = rows_of_map.get(name, torch.tensor([fitted.recipe.coefficients[expert]]))
            # The sign of Adam's steps is undefined where a slope is near zero.
            settled = (own - start[name][i]).abs() > 0.02
            torch.testing.assert_close(found[settled], expected[settled], rtol=0, atol=3e-3)
            assert per == "row" or bool(settled.all())


def test_a_fit_begins_at_the_recipes_own_coefficients_and_maps(make_models, tmp_path: Path) -> None:
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": {"*": 0.5, "block.0": 0.2}, "b": 0.4})
    rows = learn(pool, live, recipe, tmp_path, per="row", steps=3).recipe
    assert rows.coefficients == {"a": 1.0, "b": 1.0}
    before = live.hash()
    for per in ("row", "block"):  # a coarser fit keeps the map and scales it
        start = learn(pool, live, rows, tmp_path, per=per, steps=1, step_size=1e-12)
        assert start.losses.shape == (1, 2)
        coefficients = start.recipe.coefficients["a"]
        value = coefficients["block.1"] if isinstance(coefficients, dict) else coefficients
        assert value == pytest.approx(1.0, abs=1e-9)
        MergeEngine(pool).apply(rows, live.views)
        assert live.hash() == before
    nothing = learn(pool, live, recipe, tmp_path, steps=0)
    assert nothing.recipe == recipe
    assert nothing.questions == 0


def test_a_strong_pull_keeps_coefficients_near_the_start(make_models, tmp_path: Path) -> None:
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": 0.1, "b": 0.1})
    moved = [
        learn(pool, live, recipe, tmp_path, per="expert", steps=30, pull=pull).recipe.coefficients["a"] - 0.1
        for pull in (0.0, 100.0)
    ]
    assert abs(moved[1]) < 0.25 * abs(moved[0])


def test_normalised_losses_do_not_depend_on_a_tasks_scale(make_models, tmp_path: Path) -> None:
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": 0.1, "b": 0.1})
    tasks = distillation(pool, live)
    louder = {**tasks, "b": TaskLoss(N_ROWS, lambda rows: 64.0 * tasks["b"].loss(rows))}
    settings = FitSettings(per="expert", steps=4, batch_rows=10, normalise=True)
    plain = fit(MergeEngine(pool), live.model, live.views, recipe, tasks, settings).recipe
    loud = fit(MergeEngine(pool), live.model, live.views, recipe, louder, settings).recipe
    assert loud.coefficients["a"] == pytest.approx(plain.coefficients["a"], abs=1e-6)


def test_every_row_is_asked_once_before_any_is_asked_again(make_models, tmp_path: Path) -> None:
    pool, live = make_models()
    asked: list[int] = []

    def loss(rows: Any) -> Tensor:
        asked.extend(rows)
        return live.model(input_ids=torch.tensor([[1, 2]])).logits.square().mean()

    recipe = Recipe(models=pool.models)
    settings = FitSettings(per="expert", steps=6, batch_rows=6)
    fit(MergeEngine(pool), live.model, live.views, recipe, {"t": TaskLoss(12, loss)}, settings)
    assert sorted(asked[:12]) == sorted(asked[12:24]) == list(range(12))
    assert asked[:12] != asked[12:24] != sorted(asked[12:24])


def test_losses_that_are_not_finite_end_the_fit_and_the_next_apply_repairs_the_model(make_models, tmp_path) -> None:
    pool, live = make_models()
    engine = MergeEngine(pool)
    recipe = Recipe(models=pool.models)
    engine.apply(recipe, live.views)
    whole = live.hash()
    calls = []

    def loss(rows: Any) -> Tensor:
        calls.append(1)
        value = live.model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().mean()
        return value * (float("nan") if len(calls) > 2 else 1.0)

    with pytest.raises(NonFiniteError, match="a loss must be finite, got nan for task 't' at step 2"):
        fit(engine, live.model, live.views, recipe, {"t": TaskLoss(4, loss)}, FitSettings(per="tensor", batch_rows=4))
    assert live.hash() != whole
    engine.apply(recipe, live.views)
    assert live.hash() == whole


def test_recipes_and_settings_that_cannot_be_learned_are_refused(make_models, tmp_path: Path) -> None:
    pool, live = make_models()
    engine, losses = MergeEngine(pool), distillation(pool, live)
    weighted = Recipe(models=pool.models, resolve={"kind": "sum", "weighted": True})
    with pytest.raises(RecipeError, match="weighted election"):
        fit(engine, live.model, live.views, weighted, losses, FitSettings())
    with pytest.raises(RecipeError, match="give the folder"):
        fit(engine, live.model, live.views, Recipe(models=pool.models), losses, FitSettings(per="row"))
    with pytest.raises(InputError, match="there must be a task"):
        fit(engine, live.model, live.views, Recipe(models=pool.models), {}, FitSettings())
    with pytest.raises(InputError, match="no granularity is called 'rows'; did you mean 'row'") as error:
        FitSettings(per="rows", batch_rows=0, step_size=0.0, pull=-1.0)
    assert len(error.value.problems) == 4


# --- maps


def test_equal_maps_have_equal_names_and_come_back_as_they_were(tmp_path: Path) -> None:
    values = {"b": torch.tensor([1.5, -2.0]), "a": torch.tensor([0.25])}
    name = write_map(tmp_path / "one", values)
    assert name == write_map(tmp_path / "two", dict(sorted(values.items())))
    assert name != write_map(tmp_path / "two", {**values, "a": torch.tensor([0.5])})
    assert [f.name for f in (tmp_path / "one").iterdir()] == [f"{name}.safetensors"]
    found = read_map([tmp_path / "absent", tmp_path / "two"], name)
    assert found.keys() == values.keys()
    assert all(torch.equal(found[k], values[k]) for k in values)


def test_missing_changed_and_ill_formed_maps_are_refused(tmp_path: Path) -> None:
    name = write_map(tmp_path, {"w": torch.ones(3)})
    with pytest.raises(RecipeError, match=r"no file 0{64}.safetensors \(looked in: .*elsewhere\)"):
        read_map(tmp_path / "elsewhere", "0" * 64)
    with pytest.raises(RecipeError, match=r"64 hexadecimal digits, got '\.\./secret'"):
        read_map(tmp_path, "../secret")
    file = tmp_path / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.raises(WeightsError, match=f"must have sha256 {name[:16]}"):
        read_map(tmp_path, name)
    with pytest.raises(NonFiniteError, match="tensor 'w'"):
        write_map(tmp_path, {"w": torch.tensor([1.0, float("inf")])})
    with pytest.raises(RecipeError, match=r"must have shape \(rows,\), got \(2, 1\)"):
        write_map(tmp_path, {"w": torch.ones(2, 1)})


def test_each_output_row_gets_its_coefficient_in_every_kind_of_tensor() -> None:
    """By hand: scale * coefficient * map[row] * delta, for a matrix, a vector, a number and a single row."""
    shapes = {"w": (2, 3), "v": (4,), "s": (), "one": (1, 5)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    experts = {
        "a": {n: torch.ones(s) for n, s in shapes.items()},
        "b": {n: 2 * torch.ones(s) for n, s in shapes.items()},
    }
    rows = {"w": [1.0, -2.0], "v": [1.0, 2.0, 3.0, 4.0], "s": [5.0], "one": [7.0]}
    statistics = {("map:" + "0" * 64, "a", n): torch.tensor(v) for n, v in rows.items()}
    tensors = MemoryTensors(base, experts, statistics=statistics)
    plain = {"models": tensors.models, "coefficients": {"a": 0.5, "b": 0.25}, "scale": 2.0, "maps": {"a": "0" * 64}}
    wanted = {
        "w": [[2.0] * 3, [-1.0] * 3],
        "v": [2.0, 3.0, 4.0, 5.0],
        "s": 6.0,
        "one": [[8.0] * 5],
    }
    found = dict(MergeEngine(tensors).merged(Recipe.model_validate(plain)))
    assert {n: t.tolist() for n, t in found.items()} == wanted
    same = dict(MergeEngine(tensors).merged(Recipe.model_validate({**plain, "operator": {"name": "tsv_m"}})))
    torch.testing.assert_close(same["v"], torch.tensor(wanted["v"]) / 2)  # tsv_m averages vectors
    assert bool((same["w"][0] > 0).all() & (same["w"][1] < 0).all())


def test_maps_that_do_not_fit_the_models_or_the_rules_are_refused(make_models, tmp_path: Path) -> None:
    pool, _ = make_models()
    engine = MergeEngine(pool)
    pool.map_folders.append(tmp_path / FOLDER)
    whole = {name: torch.ones(n_rows(pool.base(name).shape)) for name in pool.groups}
    good = write_map(tmp_path / FOLDER, whole)
    short = write_map(tmp_path / FOLDER, {**whole, "model.norm.weight": torch.ones(3)})
    part = write_map(tmp_path / FOLDER, {"model.norm.weight": torch.ones(16)})

    def problems(digest: str, **settings: Any) -> str:
        return "; ".join(engine.check(Recipe(models=pool.models, maps={"a": digest}, **settings)))

    assert problems(good) == ""
    assert "must have 16 numbers for tensor 'model.norm.weight', found 3" in problems(short)
    assert "has no entry for tensor" in problems(part)
    assert f"no file {'0' * 64}.safetensors" in problems("0" * 64)
    assert "operator 'karcher' gives no part per expert" in problems(good, operator={"name": "karcher"})
    assert "no voice in an election" in problems(good, resolve={"kind": "sum", "weighted": True})
    with pytest.raises(RecipeError, match="found 3"):
        engine.apply(Recipe(models=pool.models, maps={"b": short}), {})


def test_a_map_travels_with_the_export_and_the_recipe_there_makes_the_same_model(make_models, tmp_path: Path) -> None:
    pool, live = make_models()
    draw = torch.Generator().manual_seed(0)
    rows = {name: torch.rand(n_rows(pool.base(name).shape), generator=draw) for name in pool.groups}
    folder = tmp_path / "study" / FOLDER
    recipe = Recipe(models=pool.models, maps={"b": write_map(folder, rows)})
    pool.map_folders.append(folder)
    engine = MergeEngine(pool)
    engine.apply(recipe, live.views)
    digest = export_folder(
        tmp_path / "out", base_folder=pool.base_folder, tensors=engine.merged(recipe), recipe=recipe, card="",
        extra=lambda: map_files(pool.map_folders, recipe), left_out=pool.aliases, expected=live.hash(),
    )  # fmt: skip
    assert [f.name for f in (tmp_path / "out" / FOLDER).iterdir()] == [f"{recipe.maps['b']}.safetensors"]
    read = Recipe.from_json((tmp_path / "out" / "recipe.json").read_text())
    alone = ModelPool(read.models, device="cpu", map_folders=[tmp_path / "out" / FOLDER])
    remade = MergeEngine(alone)
    again = export_folder(
        tmp_path / "again", base_folder=alone.base_folder, tensors=remade.merged(read), recipe=read, card="",
        extra=lambda: map_files(alone.map_folders, read), left_out=alone.aliases,
    )  # fmt: skip
    assert again == digest
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == set(pool.groups)


@pytest.mark.slow
def test_compiled_passes_read_maps_as_chunks_do() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = {"w": (300, 200), "one": (1, 40_000), "v": (50_000,)}
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    experts = {e: {n: t + torch.randn(t.shape, generator=draw) for n, t in base.items()} for e in ("a", "b")}
    statistics = {("map:x", "a", n): torch.rand(n_rows(s), generator=draw) for n, s in shapes.items()}
    groups = {name: Group(name, 0, "mlp") for name in shapes}
    tensors = MemoryTensors(base, experts, groups=groups, statistics=statistics)
    recipe = Recipe(models=tensors.models, maps={"a": "x"}, select={"kind": "top_k"}, densities={"a": 0.5, "b": 0.4})
    compiled = MergeEngine(tensors, compile=True)
    if not compiled.is_compiled:
        pytest.skip("no compiler here")
    eager = dict(MergeEngine(tensors, compile=False).merged(recipe))
    for name, merged in compiled.merged(recipe):
        assert torch.equal(merged, eager[name]), name
