"""Teachers' answers to fit rows, for losses without labels.

A row is asked when a fit first draws it, and its answer is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from merge_search.cpu_matmul import fast_products
from merge_search.engine.engine import MergeEngine
from merge_search.engine.learners.fit import teacher_recipe
from merge_search.errors import InputError
from merge_search.evaluation import Differentiable, Teachable, asking
from merge_search.recipe import Recipe

__all__ = ["ExpertLabels"]

_AT_ONCE = 256  # rows whose predictions are asked for at a time


class ExpertLabels:
    """The fit rows that each task's teacher has answered, for the losses ``pseudo`` and ``kl``.

    A teacher is the expert, or the base, that is best at a task. ``pseudo`` keeps the teacher's answers, ``kl`` its
    distribution over answers. Both stay with the evaluators, in this process. A resumed process asks again for the rows
    that it draws.

    Args:
        evaluators: Those with a differentiable loss answer for their tasks. The others are ignored.
    Attributes:
        asked: Questions asked of teachers so far, including those of a call of `ask` that failed.
    """

    def __init__(self, evaluators: Sequence[object]) -> None:
        self._evaluators = evaluators
        self.asked = 0
        self._known: dict[tuple[str, str], set[int]] = defaultdict(set)

    def questions(self, kind: str, rows: Mapping[str, Iterable[int]]) -> int:
        """Return how many questions `ask` would ask.

        Raises:
            InputError: An evaluator has no loss ``kl``.
        """
        return sum(_price(e, task, kind) * len(new) for e, task, new in self._unanswered(kind, rows))

    def ask(
        self,
        engine: MergeEngine,
        views: Mapping[str, Tensor],
        recipe: Recipe,
        teachers: Mapping[str, str],
        kind: str,
        rows: Mapping[str, Iterable[int]],
    ) -> int:
        """Let each task's teacher answer those of `rows` that it has not answered.

        Args:
            engine: The engine that writes a teacher into the live model.
            views: Live views by tensor name on disk. If any teacher was asked, the live model holds a teacher
                afterwards.
            recipe: Any recipe over the same models and dtype.
            teachers: Task -> expert, or ``base``, for every task with a row to answer. It must be the same in every
                call.
            kind: ``pseudo`` or ``kl``.
            rows: Rows by task.
        Returns:
            The number of questions asked.
        Raises:
            InputError: A task has no teacher, or an evaluator has no loss ``kl``.
        Determinism: rows are asked in ascending order. Where the last bits of an answer depend on the other rows of its
        batch,
        they depend on which rows were answered before.
        """
        before = self.asked
        for evaluator, task, new in self._unanswered(kind, rows):
            price = _price(evaluator, task, kind)
            if teachers.get(task) not in {"base", *recipe.models.experts}:
                raise InputError(f"learner: task {task!r} needs a model that is best at it to label its rows")
            engine.apply(teacher_recipe(recipe, teachers[task]), views)
            self.asked += price * len(new)
            with fast_products(views), asking(f"task {task!r}: labelling its rows"):
                _answer(evaluator, task, new, kind)
            self._known[kind, task].update(new)
        return self.asked - before

    def _unanswered(
        self, kind: str, rows: Mapping[str, Iterable[int]]
    ) -> Iterator[tuple[Differentiable, str, list[int]]]:
        for evaluator in self._evaluators:
            if isinstance(evaluator, Differentiable):
                for task in evaluator.fit_tasks():
                    if new := sorted(set(rows.get(task, ())) - self._known[kind, task]):
                        yield evaluator, task, new


def _price(evaluator: Differentiable, task: str, kind: str) -> int:
    """Return the number of questions per row."""
    return _teachable(evaluator).teacher_questions(task) if kind == "kl" else 1


def _answer(evaluator: Differentiable, task: str, rows: list[int], kind: str) -> None:
    if kind == "kl":
        _teachable(evaluator).cache_teacher(task, rows)
        return
    for at in range(0, len(rows), _AT_ONCE):
        some = rows[at : at + _AT_ONCE]
        evaluator.set_pseudo_labels(task, dict(zip(some, evaluator.predict(task, some), strict=True)))


def _teachable(evaluator: Differentiable) -> Teachable:
    if not isinstance(evaluator, Teachable):
        raise InputError(
            f"learner: {type(evaluator).__name__} has no loss kl (it cannot store an expert's answers); take pseudo"
        )
    return evaluator
