"""Stopping a hopeless candidate early, on the same questions as the incumbent.

All candidates answer the questions in one nested order. At a few shares of them (the looks) the candidate is compared
with the incumbent, question by question. With weights w_m of the metrics in the objective, and d the differences
candidate - incumbent on the first n questions,

    D = sum_m w_m mean(d_m),    se^2 = sum_m w_m^2 (var(d_m) + u_m^2 / n_m) / n_m,    stop if D + z se < 0.

z is the (1 - error / looks) quantile of the normal distribution. By Bonferroni over the looks, a candidate that is no
worse than the incumbent on all search questions is stopped with probability at most `error`. The incumbent is the
luckiest candidate so far. A candidate of its true quality without its luck is stopped more often: beside the best of
40, in a fifth of the simulated cases. It would have ended behind the incumbent.

u^2/n stands for one question's worth of disagreement that was not seen yet (u is 1 for right or wrong, else the range
of the answers). Without it the few differences of a first look would pass for certainty.

The answers of a stopped candidate are used: its score on the prefix is carried to all questions by the panel of full
trials, which shows whether the prefix is easy or hard,

    score = mean(y_prefix) + mean(panel) - mean(panel_prefix),    variance = var(y - panel) / k * (1 - k / N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from merge_search.evaluation import Evaluation, Scores
from merge_search.objective import Objective, References

__all__ = ["Race", "ask_in_parts", "carried_to_all", "comparable_weights", "is_hopeless", "panel_of"]


@dataclass(frozen=True)
class Race:
    """The comparison of one candidate with the incumbent.

    Attributes:
        looks: Ascending shares of the questions, each below 1, after which they are compared.
        error: Probability, over all looks, of stopping a candidate that is no worse.
        weights: Weights of the metrics in the objective, where a larger objective is better.
        incumbent: The incumbent's evaluation on all questions.
    """

    looks: Sequence[float]
    error: float
    weights: Mapping[str, float]
    incumbent: Evaluation


def ask_in_parts(ask: Callable[[float, float], Evaluation], race: Race) -> tuple[Evaluation, bool]:
    """Ask a candidate the questions look after look, and stop where it is clearly worse than the incumbent.

    Args:
        ask: ``ask(share, after)`` asks the first `share` of the questions without the first `after`.
        race: The incumbent, and when to compare.

    Returns:
        The answers so far, and whether the candidate was stopped before the end.
    """
    evaluation, after = None, 0.0
    for look in [*race.looks, 1.0]:
        part = ask(look, after)
        evaluation, after = part if evaluation is None else evaluation.joined(part), look
        if look < 1 and is_hopeless(evaluation, race.incumbent, race.weights, error=race.error, looks=len(race.looks)):
            return evaluation, True
    assert evaluation is not None
    return evaluation, False


def comparable_weights(
    objective: Objective, references: References, evaluations: Iterable[Evaluation]
) -> dict[str, float] | None:
    """Weights of the metrics in the one objective; None if prefixes of the questions cannot be compared or joined.

    Args:
        objective: Racing needs one objective that is a weighted sum of metrics.
        references: Scores of base and experts.
        evaluations: The evaluations of base and experts. They show whether every metric is a mean over questions.
    """
    weights = objective.weights(references)
    are_joinable = all(s.is_joinable for e in evaluations for s in e.scores.values())
    return weights if len(objective.names) == 1 and are_joinable else None


def is_hopeless(
    candidate: Evaluation, incumbent: Evaluation, weights: Mapping[str, float], *, error: float, looks: int
) -> bool:
    """Whether the candidate is clearly worse than the incumbent at this look.

    Args:
        candidate: On a prefix of the questions that the incumbent answered.
        incumbent: On all questions.
        weights: Weights of the metrics in the objective, where a larger objective is better.
        error: Probability, over all looks, of stopping a candidate that is no worse.
        looks: Number of looks.
    """
    difference = variance = 0.0
    for name, w in weights.items():
        values = candidate.scores[name].values
        d = values - incumbent.scores[name].values[: len(values)]
        difference += w * float(d.mean())
        variance += w**2 * (float(d.var()) + _unit(values) ** 2 / len(d)) / len(d)
    return difference + NormalDist().inv_cdf(1 - error / looks) * math.sqrt(variance) < 0


def _unit(values: NDArray[np.float64]) -> float:
    """The largest difference that one answer can make: 1 if answers are right or wrong, else their range."""
    return 1.0 if np.isin(values, (0.0, 1.0)).all() else float(np.ptp(values))


def panel_of(full: Sequence[Evaluation]) -> dict[str, NDArray[np.float64]]:
    """Mean answer to every question over the trials that answered all questions, by metric."""
    return {name: np.mean([e.scores[name].values for e in full], axis=0) for name in full[0].scores}


def carried_to_all(prefix: Evaluation, panel: Mapping[str, NDArray[np.float64]]) -> Evaluation:
    """The evaluation of a prefix, with scores and standard errors for all questions. Its values stay those asked."""
    scores = {name: _carried(s, panel[name]) for name, s in prefix.scores.items()}
    return replace(prefix, scores=scores)


def _carried(s: Scores, panel: NDArray[np.float64]) -> Scores:
    k, n = len(s.values), len(panel)
    rest = s.values - panel[:k]
    score = float(s.values.mean() + panel.mean() - panel[:k].mean())
    variance = (float(rest.var()) + _unit(s.values) ** 2 / k) / k * (1 - k / n)
    return replace(s, score=score, stderr=math.sqrt(variance), is_corrected=True)
