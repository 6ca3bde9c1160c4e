"""What can go wrong, by what the one who catches it can do.

    MergeSearchError
    ├── InputError            (also ValueError) fix what was given; carries *all* the problems found
    │   ├── StudyFileError    the study file
    │   ├── RecipeError       a recipe, or a mergekit file
    │   ├── SpaceError        a search space
    │   └── RuleError         a rule from outside: its file, its function, or what the function returned
    ├── WeightsError          fix a checkpoint: missing, truncated, another shape, a pickle
    ├── StudyChangedError     the stored study was made with other models, tasks or space
    ├── StorageError          the storage cannot be used as asked (a second driver holds it, ...)
    └── TrialError            one trial cannot be finished; the study goes on
        ├── NonFiniteError    NaN or infinity in weights or scores
        └── EvaluationError   the evaluator failed

A message says what must hold, what was found, where, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = [
    "EvaluationError",
    "InputError",
    "MergeSearchError",
    "NonFiniteError",
    "RecipeError",
    "RuleError",
    "SpaceError",
    "StorageError",
    "StudyChangedError",
    "StudyFileError",
    "TrialError",
    "WeightsError",
    "first_line",
    "nearest",
    "sentences",
]


class MergeSearchError(Exception):
    """Base of everything this package raises on purpose."""


class InputError(MergeSearchError, ValueError):
    """The input must be changed; `problems` lists everything that was found wrong with it."""

    def __init__(self, problems: str | Iterable[str], *, where: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.where = where
        head = f"{where}: " if where else ""
        if len(self.problems) == 1:
            text = head + self.problems[0]
        else:
            text = f"{head}{len(self.problems)} problems\n" + "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(text)


class StudyFileError(InputError):
    """The study file cannot be used."""


class RecipeError(InputError):
    """The recipe (or mergekit file) does not describe a merge of these models."""


class SpaceError(InputError):
    """The search space is empty, too large or does not fit the models."""


class RuleError(InputError):
    """A rule from outside cannot be used: its file, its name, its function, or what the function returned."""


class WeightsError(MergeSearchError):
    """A checkpoint cannot be used as it lies on disk."""


class StudyChangedError(MergeSearchError):
    """The study in the storage was made with other models, tasks, objective or space."""


class StorageError(MergeSearchError):
    """The storage cannot be used as asked."""


class TrialError(MergeSearchError):
    """One trial cannot be finished; it is recorded with its reason and the study goes on."""


class NonFiniteError(TrialError):
    """NaN or infinity where a finite number must be."""


class EvaluationError(TrialError):
    """The evaluator could not score the model."""


def first_line(error: BaseException) -> str:
    """What an error says in its first line, without the full stop; of a database's what its driver said, without the SQL."""
    text = str(getattr(error, "orig", None) or getattr(error, "strerror", None) or error)
    return (text or type(error).__name__).splitlines()[0].removesuffix(".")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint naming the closest known word, or all of them when they are few, or ''."""
    words = sorted(known)
    close = difflib.get_close_matches(name, words, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(words)}" if 0 < len(words) <= 40 else ""


_SHOWN = 70
"""Characters of a wrong value that are worth repeating: a whole section is not."""


def sentences(
    error: ValidationError,
    kind: type,
    *,
    root: str = "options",
    at: Callable[[tuple[str | int, ...]], str] | None = None,
) -> list[str]:
    """One sentence per problem that pydantic found: the place, what is wrong, what was found, the nearest known key.

    Args:
        kind: The model that was validated; unknown keys are compared with those of its section.
        root: What to call the whole.
        at: What to call a place (keys and indices from the outside in); None: these, joined with dots.
    """
    out: list[str] = []
    for e in error.errors():
        place = tuple(part for part in e["loc"] if part != "[key]")
        message = e["msg"].removeprefix("Value error, ")
        if e["type"] == "extra_forbidden":
            text = f"unknown key{nearest(str(place[-1]), _keys(kind, place[:-1]))}"
        elif e["type"] == "missing":
            text = "is missing"
        else:
            found = repr(e["input"])
            shown = "" if "got" in message or len(found) > _SHOWN else f", got {found}"
            text = message[0].lower() + message[1:] + shown
        where = ".".join(map(str, place)) or root if at is None else at(place)
        out.append(f"{where}: {text}")
    return list(dict.fromkeys(out))  # a choice between models reports what they share once for each


def _keys(kind: Any, place: tuple[str | int, ...]) -> list[str]:
    """Names that the section of `kind` at `place` knows."""
    for part in place:
        fields = getattr(kind, "model_fields", {})
        found = _models_in(fields[part].annotation if part in fields else kind)
        kind = next((m for m in found if m.__name__ == part), found[0] if found else None)
    return [name for name, field in getattr(kind, "model_fields", {}).items() if not field.exclude]


def _models_in(annotation: Any) -> list[Any]:
    """Models in ``Model``, ``Model | None``, ``dict[str, list[Model]]``."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [m for a in get_args(annotation) for m in _models_in(a)]
