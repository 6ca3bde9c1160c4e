"""Causal effects of the parts of every expert in all forms, for the command line."""

from __future__ import annotations

from collections.abc import Callable

from merge_search.engine.statistics.agreement import effects
from merge_search.errors import InputError, nearest
from merge_search.rules import STATISTICS
from merge_search.search.plan import Plan
from merge_search.search.records import objective_of, references_of, teachers_of
from merge_search.search.storage import load_study
from merge_search.search.trial.worker import Worker

__all__ = ["FORMS", "expert_effects"]

FORMS, PARTITIONS = (STATISTICS["effect"].choices[option] for option in ("form", "partition"))


def expert_effects(
    plan: Plan, partition: str, *, note: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure |change of the mean loss| on fit rows, or read what the study has measured.

    Args:
        plan: A prepared study that has run: its references say whose task is whose.
        partition: What counts as one part (an option of the statistic `effect`).
        note: Called with a sentence that says what is asked, before it is asked.

    Returns:
        Expert -> form -> part -> effect.

    Raises:
        InputError: There is no such partition.
        StudyFileError: The study has not run.
        RecipeError: No task has rows to fit on.
    """
    if partition not in PARTITIONS:
        raise InputError(f"no partition is called {partition!r}{nearest(partition, PARTITIONS)}")
    study = load_study(plan.file)
    objective, experts = objective_of(study)
    teachers = teachers_of(objective, references_of(study, list(objective.metrics.values()), experts))
    worker = Worker(plan, device=plan.file.device)
    worker.set_teachers(teachers)
    n = len({group.key(partition) for group in worker.pool.groups.values()})
    note(f"each fit row of an expert is asked up to {2 * n + 5} times, unless the study has its effects: {n} parts")
    return {
        expert: {
            form: effects(worker.pool.statistic, worker.pool.groups, expert, form=form, partition=partition)
            for form in FORMS
        }
        for expert in experts
    }
