"""Internals of BoTorch 0.18."""

from __future__ import annotations

from botorch.acquisition.multi_objective import logei

__all__ = ["skip_compilation"]


def skip_compilation() -> None:
    """Keep BoTorch from compiling C++ for its multi-objective acquisition functions.

    Otherwise the first use compiles for minutes, for the same values at the same speed.

    Raises:
        AttributeError: BoTorch no longer has the switch.
    """
    if not hasattr(logei, "_load_attempted"):
        raise AttributeError("botorch.acquisition.multi_objective.logei has no _load_attempted any more")
    logei._load_attempted = True
