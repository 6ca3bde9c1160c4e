"""From metrics to objectives and constraints. Directions are flipped here and nowhere else.

Names:
    TASK/METRIC          a metric as the evaluator reports it (or TASK alone: its main metric)
    retention/TASK       r_t = (s_t - base_t) / (expert_t - base_t), expert_t the best expert on that task
    mean_retention       mean of r_t over the tasks where an expert's lead over the base is real
    worst_retention      their minimum
    mean, worst          mean and minimum of the main metrics (each flipped so that larger is better)

Both means are sum_t w_t x_t / sum_t w_t, with the weights w_t of the study file, 1 by default. A task of weight 0 is no
part of the composites.

A lead is real if it is larger than `lead` standard errors of the paired difference between the best expert and the base
on the search questions. 1 / (expert_t - base_t) makes noise of a lead that is not: one lucky question of 90 would count
90-fold. The other tasks can be guarded: each must be no worse than the base by more than a margin.

Costs (`MetricInfo.is_cost`: drift, seconds) and members of a group (`MetricInfo.member_of`) can be named as objectives
and in constraints. They are no part of the composites: a group counts once.

Constraints are text: ``zoo_qtype >= 0.6``, ``zoo_qtype >= base - 0.01``, ``wiki/perplexity <= expert + 0.2``.

Noise: a score's variance is that of a mean of n per-question values. For 0/1 answers it is p(1 - p)/n, with p smoothed
to (k + 1/2)/(n + 1), so that 0 of n and n of n do not claim certainty. `References.pairing` is the share of the
variance that remains when candidates answer the same questions: the mean over pairs of var(y_i - y_j) / 2 relative to
the mean of var(y_i), averaged over metrics that are neither costs nor members of a group. The references' own noise
shifts all candidates alike and is left out.

    >>> from merge_search.evaluation import Split
    >>> maths = MetricInfo("maths", "acc", True, {Split.SEARCH: 100})
    >>> objective = Objective(["mean_retention"], [], ["maths >= base + 0.1"], [maths])
    >>> references = References({"maths/acc": 0.4}, {"maths/acc": 0.8}, {"maths/acc": "expert"}, pairing=1.0)
    >>> right = np.repeat([1.0, 0.0], [60, 40])
    >>> merge = Evaluation(Split.SEARCH, 1.0, {"maths/acc": Scores((), right, 0.6, 0.05)})
    >>> [round(estimate.value, 3) for estimate in objective.values(merge, references)]
    [0.5]
    >>> {text: round(excess.value, 3) for text, excess in objective.violations(merge, references).items()}
    {'maths >= base + 0.1': -0.1}
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from scipy import stats

from merge_search.errors import StudyFileError, nearest
from merge_search.evaluation import Evaluation, MetricInfo, Scores

__all__ = ["Constraint", "Estimate", "Objective", "References", "paired_difference", "paired_interval"]


class Valued(Protocol):
    """A result with one value per objective."""

    @property
    def values(self) -> Sequence[float]: ...


T = TypeVar("T", bound=Valued)

RETENTIONS = ("retention/", "mean_retention", "worst_retention")
COMPOSITES = ("mean_retention", "worst_retention", "mean", "worst")
_CONSTRAINT = re.compile(
    r"^\s*(?P<name>\S+)\s*(?P<sign>>=|<=)\s*(?:(?P<anchor>base|expert)\s*(?:(?P<op>[+-])\s*(?P<off>[0-9.eE+-]+))?|(?P<value>[-+0-9.eE]+))\s*$"
)


@dataclass(frozen=True)
class Estimate:
    """A number with the variance of its measurement."""

    value: float
    variance: float

    @property
    def stderr(self) -> float:
        return math.sqrt(self.variance)


@dataclass(frozen=True)
class Constraint:
    """A bound on a metric: ``name sign (value | base +- offset | expert +- offset)``.

    >>> Constraint.parse("maths >= base - 0.01")
    Constraint(text='maths >= base - 0.01', name='maths', sign='>=', anchor='base', offset=-0.01)
    """

    text: str
    name: str
    sign: str
    anchor: str | None
    offset: float

    @classmethod
    def parse(cls, text: str) -> Constraint:
        match = _CONSTRAINT.match(text)
        try:
            if match is None:
                raise ValueError
            if match["anchor"]:
                offset = float(match["off"] or 0) * (-1 if match["op"] == "-" else 1)
            else:
                offset = float(match["value"])
        except ValueError:
            raise StudyFileError(
                f"constraint {text!r} must read like 'TASK >= 0.6', 'TASK >= base - 0.01' or "
                "'TASK/METRIC <= expert + 0.2'"
            ) from None
        return cls(text, match["name"], match["sign"], match["anchor"], offset)


@dataclass(frozen=True)
class References:
    """Scores of base and experts on the search split at full fidelity.

    Attributes:
        base: The base's score by metric name.
        expert: The best expert's score by metric name. Best is meant in the metric's own direction.
        best_expert: The name of that expert by metric name.
        pairing: The share of the variance that remains between candidates on the same questions, in (0, 1].
        lead: The best expert's lead over the base in standard errors of the paired difference, by metric name. A metric
            without an entry has a real lead if its expert is better.
    """

    base: Mapping[str, float]
    expert: Mapping[str, float]
    best_expert: Mapping[str, str]
    pairing: float
    lead: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_evaluations(
        cls, metrics: Sequence[MetricInfo], base: Evaluation, experts: Mapping[str, Evaluation]
    ) -> References:
        """Collect the scores of the base and of every expert.

        Args:
            metrics: What the evaluators report.
            base: The base's evaluation.
            experts: Each expert's evaluation, on the same questions.
        """
        expert, names, leads = {}, {}, {}
        for m in metrics:
            sign = 1 if m.higher_is_better else -1
            names[m.name] = max(experts, key=lambda e: sign * experts[e].scores[m.name].score)
            best = experts[names[m.name]].scores[m.name]
            expert[m.name] = best.score
            leads[m.name] = sign * _in_standard_errors(best, base.scores[m.name]) + 0.0  # never -0.0
        base_scores = {m.name: base.scores[m.name].score for m in metrics}
        counted = [m.name for m in metrics if not (m.member_of or m.is_cost)]
        return cls(base_scores, expert, names, _pairing([base, *experts.values()], counted), leads)


def _in_standard_errors(a: Scores, b: Scores) -> float:
    """(a - b) / se. For means, se is that of the paired difference, else that of two independent scores.

    Infinite if all questions differ alike; a difference whose standard error is not known counts as infinite, too.
    """
    gap = a.score - b.score
    d = a.values - b.values
    if a.is_mean and b.is_mean:
        se = math.sqrt(float(d.var(ddof=1)) / len(d)) if len(d) > 1 else math.nan
    else:
        se = math.hypot(a.stderr, b.stderr)
    return gap / se if se > 0 else math.copysign(math.inf, gap) if gap else 0.0


def _pairing(evaluations: Sequence[Evaluation], names: Sequence[str] | None = None) -> float:
    """Mean over metrics of the share of the variance that pairing leaves. Each metric counts on its own scale."""
    left = []
    for name in evaluations[0].scores if names is None else names:
        rows = [e.scores[name].values for e in evaluations]
        alone = float(np.mean([r.var() for r in rows]))
        between = [(a - b).var() / 2 for a, b in itertools.combinations(rows, 2)]
        if between and alone > 0:
            left.append(float(np.mean(between)) / alone)
    return float(np.clip(np.mean(left), 0.1, 1.0)) if left else 1.0


def variance_of(scores: Scores) -> float:
    """Variance of a mean of per-question values; see the module's docstring."""
    n = len(scores.values)
    is_count = n == 1 and scores.stderr == 0  # of the whole model, without noise
    if scores.is_corrected or scores.is_linearised or is_count:
        return scores.stderr**2
    if np.isin(scores.values, (0.0, 1.0)).all():
        p = (scores.values.sum() + 0.5) / (n + 1)
        return float(p * (1 - p) / n)
    if math.isfinite(scores.stderr) and scores.stderr > 0:
        return scores.stderr**2
    return float(scores.values.var(ddof=1) / n) if n > 1 else 1.0


