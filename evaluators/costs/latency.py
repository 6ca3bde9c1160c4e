"""Latency: seconds per text of the merged model, on a fixed set of texts, after a warm-up.

    evaluate:
      - {evaluator: latency, include_path: texts/, texts: prompts.txt, new_tokens: 64, limit: 30}
    objective: {maximise: mean_retention, constraints: ["latency/seconds <= base + 0.05"]}

All merges of one base have the same shapes, so a token costs the same in each of them, unless a transform changes the
model. They differ in the number of tokens that they write before they end their answer. With ``new_tokens: 0`` one
forward pass is timed, which is constant up to noise.

Texts are timed one at a time, and a text's value is the median over `repeats`. Times are not reproduced by running
again, so keep other work off the machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from evaluators.costs.texts import TextOptions, split_texts, text_hash
from merge_search.errors import EvaluationError
from merge_search.evaluation import Cost, Evaluation, Evaluator, MetricInfo, Scores, Split, SplitShares, window
from merge_search.options import read_options

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Latency"]


class Options(TextOptions):
    """Options of an entry ``evaluator: latency``."""

    new_tokens: Annotated[int, Field(ge=0)] = 32
    """Most tokens to write, greedily; 0: one forward pass is timed."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Measurements per text."""
    warm_up: Annotated[int, Field(ge=0)] = 2
    """Number of texts that are answered before the first measurement, in every call."""


class Latency(Evaluator):
    """An `Evaluator` of one cost, ``latency/seconds``. `evaluate` imports torch.

    Args:
        options: See the module's docstring.
        shares: Shares of the splits.
        seed: Not used.
        folder: The folder that relative paths are relative to; None: the current directory.

    Raises:
        StudyFileError: Options, files or rows are wrong, or a split has fewer than two texts.
    """

    def __init__(
        self, options: Mapping[str, Any], *, shares: SplitShares, seed: int, folder: Path | None = None
    ) -> None:
        self._options = read_options(Options, options)
        self._texts = split_texts(self._options, shares, folder)
        self.n_asked = 0
        self._model: Any = None
        self._rows: dict[Split, list[Any]] = {}

    def metrics(self) -> list[MetricInfo]:
        n = {split: len(texts) for split, texts in self._texts.items()}
        return [MetricInfo("latency", "seconds", False, n, is_cost=True)]

    def fingerprint(self) -> str:
        """sha256 of the texts by split and of the options that change what is timed."""
        hashes = {str(split): [text_hash(t) for t in texts] for split, texts in self._texts.items()}
        content = [1, self._options.max_length, self._options.new_tokens, self._options.repeats, hashes]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def bind(self, model: Any, tokenizer: Any, *, folder: str) -> None:
        """Tokenise every text."""
        self._model = model
        length = self._options.max_length
        self._rows = {
            split: [tokenizer(t, truncation=True, max_length=length, return_tensors="pt").input_ids for t in texts]
            for split, texts in self._texts.items()
        }

    def evaluate(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        """Mean of the median seconds of the texts in `window(n, fidelity, after)`.

        Raises:
            EvaluationError: No model is bound, or the split is not scored.
        """
        if split not in self._rows:
            raise EvaluationError(f"split {split} has no texts; bind a model, and choose search, validation or test")
        began = time.perf_counter()
        chosen = window(len(self._rows[split]), fidelity, after)
        rows = self._rows[split][chosen]
        for ids in rows[: self._options.warm_up]:
            self._seconds(ids)
        values = np.array([self._median(ids) for ids in rows])
        names = tuple(text_hash(t) for t in self._texts[split][chosen])
        stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        scores = {"latency/seconds": Scores(names, values, float(values.mean()), stderr)}
        return Evaluation(split, fidelity, scores, Cost(0.0, time.perf_counter() - began, len(values)))

    def _median(self, ids: Tensor) -> float:
        self.n_asked += 1
        return float(np.median([self._seconds(ids) for _ in range(self._options.repeats)]))

    def _seconds(self, ids: Tensor) -> float:
        import torch

        ids = ids.to(next(self._model.parameters()).device)
        with torch.no_grad():
            _wait(ids)
            began = time.perf_counter()
            if self._options.new_tokens:
                n = self._options.new_tokens
                self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
            else:
                self._model(input_ids=ids)
            _wait(ids)
        return time.perf_counter() - began


def _wait(tensor: Tensor) -> None:
    """Wait until the tensor's device has finished its work."""
    import torch

    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
