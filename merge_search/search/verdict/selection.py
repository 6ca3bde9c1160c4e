"""Which trial wins: by posterior mean, and by scores on questions that the search never saw.

The best of many noisy values is several points too good (the winner's curse). The posterior mean of a model that knows
the noise is nearly honest. So the finalists are chosen by posterior mean and scored again on the validation split,
beside the average and the best baseline. The winner meets the constraints there and is best by all answers. With m, s^2
the posterior of the search and y, v the value and variance on validation,

    expected = ((m + shift) / s^2 + y / v) / (1 / s^2 + 1 / v),    shift = mean(y - m) over base, experts and baselines.

The shift says how much easier the validation questions are. The retention in y is defined by base and experts on the
search questions, as in m: the few validation questions may show another gap between them, or none, and would weight the
tasks differently. Validation often has the smaller part of the questions, so by validation alone a lucky merge would
win too often.

A baseline outside the space has no posterior: its measured value and variance stand for m and s^2. This is fair for
base, experts and average, which are compared whatever they scored. The best preset is compared because of its score, so
its m is too good by luck outside the space, and it does not count in the shift.

With several objectives there is no winner but a front: the merges that no other merge beats in every objective. The
finalists are spread over the front of the search questions. The front of the validation questions is handed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna

from merge_search.evaluation import Evaluation
from merge_search.objective import Estimate, Objective, References
from merge_search.outcome import Outcome
from merge_search.search.checks import nearest_miss
from merge_search.search.records import Record, best, candidates, records, references_of, stored_references
from merge_search.space import Parameter

__all__ = [
    "POSTERIOR_ATTRIBUTE",
    "Standing",
    "base_is_better",
    "best_presets",
    "champions",
    "compared",
    "failures",
    "finalists",
    "front",
    "nothing_to_hand_over",
    "outdated_test",
    "posterior",
    "references_on",
    "standings",
    "tested",
    "winner",
]

POSTERIOR_ATTRIBUTE = "search_posterior"
"""Study attribute: trial -> [mean, sd] of the one objective on the search questions, for validated trials."""


def finalists(
    study: optuna.Study, objective: Objective, parameters: Mapping[str, Parameter], *, seed: int, n: int
) -> list[Record]:
    """The `n` most promising searched candidates, the most promising first. Baselines are compared besides.

    With one objective they are chosen by posterior mean over all trials, with several evenly along the front.
    """
    merges = {r.number: r for r in candidates(study) if not r.label}
    if len(objective.names) > 1:
        return _spread(front([r for r in merges.values() if r.outcome is Outcome.OK], objective), n)
    return [merges[number] for number in posterior(study, parameters, seed) if number in merges][:n]


def posterior(study: optuna.Study, parameters: Mapping[str, Parameter], seed: int) -> dict[int, tuple[float, float]]:
    """Posterior mean and standard deviation of the one objective by trial, the best mean first. Loads torch."""
    from merge_search.search.samplers.recommend import recommend

    return {r.number: (r.mean, r.sd) for r in recommend(study, parameters, seed=seed)}


def front(merges: Sequence[Record], objective: Objective) -> list[Record]:
    """The records that no other one dominates, the best in the first objective first."""
    return sorted(objective.front(merges), key=lambda r: (-objective.key(r.values), r.number))


def _spread(ordered: list[Record], n: int) -> list[Record]:
    """`n` records evenly along the list, with both ends."""
    if len(ordered) <= n:
        return ordered
    rows = np.linspace(0, len(ordered) - 1, n).round().astype(int)
    return [ordered[i] for i in dict.fromkeys(rows.tolist())]


def failures(study: optuna.Study, split: str) -> dict[str, str]:
    """Reasons why trials could not be scored on `split` when this was last tried, by the trial's name."""
    stored: Mapping[str, str] = study.user_attrs.get(f"{split}_failed", {})
    return {r.name: stored[str(r.number)] for r in records(study) if str(r.number) in stored}


