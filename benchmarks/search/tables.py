"""What the tables of this folder share: how rows are appended, the commit they name, how sure their means are."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev

from scipy.stats import t as student

sys.path.append(str(Path(__file__).parent.parent))
from machine import append, commit

__all__ = ["append", "commit", "half_interval", "standard_error"]


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; NaN for fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def half_interval(values: Sequence[float], level: float = 0.95) -> float:
    """Half the width of Student's interval for the mean of independent values; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(student.ppf((1 + level) / 2, len(values) - 1)) * standard_error(values)
