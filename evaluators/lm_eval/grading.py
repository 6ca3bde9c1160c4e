"""Judge single texts as answers to a task that generates, with the task's own filters and `process_results`.

A learner may learn the text that a task calls its target only if the task's metric scores this text right. For many
tasks it is something else: ``0`` where answers are checked by instructions, and the unit tests where they are code.
"""

from __future__ import annotations

import numbers
import statistics
from collections.abc import Sequence
from typing import Any

from lm_eval.utils import apply_template

from evaluators.isolation import isolated_generators
from evaluators.lm_eval._compat import filters_of
from evaluators.lm_eval.questions import TaskMetric
from evaluators.lm_eval.scores import AGREEMENT
from evaluators.lm_eval.tasks import quiet_lm_eval, reason

__all__ = ["gold_text", "is_right", "is_short", "problem_of_gold"]

SHORT = 100
"""Most characters of a short text, as the median over rows. Longer ones are usually worked answers in the words of
somebody else, whose tokens say more about the wording than about the task."""


def gold_text(task: Any, doc: Any, target: str | None = None) -> str:
    """The text to learn of a document of a task that generates; the first if there are several.

    Args:
        task: lm-eval's task.
        doc: The document.
        target: The name of a field of the document, or a template over its fields. None: the task's own target.

    Raises:
        KeyError: `target` names no field and is no template.
    """
    if target is not None:
        if target in doc:
            return str(doc[target])
        if "{" not in target:
            raise KeyError(f"target {target!r} is no field of the document, which has {', '.join(doc)}")
        return str(apply_template(target, doc))
    gold = task.doc_to_target(doc)
    gold = gold[0] if isinstance(gold, list) else gold
    if isinstance(gold, int) and task.config.doc_to_choice is not None:
        gold = task.doc_to_choice(doc)[gold]
    return str(gold)


def is_right(task: Any, metric: TaskMetric, doc: Any, text: str) -> bool | None:
    """Whether the metric gives full marks to `text` as the generated answer; None if it has no full marks.

    A number of at least 1 is full marks, and an answer that equals the right one where the metric compares answers (as
    f1). Metrics of which less is better and metrics of a whole set (as BLEU) have none.
    """
    made = task.construct_requests(
        doc=doc,
        ctx="",
        metadata=(task.config["task"], 0, task.config.repeats),
        apply_chat_template=False,
        chat_template=None,
    )
    request = made[0] if isinstance(made, list) else made
    until = request.args[1].get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    request.resps = [text] * max(1, task.config.repeats or 1)
    pipeline = next(p for p in filters_of(task) if p.name == metric.filter)
    pipeline.apply([request])
    item = task.process_results(doc, [request.filtered_resps[metric.filter]])[metric.name]
    if task.aggregation()[metric.name] in AGREEMENT:
        return bool(item[0] == item[1])
    if not metric.higher_is_better or not isinstance(item, numbers.Real | bool):
        return None
    return float(item) >= 1


def problem_of_gold(
    task: Any, metric: TaskMetric, docs: Sequence[Any], delimiters: Sequence[str], target: str | None = None
) -> str | None:
    """Why the task's gold text must not be learned, after the name of the task; None if the metric scores it right.

    Args:
        task: lm-eval's task.
        metric: The main metric.
        docs: A few documents.
        delimiters: What stands between the prompt and the text. The text is judged with and without, since a tokenizer
            may drop a space at the start.
        target: See `gold_text`.
    """
    wrong: list[str] = []
    try:
        with isolated_generators(0), quiet_lm_eval():
            for doc, delimiter in zip(docs, delimiters, strict=True):
                text = gold_text(task, doc, target)
                marks = [is_right(task, metric, doc, t) for t in dict.fromkeys((delimiter + text, text))]
                if False in marks and True not in marks:
                    wrong.append(text)
    except Exception as error:  # a task's own filters and functions
        return f"its gold text cannot be judged: {reason(error)}"
    if not wrong:
        return None
    shown = wrong[0] if len(wrong[0]) <= 60 else wrong[0][:57] + "..."
    return (
        f"its gold text is not a right answer: {metric.label} gives no full marks to {len(wrong)} of {len(docs)} "
        f"texts, like {shown!r}"
    )


def is_short(task: Any, docs: Sequence[Any], target: str | None = None) -> bool:
    """Whether the gold texts have at most `SHORT` characters in the median."""
    with isolated_generators(0), quiet_lm_eval():
        return statistics.median(len(gold_text(task, doc, target)) for doc in docs) <= SHORT
