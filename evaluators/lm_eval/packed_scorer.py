"""Tree packing: the choices of a question are scored in one row behind their common context.

A row is ``context, choice 1 without its last token, choice 2 without its last token, ...``. Positions restart after the
context, and an attention mask lets each token see only the context and its own choice. So every log-likelihood equals
that of a row of its own. The context runs once instead of once per choice, and the head runs only at the positions that
are scored.

Packing is used where it is known to be the same function (`MODEL_TYPES`, full attention, float32) and where it gives
the same numbers as lm-eval's own path on the questions at hand. Otherwise lm-eval's path is used.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evaluators.lm_eval._compat import log_likelihoods, report_answer
from evaluators.lm_eval.packing import Piece, attention_mask, context_layout
from merge_search._compat.transformers import attention_of

__all__ = ["PackedScorer", "obstacle", "packed_scorer"]

log = logging.getLogger(__name__)

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3")
"""Causal models with rotary positions whose logits are the head applied to the last hidden state, and nothing else."""

TOLERANCE = 1e-4
"""Largest difference of a log-likelihood from lm-eval's. In float32 it is 2e-5, as between two batch sizes."""

N_TEST = 50
"""Most questions on which both paths are compared."""
MIN_GAIN = 1.2
"""Smallest ratio of the tokens run without and with packing at which packing is used."""

N_KEPT = 16
"""Number of sets of questions whose tensors are kept."""

Request = tuple[Any, list[int], list[int]]
"""A tokenised request of lm-eval: texts, context tokens, continuation tokens."""
Answer = tuple[float, bool]
"""The summed log-likelihood, and whether greedy decoding gives the continuation."""


@dataclass(frozen=True)
class _Batch:
    """Rows of one forward pass.

    Attributes:
        tokens: Shape (rows, length), int64.
        positions: The position of each token in its sequence. Same shape.
        branch: 0 in the context, -1 in the padding. Same shape.
        scored: Flat indices of the positions where the head runs. Shape (p,).
        at: The index in `scored` that predicts each target. Shape (t,).
        target: The tokens to predict. Shape (t,).
        starts: The first index in `target` of each request. Shape (requests,).
        requests: The number of each request among those asked.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    branch: torch.Tensor
    scored: torch.Tensor
    at: torch.Tensor
    target: torch.Tensor
    starts: np.ndarray[Any, np.dtype[np.int64]]
    requests: list[int]


def packed_scorer(lm: Any, questions: Sequence[Sequence[Request]]) -> PackedScorer | None:
    """A scorer for these questions, or None.

    It is None if packing is not known to be exact, if it saves little, or if it differs from lm-eval's path.

    Args:
        lm: lm-eval's model.
        questions: The tokenised requests of each question.

    Cost: Both paths run once on at most `N_TEST` questions.
    """
    shared = (list(g) for q in questions for _, g in itertools.groupby(q, key=lambda r: r[1]))
    groups = [g for g in shared if len(g) > 1]
    reason = obstacle(lm)
    if reason is None and lm.model.dtype != torch.float32:
        reason = f"the order of summation shows in {lm.model.dtype}"
    if not groups or reason is not None:
        if groups:
            log.info("choices are scored one by one: %s", reason)
        return None
    alone = sum(sum(map(len, {tuple(c + x[:-1]) for _, c, x in g})) for g in groups)
    together = sum(len(g[0][1]) + sum(len(x) - 1 for _, _, x in g) for g in groups)
    if alone < MIN_GAIN * together:
        return None
    scorer = PackedScorer(lm)
    sample = groups[:N_TEST]
    requests = [r for g in sample for r in g]
    try:
        alone_answers = log_likelihoods(lm, requests)
        difference = _difference(sample, scorer.score(requests), alone_answers)
    except torch.OutOfMemoryError:
        return None
    if difference >= TOLERANCE:
        log.info("choices are scored one by one: packed they differ by %.2g on %d questions", difference, len(sample))
        return None
    return scorer


def obstacle(lm: Any) -> str | None:
    """The reason why lm-eval's model is not known to handle packed rows exactly; None if there is none."""
    config = lm.model.config
    attention = attention_of(config)
    if hasattr(config, "smile"):
        return "rounding may change the route of a token in a mixture of experts"
    if config.model_type not in MODEL_TYPES:
        return f"not known to be exact for {config.model_type} models"
    if attention.implementation != "sdpa":
        return "attention is not sdpa"
    if attention.has_window:
        return "attention has a window"
    if attention.depends_on_length:
        return "positions depend on the length of the row"
    return None


