"""Group gaps: how differently a classifier treats the groups of a task's questions (arXiv 2310.12145). 0 is equal.

With the predictions y', the labels y, the groups g and the classes c,

    parity_gap = max_c   [ max_g P(y' = c | g)        - min_g P(y' = c | g) ]           statistical parity
    odds_gap   = max_c,y [ max_g P(y' = c | y, g)     - min_g P(y' = c | y, g) ]        equalised odds

For two classes and two groups these are |P(y' = 1 | a) - P(y' = 1 | b)| and the larger of |difference of the true
positive rates| and |difference of the false positive rates|, as in fairlearn. The paper takes |statistical parity
difference| and, as an alternative, the mean of the two odds differences.

The found gap is the difference p_a - p_b of two shares. The value of question q is its part of it to first order,

    value_q = gap + n [ 1(q in a) (1(y'_q = c) - p_a) / n_a - 1(q in b) (1(y'_q = c) - p_b) / n_b ],

where a and b are the questions of the two groups (for odds: with the label y). The mean of the values is the gap, their
spread is its error, and the values of two merges on the same questions have the error of the merges' difference. The
standard error is that of p_a - p_b, sqrt(sum p (1 - p) / n_g), with p smoothed to (k + 1/2) / (n_g + 1). It takes a, b,
c and y as given. A largest difference of noisy shares is larger than the true one on average: a gap of the size of its
error says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from merge_search.evaluation import Scores

__all__ = ["gap_scores"]

UNKNOWN = 0.5
"""Standard error where no two groups were asked: then the gap, of 0 to 1, is not known."""


def gap_scores(
    ids: tuple[str, ...],
    groups: Sequence[str],
    predicted: NDArray[np.int64],
    n_classes: int,
    labels: NDArray[np.int64] | None = None,
) -> Scores:
    """The gap between groups, with its linearised values per question.

    Groups without a question (of a label) do not count there. If no two groups can be compared, the gap is 0 ± 0.5.

    Args:
        ids: The questions' hashes.
        groups: The group of each question.
        predicted: The predicted class of each question. Shape (n,).
        n_classes: The number of classes.
        labels: The right classes, for equalised odds; None: statistical parity. Shape (n,).
    """
    n, of = len(ids), np.asarray(groups)
    strata = [np.ones(n, bool)] if labels is None else [labels == y for y in range(n_classes)]
    best: tuple[float, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]] | None = None
    for stratum in strata:
        members = [stratum & (of == g) for g in np.unique(of[stratum])]
        for c in range(n_classes if len(members) > 1 else 0):
            hits = predicted == c
            rates = [float(hits[m].mean()) for m in members]
            gap = max(rates) - min(rates)
            if best is None or gap > best[0]:
                best = gap, members[rates.index(max(rates))], members[rates.index(min(rates))], hits
    if best is None:
        return Scores(ids, np.zeros(n), 0.0, UNKNOWN, is_linearised=True)
    gap, above, below, hits = best
    values = gap + n * (_share(hits, above) - _share(hits, below))
    return Scores(ids, values, gap, math.sqrt(_variance(hits[above]) + _variance(hits[below])), is_linearised=True)


def _share(hits: NDArray[np.bool_], members: NDArray[np.bool_]) -> NDArray[np.float64]:
    """What each question adds to its group's rate, around the rate. Their sum is 0."""
    return np.asarray(members * (hits - hits[members].mean()) / members.sum(), dtype=np.float64)


def _variance(hits: NDArray[np.bool_]) -> float:
    p = (hits.sum() + 0.5) / (len(hits) + 1)
    return float(p * (1 - p) / len(hits))
