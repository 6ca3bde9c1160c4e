"""Runs transforms, and keeps what they wrote: one folder per models, transform and options.

    FOLDER/<key>/transformed.json     where base and experts are: below the folder, or one of the sources
    FOLDER/<key>/...                  what the transform wrote

A result is written beside its place and renamed when it is whole, so a kill in the middle leaves nothing that is taken
for one. The most recently used results are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_search.engine.checkpoints.headers import read_json
from merge_search.engine.transforms.sources import Sources
from merge_search.errors import MergeSearchError, RecipeError, WeightsError
from merge_search.recipe import Recipe, Transform
from merge_search.rules import TRANSFORMS, Preview, Transformed, TransformInfo, option_problems
from merge_search.rules.table import load

__all__ = ["FOLDER", "KEPT", "preview", "transformed", "transformed_for_once"]

FOLDER = "transforms"
"""Beside a study file, after the study's name and a dot."""
KEPT = 4
"""Number of results that are kept."""
_FORMAT = 1
_STALE = 86_400  # seconds after which an unfinished folder belongs to no living process
_INDEX = "transformed.json"


def preview(transform: Transform, sources: Sources) -> Preview:
    """What a transform would make, from headers alone. Unknown names and wrong options are problems, too."""
    if problem := TRANSFORMS.unknown(transform.name):
        return Preview((f"transform: {problem}",))
    row = TRANSFORMS[transform.name]
    if problems := option_problems(row, transform.options):
        return Preview(tuple(f"transform: {p}" for p in problems))
    if not row.aligns and (odd := [s for s in sources.experts.values() if not s.fits]):
        return Preview(
            tuple(f"transform {row.name!r} needs fine-tunes of the base: {p}" for s in odd for p in s.problems)
        )
    check = row.checker
    if check is None and row.check:
        check = load(replace(row, target=row.check))
    if check is None:
        return Preview()
    with _blamed(row, "its check"):
        found: Preview = check(sources, **row.completed(transform.options))
    return found


def transformed(recipe: Recipe, folder: Path, *, kept: int = KEPT) -> Transformed:
    """The models that the recipe's transform makes, from `folder` if they are there, else written there now.

    Args:
        recipe: It has a transform. Hashes of its models are checked where it has them.
        folder: Where results are kept; made if missing.
        kept: Number of results that stay there. The one returned is among them.

    Raises:
        RecipeError: No such transform, wrong options, or models that it cannot take: every problem.
        WeightsError: A model is missing or is not the recipe's, or the transform failed.
    """
    assert recipe.transform is not None
    sources = Sources(recipe.models)
    if problems := preview(recipe.transform, sources).problems:
        raise RecipeError(list(problems))
    row = TRANSFORMS[recipe.transform.name]
    options = row.completed(recipe.transform.options)
    place = folder / _key(recipe, row, options, sources)
    if not (place / _INDEX).is_file():
        _write(place, row, options, sources)
    os.utime(place / _INDEX)
    _forget(folder, kept, place)
    return _read(place, sources)


@contextmanager
def transformed_for_once(recipe: Recipe, beside: Path) -> Iterator[Transformed]:
    """As `transformed`, in a temporary folder inside `beside` that is removed at the end."""
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=beside) as folder:
        yield transformed(recipe, Path(folder))


def _key(recipe: Recipe, row: TransformInfo, options: dict[str, Any], sources: Sources) -> str:
    """The key of a result: everything that its weights depend on. Checks the recipe's hashes."""
    hashes = {source.name: source.hash for source in sources}
    for source in sources:
        wanted = recipe.models.hashes.get(source.name, hashes[source.name])
        if hashes[source.name] != wanted:
            raise WeightsError(
                f"{source.folder}: {source.name!r} must be the model with sha256 {wanted[:16]}..., found "
                f"{hashes[source.name][:16]}...; its weights were changed or another model was given"
            )
    made_by = [row.name, row.version, row.origin.sha256 if row.origin else ""]
    text = json.dumps([_FORMAT, made_by, dict(sorted(options.items())), list(hashes.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _write(place: Path, row: TransformInfo, options: dict[str, Any], sources: Sources) -> None:
    from merge_search.engine.checkpoints.writer import sync_folder  # loads torch, and `preview` does not

    temporary = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # a leftover of an earlier process with the same id
    temporary.mkdir(parents=True)
    try:
        with _blamed(row, "the transform"):
            made = load(row)(sources, temporary, **options)
        index = {"base": _relative(made.base, temporary, sources, row)}
        index |= {f"expert.{e}": _relative(path, temporary, sources, row) for e, path in made.experts.items()}
        if set(made.experts) != (set(sources.experts) if row.merges else set()):
            wanted = ", ".join(sources.experts) if row.merges else "none"
            raise WeightsError(
                f"transform {row.name!r} must return the experts {wanted}, returned {', '.join(made.experts) or 'none'}"
            )
        (temporary / _INDEX).write_text(json.dumps(index), encoding="utf-8")
        sync_folder(temporary)
        try:
            os.rename(temporary, place)
        except OSError:
            if not (place / _INDEX).is_file():  # else another process was faster with the same result
                raise
            shutil.rmtree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _relative(path: Path, out: Path, sources: Sources, row: TransformInfo) -> str:
    """A folder below `out` as its relative path, the folder of a source as ``@name``."""
    for source in sources:
        if Path(path).resolve() == source.folder.resolve():
            return f"@{source.name}"
    if not Path(path).resolve().is_relative_to(out.resolve()) or not Path(path).is_dir():
        raise WeightsError(f"transform {row.name!r} must return folders below `out` or of its sources, returned {path}")
    return Path(path).resolve().relative_to(out.resolve()).as_posix()


def _read(place: Path, sources: Sources) -> Transformed:
    folders = {source.name: source.folder for source in sources}
    index = read_json(place / _INDEX)
    paths = {key: folders[text[1:]] if text.startswith("@") else place / text for key, text in index.items()}
    return Transformed(paths["base"], {e: paths[f"expert.{e}"] for e in sources.experts if f"expert.{e}" in paths})


def _forget(folder: Path, kept: int, place: Path) -> None:
    """Remove results that were not used for the longest time, and what killed processes left."""
    whole = sorted(folder.glob(f"*/{_INDEX}"), key=lambda p: -p.stat().st_mtime)
    for index in [p for p in whole if p.parent != place and ".tmp-" not in p.parent.name][max(0, kept - 1) :]:
        index.unlink(missing_ok=True)  # first: what is left without it is no result
        shutil.rmtree(index.parent, ignore_errors=True)
    for path in folder.iterdir():
        is_unfinished = ".tmp-" in path.name or not (path / _INDEX).is_file()
        if path.is_dir() and path != place and is_unfinished and path.stat().st_mtime < time.time() - _STALE:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _blamed(row: TransformInfo, what: str) -> Iterator[None]:
    """Turn an exception of a transform from outside into one that names it and ends the trial, not the study."""
    try:
        yield
    except MergeSearchError:
        raise
    except Exception as error:
        if row.origin is None or isinstance(error, MemoryError):
            raise
        raise RecipeError(
            f"{row.origin}: transform {row.name!r}: {what} failed: {type(error).__name__}: {error}"
        ) from error
