"""The rows on which a statistic is measured, and what it may read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_search.engine.contracts import Tensors
from merge_search.errors import InputError
from merge_search.evaluation import Answering, Differentiable, answers_of, loss_of, predictions_of
from merge_search.recipe import Group
from merge_search.seeding import derive_seed

__all__ = ["TaskRows", "Work", "is_changed", "rows_of_experts"]


@dataclass(frozen=True)
class TaskRows:
    """Rows of one task.

    Attributes:
        task: Name of the task.
        rows: Indices of the rows, ascending.
        loss: Rows -> mean loss of the live model over them: -log p of the right answer.
        fingerprint: Fingerprint of the task's evaluator.
        answers: Row -> losses and probabilities of all its answers (`evaluation.Answering`), or None where they cannot
            be listed.
        ask: Puts the prompts of rows to the live model, whatever their right answers are. None: `loss` does.
    """

    task: str
    rows: tuple[int, ...]
    loss: Callable[[Sequence[int]], Tensor]
    fingerprint: str
    answers: Callable[[int], tuple[Tensor, Tensor] | None] = lambda row: None
    ask: Callable[[Sequence[int]], Any] | None = None


@dataclass(frozen=True)
class Work:
    """One measurement.

    Attributes:
        model: The live module in eval mode, with the weights at which the statistic is measured.
        views: Live views of every merged tensor, by name on disk.
        groups: Group of every merged tensor.
        tasks: Their statistics are averaged. Each task counts once, whatever its number of rows.
        on_asked: Called with questions besides those that the kind says.
        models: Base and experts as they lie in the pool, read only; None where a statistic's row says that it reads the
            live weights alone.
        expert: The expert that is measured; '' where a statistic's row says that it measures no single one.
        seed: The study's seed.
    """

    model: Any
    views: Mapping[str, Tensor]
    groups: Mapping[str, Group]
    tasks: tuple[TaskRows, ...]
    on_asked: Callable[[int], None] = lambda questions: None
    models: Tensors | None = None
    expert: str = ""
    seed: int = 0

    @property
    def n_rows(self) -> int:
        """Number of rows of all tasks."""
        return sum(len(t.rows) for t in self.tasks)

    @property
    def weights(self) -> list[float]:
        """Weight of every row in the mean over tasks, in the order of `each`; they sum to one."""
        return [weight for weight, _, _ in self._each_row()]

    def _each_row(self) -> Iterator[tuple[float, TaskRows, int]]:
        for task in self.tasks:
            for row in task.rows:
                yield 1.0 / (len(self.tasks) * len(task.rows)), task, row

    def each(self) -> Iterator[tuple[float, Tensor]]:
        """Yield the weight and the loss of every row, in a fixed order. The weights sum to one."""
        for weight, task, row in self._each_row():
            yield weight, task.loss([row])

    def each_answer(self) -> Iterator[tuple[float, Tensor]]:
        """Yield weight x p(y) and the loss of every answer y of every row, in a fixed order. The weights sum to one.

        Every answer is reported as two questions, for its backward pass.
        """
        for weight, task, row in self._each_row():
            losses, p = task.answers(row) or (task.loss([row])[None], None)
            for y, loss in enumerate(losses):
                self.on_asked(2)
                yield weight * (1.0 if p is None else float(p[y])), loss


def is_changed(models: Tensors, expert: str, name: str) -> bool:
    """Return whether an expert's tensor differs from the base's, on whatever devices they lie."""
    base = models.base(name)
    return not torch.equal(base.to(torch.float32), models.expert(expert, name).to(base.device, torch.float32))


def rows_of_experts(
    evaluators: Sequence[object],
    experts: Sequence[str],
    teachers: Mapping[str, str],
    *,
    n_rows: int,
    seed: int,
    needs_labels: bool = True,
) -> dict[str, tuple[TaskRows, ...]]:
    """Return the rows of each expert: those of its tasks, or of all tasks for an expert that teaches none.

    Args:
        evaluators: Evaluators without a differentiable loss are ignored.
        experts: Names of the experts.
        teachers: Task -> expert, or ``base``. Tasks that the base teaches are used only for experts without a task.
        n_rows: Most rows per task, drawn without replacement. The draw depends on `seed` and the task's name alone.
        seed: The study's seed.
        needs_labels: Leave out tasks whose rows have no labels. Else those that have neither labels nor answers of the
            model's own.
    Returns:
        Empty tuples where no task has a row to fit on.
    Raises:
        InputError: Two evaluators have a task of the same name.
    """
    rows: dict[str, TaskRows] = {}
    for evaluator in evaluators:
        if not isinstance(evaluator, Differentiable):
            continue
        for task, n in evaluator.fit_tasks().items():
            if task in rows:
                raise InputError(f"statistics: two evaluators have a task {task!r}; give them different names")
            kinds = evaluator.losses(task) if n else ()
            if "gold" in kinds or ("pseudo" in kinds and not needs_labels):
                fingerprint: str = evaluator.fingerprint()  # type: ignore[attr-defined]
                drawn = random.Random(derive_seed(seed, "statistics", task)).sample(range(n), min(n, n_rows))
                answers = {"answers": answers_of(evaluator, task)} if isinstance(evaluator, Answering) else {}
                ask = predictions_of(evaluator, task) if "pseudo" in kinds else None
                loss = loss_of(evaluator, task)
                rows[task] = TaskRows(task, tuple(sorted(drawn)), loss, fingerprint, ask=ask, **answers)
    all_rows = tuple(rows.values())
    return {e: tuple(t for t in all_rows if teachers.get(t.task) == e) or all_rows for e in experts}
