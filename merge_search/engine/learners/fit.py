"""Fit coefficients by Adam through the merge: the search's inner level. The result is a recipe of plain numbers.

    min over lambda   mean over tasks of loss_task(merge(lambda)) / scale_task  +  pull / 2 |lambda - start|^2

Masks, elections and mixing scores stay those of the recipe. AdaMerging (Yang et al. 2024, arXiv 2310.02575) is the loss
``entropy`` per tensor with `FitSettings.clamp`. Differs: any loss, any granularity from expert to output row, and a
clamped coefficient is moved onto its bound, where the release leaves it outside and merges with the bound.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_search.cpu_matmul import fast_products
from merge_search.engine.engine import MergeEngine
from merge_search.engine.learners.granularity import Granularity, make_granularity
from merge_search.engine.learners.slopes import Parts, Slopes
from merge_search.errors import EvaluationError, InputError, NonFiniteError, nearest
from merge_search.evaluation import Differentiable, Generating, kind_of, loss_of
from merge_search.recipe import Recipe
from merge_search.rules import GRANULARITIES
from merge_search.seeding import derive_seed

__all__ = ["FitSettings", "Fitted", "State", "TaskLoss", "drawn_rows", "fit", "task_losses", "teacher_recipe"]

QUESTIONS_PER_ROW = 3  # a forward pass counts as one question, a backward pass as two
_SMALLEST_LOSS = 1e-3  # a task that starts below it is solved, so its weight does not grow further


@dataclass(frozen=True)
class FitSettings:
    """How coefficients are fitted.

    Attributes:
        per: Granularity of the coefficients (`rules.GRANULARITIES`): one number per expert and ``expert``, ``block``,
            ``block_kind`` (block and module kind), ``tensor`` or ``row`` (output row; the rows of a tensor also move
            together), or a part by a rule from outside. Finer granularities need more rows: about 200 for blocks, 400
            for tensors, thousands for rows.
        steps: Number of Adam steps. With 0 the fit returns the start.
        step_size: Adam's step size.
        batch_rows: Rows of every task in every step.
        loss: The kind that `task_losses` is asked for: ``gold``, ``pseudo``, ``kl``, ``entropy`` and so on
            (`evaluation.Differentiable`), or ``auto`` (`evaluation.kind_of`). ``block_output`` selects
            `block_outputs.fit_blocks`.
        normalise: Divide each task's loss by its value at the start (on the first batch). This is for losses of
            different units. It gives most weight to tasks that are nearly solved.
        pull: Weight of half the squared distance from the start, which is added to the loss.
        average: Share of the steps, counted from the end, whose coefficients are averaged. 0 takes the coefficients
            after the last step alone. Small batches leave the last coefficients noisy (Polyak and Juditsky 1992). After
            200 steps on language models, 0.801 of the validation rows were right at the last coefficients, 0.809 where
            the step size decayed to zero, and 0.821 at this mean (three seeds).
        clamp: Bounds onto which every coefficient is moved back after each step; None: none.
        seed: Seed of the order of the rows.
    Raises:
        InputError: A setting is out of range; all problems at once.
    """

    per: str = "tensor"
    steps: int = 100
    step_size: float = 0.05
    batch_rows: int = 32
    loss: str = "gold"
    normalise: bool = False
    pull: float = 0.0
    average: float = 0.5
    clamp: Sequence[float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.per not in GRANULARITIES:
            problems.append(f"per: no granularity is called {self.per!r}{nearest(self.per, GRANULARITIES)}")
        if self.steps < 0 or self.batch_rows < 1:
            problems.append(
                f"steps must be >= 0 and batch_rows >= 1, got steps={self.steps}, batch_rows={self.batch_rows}"
            )
        if not (math.isfinite(self.step_size) and self.step_size > 0):
            problems.append(f"step_size must be > 0, got {self.step_size}")
        if not (math.isfinite(self.pull) and self.pull >= 0):
            problems.append(f"pull must be >= 0, got {self.pull}")
        if not 0 <= self.average <= 1:
            problems.append(f"average must be in [0, 1], got {self.average}")
        if self.clamp is not None and not (len(self.clamp) == 2 and self.clamp[0] < self.clamp[1]):
            problems.append(f"clamp must be [low, high] with low < high, got {list(self.clamp)}")
        if problems:
            raise InputError(problems, where="learner")


@dataclass(frozen=True)
class TaskLoss:
    """One task to fit on.

    Attributes:
        n_rows: Number of rows, at least one.
        loss: Rows -> mean loss of the live model over them, a scalar with its graph through the live parameters.
        questions: Questions that a row counts as.
    """

    n_rows: int
    loss: Callable[[Sequence[int]], Tensor]
    questions: int = QUESTIONS_PER_ROW

    def on(self, rows: Sequence[int]) -> TaskLoss:
        """The loss that draws from `rows` alone, of which there must be one."""
        return replace(self, n_rows=len(rows), loss=lambda drawn: self.loss([rows[i] for i in drawn]))

    def questions_per_step(self, settings: FitSettings) -> int:
        """Questions that one step asks of this task."""
        return self.questions * min(settings.batch_rows, self.n_rows)


@dataclass(frozen=True)
class Fitted:
    """The result of a fit.

    Attributes:
        recipe: The start's recipe with learned coefficients. The live model holds it.
        tasks: Task names, in the order of the columns of `losses`.
        losses: Loss of each step's rows before the step, not normalised. Shape (steps, tasks), float64.
        n_coefficients: How many numbers were fitted.
        questions: Rows asked, each counted three times: once for the forward pass and twice for the backward pass. A
            row whose answer is generated first counts once more.
        seconds: Wall time.
    """

    recipe: Recipe
    tasks: tuple[str, ...]
    losses: NDArray[np.float64]
    n_coefficients: int
    questions: int
    seconds: float


def task_losses(
    evaluators: Sequence[object], kind: str = "gold", instead: Mapping[str, str] = MappingProxyType({})
) -> dict[str, TaskLoss]:
    """Return the tasks of all evaluators that have a differentiable loss and rows to fit on.

    Args:
        evaluators: Evaluators without a differentiable loss are ignored.
        kind: Name of the loss, or ``auto``.
        instead: Names of the losses of single tasks.
    Raises:
        InputError: There are no such tasks, or two evaluators have a task of the same name.
    """
    losses: dict[str, TaskLoss] = {}
    for evaluator in evaluators:
        if isinstance(evaluator, Differentiable):
            for task, n in evaluator.fit_tasks().items():
                if task in losses:
                    raise InputError(
                        f"learner: two evaluators have a task {task!r} to fit on; give them different names"
                    )
                if n > 0:
                    own = kind_of(evaluator, task, instead.get(task, kind))
                    more = evaluator.generated_questions(task, own) if isinstance(evaluator, Generating) else 0
                    losses[task] = TaskLoss(n, loss_of(evaluator, task, own), QUESTIONS_PER_ROW + more)
    if not losses:
        raise InputError(
            "learner: no task has a differentiable loss and rows to fit on; "
            "give tasks a training split, or set splits.fit"
        )
    return losses


def fit(
    engine: MergeEngine,
    model: Any,
    views: Mapping[str, Tensor],
    recipe: Recipe,
    losses: Mapping[str, TaskLoss],
    settings: FitSettings,
    *,
    map_folder: str | Path | None = None,
    cache_bytes: int | None = None,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
    on_asked: Callable[[int], None] | None = None,
) -> Fitted:
    """Fit the coefficients of `recipe`, starting at its own.

    Args:
        engine: The engine that merges the recipe.
        model: The live model. Its parameters are written through `views` and need gradients during the fit only.
        views: Live views by tensor name on disk, as for `MergeEngine.apply`.
        recipe: The start.
        losses: Losses by task name.
        settings: How to fit.
        map_folder: Folder for the maps of ``per="row"``, written as ``<sha256>.safetensors``. It must outlive the
            recipe.
        cache_bytes: Most bytes for the parts of the recipe (`slopes.Parts`).
        on_step: Called with the step's number and its losses, after the step.
        on_asked: Called before each step with the questions it asks, so that the questions of a fit that fails are
            counted.
    Raises:
        RecipeError: The merge is not linear in its coefficients. Nothing was written.
        InputError: There are no tasks.
        NonFiniteError: A loss, slope or coefficient is NaN or infinite. The live model keeps the weights of that
            moment.
    Cost: per step and task one forward pass, one backward pass and one pass over the parts; per step one write of the
    weights.
    Determinism: the same inputs give the same bits on one machine and device. The order of the rows depends on seed,
    task and epoch alone. Afterwards the live model holds exactly what `MergeEngine` makes of `Fitted.recipe`.
    """
    if not losses:
        raise InputError("learner: there must be a task to fit on")
    began = time.perf_counter()
    parts = Parts(engine, recipe, cache_bytes=cache_bytes)
    granularity = make_granularity(settings.per, parts, recipe, map_folder=map_folder)
    slopes = Slopes(parts, model, views, rows=granularity.needs_rows)
    engine.apply(recipe, views)
    state = State(parts, granularity, slopes, views, settings, torch.nn.Parameter(granularity.start.clone()))
    per_step = sum(task.questions_per_step(settings) for task in losses.values())
    history = []
    for step in range(settings.steps):
        if on_asked is not None:
            on_asked(per_step)
        values = state.step(step, losses)
        history.append(list(values.values()))
        if on_step is not None:
            on_step(step, values)
    state.finish()
    learned = granularity.recipe(state.vector.detach()) if settings.steps else recipe
    engine.apply(learned, views)
    return Fitted(
        learned,
        tuple(losses),
        np.array(history, dtype=np.float64).reshape(settings.steps, len(losses)),
        granularity.start.numel(),
        per_step * settings.steps,
        time.perf_counter() - began,
    )


@dataclass
class State:
    """A fit in progress.

    Coefficients of one set (`Granularity.together`) move by a step of their own and by one that the whole set shares,
    whose slope is the sum of theirs. Adam sizes both steps, so what all rows of a tensor want is learned in few steps
    though the slope of a single row is mostly noise.

    Attributes:
        vector: The coefficients as they are now. Shape (n,), float64.
        scales: By task, what its loss is divided by (`FitSettings.normalise`); filled on the first step.
    """

    parts: Parts
    granularity: Granularity
    slopes: Slopes
    views: Mapping[str, Tensor]
    settings: FitSettings
    vector: torch.nn.Parameter
    scales: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        together = self.granularity.together
        n_sets = 0 if together is None else int(together.max()) + 1
        self._shared = torch.nn.Parameter(torch.zeros(n_sets, dtype=self.vector.dtype, device=self.vector.device))
        self.adam = torch.optim.Adam([self.vector, self._shared], lr=self.settings.step_size)
        self._sum, self._count = torch.zeros_like(self.vector.detach()), 0

    def step(self, step: int, losses: Mapping[str, TaskLoss]) -> dict[str, float]:
        """Take one Adam step and return each task's loss before it."""
        self.slopes.clear()
        values = {}
        with self.slopes.recording(), fast_products(self.views):
            for task, rows in losses.items():
                loss = rows.loss(_draw(self.settings, task, rows.n_rows, step))
                if not (isinstance(loss, Tensor) and loss.requires_grad):
                    raise EvaluationError(
                        f"task {task!r}: its loss must be a tensor with its graph through the live parameters, got "
                        f"{'a tensor without one' if isinstance(loss, Tensor) else type(loss).__name__}"
                    )
                values[task] = value = float(loss.detach())
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"a loss must be finite, got {value} for task {task!r} at step {step}; take smaller steps"
                    )
                torch.autograd.backward(loss / (self._scale(task, value) * len(losses)))
        self._move(step)
        self._write()
        return values

    def finish(self) -> None:
        """Replace the coefficients by their mean over the last steps (`FitSettings.average`).

        The live model gets the new coefficients too.
        """
        if self._count:
            with torch.no_grad():
                self.vector.copy_(self._sum / self._count)
            self._write()

    def _scale(self, task: str, value: float) -> float:
        if not self.settings.normalise:
            return 1.0
        return self.scales.setdefault(task, max(abs(value), _SMALLEST_LOSS))

    def _move(self, step: int) -> None:
        gradient = self.granularity.gradient(self.slopes.values)
        gradient += self.settings.pull * (self.vector.detach() - self.granularity.start)
        if not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError(f"slopes must be finite, found NaN or infinity at step {step}; take smaller steps")
        self.vector.grad = gradient
        together = self.granularity.together
        if together is not None:
            # NOTE: on the CPU. On a GPU `index_add_` sums in a varying order, which would change the last bits.
            sums = torch.zeros(len(self._shared), dtype=gradient.dtype).index_add_(0, together.cpu(), gradient.cpu())
            self._shared.grad = sums.to(gradient.device)
        self.adam.step()
        if together is not None:
            with torch.no_grad():
                self.vector.add_(self._shared[together])
                self._shared.zero_()
        if self.settings.clamp is not None:
            low, high = self.settings.clamp
            with torch.no_grad():
                self.vector.clamp_(low, high)
        if step >= self.settings.steps * (1 - self.settings.average):
            self._sum += self.vector.detach()
            self._count += 1

    @torch.no_grad()
    def _write(self) -> None:
        """Write base + sum_i lambda_i part_i into the live model. `MergeEngine.apply` makes the final bits."""
        for name, coefficients in self.granularity.coefficients(self.vector.detach()):
            if name in self.slopes.values:
                self.views[name].copy_(self.parts.merged(name, coefficients))