class Objective:
    """What is maximised or minimised, and which constraints must hold.

    Args:
        maximise: Names of quantities to maximise.
        minimise: Names of quantities to minimise. Together with `maximise` at least one.
        constraints: Texts; see the module's docstring.
        metrics: What the evaluators report.
        task_weights: Weights of tasks in both means; 1 for tasks that are not named.
        lead: Standard errors by which an expert must beat the base for a task to count in retention.
        guard: Largest loss against the base that a task without a real lead may have; None: any.

    Raises:
        StudyFileError: Every unknown name, malformed constraint and impossible weight, all at once.
    """

    def __init__(
        self,
        maximise: Sequence[str],
        minimise: Sequence[str],
        constraints: Sequence[str],
        metrics: Sequence[MetricInfo],
        *,
        task_weights: Mapping[str, float] | None = None,
        lead: float = 0.0,
        guard: float | None = None,
    ) -> None:
        self.task_weights, self.lead, self.guard = dict(task_weights or {}), lead, guard
        self.metrics = {m.name: m for m in metrics}
        self.main: dict[str, MetricInfo] = {}
        for m in metrics:
            self.main.setdefault(m.task, m)
        self.skills = {task: m for task, m in self.main.items() if not (m.is_cost or m.member_of)}
        problems: list[str] = []
        self.constraints: list[Constraint] = []
        for text in constraints:
            try:
                self.constraints.append(Constraint.parse(text))
            except StudyFileError as error:
                problems += error.problems
        problems += self._problems(maximise, minimise) + self._weight_problems()
        if problems:
            raise StudyFileError(problems)
        self.names = [*maximise, *minimise]
        up: Literal["maximize", "minimize"] = "maximize"
        down: Literal["maximize", "minimize"] = "minimize"
        self.directions = [up] * len(maximise) + [down] * len(minimise)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], metrics: Sequence[MetricInfo]) -> Objective:
        """The objective of a study.

        Args:
            settings: `ObjectiveSection.settings`, as a study's identity stores it.
            metrics: What the evaluators report.

        Raises:
            StudyFileError: As the constructor.
        """
        return cls(
            settings["maximise"],
            settings["minimise"],
            settings["constraints"],
            metrics,
            task_weights=settings.get("weights"),
            lead=settings.get("lead", 0.0),
            guard=settings.get("guard"),
        )

    def _problems(self, maximise: Sequence[str], minimise: Sequence[str]) -> list[str]:
        """One sentence per wrong name of an objective or a constraint."""
        retentions = (f"retention/{task}" for task, m in self.main.items() if not m.is_cost)
        known = [*COMPOSITES, *self.metrics, *self.main, *retentions]
        goals = [*maximise, *minimise]
        named = [*goals, *(c.name for c in self.constraints)]
        problems = [f"objective: no metric is called {n!r}{nearest(n, known)}" for n in named if n not in known]
        for c in self.constraints:
            if c.anchor and c.name not in self.metrics and c.name not in self.main:
                problems.append(
                    f"constraint {c.text!r}: {c.anchor!r} can stand only beside a task or metric, not beside {c.name!r}"
                )
        problems += [
            f"objective: {name!r} stands twice under maximise and minimise; name it once"
            for name, n in Counter(goals).items()
            if n > 1
        ]
        problems += [
            f"objective: {name!r} is larger for better models; put it under maximise"
            for name in minimise
            if name.startswith((*RETENTIONS, *COMPOSITES)) and name in known and name not in {*self.metrics, *self.main}
        ]
        if not self.skills and any(name in COMPOSITES for name in named):
            problems.append("objective: means and retention need an evaluator with tasks; found only costs")
        if not goals:
            problems.append(
                "objective: name at least one metric under maximise or minimise, for example 'maximise: mean_retention'"
            )
        return problems

    def _weight_problems(self) -> list[str]:
        """One sentence per weight that cannot be one."""
        problems = []
        for task, weight in self.task_weights.items():
            if task in self.main and self.main[task].member_of:
                group = self.main[task].member_of
                problems.append(f"objective.weights: {task!r} counts as a part of {group!r}; give the weight to that")
            elif task not in self.skills:
                problems.append(f"objective.weights: no task is called {task!r}{nearest(task, self.skills)}")
            elif not (math.isfinite(weight) and weight >= 0):
                problems.append(f"objective.weights: {task!r} needs a number of at least 0, found {weight!r}")
        if not problems and self.skills and not self._weighted():
            problems.append("objective.weights: at least one task needs a weight above 0")
        return problems

    def weight(self, m: MetricInfo) -> float:
        """The weight of a task, by its main metric, in the means."""
        return self.task_weights.get(m.task, 1.0)

    def _weighted(self) -> list[MetricInfo]:
        """The main metrics of the tasks that are part of `mean` and `worst`."""
        return [m for m in self.skills.values() if self.weight(m) > 0]

    @property
    def notes(self) -> list[str]:
        """What is searched for against a metric's own direction: rarely meant, but it may be (a task to unlearn)."""
        out = []
        for name, direction in zip(self.names, self.directions, strict=True):
            m = self.metrics.get(name) or self.main.get(name)
            if m is not None and m.higher_is_better != (direction == "maximize"):
                better, other = ("higher", "maximise") if m.higher_is_better else ("lower", "minimise")
                out.append(
                    f"objective: the worst {name!r} is searched for, as {better} is better by its evaluator; "
                    "if that is not meant, "
                    f"put it under {other}"
                )
        return out

    def weight_notes(self, references: References | None = None) -> list[str]:
        """A sentence per mean that the study names: what share of it each task has.

        Args:
            references: Scores of base and experts; None: they are not known yet, so neither are the leads.
        """
        named = {*self.names, *(c.name for c in self.constraints)}
        out = []
        if "mean" in named:
            out.append(f"objective: mean is made of {self._shares(self._weighted())}")
        if not named & {"mean_retention", "worst_retention"}:
            return out
        name = "mean_retention" if "mean_retention" in named else "worst_retention"
        if references is None:
            tasks = self._weighted()
            later = f"; tasks where no expert leads the base by {self.lead:g} standard errors are left out of it"
            return [*out, f"objective: {name} is made of {self._shares(tasks)}{later if self.lead else ''}"]
        weightless = [m for m in self.skills.values() if not self.weight(m)]
        without = [m for m in self.without_lead(references) if m not in weightless]
        text = f"objective: {name} is made of {self._shares(self._tasks(references))}"
        if without:
            leads = (f"{m.task}{self._lead_in_words(m, references)}" for m in without)
            guarded = "" if self.guard is None else f", guarded to {self.guard:g} below the base at most"
            text += f"; no lead of an expert: {', '.join(leads)}{guarded}"
        return [*out, text]

    def _shares(self, tasks: Sequence[MetricInfo]) -> str:
        total = math.fsum(map(self.weight, tasks))
        members = Counter(m.member_of for m in self.main.values())
        of = {m.task: f" (a group of {members[m.task]})" if members[m.task] else "" for m in tasks}
        return ", ".join(f"{m.task} {self.weight(m) / total:.3g}{of[m.task]}" for m in tasks)

    def check_references(self, references: References) -> None:
        """Raises `StudyFileError` when a retention has no meaning: no expert beats the base there."""
        if meaningless := self.meaningless(references):
            rows = ", ".join(
                f"{m.name}: base {references.base[m.name]:.4g}, best expert {references.expert[m.name]:.4g}"
                f"{self._lead_in_words(m, references)}"
                for m in self.skills.values()
            )
            surely = f" by more than {self.lead:g} standard errors (objective.lead)" if self.lead else ""
            raise StudyFileError(
                f"objective: {', '.join(meaningless)} needs a task on which an expert beats the base{surely}; found "
                f"{rows}. Maximise 'mean' instead, or {'ask more questions' if self.lead else 'check the experts'}"
            )

    def meaningless(self, references: References) -> list[str]:
        """Names of retentions that are not defined because no expert beats the base."""
        tasks = [task for task, m in self.main.items() if not m.is_cost and self.gap(m, references) > 0]
        defined = {f"retention/{task}" for task in tasks} | (set(COMPOSITES) if self._tasks(references) else set())
        named = [*self.names, *(c.name for c in self.constraints)]
        return [n for n in dict.fromkeys(named) if n.startswith(RETENTIONS) and n not in defined]

    def _tasks(self, references: References) -> list[MetricInfo]:
        """The main metrics of the tasks that are part of `mean_retention` and `worst_retention`."""
        leading = (m for m in self._weighted() if self.gap(m, references) > 0)
        return [m for m in leading if references.lead.get(m.name, math.inf) > self.lead]

    def without_lead(self, references: References) -> list[MetricInfo]:
        """The main metrics of the tasks on which no expert's lead over the base is real."""
        return [m for m in self.skills.values() if references.lead.get(m.name, math.inf) <= self.lead]

    def _lead_in_words(self, m: MetricInfo, references: References) -> str:
        lead = references.lead.get(m.name, math.inf)
        return f" ({lead:+.2g} standard errors)" if self.lead and math.isfinite(lead) else ""

    def constraints_on(self, references: References) -> list[Constraint]:
        """The constraints of the study file, then the guards of the tasks without a real lead."""
        if self.guard is None:
            return self.constraints
        texts = [
            f"{m.task} {'>= base -' if m.higher_is_better else '<= base +'} {self.guard:g}"
            for m in self.without_lead(references)
        ]
        written = {c.text for c in self.constraints}
        return [*self.constraints, *(Constraint.parse(text) for text in texts if text not in written)]

    @staticmethod
    def gap(m: MetricInfo, references: References) -> float:
        """The amount by which the best expert beats the base. Negative if none does."""
        gap = references.expert[m.name] - references.base[m.name]
        return gap if m.higher_is_better else -gap

    def estimate(self, name: str, evaluation: Evaluation, references: References) -> Estimate:
        """Value and variance of one named quantity, in the user's direction."""
        if name in self.metrics or name in self.main:
            scores = evaluation.scores[name if name in self.metrics else self.main[name].name]
            pairing = 1.0 if scores.is_corrected else references.pairing
            return Estimate(scores.score, variance_of(scores) * pairing)
        if name.startswith("retention/"):
            return self._retention(self.main[name.removeprefix("retention/")], evaluation, references)
        if name in ("mean", "worst"):
            tasks = self._weighted()
            signed = [(m, self.estimate(m.name, evaluation, references)) for m in tasks]
            parts = [Estimate(e.value if m.higher_is_better else -e.value, e.variance) for m, e in signed]
        else:
            tasks = self._tasks(references)
            parts = [self._retention(m, evaluation, references) for m in tasks]
        if name.startswith("worst"):
            return min(parts, key=lambda e: e.value)
        weights = [self.weight(m) for m in tasks]
        total = math.fsum(weights)
        value = math.fsum(w * e.value for w, e in zip(weights, parts, strict=True)) / total
        return Estimate(value, math.fsum(w**2 * e.variance for w, e in zip(weights, parts, strict=True)) / total**2)

    def _retention(self, m: MetricInfo, evaluation: Evaluation, references: References) -> Estimate:
        e = self.estimate(m.name, evaluation, references)
        gap = references.expert[m.name] - references.base[m.name]
        if gap == 0:
            return Estimate(0.0, e.variance)
        return Estimate((e.value - references.base[m.name]) / gap, e.variance / gap**2)

    def values(self, evaluation: Evaluation, references: References) -> list[Estimate]:
        """One estimate per objective, in the order of `names`, in the user's direction."""
        return [self.estimate(n, evaluation, references) for n in self.names]

    def weights(self, references: References) -> dict[str, float] | None:
        """w_m with first objective = constant + sum_m w_m score_m, larger is better; None if it is not linear."""
        name = self.names[0]
        if name in self.metrics or name in self.main:
            metrics = {name if name in self.metrics else self.main[name].name: 1.0}
        elif name.startswith("retention/"):
            m = self.main[name.removeprefix("retention/")]
            metrics = {m.name: self._slope(m, references)}
        elif name == "mean":
            total = math.fsum(self.weight(m) for m in self._weighted())
            metrics = {m.name: self.weight(m) * (1 if m.higher_is_better else -1) / total for m in self._weighted()}
        elif name == "mean_retention":
            tasks = self._tasks(references)
            total = math.fsum(self.weight(m) for m in tasks)
            metrics = {m.name: self.weight(m) * self._slope(m, references) / total for m in tasks}
        else:
            return None
        sign = 1.0 if self.directions[0] == "maximize" else -1.0
        return {k: sign * v for k, v in metrics.items()}

    @staticmethod
    def _slope(m: MetricInfo, references: References) -> float:
        gap = references.expert[m.name] - references.base[m.name]
        return 1 / gap if gap else 0.0

    def violations(self, evaluation: Evaluation, references: References) -> dict[str, Estimate]:
        """Constraint text -> the amount by which it is violated. It holds if that is at most 0."""
        out = {}
        for c in self.constraints_on(references):
            e = self.estimate(c.name, evaluation, references)
            bound = self.anchor(c, references) + c.offset
            out[c.text] = Estimate(bound - e.value if c.sign == ">=" else e.value - bound, e.variance)
        return out

    def anchor(self, c: Constraint, references: References) -> float:
        """The number that a constraint's offset is added to: the base's or the best expert's score, or 0."""
        if c.anchor is None:
            return 0.0
        metric = c.name if c.name in self.metrics else self.main[c.name].name
        return (references.base if c.anchor == "base" else references.expert)[metric]

    def key(self, values: Sequence[float]) -> float:
        """The first objective, with the sign that makes larger better. Orders results of one objective."""
        return values[0] if self.directions[0] == "maximize" else -values[0]

    def keys(self, values: Sequence[float]) -> tuple[float, ...]:
        """All objectives, each with the sign that makes larger better."""
        return tuple(v if d == "maximize" else -v for v, d in zip(values, self.directions, strict=True))

    def dominates(self, a: Sequence[float], b: Sequence[float]) -> bool:
        """Whether objective values `a` are at least as good as `b` in every objective and better in one."""
        one, two = self.keys(a), self.keys(b)
        return all(x >= y for x, y in zip(one, two, strict=True)) and one != two

    def front(self, results: Sequence[T]) -> list[T]:
        """The results that no other one dominates, in their order."""
        return [r for r in results if not any(self.dominates(other.values, r.values) for other in results)]


