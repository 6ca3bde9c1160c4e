"""Which rows a statistic is measured on, and what it may read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merge_search.errors import InputError
from merge_search.evaluation import Differentiable, loss_of
from merge_search.recipe import Group
from merge_search.seeding import derive_seed

__all__ = ["TaskRows", "Work", "rows_of_experts"]


@dataclass(frozen=True)
class TaskRows:
    """Rows of one task.

    Attributes:
        loss: Mean loss of the live model over rows, -log p of the right answer.
        fingerprint: Of the task's evaluator.
    """

    task: str
    rows: tuple[int, ...]
    loss: Callable[[Sequence[int]], Tensor]
    fingerprint: str


@dataclass(frozen=True)
class Work:
    """One measurement.

    Attributes:
        model: The live module, in eval mode, holding the weights of the point.
        views: Of every merged tensor, by name on disk.
        groups: Where they belong.
        tasks: Their statistics are averaged, each task counting once whatever its number of rows.
    """

    model: Any
    views: Mapping[str, Tensor]
    groups: Mapping[str, Group]
    tasks: tuple[TaskRows, ...]

    @property
    def n_rows(self) -> int:
        return sum(len(t.rows) for t in self.tasks)

    def each(self) -> Iterator[tuple[float, Callable[[], Tensor]]]:
        """Weight of every row (they sum to one) and its loss, in a fixed order."""
        for task in self.tasks:
            for row in task.rows:
                yield 1.0 / (len(self.tasks) * len(task.rows)), lambda task=task, row=row: task.loss([row])  # type: ignore[misc]


def rows_of_experts(
    evaluators: Sequence[object], experts: Sequence[str], owners: Mapping[str, str], *, n_rows: int, seed: int
) -> dict[str, tuple[TaskRows, ...]]:
    """The rows of each expert: of the tasks that it owns, of all tasks where it owns none.

    Args:
        owners: Task -> expert, or ``base``. Tasks of no expert count for experts without a task only.
        n_rows: At most so many per task, drawn without replacement by `seed` and the task's name alone.
    Returns:
        Empty tuples where no task has a row to fit on.
    Raises:
        InputError: two evaluators have a task of one name.
    """
    found: dict[str, TaskRows] = {}
    for evaluator in evaluators:
        if not isinstance(evaluator, Differentiable):
            continue
        for task, n in evaluator.fit_tasks().items():
            if task in found:
                raise InputError(f"statistics: two evaluators have a task {task!r}; give them different names")
            if n:
                fingerprint: str = evaluator.fingerprint()  # type: ignore[attr-defined]
                drawn = random.Random(derive_seed(seed, "statistics", task)).sample(range(n), min(n, n_rows))
                found[task] = TaskRows(task, tuple(sorted(drawn)), loss_of(evaluator, task), fingerprint)
    everything = tuple(found.values())
    return {e: tuple(t for t in everything if owners.get(t.task) == e) or everything for e in experts}
