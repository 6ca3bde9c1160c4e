"""The parts of benchmarks/systems.py that decide its table: what is still to run, and the means that it prints."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OWN = {path.stem for folder in (BENCHMARKS, BENCHMARKS / "search") for path in folder.glob("*.py")}


@pytest.fixture
def systems(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The program as a module, gone again afterwards."""
    for folder in (BENCHMARKS, BENCHMARKS / "search"):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("MERGE_SEARCH_ZOO", "zoo")
    yield importlib.import_module("systems")
    for name in OWN & sys.modules.keys():
        del sys.modules[name]


def row(system: str, seed: int, mean: float) -> dict[str, Any]:
    numbers = {"test_mean": mean, "retention": 0.5, "worst": 0.1, "questions": 7200, "seconds": 30.0, "peak_mib": 700}
    return {"zoo": "lm", "system": system, "seed": seed, "candidates": 12, **numbers}


def test_rows_that_the_table_has_are_not_measured_again(systems: ModuleType, tmp_path: Path) -> None:
    table = tmp_path / "systems.csv"
    systems.append(table, systems.FIELDS, [row("TIES", 0, 0.6)])
    args = argparse.Namespace(out=table, seeds=[0, 1], zoo=["lm"], only=["TIES", "CKI"], candidates=12, adapters=None)
    assert [(t.system, t.seed) for t in systems.tasks(args, tmp_path)] == [("CKI", 0), ("TIES", 1), ("CKI", 1)]


def test_the_table_has_means_over_seeds_with_their_interval_and_the_best_first(systems: ModuleType) -> None:
    rows = [{k: str(v) for k, v in r.items()} for r in (row("TIES", 0, 0.6), row("CKI", 0, 0.68), row("CKI", 1, 0.72))]
    lines = list(systems.summary(rows))[-2:]
    # Student's 97.5 % point of one degree of freedom is 12.706, and the standard error of the two values 0.02
    assert lines[0].startswith("| CKI | 0.700 ± 0.254 | 0.500 ± 0.000 | 0.100 ± 0.000 | 7200 | 30 | 700 | 2 |")
    assert lines[1].startswith("| TIES | 0.600 | 0.500 | 0.100 | 7200 |")
