"""What a study has spent, over all its runs, and what its budget still allows."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from merge_search.evaluation import Evaluation
from merge_search.outcome import Outcome
from merge_search.search.records import stored_references
from merge_search.study_file import Search

__all__ = [
    "ASKED_IN_VAIN",
    "START_SCORE",
    "Budget",
    "affordable_steps",
    "planned_fidelity",
    "questions_asked",
    "questions_of_a_trial",
    "seconds_spent",
]

ASKED_IN_VAIN = "asked_in_vain"
"""Study attribute: questions asked of the base or an expert in evaluations that never completed. Absent if zero."""

START_SCORE = "start_score"
"""Study attribute: scores of the space's first uniform recipe, where they decided where the first fits begin."""


SHARE_OF_BASELINES = 1 / 3
"""Most of a budget in questions that base, experts and baselines may ask, unless `fidelity` is given."""
LEAST_QUESTIONS = 20
"""Questions of every task that a trial asks all the same."""


def planned_fidelity(search: Search, n_questions: Mapping[str, int], n_first: int) -> float:
    """The share of the search questions that every trial is asked.

    Args:
        search: The study file's section ``search``.
        n_questions: Number of search questions by task.
        n_first: Number of base, experts and baselines.

    Returns:
        ``fidelity`` where the file gives it. Else 1, or with a budget in questions the largest share at which the first
        trials keep to `SHARE_OF_BASELINES` and every task to `LEAST_QUESTIONS`.
    """
    if search.fidelity is not None:
        return search.fidelity
    if search.questions is None or not sum(n_questions.values()):
        return 1.0
    least = min(1.0, LEAST_QUESTIONS / max(1, min(n_questions.values())))
    return min(1.0, max(least, SHARE_OF_BASELINES * search.questions / (n_first * sum(n_questions.values()))))


class Budget:
    """The limits of one study file, compared with what its study has spent.

    Args:
        search: The study file's section ``search``.
        study: The stored study. Every answer is computed from its storage, so a resumed study gives the same ones.
    """

    def __init__(self, search: Search, study: optuna.Study) -> None:
        self._search, self._study = search, study

    def used_up(self) -> str:
        """Why the search must end: its questions or its hours are used. '' while both last."""
        questions, hours = self._search.questions, self._search.hours
        if questions is not None and (asked := questions_asked(self._study)) >= questions:
            return f"{asked} of {questions} questions are asked: the search ends here"
        if hours is not None and (seconds := seconds_spent(self._study)) >= 3600 * hours:
            return f"{seconds / 3600:.2f} of {hours:g} hours are used: the search ends here"
        return ""

    def questions_left(self) -> int | None:
        """Questions that a fit may still ask, with those of its scoring set aside.

        Returns:
            May be negative. None if the study file sets no budget in questions.
        """
        if self._search.questions is None:
            return None
        return self._search.questions - questions_asked(self._study) - questions_of_a_trial(self._study)


def affordable_steps(
    settings: Mapping[str, Any], questions: int, fit_questions: Callable[[Mapping[str, Any]], int]
) -> int:
    """The largest number of steps, at most that of `settings`, whose fit asks no more than `questions`.

    Args:
        settings: The learner's settings (`FitSettings` fields).
        questions: The budget.
        fit_questions: Gives the number of questions that a fit with the settings would ask.

    Returns:
        0 if the budget does not pay for one step.
    """
    steps = range(1, settings["steps"] + 1)
    return bisect_right(steps, questions, key=lambda n: fit_questions({**settings, "steps": n}))


def questions_asked(study: optuna.Study) -> int:
    """Questions of the base, the experts and all trials, over all runs: for scores, fits and statistics.

    The base and the experts are scored before the first trial. The trials with their names only repeat those answers
    and are not counted again. Questions of a scoring that a run did not complete are counted (`ASKED_IN_VAIN`).
    """
    references = stored_references(study)
    trials = [t.user_attrs for t in study.get_trials(deepcopy=False) if t.user_attrs.get("label") not in references]
    asked = sum(int(attributes.get("cost", (0, 0, 0))[2]) for attributes in trials)
    asked += sum(int(data["evaluation"]["cost"][2]) for data in [*references.values(), *_start_scores(study)])
    return asked + int(study.user_attrs.get(ASKED_IN_VAIN, 0))


def questions_of_a_trial(study: optuna.Study) -> int:
    """Questions that scoring one trial asks, which is what scoring the base asked."""
    return Evaluation.from_attribute(study.user_attrs["reference.base"]["evaluation"]).cost.questions


def seconds_spent(study: optuna.Study) -> float:
    """Wall time of the base, the experts and all trials, over all runs.

    A trial that was lost with a killed process is closed by the next run, maybe days later. It counts with the time
    that it had charged itself before.
    """
    trials = [_seconds(t) for t in study.get_trials(deepcopy=False)]
    costs = [data["evaluation"]["cost"] for data in [*stored_references(study).values(), *_start_scores(study)]]
    return sum(trials) + sum(float(merge_s + evaluate_s) for merge_s, evaluate_s, _ in costs)


def _start_scores(study: optuna.Study) -> list[Mapping[str, Any]]:
    """What is stored under `START_SCORE`, if anything is."""
    stored = study.user_attrs.get(START_SCORE)
    return [] if stored is None else [stored]


def _seconds(trial: FrozenTrial) -> float:
    if trial.user_attrs.get("outcome") in (Outcome.LOST, Outcome.DIED):
        return math.fsum(trial.user_attrs.get("cost", ())[:2])
    return 0.0 if trial.duration is None else trial.duration.total_seconds()
