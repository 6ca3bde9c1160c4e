"""The switch of BoTorch that `_compat.botorch` sets is still there, and still keeps it from compiling."""

from __future__ import annotations

import inspect

import pytest
from botorch.acquisition.multi_objective import logei

from merge_search._compat.botorch import skip_compilation


def test_the_switch_keeps_botorch_from_compiling() -> None:
    skip_compilation()
    assert logei._load_attempted is True
    readers = [
        name
        for name, function in inspect.getmembers(logei, inspect.isfunction)
        if "_load_attempted" in function.__code__.co_names
    ]
    assert readers, "no function of the module reads the switch any more"


def test_a_switch_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(logei, "_load_attempted")
    with pytest.raises(AttributeError, match="no _load_attempted any more"):
        skip_compilation()
