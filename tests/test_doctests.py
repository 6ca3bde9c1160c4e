"""The examples in the public modules' docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

MODULES = ["catalogue", "errors", "evaluation", "objective", "options", "presets", "recipe", "space", "testing.space"]
WITH_EXAMPLES = {"errors", "evaluation", "objective", "options", "space", "testing.space"}


def rules() -> list[str]:
    """The modules of `merge_search.rules`, where there are any."""
    try:
        package = importlib.import_module("merge_search.rules")
    except ModuleNotFoundError:
        return []
    return ["rules", *(f"rules.{module.name}" for module in pkgutil.iter_modules(package.__path__))]


@pytest.mark.parametrize("name", [*MODULES, *rules()])
def test_examples_print_what_they_say(name: str) -> None:
    module = importlib.import_module(f"merge_search.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted or name not in WITH_EXAMPLES, "its examples are gone"
