"""What a study tries before its sampler proposes anything.

    baselines        base, experts, average, task arithmetic, published presets
    earlier studies  their best recipes (``search.learn_from``)
    first points     the space's uniform recipes and, with a learner, the first fits. They are queued once all of the
                     above are scored, since the fits may begin at one of them. Results of fitted baselines that
                     the space holds come before them: their scores are known

Every entry is queued once per study, so a killed run goes on where it was. Baselines that the study file names only
later come next. The first points are chosen once and stored before any is queued. If they were chosen again after a
restart, results already found would change the starting point of the remaining ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from merge_search.evaluation import Evaluation
from merge_search.outcome import Outcome
from merge_search.recipe import Recipe
from merge_search.search import checks
from merge_search.search.budget import START_SCORE, Budget, affordable_steps, questions_of_a_trial
from merge_search.search.plan import Plan
from merge_search.search.records import Record, finished_records, stored_references
from merge_search.search.start.baselines import baselines
from merge_search.search.start.earlier_studies import starts_from
from merge_search.search.start.learned_space import LearnedSpace
from merge_search.search.start.warm_start import average_of, better_start, is_better, warm_start
from merge_search.search.trial.executor import Executor
from merge_search.search.trial.job import Failed, Job

__all__ = ["FirstTrials"]

DONE = "start_enqueued"
FIRST_POINTS = "first_points"
EARLIER = "learned_from"
MOST_STEPS = 10_000
Values = dict[str, str | int | float | bool]


class FirstTrials:
    """The queue of a study's first trials.

    Args:
        plan: The checked study file.
        study: The stored study, with its references scored.
        executor: Says which baselines can be measured and how many questions a fit asks.
        note: Called with a sentence about each earlier study.
    """

    def __init__(self, plan: Plan, study: optuna.Study, executor: Executor, note: Callable[[str], None]) -> None:
        self.plan, self.study, self.executor = plan, study, executor
        self.budget = Budget(plan.file.search, study)
        presets = baselines(plan.context, plan.baselines, can_measure=executor.can_measure)
        self._fits = {b.label: b.fit.settings for b in plan.baselines if b.fit is not None and b.label in presets}
        self._baselines = {recipe.fingerprint for label, recipe in presets.items() if label not in self._fits}
        queued = self._queued()
        # Baselines that an older study does not have yet are queued if the file names them, not if they are defaults.
        if not self._is_done() or plan.file.search.baselines is not None:
            self._queue_baselines(presets, queued)
        self._queue_earlier_studies(queued, note)

    def _queue_baselines(self, presets: Mapping[str, Recipe], queued: set[str]) -> None:
        """Queue the baselines that are not queued yet and are not the same merge as one before them."""
        tried = queued | {str(t.user_attrs.get("label")) for t in self.study.get_trials(deepcopy=False)}
        seen: set[str] = set()
        for label, recipe in presets.items():
            attributes: dict[str, Any] = {"label": label, "start": label}
            if label in tried:
                pass
            elif label in self._fits:
                given = {"given_recipe": recipe.to_json(), "given_fit": self._fits[label]}
                self.study.enqueue_trial({}, user_attrs=attributes | given)
            elif recipe.fingerprint not in seen:
                point = self.plan.space.encode(recipe)
                given = {} if point else {"given_recipe": recipe.to_json()}
                self.study.enqueue_trial(point or {}, user_attrs=attributes | given)
            if label not in self._fits:
                seen.add(recipe.fingerprint)

    def _queue_earlier_studies(self, queued: set[str], note: Callable[[str], None]) -> None:
        places: list[str] = list(self.study.user_attrs.get(EARLIER, []))
        for place, starts in starts_from(self.plan.file, self.executor.models, self.plan.space, places, note):
            for start in starts:
                if start.source not in queued:
                    self.study.enqueue_trial(start.point, user_attrs={"start": start.source})
            places.append(place)
            self.study.set_user_attr(EARLIER, places)

    def notes(self, total: int) -> list[str]:
        """Sentences if the first trials leave too few of `total` trials, or of the questions, for the search."""
        if self._is_done():
            trials = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            late = [t.user_attrs["label"] for t in trials if "label" in t.user_attrs]
            return [
                *checks.late_baseline_notes(late, len(finished_records(self.study)), total),
                *checks.budget_notes(len(self._queued()), total),
            ]
        left, labels = self._left(), sum("label" in t.user_attrs for t in self._first_tries())
        budget, per_trial = self.plan.file.search.questions, questions_of_a_trial(self.study)
        fits = sum(self.executor.fit_questions({**settings, "seed": 0}) for settings in self._fits.values())
        return [
            *checks.budget_notes(len(self._queued()) + len(left), total),
            *checks.question_notes(budget, labels, per_trial, self._one_step(left.values()), fits=fits),
        ]

    def _one_step(self, points: Iterable[Values]) -> int:
        """Questions of one step of the first of these points that fits something; 0 if none does."""
        space = self.plan.space
        all_settings = (space.settings(p, seed=0) for p in points) if isinstance(space, LearnedSpace) else ()
        settings = next((s for s in all_settings if s is not None), None)
        return 0 if settings is None else self.executor.fit_questions({**settings, "steps": 1})

    def _first_tries(self) -> list[FrozenTrial]:
        return [t for t in self.study.get_trials(deepcopy=False) if "retry_of" not in t.user_attrs]

    def go_on(self) -> bool:
        """Queue the first points, once everything that was queued before is finished.

        Returns:
            False if the next trial must wait for running trials, because the first points depend on their results.
        """
        if self._is_done():
            return True
        if self._stored_points() is None:
            trials = self.study.get_trials(deepcopy=False)
            if not all(t.state.is_finished() for t in trials):
                return any(t.state == TrialState.WAITING for t in trials)
            self.study.set_user_attr(FIRST_POINTS, self._first_points(begin=self._sound_start()))
        for name, point in self._left().items():
            self.study.enqueue_trial(point, user_attrs={"start": name})
        self.study.set_user_attr(DONE, True)
        return True

    def _stored_points(self) -> list[Values] | None:
        """The first points that the study has stored; None if they are not chosen yet."""
        return self.study.user_attrs.get(FIRST_POINTS)

    def _left(self) -> dict[str, Values]:
        """The first points that are not queued yet: those stored, else those that would be chosen now."""
        points, queued = self._stored_points(), self._queued()
        named = {f"start.{i}": p for i, p in enumerate(self._first_points() if points is None else points)}
        return {name: p for name, p in named.items() if name not in queued}

    def _is_done(self) -> bool:
        return bool(self.study.user_attrs.get(DONE))

    def _queued(self) -> set[str]:
        trials = self.study.get_trials(deepcopy=False)
        return {t.user_attrs["start"] for t in trials if "start" in t.user_attrs}

    def _first_points(self, begin: Recipe | None = None) -> list[Values]:
        """The results of fitted baselines, then the space's first points, without those that are a baseline and fit
        nothing.

        Args:
            begin: Where the first fits begin if no baseline of another structure is better. None: at the
                space's first recipe.
        """
        space = self.plan.space
        results = [p for r in finished_records(self.study) if (p := self._fitted_point(r)) is not None]
        if not isinstance(space, LearnedSpace):
            return results + [p for p in space.initial_points() if not self._is_baseline(space.decode(p))]
        points = space.initial_points(better_start(self.study, self.plan.objective, space) or begin, self._affordable)
        kept = [p for p in points if space.settings(p, seed=0) is not None or not self._is_baseline(space.decode(p))]
        return results + kept

    def _fitted_point(self, record: Record) -> Values | None:
        """The point of a fitted baseline's result; None for another trial, or if the space does not hold it."""
        if record.label not in self._fits or record.outcome is not Outcome.OK:
            return None
        return self.plan.space.encode(record.recipe)

    def _sound_start(self) -> Recipe | None:
        """The mean of the experts, if fits for entropy would begin at a recipe clearly worse than the base; else None.

        `start.warm_start` says why only for entropy. The space's first recipe is scored on the search questions for
        this, unless the fits do not begin there anyway. The scores are stored, so a trial of the same recipe does not
        ask for them again.
        """
        space, objective = self.plan.space, self.plan.objective
        if not isinstance(space, LearnedSpace) or space.learner.loss[0] != "entropy":
            return None
        points = space.space.initial_points()
        if not points or better_start(self.study, objective, space) is not None:
            return None
        usual = space.decode(points[0]).model_copy(update={"models": self.executor.models})
        if space.learner.warm_start and warm_start(usual, self.study, objective)[1] is not None:
            return None
        if space.space.encode(average_of(usual)) is None or not self._can_afford_a_score_and_a_step():
            return None
        scored = self.executor.submit(Job(usual.to_json(), fidelity=self.plan.fidelity)).result()
        if isinstance(scored, Failed):
            return average_of(usual) if scored.outcome is Outcome.NON_FINITE else None
        stored = {"evaluation": scored.evaluation.to_attribute(), "weights_sha256": scored.weights_sha256}
        self.study.set_user_attr(START_SCORE, {**stored, "fingerprint": usual.fingerprint})
        base = Evaluation.from_attribute(stored_references(self.study)["base"]["evaluation"])
        return average_of(usual) if is_better(base, scored.evaluation, objective) else None

    def _can_afford_a_score_and_a_step(self) -> bool:
        left = self.budget.questions_left()
        return left is None or left >= questions_of_a_trial(self.study) + self._one_step(self._left().values())

    def _is_baseline(self, recipe: Recipe) -> bool:
        return recipe.fingerprint in self._baselines

    def _affordable(self, settings: dict[str, Any]) -> int | None:
        """Number of steps of these settings that the budget in questions pays for; None without such a budget."""
        left = self.budget.questions_left()
        if left is None:
            return None
        return affordable_steps({**settings, "steps": MOST_STEPS}, left, self.executor.fit_questions)
