"""Next-token distributions of a live model at some positions of texts: kept in half precision, compared later.

    KL(kept || merge) = sum_w p_kept(w) (log p_kept(w) - log p_merge(w))        in nats, mean over a text's positions

Kept are 2 bytes x texts x positions x vocabulary in main memory. If that is more than is free, the study is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluators.costs.texts import fewest_texts, text_hash
from merge_search.errors import NonFiniteError, StudyFileError
from merge_search.evaluation import Scores, Split
from merge_search.memory import free_host_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AskedText", "KeptText", "NextTokens", "places"]

HALF = 2
"""Bytes of a stored number."""
GIB = 2**30
MARGIN = 0.8
"""Share of the free memory that kept distributions may take. The search needs the rest."""


@dataclass(frozen=True)
class AskedText:
    """Tokens of a text, and the positions whose next token is asked for.

    Attributes:
        text: The text.
        ids: Shape (1, length), int64.
        places: Shape (positions,), int64, ascending.
    """

    text: str
    ids: Tensor
    places: Tensor


@dataclass(frozen=True)
class KeptText:
    """A text with kept log-probabilities, shape (positions, vocabulary), float16."""

    asked: AskedText
    log_p: Tensor


class NextTokens:
    """A live model that is asked for distributions over its vocabulary.

    Args:
        model: Called with ``input_ids`` and ``attention_mask``. Its output must have ``logits``.
        evaluator: The evaluator's name, for messages.
        whose: Whose distributions are kept, for messages.
        batch_size: Texts of one forward pass.

    Attributes:
        n_asked: Number of texts asked that count as questions.
    """

    def __init__(self, model: Any, *, evaluator: str, whose: str, batch_size: int) -> None:
        self.model, self.n_asked = model, 0
        self._evaluator, self._whose, self._batch_size = evaluator, whose, batch_size

    def encode(self, tokenizer: Any, texts: Sequence[str], *, max_length: int, positions: int) -> list[AskedText]:
        """Tokenise texts, each with up to `positions` evenly spaced positions.

        Raises:
            StudyFileError: A text has fewer than two tokens.
        """
        import torch

        tokens = [tokenizer(t, truncation=True, max_length=max_length)["input_ids"] for t in texts]
        short = next((t for t, ids in zip(texts, tokens, strict=True) if len(ids) < 2), None)
        if short is not None:
            raise StudyFileError(f"evaluator {self._evaluator}: a text must have at least two tokens, found {short!r}")
        pairs = zip(texts, tokens, strict=True)
        return [AskedText(t, torch.tensor([ids]), places(len(ids) - 1, positions)) for t, ids in pairs]

    def require_memory(
        self, asked: Sequence[AskedText], counts: Sequence[int], groups: Sequence[Mapping[Split, list[str]]]
    ) -> None:
        """Raise `StudyFileError` if the kept distributions would take more than `MARGIN` of the free memory.

        Args:
            asked: At least one text, to find the vocabulary's size.
            counts: The number of positions of every text that is kept.
            groups: The texts by split, once for each of those whose answers are kept. ``limit`` holds for each group.
        """
        vocabulary = next(self.answers(asked[:1])).shape[1]
        need, free = HALF * vocabulary * sum(counts), free_host_bytes()
        if need > MARGIN * free:
            raise StudyFileError(
                f"evaluator {self._evaluator}: {self._whose} answers to {len(counts)} texts at {max(counts)} positions "
                f"each over {vocabulary} outcomes take {need / GIB:.3g} GiB of memory, and {free / GIB:.3g} GiB are "
                "free; " + self._what_fits(free, vocabulary, max(counts), len(counts), groups)
            )

    def _what_fits(
        self, free: int, vocabulary: int, positions: int, n_texts: int, groups: Sequence[Mapping[Split, list[str]]]
    ) -> str:
        """The limit or the positions whose answers fit into the free memory. Every split keeps its fewest texts."""
        fewest = max(map(fewest_texts, groups))
        n_fit = int(MARGIN * free) // (HALF * vocabulary)  # positions of all texts together
        per_group = n_fit // len(groups)
        ways = []
        if (limit := per_group // positions) >= fewest:
            ways.append(f"limit: {limit}")
        if n_fit >= n_texts:
            ways.append(f"positions: {n_fit // n_texts}")
        if not ways and per_group >= fewest:
            ways.append(f"limit: {fewest} with positions: {per_group // fewest}")
        if ways:
            return " or ".join(ways) + " would fit"
        least = HALF * vocabulary * fewest * len(groups) / MARGIN
        return (
            f"the fewest texts that every split can be measured on, limit: {fewest}, need {least / GIB:.3g} GiB free "
            f"at one position each: leave {self._evaluator} out, or take a machine with more memory"
        )

    def keep(self, asked: Sequence[AskedText], *, is_counted: bool = False) -> list[KeptText]:
        """The model's distributions as it is now."""
        import torch

        answers = self.answers(asked, is_counted=is_counted)
        return [KeptText(a, log_p.to(torch.float16)) for a, log_p in zip(asked, answers, strict=True)]

    def compare(self, kept: Sequence[KeptText]) -> Scores:
        """Mean KL from the kept distributions to the model's as it is now, and the texts' values. The texts count.

        Raises:
            NonFiniteError: NaN or infinity among the logits.
        """
        answers = self.answers([k.asked for k in kept], is_counted=True)
        values = np.array([_divergence(k.log_p, merge) for k, merge in zip(kept, answers, strict=True)])
        if not np.isfinite(values).all():
            raise NonFiniteError(f"logits must be finite, got NaN or infinity for {(~np.isfinite(values)).sum()} texts")
        ids = tuple(text_hash(k.asked.text) for k in kept)
        stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return Scores(ids, values, float(values.mean()), stderr)

    def answers(self, asked: Sequence[AskedText], *, is_counted: bool = False) -> Iterator[Tensor]:
        """Log-probabilities of the model at the places of each text, text after text.

        One batch of them is in memory at a time.

        Args:
            asked: The texts.
            is_counted: Whether the texts count as questions.

        Yields:
            Shape (positions, vocabulary), float32, on the CPU.
        """
        import torch

        device = next(self.model.parameters()).device
        for start in range(0, len(asked), self._batch_size):
            part = asked[start : start + self._batch_size]
            self.n_asked += len(part) if is_counted else 0
            width = max(a.ids.shape[1] for a in part)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, a in enumerate(part):
                ids[row, : a.ids.shape[1]], mask[row, : a.ids.shape[1]] = a.ids[0], 1
            with torch.no_grad():
                answer = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
            logits = getattr(answer, "logits", None)
            if logits is None:
                raise StudyFileError(
                    f"evaluator {self._evaluator}: needs a model with logits over its vocabulary, and this one is an "
                    "encoder; leave it out"
                )
            for row, a in enumerate(part):
                yield logits[row, a.places.to(device)].float().log_softmax(-1).cpu()


def places(last: int, n: int) -> Tensor:
    """Up to `n` different positions from 0 to `last`, evenly spaced. `last` is one of them."""
    import torch

    return torch.tensor(sorted({round(i) for i in torch.linspace(last, 0, min(n, last + 1)).tolist()}))


def _divergence(kept: Tensor, merge: Tensor) -> float:
    """Mean over positions of KL(kept || merge). Never negative: the rounded kept one is normalised again."""
    n = min(kept.shape[-1], merge.shape[-1])  # a model of another vocabulary: the tokens that both have
    kept, merge = kept[..., :n], merge if merge.shape[-1] == n else merge[..., :n].log_softmax(-1)
    log_p = kept.float().log_softmax(-1)
    return float((log_p.exp() * (log_p - merge)).sum(-1).mean().clamp_min(0.0))
