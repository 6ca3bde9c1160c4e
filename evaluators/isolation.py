"""Running other people's code without side effects: random generators, loggers, warnings, progress bars."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

__all__ = ["isolated_generators", "quiet"]


@contextmanager
def isolated_generators(seed: int | None = None) -> Iterator[None]:
    """The global generators of `random`, numpy and torch are afterwards as they were before.

    Args:
        seed: If given, all three are seeded with it on entry, so that what is drawn inside repeats.
    """
    states = random.getstate(), np.random.get_state()
    torch: Any = sys.modules.get("torch")  # not imported yet: nothing can have drawn from it
    devices = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    torch_state = None if torch is None else torch.get_rng_state()
    device_states = torch.cuda.get_rng_state_all() if devices else None
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            if torch is not None:
                # NOTE: torch.manual_seed, while no GPU is in use, keeps a stack trace of every call for ever.
                torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if torch_state is not None:
            torch.set_rng_state(torch_state)
        if device_states is not None:
            torch.cuda.set_rng_state_all(device_states)


@contextmanager
def quiet(names: Sequence[str]) -> Iterator[None]:
    """Python warnings and, below the level of an error, the loggers `names` and their children are silent."""
    loggers = [logging.getLogger(n) for n in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
