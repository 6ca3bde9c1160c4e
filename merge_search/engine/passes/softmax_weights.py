"""Weights of a softmax over experts, kept while candidates ask for one temperature.

Where every expert takes part at every entry, the weights do not depend on coefficients. A pass reads kept weights in
place of the scores that they are made from, and the candidate takes no exponential.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from torch import Tensor

from merge_search.engine.contracts import Pass, Source, Structure
from merge_search.engine.passes.measurements import Measurements
from merge_search.engine.passes.settings import Assessment

__all__ = ["SoftmaxWeights"]


class SoftmaxWeights:
    """Softmax weights by tensor and measure: only those of the last sharpness (1 / temperature)."""

    def __init__(self, measurements: Measurements) -> None:
        self._measurements = measurements
        self._last: dict[Hashable, Hashable] = {}  # the sharpness last asked for

    def get(
        self, assessment: Assessment, p: Pass, coefficients: tuple[float, ...], sharpness: float
    ) -> list[Tensor] | None:
        """exp(sharpness log a_i - max_j sharpness log a_j) of the experts of `p`, flat float32: the bits a pass makes.

        Returns:
            None where experts drop out, where there is no room, and the first time that scores and sharpness are asked
            for.
        """
        s, name, measurements = p.structure, p.name, self._measurements
        is_open = s.select == "all" and s.resolve == "none" and not (s.exclusive or s.gate)
        n_experts = len(assessment.scope.experts)
        if not is_open or assessment.measure.after_mask or not measurements.has_room(name, n_experts):
            return None
        scores_key = measurements.scores_key(assessment, name, logarithm=True)
        key, at = ("softmax", scores_key), (sharpness, *assessment.at(coefficients))
        if self._last.get(key) != at:
            self._last[key] = at
            measurements.stored.drop(key)
            return None
        weights = measurements.stored.get(key)
        if weights is None:
            weights = self._make(assessment, name, coefficients, sharpness)
            if measurements.stored.held + sum(w.nbytes for w in weights) > measurements.stored.limit:
                measurements.stored.drop(scores_key)  # rather than the scores of the next tensor
            measurements.stored.put(key, weights)
        return weights

    def _make(
        self, assessment: Assessment, name: str, coefficients: tuple[float, ...], sharpness: float
    ) -> list[Tensor]:
        """Weights from stored scores where there are any. New scores are stored where a pass would store them too."""
        measurements = self._measurements
        logits = measurements.stored.get(measurements.scores_key(assessment, name, logarithm=True))
        if logits is None and not assessment.measure.cheap:
            logits = measurements.scores(assessment, name, coefficients, logarithm=True)
        if logits is None:
            p, base, experts = measurements.score_pass(assessment, name)
        else:
            active = measurements.active(name, assessment.scope.experts)
            base, experts = measurements.flats(name, active)
            structure = Structure(experts=len(active), assess=Source("given log"))
            p = Pass(name, tuple(base.shape), structure, active, {}, {"a": logits})
        return measurements.made(replace(p, numbers={**p.numbers, "sharpness": [sharpness]}), base, experts, "softmax")