def _draw(settings: FitSettings, task: str, n_rows: int, step: int) -> list[int]:
    """Return the rows of one step.

    They are the next rows of an endless sequence of permutations, each with its own derived seed.
    """
    size = min(settings.batch_rows, n_rows)
    positions = (divmod(k, n_rows) for k in range(step * size, (step + 1) * size))
    return [_order(settings.seed, task, epoch, n_rows)[at] for epoch, at in positions]


@lru_cache(maxsize=64)
def _order(seed: int, task: str, epoch: int, n_rows: int) -> tuple[int, ...]:
    rows = list(range(n_rows))
    random.Random(derive_seed(seed, "fit", task, epoch)).shuffle(rows)
    return tuple(rows)


def drawn_rows(settings: FitSettings, n_rows: Mapping[str, int]) -> dict[str, set[int]]:
    """Return the rows of each task that `fit` draws in all its steps. More steps draw a superset of these rows."""
    n_drawn = {task: settings.steps * min(settings.batch_rows, n) for task, n in n_rows.items()}
    return {task: set(_order(settings.seed, task, 0, n)[: n_drawn[task]]) for task, n in n_rows.items()}


def teacher_recipe(recipe: Recipe, teacher: str) -> Recipe:
    """Return the recipe of an expert itself, or of the base (``base``), with the models and dtype of `recipe`."""
    operator = {"name": "passthrough", "options": {} if teacher == "base" else {"expert": teacher}}
    return Recipe.model_validate({"models": recipe.models, "dtype": recipe.dtype, "operator": operator})
