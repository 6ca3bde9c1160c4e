"""Finding search spaces and evaluators by name: built-ins and guests come through the same door.

An entry point of the group ``merge_search.search_spaces`` or ``merge_search.evaluators`` names a table
``{name: "module:Class"}``. A name of the form ``path/to/file.py:Class`` loads the user's own file, which runs
its code: it is loaded only because the study file says so.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from merge_search.errors import InputError, nearest

__all__ = ["load", "names"]

KINDS = {"search_spaces": "search space", "evaluators": "evaluator"}


@cache
def names(kind: str) -> Mapping[str, str]:
    """Name -> ``"module:object"`` for ``search_spaces`` or ``evaluators``.

    Raises:
        InputError: two distributions register one name.
    """
    table: dict[str, str] = {}
    problems = []
    for point in entry_points(group=f"merge_search.{kind}"):
        for name, target in point.load().items():
            if table.get(name, target) != target:
                problems.append(
                    f"{KINDS[kind]} {name!r} is registered twice: {table[name]} and {target}; uninstall one"
                )
            table[name] = target
    if problems:
        raise InputError(problems)
    return table


def load(kind: str, name: str, *, folder: Path | None = None) -> Any:
    """The class behind `name`; imports its module.

    Args:
        folder: What a relative ``file.py:Class`` is relative to.

    Raises:
        InputError: no such name (with the nearest known one), file or class.
    """
    if ".py:" in name:
        return _from_file(kind, name, folder or Path())
    target = names(kind).get(name)
    if target is None:
        raise InputError(f"no {KINDS[kind]} is called {name!r}{nearest(name, names(kind))}")
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _from_file(kind: str, name: str, folder: Path) -> Any:
    file_name, _, attribute = name.rpartition(":")
    path = (folder / file_name).resolve()
    if not path.is_file():
        raise InputError(f"{KINDS[kind]} {name!r}: no file {path}")
    module_name = f"merge_search_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    if not hasattr(sys.modules[module_name], attribute):
        raise InputError(f"{KINDS[kind]} {name!r}: {path} has no class {attribute!r}")
    return getattr(sys.modules[module_name], attribute)
