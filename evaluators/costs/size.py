"""Size: the number of parameters of a merge, and the share of them that differ from the base's. Counted, without noise.

    evaluate:
      - {evaluator: lm_eval, tasks: [maths, stories]}
      - {evaluator: size}
    objective: {maximise: mean_retention, minimise: size/changed}        # or constraints: ["size/changed <= 0.3"]

``size/changed`` is the share of entries that differ from the base's in the precision of the live model. A file of
differences would have to store them. Densities, sign elections and coefficients of zero make it smaller.
``size/parameters`` is the same for all merges of one base, unless a transform changes its depth or makes experts of it.

The base's weights are copied to main memory when the model is bound, because it has the base's weights then. The copy
takes as many bytes as the model.
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
    """Options of an entry ``evaluator: size``: there are none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Size(Evaluator):
    """An `Evaluator` of two costs, ``size/changed`` and ``size/parameters``. Both are the same on every split.

    Args:
        options: Must be empty.
        shares: Not used.
        seed: Not used.
        folder: Not used.

    Raises:
        StudyFileError: An option is given.
    """

    def __init__(
        self, options: Mapping[str, Any], *, shares: SplitShares, seed: int, folder: Path | None = None
    ) -> None:
        read_options(Options, options)
        self._pairs: list[tuple[Tensor, Tensor | None]] = []
        self._base: dict[str, Tensor] = {}

    def metrics(self) -> list[MetricInfo]:
        n = dict.fromkeys(SCORED, 1)
        return [MetricInfo("size", name, False, n, is_cost=True) for name in ("changed", "parameters")]

    def fingerprint(self) -> str:
        return hashlib.sha256(b"size 1").hexdigest()

    def bind(self, model: Any, tokenizer: Any, *, folder: str) -> None:
        """Copy the base's weights. Tied parameters count once, and buffers do not count.

        A second model is compared with the first one. Parameters that the first one lacks, or has in another shape, are
        changed as a whole.

        Args:
            model: The live model. The first one must have the base's weights.
            tokenizer: Not used.
            folder: Not used.

        Raises:
            StudyFileError: The copy does not fit into main memory.
        """
        live = {name: p.detach() for name, p in model.named_parameters()}
        if self._base:
            self._pairs = [(p, _like(self._base.get(name), p)) for name, p in live.items()]
            return
        need, free = sum(p.numel() * p.element_size() for p in live.values()), free_host_bytes()
        if need > free:
            raise StudyFileError(
                f"evaluator size: a copy of the base takes {need / GIB:.3g} GiB of main memory, "
                f"and {free / GIB:.3g} GiB are free; leave it out, or take a machine with more"
            )
        self._base = {name: p.to("cpu", copy=True) for name, p in live.items()}
        self._pairs = [(p, self._base[name]) for name, p in live.items()]

    def evaluate(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        """Count the parameters that differ.

        Raises:
            EvaluationError: No model is bound, or a part of the questions was asked for.

        Cost: One pass over the model and the copy. No question.
        """
        if not self._pairs or after:
            raise EvaluationError("size is counted as a whole: bind a model, and leave search.racing out")
        began = time.perf_counter()
        n_changed = sum(
            live.numel() if base is None else int((live != base.to(live.device)).sum()) for live, base in self._pairs
        )
        n = sum(live.numel() for live, _ in self._pairs)
        counted = {"size/changed": n_changed / n, "size/parameters": float(n)}
        scores = {name: Scores((name,), np.array([value]), value, 0.0) for name, value in counted.items()}
        return Evaluation(split, fidelity, scores, Cost(0.0, time.perf_counter() - began, 0))


def _like(base: Tensor | None, live: Tensor) -> Tensor | None:
    """The base's parameter, if there is one of this shape."""
    return base if base is not None and base.shape == live.shape else None
