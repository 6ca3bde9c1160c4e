"""The search's outer loop: ask, wait for any result, tell. The file to read first.

    references   base and every expert are scored once; they define retention
    first        the same, then average, task arithmetic, published presets and the space's first points
    search       the sampler proposes, until the study has `n_trials` finished trials over all runs
    exact forms  of the finalists, on top of `n_trials`, where the space approximates (`SearchSpace.exact_form`)
    validation   the finalists, by posterior mean, and what they are compared with, on the validation questions

Everything found in a trial is stored before the trial is told. So a finished trial always has its recipe, scores,
per-question answers, outcome and cost. Kill the process at any time and run the same command again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import nullcontext
from typing import Protocol

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from merge_search.errors import EvaluationError, NonFiniteError, StudyFileError, WeightsError
from merge_search.evaluation import Evaluation, Split
from merge_search.objective import References
from merge_search.outcome import Outcome
from merge_search.recipe import Recipe
from merge_search.search import checks, samplers, storage
from merge_search.search.budget import ASKED_IN_VAIN, Budget
from merge_search.search.first_trials import FirstTrials
from merge_search.search.plan import Plan
from merge_search.search.prepare import prepare, wrong_gold
from merge_search.search.records import (
    Record,
    best,
    best_expert,
    candidates,
    finished_records,
    records,
    references_of,
    store_metrics,
    stored_references,
    teachers_of,
)
from merge_search.search.start.baselines import reference_recipes
from merge_search.search.start.learned_space import with_stored_loss
from merge_search.search.stopping import reason_to_stop
from merge_search.search.trial.executor import Executor, LocalExecutor
from merge_search.search.trial.job import Failed, Job, Report, Scored, Spent
from merge_search.search.trial.racing import comparable_weights
from merge_search.search.trial.trial import StudyInProgress, TrialInProgress
from merge_search.search.verdict.selection import finalists
from merge_search.search.verdict.validation import validate
from merge_search.stop_signals import stoppable
from merge_search.study_file import StudyFile

__all__ = ["Listener", "run"]

EXACT = "exact."
"""Before the number of a trial: what the exact form of its recipe is queued as."""


class Listener(Protocol):
    """Follows a search; the command line's prints it."""

    def note(self, text: str) -> None: ...
    def begin(self, *, total: int, finished: int) -> None: ...
    def trial(self, record: Record, *, best: Record | None, best_expert: float | None) -> None: ...
    def end(self) -> None: ...


def run(file: StudyFile, listener: Listener, *, stop_on_signals: bool = False) -> optuna.Study:
    """Run or resume the study until it has its trials and its finalists' validation scores.

    A `KeyboardInterrupt` stops it: running trials are marked, and their questions are charged.

    Args:
        file: The study file.
        listener: Follows the search.
        stop_on_signals: Whether SIGTERM and SIGUSR1 stop it as Ctrl-C does. Without it no signal handler is touched.

    Raises:
        StudyFileError: The study file has problems. It lists all of them, before any weight is loaded.
        StudyChangedError: The stored study was made with other settings.
        StorageError: The storage cannot be used.
        WeightsError: A checkpoint cannot be used, or base or an expert cannot be scored.
    """
    with stoppable() if stop_on_signals else nullcontext():
        return _run(file, listener)


