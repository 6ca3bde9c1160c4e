"""Samplers: what to try next, given what was tried.

A sampler is an `optuna.samplers.BaseSampler`; its suggestion is a function of (seed, trial number, stored
trials), so it can be repeated from the storage. A trial that was lost has a number, too: what comes after it is
drawn anew. Loaded by name; torch and
BoTorch are imported only when the sampler that needs them is made.
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
"""Name in a study file: module and attribute, called as ``make(parameters, seed=..., n_objectives=..., **options)``."""


def make_sampler(
    name: str, *, parameters: Mapping[str, Parameter], seed: int, n_objectives: int = 1, **options: Any
) -> BaseSampler:
    """The sampler called `name` over a space's `parameters`.

    Args:
        name: One of `SAMPLERS`.
        parameters: Of the search space, in its order.
        seed: Of the study; every trial's numbers are derived from it and the trial's number.
        n_objectives: Objectives of the study.
        options: Of the sampler: ``n_startup``, ``kernel``, ``multi_objective`` and ``cost_power`` for ``botorch``; those of
            Optuna's class for the others.

    Raises:
        StudyFileError: no such sampler, an option it does not have, more objectives than it can handle.
    """
    if name not in SAMPLERS:
        raise StudyFileError(f"sampler must be a known name, got {name!r}{nearest(name, SAMPLERS)}")
    check_sampler(name, options, n_objectives=n_objectives)
    return _make(name)(parameters, seed=seed, n_objectives=n_objectives, **options)


def check_sampler(name: str, options: Mapping[str, Any], *, n_objectives: int = 1) -> None:
    """Whether a known sampler can be made so; torch is not loaded for it.

    Raises:
        StudyFileError: options it does not have or cannot take, more objectives than it can handle.
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
