"""A warm start: the best recipes of earlier studies on the same base are tried first, and scored afresh.

    search:
      learn_from: [old/study.yaml, {study: skills, storage: sqlite:///skills.db, best: 5}]

Models are known by their hashes, so experts may have other names and lie elsewhere. Only recipes travel, never scores:
the earlier study had other questions. What a recipe of an earlier study needs and this study does not have is said.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from merge_search.errors import MergeSearchError, StorageError, StudyFileError, nearest
from merge_search.recipe import Models, PerGroup, Recipe
from merge_search.search.records import candidates, objective_of
from merge_search.search.storage import open_storage
from merge_search.space import SearchSpace
from merge_search.study_file import Earlier, StudyFile, read_study_file

__all__ = ["Known", "best_recipes", "earlier_problems", "open_earlier", "renamed", "starts_from"]

SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Known:
    """A point worth trying first, and where it comes from."""

    source: str
    point: dict[str, str | int | float | bool]


def open_earlier(file: StudyFile, source: Earlier) -> optuna.Study:
    """The stored study of an entry of ``search.learn_from``; paths are relative to `file`.

    Raises:
        StudyFileError: no such study, or it is this one.
    """
    name, url = _place_of(file, source)
    storage = open_storage(url, must_exist=True)
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        raise StudyFileError(_no_study(name, url)) from None


def _place_of(file: StudyFile, source: Earlier) -> tuple[str, str]:
    """Name and storage URL of an entry of ``search.learn_from``. Raises as `open_earlier`."""
    if source.file:
        other = read_study_file(file.folder / Path(source.file).expanduser())
        name, url = other.study.name, other.storage_url
    else:
        name, url = source.study, file.absolute_url(source.storage)
    if (name, url) == (file.study.name, file.storage_url):
        raise StudyFileError(f"{name!r} is this study itself; name another one")
    return name, url


def _no_study(name: str, url: str, known: Sequence[str] = ()) -> str:
    return f"storage {url} has no study {name!r}{nearest(name, known)}"


def earlier_problems(file: StudyFile) -> list[str]:
    """Why entries of ``search.learn_from`` cannot be read; nothing is written.

    A database that is no SQLite file is not asked.
    """
    out = []
    for i, source in enumerate(file.search.learn_from):
        try:
            name, url = _place_of(file, source)
            if url.startswith(SQLITE):
                _require_study(name, url)
        except (StudyFileError, StorageError) as error:
            out.append(f"search.learn_from.{i}: {error}")
    return out


def _require_study(name: str, url: str) -> None:
    """Raises `StudyFileError` unless the SQLite file is a storage with that study."""
    path = Path(url.removeprefix(SQLITE))
    if not path.is_file():
        raise StudyFileError(f"there is no database {path}")
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            known = [row[0] for row in connection.execute("SELECT study_name FROM studies")]
    except sqlite3.Error as error:
        raise StudyFileError(f"{path} cannot be read as the storage of a study: {error}") from None
    if name not in known:
        raise StudyFileError(_no_study(name, url, known))


def starts_from(
    file: StudyFile, models: Models, space: SearchSpace, told: Sequence[str], note: Callable[[str], None]
) -> Iterator[tuple[str, list[Known]]]:
    """Place (`Earlier.place`) and points of this space for the best recipes of every earlier study.

    Args:
        models: Of this study, with their hashes.
        told: Places of studies that are left out.
        note: Told what does not match, and why; a study that cannot be read is said, too, and left out.
    """
    for source in file.search.learn_from:
        if source.place in told:
            continue
        try:
            study = open_earlier(file, source)
        except (StudyFileError, StorageError) as error:
            note(f"search.learn_from: {error}")
            continue
        own = {"seed": file.study.seed, "dtype": file.models.dtype}  # a recipe is scored anew, so with this study's
        recipes = [(number, recipe.model_copy(update=own)) for number, recipe in best_recipes(study)]
        yield source.place, _points(study, recipes, source, models, space, note)


def _points(
    study: optuna.Study,
    recipes: Sequence[tuple[int, Recipe]],
    source: Earlier,
    models: Models,
    space: SearchSpace,
    note: Callable[[str], None],
) -> list[Known]:
    out: list[Known] = []
    reasons: list[str] = []
    for number, recipe in recipes:
        if len(out) == source.best:
            break
        try:
            mine = renamed(recipe, models)
            point = space.encode(mine)
        except MergeSearchError as error:
            reasons.append(f"trial {number}: {error}")
            continue
        if point is None:
            reasons.append(f"trial {number}: this study's space does not hold its recipe")
        elif all(point != k.point for k in out):
            out.append(Known(f"{source.place} trial {number}", point))
    note(f"{len(out)} recipe(s) of study {study.study_name!r} are tried first" + ("" if out else " (none fits)"))
    if reasons and len(out) < source.best:
        note(f"left out of study {study.study_name!r}: {'; '.join(reasons[:3])}" + _more(len(reasons) - 3))
    return out


def _more(n: int) -> str:
    return f"; and {n} more" if n > 0 else ""


def best_recipes(study: optuna.Study) -> list[tuple[int, Recipe]]:
    """Number and recipe of the searched candidates of a study, best by its own first objective first.

    Empty where the study has not scored any.
    """
    if "identity" not in study.user_attrs or "metrics" not in study.user_attrs:
        return []
    objective, _ = objective_of(study)
    merges = [r for r in candidates(study) if not r.label]
    merges.sort(key=lambda r: (-objective.key(r.values), r.number))
    return [(r.number, r.recipe) for r in merges]


def renamed(recipe: Recipe, models: Models) -> Recipe:
    """`recipe` over `models`: experts take the names that their hashes have here; those it did not have begin at 0.

    Deltas are added in the order of the experts' names (`Planner.processing_order`): under names that sort otherwise the
    sums, and so the merged weights, may differ in their last bits.

    Raises:
        StudyFileError: another base, an expert that is not here and not at coefficient 0, or a map of coefficients.
    """
    theirs, ours = recipe.models, {digest: name for name, digest in models.hashes.items() if name != "base"}
    if theirs.hashes.get("base") != models.hashes.get("base") or "base" not in models.hashes:
        raise StudyFileError("it merges another base")
    if recipe.maps:
        raise StudyFileError("its coefficients per output row lie in a map, which no point of a space holds")
    names = {e: ours.get(theirs.hashes.get(e, "")) for e in theirs.experts}
    missing = [e for e, here in names.items() if here is None and not _is_zero(recipe.coefficients.get(e, 1.0))]
    if missing:
        raise StudyFileError(f"its expert(s) {', '.join(missing)} are not in this study")
    coefficients: dict[str, PerGroup] = {e: 0.0 for e in models.experts if e not in names.values()}
    coefficients |= _by_new_name(recipe.coefficients, names)
    changes = {"models": models, "coefficients": coefficients, "densities": _by_new_name(recipe.densities, names)}
    return recipe.model_copy(update=changes)


def _is_zero(value: PerGroup) -> bool:
    return all(v == 0 for v in (value.values() if isinstance(value, dict) else [value]))


def _by_new_name(values: Mapping[str, PerGroup], names: Mapping[str, str | None]) -> dict[str, Any]:
    return {here: values[e] for e, here in names.items() if here is not None and e in values}
