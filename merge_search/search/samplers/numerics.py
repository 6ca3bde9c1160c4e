"""Run numerical code with a seed and with its warnings in the log, and name the errors that it may raise."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from botorch.exceptions.errors import BotorchError, ModelFittingError

__all__ = ["NUMERICAL_ERRORS", "numerics"]

log = logging.getLogger(__name__)

NUMERICAL_ERRORS = (RuntimeError, ValueError, ArithmeticError, BotorchError, ModelFittingError)
"""torch.linalg.LinAlgError and GPyTorch's NotPSDError and NanError are RuntimeErrors."""


@contextmanager
def numerics(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator, restore it afterwards, and send warnings to the log.

    NOTE: BoTorch's optimiser resets the warning filters, so neither ``ignore`` nor ``error`` would hold. Its warning of
    an added jitter of 1e-8 ("not p.d.") is harmless and frequent.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(seed)
        yield
    for warning in caught:
        log.debug("%s: %s", warning.category.__name__, warning.message)
