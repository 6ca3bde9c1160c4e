"""Ways of searching, as parts of study files. All of them share engine, questions and the budget in questions.

A learner has the product's default settings unless a row says otherwise, so that no figure rests on a choice made on
test rows. "fine-tuning", with or without its best step size given, is no study: see `live_finetune.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from zoo import Zoo

from merge_search.presets import PRESETS
from merge_search.study_file import Learner

__all__ = ["FINE_TUNING", "FINE_TUNING_TOLD", "IMPORTANT", "OPPONENTS", "TWO_LEVELS", "learns", "setup"]

Part = dict[str, Any]
SPACES = Path(__file__).with_name("live_spaces.py")
TWO_LEVELS, FINE_TUNING = "two levels", "fine-tuning"
FINE_TUNING_TOLD = "fine-tuning, step size told"
"""Fine-tuning with the step size that turns out to be best in hindsight."""
GRID = ["task_arithmetic", "ties", "tsv_m", "dare", "iso_c", "della", "dare_ties", "breadcrumbs", "magmax", "consensus",
        "pcb", "sce", "magnitude_soft", "magnitude_hard", "iso_cts", "model_stock", "fisher", "regmean",
        "regmean_parts"]  # fmt: skip
MISSION: Part = {"type": "compatibility"}
UNIFORM: Part = {"type": "uniform", "presets": ["task_arithmetic", "ties", "tsv_m", "regmean_parts"]}
NO_LABELS = {"loss": "pseudo"}
"""Labels of the fit rows are each expert's own answers."""


def _blockwise(sampler: str) -> Callable[[Zoo], Part]:
    return lambda zoo: {"space": {"type": "blockwise"}, "search": {"sampler": sampler, "baselines": []}}


def _evolve(zoo: Zoo) -> Part:
    """mergekit-evolve: a weight per block and expert, and CMA-ES that begins at 1 / experts with sigma 1/6.

    Sigma is 1/6 of a weight, here in a box 1.5 wide. It differs from the original in two points: weights are bounded
    and not folded by abs, and generations are those of Optuna's CMA-ES (4 + 3 ln n candidates, as there).
    """
    genome = {
        "models": list(zoo.experts), "base_model": "base", "merge_method": "task_arithmetic", "layer_granularity": 1,
    }  # fmt: skip
    x0 = {f"weight.{e}.layers.{j}": 1 / len(zoo.experts) for e in zoo.experts for j in range(zoo.n_blocks)}
    space = {"type": f"{SPACES}:Evolve", "genome": genome, "weights": [0.0, 1.5]}
    options = {"x0": x0, "sigma0": 1 / 6 / 1.5}
    return {"space": space, "search": {"sampler": "cmaes", "sampler_options": options, "baselines": []}}


def _presets(zoo: Zoo) -> Part:
    entries = sum(len(PRESETS[name].grid) for name in GRID)
    search = {"sampler": "random", "baselines": [], "n_trials": entries + len(zoo.experts) + 3}
    return {"space": {"type": f"{SPACES}:PresetGrid", "presets": GRID}, "search": search}


def _alone(**changes: Any) -> Callable[[Zoo], Part]:
    """One fit per output row from task arithmetic, of as many steps as the budget pays for. All else is as usual."""
    fixed = {"per": "row", "steps": 10_000, "step_size": prod(Learner().step_size) ** 0.5, "warm_start": False}
    search = {"sampler": "random", "baselines": [], "learner": {**fixed, **changes}}
    return lambda zoo: {"space": {"type": "uniform", "presets": ["task_arithmetic"]}, "search": search}


def _two_levels(**changes: Any) -> Callable[[Zoo], Part]:
    return lambda zoo: {"space": UNIFORM, "search": {"sampler": "botorch", "learner": changes}}


OPPONENTS: dict[str, Callable[[Zoo], Part] | None] = {
    TWO_LEVELS: _two_levels(),
    FINE_TUNING: None,
    "mergekit-evolve": _evolve,
    "learner alone": _alone(),
    "two levels, no labels": _two_levels(**NO_LABELS),
    "botorch": _blockwise("botorch"),
    "presets": _presets,
    "learner alone, no labels": _alone(**NO_LABELS),
    "cmaes": _blockwise("cmaes"),
    "df-merge": lambda zoo: {"space": {"type": "df_merge"}, "search": {"sampler": "gp", "baselines": []}},
    "tpe": _blockwise("tpe"),
    "gp": _blockwise("gp"),
    "random": _blockwise("random"),
    FINE_TUNING_TOLD: None,
    "botorch, mission space": lambda zoo: {"space": MISSION, "search": {"sampler": "botorch", "baselines": []}},
}
"""Opponents in the order in which they run. None: no study."""
IMPORTANT = [TWO_LEVELS, FINE_TUNING, "mergekit-evolve", "learner alone", "two levels, no labels", "botorch", "presets"]
"""Opponents that run on the second zoo by default."""


def learns(name: str, zoo: Zoo) -> bool:
    """Whether an opponent is a study with a learner, which adapts its fits to the budget."""
    make = OPPONENTS[name]
    return make is not None and "learner" in make(zoo)["search"]


def setup(name: str, zoo: Zoo) -> Part:
    """The sections ``space`` and ``search`` of a study file.

    Raises:
        KeyError: There is no such opponent, or it is no study.
    """
    make = OPPONENTS[name]
    if make is None:
        raise KeyError(name)
    return make(zoo)
