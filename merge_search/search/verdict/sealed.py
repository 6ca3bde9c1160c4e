"""The sealed test questions: opened once per study, for what the search and validation questions chose."""

from __future__ import annotations

from typing import Any

import optuna

from merge_search.errors import EvaluationError, MergeSearchError, StudyFileError, first_line
from merge_search.evaluation import Evaluation, Split
from merge_search.search import storage
from merge_search.search.prepare import Plan
from merge_search.search.records import Record, objective_of, owners_of, references_of
from merge_search.search.trial.worker import Workbench, memory_errors_said
from merge_search.search.verdict import selection

__all__ = ["open_test"]


def open_test(plan: Plan) -> optuna.Study:
    """Score the winner (with several objectives, the front) and what it is compared with on the test questions.

    Opened again, it shows what was found the first time, and finishes what was not. A rival that cannot be scored is left
    out: `selection.failures` says why.

    Raises:
        EvaluationError: the winner, or one of the front, cannot be scored.
        StudyFileError: nothing to test yet, or the search has not ended; or the study went on and has another winner than the tested one, which is
            all that is tested (`selection.outdated_test` says what to do).
        StudyChangedError: the study file was changed since, so its test questions may have been asked in the search.
    """
    study = storage.load_study(plan.file)
    backend = storage.open_storage(plan.file.storage_url)
    with storage.driver_lock(backend, plan.file.storage_url, plan.file.study.name):
        outdated = selection.outdated_test(study, plan.objective, plan.context.experts)
        if outdated and all(str(n) in study.user_attrs.get("test", {}) for n in selection.tested(study)):
            raise StudyFileError(outdated)
        objective_of(study)  # it has begun
        storage.check_identity(study, plan.identity(study.user_attrs["identity"]["models"]))
        sealed_for = study.user_attrs.get("test_winner") if outdated else _sealed_for(study, plan)
        study.set_user_attr("test_winner", sealed_for)
        scored: dict[str, Any] = dict(study.user_attrs.get("test", {}))
        wanted = [r for r in selection.compared(study, plan.objective) if str(r.number) not in scored]
        sealed = selection.tested(study)
        wanted.sort(key=lambda r: r.number not in sealed)  # a rival that fails must not keep it from its proof
        bench = _bench(study, plan) if wanted else None
        failed: dict[str, str] = {}
        for record in wanted:
            assert bench is not None
            try:
                scored[str(record.number)] = _score(bench, record).to_attribute()
            except MergeSearchError as error:
                if record.number in sealed:
                    raise EvaluationError(
                        f"{record.name} was chosen and cannot be scored on the test questions: {error}"
                    ) from error
                failed[str(record.number)] = first_line(error)
                bench.recover()
                continue
            study.set_user_attr("test", scored)
        selection.store_failures(study, "test", failed)
    if outdated:
        raise StudyFileError(outdated)
    return study


def _score(bench: Workbench, record: Record) -> Evaluation:
    recipe = record.recipe.model_copy(update={"models": bench.models})
    with memory_errors_said(f"while {record.name} is tested"):
        return bench.score(recipe, Split.TEST).evaluation


def _bench(study: optuna.Study, plan: Plan) -> Workbench:
    """A workbench that can splice everything the study spliced, what needs statistics from data too."""
    bench = Workbench(plan, device=plan.file.device)
    storage.check_identity(study, plan.identity(dict(bench.models.hashes)))
    bench.offer_statistics(owners_of(plan.objective, references_of(study, plan.metrics, plan.context.experts)))
    return bench


def _sealed_for(study: optuna.Study, plan: Plan) -> int | list[int]:
    """The number of the winner, or those of the front: what search and validation have chosen, both at their end."""
    found = [r.number for r in selection.champions(study, plan.objective, plan.context.experts)]
    if not found:
        raise StudyFileError(selection.nothing_to_hand_over(study))
    known = study.user_attrs.get("validation", {}).keys() | study.user_attrs.get("validation_failed", {}).keys()
    seed, n = plan.file.study.seed, plan.file.search.finalists
    wanted = selection.to_validate(study, plan.objective, plan.space.parameters, seed=seed, n=n)
    lacking = [r.name for r in wanted if str(r.number) not in known]
    if lacking and not selection.tested(study):
        raise StudyFileError(
            f"the search has not ended: {', '.join(lacking)} should be among the finalists or beside them and has no validation "
            f"score yet. Run it to its end first ('merge-search run {plan.file.path.name}'; a smaller search.n_trials ends it "
            "sooner): the test questions are opened once, for what was chosen before"
        )
    return found[0] if len(plan.objective.names) == 1 else sorted(found)
