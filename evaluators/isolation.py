"""Keep code of other libraries from changing random generators and from writing to the terminal."""

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
    """Restore the global generators of `random`, numpy and torch on leaving.

    Args:
        seed: Seeds all three on entry, so that draws inside can be repeated; None: they go on as they are.
    """
    states = random.getstate(), np.random.get_state()
    torch: Any = sys.modules.get("torch")  # if torch is not imported, its generator cannot have been used
    devices = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    torch_state = None if torch is None else torch.get_rng_state()
    device_states = torch.cuda.get_rng_state_all() if devices else None
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            if torch is not None:
                # NOTE: While no GPU is in use, torch.manual_seed keeps a stack trace of every call in memory.
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
    """Silence Python warnings and some loggers inside.

    Args:
        names: Loggers that, with their children, log nothing below the level of an error.
    """
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
