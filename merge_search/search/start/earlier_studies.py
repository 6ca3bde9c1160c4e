"""A warm start: the best recipes of earlier studies on the same base are tried first, and scored afresh.

    search:
      learn_from: [old/study.yaml, {study: skills, storage: sqlite:///skills.db, best: 5}]

Models are recognised by their hashes, so experts may have other names and lie elsewhere. Only recipes are taken over
and never scores, since the earlier study had other questions. A note says which recipes cannot be used here, and why.
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

__all__ = ["EarlierPoint", "best_recipes", "earlier_problems", "open_earlier", "renamed", "starts_from"]

SQLITE = "sqlite:///"


@dataclass(frozen=True)
class EarlierPoint:
    """A point to try first.

    Attributes:
        source: The study and trial that it comes from.
        point: Its values in this study's space.
    """

    source: str
    point: dict[str, str | int | float | bool]


def open_earlier(file: StudyFile, source: Earlier) -> optuna.Study:
    """The stored study of an entry of ``search.learn_from``. Paths are relative to `file`.

    Raises:
        StudyFileError: There is no such study, or it is this one.
        StorageError: Its storage cannot be opened.
    """
    name, url = _place_of(file, source)
    storage = open_storage(url, must_exist=True)
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        raise StudyFileError(_no_study(name, url)) from None


def _place_of(file: StudyFile, source: Earlier) -> tuple[str, str]:
    """Name and storage URL of an entry of ``search.learn_from``. It raises as `open_earlier` does."""
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
    """A sentence for each entry of ``search.learn_from`` that cannot be read. Nothing is written.

    Only SQLite files are opened; other databases are not.
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
    """Raise `StudyFileError` unless the SQLite file is a storage with that study."""
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
    file: StudyFile, models: Models, space: SearchSpace, done: Sequence[str], note: Callable[[str], None]
) -> Iterator[tuple[str, list[EarlierPoint]]]:
    """For every earlier study its place (`Earlier.place`) and the points of its best recipes in this space.

    Args:
        file: The study file of this study.
        models: This study's models with their hashes.
        space: This study's space.
        done: Places of studies to leave out.
        note: Called with a sentence about each study: what was taken, what does not match, or why it cannot be read.
    """
    for source in file.search.learn_from:
        if source.place in done:
            continue
        try:
            study = open_earlier(file, source)
        except (StudyFileError, StorageError) as error:
            note(f"search.learn_from: {error}")
            continue
        # A recipe is scored afresh, so with the seed and dtype of this study.
        changes = {"seed": file.study.seed, "dtype": file.models.dtype}
        recipes = [(number, recipe.model_copy(update=changes)) for number, recipe in best_recipes(study)]
        yield source.place, _points(study, recipes, source, models, space, note)


def _points(
    study: optuna.Study,
    recipes: Sequence[tuple[int, Recipe]],
    source: Earlier,
    models: Models,
    space: SearchSpace,
    note: Callable[[str], None],
) -> list[EarlierPoint]:
    out: list[EarlierPoint] = []
    reasons: list[str] = []
    for number, recipe in recipes:
        if len(out) == source.best:
            break
        try:
            point = space.encode(renamed(recipe, models))
        except MergeSearchError as error:
            reasons.append(f"trial {number}: {error}")
            continue
        if point is None:
            reasons.append(f"trial {number}: this study's space does not hold its recipe")
        elif all(point != earlier.point for earlier in out):
            out.append(EarlierPoint(f"{source.place} trial {number}", point))
    note(f"{len(out)} recipe(s) of study {study.study_name!r} are tried first" + ("" if out else " (none fits)"))
    if reasons and len(out) < source.best:
        note(f"left out of study {study.study_name!r}: {'; '.join(reasons[:3])}" + _more(len(reasons) - 3))
    return out


def _more(n: int) -> str:
    return f"; and {n} more" if n > 0 else ""


def best_recipes(study: optuna.Study) -> list[tuple[int, Recipe]]:
    """Number and recipe of a study's searched candidates, the best by its own first objective first.

    Returns:
        Empty if the study has not scored any.
    """
    if "identity" not in study.user_attrs or "metrics" not in study.user_attrs:
        return []
    objective, _ = objective_of(study)
    merges = [r for r in candidates(study) if not r.label]
    merges.sort(key=lambda r: (-objective.key(r.values), r.number))
    return [(r.number, r.recipe) for r in merges]


def renamed(recipe: Recipe, models: Models) -> Recipe:
    """`recipe` over this study's `models`. Its experts take the names that their hashes have here.

    Experts that it did not merge get the coefficient 0. Deltas are added in the order of the experts' names
    (`Planner.processing_order`). If the new names sort in another order, the merged weights may differ in their last
    bits.

    Raises:
        StudyFileError: It merges another base, an expert that is not here with a coefficient other than 0, or has a map
            of coefficients.
    """
    merged, names_here = recipe.models, {digest: name for name, digest in models.hashes.items() if name != "base"}
    if merged.hashes.get("base") != models.hashes.get("base") or "base" not in models.hashes:
        raise StudyFileError("it merges another base")
    if recipe.maps:
        raise StudyFileError("its coefficients per output row lie in a map, which no point of a space holds")
    names = {e: names_here.get(merged.hashes.get(e, "")) for e in merged.experts}
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
