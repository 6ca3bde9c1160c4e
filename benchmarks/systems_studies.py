"""The systems of benchmarks/systems.py, as the sections ``space`` and ``search`` of study files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from live_opponents import SPACES
from zoo import Zoo

from merge_search.presets import PRESETS

__all__ = ["SYSTEMS"]

Part = dict[str, Any]


def _grid(*presets: str) -> Callable[[Zoo], Part]:
    """Published methods at their published or usual settings (`Preset.grid`), one after the other."""
    entries = sum(len(PRESETS[name].grid) for name in presets)
    space = {"type": f"{SPACES}:PresetGrid", "presets": list(presets)}

    def part(zoo: Zoo) -> Part:
        # Base, experts, average and task arithmetic come first. No entry is tried twice.
        n_trials = entries + len(zoo.experts) + 3
        return {"space": space, "search": {"sampler": "random", "baselines": [], "n_trials": n_trials}}

    return part


def _space(**options: Any) -> Callable[[Zoo], Part]:
    return lambda zoo: {"space": options, "search": {"baselines": []}}


SYSTEMS: dict[str, Callable[[Zoo], Part]] = {
    "average": _grid("average"),
    "task arithmetic": _grid("task_arithmetic"),
    "TIES": _grid("ties"),
    "TSV-M": _grid("tsv_m"),
    "our search": lambda zoo: {
        "space": {"type": "uniform", "presets": ["task_arithmetic", "ties", "tsv_m"]},
        "search": {"baselines": ["tsv_m"], "learner": {}},
    },
    "CKI": _grid("cki_soft", "cki_hard", "cki_recommender"),
    "APL": _grid("apl"),
    "PCB": _grid("pcb", "pcb_paper"),
    "PETAL": _space(type="lowrank"),
}
"""Systems by the name that the table shows."""
