"""Mistakes in rules from outside are refused with file and line: as the file is read, or once the function has run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_search.engine.contracts import Tensors
from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.errors import InputError, NonFiniteError, RecipeError, RuleError
from merge_search.recipe import Recipe
from merge_search.rules import MEASURES, measure, table, use_rule_files

HEAD = "import torch\nfrom merge_search.presets import add_preset\nfrom merge_search.rules import *\n"  # three lines


@pytest.fixture(autouse=True)
def no_rules_left() -> Iterator[None]:
    yield
    use_rule_files([])


@pytest.fixture
def use(tmp_path: Path) -> Callable[[str], Path]:
    """Use a rule file of this text below `HEAD`."""

    def write(text: str) -> Path:
        path = tmp_path / "rules.py"
        path.write_text(HEAD + text)
        use_rule_files([path])
        return path

    return write


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("@measure('magnitude')\ndef f(context):\n    'x'\n", 4, "the measure 'magnitude' is built in"),
        ("@selection()\ndef top_k(context):\n    'x'\n", 4, "the selection 'top_k' is built in"),
        ("add_preset('ties', 'x', {})\n", 4, "the preset 'ties' is built in"),
        ("def f(context):\n    'x'\nmeasure('a')(f)\npost('b')(f)\n", 4, "f must take (context, delta, *"),
        (
            "@measure()\ndef f(deltas, base):\n    'x'\n",
            4,
            "f must take (context, *, option=default), found (deltas, base)",
        ),
        ("@measure()\ndef f():\n    'x'\n", 4, "f must take (context, *, option=default), found ()"),
        ("@splice()\ndef f(context, **options):\n    'x'\n", 4, "found **options"),
        ("@splice()\ndef f(context, *, eps):\n    'x'\n", 4, "option 'eps' of f needs a default"),
        ("@splice()\ndef f(context, *, eps=[1]):\n    'x'\n", 4, "option 'eps' of f needs a default"),
        ("@measure()\ndef f(context):\n    return []\n", 4, "f needs one line on what it does"),
        ("@measure('a b')\ndef f(context):\n    'x'\n", 4, "a rule's name must be letters"),
        ("@selection(scopes=('model',))\ndef f(context):\n    'x'\n", 4, "scopes must be among tensor, row, got model"),
        ("\nmeasure()(3)\n", 5, "a rule must be a function, got 3"),
        ("@measure('a')\ndef f(context):\n    'x'\n@measure('a')\ndef g(context):\n    'x'\n", 7, "'a' is defined in"),
        ("x = 1 / 0\n", 4, "cannot be loaded: ZeroDivisionError: division by zero"),
        ("import no_such_thing\n", 4, "cannot be loaded: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def f(:\n", 4, "cannot be loaded: SyntaxError"),
    ],
)
def test_a_file_is_refused_with_its_line(text: str, line: int, message: str, use: Any, tmp_path: Path) -> None:
    with pytest.raises(RuleError) as refused:
        use(text)
    assert f"{tmp_path / 'rules.py'}:{line}: " in str(refused.value)
    assert message in str(refused.value)
    assert "a" not in MEASURES


def test_a_file_without_rules_and_one_that_is_not_there_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(RuleError) as refused:
        use_rule_files([tmp_path / "empty.py", tmp_path / "gone.py"])
    first, second = refused.value.problems
    assert "empty.py defines no rule: decorate a function" in first
    assert second == f"no rule file {tmp_path / 'gone.py'}"


def test_a_name_of_another_file_is_taken(use: Any, tmp_path: Path) -> None:
    text = "@measure('a')\ndef f(context):\n    'x'\n    return context.deltas\n"
    path = use(text)
    other = tmp_path / "other.py"
    other.write_text(HEAD + text)
    with pytest.raises(RuleError, match=re.escape(f"{other}:4: the measure 'a' is defined in {path}:4")):
        use_rule_files([path, other])


# ------------------------------------------------------------------------------------------------ running


@pytest.fixture(scope="module")
def tensors() -> MemoryTensors:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(8, 6, generator=generator)}
    experts = {e: {"w": base["w"] + 0.1 * torch.randn(8, 6, generator=generator)} for e in ("maths", "code")}
    return MemoryTensors(base, experts)


MEASURE = {"assess": {"measure": "f"}, "select": {"kind": "top_k"}, "densities": {"maths": 0.5}}
SELECTION = {"select": {"kind": "f"}, "densities": {"maths": 0.5}}
SPLICE = {"splice": {"kind": "f"}}
OPERATOR = {"operator": {"name": "f"}}
POST = {"post": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("decorator", "body", "settings", "message"),
    [
        (
            "measure()",
            "return context.deltas[0]",
            MEASURE,
            "must be a list of 2 tensors, one per expert, got one tensor",
        ),
        (
            "measure()",
            "return context.deltas[:1]",
            MEASURE,
            "must be a list of 2 tensors, one per expert, got a list of 1",
        ),
        ("measure()", "return [1.0, 2.0]", MEASURE, "got a list of 2 with float"),
        ("measure()", "return None", MEASURE, "got NoneType"),
        (
            "measure()",
            "return [t[:3] for t in context.deltas]",
            MEASURE,
            "expert 'code' must have the tensor's shape (8, 6), got (3, 6)",
        ),
        ("measure()", "return [t > 0 for t in context.deltas]", MEASURE, "must be a floating dtype, got torch.bool"),
        (
            "measure(bounded=True)",
            "return list(context.deltas)",
            MEASURE,
            "is declared bounded and must not be negative",
        ),
        ("selection()", "return list(context.scores)", SELECTION, "must be boolean, got torch.float32"),
        (
            "selection()",
            "return [t.ravel() > 0 for t in context.scores]",
            SELECTION,
            "must have the tensor's shape (8, 6), got (48,)",
        ),
        (
            "selection()",
            "return [context.uniform(e) > 0 for e in context.experts]",
            SELECTION,
            "must be declared with is_random=True",
        ),
        ("splice()", "return list(context.deltas)", SPLICE, "must be one tensor, got a list of 2"),
        ("splice()", "return context.deltas[0].sum()", SPLICE, "must have the tensor's shape (48,), got ()"),
        ("operator()", "return list(context.deltas)", OPERATOR, "must be one tensor, got a list of 2"),
        (
            "operator(decomposing=True)",
            "return context.base",
            OPERATOR,
            "must be a list of 2 tensors, one per expert, got one tensor",
        ),
        ("operator()", "return context.base.T", OPERATOR, "must have the tensor's shape (8, 6), got (6, 8)"),
        ("post()", "return delta.int()", POST, "must be a floating dtype, got torch.int32"),
    ],
)
def test_what_a_rule_returns_is_checked(
    decorator: str, body: str, settings: dict[str, Any], message: str, tensors: MemoryTensors, use: Any
) -> None:
    arguments = "context, delta" if decorator == "post()" else "context"
    path = use(f"@{decorator}\ndef f({arguments}):\n    'x'\n    {body}\n")
    with pytest.raises(RuleError) as refused:
        list(MergeEngine(tensors, compile=False).merged(Recipe.from_dict({"models": tensors.models, **settings})))
    assert str(refused.value).startswith(f"{path}:")
    assert message in str(refused.value)
    assert "tensor 'w'" in str(refused.value)


@pytest.mark.parametrize(
    ("decorator", "settings", "expert"),
    [
        ("measure()", MEASURE, ", expert 'maths'"),
        ("operator(decomposing=True)", OPERATOR, ", expert 'code'"),
    ],
)
def test_nan_is_named_with_its_expert(
    decorator: str, settings: dict[str, Any], expert: str, tensors: MemoryTensors, use: Any
) -> None:
    path = use(
        f"@{decorator}\ndef f(context):\n    'x'\n    last = context.deltas[-1].clone()\n"
        "    last[0, 0] = float('nan')\n"
        "    return [*context.deltas[:-1], last]\n"
    )
    with pytest.raises(NonFiniteError) as refused:
        list(MergeEngine(tensors, compile=False).merged(Recipe.from_dict({"models": tensors.models, **settings})))
    assert str(refused.value).startswith(f"{path}:4: ")
    assert f"for tensor 'w'{expert} must be finite" in str(refused.value)


@pytest.mark.parametrize("settings", [SPLICE, OPERATOR, POST], ids=["splice", "operator", "post"])
def test_nan_of_a_whole_tensor_is_named_with_the_tensor(
    settings: dict[str, Any], tensors: MemoryTensors, use: Any
) -> None:
    kind = next(iter(settings))
    path = use(f"@{kind}()\ndef f(context{', delta' * (kind == 'post')}):\n    'x'\n    return context.base / 0\n")
    with pytest.raises(NonFiniteError, match="must be finite") as refused:
        list(MergeEngine(tensors, compile=False).merged(Recipe.from_dict({"models": tensors.models, **settings})))
    assert str(refused.value).startswith(f"{path}:4: ")
    assert "tensor 'w'" in str(refused.value)


def test_an_error_inside_is_given_with_the_line_that_raised_it(tensors: MemoryTensors, use: Any) -> None:
    path = use("@measure()\ndef f(context):\n    'x'\n    a = 1\n    return context.nothing\n")
    with pytest.raises(
        RuleError, match=rf"{re.escape(str(path))}:8: measure 'f' failed for tensor 'w': AttributeError"
    ):
        list(MergeEngine(tensors, compile=False).merged(Recipe.from_dict({"models": tensors.models, **MEASURE})))


def test_a_rule_that_writes_into_the_models_is_refused(tensors: MemoryTensors, use: Any) -> None:
    path = use("@measure()\ndef f(context):\n    'x'\n    return [t.abs_() for t in context.deltas]\n")
    with pytest.raises(RuleError, match=re.escape(f"{path}:4: measure 'f' changed a tensor that it was given")):
        list(MergeEngine(tensors, compile=False).merged(Recipe.from_dict({"models": tensors.models, **MEASURE})))


def test_memory_that_is_used_up_stays_what_it_is(tensors: MemoryTensors, use: Any) -> None:
    use("@measure()\ndef f(context):\n    'x'\n    raise torch.OutOfMemoryError('no more')\n")
    with pytest.raises(torch.OutOfMemoryError):
        list(MergeEngine(tensors, compile=False).merged(Recipe.from_dict({"models": tensors.models, **MEASURE})))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": {"kind": "f", "options": {"share": 0.5}}}, "select: 'f' has no option 'share'; known: kind, times"),
        ({"select": {"kind": "f", "options": {"times": "two"}}}, "option 'times' of 'f' must be a number, got 'two'"),
        (
            {"select": {"kind": "f", "options": {"kind": "odd"}}},
            "option 'kind' of 'f' must be one of even, round, got 'odd'",
        ),
        ({"select": {"kind": "f", "scope": "model"}}, "select: f ranks by tensor, not by model"),
        ({"select": {"kind": "top_k", "options": {"times": 1}}}, "select: 'top_k' has no option 'times'"),
        ({"splice": {"kind": "sum", "options": {"times": 1}}}, "splice: 'sum' has no option 'times'"),
    ],
)
def test_options_are_checked_before_the_merge(
    settings: dict[str, Any], message: str, tensors: MemoryTensors, use: Any
) -> None:
    use(
        "from typing import Literal\n@selection()\n"
        "def f(context, *, times: float = 1.0, kind: Literal['even', 'round'] = 'even'):\n    'x'\n"
    )
    r = Recipe.from_dict({"models": tensors.models, **settings})
    assert any(message in problem for problem in MergeEngine(tensors, compile=False).check(r))


def test_statistics_that_a_measure_names_must_be_there(tensors: MemoryTensors, use: Any) -> None:
    use(
        "@measure(statistics=('gradient',))\ndef f(context):\n    'x'\n"
        "    return [context.statistic('gradient', e) for e in context.experts]\n"
    )
    r = Recipe.from_dict({"models": tensors.models, **MEASURE})
    with pytest.raises(RecipeError, match="the statistic 'gradient' of expert 'code' is needed for tensor 'w'"):
        list(MergeEngine(tensors, compile=False).merged(r))
    bare = MergeEngine(_Bare(tensors), compile=False)
    assert any("measure 'f' needs statistics from data" in p for p in bare.check(r))


class _Bare(Tensors):
    """Tensors without statistics."""

    def __init__(self, tensors: MemoryTensors) -> None:
        self.models, self.groups, self.device, self._tensors = tensors.models, tensors.groups, tensors.device, tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def base(self, name: str) -> Tensor:
        return self._tensors.base(name)

    def expert(self, expert: str, name: str) -> Tensor:
        return self._tensors.expert(expert, name)


# ------------------------------------------------------------------------------------------------ other doors


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Pretend that a package is installed whose entry point loads this text."""
    before = dict(MEASURES._rows)

    def install(text: str) -> None:
        (tmp_path / "a_package_of_rules.py").write_text(HEAD + text)
        point = EntryPoint("mine", "a_package_of_rules", table.GROUP)
        monkeypatch.setattr(table, "entry_points", lambda group: [point])
        monkeypatch.setattr(table, "_is_loaded", False)
        monkeypatch.delitem(sys.modules, "a_package_of_rules", raising=False)

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    MEASURES._rows.clear()
    MEASURES._rows.update(before)


