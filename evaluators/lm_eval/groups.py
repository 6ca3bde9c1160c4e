"""A group of tasks as one metric, by lm-eval's own aggregation.

With y_q the value of question q and n_k the number of questions of member k of K, N = sum_k n_k,

    weight_by_size: true     score = (1 / N) sum_q y_q                  the mean over the pooled questions
    weight_by_size: false    score = (1 / K) sum_k mean_k               the mean of the members' means

A group's question has the value y_q, or y_q N / (K n_k) where members weigh the same. In both cases the score is the
mean of the values, so comparisons stay paired.

Every fidelity asks its share of each member. The pooled questions stand in the order in which growing fidelities reach
them, so the questions of a smaller fidelity are the first of a larger one.

lm-eval aggregates the groups that say so in their file. Of tags and of other groups, every metric that all members
report as a mean is averaged over the pooled questions. Where there is none, the members count one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api import metrics as lm_eval_metrics

from evaluators.lm_eval.questions import TaskMetric, TaskQuestions, main_first
from evaluators.lm_eval.tasks import Loaded
from merge_search.evaluation import MetricInfo, Scores, Split

__all__ = ["Group", "GroupMetric", "groups_of", "score_group"]


@dataclass(frozen=True)
class GroupMetric:
    """A metric of a group.

    Attributes:
        metric: Its name, its filter and its direction.
        weight_by_size: Whether a member counts by the number of its questions.
        parts: (task, label of the metric in that task) of the members that report it.
    """

    metric: TaskMetric
    weight_by_size: bool
    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Group:
    """A group or tag that counts as one task.

    Attributes:
        name: Its name.
        metrics: The main one first.
        members: The tasks and groups directly in it, or in one that cannot count. They do not count themselves.
        tasks: The tasks in it, through all levels.
    """

    name: str
    metrics: tuple[GroupMetric, ...]
    members: tuple[str, ...]
    tasks: tuple[str, ...]

    def digest(self) -> list[Any]:
        """What decides the group's scores, as JSON."""
        return [self.name, [[m.metric.label, m.weight_by_size, m.parts] for m in self.metrics]]

    def infos(self, infos: Mapping[str, MetricInfo], member_of: str) -> Iterator[MetricInfo]:
        """The group's metrics, for the objective.

        Args:
            infos: Metrics of the tasks by name (``task/metric``).
            member_of: The group that counts instead of this one; '' if this one counts.
        """
        for m in self.metrics:
            parts = [infos[f"{task}/{label}"] for task, label in m.parts]
            counts = {s: sum(p.n_questions.get(s, 0) for p in parts) for s in Split}
            yield MetricInfo(
                task=self.name,
                metric=m.metric.label,
                higher_is_better=m.metric.higher_is_better,
                n_questions={s: n for s, n in counts.items() if n},
                chance=_chance(parts, m.weight_by_size),
                member_of=member_of,
            )


def groups_of(
    named: Sequence[Loaded], tasks: Mapping[str, TaskQuestions], main: Mapping[str, str]
) -> tuple[list[Group], list[str]]:
    """The groups that count as one task, each before the groups in it, and those that cannot.

    Args:
        named: The groups and tags of the option ``tasks``.
        tasks: All tasks by name.
        main: The wanted main metric by the name of the group.

    Returns:
        The groups, and the names of those whose members count one by one.

    Raises:
        StudyFileError: A group does not report its wanted main metric.
    """
    out: dict[str, Group] = {}
    apart: list[str] = []

    def add(node: Loaded) -> list[str]:
        """Names of what stands for the group above: the group, or where it cannot count, what is in it."""
        members = [tasks[name] for name in dict.fromkeys(node.tasks)]
        found = _common(members) if node.aggregates is None else list(_aggregated(node.aggregates, members))
        if found:
            out.setdefault(node.name, Group(node.name, (), (), ()))  # before the groups in it
        else:
            apart.append(node.name)
        children = [name for c in node.children for name in ([c] if isinstance(c, str) else add(c))]
        if not found:
            return children
        by_metric = {m.metric: m for m in found}
        ordered = main_first(node.name, list(by_metric), main.get(node.name))
        metrics = tuple(by_metric[m] for m in ordered)
        out[node.name] = Group(node.name, metrics, tuple(children), tuple(t.name for t in members))
        return [node.name]

    for node in named:
        add(node)
    return list(out.values()), apart