def _run(file: StudyFile, listener: Listener) -> optuna.Study:
    plan = prepare(file)
    sampler = _sampler(plan)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = storage.open_storage(file.storage_url)
    with storage.driver_lock(backend, file.storage_url, file.study.name):
        executor = LocalExecutor(plan, device=file.device)
        try:
            study = _open_study(plan, backend, sampler)
            stored = study.user_attrs.get("identity")
            if stored is None and (problems := wrong_gold(file, plan.evaluators)):
                raise StudyFileError(problems, where=file.path.name)
            plan = with_stored_loss(plan.resuming(stored), stored)
            for text in (*executor.notes, *plan.space.notes, *plan.objective.notes, *plan.notes):
                listener.note(text)
            storage.check_identity(study, plan.identity(executor.models.hashes))
            store_metrics(study, plan.metrics)
            _Driver(plan, study, executor, listener).run()
        finally:
            executor.shutdown()
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
    """The loop and its state, all of which can be rebuilt from the storage."""

    def __init__(self, plan: Plan, study: optuna.Study, executor: Executor, listener: Listener) -> None:
        self.plan, self.study, self.executor, self.listener = plan, study, executor, listener
        self.search = plan.file.search
        self.budget = Budget(self.search, study)
        self.constraints_judged = self.is_spent = False

    def run(self) -> None:
        for text in storage.reclaim_lost_trials(self.study):
            self.listener.note(text)
        self.references = self._references()
        self.plan.objective.check_references(self.references)
        for text in self.plan.objective.weight_notes(self.references):
            self.listener.note(text)
        self.executor.set_teachers(teachers_of(self.plan.objective, self.references))
        weights = self._race_weights() if self.search.racing else None
        self.in_progress = StudyInProgress(self.plan, self.study, self.executor, self.references, weights)
        self.first = FirstTrials(self.plan, self.study, self.executor, self.listener.note)
        for text in self.first.notes(self.search.n_trials):
            self.listener.note(text)
        self.done = len(finished_records(self.study))
        self.listener.begin(total=self.search.n_trials, finished=self.done)
        try:
            self._run_trials(self._may_begin)
            if self._queue_exact_forms():
                self._run_trials(lambda n_running: bool(waiting_exact_forms(self.study)))
        finally:
            self.listener.end()
        validate(self.study, self.plan, self._score_for_validation, note=self.listener.note)

    # -- the loop ------------------------------------------------------------------------------------------------

    def _run_trials(self, may_begin: Callable[[int], bool]) -> None:
        """Ask for trials while the executor has room, wait until any has ended, and tell those that have.

        Args:
            may_begin: Whether another trial should begin beside so many that run.
        """
        experts = self.plan.context.experts
        expert = best_expert(self.study, self.plan.objective, experts, self.references)
        running: list[TrialInProgress] = []
        try:
            while True:
                while len(running) < self.executor.capacity and may_begin(len(running)):
                    trial = TrialInProgress.ask(self.in_progress)
                    running.append(trial)
                    trial.start()
                if not running:
                    return
                wait([trial.future for trial in running], return_when=FIRST_COMPLETED)
                for trial in [trial for trial in running if trial.future.done()]:
                    record = trial.finish()
                    running.remove(trial)
                    self.done += record.outcome is not Outcome.LOST
                    self.listener.trial(record, best=best(self.study, self.plan.objective), best_expert=expert)
        except KeyboardInterrupt:
            storage.mark_interrupted(self.study)  # first, and also a trial whose point was just being suggested
            for trial in running:
                trial.interrupt()
            raise

    def _may_begin(self, n_running: int) -> bool:
        """Whether another trial should begin beside those that run."""
        if self.is_spent or self.done + n_running >= self.search.n_trials:
            return False
        if reason := self._reason_to_end():
            self.is_spent = True
            self.listener.note(reason)
            return False
        self._judge_constraints()
        return self.first.go_on() or n_running == 0

    def _queue_exact_forms(self) -> bool:
        """Queue the exact forms of the finalists that are not tried yet, once the search has ended.

        Returns:
            Whether any waits. False without a note where the space approximates nothing.
        """
        plan, seed = self.plan, self.plan.file.study.seed
        if not any(plan.space.exact_form(r.recipe) for r in candidates(self.study) if not r.label):
            return bool(waiting_exact_forms(self.study))
        top = finalists(self.study, plan.objective, plan.space.parameters, seed=seed, n=self.search.finalists)
        forms = {f"{EXACT}{r.number}": plan.space.exact_form(r.recipe) for r in top}
        starts = {t.user_attrs.get("start") for t in self.study.get_trials(deepcopy=False)}
        wanted = {name: recipe for name, recipe in forms.items() if recipe is not None and name not in starts}
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if wanted and (reason := self.budget.used_up() or ("other trials wait" if waiting else "")):
            self.listener.note(f"the finalists are not merged exactly: {reason}")
            return False
        for name, recipe in wanted.items():
            self.study.enqueue_trial({}, user_attrs={"start": name, "given_recipe": recipe.to_json()})
        return bool(waiting_exact_forms(self.study))

    def _reason_to_end(self) -> str:
        """A sentence that says why the search ends before its last trial; '' to go on."""
        stop = self.search.stop
        reason = "" if stop is None else reason_to_stop(finished_records(self.study), stop)
        return reason or self.budget.used_up()

    def _judge_constraints(self) -> None:
        """Note, once the last baseline is scored, which constraints no baseline meets."""
        if self.constraints_judged:
            return
        baselines = [r for r in records(self.study) if r.label]
        if all(r.outcome is not None for r in baselines):
            self.constraints_judged = True
            for text in checks.constraint_notes(baselines, self.plan.objective, self.references):
                self.listener.note(text)

    # -- base and experts, validation ----------------------------------------------------------------------------

    def _references(self) -> References:
        """Score base and experts, each once, and store each score at once."""
        for name, recipe in reference_recipes(self.plan.context).items():
            key = f"reference.{name}"
            if key in self.study.user_attrs:
                continue
            try:
                scored = self._score_reference(name, recipe)
            except (NonFiniteError, EvaluationError) as error:
                raise WeightsError(
                    f"{name!r} itself cannot be scored, so nothing can be compared with it: {error}"
                ) from error
            stored = {"evaluation": scored.evaluation.to_attribute(), "weights_sha256": scored.weights_sha256}
            self.study.set_user_attr(key, stored)
        stored_scores = {n: data["evaluation"] for n, data in stored_references(self.study).items()}
        for text in checks.answer_notes({n: Evaluation.from_attribute(e).answers for n, e in stored_scores.items()}):
            self.listener.note(text)
        return references_of(self.study, self.plan.metrics, self.plan.context.experts)

    def _score_reference(self, name: str, recipe: Recipe) -> Scored:
        """Score base or an expert. If this does not complete, its questions are counted all the same."""
        asked = 0

        def report(report: Report) -> None:
            nonlocal asked
            asked = report.questions if isinstance(report, Spent) else asked

        try:
            job = Job(recipe.to_json(), fidelity=self.plan.fidelity)
            result = self.executor.submit(job, report).result()
            if isinstance(result, Failed):
                raise result.to_error(f"while {name!r} is scored")
        except BaseException:
            self.study.set_user_attr(ASKED_IN_VAIN, self.study.user_attrs.get(ASKED_IN_VAIN, 0) + asked)
            raise
        return result

    def _race_weights(self) -> dict[str, float] | None:
        """Weights of the metrics in the objective; None, with a note, if candidates cannot be raced."""
        evaluations = [Evaluation.from_attribute(data["evaluation"]) for data in stored_references(self.study).values()]
        weights = comparable_weights(self.plan.objective, self.references, evaluations)
        if weights is None:
            self.listener.note("racing is off: it needs one objective that is a weighted sum of means over questions")
        return weights

    def _score_for_validation(self, recipe: Recipe) -> Evaluation:
        result = self.executor.submit(Job(recipe.to_json(), Split.VALIDATION)).result()
        if isinstance(result, Failed):
            raise result.to_error("on the validation questions")
        return result.evaluation


def waiting_exact_forms(study: optuna.Study) -> list[FrozenTrial]:
    """The waiting trials if all of them are exact forms, or second tries of lost ones; else none."""
    trials = study.get_trials(deepcopy=False)
    exact = {t.number for t in trials if str(t.user_attrs.get("start", "")).startswith(EXACT)}
    waiting = [t for t in trials if t.state == TrialState.WAITING]
    return waiting if all(t.user_attrs.get("retry_of", t.number) in exact for t in waiting) else []
