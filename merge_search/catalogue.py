"""Find search spaces and evaluators by name, check them and build them.

Built-in classes and a user's own come through the same door. An entry point of the group ``merge_search.search_spaces``
or ``merge_search.evaluators`` names a table ``{name: "module:Class"}``. A name of the form ``path/to/file.py:Class``
loads the user's own file. A name ``@key`` in such a table is a key that every family of spaces has; its class is built
around the family. Loading runs the code of that file, so it happens only when the study file names it.

`build_space` and `build_evaluator` are the only places that ask what a class has. Everything behind them can rely on
every member of `SearchSpace` and `Evaluator`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from types import MethodType
from typing import Any

from merge_search.errors import InputError, MergeSearchError, nearest
from merge_search.evaluation import Evaluator, SplitShares, Teachable
from merge_search.options import absolute
from merge_search.space import SearchSpace, SpaceContext

__all__ = ["build_evaluator", "build_space", "load", "names"]


@dataclass(frozen=True)
class _Kind:
    """What a class of one catalogue must have.

    Attributes:
        noun: Its name in messages.
        contract: The protocol: abstract methods are required, annotated members without a value are set by the
            constructor, annotated members with a value and other methods are defaults.
        path_option: The option that holds paths in classes from before `folder` was passed to them.
        earlier_names: Today's name of a method -> the name that an older class may use.
    """

    noun: str
    contract: type
    path_option: str
    earlier_names: Mapping[str, str]

    @property
    def methods(self) -> list[str]:
        return sorted(self.contract.__abstractmethods__)  # type: ignore[attr-defined]

    @property
    def attributes(self) -> list[str]:
        return [name for name in self.contract.__annotations__ if name not in vars(self.contract)]

    @property
    def defaults(self) -> dict[str, Any]:
        members = vars(self.contract)
        methods = [n for n, m in members.items() if inspect.isfunction(m) and n[0] != "_" and n not in self.methods]
        return {name: members[name] for name in (*self.contract.__annotations__, *methods) if name in members}


_KINDS = {
    "search_spaces": _Kind("search space", SearchSpace, "file", {}),
    "evaluators": _Kind(
        "evaluator",
        Evaluator,
        "include_path",
        {"cache_teacher": "remember", "teacher_questions": "questions_to_remember"},
    ),
}


def names(kind: str) -> Mapping[str, str]:
    """Name -> ``"module:object"`` for ``search_spaces`` or ``evaluators``.

    Raises:
        InputError: Two distributions register one name.
    """
    return {name: target for name, target in _registered(kind).items() if not name.startswith("@")}


@cache
def _registered(kind: str) -> Mapping[str, str]:
    """As `names`, with the keys ``@key`` that every member has."""
    table: dict[str, str] = {}
    problems = []
    for point in entry_points(group=f"merge_search.{kind}"):
        for name, target in point.load().items():
            if table.get(name, target) != target:
                problems.append(
                    f"{_KINDS[kind].noun} {name!r} is registered twice: {table[name]} and {target}; uninstall one"
                )
            table[name] = target
    if problems:
        raise InputError(problems)
    return table


def load(kind: str, name: str, *, folder: Path | None = None) -> Any:
    """The class behind `name`. Imports its module.

    Args:
        kind: ``search_spaces`` or ``evaluators``.
        name: A registered name or ``file.py:Class``.
        folder: The folder that a relative ``file.py`` is relative to.

    Returns:
        The class, or the function that builds an object.

    Raises:
        InputError: No such name (with the nearest known one), file or class, a file that fails when it is run, or a
            class that lacks methods.
    """
    noun = _KINDS[kind].noun
    if ".py:" in name:
        found = _from_file(noun, name, folder or Path())
    else:
        target = names(kind).get(name)
        if target is None:
            raise InputError(f"no {noun} is called {name!r}{nearest(name, names(kind))}")
        module, _, attribute = target.partition(":")
        found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, type):
        _check(_KINDS[kind], name, found, _KINDS[kind].methods)
    return found


def build_space(name: str, options: Mapping[str, Any], context: SpaceContext, *, folder: Path) -> SearchSpace:
    """Load, build and check a search space.

    Args:
        name: See `load`.
        options: The ``space`` entry of the study file without ``type``.
        context: What the space may know of the models.
        folder: The folder of the study file.

    Raises:
        InputError: See `load`. The space's own problems are a `SpaceError`.
    """
    left = dict(options)
    around = [(t, left.pop(n[1:])) for n, t in _registered("search_spaces").items() if n[0] == "@" and n[1:] in left]

    def build(context: SpaceContext) -> SearchSpace:
        space: SearchSpace = _build("search_spaces", name, dict(left), folder, context)
        return space

    for target, value in around:
        module, _, attribute = target.partition(":")
        build = partial(getattr(importlib.import_module(module), attribute), value, build=build)
    return build(context)


def build_evaluator(
    name: str, options: Mapping[str, Any], *, shares: SplitShares, seed: int, folder: Path
) -> Evaluator:
    """Load, build and check an evaluator.

    Args:
        name: See `load`.
        options: An entry of the study file's ``evaluate`` list without ``evaluator``.
        shares: Shares of the splits.
        seed: The study's seed.
        folder: The folder of the study file.

    Raises:
        InputError: See `load`. The evaluator's own problems are a `StudyFileError`.
    """
    evaluator: Evaluator = _build("evaluators", name, dict(options), folder, shares=shares, seed=seed)
    return evaluator


def _build(kind: str, name: str, options: dict[str, Any], folder: Path, *arguments: Any, **named: Any) -> Any:
    contract = _KINDS[kind]
    found = load(kind, name, folder=folder)
    takes_folder = "folder" in inspect.signature(found).parameters
    if takes_folder:
        named["folder"] = folder
    if not takes_folder or contract.contract not in getattr(found, "__mro__", ()):
        _make_absolute(options, contract.path_option, folder)
    try:
        built = found(options, *arguments, **named)
    except MergeSearchError:
        raise
    except Exception as error:
        if ".py:" not in name:
            raise
        raise InputError(f"{contract.noun} {name!r} cannot be built: {_where_and_what(error)}") from error
    _complete(contract, built)
    _check(contract, name, built, [*contract.methods, *contract.attributes])
    return built


def _make_absolute(options: dict[str, Any], key: str, folder: Path) -> None:
    """Make paths absolute for a class that does not resolve its own. Other values are left to the class."""
    value = options.get(key)
    if isinstance(value, str) and value:
        options[key] = str(absolute(value, folder)) if key == "file" else [str(absolute(value, folder))]
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        options[key] = [str(absolute(item, folder)) for item in value]


def _complete(contract: _Kind, built: Any) -> None:
    """Add the contract's defaults, and today's names of its methods, to an object whose class does not inherit them."""
    missing = {name: value for name, value in contract.defaults.items() if not hasattr(built, name)}
    for name, earlier in contract.earlier_names.items():
        own = getattr(type(built), name, None)
        if hasattr(built, earlier) and own in (None, getattr(Teachable, name)):  # the protocol's own does nothing
            missing[name] = getattr(built, earlier)
    for name, value in missing.items():
        try:
            object.__setattr__(built, name, MethodType(value, built) if inspect.isfunction(value) else value)
        except AttributeError:  # a class with __slots__
            raise InputError(
                f"{contract.noun} {type(built).__name__} must have the attribute {name!r}: "
                f"inherit from {_full_name(contract.contract)} or add it"
            ) from None


def _check(contract: _Kind, name: str, found: Any, members: list[str]) -> None:
    """Raise `InputError` with every member that `found`, a class or an object, lacks."""
    lacking = [member for member in members if not hasattr(found, member)]
    if lacking:
        kind = found if isinstance(found, type) else type(found)
        raise InputError(
            f"{contract.noun} {name!r}: {kind.__name__} in {_file_of(kind)} lacks {', '.join(lacking)}; "
            f"{_full_name(contract.contract)} says what each of them does"
        )


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _file_of(kind: type) -> str:
    try:
        return inspect.getsourcefile(kind) or kind.__module__
    except TypeError:  # a class that no file defines
        return kind.__module__


def _from_file(noun: str, name: str, folder: Path) -> Any:
    file_name, _, attribute = name.rpartition(":")
    path = (folder / file_name).resolve()
    if not path.is_file():
        raise InputError(f"{noun} {name!r}: no file {path}")
    module_name = f"merge_search_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[module_name]
            if isinstance(error, MergeSearchError) or not isinstance(error, Exception):
                raise
            raise InputError(f"{noun} {name!r}: {path} cannot be run: {_where_and_what(error)}") from error
    if not hasattr(sys.modules[module_name], attribute):
        raise InputError(f"{noun} {name!r}: {path} has no class {attribute!r}")
    return getattr(sys.modules[module_name], attribute)


def _where_and_what(error: Exception) -> str:
    """The error in one line, with the place where it was raised."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):
        return text  # its message has the file and the line
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text