def _aggregated(aggregates: Sequence[Any], members: Sequence[TaskQuestions]) -> Iterator[GroupMetric]:
    """The metrics that lm-eval itself reports for the group."""
    for entry in aggregates:
        found = [(t.name, m) for t in members for m in t.metrics if m.name == entry.metric]
        filters = sorted({m.filter for _, m in found}) if entry.filter_list is None else entry.filter_list
        for name in filters:
            parts = [(task, m) for task, m in found if m.filter == name]
            if len({m.higher_is_better for _, m in parts}) == 1:
                yield GroupMetric(parts[0][1], entry.weight_by_size, tuple((task, m.label) for task, m in parts))


def _common(members: Sequence[TaskQuestions]) -> list[GroupMetric]:
    """The metrics that all members report as means over their questions, in the order of the first member."""
    return [
        GroupMetric(metric, True, tuple((t.name, metric.label) for t in members))
        for metric in members[0].metrics
        if all(metric in t.metrics and t.task.aggregation()[metric.name] is lm_eval_metrics.mean for t in members)
    ]


def _chance(parts: Sequence[MetricInfo], weight_by_size: bool) -> float | None:
    chances = [p.chance for p in parts if p.chance is not None]
    if len(chances) < len(parts):
        return None
    sizes = [sum(p.n_questions.values()) if weight_by_size else 1 for p in parts]
    return float(np.average(chances, weights=sizes))


def score_group(
    group: Group,
    scores: Mapping[str, Scores],
    first: Mapping[str, int],
    n_questions: Mapping[str, int],
) -> dict[str, Scores]:
    """Scores of a group by metric name.

    Args:
        group: The group.
        scores: Scores of its tasks by metric name.
        first: The place of each task's first scored question among the task's questions of the split.
        n_questions: Number of each task's questions in the split.
    """
    return {f"{group.name}/{m.metric.label}": _pooled(m, scores, first, n_questions) for m in group.metrics}


def _pooled(
    metric: GroupMetric, scores: Mapping[str, Scores], first: Mapping[str, int], n_questions: Mapping[str, int]
) -> Scores:
    parts = [scores[f"{task}/{label}"] for task, label in metric.parts]
    sizes = [len(p.values) for p in parts]
    n = [n_questions[task] for task, _ in metric.parts]
    weights = [1.0 if metric.weight_by_size else sum(n) / (len(n) * n_k) for n_k in n]
    rows = []
    for k, ((task, _), part) in enumerate(zip(metric.parts, parts, strict=True)):
        places = range(first[task], first[task] + len(part.values))
        # NOTE: `window` asks the first two questions of a task at every fidelity.
        rows += [(i / n[k] if i >= 2 else 0.0, k, j) for j, i in enumerate(places)]
    rows.sort()
    return Scores(
        ids=tuple(f"{metric.parts[k][0]}:{parts[k].ids[j]}" for _, k, j in rows),
        values=np.array([parts[k].values[j] * weights[k] for _, k, j in rows], dtype=np.float64),
        score=float(lm_eval_metrics.aggregate_subtask_metrics([p.score for p in parts], sizes, metric.weight_by_size)),
        stderr=_standard_error([p.stderr for p in parts], sizes, metric.weight_by_size),
    )


def _standard_error(stderrs: list[float], sizes: list[int], weight_by_size: bool) -> float:
    """lm-eval's standard error of an aggregate; NaN where a member has none."""
    if not all(map(math.isfinite, stderrs)) or sum(sizes) == len(sizes):
        return math.nan
    if weight_by_size:
        return float(lm_eval_metrics.pooled_sample_stderr(stderrs, sizes))
    return float(lm_eval_metrics.unweighted_mean_stderr(stderrs))
