"""Writes a stored trial as a Hugging Face folder with the very weights that were scored, or as a mergekit file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import optuna

from merge_search.engine.checkpoints.dtypes import RECIPE_NAMES
from merge_search.engine.checkpoints.headers import read_checkpoint, resolve_model
from merge_search.engine.checkpoints.layout import layout
from merge_search.engine.checkpoints.writer import check_destination
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.statistics.provider import DataStatistics
from merge_search.errors import InputError, StudyFileError
from merge_search.merge_adapter import AdapterReport, write_adapter
from merge_search.merge_recipe import write_merge
from merge_search.mergekit import to_mergekit
from merge_search.recipe import Models, Recipe
from merge_search.report.model_card import card
from merge_search.rules import use_rule_files
from merge_search.search.plan import Plan
from merge_search.search.records import Record, objective_of, records, references_of, teachers_of
from merge_search.search.storage import load_study
from merge_search.search.trial.worker import maps_of, statistics_of
from merge_search.search.verdict.selection import base_is_better, champions, nothing_to_hand_over

__all__ = ["export_adapter_of_trial", "export_mergekit", "export_trial"]


def export_trial(plan: Plan, out: Path, *, number: int | None = None) -> Record:
    """Write a trial to `out`. Its weights are checked against the hash that was stored when it was scored.

    Args:
        plan: The prepared study.
        out: A new or empty folder.
        number: The trial's number; None: the study's best merge.

    Returns:
        The trial.

    Raises:
        StudyFileError: there is no study or no such trial, or the trial was never scored. Without `number` also: the
            base is expected to be better than every merge.
        InputError: `out` is in use.
        WeightsError: the weights differ from the scored ones; nothing is written.
    """
    check_destination(out)
    stored = _stored(plan, number)
    record, device = stored.record, plan.file.device
    text, maps = stored.card(), maps_of(plan.file)
    write_merge(stored.recipe, out, text, maps, stored.statistics, device=device, expected=record.weights_sha256)
    return record


def export_adapter_of_trial(
    plan: Plan, out: Path, *, number: int | None = None, rank: int | None = None
) -> tuple[Record, AdapterReport]:
    """Write a trial's merge of LoRA adapters as a LoRA adapter to `out`.

    Args:
        plan: The prepared study.
        out: A new or empty folder.
        number: The trial's number; None: the study's best merge.
        rank: Largest rank; None: whatever the merge takes.

    Returns:
        The trial, and what was written.

    Raises:
        StudyFileError: there is no study or no such trial, or the trial was never scored. Without `number` also: the
            base is expected to be better than every merge.
        RecipeError: the trial's merge is no LoRA adapter, with every reason.
        InputError: `out` is in use.
    """
    check_destination(out)
    stored = _stored(plan, number)
    maps, device = maps_of(plan.file), plan.file.device
    report = write_adapter(stored.recipe, out, stored.card, maps, stored.statistics, device=device, rank=rank)
    return stored.record, report


class _Stored(NamedTuple):
    """A trial of a study, as it is exported.

    Attributes:
        recipe: Its recipe, with the models' places on this machine.
        card: README.md, from a sentence on the adapter if one is written.
        statistics: Makes the source of statistics for a pool.
    """

    record: Record
    recipe: Recipe
    card: Callable[..., str]
    statistics: Callable[[ModelPool], DataStatistics]


def _stored(plan: Plan, number: int | None) -> _Stored:
    use_rule_files(plan.file.rule_files)
    study = load_study(plan.file)
    objective, experts = objective_of(study)
    record = _wanted(study, number)
    recipe = record.recipe.model_copy(update={"models": _local(record.recipe.models, plan.context.models)})
    teachers = teachers_of(objective, references_of(study, list(objective.metrics.values()), experts))
    return _Stored(
        record,
        recipe,
        lambda adapter="": card(study, objective, record, experts, adapter),
        lambda pool: statistics_of(plan, pool, teachers, None),
    )


def _wanted(study: optuna.Study, number: int | None) -> Record:
    """Trial `number`, or the winner by the objective that the study was run with."""
    if number is not None:
        return _choose(records(study), number)
    objective, experts = objective_of(study)
    winners = champions(study, objective, experts)
    if not winners:
        raise StudyFileError(nothing_to_hand_over(study))
    if len(winners) > 1:
        names = "; ".join(_named_values(r, objective.names) for r in winners)
        raise StudyFileError(
            f"the study has {len(objective.names)} objectives and {len(winners)} merges that none of the others beats "
            f"in everything; choose one with --trial (search scores): {names}"
        )
    if better := base_is_better(study, objective, experts):
        number = winners[0].number
        raise StudyFileError(f"{better}. Use the base, search further, or write this merge with --trial {number}")
    return winners[0]


def _named_values(record: Record, names: list[str]) -> str:
    values = ", ".join(f"{name} {value:.3g}" for name, value in zip(names, record.values, strict=True))
    return f"{record.number} ({values})"


def _choose(all_records: list[Record], number: int) -> Record:
    if not 0 <= number < len(all_records):
        raise StudyFileError(f"there is no trial {number}; the study has trials 0 to {len(all_records) - 1}")
    record = all_records[number]
    if not record.is_scored:
        raise StudyFileError(
            f"trial {number} has no scores: {record.outcome or 'not finished'} {record.reason}".rstrip()
        )
    return record


def _local(stored: Models, here: Models) -> Models:
    """The trial's models at their places on this machine, with the hashes of the scored ones.

    Raises:
        StudyFileError: the study file no longer names one of them.
    """
    if missing := stored.experts.keys() - here.experts.keys():
        raise StudyFileError(
            f"models.experts must name every expert of the trial; {', '.join(sorted(missing))} is not there any more"
        )
    return here.model_copy(update={"experts": {e: here.experts[e] for e in stored.experts}, "hashes": stored.hashes})


def export_mergekit(plan: Plan, out: Path, *, number: int | None = None) -> Record:
    """Write a trial as a mergekit YAML file. Models are written as the study file names them.

    Args:
        plan: The prepared study.
        out: A new file.
        number: The trial's number; None: the study's best merge.

    Returns:
        The trial.

    Raises:
        RecipeError: mergekit cannot express this recipe, with every reason.
        InputError: `out` exists.
    """
    if out.exists():
        raise InputError(f"{out} exists; nothing was written, give another name")
    record = _wanted(load_study(plan.file), number)
    file = plan.file
    named = Models(base=file.models.base, experts=file.models.experts)
    info = read_checkpoint(resolve_model(plan.context.models.base))
    vectors = [name for name, t in info.tensors.items() if len(t.shape) < 2]
    recipe = record.recipe.model_copy(update={"models": named})
    dtypes = Counter(info.tensors[name].dtype for name in layout(info))
    dtype = RECIPE_NAMES.get(dtypes.most_common(1)[0][0])
    text = to_mergekit(recipe, layout(info), vectors=vectors, dtype=dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return record
