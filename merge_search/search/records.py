"""Trials and references of a study, read from Optuna's storage alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from merge_search.errors import StudyFileError
from merge_search.evaluation import Cost, Evaluation, MetricInfo, Split
from merge_search.objective import Objective, References
from merge_search.outcome import Outcome
from merge_search.recipe import Recipe

__all__ = [
    "Record",
    "best",
    "best_expert",
    "candidates",
    "finished_records",
    "objective_of",
    "records",
    "references_of",
    "store_metrics",
    "stored_references",
    "teachers_of",
]


@dataclass(frozen=True)
class Record:
    """A trial.

    Attributes:
        number: The trial's number.
        label: Name of a baseline (``base``, an expert, ``average``, a preset); '' for a searched candidate.
        outcome: How the trial ended; None while it runs or waits.
        reason: Why it failed; '' unless it did.
        values: Objective values in the user's direction; empty unless scored.
        feasible: Whether all constraints hold.
        attributes: The trial's user attributes.
    """

    number: int
    label: str
    outcome: Outcome | None
    reason: str
    values: tuple[float, ...]
    feasible: bool
    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, trial: FrozenTrial) -> Record:
        attrs = trial.user_attrs
        outcome = Outcome(attrs["outcome"]) if "outcome" in attrs and trial.state.is_finished() else None
        values = tuple(trial.values or ()) if trial.state == TrialState.COMPLETE else ()
        feasible = all(v <= 0 for v in trial.constraints.values())
        return cls(trial.number, attrs.get("label", ""), outcome, attrs.get("reason", ""), values, feasible, attrs)

    @property
    def is_scored(self) -> bool:
        return bool(self.values) and self.outcome is not None and self.outcome.is_scored

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe.from_json(self.attributes["recipe"], where=f"trial {self.number}")

    @cached_property
    def evaluation(self) -> Evaluation:
        return Evaluation.from_attribute(self.attributes["evaluation"])

    @property
    def cost(self) -> Cost:
        return Cost(*self.attributes.get("cost", (0.0, 0.0, 0)))

    @property
    def weights_sha256(self) -> str:
        return str(self.attributes.get("weights_sha256", ""))

    @property
    def name(self) -> str:
        """The trial's name in tables."""
        return self.label or f"trial {self.number}"


def records(study: optuna.Study) -> list[Record]:
    """All trials, in the order of their numbers."""
    return [Record.of(t) for t in study.get_trials(deepcopy=False)]


def finished_records(study: optuna.Study) -> list[Record]:
    """Trials that count towards `n_trials`: those that ended and were not lost with a killed process."""
    return [r for r in records(study) if r.outcome is not None and r.outcome is not Outcome.LOST]


def candidates(study: optuna.Study) -> list[Record]:
    """Scored trials that meet the constraints and are merges: neither the base nor an expert."""
    references = stored_references(study)
    return [
        r
        for r in records(study)
        if r.is_scored and r.feasible and r.label not in references and "same_as" not in r.attributes
    ]


def best(study: optuna.Study, objective: Objective) -> Record | None:
    """The candidate with the best first objective as measured, among those that were asked all questions."""
    full = [r for r in candidates(study) if r.outcome is Outcome.OK]
    return max(full, key=lambda r: objective.key(r.values), default=None)


def best_expert(study: optuna.Study, objective: Objective, experts: Sequence[str], references: References) -> float:
    """First objective of the expert that is best in it, on the search questions."""
    stored = stored_references(study)
    evaluations = (Evaluation.from_attribute(stored[e]["evaluation"]) for e in experts)
    return max((objective.values(e, references)[0].value for e in evaluations), key=lambda v: objective.key([v]))


def stored_references(study: optuna.Study) -> dict[str, Mapping[str, Any]]:
    """The stored ``evaluation`` and ``weights_sha256`` of base and experts, by name."""
    return {k.removeprefix("reference."): v for k, v in study.user_attrs.items() if k.startswith("reference.")}


def store_metrics(study: optuna.Study, metrics: Sequence[MetricInfo]) -> None:
    """Store the metrics of the evaluators beside the trials, so that a report needs the storage alone."""
    rows = [
        [
            *(m.task, m.metric, m.higher_is_better, {str(k): v for k, v in m.n_questions.items()}, m.chance, m.is_cost),
            *([m.member_of] if m.member_of else []),
        ]
        for m in metrics
    ]
    if study.user_attrs.get("metrics") != rows:
        study.set_user_attr("metrics", rows)


def references_of(study: optuna.Study, metrics: Sequence[MetricInfo], experts: Sequence[str]) -> References:
    """Scores of base and experts as the study stored them."""
    stored = {name: study.user_attrs[f"reference.{name}"]["evaluation"] for name in ("base", *experts)}
    evaluations = {name: Evaluation.from_attribute(data) for name, data in stored.items()}
    return References.from_evaluations(metrics, evaluations.pop("base"), evaluations)


def teachers_of(objective: Objective, references: References) -> dict[str, str]:
    """Task -> its teacher: the expert that is best in the task's main metric, or ``base`` if no expert beats the base.

    A teacher's answers replace labels, and its statistics are measured on the task's rows. A task that the experts only
    forgot is better taught by the base. A member of a group has the group's teacher.
    """
    mains = {task: m for task, m in objective.main.items() if not m.is_cost}

    def teacher(m: MetricInfo) -> str:
        if m.member_of:
            return teacher(mains[m.member_of])
        return references.best_expert[m.name] if objective.gap(m, references) > 0 else "base"

    return {task: teacher(m) for task, m in mains.items()}


def objective_of(study: optuna.Study) -> tuple[Objective, tuple[str, ...]]:
    """The objective and the experts' names of a study that has run.

    Raises:
        StudyFileError: The study was stopped before anything was scored.
    """
    if not {"metrics", "identity"} <= study.user_attrs.keys():
        raise StudyFileError(f"study {study.study_name!r} was stopped before its first trial; run it first")
    rows = study.user_attrs["metrics"]
    metrics = [
        MetricInfo(t, m, up, {Split(k): v for k, v in n.items()}, chance, *more) for t, m, up, n, chance, *more in rows
    ]
    identity = study.user_attrs["identity"]
    section = identity["objective"]
    return Objective.from_settings(section, metrics), tuple(name for name in identity["models"] if name != "base")
