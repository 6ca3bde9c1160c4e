"""Rule files: Python files of a user whose import decorates rules. They are named by a study file or a recipe.

At any time one set of rule files is in use: those of the study or recipe at hand. Using another set takes the rules of
the former one away. A file is run once per content; what is hashed is what is run. torch-free.
"""

from __future__ import annotations

import hashlib
import linecache
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from merge_search.errors import InputError, RuleError
from merge_search.rules.table import Row, RuleTable, collecting, taken

__all__ = ["FOLDER", "RuleFile", "find_rule_files", "in_use", "load_rule_file", "use_rule_files"]

FOLDER = "rules"
"""Beside an exported ``recipe.json``."""


@dataclass(frozen=True)
class RuleFile:
    """A rule file that was run.

    Attributes:
        name: Of the file, without its folder: what recipes call it.
        path: Where it was read.
        sha256: Of its bytes.
        rows: (table, row) of every rule that it defines.
        source: Its bytes.
    """

    name: str
    path: Path
    sha256: str
    rows: tuple[tuple[RuleTable[Any], Row], ...]
    source: bytes


_loaded: dict[tuple[str, str], RuleFile] = {}  # by path and hash
_in_use: dict[str, RuleFile] = {}  # by name


def load_rule_file(path: Path) -> RuleFile:
    """Run a rule file, once per content; its rules are not in use yet.

    Raises:
        RuleError: it is not there, cannot be run, or defines no rule.
    """
    path = path.resolve()
    if not path.is_file():
        raise RuleError(f"no rule file {path}")
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    key = (str(path), digest)
    if key not in _loaded:
        with collecting() as rows:
            _run(path, source, digest)
        if not rows:
            raise RuleError(
                f"{path} defines no rule: decorate a function with measure, selection, splice, operator, post, "
                "transform, statistic or granularity of merge_search.rules"
            )
        _loaded[key] = RuleFile(path.name, path, digest, tuple(_of_file(rows, path.name, digest)), source)
    return _loaded[key]


def _run(path: Path, source: bytes, digest: str) -> None:
    """Execute the bytes that were hashed, as a module of their own."""
    module = ModuleType(f"merge_search_rules_{digest[:12]}")
    module.__file__ = str(path)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # dataclasses and pickles in the file look for it
    linecache.checkcache(str(path))
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except InputError:
        raise
    except Exception as error:
        raise RuleError(f"{_place(error, path)}: cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        if before is not None:
            sys.modules[module.__name__] = before


def _place(error: Exception, path: Path) -> str:
    """``file:line`` of an error inside a file."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _of_file(rows: Sequence[tuple[RuleTable[Any], Row]], name: str, digest: str) -> list[tuple[RuleTable[Any], Row]]:
    """Rows that know their file.

    Raises:
        RuleError: two of them have one name.
    """
    out: list[tuple[RuleTable[Any], Row]] = []
    for table, row in rows:
        assert row.origin is not None
        for other_table, other in out:
            if other_table is table and other.name == row.name:
                raise RuleError(f"{row.origin}: {taken(table.kind, other)}; give one of them another name")
        origin = replace(row.origin, file=name, sha256=digest)
        out.append((table, replace(row, origin=origin)))  # type: ignore[type-var]
    return out


def use_rule_files(paths: Iterable[Path]) -> list[RuleFile]:
    """Run rule files and make their rules, and those of no other file, known by name.

    Raises:
        RuleError: with every problem: a file that cannot be used, a name that is taken. Then no rule file is in use.
    """
    files, problems = [], []
    for path in paths:
        try:
            files.append(load_rule_file(path))
        except InputError as error:
            problems += error.problems
    _leave()
    for file in files:
        known = _in_use.get(file.name)
        if known is not None and known is not file:
            problems.append(f"two rule files are called {file.name}: {known.path} and {file.path}; rename one")
            continue
        _in_use[file.name] = file
        for table, row in file.rows:
            try:
                table.add(row)
            except RuleError as error:
                problems += error.problems
    if problems:
        _leave()
        raise RuleError(problems)
    return files


def _leave() -> None:
    for file in _in_use.values():
        for table, row in file.rows:
            table.remove(row)
    _in_use.clear()


def in_use(name: str, sha256: str) -> RuleFile | None:
    """The rule file that a recipe names, if it is in use."""
    file = _in_use.get(name)
    return file if file is not None and file.sha256 == sha256 else None


def find_rule_files(folder: Path, wanted: dict[str, str]) -> list[Path]:
    """The rule files that a recipe names, beside it: in ``rules/`` or in its own folder. None is run.

    Args:
        wanted: Name -> sha256.

    Raises:
        RuleError: a file is missing or has other bytes, all of them at once.
    """
    paths, problems = [], []
    for name, digest in wanted.items():
        places = [p for p in (folder / FOLDER / name, folder / name) if p.is_file()]
        same = [p for p in places if hashlib.sha256(p.read_bytes()).hexdigest() == digest]
        if same:
            paths.append(same[0])
        elif places:
            problems.append(
                f"rules: {places[0]} is not the file that the recipe was made with: its sha256 must be {digest}"
            )
        else:
            problems.append(
                f"rules: the recipe needs the rule file {name}, and {folder / FOLDER} has none of that name"
            )
    if problems:
        raise RuleError(problems)
    return paths
