"""Rules by name: what every rule has, and the tables that hold them.

A table is a mapping from the name that recipes use to a row. Its built-in rows are data in this package. Rows from
outside come from an installed package (entry point group ``merge_search.rules``), from a rule file in use, or from a
decorator that ran in this process. Looking up a name that no table row has loads the installed packages once.
torch-free.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Generic, Protocol, TypeVar

from merge_search.errors import InputError, MergeSearchError, RuleError, first_line, nearest

__all__ = [
    "GROUP", "OptionInfo", "Origin", "Row", "Rule", "RuleTable", "Scalar", "collecting", "load", "option_problems",
    "range_problem",
]  # fmt: skip

Scalar = bool | int | float | str

GROUP = "merge_search.rules"
"""Entry point group of packages that bring rules: a module, or a function to call, whose import decorates them."""


@dataclass(frozen=True)
class Origin:
    """Where a rule from outside was defined.

    Attributes:
        path: Its file.
        line: The line of the function or row.
        file: Name of the rule file that a recipe must bring along; '' for installed packages and interactive sessions.
        sha256: Of that file's bytes.
    """

    path: str
    line: int
    file: str = ""
    sha256: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class OptionInfo:
    """What one option of a rule may be, for lists, for checks of a study file and for searches.

    Attributes:
        what: One line.
        source: Where the option and its range come from: ``paper``, ``release``, ``mergekit`` or ``ours``.
        bounds: The smallest and largest number with which the rule can be computed; None for texts and switches.
        usual: The part of `bounds` that a search takes which gives none; None: all of it.
        log: Whether that range is searched on a logarithmic scale.
        numbers: The only numbers allowed, where they are few.
    """

    what: str
    source: str = "ours"
    bounds: tuple[float, float] | None = None
    usual: tuple[float, float] | None = None
    log: bool = False
    numbers: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row.

    Attributes:
        name: The name that recipes use.
        summary: One line for lists.
        target: "module:function" of a built-in rule; '' where the engine has no function of its own for it.
        options: Names and defaults; None: a number without default.
        choices: Allowed values of text options.
        about: What each option may be; `option_table` has it for built-in rules.
        function: The decorated function of a rule from outside.
        origin: Where that function stands; None for built-in rules.
    """

    name: str
    summary: str
    target: str = ""
    options: Mapping[str, Scalar | None] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    about: Mapping[str, OptionInfo] = field(default_factory=dict)
    function: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    origin: Origin | None = None

    @property
    def is_outside(self) -> bool:
        """Whether a user or an installed package brought it."""
        return self.origin is not None

    def completed(self, options: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """A recipe's options over the defaults."""
        return {**{k: v for k, v in self.options.items() if v is not None}, **options}

    def typed(self, options: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Options with whole numbers as floats where the default is one."""
        return {k: float(v) if isinstance(self.options.get(k), float) else v for k, v in options.items()}

    def allowed(self, option: str) -> tuple[Scalar, ...]:
        """The only values of an option, if they are few: words, a switch's two states, single numbers."""
        if isinstance(self.options[option], bool):
            return (False, True)
        return self.choices.get(option) or (self.about[option].numbers if option in self.about else ())


class Row(Protocol):
    """What a table asks of its rows."""

    @property
    def name(self) -> str: ...
    @property
    def origin(self) -> Origin | None: ...


R = TypeVar("R", bound=Row)


class RuleTable(Mapping[str, R], Generic[R]):
    """Rows by name.

    Args:
        kind: What one row is, for messages: "measure", "selection".
        rows: The built-in ones.
    """

    def __init__(self, kind: str, rows: Iterable[R]) -> None:
        self.kind = kind
        self._rows: dict[str, R] = {row.name: row for row in rows}

    def __getitem__(self, name: str) -> R:
        if name not in self._rows:
            _load_installed()
        return self._rows[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._rows:
            _load_installed()
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        _load_installed()
        return iter(self._rows)

    def __len__(self) -> int:
        _load_installed()
        return len(self._rows)

    def unknown(self, name: str) -> str:
        """The problem with a name that the table does not have; '' if it has it. With the nearest known name."""
        if name in self:
            return ""
        return f"unknown {self.kind} {name!r}{nearest(name, self)}"

    def add(self, row: R) -> None:
        """Add a row from outside. One that was defined at the same place before is replaced.

        Raises:
            RuleError: the name cannot be used, or another rule has it.
        """
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", row.name):
            raise RuleError(f"{row.origin}: a rule's name must be letters, digits, '_', '-' and '.', got {row.name!r}")
        known = self._rows.get(row.name)
        if known is not None and not _same_place(known, row):
            raise RuleError(f"{row.origin}: {taken(self.kind, known)}; give yours another name")
        self._rows[row.name] = row

    def remove(self, row: R) -> None:
        """Take a row away again."""
        if self._rows.get(row.name) is row:
            del self._rows[row.name]


def taken(kind: str, known: Row) -> str:
    """Why a name cannot be given again."""
    return f"the {kind} {known.name!r} is " + ("built in" if known.origin is None else f"defined in {known.origin}")


def _same_place(a: Row, b: Row) -> bool:
    """Whether both are one function of one module, run again as a cell of a notebook is."""
    if a.origin is None or b.origin is None or a.origin.file or b.origin.file:
        return False
    names = [getattr(getattr(row, "function", None), "__qualname__", None) for row in (a, b)]
    return a.origin.path == b.origin.path and names[0] == names[1]


_collected: ContextVar[list[tuple[RuleTable[Any], Row]] | None] = ContextVar("collected", default=None)


@contextmanager
def collecting() -> Iterator[list[tuple[RuleTable[Any], Row]]]:
    """Collect the rows that decorators make inside, in place of adding them to their tables."""
    rows: list[tuple[RuleTable[Any], Row]] = []
    token = _collected.set(rows)
    try:
        yield rows
    finally:
        _collected.reset(token)


def register(table: RuleTable[R], row: R) -> None:
    """Add a decorated rule to its table, or to the rule file that is being loaded.

    Raises:
        RuleError: the name cannot be used, or another rule has it.
    """
    rows = _collected.get()
    if rows is None:
        table.add(row)
    else:
        rows.append((table, row))


_is_loaded = False


def _load_installed() -> None:
    """Load the rules of installed packages, once.

    Raises:
        InputError: a package's rules cannot be loaded.
    """
    global _is_loaded
    if _is_loaded:
        return
    _is_loaded = True
    token, problems = _collected.set(None), []
    try:
        for point in entry_points(group=GROUP):
            try:
                value = point.load()
                if callable(value):
                    value()
            except MergeSearchError as error:
                problems.append(f"rules {point.name!r} of an installed package: {error}")
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
                problems.append(
                    f"rules {point.name!r} ({point.value}) of an installed package cannot be loaded: {reason}"
                )
    finally:
        _collected.reset(token)
    if problems:
        raise InputError(problems)


def load(rule: Rule) -> Callable[..., Any]:
    """The function of a rule; a built-in rule's module is imported on first use."""
    if rule.function is not None:
        return rule.function
    module, _, function = rule.target.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


def option_problems(rule: Rule, options: Mapping[str, Scalar], *, check_values: bool = True) -> list[str]:
    """What is wrong with the options that a recipe gives to a rule, [] if nothing is.

    Args:
        check_values: Also whether each value has the type of its default. Text with choices is always checked.
    """
    out = []
    for name, value in options.items():
        if name not in rule.options:
            out.append(f"{rule.name!r} has no option {name!r}{nearest(name, rule.options)}")
        elif (check_values or name in rule.choices) and (problem := _value_problem(rule, name, value)):
            out.append(problem)
    return out


def _value_problem(rule: Rule, option: str, value: Scalar) -> str:
    """What is wrong with one value; '' if nothing is. An option without default takes a number."""
    default, choices = rule.options[option], rule.choices.get(option)
    if choices is not None and value not in choices:
        return f"option {option!r} of {rule.name!r} must be one of {', '.join(choices)}, got {value!r}"
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, str):
        fits, wanted = isinstance(value, str), "text"
    else:
        fits, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    return "" if fits else f"option {option!r} of {rule.name!r} must be {wanted}, got {value!r}"


def range_problem(rule: Rule, option: str, value: Scalar) -> str:
    """Why a number is none of those that the table allows; '' if it is, or if the table has no bounds for it."""
    info = rule.about.get(option)
    if info is None or isinstance(value, str | bool):
        return ""
    if info.numbers and value not in info.numbers:
        words = " or ".join(f"{n:g}" for n in info.numbers)
        return f"option {option!r} of {rule.name!r} must be {words}, got {value!r}"
    if info.bounds and not info.bounds[0] <= value <= info.bounds[1]:
        low, high = info.bounds
        return f"option {option!r} of {rule.name!r} must lie in [{low:g}, {high:g}], got {value!r}"
    if isinstance(rule.options[option], int) and not isinstance(value, int):
        return f"option {option!r} of {rule.name!r} must be a whole number, got {value!r}"
    return ""
