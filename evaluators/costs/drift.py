"""Drift: how far the next-token distribution of a merge on ordinary texts is from the base's.

    evaluate:
      - {evaluator: lm_eval, tasks: [maths, stories]}
      - {evaluator: drift, include_path: texts/, texts: [wiki.txt, chat.jsonl], limit: 100}
    objective: {maximise: mean_retention, minimise: drift/kl}        # or constraints: ["drift/kl <= 0.2"]

A text file has one text a line. A JSON-lines file has one object a line, its text under `key` (default ``text``). Each
text is cut to `max_length` tokens. Its value is the mean over `positions` evenly spaced positions of
KL(base || merge) (`evaluators.costs.next_tokens`).

The base itself has 0, up to rounding. The base's distributions are computed when the model is bound, because it has the
base's weights then. They are stored in half precision in main memory: 2 bytes x texts x positions x vocabulary. If that
is more than is free, the study is refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from evaluators.costs.texts import TextOptions, split_texts, text_hash
from merge_search.errors import EvaluationError
from merge_search.evaluation import Cost, Evaluation, Evaluator, MetricInfo, Split, SplitShares, window
from merge_search.options import read_options

if TYPE_CHECKING:
    from evaluators.costs.next_tokens import KeptText, NextTokens

__all__ = ["Drift"]


class Options(TextOptions):
    """Options of an entry ``evaluator: drift``.

    Attributes:
        positions: Positions per text.
        batch_size: Texts of one forward pass.
    """

    positions: Annotated[int, Field(ge=1)] = 8
    batch_size: Annotated[int, Field(ge=1)] = 16


class Drift(Evaluator):
    """An `Evaluator` of one cost, ``drift/kl``. `bind` imports torch.

    Args:
        options: See the module's docstring.
        shares: Shares of the splits. The fit share of the search split is scored with the rest of it.
        seed: Not used. Splits and order are functions of the texts.
        folder: The folder that relative paths are relative to; None: the current directory.

    Raises:
        StudyFileError: Options, files or rows are wrong, or a split has fewer than two texts.

    Determinism: Equal weights on one device give equal answers. Global random generators are not used.
    """

    def __init__(
        self, options: Mapping[str, Any], *, shares: SplitShares, seed: int, folder: Path | None = None
    ) -> None:
        self._options = read_options(Options, options)
        self._texts = split_texts(self._options, shares, folder)
        self._live: NextTokens | None = None
        self._kept: dict[Split, list[KeptText]] = {}

    @property
    def n_asked(self) -> int:  # type: ignore[override]
        """Number of texts asked so far. The base's answers do not count: they are asked once."""
        return 0 if self._live is None else self._live.n_asked

    def metrics(self) -> list[MetricInfo]:
        n = {split: len(texts) for split, texts in self._texts.items()}
        return [MetricInfo("drift", "kl", False, n, is_cost=True)]

    def fingerprint(self) -> str:
        """sha256 of the texts by split and of the options that change an answer."""
        hashes = {str(split): [text_hash(t) for t in texts] for split, texts in self._texts.items()}
        content = [1, self._options.max_length, self._options.positions, hashes]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def bind(self, model: Any, tokenizer: Any, *, folder: str) -> None:
        """Tokenise every text and store the base's answers. A second model is compared with the first one.

        Args:
            model: The live model. The first one must have the base's weights.
            tokenizer: Its tokenizer.
            folder: Not used.

        Raises:
            StudyFileError: The model has no logits over a vocabulary (an encoder), a text has fewer than two tokens, or
                the base's answers do not fit into memory.
        """
        from evaluators.costs.next_tokens import NextTokens

        options = self._options
        if self._live is not None:
            self._live.model = model
            return
        live = NextTokens(model, evaluator="drift", whose="the base's", batch_size=options.batch_size)
        size = {"max_length": options.max_length, "positions": options.positions}
        asked = {split: live.encode(tokenizer, texts, **size) for split, texts in self._texts.items()}
        rows = [row for rows in asked.values() for row in rows]
        live.require_memory(rows, [len(row.places) for row in rows], [self._texts])
        self._kept = {split: live.keep(rows) for split, rows in asked.items()}
        self._live = live

    def evaluate(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        """Mean KL(base || merge) of the texts in `window(n, fidelity, after)`, and their values.

        Raises:
            NonFiniteError: NaN or infinity among the logits.
            EvaluationError: No model is bound, or the split is not scored.
        """
        if self._live is None or split not in self._kept:
            raise EvaluationError(f"split {split} has no texts; bind a model, and choose search, validation or test")
        began = time.perf_counter()
        scores = self._live.compare(self._kept[split][window(len(self._kept[split]), fidelity, after)])
        cost = Cost(0.0, time.perf_counter() - began, len(scores.values))
        return Evaluation(split, fidelity, {"drift/kl": scores}, cost)
