"""Read the options of a plug-in: keys are checked with pydantic, problems become sentences, paths become absolute.

>>> from pydantic import BaseModel, ConfigDict
>>> class Options(BaseModel):
...     model_config = ConfigDict(extra="forbid")
...     texts: PathList
...     limit: int | None = None
>>> read_options(Options, {"texts": "a.txt", "limit": 3}).texts
['a.txt']
>>> read_options(Options, {"texts": [1], "limt": 3})
Traceback (most recent call last):
    ...
merge_search.errors.StudyFileError: 2 problems
  - texts.0: input should be a valid string, got 1
  - limt: unknown key; did you mean 'limit'?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError

from merge_search.errors import InputError, StudyFileError, sentences

__all__ = ["PathList", "absolute", "folders", "read_options", "sentences_at"]

Kind = TypeVar("Kind", bound=BaseModel)


def _as_list(value: object) -> object:
    if value is None:
        return []
    return [str(value)] if isinstance(value, str | Path) else value


PathList = Annotated[list[str], BeforeValidator(_as_list)]
"""Type of an option that holds one path or several. It is always read as a list."""


def read_options(
    kind: type[Kind],
    options: Mapping[str, Any],
    *,
    at: tuple[str, ...] = (),
    error: type[InputError] = StudyFileError,
) -> Kind:
    """The options as values.

    Args:
        kind: The pydantic model of the options.
        options: Keys and values as the study file has them.
        at: The place of `options` in the study file, in front of every key in messages.
        error: The error to raise.

    Raises:
        InputError: Of type `error`, with every problem and the nearest known key for each unknown one.
    """
    try:
        return kind.model_validate(dict(options))
    except ValidationError as found:
        raise error(sentences_at(found, kind, at)) from None


def sentences_at(error: ValidationError, kind: type[BaseModel], at: tuple[str, ...] = ()) -> list[str]:
    """One sentence per problem, each with its place from `at` on."""
    return sentences(error, kind, at=(lambda place: ".".join(map(str, (*at, *place)))) if at else None)


def absolute(path: str, folder: Path | None) -> Path:
    """`path` as an absolute path.

    Args:
        path: An absolute path or a relative one.
        folder: The folder that a relative path is relative to; None: the current directory.
    """
    return ((folder or Path()) / Path(path).expanduser()).resolve()


def folders(include_path: Sequence[str], folder: Path | None) -> list[Path]:
    """The folders in which an evaluator looks for its files: those of `include_path`, or `folder` if there are none."""
    return [absolute(path, folder) for path in include_path] or [folder or Path.cwd()]
