"""One trial: from a point to its stored end.

    asked      the study gives a queued baseline, a first point or the sampler's point
    prepared   the point is decoded, its recipe is stored, and becomes a job
    running    a worker fits the recipe if the point says so, and scores it; its reports are stored as they come
    finished   everything found is stored, then the trial is told

A failure ends the trial with a typed outcome, a reason and a cost, and the study goes on.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from merge_search._compat.optuna import stored
from merge_search.evaluation import Cost, Evaluation
from merge_search.objective import Estimate, References
from merge_search.outcome import Outcome
from merge_search.recipe import Recipe
from merge_search.rules import TRANSFORMS
from merge_search.search import samplers, storage
from merge_search.search.budget import START_SCORE, Budget, affordable_steps
from merge_search.search.plan import Plan
from merge_search.search.process_record import PROCESS, this_process
from merge_search.search.records import Record, best, finished_records
from merge_search.search.start.learned_space import LearnedSpace
from merge_search.search.start.warm_start import warm_start
from merge_search.search.stopping import GAIN_ATTRIBUTE, expected_gain
from merge_search.search.trial import racing
from merge_search.search.trial.executor import Executor
from merge_search.search.trial.job import Failed, Job, Report, Result, Scored, Spent, failure_of
from merge_search.seeding import derive_seed
from merge_search.space import decoded

__all__ = ["CHARGE_EVERY", "StudyInProgress", "TrialInProgress"]

CHARGE_EVERY = 5.0
"""Seconds between two charges of a running fit. A kill leaves at most the questions of that time uncounted."""


@dataclass(frozen=True)
class StudyInProgress:
    """What all trials of a running study need.

    Attributes:
        plan: The checked study file.
        study: The stored study.
        executor: Runs the trials' jobs.
        references: Scores of base and experts.
        race_weights: Weights of the metrics in the objective; None if candidates are not raced.
    """

    plan: Plan
    study: optuna.Study
    executor: Executor
    references: References
    race_weights: dict[str, float] | None

    @property
    def budget(self) -> Budget:
        return Budget(self.plan.file.search, self.study)


class TrialInProgress:
    """A trial that has been asked for and is not told yet.

    Attributes:
        future: Of its result, once it is started.
    """

    def __init__(self, study: StudyInProgress, trial: Trial) -> None:
        self._s, self._trial = study, trial
        self._search, self._fidelity = study.plan.file.search, study.plan.fidelity
        self._began = self._charged = time.perf_counter()
        self._questions = 0
        self._settings: dict[str, Any] | None = None
        self._began_at: int | None = None
        self.future: Future[Result] = Future()

    @classmethod
    def ask(cls, study: StudyInProgress) -> TrialInProgress:
        """The study's next trial: the first one in its queue, else one for the sampler to place."""
        return cls(study, study.study.ask())

    # -- from a point to a job -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Decode the trial's point and submit its job. Scores that are known already are not asked for again."""
        step: Job | Result
        self._trial.set_user_attr(PROCESS, this_process())
        try:
            step = self._prepared()
        except Exception as error:
            failed = failure_of(error)
            if failed is None:
                raise
            step = failed
        if isinstance(step, Job):
            self.future = self._s.executor.submit(step, self._report)
        else:
            self.future.set_result(step)

    def _prepared(self) -> Job | Scored:
        recipe = self._recipe()
        self._note_gain()
        self._keep_recipe(recipe)
        if self._settings is None and (known := self._known_scores(recipe)) is not None:
            return known
        if self._settings is not None and self._may_go_on_from_another():
            recipe, start = warm_start(recipe, self._s.study, self._s.plan.objective)
            self._began_at = None if start is None else start.number
        return Job(recipe.to_json(), fidelity=self._fidelity, fit=self._settings, race=self._race())

    def _recipe(self) -> Recipe:
        """The recipe that was queued with a baseline outside the space, else that of the trial's point.

        A point of a learned space also sets the learner's settings.
        """
        space, given = self._s.plan.space, self._trial.user_attrs.get("given_recipe")
        settings: dict[str, Any] | None = None
        # Each trial draws other rows, but a second try of a lost trial draws the same rows again.
        number = self._trial.user_attrs.get("retry_of", self._trial.number)
        seed = derive_seed(self._s.plan.file.study.seed, "learner", number)
        if given is not None:
            recipe = Recipe.from_json(given)
            if (fit := self._trial.user_attrs.get("given_fit")) is not None:
                settings = {**fit, "seed": seed}
        else:
            point = samplers.suggest(self._trial, space.parameters)
            recipe = decoded(space, point)
            if isinstance(space, LearnedSpace):
                settings = None if _is_final(recipe) else space.settings(point, seed=seed)
        self._settings = self._affordable(settings)
        if self._settings != settings:
            self._trial.set_user_attr(samplers.CUT_ATTRIBUTE, True)
        return recipe.model_copy(update={"models": self._s.executor.models})

    def _may_go_on_from_another(self) -> bool:
        """Whether the fit may begin at an earlier trial's coefficients; a baseline's begins at its own."""
        learner = self._search.learner
        return learner is not None and learner.warm_start and "given_fit" not in self._trial.user_attrs

    def _affordable(self, settings: dict[str, Any] | None) -> dict[str, Any] | None:
        """The settings with as many steps as the budget in questions still pays for; None if it pays for none."""
        left = self._s.budget.questions_left()
        if settings is None or left is None:
            return settings
        steps = affordable_steps(settings, left, self._s.executor.fit_questions)
        return {**settings, "steps": steps} if steps > 0 else None

    def _note_gain(self) -> None:
        """Store the expected gain that the stop rule reads, for points that the sampler suggested."""
        trial, plan = self._trial, self._s.plan
        if self._search.stop is None or {"start", "retry_of"} & trial.user_attrs.keys():
            return
        seed = derive_seed(plan.file.study.seed, "stop", trial.number)
        gain = expected_gain(self._s.study, plan.space.parameters, trial.params, number=trial.number, seed=seed)
        if gain is not None:
            trial.set_user_attr(GAIN_ATTRIBUTE, list(gain))

    def _keep_recipe(self, recipe: Recipe) -> None:
        self._trial.set_user_attr("recipe", recipe.to_json())
        self._trial.set_user_attr("fingerprint", recipe.fingerprint)

    def _known_scores(self, recipe: Recipe) -> Scored | None:
        """Scores of the same recipe from the references or an earlier trial; None if it was never scored."""
        study = self._s.study
        attributes = study.user_attrs.get(f"reference.{self._trial.user_attrs.get('label')}")
        if attributes is None:
            for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                if t.user_attrs.get("fingerprint") == recipe.fingerprint and t.user_attrs["outcome"] == Outcome.OK:
                    attributes = t.user_attrs
                    self._trial.set_user_attr("same_as", t.number)
                    break
        if attributes is None:
            start = study.user_attrs.get(START_SCORE, {})
            if start.get("fingerprint") != recipe.fingerprint:
                return None
            known = Evaluation.from_attribute(start["evaluation"])
            return Scored(replace(known, cost=Cost()), start["weights_sha256"])  # the study was charged
        return Scored(Evaluation.from_attribute(attributes["evaluation"]), attributes["weights_sha256"])

    def _race(self) -> racing.Race | None:
        """The race against the incumbent; None for a baseline, or if there is no incumbent or no race."""
        settings, weights = self._search.racing, self._s.race_weights
        if settings is None or weights is None or "label" in self._trial.user_attrs:
            return None
        incumbent = best(self._s.study, self._s.plan.objective)
        if incumbent is None:
            return None
        return racing.Race(settings.looks, settings.error, weights, incumbent.evaluation)

    # -- while its job runs --------------------------------------------------------------------------------------

    def _report(self, report: Report) -> None:
        """Store what a running job reports, since a process that is killed cannot store it any more."""
        if isinstance(report, Spent):
            self._questions = report.questions
            if time.perf_counter() - self._charged >= CHARGE_EVERY:
                self._charge()
                self._charged = time.perf_counter()
            return
        self._keep_recipe(Recipe.from_json(report.recipe))
        self._trial.set_user_attr("cost", [report.seconds, 0.0, report.questions])
        learned = {"losses": dict(report.losses), "began_at": self._began_at, "n": report.n_coefficients}
        self._trial.set_user_attr("learner", {**(self._settings or {}), **learned})

    def interrupt(self) -> None:
        """The user stops the run. The trial is lost and tried again; its questions so far are counted."""
        if stored(self._s.study, self._trial).state.is_finished():
            return
        self._trial.set_user_attr(storage.INTERRUPTED, True)
        self._charge()

    def _charge(self) -> None:
        """Store the cost of the trial until now."""
        fit_s = self._trial.user_attrs.get("cost", (0.0,))[0]  # of a fit that completed
        self._trial.set_user_attr("cost", [fit_s, time.perf_counter() - self._began - fit_s, self._questions])

    # -- its end -------------------------------------------------------------------------------------------------

    def finish(self) -> Record:
        """Store the job's result and tell the trial."""
        result = self.future.result()
        if isinstance(result, Failed):
            self._fail(result)
        else:
            self._questions = result.evaluation.cost.questions + result.extra.questions
            self._tell(self._on_all_questions(result))
        return Record.of(stored(self._s.study, self._trial))

    def _fail(self, failed: Failed) -> None:
        self._questions = failed.questions
        self._trial.set_user_attr("outcome", str(failed.outcome))
        self._trial.set_user_attr("reason", failed.reason[:2000])
        self._charge()
        self._s.study.tell(self._trial, state=TrialState.FAIL)

    def _on_all_questions(self, scored: Scored) -> Scored:
        """The scores; those of a stopped candidate are carried from its prefix to all questions."""
        if scored.outcome is not Outcome.RACED:
            return scored
        full = [r.evaluation for r in finished_records(self._s.study) if r.outcome is Outcome.OK]
        return replace(scored, evaluation=racing.carried_to_all(scored.evaluation, racing.panel_of(full)))

    def _tell(self, scored: Scored) -> None:
        objective, references = self._s.plan.objective, self._s.references
        values = objective.values(scored.evaluation, references)
        violations = objective.violations(scored.evaluation, references)
        self._store(scored, values, violations)
        for text, amount in violations.items():
            self._trial.set_constraint(text, amount.value)
        self._trial.set_user_attr("outcome", str(scored.outcome))
        self._s.study.tell(self._trial, [v.value for v in values])

    def _store(self, scored: Scored, values: list[Estimate], violations: dict[str, Estimate]) -> None:
        trial = self._trial
        cost = Cost() if "same_as" in trial.user_attrs else scored.evaluation.cost + scored.extra
        trial.set_user_attr("evaluation", scored.evaluation.to_attribute())
        trial.set_user_attr("weights_sha256", scored.weights_sha256)
        trial.set_user_attr("cost", [scored.merge_s + cost.merge_s, cost.evaluate_s, cost.questions])
        trial.set_user_attr("fidelity", scored.evaluation.fidelity / self._fidelity)
        noise: dict[str, Any] = {f"constraint:{text}": amount.variance for text, amount in violations.items()}
        variances = [v.variance for v in values]
        noise |= {"value": variances[0]} if len(variances) == 1 else {"values": variances}
        trial.set_user_attr("noise", noise)


def _is_final(recipe: Recipe) -> bool:
    """Whether the recipe's transform leaves nothing to merge, and so nothing to fit."""
    transform = recipe.transform
    return transform is not None and transform.name in TRANSFORMS and not TRANSFORMS[transform.name].merges
