"""Drift: how far the next-token distribution of a merge on ordinary texts is from the base's.

    evaluate:
      - {evaluator: lm_eval, tasks: [maths, stories]}
      - {evaluator: drift, include_path: texts/, texts: [wiki.txt, chat.jsonl], limit: 100}
    objective: {maximise: mean_retention, minimise: drift/kl}        # or constraints: ["drift/kl <= 0.2"]

A text file has one text a line. A JSON-lines file has one object a line, its text under `key` (default ``text``). Each
text is cut to `max_length` tokens. Its value is the mean over `positions` evenly spaced positions of

    KL(base || merge) = sum_w p_base(w) (log p_base(w) - log p_merge(w))        in nats

The base itself has 0, up to rounding. The base's distributions are computed when the model is bound, because it has the
base's weights then. They are stored in half precision in main memory: 2 bytes x texts x positions x vocabulary. If that
is more than is free, the study is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from evaluators.costs.texts import TextOptions, fewest_texts, split_texts, text_hash
from merge_search.errors import EvaluationError, NonFiniteError, StudyFileError
from merge_search.evaluation import Cost, Evaluation, Evaluator, MetricInfo, Scores, Split, SplitShares, window
from merge_search.memory import free_host_bytes
from merge_search.options import read_options

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Drift"]

HALF = 2
"""Bytes of a stored number."""
GIB = 2**30
MARGIN = 0.8
"""Share of the free memory that the base's distributions may take. The search needs the rest."""


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
        self.n_asked = 0
        self._model: Any = None
        self._rows: dict[Split, list[tuple[Tensor, Tensor, Tensor]]] = {}

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
        import torch

        self._model = model
        if self._rows:
            return
        rows: dict[Split, tuple[list[Tensor], list[Tensor]]] = {}
        for split, texts in self._texts.items():
            tokens = [tokenizer(t, truncation=True, max_length=self._options.max_length)["input_ids"] for t in texts]
            short = next((t for t, ids in zip(texts, tokens, strict=True) if len(ids) < 2), None)
            if short is not None:
                raise StudyFileError(f"evaluator drift: a text must have at least two tokens, found {short!r}")
            places = [_places(len(ids) - 1, self._options.positions) for ids in tokens]
            rows[split] = [torch.tensor([ids]) for ids in tokens], places
        self._require_memory(rows)
        for split, (asked, places) in rows.items():
            base = [b.to(torch.float16) for b in self._answers(asked, places)]
            self._rows[split] = list(zip(asked, places, base, strict=True))

    def _require_memory(self, rows: Mapping[Split, tuple[list[Tensor], list[Tensor]]]) -> None:
        """Raise `StudyFileError` if the base's answers would take more than `MARGIN` of the free memory."""
        asked, places = next(iter(rows.values()))
        vocabulary = next(self._answers(asked[:1], places[:1])).shape[1]
        counts = [len(at) for _, all_places in rows.values() for at in all_places]
        need, free = HALF * vocabulary * sum(counts), free_host_bytes()
        if need > MARGIN * free:
            raise StudyFileError(
                f"evaluator drift: the base's answers to {len(counts)} texts at {max(counts)} positions each "
                f"over {vocabulary} outcomes take {need / GIB:.3g} GiB of memory, and {free / GIB:.3g} GiB are free; "
                + self._what_fits(free, vocabulary, max(counts), len(counts))
            )

    def _what_fits(self, free: int, vocabulary: int, positions: int, n_texts: int) -> str:
        """The limit or the positions whose answers fit into the free memory. Every split keeps its fewest texts."""
        places, fewest = int(MARGIN * free) // (HALF * vocabulary), fewest_texts(self._texts)
        ways = []
        if (limit := places // positions) >= fewest:
            ways.append(f"limit: {limit}")
        if places >= n_texts:
            ways.append(f"positions: {places // n_texts}")
        if not ways and places >= fewest:
            ways.append(f"limit: {fewest} with positions: {places // fewest}")
        if ways:
            return " or ".join(ways) + " would fit"
        least = HALF * vocabulary * fewest / MARGIN
        return (
            f"the fewest texts that every split can be measured on, limit: {fewest}, need {least / GIB:.3g} GiB free "
            "at one position each: leave drift out, or take a machine with more memory"
        )

    def evaluate(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        """Mean KL(base || merge) of the texts in `window(n, fidelity, after)`, and their values.

        Raises:
            NonFiniteError: NaN or infinity among the logits.
            EvaluationError: No model is bound, or the split is not scored.
        """
        if split not in self._rows:
            raise EvaluationError(f"split {split} has no texts; bind a model, and choose search, validation or test")
        began = time.perf_counter()
        chosen = window(len(self._rows[split]), fidelity, after)
        asked, places, base = zip(*self._rows[split][chosen], strict=True)
        answers = self._answers(asked, places, is_counted=True)
        values = np.array([_divergence(b, m) for b, m in zip(base, answers, strict=True)])
        if not np.isfinite(values).all():
            raise NonFiniteError(f"logits must be finite, got NaN or infinity for {(~np.isfinite(values)).sum()} texts")
        ids = tuple(text_hash(t) for t in self._texts[split][chosen])
        stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        scores = {"drift/kl": Scores(ids, values, float(values.mean()), stderr)}
        return Evaluation(split, fidelity, scores, Cost(0.0, time.perf_counter() - began, len(values)))

    def _answers(
        self, asked: Sequence[Tensor], places: Sequence[Tensor], *, is_counted: bool = False
    ) -> Iterator[Tensor]:
        """Log-probabilities of the bound model at the places of each text, text after text.

        One batch of them is in memory at a time.

        Args:
            asked: Token ids of each text.
            places: The positions that are asked in each text.
            is_counted: Whether the texts count as questions.

        Yields:
            Shape (positions, vocabulary), on the CPU.
        """
        import torch

        device = next(self._model.parameters()).device
        size = self._options.batch_size
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            self.n_asked += len(part) if is_counted else 0
            width = max(t.shape[1] for t in part)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, t in enumerate(part):
                ids[row, : t.shape[1]], mask[row, : t.shape[1]] = t[0], 1
            with torch.no_grad():
                answer = self._model(input_ids=ids.to(device), attention_mask=mask.to(device))
            logits = getattr(answer, "logits", None)
            if logits is None:
                raise StudyFileError(
                    "evaluator drift: needs a model with logits over its vocabulary, and this one is an encoder; "
                    "leave it out"
                )
            for row, at in enumerate(places[start : start + size]):
                yield logits[row, at.to(device)].float().log_softmax(-1).cpu()


def _places(last: int, n: int) -> Tensor:
    """Up to `n` different positions from 0 to `last`, evenly spaced. `last` is one of them."""
    import torch

    return torch.tensor(sorted({round(i) for i in torch.linspace(last, 0, min(n, last + 1)).tolist()}))


def _divergence(base: Tensor, merge: Tensor) -> float:
    """Mean over positions of KL(base || merge). Never negative: the rounded base is normalised again."""
    n = min(base.shape[-1], merge.shape[-1])  # a model of another vocabulary: the tokens that both have
    base, merge = base[..., :n], merge if merge.shape[-1] == n else merge[..., :n].log_softmax(-1)
    kept = base.float().log_softmax(-1)
    return float((kept.exp() * (kept - merge)).sum(-1).mean().clamp_min(0.0))
