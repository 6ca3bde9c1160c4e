"""After the search: the best few by posterior mean meet the baselines on questions the search never saw.

The best of many noisy values is too good by several points (the winner's curse); the posterior mean of a model
that knows the noise is nearly honest. So the finalists are chosen by posterior mean and scored again on the
validation split beside the average and the best baseline. The winner meets the constraints there and is best by all
answers: with m, s^2 the posterior of the search and y, v the value and variance on validation,

    expected = ((m + shift) / s^2 + y / v) / (1 / s^2 + 1 / v),    shift = mean(y - m) over base, experts and baselines,

retention in y by base and experts on the search questions, as in m: few validation questions may see another gap between
them, or none, and weigh the tasks otherwise. The shift is how much easier the validation questions are. By validation alone, often the smaller part of the questions, a lucky merge
would win too often. A baseline outside the space has no posterior: its measured value and variance stand for m and s^2. That
is fair for base, experts and average, which are compared whatever they scored; the best preset is compared because of its
score, so outside the space, where its m is too good by luck, it has no say in the shift.

With several objectives there is no winner but a front: the merges that no other merge beats in everything. Finalists are
spread over the front of the search questions; what is handed over is the front of the validation questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna

from merge_search.errors import EvaluationError, NonFiniteError, first_line
from merge_search.evaluation import Evaluation
from merge_search.objective import Estimate, Objective, References
from merge_search.outcome import Outcome
from merge_search.recipe import Recipe
from merge_search.search.checks import nearest_miss
from merge_search.search.records import Record, records, references_of, stored_references
from merge_search.space import Parameter

if TYPE_CHECKING:
    from merge_search.search.prepare import Plan

__all__ = [
    "POSTERIOR_ATTRIBUTE",
    "Standing",
    "best",
    "best_expert",
    "candidates",
    "champions",
    "compared",
    "failures",
    "finalists",
    "front",
    "nothing_to_hand_over",
    "outdated_test",
    "paired_difference",
    "references_on",
    "standings",
    "store_failures",
    "tested",
    "to_validate",
    "validate",
    "winner",
]


POSTERIOR_ATTRIBUTE = "search_posterior"
"""Study attribute: trial -> [mean, sd] of the one objective by the search questions, for what has validation scores."""


def best(study: optuna.Study, objective: Objective) -> Record | None:
    """Feasible merge with the best observed first objective among those that were asked all questions."""
    full = [r for r in candidates(study) if r.outcome is Outcome.OK]
    return max(full, key=lambda r: objective.key(r.values), default=None)


def best_expert(study: optuna.Study, objective: Objective, experts: Sequence[str], known: References) -> float:
    """First objective of the expert that is best in it, on the search questions."""
    stored = stored_references(study)
    found = (Evaluation.from_attribute(stored[e]["evaluation"]) for e in experts)
    return max((objective.values(e, known)[0].value for e in found), key=lambda v: objective.key([v]))


def candidates(study: optuna.Study) -> list[Record]:
    """Feasible scored trials that are merges: not the base, not an expert."""
    references = stored_references(study)
    return [
        r
        for r in records(study)
        if r.is_scored and r.feasible and r.label not in references and "same_as" not in r.attributes
    ]


def finalists(
    study: optuna.Study, objective: Objective, parameters: Mapping[str, Parameter], *, seed: int, n: int
) -> list[Record]:
    """The `n` most promising searched candidates, the most promising first; baselines stand beside them anyway.

    One objective: by posterior mean over all trials. Several: evenly along the front, by the first objective.
    """
    merges = {r.number: r for r in candidates(study) if not r.label}
    if len(objective.names) > 1:
        return _spread(front([r for r in merges.values() if r.outcome is Outcome.OK], objective), n)
    return [merges[number] for number in _posterior(study, parameters, seed) if number in merges][:n]


def _posterior(study: optuna.Study, parameters: Mapping[str, Parameter], seed: int) -> dict[int, tuple[float, float]]:
    """Mean and standard deviation of the one objective by trial, the best mean first."""
    from merge_search.search.samplers.recommend import recommend

    return {r.number: (r.mean, r.sd) for r in recommend(study, parameters, seed=seed)}


def front(found: Sequence[Record], objective: Objective) -> list[Record]:
    """The records that no other one dominates, best in the first objective first."""
    return sorted(objective.front(found), key=lambda r: (-objective.key(r.values), r.number))


def _spread(ordered: list[Record], n: int) -> list[Record]:
    """`n` of them, evenly along the list: both ends first."""
    if len(ordered) <= n:
        return ordered
    rows = np.linspace(0, len(ordered) - 1, n).round().astype(int)
    return [ordered[i] for i in dict.fromkeys(rows.tolist())]


def to_validate(
    study: optuna.Study, objective: Objective, parameters: Mapping[str, Parameter], *, seed: int, n: int
) -> list[Record]:
    """Finalists, then base, experts, the average and the baseline with the best search score."""
    found = {r.number: r for r in finalists(study, objective, parameters, seed=seed, n=n)}
    labels = {"average", *stored_references(study)}
    top = _best_preset(study, objective)
    kept = [r for r in records(study) if r.is_scored and (r.label in labels or (top and r.number == top.number))]
    return list((found | {r.number: r for r in kept}).values())


def validate(
    study: optuna.Study, plan: Plan, score: Callable[[Recipe], Evaluation], *, note: Callable[[str], None]
) -> None:
    """Score what is `to_validate` on the validation split, each stored at once; then store what the search says of it."""
    scored: dict[str, Any] = dict(study.user_attrs.get("validation", {}))
    failed: dict[str, str] = {}
    parameters, seed = plan.space.parameters, plan.file.study.seed
    wanted = to_validate(study, plan.objective, parameters, seed=seed, n=plan.file.search.finalists)
    if all(r.label for r in wanted) and (text := nearest_miss(study)):
        note(text)
    for record in wanted:
        if str(record.number) in scored:
            continue
        try:
            evaluation = score(record.recipe)
        except (NonFiniteError, EvaluationError) as error:
            note(f"{record.name} could not be scored on the validation questions: {error}")
            failed[str(record.number)] = first_line(error)
            continue
        scored[str(record.number)] = evaluation.to_attribute()
        study.set_user_attr("validation", scored)
    store_failures(study, "validation", failed)
    if len(plan.objective.names) == 1:
        known = _posterior(study, parameters, seed)
        study.set_user_attr(POSTERIOR_ATTRIBUTE, {n: list(known[int(n)]) for n in scored if int(n) in known})


def store_failures(study: optuna.Study, split: str, failed: Mapping[str, str]) -> None:
    """Keep why trials (by number) have no scores on `split`, in place of what was kept before."""
    if failed or failures(study, split):
        study.set_user_attr(f"{split}_failed", dict(failed))


def failures(study: optuna.Study, split: str) -> dict[str, str]:
    """What could not be scored on `split` when it was last tried, by name, and why."""
    stored: Mapping[str, str] = study.user_attrs.get(f"{split}_failed", {})
    return {r.name: stored[str(r.number)] for r in records(study) if str(r.number) in stored}


def _best_preset(study: optuna.Study, objective: Objective) -> Record | None:
    return max((r for r in candidates(study) if r.label), key=lambda r: objective.key(r.values), default=None)


def compared(study: optuna.Study, objective: Objective) -> list[Record]:
    """What the sealed test is opened for: base, experts, average, best preset, and the winner."""
    chosen = {"average", *stored_references(study)}
    top = _best_preset(study, objective)
    numbers = {*tested(study), *([top.number] if top else [])}
    return [r for r in records(study) if r.is_scored and (r.label in chosen or r.number in numbers)]


@dataclass(frozen=True)
class Standing:
    """A row of the final table: one model on the validation questions.

    Attributes:
        role: ``base``, ``expert``, ``baseline`` or ``merge``.
        values: Objective values; the references' scores on these questions define retention, those on the search
            questions where no expert beats the base here or one of them has no scores here.
        violations: Constraint -> amount by which it is violated on these questions (<= 0: it holds).
        expected: First objective by all that is known: on validation with the search's answers and by its references (see the
            module's notes).
    """

    record: Record
    role: str
    evaluation: Evaluation
    values: tuple[float, ...]
    stderrs: tuple[float, ...]
    violations: Mapping[str, Estimate]
    expected: float

    @property
    def feasible(self) -> bool:
        return all(v.value <= 0 for v in self.violations.values())

    @property
    def excess(self) -> float:
        """Sum of the violations, each in its standard errors; 0 where all constraints hold."""
        return math.fsum(max(v.value, 0.0) / (v.stderr or 1.0) for v in self.violations.values())


def standings(
    study: optuna.Study, objective: Objective, experts: tuple[str, ...], *, split: str = "validation"
) -> list[Standing]:
    """All rows that have scores on `split` (``validation`` or ``test``): base, experts, baselines, merges by rank.

    None before base and experts were asked; one that could not be scored has no row.
    """
    references = references_on(study, objective, experts, split)
    if references is None:
        return []
    rows = []
    for record, evaluation in _scored_on(study, split):
        label = record.label
        role = "base" if label == "base" else "expert" if label in experts else "baseline" if label else "merge"
        estimates = objective.values(evaluation, references)
        values, errors = tuple(e.value for e in estimates), tuple(e.stderr for e in estimates)
        violations = objective.violations(evaluation, references)
        rows.append(Standing(record, role, evaluation, values, errors, violations, values[0]))
    if split == "validation":
        searched = references_of(study, list(objective.metrics.values()), experts)
        here = {s.record.number: objective.values(s.evaluation, searched)[0] for s in rows}
        rows = _with_search(rows, here, study.user_attrs.get(POSTERIOR_ATTRIBUTE, {}))
    order = ["base", "expert", "baseline", "merge"]
    return sorted(rows, key=lambda s: (order.index(s.role), -objective.key([s.expected]), s.record.number))


def references_on(study: optuna.Study, objective: Objective, experts: tuple[str, ...], split: str) -> References | None:
    """What defines retention in the rows of `standings`; None before base and experts were asked.

    Those of the search where no expert beats the base on `split`, or one of them has no scores there.
    """
    by_label = {r.label: e for r, e in _scored_on(study, split) if r.label}
    lacking = {"base", *experts} - by_label.keys()
    if lacking - failures(study, split).keys():
        return None
    metrics = list(objective.metrics.values())
    if not lacking:
        found = References.from_evaluations(metrics, by_label["base"], {e: by_label[e] for e in experts})
        if not objective.meaningless(found):
            return found
    return references_of(study, metrics, experts)


def _scored_on(study: optuna.Study, split: str) -> list[tuple[Record, Evaluation]]:
    stored: Mapping[str, Any] = study.user_attrs.get(split, {})
    by_number = {r.number: r for r in records(study)}
    return [(by_number[int(k)], Evaluation.from_attribute(v)) for k, v in stored.items()]


def _with_search(
    rows: list[Standing], here: Mapping[int, Estimate], stored: Mapping[str, Sequence[float]]
) -> list[Standing]:
    """The rows with `expected`: `here`, by number, with the stored posteriors of the search where there is one."""
    known = {int(number): (mean, sd) for number, (mean, sd) in stored.items()}
    fair = [s for s in rows if s.record.label and s.record.number in known]
    fair = [s for s in fair if not _is_lucky(s, known[s.record.number][0])]
    fixed = [here[s.record.number].value - known[s.record.number][0] for s in fair]
    shift = float(np.mean(fixed)) if fixed else 0.0

    def expected(number: int) -> float:
        (mean, sd), own = known.get(number, (0.0, math.inf)), here[number]
        if not 0 < sd < math.inf or not 0 < own.stderr < math.inf:
            return own.value
        search, validation = 1 / sd**2, 1 / own.variance
        return ((mean + shift) * search + own.value * validation) / (search + validation)

    return [replace(s, expected=expected(s.record.number)) for s in rows]


def _is_lucky(s: Standing, mean: float) -> bool:
    """Whether `mean` is the measured value of a baseline that is compared because of it."""
    return s.role == "baseline" and s.record.label != "average" and mean == s.record.values[0]


def winner(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> Record | None:
    """The merge that is expected to be best, a published baseline if need be; before validation, the best observed.

    Constraints come first: where no merge meets them on the validation questions, the one that is nearest to it.
    """
    merges = [s for s in standings(study, objective, experts) if s.role in ("merge", "baseline")]
    if merges:
        return max(merges, key=lambda s: (-s.excess, objective.key([s.expected]))).record
    return best(study, objective)


def nothing_to_hand_over(study: optuna.Study) -> str:
    """Why a study has no champion."""
    return nearest_miss(study) or f"study {study.study_name!r} has no scored merge yet; run it first"


def champions(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> list[Record]:
    """What is handed over: the winner; with several objectives, the front of what has validation scores."""
    single = winner(study, objective, experts)
    if len(objective.names) == 1 or single is None:
        return [] if single is None else [single]
    merges = [s for s in standings(study, objective, experts) if s.role in ("merge", "baseline") and s.feasible]
    return [s.record for s in objective.front(merges)] or [single]


def tested(study: optuna.Study) -> list[int]:
    """Numbers of the trials that the sealed test was opened for; empty while it is sealed."""
    opened = study.user_attrs.get("test_winner")
    return [] if opened is None else list(opened) if isinstance(opened, list) else [opened]


def outdated_test(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> str:
    """What to know and do where the sealed test was opened for another trial than the winner of now; else ''."""
    opened, now = tested(study), sorted(r.number for r in champions(study, objective, experts))
    if not opened or not now or sorted(opened) == now:
        return ""
    then, here, best = _trials(opened), _trials(now), "winner" if len(objective.names) == 1 else "front"
    scored = study.user_attrs.get("test", {})
    score = "no test score" if any(str(n) not in scored for n in now) else "a test score only from standing beside it"
    return (
        f"the sealed test questions were opened for {then}; the study went on, and its {best} is now {here}, which has {score}. "
        "An honest one cannot be measured any more: the questions prove something once, for what was chosen before they were "
        "opened, and another seed or study of the same tasks asks the same ones. Hand over what was tested (export with "
        f"--trial {opened[0]}), or {here} on its validation score alone; a new proof needs questions that no study has opened"
    )


def _trials(numbers: Sequence[int]) -> str:
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, sorted(numbers)))}"


def paired_difference(a: Evaluation, b: Evaluation, weights: Mapping[str, float]) -> tuple[float, float]:
    """sum_m w_m (a_m - b_m) over metrics that are means of their questions, and its standard error, from the same questions."""
    mean = variance = 0.0
    for name, weight in weights.items():
        d = a.scores[name].values - b.scores[name].values
        mean += weight * float(d.mean())
        variance += weight**2 * (float(d.var(ddof=1)) / len(d) if len(d) > 1 else math.nan)
    return mean, math.sqrt(variance)
