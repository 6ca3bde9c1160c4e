"""Samplers propose the next point, given the points that were tried.

A sampler is an `optuna.samplers.BaseSampler` whose suggestion is a function of (seed, trial number, stored trials), so
it can be repeated from the storage. A lost trial keeps its number, so later trials are drawn anew. Samplers are loaded
by name. Torch and BoTorch are imported only when a sampler that needs them is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from merge_search.errors import StudyFileError, nearest
from merge_search.search.samplers.options import BotorchOptions, check_options
from merge_search.search.samplers.unit_cube import CUT_ATTRIBUTE, distributions, suggest
from merge_search.space import Parameter

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

__all__ = ["CUT_ATTRIBUTE", "SAMPLERS", "check_sampler", "distributions", "make_sampler", "suggest"]

_HERE = "merge_search.search.samplers"
SAMPLERS: Mapping[str, tuple[str, str]] = {
    "botorch": (f"{_HERE}.noisy_gp", "NoisyGPSampler"),
    "tpe": (f"{_HERE}.builtin", "tpe"),
    "gp": (f"{_HERE}.builtin", "gp"),
    "cmaes": (f"{_HERE}.builtin", "cmaes"),
    "nsga2": (f"{_HERE}.builtin", "nsga2"),
    "random": (f"{_HERE}.builtin", "random"),
}
"""Name in a study file -> module and function, called as ``make(parameters, seed=, n_objectives=, **options)``."""


def make_sampler(
    name: str, *, parameters: Mapping[str, Parameter], seed: int, n_objectives: int = 1, **options: Any
) -> BaseSampler:
    """The sampler called `name` over a space's `parameters`.

    Args:
        name: One of `SAMPLERS`.
        parameters: Parameters of the search space, in its order.
        seed: Seed of the study. Each trial's random numbers are derived from it and the trial's number.
        n_objectives: Number of objectives of the study.
        options: Options of the sampler. ``botorch`` has ``n_startup``, ``kernel``, ``multi_objective`` and
            ``cost_power``; the others have those of Optuna's class.

    Raises:
        StudyFileError: No such sampler, an option that it does not have, or more objectives than it can handle.
    """
    if name not in SAMPLERS:
        raise StudyFileError(f"sampler must be a known name, got {name!r}{nearest(name, SAMPLERS)}")
    check_sampler(name, options, n_objectives=n_objectives)
    return _make(name)(parameters, seed=seed, n_objectives=n_objectives, **options)


def check_sampler(name: str, options: Mapping[str, Any], *, n_objectives: int = 1) -> None:
    """Check the options of a known sampler without loading torch.

    Raises:
        StudyFileError: Options that it does not have or cannot take, or more objectives than it can handle.
    """
    if name == "botorch":
        check_options(BotorchOptions, options)
        return
    if reserved := sorted({"parameters", "seed", "n_objectives"} & set(options)):
        raise StudyFileError(f"search.sampler_options: {', '.join(reserved)} must be left out: the study gives them")
    _make(name)({}, seed=0, n_objectives=n_objectives, **options)


def _make(name: str) -> Callable[..., BaseSampler]:
    module, attribute = SAMPLERS[name]
    make: Callable[..., BaseSampler] = getattr(importlib.import_module(module), attribute)
    return make
