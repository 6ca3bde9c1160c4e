"""The sealed test questions, opened once per study for the trials that search and validation chose."""

from __future__ import annotations

from typing import Any

import optuna

from merge_search.errors import EvaluationError, MergeSearchError, StudyFileError, first_line
from merge_search.evaluation import Evaluation, Split
from merge_search.search import storage
from merge_search.search.plan import Plan
from merge_search.search.records import Record, objective_of, references_of, teachers_of
from merge_search.search.trial.executor import Executor, LocalExecutor
from merge_search.search.trial.job import Failed, Job
from merge_search.search.verdict import selection
from merge_search.search.verdict.validation import store_failures, to_validate

__all__ = ["open_test"]


def open_test(plan: Plan) -> optuna.Study:
    """Score the winner, or the front, and what it is compared with on the test questions.

    Opened again, it keeps the scores of the first time and adds those that are missing. A rival that cannot be scored
    is left out, and `selection.failures` has the reason.

    Raises:
        EvaluationError: The winner, or a merge of the front, cannot be scored.
        StudyFileError: There is nothing to test yet, or the search has not ended. Or the study went on and has another
            winner than the tested one (`selection.outdated_test` says what to do).
        StudyChangedError: The study file was changed, so its test questions may have been asked in the search.
    """
    study = storage.load_study(plan.file)
    plan = plan.resuming(study.user_attrs.get("identity"))
    backend = storage.open_storage(plan.file.storage_url)
    with storage.driver_lock(backend, plan.file.storage_url, plan.file.study.name):
        outdated = selection.outdated_test(study, plan.objective, plan.context.experts)
        if outdated and all(str(n) in study.user_attrs.get("test", {}) for n in selection.tested(study)):
            raise StudyFileError(outdated)
        objective_of(study)  # raises if the study has not begun
        storage.check_identity(study, plan.identity(study.user_attrs["identity"]["models"]))
        sealed_for = study.user_attrs.get("test_winner") if outdated else _sealed_for(study, plan)
        study.set_user_attr("test_winner", sealed_for)
        missing = _missing(study, plan)
        if missing:
            executor = _executor(study, plan)
            try:
                _score_all(study, executor, missing)
            finally:
                executor.shutdown()
        else:
            store_failures(study, "test", {})
    if outdated:
        raise StudyFileError(outdated)
    return study


def _missing(study: optuna.Study, plan: Plan) -> list[Record]:
    """The trials without a test score, the chosen ones first, so that a failing rival does not keep them from one."""
    scored, chosen = study.user_attrs.get("test", {}), selection.tested(study)
    missing = [r for r in selection.compared(study, plan.objective) if str(r.number) not in scored]
    return sorted(missing, key=lambda r: r.number not in chosen)


def _score_all(study: optuna.Study, executor: Executor, missing: list[Record]) -> None:
    """Score the trials on the test questions; each score is stored at once."""
    scored: dict[str, Any] = dict(study.user_attrs.get("test", {}))
    chosen, failed = selection.tested(study), dict[str, str]()
    for record in missing:
        try:
            scored[str(record.number)] = _score(executor, record).to_attribute()
        except MergeSearchError as error:
            if record.number in chosen:
                raise EvaluationError(
                    f"{record.name} was chosen and cannot be scored on the test questions: {error}"
                ) from error
            failed[str(record.number)] = first_line(error)
            continue
        study.set_user_attr("test", scored)
    store_failures(study, "test", failed)


def _score(executor: Executor, record: Record) -> Evaluation:
    recipe = record.recipe.model_copy(update={"models": executor.models})
    result = executor.submit(Job(recipe.to_json(), Split.TEST)).result()
    if isinstance(result, Failed):
        raise result.to_error(f"while {record.name} is tested")
    return result.evaluation


def _executor(study: optuna.Study, plan: Plan) -> Executor:
    """An executor that can merge everything the study merged, also recipes that need statistics from data."""
    executor = LocalExecutor(plan, device=plan.file.device)
    storage.check_identity(study, plan.identity(executor.models.hashes))
    teachers = teachers_of(plan.objective, references_of(study, plan.metrics, plan.context.experts))
    executor.set_teachers(teachers)
    return executor


def _sealed_for(study: optuna.Study, plan: Plan) -> int | list[int]:
    """The number of the winner, or those of the front, once search and validation have ended."""
    chosen = [r.number for r in selection.champions(study, plan.objective, plan.context.experts)]
    if not chosen:
        raise StudyFileError(selection.nothing_to_hand_over(study))
    validated = study.user_attrs.get("validation", {}).keys() | study.user_attrs.get("validation_failed", {}).keys()
    seed, n = plan.file.study.seed, plan.file.search.finalists
    wanted = to_validate(study, plan.objective, plan.space.parameters, seed=seed, n=n)
    lacking = [r.name for r in wanted if str(r.number) not in validated]
    if lacking and not selection.tested(study):
        raise StudyFileError(
            f"the search has not ended: {', '.join(lacking)} should be among the finalists or beside them and has no "
            f"validation score yet. Run it to its end first ('merge-search run {plan.file.path.name}'; a smaller "
            "search.n_trials ends it sooner): the test questions are opened once, for what was chosen before"
        )
    return chosen[0] if len(plan.objective.names) == 1 else sorted(chosen)
