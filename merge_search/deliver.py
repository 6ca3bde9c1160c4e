"""From a stored trial, or a recipe alone, to a Hugging Face folder with the very weights that were scored."""

from __future__ import annotations

import itertools
from pathlib import Path

from merge_search.engine.engine import MergeEngine
from merge_search.engine.export import check_destination, export_folder
from merge_search.engine.maps import FOLDER as MAPS
from merge_search.engine.pool import ModelPool
from merge_search.errors import RecipeError, StudyFileError
from merge_search.recipe import Models, Recipe
from merge_search.report.table import card, recipe_card
from merge_search.search.prepare import Plan
from merge_search.search.records import Record, records
from merge_search.search.run import load_study
from merge_search.search.selection import winner
from merge_search.search.workbench import maps_of

__all__ = ["export_trial", "merge_recipe"]


def export_trial(plan: Plan, out: Path, *, number: int | None = None) -> Record:
    """Write trial `number`, or the study's best merge, to `out`; its weights are checked against the stored hash.

    Raises:
        StudyFileError: no study, no such trial, or it was never scored.
        WeightsError: `out` is in use; or the weights differ from the scored ones, and nothing is written.
    """
    check_destination(out)
    study = load_study(plan.file)
    experts = plan.context.experts
    record = _choose(records(study), number) if number is not None else winner(study, plan.objective, experts)
    if record is None:
        raise StudyFileError(f"study {study.study_name!r} has no scored merge yet; run it first")
    recipe = record.recipe.model_copy(update={"models": _local(record.recipe.models, plan.context.models)})
    text = card(study, plan.objective, record, experts)
    _write(recipe, out, text, maps_of(plan.file), device=plan.file.device, expected=record.weights_sha256)
    return record


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
    """The models' places on this machine, with the hashes of the scored ones."""
    return here.model_copy(update={"hashes": stored.hashes})


def merge_recipe(path: Path, out: Path, *, device: str = "auto") -> str:
    """Make the folder `out` from a recipe file; returns the sha256 of the weights.

    Relative model paths are relative to the recipe file.

    Raises:
        RecipeError: the file is no recipe.
        WeightsError: models missing, different from those of the recipe, or `out` in use.
    """
    if not path.is_file():
        raise RecipeError(f"no such file: {path}")
    recipe = Recipe.from_json(path.read_text(encoding="utf-8"), where=path.name)

    def place(text: str) -> str:
        folder = (path.parent / Path(text).expanduser()).resolve()
        return str(folder) if folder.exists() else text

    models = recipe.models
    models = models.model_copy(
        update={"base": place(models.base), "experts": {k: place(v) for k, v in models.experts.items()}}
    )
    check_destination(out)
    return _write(
        recipe.model_copy(update={"models": models}), out, recipe_card(recipe), path.parent / MAPS, device=device
    )


def _write(recipe: Recipe, out: Path, text: str, maps: Path, *, device: str, expected: str = "") -> str:
    pool = ModelPool(recipe.models, device=device, map_folders=[maps])
    recipe = recipe.model_copy(update={"models": recipe.models.model_copy(update={"hashes": pool.hashes()})})
    tensors = itertools.chain(MergeEngine(pool).merged(recipe), pool.copied())
    return export_folder(
        out,
        base_folder=pool.base_folder,
        tensors=tensors,
        recipe=recipe,
        card=text,
        left_out=pool.aliases,
        expected=expected,
    )
