"""What a study tries before its sampler proposes anything.

    baselines        base, experts, average, task arithmetic, published presets
    earlier studies  their best recipes (``search.learn_from``)
    first points     the space's uniform recipes and, with a learner, its ladder: queued once all of the above are
                     scored, since the ladder may stand on one of them

Every entry is queued once per study; a killed run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna

from merge_search.engine.learners.coefficients import FitSettings
from merge_search.objective import Objective
from merge_search.search import checks
from merge_search.search.baselines import baselines
from merge_search.search.earlier import starts_from
from merge_search.search.learning import LearnedSpace, better_start
from merge_search.search.prepare import Plan
from merge_search.search.records import questions_left
from merge_search.search.workbench import Workbench

__all__ = ["Start"]

DONE = "start_enqueued"
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
        if not self._is_done():
            seen: set[str] = set()
            for label, recipe in presets.items():
                if recipe.fingerprint not in seen and label not in queued:
                    point = plan.space.encode(recipe)
                    attrs = {"label": label, "start": label, **({} if point else {"given_recipe": recipe.to_json()})}
                    study.enqueue_trial(point or {}, user_attrs=attrs)
                seen.add(recipe.fingerprint)
        told: list[str] = list(study.user_attrs.get(EARLIER, []))
        for name, known in starts_from(plan.file, bench.models, plan.space, told, note):
            for k in known:
                if k.source not in queued:
                    study.enqueue_trial(k.point, user_attrs={"start": k.source})
            told.append(name)
            study.set_user_attr(EARLIER, told)

    def notes(self, total: int) -> list[str]:
        """Whether what comes first leaves trials for the sampler."""
        return checks.budget_notes(len(self._queued()) + (0 if self._is_done() else len(self._first_points())), total)

    def go_on(self) -> None:
        """Queue the first points, once all that was queued before is done."""
        if self._is_done() or not all(t.state.is_finished() for t in self.study.get_trials(deepcopy=False)):
            return
        queued = self._queued()
        for i, point in enumerate(self._first_points()):
            if f"start.{i}" not in queued:
                self.study.enqueue_trial(point, user_attrs={"start": f"start.{i}"})
        self.study.set_user_attr(DONE, True)

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
