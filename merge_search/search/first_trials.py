"""What a study tries before its sampler proposes anything.

    baselines        base, experts, average, task arithmetic, published presets
    earlier studies  their best recipes (``search.learn_from``)
    first points     the space's uniform recipes and, with a learner, its ladder: queued once all of the above are
                     scored, since the ladder may stand on one of them

Every entry is queued once per study; a killed run goes on where it was, and baselines that the study file names only later
come next. The first points are decided once and kept with the study before any of them is queued: what they find would
move the start of those that a kill left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from merge_search.engine.learners.fit import FitSettings
from merge_search.objective import Objective
from merge_search.recipe import Recipe
from merge_search.search import checks
from merge_search.search.prepare import Plan
from merge_search.search.records import finished_records, questions_left, questions_of_a_trial
from merge_search.search.start.baselines import baselines
from merge_search.search.start.earlier_studies import starts_from
from merge_search.search.start.warm_start import LearnedSpace, better_start
from merge_search.search.trial.worker import Workbench

__all__ = ["Start"]

DONE = "start_enqueued"
FIRST_POINTS = "first_points"
EARLIER = "learned_from"
MOST_STEPS = 10_000
Values = dict[str, str | int | float | bool]


class Start:
    """The queue of a study's first trials.

    Args:
        note: Told what an earlier study had to offer.
    """

    def __init__(
        self, plan: Plan, bench: Workbench, study: optuna.Study, objective: Objective, note: Callable[[str], None]
    ) -> None:
        self.plan, self.bench, self.study, self.objective = plan, bench, study, objective
        presets = baselines(plan.context, plan.baselines, can_measure=bench.can_measure)
        self._known = {recipe.fingerprint for recipe in presets.values()}
        queued = self._queued()
        if not self._is_done() or plan.file.search.baselines is not None:  # named, and not a later version's default
            self._queue_baselines(presets, queued)
        told: list[str] = list(study.user_attrs.get(EARLIER, []))
        for name, known in starts_from(plan.file, bench.models, plan.space, told, note):
            for k in known:
                if k.source not in queued:
                    study.enqueue_trial(k.point, user_attrs={"start": k.source})
            told.append(name)
            study.set_user_attr(EARLIER, told)

    def _queue_baselines(self, presets: Mapping[str, Recipe], queued: set[str]) -> None:
        """Those that are neither queued nor the same merge as one before them."""
        tried = queued | {str(t.user_attrs.get("label")) for t in self.study.get_trials(deepcopy=False)}
        seen: set[str] = set()
        for label, recipe in presets.items():
            if recipe.fingerprint not in seen and label not in tried:
                point = self.plan.space.encode(recipe)
                attrs = {"label": label, "start": label, **({} if point else {"given_recipe": recipe.to_json()})}
                self.study.enqueue_trial(point or {}, user_attrs=attrs)
            seen.add(recipe.fingerprint)

    def notes(self, total: int) -> list[str]:
        """Whether what comes first leaves trials for the sampler, and the baselines questions for the search."""
        if self._is_done():
            trials = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            late = [t.user_attrs["label"] for t in trials if "label" in t.user_attrs]
            found = checks.late_baseline_notes(late, len(finished_records(self.study)), total)
            return [*found, *checks.budget_notes(len(self._queued()), total)]
        left, labels = self._left(), sum("label" in t.user_attrs for t in self._first_tries())
        budget, per_trial = self.plan.file.search.questions, questions_of_a_trial(self.study)
        return [
            *checks.budget_notes(len(self._queued()) + len(left), total),
            *checks.question_notes(budget, labels, per_trial, self._one_step(left.values())),
        ]

    def _one_step(self, points: Iterable[Values]) -> int:
        """What one step asks of the first of these points that fits something; 0 where none does."""
        space = self.plan.space
        found = (space.settings(p, seed=0) for p in points) if isinstance(space, LearnedSpace) else ()
        settings = next((s for s in found if s is not None), None)
        return 0 if settings is None else self.bench.fit_questions(FitSettings(**{**settings, "steps": 1}))

    def _first_tries(self) -> list[FrozenTrial]:
        return [t for t in self.study.get_trials(deepcopy=False) if "retry_of" not in t.user_attrs]

    def go_on(self) -> None:
        """Queue the first points, once all that was queued before is done."""
        if self._is_done():
            return
        if self._decided() is None:
            if not all(t.state.is_finished() for t in self.study.get_trials(deepcopy=False)):
                return
            self.study.set_user_attr(FIRST_POINTS, self._first_points())
        for name, point in self._left().items():
            self.study.enqueue_trial(point, user_attrs={"start": name})
        self.study.set_user_attr(DONE, True)

    def _decided(self) -> list[Values] | None:
        """The first points as the study keeps them; None: not decided yet."""
        return self.study.user_attrs.get(FIRST_POINTS)

    def _left(self) -> dict[str, Values]:
        """Those of the first points that are not queued: those decided, else those of now."""
        decided, queued = self._decided(), self._queued()
        named = {f"start.{i}": p for i, p in enumerate(self._first_points() if decided is None else decided)}
        return {name: p for name, p in named.items() if name not in queued}

    def _is_done(self) -> bool:
        return bool(self.study.user_attrs.get(DONE))

    def _queued(self) -> set[str]:
        trials = self.study.get_trials(deepcopy=False)
        return {t.user_attrs["start"] for t in trials if "start" in t.user_attrs}

    def _first_points(self) -> list[Values]:
        """Without those that are a baseline and fit nothing."""
        space = self.plan.space
        if not isinstance(space, LearnedSpace):
            return [p for p in space.initial_points() if space.decode(p).fingerprint not in self._known]
        begin = better_start(self.study, self.objective, space)
        points = space.initial_points(begin, self._affordable)
        return [
            p for p in points if space.settings(p, seed=0) is not None or space.decode(p).fingerprint not in self._known
        ]

    def _affordable(self, settings: dict[str, Any]) -> int | None:
        """How many steps of these settings the budget in questions still pays for; None: there is no such budget."""
        left = questions_left(self.study, self.plan.file.search.questions)
        if left is None:
            return None
        return self.bench.affordable_steps(FitSettings(**{**settings, "steps": MOST_STEPS}), left)