def test_an_installed_package_brings_rules_by_name(installed: Any, tensors: MemoryTensors) -> None:
    installed("@measure('installed')\ndef f(context):\n    'x'\n    return [t.abs() for t in context.deltas]\n")
    r = Recipe.from_dict({"models": tensors.models, **MEASURE, "assess": {"measure": "installed"}})
    plain = Recipe.from_dict({"models": tensors.models, **MEASURE, "assess": {"measure": "magnitude"}})
    engine = MergeEngine(tensors, compile=False)
    assert r.rules == {}
    assert torch.equal(next(engine.merged(r))[1], next(engine.merged(plain))[1])


def test_a_package_that_cannot_be_loaded_is_a_sentence(installed: Any) -> None:
    installed("1 / 0\n")
    with pytest.raises(
        InputError, match=r"rules 'mine' .* of an installed package cannot be loaded: ZeroDivisionError"
    ):
        list(MEASURES)


def test_a_rule_of_a_running_session_can_be_defined_again() -> None:
    def define(factor: float) -> None:
        @measure("of_the_session")
        def of_the_session(context: Any) -> list[torch.Tensor]:
            """of this test"""
            return [factor * t.abs() for t in context.deltas]

    try:
        define(1.0)
        define(2.0)

        with pytest.raises(RuleError, match="the measure 'of_the_session' is defined in"):

            @measure("of_the_session")
            def another(context: Any) -> list[torch.Tensor]:
                """another one"""
                return list(context.deltas)
    finally:
        MEASURES.remove(MEASURES["of_the_session"])