def paired_difference(a: Evaluation, b: Evaluation, weights: Mapping[str, float]) -> tuple[float, float]:
    """The weighted difference of two evaluations on the same questions, and its standard error.

    The difference is sum_m w_m (a_m - b_m) over metrics m that are means of their questions.

    Args:
        a: The first evaluation.
        b: The second evaluation.
        weights: Metric -> weight, as `Objective.weights` returns them.
    """
    mean = variance = 0.0
    for name, weight in weights.items():
        d = a.scores[name].values - b.scores[name].values
        mean += weight * float(d.mean())
        variance += weight**2 * (float(d.var(ddof=1)) / len(d) if len(d) > 1 else math.nan)
    return mean, math.sqrt(variance)


def paired_interval(
    a: Evaluation, b: Evaluation, weights: Mapping[str, float], level: float = 0.95
) -> tuple[float, float, float]:
    """The weighted difference of two evaluations on the same questions, and an interval of it at this level.

    The interval is Student's, with the degrees of freedom of Welch and Satterthwaite over the metrics. Where all
    answers of a metric are 0 or 1, half a question is added to those that only `a` has right, and to those that only
    `b` has right. So equal answers still have an interval. With few questions it is wider than it must be. Graded
    answers whose differences are all equal count as known exactly. The weights count as known: where they are one over
    the lead of an expert, the noise of that lead is left out.

    Args:
        a: The first evaluation, with at least two questions per metric.
        b: The second evaluation.
        weights: Metric -> weight, as `Objective.weights` returns them.
        level: The share of intervals that should hold the true difference, in (0, 1).

    Returns:
        The difference, and the lower and upper end of its interval.
    """
    mean, _ = paired_difference(a, b, weights)
    variance = spread = 0.0
    for name, weight in weights.items():
        x, y = a.scores[name].values, b.scores[name].values
        d = x - y
        n = len(d)
        if np.isin([x, y], (0.0, 1.0)).all():
            up, down = (float(((sign * d) > 0).sum() + 0.5) / (n + 1) for sign in (1, -1))
            one = weight**2 * (up + down - (up - down) ** 2) / n
        else:
            one = weight**2 * float(d.var(ddof=1)) / n
        variance += one
        spread += one**2 / (n - 1)
    if variance == 0:
        return mean, mean, mean
    half = float(stats.t.ppf((1 + level) / 2, variance**2 / spread)) * math.sqrt(variance)
    return mean, mean - half, mean + half