def best_presets(study: optuna.Study, objective: Objective) -> list[Record]:
    """The baselines that are merges, the best search score first."""
    return sorted((r for r in candidates(study) if r.label), key=lambda r: -objective.key(r.values))


def compared(study: optuna.Study, objective: Objective) -> list[Record]:
    """The trials that the sealed test is opened for: base, experts, average, best preset and the winner."""
    chosen = {"average", *stored_references(study)}
    numbers = {*tested(study), *(r.number for r in best_presets(study, objective)[:1])}
    return [r for r in records(study) if r.is_scored and (r.label in chosen or r.number in numbers)]


@dataclass(frozen=True)
class Standing:
    """A row of the final table: one model on the validation questions.

    Attributes:
        record: The trial.
        role: ``base``, ``expert``, ``baseline`` or ``merge``.
        evaluation: Its scores on these questions.
        values: Objective values. Retention is defined by the references' scores on these questions, or on the search
            questions if no expert beats the base here or one of them has no scores here.
        stderrs: Standard errors of the values.
        violations: Constraint -> amount by which it is violated on these questions (<= 0: it holds).
        expected: First objective by all answers, of search and validation (see the module's notes).
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
    """All models with scores on `split` (``validation`` or ``test``): base, experts, baselines, then merges by rank.

    Returns:
        Empty until base and experts were asked. A model that could not be scored has no row.
    """
    references = references_on(study, objective, experts, split)
    if references is None:
        return []
    rows = []
    for record, evaluation in _scored_on(study, split):
        role = _role(record.label, experts)
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


def _role(label: str, experts: tuple[str, ...]) -> str:
    if label == "base":
        return "base"
    if label in experts:
        return "expert"
    return "baseline" if label else "merge"


def references_on(study: optuna.Study, objective: Objective, experts: tuple[str, ...], split: str) -> References | None:
    """The scores of base and experts that define retention in the rows of `standings`.

    The search questions say which leads are real, so every split means the same tasks.

    Returns:
        The scores on the search questions if no expert beats the base on `split`, or if one of them has no scores
        there. None until base and experts were asked.
    """
    by_label = {r.label: e for r, e in _scored_on(study, split) if r.label}
    lacking = {"base", *experts} - by_label.keys()
    if lacking - failures(study, split).keys():
        return None
    metrics = list(objective.metrics.values())
    if not lacking:
        references = References.from_evaluations(metrics, by_label["base"], {e: by_label[e] for e in experts})
        searched = references_of(study, metrics, experts)
        references = replace(references, lead=searched.lead)
        if not objective.meaningless(references):
            return references
    return references_of(study, metrics, experts)


def _scored_on(study: optuna.Study, split: str) -> list[tuple[Record, Evaluation]]:
    stored: Mapping[str, Any] = study.user_attrs.get(split, {})
    by_number = {r.number: r for r in records(study)}
    return [(by_number[int(k)], Evaluation.from_attribute(v)) for k, v in stored.items()]


def _with_search(
    rows: list[Standing], here: Mapping[int, Estimate], stored: Mapping[str, Sequence[float]]
) -> list[Standing]:
    """The rows with their `expected` values, by the formula in the module's notes.

    Args:
        rows: Models with validation scores.
        here: Their first objective on the validation questions, by trial number.
        stored: Their posterior mean and standard deviation on the search questions, by trial number. Some may be
            missing.
    """
    posteriors = {int(number): (mean, sd) for number, (mean, sd) in stored.items()}
    fair = [s for s in rows if s.record.label and s.record.number in posteriors]
    fair = [s for s in fair if not _is_lucky(s, posteriors[s.record.number][0])]
    shifts = [here[s.record.number].value - posteriors[s.record.number][0] for s in fair]
    shift = float(np.mean(shifts)) if shifts else 0.0

    def expected(number: int) -> float:
        (mean, sd), measured = posteriors.get(number, (0.0, math.inf)), here[number]
        if not 0 < sd < math.inf or not 0 < measured.stderr < math.inf:
            return measured.value
        search, validation = 1 / sd**2, 1 / measured.variance
        return ((mean + shift) * search + measured.value * validation) / (search + validation)

    return [replace(s, expected=expected(s.record.number)) for s in rows]


def _is_lucky(s: Standing, mean: float) -> bool:
    """Whether `mean` is the measured value of a baseline, and the baseline is compared because of this value."""
    return s.role == "baseline" and s.record.label != "average" and mean == s.record.values[0]


def winner(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> Record | None:
    """The merge with the best expected value, which may be a published baseline. Before validation, the best measured
    one.

    Constraints come first: if no merge meets them on the validation questions, the nearest one wins.
    """
    merges = [s for s in standings(study, objective, experts) if s.role in ("merge", "baseline")]
    if merges:
        return max(merges, key=lambda s: (-s.excess, objective.key([s.expected]))).record
    return best(study, objective)


def base_is_better(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> str:
    """A text with the scores if every merge is expected to be worse than the base by a standard error; else ''.

    All answers count, of search and validation. Only with one objective, and only once the merges have validation
    scores.
    """
    rows = standings(study, objective, experts)
    base = next((s for s in rows if s.role == "base"), None)
    won = winner(study, objective, experts)
    best = next((s for s in rows if won is not None and s.record.number == won.number), None)
    if base is None or best is None or len(objective.names) > 1 or base.excess > best.excess:
        return ""
    lead = objective.key([base.expected]) - objective.key([best.expected])
    if not lead > best.stderrs[0]:
        return ""
    return (
        f"every merge is expected to be worse than the base in {objective.names[0]}, by the search and validation "
        f"questions: the best is {best.record.name} with {best.expected:.3f} ± {best.stderrs[0]:.3f} (standard error), "
        f"the base has {base.expected:.3f}"
    )


def nothing_to_hand_over(study: optuna.Study) -> str:
    """Why a study has no champion."""
    return nearest_miss(study) or f"study {study.study_name!r} has no scored merge yet; run it first"


def champions(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> list[Record]:
    """The merges to hand over: the winner, or with several objectives the front of the validation questions."""
    single = winner(study, objective, experts)
    if len(objective.names) == 1 or single is None:
        return [] if single is None else [single]
    merges = [s for s in standings(study, objective, experts) if s.role in ("merge", "baseline") and s.feasible]
    return [s.record for s in objective.front(merges)] or [single]


def tested(study: optuna.Study) -> list[int]:
    """Numbers of the trials that the sealed test was opened for; empty while it is sealed."""
    opened = study.user_attrs.get("test_winner")
    if opened is None:
        return []
    return list(opened) if isinstance(opened, list) else [opened]


def outdated_test(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> str:
    """A text that says what to do if the sealed test was opened for another trial than the present winner; else ''."""
    opened, now = tested(study), sorted(r.number for r in champions(study, objective, experts))
    if not opened or not now or sorted(opened) == now:
        return ""
    then, here, best = _trials(opened), _trials(now), "winner" if len(objective.names) == 1 else "front"
    scored = study.user_attrs.get("test", {})
    score = "no test score" if any(str(n) not in scored for n in now) else "a test score only from standing beside it"
    return (
        f"the sealed test questions were opened for {then}; the study went on, and its {best} is now {here}, which has "
        f"{score}. An honest one cannot be measured any more: the questions prove something once, for what was chosen "
        "before they were opened, and another seed or study of the same tasks asks the same ones. Hand over what was "
        f"tested (export with --trial {opened[0]}), or {here} on its validation score alone; a new proof needs "
        "questions that no study has opened"
    )


def _trials(numbers: Sequence[int]) -> str:
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, sorted(numbers)))}"
