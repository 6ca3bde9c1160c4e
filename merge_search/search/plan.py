"""A checked study: what `prepare` hands to the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from merge_search.evaluation import Differentiable, Evaluator, Grading, MetricInfo, kind_of
from merge_search.objective import Objective
from merge_search.rules import RuleFile
from merge_search.space import SearchSpace, SpaceContext
from merge_search.study_file import BaselineFit, StatisticsSection, StudyFile

__all__ = ["N_ROWS", "Baseline", "Plan"]

N_ROWS = StatisticsSection().n_rows
"""The default number of rows for statistics. An identity leaves it out, so that studies stored before the setting
existed keep their identity."""


_FORMER = (("groups", "each"),)
"""Options of evaluators whose value is what versions before the option did. An identity leaves them out."""


class Baseline(NamedTuple):
    """A preset that a study tries first.

    Attributes:
        name: The preset.
        options: As the study file has them.
        fit: How its coefficients are fitted; None: they are published numbers.
    """

    name: str
    options: Mapping[str, Any] = {}
    fit: BaselineFit | None = None

    @property
    def label(self) -> str:
        """The name with the options, by which a study knows it."""
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})" if self.options else self.name


@dataclass(frozen=True)
class Plan:
    """A study file that fits its models, tasks and metrics.

    Attributes:
        file: The study file.
        context: The models and their groups.
        space: The search space, with the learner's parameters if trials may fit their coefficients.
        evaluators: In the order of the study file.
        metrics: Metrics of all evaluators, in order.
        objective: What is maximised or minimised, and the constraints.
        baselines: Presets tried before the search.
        rules: Rule files in use.
        fidelity: Share of the search questions that every trial is asked, in (0, 1].
    """

    file: StudyFile
    context: SpaceContext
    space: SearchSpace
    evaluators: list[Evaluator]
    metrics: list[MetricInfo]
    objective: Objective
    baselines: list[Baseline]
    rules: tuple[RuleFile, ...] = ()
    fidelity: float = 1.0

    @property
    def notes(self) -> list[str]:
        """What the budget decides and what the learner learns, as sentences."""
        if self.file.search.fidelity is not None or self.fidelity >= 1:
            return self._loss_notes()
        return [
            *self._loss_notes(),
            f"search.questions pays for {self.fidelity:.0%} of the search questions in every trial, so that base, "
            "experts and baselines leave most of it to the search; search.fidelity sets another share",
        ]

    def _loss_notes(self) -> list[str]:
        """Tasks whose loss is chosen here and is not ``gold``, each with the reason."""
        learner = self.file.search.learner
        if learner is None or "auto" not in learner.loss:
            return []
        able = [e for e in self.evaluators if isinstance(e, Differentiable)]
        return [text for e in able for task in e.fit_tasks() if (text := _loss_note(e, task))]

    def resuming(self, stored: Mapping[str, Any] | None) -> Plan:
        """The plan of a study that goes on: the same questions are asked, and retention keeps its meaning.

        A study that began before ``objective.lead`` existed counts every task on which an expert beats the base.

        Args:
            stored: The study's stored identity; None if it begins now.
        """
        section = self.file.objective
        if stored is not None and self.file.search.fidelity is None:
            self = replace(self, fidelity=stored.get("fidelity", 1.0))
        if stored is None or "lead" in stored["objective"] or "lead" in section.model_fields_set:
            return self
        file = self.file.model_copy(update={"objective": section.model_copy(update={"lead": 0.0})})
        return replace(self, file=file, objective=Objective.from_settings(file.objective.settings, self.metrics))

    def identity(self, hashes: Mapping[str, str]) -> dict[str, Any]:
        """The settings that must not change between runs of one study, as JSON.

        Args:
            hashes: Hashes of the models by name.
        """
        file = self.file
        return {
            "models": dict(hashes),
            "dtype": file.models.dtype,
            "seed": file.study.seed,
            "space": file.space.model_dump(mode="json"),
            "evaluate": {
                f"{i}.{entry.evaluator}": {"options": _told(entry.options), "questions": evaluator.fingerprint()}
                for i, (entry, evaluator) in enumerate(zip(file.evaluate, self.evaluators, strict=True))
            },
            "splits": file.splits.model_dump(mode="json"),
            "fidelity": self.fidelity,
            "objective": file.objective.settings,
            "learner": file.search.learner.model_dump(mode="json") if file.search.learner else None,
            **({} if file.statistics.n_rows == N_ROWS else {"statistics_rows": file.statistics.n_rows}),
            **({"rules": {rules.name: rules.sha256 for rules in self.rules}} if self.rules else {}),
        }


def _loss_note(evaluator: Differentiable, task: str) -> str | None:
    kind = kind_of(evaluator, task, "auto")
    if kind == "gold":
        return None
    why = evaluator.why_not_gold(task) if isinstance(evaluator, Grading) else None
    why = why or ("its gold texts are long" if "gold" in evaluator.losses(task) else "it has no loss gold")
    return f"task {task!r} is learned from its best expert (loss {kind}): {why}"


def _told(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if (key, value) not in _FORMER}
