"""The questions of a loaded task, split and ordered by the hash of the document, and the task's metrics."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.utils import handle_non_serializable, hash_string

from evaluators.isolation import isolated_generators
from evaluators.lm_eval._compat import filters_of, has_several_answers
from evaluators.lm_eval.options import LmEvalOptions
from evaluators.lm_eval.tasks import reason
from merge_search.errors import StudyFileError, nearest
from merge_search.evaluation import MetricInfo, Split, SplitShares, question_order, split_of, window

__all__ = ["Question", "TaskMetric", "TaskQuestions", "build_requests", "main_first"]

VOLATILE = (
    "metadata",
    "dataset_kwargs",
    "dataset_path",
    "dataset_name",
    "task_alias",
    "tag",
    "group",
    "custom_dataset",
)
"""Keys of a task's configuration that the hashes of its documents already cover, or that change nothing."""


@dataclass
class Question:
    """One document.

    `split` follows from the hash, except that documents asking the same question are kept in one split.

    Attributes:
        id: The hash of the document.
        doc_id: The number of the document in the task.
        doc: The document.
        split: The split that it belongs to.
        instances: lm-eval's requests, by index.
    """

    id: str
    doc_id: int
    doc: Any
    split: Split
    instances: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class TaskMetric:
    """A metric under a filter.

    Attributes:
        name: lm-eval's name of the metric.
        filter: The name of the filter.
        label: The metric's name within the task: ``name`` under the first filter, ``name,filter`` under others.
        higher_is_better: Its direction.
    """

    name: str
    filter: str
    label: str
    higher_is_better: bool


@dataclass
class TaskQuestions:
    """A task with its documents.

    Attributes:
        name: The task's name.
        task: lm-eval's task.
        questions: In the order of questions.
        metrics: The main one first.
        digest: A hash of everything that decides what is asked and how answers are judged.
    """

    name: str
    task: Any
    questions: list[Question]
    metrics: list[TaskMetric]
    digest: str

    @classmethod
    def load(cls, name: str, task: Any, options: LmEvalOptions, shares: SplitShares, seed: int) -> TaskQuestions:
        """Split the documents, render the prompts if that needs no chat template, and find the metrics.

        Args:
            name: The task's name.
            task: lm-eval's task.
            options: The evaluator's options.
            shares: Shares of the splits.
            seed: Draws the shots.

        Raises:
            StudyFileError: Too few questions in a split, no such metric, or prompts that cannot be rendered.
        """
        try:
            questions = _questions(task, shares, options.limit)
            metrics = _metrics(task, questions[0].doc) if questions else []
            if not options.apply_chat_template:
                build_requests(task, questions, options, seed)
            rendered = [_rendered(task, q) for q in questions]
        except Exception as error:  # templates, Python code and data of somebody else
            raise StudyFileError(f"task {name!r}: its questions cannot be made: {reason(error)}") from error
        problems = _too_few(name, questions, shares)
        if not metrics and questions:
            problems.append(f"task {name!r} reports no metric")
        try:
            metrics = main_first(name, metrics, options.metrics.get(name))
        except StudyFileError as error:
            problems += error.problems
        if problems:
            raise StudyFileError(problems)
        shown = {"config": _configuration(task), "questions": rendered, "metrics": [m.label for m in metrics]}
        moved = {q.id: str(q.split) for q in questions if q.split is not split_of(q.id, shares)}
        shown |= {"moved": moved} if moved else {}
        text = json.dumps(shown, sort_keys=True, default=_source)
        return cls(name, task, questions, metrics, hashlib.sha256(text.encode()).hexdigest())

    def select(self, split: Split, fidelity: float, after: float = 0.0) -> list[Question]:
        """The `window` of a split's questions, in their order."""
        all_of_them = [q for q in self.questions if q.split is split]
        return all_of_them[window(len(all_of_them), fidelity, after)]

    def infos(self) -> list[MetricInfo]:
        """The task's metrics, for the objective."""
        counts = Counter(q.split for q in self.questions)
        chance = self._chance()
        return [
            MetricInfo(
                task=self.name,
                metric=m.label,
                higher_is_better=m.higher_is_better,
                n_questions={s: counts[s] for s in Split if counts[s]},
                chance=chance if m.name in ("acc", "acc_norm", "acc_bytes") else None,
            )
            for m in self.metrics
        ]

    def _chance(self) -> float | None:
        """Accuracy of a uniform guess; None unless the task is multiple choice with one right answer."""
        if self.task.OUTPUT_TYPE != "multiple_choice" or has_several_answers(self.task):
            return None
        return math.fsum(1 / len(self.task.doc_to_choice(q.doc)) for q in self.questions) / len(self.questions)


def build_requests(task: Any, questions: Sequence[Question], options: LmEvalOptions, seed: int, lm: Any = None) -> None:
    """Render every prompt and store lm-eval's requests in their questions.

    All documents are rendered, including those beyond `limit`. Shots come from one running generator in the order of
    the documents, and a question must not change with the number of other questions.

    Args:
        task: lm-eval's task.
        questions: The task's questions.
        options: The evaluator's options.
        seed: Draws the shots.
        lm: lm-eval's model. It is needed for a chat template.
    """
    task.set_fewshot_seed(seed)
    chat = options.apply_chat_template
    task.build_all_requests(
        system_instruction=options.system_instruction,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
        chat_template=lm.apply_chat_template if chat else None,
        tokenizer_name=lm.tokenizer_name if chat else "",
    )
    by_document = defaultdict(list)
    for instance in task.instances:
        by_document[instance.doc_id].append(instance)
    for q in questions:
        q.instances = sorted(by_document[q.doc_id], key=lambda i: i.idx)


