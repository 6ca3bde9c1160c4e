"""Stopping a hopeless candidate early, on the same questions as the incumbent.

All candidates answer the questions in one nested order. At a few shares of them (the looks) the candidate is compared
with the incumbent, question by question: with weights w_m of the metrics in the objective and d the differences
candidate - incumbent on the first n questions,

    D = sum_m w_m mean(d_m),    se^2 = sum_m w_m^2 (var(d_m) + u_m^2 / n_m) / n_m,    stop if D + z se < 0.

z is the (1 - error / looks) quantile of the normal distribution: by Bonferroni over the looks, a candidate that is no
worse than the incumbent on all search questions is stopped with probability at most `error`. (The incumbent is the luckiest
so far: one of its true quality, without its luck, is stopped more often, beside the best of 40 in a fifth of the simulated
cases. It would have ended behind it.) u^2/n is one question's worth of disagreement that
was not seen yet (u is 1 for right or wrong, else the range of the answers): without it, the few differences of a first
look would pass for certainty.

What a stopped candidate showed is not thrown away: its score on the prefix is carried to all questions by the panel of
full trials, whose prefix is known to be easy or hard,

    score = mean(y_prefix) + mean(panel) - mean(panel_prefix),    variance = var(y - panel) / k * (1 - k / N).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from merge_search.evaluation import Evaluation, Scores

__all__ = ["carried_to_all", "is_hopeless", "panel_of"]


def is_hopeless(
    candidate: Evaluation, incumbent: Evaluation, weights: Mapping[str, float], *, error: float, looks: int
) -> bool:
    """Whether the candidate is worse than the incumbent at this look.

    Args:
        candidate: On a prefix of the questions that the incumbent answered.
        weights: Of the metrics in the objective, larger objective better.
        error: Probability, over all looks, of stopping a candidate that is no worse.
        looks: How many there are.
    """
    difference = variance = 0.0
    for name, w in weights.items():
        mine = candidate.scores[name].values
        d = mine - incumbent.scores[name].values[: len(mine)]
        difference += w * float(d.mean())
        variance += w**2 * (float(d.var()) + _unit(mine) ** 2 / len(d)) / len(d)
    return difference + NormalDist().inv_cdf(1 - error / looks) * math.sqrt(variance) < 0


def _unit(values: NDArray[np.float64]) -> float:
    """By how much one answer can differ: 1 where answers are right or wrong, else their range."""
    return 1.0 if np.isin(values, (0.0, 1.0)).all() else float(np.ptp(values))


def panel_of(full: Sequence[Evaluation]) -> dict[str, NDArray[np.float64]]:
    """Mean answer to every question over the trials that answered all, by metric."""
    return {name: np.mean([e.scores[name].values for e in full], axis=0) for name in full[0].scores}


def carried_to_all(prefix: Evaluation, panel: Mapping[str, NDArray[np.float64]]) -> Evaluation:
    """The evaluation of a prefix with scores and standard errors for all questions; values stay those asked."""
    scores = {name: _carried(s, panel[name]) for name, s in prefix.scores.items()}
    return replace(prefix, scores=scores)


def _carried(s: Scores, panel: NDArray[np.float64]) -> Scores:
    k, n = len(s.values), len(panel)
    rest = s.values - panel[:k]
    score = float(s.values.mean() + panel.mean() - panel[:k].mean())
    variance = (float(rest.var()) + _unit(s.values) ** 2 / k) / k * (1 - k / n)
    return replace(s, score=score, stderr=math.sqrt(variance), is_corrected=True)
