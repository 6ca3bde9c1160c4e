"""Coefficients fitted block after block to the teachers' hidden states."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.learners.block_outputs import fit_blocks
from merge_search.engine.learners.fit import FitSettings, Fitted, TaskLoss
from merge_search.engine.resident.coefficient_maps import FOLDER
from merge_search.engine.resident.live_model import LiveModel
from merge_search.engine.resident.pool import ModelPool
from merge_search.errors import InputError
from merge_search.recipe import Recipe

N_ROWS = 18
OWNERS = {"first": "a", "second": "b"}


def rows_of(task: str) -> list[Tensor]:
    """Return token rows of three lengths."""
    draw = torch.Generator().manual_seed(len(task))
    return [torch.randint(0, 24, (1, 4 + i % 3), generator=draw) for i in range(N_ROWS)]


def forward_only(live: LiveModel) -> dict[str, TaskLoss]:
    def loss(asked: Any, rows: list[Tensor]) -> Tensor:
        return torch.stack([live.model(input_ids=rows[i], use_cache=False).logits.mean() for i in asked]).mean()

    return {task: TaskLoss(N_ROWS, partial(loss, rows=rows_of(task))) for task in OWNERS}


def learn(pool: ModelPool, live: LiveModel, recipe: Recipe, folder: Path, **settings: Any) -> Fitted:
    chosen = FitSettings(**{"steps": 20, "batch_rows": 9, "step_size": 0.05, "loss": "block_output", **settings})
    engine = MergeEngine(pool)
    return fit_blocks(engine, live.model, live.views, recipe, forward_only(live), OWNERS, chosen, map_folder=folder)


def hidden_states(folder: str | Path, task: str) -> list[list[Tensor]]:
    """Return what enters the first block and leaves every block, for each row, by a newly loaded model."""
    model, found = LiveModel.load(folder).model, []
    for ids in rows_of(task):
        seen: list[Tensor] = []
        handles = [model.model.layers[0].register_forward_pre_hook(lambda _m, args, s=seen: s.append(args[0]))]
        handles += [
            layer.register_forward_hook(lambda _m, _a, out, s=seen: s.append(out)) for layer in model.model.layers
        ]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        found.append(seen)
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("per", ["block", "tensor", "row"])
def test_blocks_come_nearer_to_the_experts_and_the_recipe_alone_makes_the_live_model(
    make_models, tmp_path: Path, per: str
) -> None:
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": 0.2, "b": 0.2})
    fitted = learn(pool, live, recipe, tmp_path / FOLDER, per=per)
    assert fitted.losses.shape == (20, 2)
    assert fitted.tasks == ("first", "second")
    assert fitted.losses[-4:].mean() < 0.95 * fitted.losses[:4].mean()
    assert fitted.questions == 4 * 2 * N_ROWS + 3 * 20 * 2 * 9
    again = ModelPool(pool.models, device="cpu", map_folders=[tmp_path / FOLDER])
    for name, merged in MergeEngine(again).merged(Recipe.from_json(fitted.recipe.to_json())):
        assert torch.equal(merged, live.views[name]), name


def test_a_fit_that_fails_at_a_block_has_reported_its_questions_until_then(make_models) -> None:
    """It reports all first hidden states, then a share for each block that was begun."""
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": 0.2, "b": 0.2})
    asked: list[int] = []

    def fail_at_the_last(questions: int) -> None:
        asked.append(questions)
        if len(asked) == 3:
            raise MemoryError

    settings = FitSettings(per="block", steps=4, batch_rows=9, loss="block_output")
    live_parts = (live.model, live.views, recipe, forward_only(live), OWNERS, settings)
    with pytest.raises(MemoryError):
        fit_blocks(MergeEngine(pool), *live_parts, on_asked=fail_at_the_last)
    assert asked[0] == 2 * 2 * N_ROWS
    asked.clear()
    fitted = fit_blocks(MergeEngine(pool), *live_parts, on_asked=asked.append)
    assert len(asked) == 1 + 2
    assert sum(asked) == fitted.questions == 4 * 2 * N_ROWS + 3 * 4 * 2 * 9


def test_errors_are_distances_of_hidden_states_of_the_whole_models_relative_to_the_experts(
    make_models, tmp_path: Path
) -> None:
    """With coefficients that cannot move, merge and expert each run through all blocks separately."""
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": 0.3, "b": 0.4})
    fitted = learn(pool, live, recipe, tmp_path, per="block", steps=1, batch_rows=N_ROWS, step_size=1e-12)
    MergeEngine(pool).apply(recipe, live.views)
    live.model.save_pretrained(tmp_path / "merged")
    for task, found in zip(fitted.tasks, fitted.losses[0], strict=True):
        merged = hidden_states(tmp_path / "merged", task)
        expert = hidden_states(pool.models.experts[OWNERS[task]], task)
        errors = [
            sum((m[i] - e[i]).square().sum().item() for m, e in zip(merged, expert, strict=True))
            / sum(e[i].square().sum().item() for e in expert)
            for i in (1, 2)
        ]
        assert found == pytest.approx(sum(errors) / 2, rel=1e-3)


def test_an_expert_alone_stays_where_it_is(make_models, tmp_path: Path) -> None:
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": 1.0, "b": 0.0})
    losses = {"first": forward_only(live)["first"]}
    settings = FitSettings(per="tensor", steps=3, step_size=0.1, batch_rows=9)
    fitted = fit_blocks(MergeEngine(pool), live.model, live.views, recipe, losses, OWNERS, settings)
    assert fitted.losses[0].max() < 1e-10


@pytest.mark.parametrize("pull", [0.0, 0.5])
def test_tensors_outside_blocks_keep_their_coefficients(make_models, tmp_path: Path, pull: float) -> None:
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": 0.2, "b": 0.7})
    found = learn(pool, live, recipe, tmp_path, per="block", pull=pull).recipe
    for name, group in pool.groups.items():
        for expert, start in (("a", 0.2), ("b", 0.7)):
            moved = found.coefficient(expert, group) != start
            assert moved == (group.block is not None), name


def test_the_same_fit_twice_gives_the_same_bits(make_models, tmp_path: Path) -> None:
    pool, live = make_models()
    recipe = Recipe(models=pool.models, coefficients={"a": 0.2, "b": 0.2})
    first, second = (learn(pool, live, recipe, tmp_path, per="row", steps=4) for _ in range(2))
    assert first.recipe == second.recipe
    assert (first.losses == second.losses).all()


def test_requests_that_cannot_be_met_are_refused(make_models, tmp_path: Path) -> None:
    pool, live = make_models()
    recipe = Recipe(models=pool.models)
    with pytest.raises(InputError, match="set per to block or finer, not 'expert'"):
        learn(pool, live, recipe, tmp_path, per="expert")
    engine, losses = MergeEngine(pool), forward_only(live)
    with pytest.raises(InputError, match="'second' needs a model that is best at it"):
        fit_blocks(engine, live.model, live.views, recipe, losses, {"first": "a"}, FitSettings(per="block"))
    scaled = live.model.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] * 2, *args[1:]))
    with pytest.raises(InputError, match="blocks follow each other, each once and with nothing in between"):
        learn(pool, live, recipe, tmp_path, per="block")
    scaled.remove()


def test_a_models_cache_is_refused_as_an_argument(make_models, tmp_path: Path) -> None:
    pool, live = make_models()
    ids = rows_of("first")
    losses = {"first": TaskLoss(3, lambda asked: live.model(input_ids=ids[asked[0]], use_cache=True).logits.mean())}
    with pytest.raises(InputError, match="blocks are called with a DynamicCache, which cannot be repeated"):
        fit_blocks(
            MergeEngine(pool),
            live.model,
            live.views,
            Recipe(models=pool.models),
            losses,
            OWNERS,
            FitSettings(per="block"),
        )
