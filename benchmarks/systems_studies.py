"""The systems of benchmarks/systems.py, as the sections ``space`` and ``search`` of study files.

``own`` names the baselines whose trials are the system, where those of the space are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from live_opponents import SPACES
from zoo import Zoo

from merge_search.presets import PRESETS

__all__ = ["ON_ADAPTERS", "SYSTEMS"]

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


def _space(search: Part | None = None, **options: Any) -> Callable[[Zoo], Part]:
    return lambda zoo: {"space": options, "search": {"baselines": [], **(search or {})}}


def _adamerging(name: str) -> Callable[[Zoo], Part]:
    """Fewer and larger steps than the release's 500 of 1e-3, which alone would ask ten times the budget."""
    baseline = {name: {"steps": 20, "step_size": 0.02}}
    space = {"type": "uniform", "presets": ["task_arithmetic"]}
    return lambda zoo: {"space": space, "search": {"baselines": [baseline]}, "own": [name]}


_PER_EXPERT = {"per": "expert", "bounds": [0.5, 3]}

SYSTEMS: dict[str, Callable[[Zoo], Part]] = {
    "average": _grid("average"),
    "task arithmetic": _grid("task_arithmetic"),
    "TIES": _grid("ties"),
    "TSV-M": _grid("tsv_m"),
    "RegMean": _grid("regmean"),
    "RegMean, in parts": _grid("regmean_parts"),
    "our search": lambda zoo: {
        "space": {"type": "uniform", "presets": ["task_arithmetic", "ties", "tsv_m", "regmean_parts"]},
        "search": {"learner": {}},
    },
    "CKI": _grid("cki_soft", "cki_hard", "cki_recommender"),
    "CKI, learned map": _space(presets=[{"cki_learned": {"map": "diagonal"}}]),
    "APL, first order": _space(presets=["apl_paper"]),
    "APL, exact": _space(presets=["apl_exact"]),
    "DF-Merge": _space({"sampler_options": {"n_startup": 10}}, type="df_merge", anchors=0.5),
    "DF-Merge, as published": _space({"sampler_options": {"n_startup": 10}}, type="df_merge"),
    "PCB": _grid("pcb", "pcb_paper"),
    "PCB-ES": _space({"sampler": "cmaes"}, presets=["pcb"], coefficients=_PER_EXPERT, density=0.1),
    "AdaMerging": _adamerging("adamerging"),
    "AdaMerging, layer-wise": _adamerging("adamerging_layer"),
    "AdaMerging++": _adamerging("adamerging_pp"),
    "SMILE": _space(type="uniform", transform={"smile": {"rank": [4, 16, 32], "gate_rank": [1, 4]}}),
    "PETAL": _space(type="lowrank"),
}
"""Systems by the name that the table shows. MAL needs experts of other shapes, which the zoo lacks."""

ON_ADAPTERS: dict[str, Callable[[Zoo], Part]] = {
    **{name: SYSTEMS[name] for name in ("average", "task arithmetic", "TIES", "TSV-M", "our search")},
    "CoPA": _grid("copa", "copa_released"),
    "CoPA, searched": _space(
        presets=["copa", {"copa": {"cross": False}}], coefficients={"per": "expert", "bounds": [0, 1.5]}
    ),
    "Core Space": _grid("core"),
}
"""Systems whose experts are adapters; `SYSTEMS` that merge any models are beside them."""
