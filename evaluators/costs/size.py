"""How many parameters a merge has, and what share of them is not the base's: counted, so without any noise.

    evaluate:
      - {evaluator: lm_eval, tasks: [maths, stories]}
      - {evaluator: size}
    objective: {maximise: mean_retention, minimise: size/changed}        # or constraints: ["size/changed <= 0.3"]

``size/changed`` is the share of entries that differ from the base's, in the precision of the live model: what a file of
differences would have to hold. Densities, sign elections and coefficients of zero make it smaller. ``size/parameters``
is the same for all merges of one base: a number for reports, and no goal.

The base's weights are kept in main memory from the moment the model is bound (it holds them then): as many bytes as it has.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from evaluators.costs.texts import SCORED
from merge_search.errors import EvaluationError, StudyFileError
from merge_search.evaluation import Cost, Evaluation, Evaluator, MetricInfo, Scores, Split, SplitShares
from merge_search.memory import free_host_bytes
from merge_search.options import read_options

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Size"]

GIB = 2**30


class Options(BaseModel):
    """Of an entry ``evaluator: size``: there are none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Size(Evaluator):
    """An `Evaluator` of two costs, ``size/changed`` and ``size/parameters``; both the same on every split.

    Args:
        options: Must be empty.
        shares: Not used.
        seed: Not used.
        folder: Not used.

    Raises:
        StudyFileError: an option is given.
    """

    def __init__(
        self, options: Mapping[str, Any], *, shares: SplitShares, seed: int, folder: Path | None = None
    ) -> None:
        read_options(Options, options)
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def metrics(self) -> list[MetricInfo]:
        n = dict.fromkeys(SCORED, 1)
        return [MetricInfo("size", name, False, n, is_cost=True) for name in ("changed", "parameters")]

    def fingerprint(self) -> str:
        return hashlib.sha256(b"size 1").hexdigest()

    def bind(self, model: Any, tokenizer: Any, *, folder: str) -> None:
        """Keep the base's weights: `model` must hold them. Tied parameters count once; buffers do not count.

        Raises:
            StudyFileError: they do not fit into main memory.
        """
        live = [p.detach() for p in model.parameters()]
        need, free = sum(p.numel() * p.element_size() for p in live), free_host_bytes()
        if need > free:
            raise StudyFileError(
                f"evaluator size: a copy of the base takes {need / GIB:.3g} GiB of main memory, and {free / GIB:.3g} GiB are "
                "free; leave it out, or take a machine with more"
            )
        self._pairs = [(p, p.to("cpu", copy=True)) for p in live]

    def evaluate(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        """Count. Cost: one pass over the model and the copy, no question.

        Raises:
            EvaluationError: nothing is bound, or questions of a part were asked for: there is one.
        """
        if not self._pairs or after:
            raise EvaluationError("size is counted as a whole: bind a model, and leave search.racing out")
        began = time.perf_counter()
        n_changed = sum(int((live != base.to(live.device)).sum()) for live, base in self._pairs)
        n = sum(live.numel() for live, _ in self._pairs)
        counted = {"size/changed": n_changed / n, "size/parameters": float(n)}
        scores = {name: Scores((name,), np.array([value]), value, 0.0) for name, value in counted.items()}
        return Evaluation(split, fidelity, scores, Cost(0.0, time.perf_counter() - began, 0))