def _questions(task: Any, shares: SplitShares, limit: int | None) -> list[Question]:
    rows = []
    for doc_id, doc in task.doc_iterator():
        text = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
        digest = hash_string(text)
        rows.append(Question(digest, doc_id, doc, split_of(digest, shares)))
    with isolated_generators(0):
        for same in _asking_the_same(task, rows):
            split = split_of(min(q.id for q in same), shares)
            for q in same:
                q.split = split
    rows.sort(key=lambda q: (question_order(q.id), q.doc_id))
    return rows[:limit]


def _asking_the_same(task: Any, rows: Sequence[Question]) -> Iterator[list[Question]]:
    """Groups of two or more documents with the same prompt (without shots) and, in any order, the same choices."""
    by_prompt = defaultdict(list)
    for q in rows:
        by_prompt[_prompt(task, q.doc)].append(q)
    for shared in by_prompt.values():
        by_choices = defaultdict(list)
        for q in shared if len(shared) > 1 else ():
            is_choice = task.OUTPUT_TYPE == "multiple_choice"
            by_choices[tuple(sorted(map(str, task.doc_to_choice(q.doc)))) if is_choice else ()].append(q)
        yield from (same for same in by_choices.values() if len(same) > 1)


def _prompt(task: Any, doc: Any) -> str:
    """The prompt without shots.

    For a text that is scored as a whole it is the text. Where the prompts are the choices, it is the target.
    """
    prompt = None if task.OUTPUT_TYPE == "loglikelihood_rolling" else task.doc_to_text(doc)
    return str(task.doc_to_target(doc) if prompt is None or isinstance(prompt, int) else prompt)


def _metrics(task: Any, doc: Any) -> list[TaskMetric]:
    """The metrics that the task really reports. Its list may name metrics that its kind of task never gives."""
    declared = [m for m in task.aggregation() if m != "bypass"]
    try:
        given = task.process_results(copy.deepcopy(doc), _sham_results(task, doc))
        names = [m for m in declared if m in given] + [
            m for m in given if m not in declared and m in task.aggregation()
        ]
    except Exception:  # a task's own function that cannot judge a made-up answer: its declaration is used
        names = declared
    filters = [f.name for f in filters_of(task)]
    directions = task.higher_is_better()
    return [
        TaskMetric(m, f, m if f == filters[0] else f"{m},{f}", bool(directions.get(m, True)))
        for f in filters
        for m in names
    ]


def _sham_results(task: Any, doc: Any) -> list[Any]:
    """Made-up answers of the form that the task's output type has."""
    match task.OUTPUT_TYPE:
        case "multiple_choice":
            n_choices = len(task.doc_to_choice(doc)) * (2 if "acc_mutual_info" in task.aggregation() else 1)
            return [(-1.0 - i, False) for i in range(n_choices)]
        case "loglikelihood":
            return [(-1.0, False)]
        case "loglikelihood_rolling":
            return [-1.0]
        case _:
            return [""]


def main_first(name: str, metrics: list[TaskMetric], wanted: str | None) -> list[TaskMetric]:
    """The metrics with the wanted one first. Raises `StudyFileError` if the task or group does not report it."""
    if wanted is None:
        return metrics
    wanted = wanted.replace(" ", "")
    main = [m for m in metrics if wanted in (m.label, f"{m.name},{m.filter}")]
    if not main:
        hint = nearest(wanted, {m.label for m in metrics})
        raise StudyFileError(f"metrics.{name}: the task reports no metric {wanted!r}{hint}")
    return main + [m for m in metrics if m is not main[0]]


def _too_few(name: str, questions: Sequence[Question], shares: SplitShares) -> list[str]:
    """One sentence per split with fewer than two questions."""
    counts = Counter(q.split for q in questions)
    size = {
        Split.FIT: shares.fit,
        Split.SEARCH: shares.search - shares.fit,
        Split.VALIDATION: shares.validation,
        Split.TEST: shares.test,
    }
    return [
        f"task {name!r}: the {split} split needs at least 2 questions, got {counts[split]} of {len(questions)} "
        f"(share {share:.2g}); about {math.ceil(8 / share)} questions would do: "
        "raise limit or the share, or take a larger task"
        for split, share in size.items()
        if share > 1e-9 and counts[split] < 2
    ]


def _rendered(task: Any, question: Question) -> list[Any]:
    requests = [str(i.args) for i in question.instances]
    return [question.id, hash_string("\x1f".join(requests)), str(task.doc_to_target(question.doc))]


def _configuration(task: Any) -> Mapping[str, Any]:
    return {k: v for k, v in task.config.to_dict(keep_callable=True).items() if k not in VOLATILE}


def _source(value: Any) -> str:
    """The source of a function, and the type of any other object. The text never has an address in memory."""
    if callable(value):
        try:
            return inspect.getsource(value)
        except (TypeError, OSError):
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return type(value).__qualname__
