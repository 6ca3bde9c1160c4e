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
from merge_search.evaluation import Differentiable, Grading, Teachable, asking, kind_of
from merge_search.recipe import Recipe

__all__ = ["ExpertLabels"]

_AT_ONCE = 256  # rows whose predictions are asked for at a time


class ExpertLabels:
    """The fit rows that each task's teacher has answered, for the losses ``pseudo``, ``correct`` and ``kl``.

    A teacher is the expert, or the base, that is best at a task. ``pseudo`` and ``correct`` keep the teacher's answers,
    ``kl`` its distribution over answers. Both stay with the evaluators, in this process. A resumed process asks again
    for the rows that it draws.

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
        return sum(_price(e, task, own) * len(new) for e, task, own, new in self._unanswered(kind, rows))

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
            kind: A kind of loss, or ``auto``. The kinds that need no teacher ask nothing.
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
        for evaluator, task, own, new in self._unanswered(kind, rows):
            price = _price(evaluator, task, own)
            if teachers.get(task) not in {"base", *recipe.models.experts}:
                raise InputError(f"learner: task {task!r} needs a model that is best at it to label its rows")
            engine.apply(teacher_recipe(recipe, teachers[task]), views)
            self.asked += price * len(new)
            with fast_products(views), asking(f"task {task!r}: labelling its rows"):
                _answer(evaluator, task, new, own)
            self._known[own, task].update(new)
        return self.asked - before

    def right(self, kind: str, rows: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
        """The rows that the teacher answers right, by task whose loss is ``correct``, of `rows` already answered.

        Raises:
            EvaluationError: An evaluator failed to judge the answers.
        """
        right = {}
        for evaluator in self._evaluators:
            if isinstance(evaluator, Grading):
                for task in rows.keys() & evaluator.fit_tasks().keys():
                    if kind_of(evaluator, task, kind) == "correct":
                        with asking(f"task {task!r}: judging its teacher's answers"):
                            right[task] = evaluator.right_rows(task, sorted(rows[task]))
        return right

    def _unanswered(
        self, kind: str, rows: Mapping[str, Iterable[int]]
    ) -> Iterator[tuple[Differentiable, str, str, list[int]]]:
        """Evaluator, task, ``pseudo`` or ``kl``, and the new rows, for every task whose loss needs a teacher."""
        for evaluator in self._evaluators:
            if isinstance(evaluator, Differentiable):
                for task in evaluator.fit_tasks():
                    own = kind_of(evaluator, task, kind)
                    own = "pseudo" if own == "correct" else own
                    if own in ("pseudo", "kl") and (new := sorted(set(rows.get(task, ())) - self._known[own, task])):
                        yield evaluator, task, own, new


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