def _difference(groups: Sequence[Sequence[Request]], packed: Sequence[Answer], alone: Sequence[Answer]) -> float:
    """Largest difference of a log-likelihood; infinite if a best choice changes or a number is not finite."""
    a, b = (np.array([x[0] for x in answers]) for answers in (packed, alone))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.inf
    ends = list(itertools.accumulate(map(len, groups)))
    pairs = [(a[s:e], b[s:e]) for s, e in zip([0, *ends], ends, strict=False)]
    return np.inf if any(x.argmax() != y.argmax() for x, y in pairs) else float(np.abs(a - b).max())


class PackedScorer:
    """Answers requests as `_compat.log_likelihoods` does, packed where several share a context."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self._kept: OrderedDict[tuple[int, ...], tuple[list[_Batch], list[int]]] = OrderedDict()

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request.

        Args:
            requests: Requests with the same context must follow each other, as the choices of a question do.
        """
        key = (self.lm.batch_size, *map(id, requests))
        if key not in self._kept:
            self._kept[key] = self._prepare(requests)
            if len(self._kept) > N_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        batches, rest = self._kept[key]
        answers: list[Answer] = [(np.nan, False)] * len(requests)
        if rest:
            alone = log_likelihoods(self.lm, [requests[i] for i in rest])
            for i, answer in zip(rest, alone, strict=True):
                answers[i] = answer
        for batch in batches:
            for i, answer in zip(batch.requests, self._run(batch), strict=True):
                answers[i] = answer
                report_answer(self.lm, requests[i][0], answer)
        return answers

    def _prepare(self, requests: Sequence[Request]) -> tuple[list[_Batch], list[int]]:
        """Batches of the requests that share a context, and the numbers of all others."""
        groups: list[list[int]] = []
        rest: list[int] = []
        for _, members in itertools.groupby(range(len(requests)), key=lambda i: requests[i][1]):
            group = list(members)
            longest = len(requests[group[0]][1]) + max(len(requests[i][2]) for i in group) - 1
            if len(group) > 1 and longest <= self.lm.max_length:
                groups.append(group)
            else:
                rest += group
        groups.sort(key=lambda g: _length(requests, g), reverse=True)
        size = self.lm.batch_size
        batches = [self._batch(requests, groups[i : i + size]) for i in range(0, len(groups), size)]
        return batches, rest

    def _batch(self, requests: Sequence[Request], groups: Sequence[Sequence[int]]) -> _Batch:
        """Lay out one row per group, the longest first."""
        pieces = [[_piece(requests[i]) for i in group] for group in groups]
        layout = context_layout(pieces)
        scored, at = np.unique(layout.at, return_inverse=True)
        lengths = np.array([len(piece.targets) for group in pieces for piece in group], dtype=np.int64)

        def on_device(numbers: Any) -> torch.Tensor:
            return torch.as_tensor(numbers, dtype=torch.long, device=self.lm.device)

        return _Batch(
            tokens=on_device(layout.tokens),
            positions=on_device(layout.positions),
            branch=on_device(layout.branch),
            scored=on_device(scored),
            at=on_device(at),
            target=on_device(layout.targets),
            starts=np.cumsum(lengths) - lengths,
            requests=[i for g in groups for i in g],
        )

    @torch.no_grad()
    def _run(self, batch: _Batch) -> list[Answer]:
        model = self.lm.model
        hidden = model.get_decoder()(
            input_ids=batch.tokens,
            attention_mask=attention_mask(batch.branch),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        logits = model.get_output_embeddings()(hidden.flatten(0, 1)[batch.scored])
        log_probability = torch.log_softmax(logits, dim=-1, dtype=self.lm.softmax_dtype)
        tokens = log_probability[batch.at, batch.target].double().cpu().numpy()
        is_best = (log_probability.argmax(dim=-1)[batch.at] == batch.target).cpu().numpy()
        sums = np.add.reduceat(tokens, batch.starts)
        greedy = np.logical_and.reduceat(is_best, batch.starts)
        return [(float(s), bool(g)) for s, g in zip(sums, greedy, strict=True)]


def _piece(request: Request) -> Piece:
    """The tokens that predict a choice behind its context, and the choice."""
    _, context, choice = request
    return Piece((*context, *choice[:-1]), tuple(choice))


def _length(requests: Sequence[Request], group: Sequence[int]) -> int:
    """Tokens of the row of a group."""
    return len(requests[group[0]][1]) + sum(len(requests[i][2]) - 1 for i in group)
