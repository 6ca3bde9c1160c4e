"""The outer loop: ask, merge, evaluate, tell. The file to read first.

    references   base and every expert are scored once; they define retention
    start        the same, then average, task arithmetic, published presets, the space's first points: trials 0..n
    search       the sampler proposes, until the study has `n_trials` finished trials, over all runs
    finalists    the best few by posterior mean, and what they are compared with, on the validation questions

Everything known about a trial is stored before it is told, so a finished trial is never without its recipe,
scores, per-question answers, outcome and cost. Kill the process at any time and run the same command again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState

from merge_search.engine.learners.fit import FitSettings, Fitted
from merge_search.errors import (
    EvaluationError,
    InputError,
    NonFiniteError,
    WeightsError,
)
from merge_search.evaluation import Cost, Evaluation, Split
from merge_search.memory import is_memory_error
from merge_search.objective import Estimate, Objective, References
from merge_search.outcome import Outcome
from merge_search.recipe import Recipe
from merge_search.search import checks, samplers, storage
from merge_search.search.first_trials import Start
from merge_search.search.prepare import Plan, prepare
from merge_search.search.records import (
    ASKED_IN_VAIN,
    Record,
    finished_records,
    owners_of,
    questions_asked,
    questions_left,
    records,
    references_of,
    seconds_spent,
    store_metrics,
    stored_references,
)
from merge_search.search.start.baselines import reference_recipes
from merge_search.search.start.warm_start import LearnedSpace, warm_start
from merge_search.search.stopping import GAIN_ATTRIBUTE, expected_gain, reason_to_stop
from merge_search.search.trial import racing
from merge_search.search.trial.worker import Scored, Workbench, memory_errors_said
from merge_search.search.verdict import selection
from merge_search.seeding import derive_seed
from merge_search.space import decoded
from merge_search.study_file import StudyFile

__all__ = ["Listener", "run"]

CHARGE_EVERY = 5.0
"""Seconds between two charges of a fit that runs: what a kill may leave uncounted."""


class Listener(Protocol):
    """Told what happens; the command line prints it."""

    def note(self, text: str) -> None: ...
    def begin(self, *, total: int, finished: int) -> None: ...
    def trial(self, record: Record, *, best: Record | None, best_expert: float | None) -> None: ...
    def end(self) -> None: ...


def run(file: StudyFile, listener: Listener) -> optuna.Study:
    """Run or resume the study until it has its trials and its finalists' validation scores.

    Raises:
        StudyFileError: before any weight is loaded, with all problems.
        StudyChangedError, StorageError, WeightsError.
    """
    plan = prepare(file)
    sampler = _sampler(plan)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = storage.open_storage(file.storage_url)
    with storage.driver_lock(backend, file.storage_url, file.study.name):
        bench = Workbench(plan, device=file.device)
        of_space = getattr(plan.space, "notes", [])
        for text in (
            bench.pool.placement_report,
            *bench.pool.notes,
            *bench.live.notes,
            *of_space,
            *plan.objective.notes,
        ):
            listener.note(text)
        study = _open_study(plan, backend, sampler)
        storage.check_identity(study, plan.identity(dict(bench.models.hashes)))
        store_metrics(study, plan.metrics)
        _Driver(plan, bench, study, listener).run()
    return study


def _sampler(plan: Plan) -> BaseSampler:
    search = plan.file.search
    return samplers.make_sampler(
        search.sampler,
        parameters=plan.space.parameters,
        seed=plan.file.study.seed,
        n_objectives=len(plan.objective.names),
        **search.sampler_options,
    )


def _open_study(plan: Plan, backend: optuna.storages.RDBStorage, sampler: BaseSampler) -> optuna.Study:
    return optuna.create_study(
        study_name=plan.file.study.name,
        storage=backend,
        sampler=sampler,
        directions=list(plan.objective.directions),
        load_if_exists=True,
    )


class _Driver:
    """The loop's state: all of it can be rebuilt from the storage."""

    def __init__(self, plan: Plan, bench: Workbench, study: optuna.Study, listener: Listener) -> None:
        self.plan, self.bench, self.study, self.listener = plan, bench, study, listener
        self.objective: Objective = plan.objective
        self.fidelity = plan.file.search.fidelity
        self.racing = plan.file.search.racing
        self.constraints_judged = False

    def run(self) -> None:
        for text in storage.reclaim_lost_trials(self.study):
            self.listener.note(text)
        self.references = self._references()
        self.objective.check_references(self.references)
        self.owners = owners_of(self.objective, self.references)
        self.bench.offer_statistics(self.owners)
        self.race_weights = self._race_weights() if self.racing else None
        start = Start(self.plan, self.bench, self.study, self.objective, self.listener.note)
        total = self.plan.file.search.n_trials
        done = len(finished_records(self.study))
        best_expert = selection.best_expert(self.study, self.objective, self.plan.context.experts, self.references)
        for text in start.notes(total):
            self.listener.note(text)
        self.listener.begin(total=total, finished=done)
        try:
            while done < total and not self._spent():
                self._judge_constraints()
                start.go_on()
                record = self._one_trial()
                done += record.outcome is not Outcome.LOST
                best = selection.best(self.study, self.objective)
                self.listener.trial(record, best=best, best_expert=best_expert)
        finally:
            self.listener.end()
        selection.validate(self.study, self.plan, self._score_for_validation, note=self.listener.note)

    def _judge_constraints(self) -> None:
        """Say, once the last baseline is scored, which constraints none of them meets."""
        if self.constraints_judged:
            return
        found = [r for r in records(self.study) if r.label]
        if all(r.outcome is not None for r in found):
            self.constraints_judged = True
            for text in checks.constraint_notes(found, self.objective, self.references):
                self.listener.note(text)

    def _spent(self) -> bool:
        """Whether the budget in hours or questions is used up, over all runs, or the stop rule says so."""
        budget = self.plan.file.search
        if budget.stop is not None and (reason := reason_to_stop(finished_records(self.study), budget.stop)):
            self.listener.note(reason)
            return True
        if budget.questions is not None and (asked := questions_asked(self.study)) >= budget.questions:
            self.listener.note(f"{asked} of {budget.questions} questions are asked: the search ends here")
            return True
        if budget.hours is not None and (seconds := seconds_spent(self.study)) >= 3600 * budget.hours:
            self.listener.note(f"{seconds / 3600:.2f} of {budget.hours:g} hours are used: the search ends here")
            return True
        return False

    # -- references ----------------------------------------------------------------------------------------------

    def _references(self) -> References:
        """Base and experts, each scored once and stored at once."""
        for name, recipe in reference_recipes(self.plan.context).items():
            key = f"reference.{name}"
            if key in self.study.user_attrs:
                continue
            try:
                with self._kept_if_in_vain(), memory_errors_said(f"while {name!r} is scored"):
                    scored = self.bench.score(recipe, Split.SEARCH, self.fidelity)
            except (NonFiniteError, EvaluationError) as error:
                raise WeightsError(
                    f"{name!r} itself cannot be scored, so nothing can be compared with it: {error}"
                ) from error
            stored = {"evaluation": scored.evaluation.to_attribute(), "weights_sha256": scored.weights_sha256}
            self.study.set_user_attr(key, stored)
        return references_of(self.study, self.plan.metrics, self.plan.context.experts)

    @contextmanager
    def _kept_if_in_vain(self) -> Iterator[None]:
        """Count what is asked inside also if it ends in the middle."""
        before = self.bench.asked
        try:
            yield
        except BaseException:
            lost = self.study.user_attrs.get(ASKED_IN_VAIN, 0)
            self.study.set_user_attr(ASKED_IN_VAIN, lost + self.bench.asked - before)
            raise

    def _race_weights(self) -> dict[str, float] | None:
        """Weights of the metrics in the one objective; None, with a note, where prefixes cannot be compared or joined."""
        stored = (data["evaluation"] for data in stored_references(self.study).values())
        found = [s for data in stored for s in Evaluation.from_attribute(data).scores.values()]
        weights = self.objective.weights(self.references)
        if len(self.objective.names) == 1 and weights is not None and all(s.is_mean for s in found):
            return weights
        self.listener.note("racing is off: it needs one objective that is a weighted sum of means over questions")
        return None

    # -- trials --------------------------------------------------------------------------------------------------

    def _one_trial(self) -> Record:
        trial = self.study.ask()
        with self._recorded(trial):
            recipe, settings = self._point(trial)
            self._note_gain(trial)
            self._keep_recipe(trial, recipe)
            if settings is None:
                scored = self._known(trial, recipe) or self._race(trial, recipe)
            else:
                fitted = self._fit(trial, recipe, settings)
                scored = self._race(trial, fitted.recipe)
                scored = replace(scored, extra=Cost(fitted.seconds, 0.0, fitted.questions))
            self._tell(trial, scored)
        return Record.of(self.study._storage.get_trial(trial._trial_id))

    def _point(self, trial: Trial) -> tuple[Recipe, dict[str, Any] | None]:
        """Recipe and learner's settings: of a baseline outside the space as queued, else of the trial's point."""
        given, settings, space = trial.user_attrs.get("given_recipe"), None, self.plan.space
        if given is not None:
            recipe = Recipe.from_json(given)
        else:
            point = samplers.suggest(trial, space.parameters)
            recipe = decoded(space, point)
            if isinstance(space, LearnedSpace):
                number = trial.user_attrs.get("retry_of", trial.number)  # other rows each time, but for a second try
                seed = derive_seed(self.plan.file.study.seed, "learner", number)
                wanted = space.settings(point, seed=seed)
                settings = self._affordable(wanted)
                if settings != wanted:
                    trial.set_user_attr(samplers.CUT_ATTRIBUTE, True)
        return recipe.model_copy(update={"models": self.bench.models}), settings

    def _affordable(self, settings: dict[str, Any] | None) -> dict[str, Any] | None:
        """Learner's settings with as many steps as the budget in questions still pays for; None for none."""
        left = questions_left(self.study, self.plan.file.search.questions)
        if settings is None or left is None:
            return settings
        steps = self.bench.affordable_steps(FitSettings(**settings), left)
        return {**settings, "steps": steps} if steps > 0 else None

    def _note_gain(self, trial: Trial) -> None:
        """Store what the stop rule reads: what the sampler's own suggestions promise."""
        if self.plan.file.search.stop is None or {"start", "retry_of"} & trial.user_attrs.keys():
            return
        seed = derive_seed(self.plan.file.study.seed, "stop", trial.number)
        found = expected_gain(self.study, self.plan.space.parameters, trial.params, number=trial.number, seed=seed)
        if found is not None:
            trial.set_user_attr(GAIN_ATTRIBUTE, list(found))

    @staticmethod
    def _keep_recipe(trial: Trial, recipe: Recipe) -> None:
        trial.set_user_attr("recipe", recipe.to_json())
        trial.set_user_attr("fingerprint", recipe.fingerprint)

    def _fit(self, trial: Trial, recipe: Recipe, settings: dict[str, Any]) -> Fitted:
        """The trial's inner level; what it found replaces the trial's recipe, and is stored at once."""
        learner = self.plan.file.search.learner
        start = None
        if learner is not None and learner.warm_start:
            recipe, start = warm_start(recipe, self.study, self.objective)
        fitted = self.bench.fit(recipe, FitSettings(**settings), self.owners)
        self._keep_recipe(trial, fitted.recipe)
        trial.set_user_attr("cost", [fitted.seconds, 0.0, fitted.questions])
        losses = {
            t: [float(a), float(b)] for t, a, b in zip(fitted.tasks, fitted.losses[0], fitted.losses[-1], strict=True)
        }
        began_at = None if start is None else start.number
        trial.set_user_attr("learner", {**settings, "losses": losses, "began_at": began_at, "n": fitted.n_coefficients})
        return fitted

    def _known(self, trial: Trial, recipe: Recipe) -> Scored | None:
        """Scores of the same recipe from the references or an earlier trial: never asked twice."""
        stored = self.study.user_attrs.get(f"reference.{trial.user_attrs.get('label')}")
        if stored is None:
            for t in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                if t.user_attrs.get("fingerprint") == recipe.fingerprint and t.user_attrs["outcome"] == Outcome.OK:
                    stored = t.user_attrs
                    trial.set_user_attr("same_as", t.number)
                    break
        if stored is None:
            return None
        return Scored(Evaluation.from_attribute(stored["evaluation"]), stored["weights_sha256"])

    def _race(self, trial: Trial, recipe: Recipe) -> Scored:
        """Score on the search questions; a candidate that is clearly worse than the incumbent is stopped at a look."""
        digest, seconds = self.bench.splice(recipe)
        incumbent = selection.best(self.study, self.objective)
        weights = self.race_weights
        if self.racing is None or weights is None or incumbent is None or "label" in trial.user_attrs:
            return Scored(self.bench.ask(Split.SEARCH, self.fidelity), digest, seconds)
        looks, evaluation, after = [*self.racing.looks, 1.0], None, 0.0
        for look in looks:
            part = self.bench.ask(Split.SEARCH, look * self.fidelity, after=after * self.fidelity)
            evaluation, after = part if evaluation is None else evaluation.joined(part), look
            if look < 1 and racing.is_hopeless(
                evaluation, incumbent.evaluation, weights, error=self.racing.error, looks=len(self.racing.looks)
            ):
                full = [r.evaluation for r in finished_records(self.study) if r.outcome is Outcome.OK]
                carried = racing.carried_to_all(evaluation, racing.panel_of(full))
                return Scored(carried, digest, seconds, Outcome.RACED)
        assert evaluation is not None
        return Scored(evaluation, digest, seconds)

    def _tell(self, trial: Trial, scored: Scored) -> None:
        values = self.objective.values(scored.evaluation, self.references)
        violations = self.objective.violations(scored.evaluation, self.references)
        self._store(trial, scored, values, violations)
        for text, amount in violations.items():
            trial.set_constraint(text, amount.value)
        trial.set_user_attr("outcome", str(scored.outcome))
        self.study.tell(trial, [v.value for v in values])

    def _store(self, trial: Trial, scored: Scored, values: list[Estimate], violations: dict[str, Estimate]) -> None:
        cost = Cost() if "same_as" in trial.user_attrs else scored.evaluation.cost + scored.extra
        trial.set_user_attr("evaluation", scored.evaluation.to_attribute())
        trial.set_user_attr("weights_sha256", scored.weights_sha256)
        trial.set_user_attr("cost", [scored.merge_s + cost.merge_s, cost.evaluate_s, cost.questions])
        trial.set_user_attr("fidelity", scored.evaluation.fidelity / self.fidelity)
        noise: dict[str, Any] = {f"constraint:{text}": amount.variance for text, amount in violations.items()}
        variances = [v.variance for v in values]
        noise |= {"value": variances[0]} if len(variances) == 1 else {"values": variances}
        trial.set_user_attr("noise", noise)

    @contextmanager
    def _recorded(self, trial: Trial) -> Iterator[None]:
        """A failure ends the trial with its outcome and reason, not the study."""
        began, before = time.perf_counter(), self.bench.asked
        self.bench.on_step = self._charging(trial, began, before)
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_memory_error(error):
                raise
            outcome, reason = Outcome.OUT_OF_MEMORY, str(error)
        except NonFiniteError as error:
            outcome, reason = Outcome.NON_FINITE, str(error)
        except EvaluationError as error:
            outcome, reason = Outcome.EVALUATOR_ERROR, str(error)
        except InputError as error:
            outcome, reason = Outcome.MERGE_ERROR, str(error)
        except KeyboardInterrupt:  # the trial is lost and tried again, but what it asked is asked
            trial.set_user_attr(storage.INTERRUPTED, True)
            self._charge(trial, began, before)
            raise
        else:
            return
        self.bench.recover()
        trial.set_user_attr("outcome", str(outcome))
        trial.set_user_attr("reason", reason[:2000])
        self._charge(trial, began, before)
        self.study.tell(trial, state=TrialState.FAIL)

    def _charging(self, trial: Trial, began: float, before: int) -> Callable[[], None]:
        """Charge what a long fit has asked so far now and then: a process that is killed in it cannot do so any more."""
        charged = began

        def charge() -> None:
            nonlocal charged
            if time.perf_counter() - charged >= CHARGE_EVERY:
                self._charge(trial, began, before)
                charged = time.perf_counter()

        return charge

    def _charge(self, trial: Trial, began: float, before: int) -> None:
        """Store what a trial that began then, after so many questions, has cost until now."""
        fit_s = trial.user_attrs.get("cost", (0.0,))[0]  # of a fit that went well
        trial.set_user_attr("cost", [fit_s, time.perf_counter() - began - fit_s, self.bench.asked - before])

    def _score_for_validation(self, recipe: Recipe) -> Evaluation:
        try:
            with memory_errors_said("on the validation questions"):
                return self.bench.score(recipe, Split.VALIDATION).evaluation
        except (NonFiniteError, EvaluationError):
            self.bench.recover()
            raise
