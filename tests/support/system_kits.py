"""Small models and judges for the examples of docs/systems.md: a kit is a study file without what an example says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

__all__ = ["KITS"]

Study = dict[str, Any]
Kit = Callable[[Path, Path, pytest.TempPathFactory], Study]


def _study(models: Study, evaluate: list[Study]) -> Study:
    return {
        "study": {"name": "example", "seed": 0},
        "models": models,
        "evaluate": evaluate,
        "search": {"finalists": 1},
        "statistics": {"n_rows": 8},
        "device": "cpu",
    }


def language(folder: Path, demo: Path, temporary: pytest.TempPathFactory) -> Study:
    """The demo's language models."""
    experts = {e: str(demo / "models" / e) for e in ("maths", "stories")}
    tasks = {"evaluator": "lm_eval", "tasks": ["demo_maths", "demo_stories"], "include_path": str(demo / "tasks")}
    return _study(
        {"base": str(demo / "models" / "base"), "experts": experts, "dtype": "float32"},
        [{**tasks, "batch_size": 32, "limit": 24, "fit_limit": 24}],
    )


KITS: dict[str, Kit] = {"language": language}
"""Kits by the name that the page gives them."""
