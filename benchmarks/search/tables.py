"""What the tables of this folder share: appending rows, the commit they name, and the errors of their means."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev, variance

from scipy.stats import t as student

sys.path.append(str(Path(__file__).parent.parent))
from machine import append, commit

__all__ = ["append", "commit", "half_interval", "mean_over_problems", "standard_error"]


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def half_interval(values: Sequence[float], level: float = 0.95) -> float:
    """Half the width of Student's interval for the mean of independent values; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(student.ppf((1 + level) / 2, len(values) - 1)) * standard_error(values)


def mean_over_problems(samples: Sequence[Sequence[float]], level: float = 0.95) -> tuple[float, float]:
    """Mean over problems of each problem's mean, and half the width of its 95 % interval (Welch and Satterthwaite).

    The interval covers other seeds on the same problems, not other problems. It is NaN where a sample has fewer than
    two values.
    """
    centre = mean(mean(values) for values in samples)
    if any(len(values) < 2 for values in samples):
        return centre, math.nan
    parts = [variance(values) / len(values) for values in samples]
    total = sum(parts)
    if total == 0:
        return centre, 0.0
    freedom = total**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, samples, strict=True))
    return centre, float(student.ppf((1 + level) / 2, freedom)) * math.sqrt(total) / len(samples)
