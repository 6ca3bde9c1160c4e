"""After the search: the finalists and what they are compared with are scored on the validation questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optuna

from merge_search.errors import EvaluationError, NonFiniteError, first_line
from merge_search.evaluation import Evaluation
from merge_search.objective import Objective
from merge_search.recipe import Recipe
from merge_search.search.checks import nearest_miss
from merge_search.search.plan import Plan
from merge_search.search.records import Record, records, stored_references
from merge_search.search.verdict.selection import POSTERIOR_ATTRIBUTE, best_presets, failures, finalists, posterior
from merge_search.space import Parameter

__all__ = ["store_failures", "to_validate", "validate"]


def to_validate(
    study: optuna.Study, objective: Objective, parameters: Mapping[str, Parameter], *, seed: int, n: int
) -> list[Record]:
    """The `n` finalists, then base, experts, the average and the baseline with the best search score.

    A study with fewer merges of its own than `n` sends the next best baselines in their place: where few questions were
    asked, the best search score says little.
    """
    chosen = {r.number: r for r in finalists(study, objective, parameters, seed=seed, n=n)}
    labels = {"average", *stored_references(study)}
    tops = {r.number for r in best_presets(study, objective)[: 1 + n - len(chosen)]}
    beside = [r for r in records(study) if r.is_scored and (r.label in labels or r.number in tops)]
    return list((chosen | {r.number: r for r in beside}).values())


def validate(
    study: optuna.Study, plan: Plan, score: Callable[[Recipe], Evaluation], *, note: Callable[[str], None]
) -> None:
    """Score the trials of `to_validate` on the validation split, and store their posteriors by the search's answers.

    Each score is stored at once. Scores that an earlier run stored are kept and not asked for again.

    Args:
        study: The stored study, after its search.
        plan: The checked study file.
        score: Scores a recipe on the validation split.
        note: Called with a sentence about each trial that could not be scored.
    """
    scored: dict[str, Any] = dict(study.user_attrs.get("validation", {}))
    failed: dict[str, str] = {}
    parameters, seed = plan.space.parameters, plan.file.study.seed
    wanted = to_validate(study, plan.objective, parameters, seed=seed, n=plan.file.search.finalists)
    if all(r.label for r in wanted) and (text := nearest_miss(study)):
        note(text)
    for record in wanted:
        if str(record.number) in scored:
            continue
        try:
            evaluation = score(record.recipe)
        except (NonFiniteError, EvaluationError) as error:
            note(f"{record.name} could not be scored on the validation questions: {error}")
            failed[str(record.number)] = first_line(error)
            continue
        scored[str(record.number)] = evaluation.to_attribute()
        study.set_user_attr("validation", scored)
    store_failures(study, "validation", failed)
    if len(plan.objective.names) == 1:
        posteriors = posterior(study, parameters, seed)
        stored = {number: list(posteriors[int(number)]) for number in scored if int(number) in posteriors}
        study.set_user_attr(POSTERIOR_ATTRIBUTE, stored)


def store_failures(study: optuna.Study, split: str, failed: Mapping[str, str]) -> None:
    """Store why trials (by number) have no scores on `split`, and replace the reasons stored before."""
    if failed or failures(study, split):
        study.set_user_attr(f"{split}_failed", dict(failed))
