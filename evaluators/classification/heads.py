"""A live encoder with linear heads: tokens in, float32 logits out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from evaluators.classification.rows import TaskRows
from merge_search.cpu_matmul import short_attention
from merge_search.errors import EvaluationError, MergeSearchError, NonFiniteError, StudyFileError

__all__ = ["Batch", "EncoderHeads"]

_MOST_CUTS = 128
"""Largest number of places at which a batch may be parted. All pairs of them are compared."""


@dataclass(frozen=True)
class Batch:
    """Texts of one forward pass, padded on the right.

    Attributes:
        rows: The position of each text in the list that was batched. Shape (n,).
        input_ids, attention_mask: Shape (n, length), int64, on the model's device.
    """

    rows: list[int]
    input_ids: Tensor
    attention_mask: Tensor


class EncoderHeads:
    """An encoder, used as it is at each call, and heads in float32, which never change.

    Args:
        model: Called with ``input_ids`` and ``attention_mask``. Its output must have ``last_hidden_state``.
        tokenizer: A Hugging Face tokenizer.
        tasks: The tasks whose heads are loaded.
        max_length: Most tokens per text. It is lowered to what the tokenizer and the encoder allow.

    Raises:
        StudyFileError: The model is no encoder, or heads have another hidden size.
    """

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[TaskRows], *, max_length: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        self.pooling = {t.name: t.pooling for t in tasks}
        positions = getattr(model.config, "max_position_embeddings", None) or max_length
        self.max_length = min(max_length, tokenizer.model_max_length, positions)
        self.heads: dict[str, tuple[Tensor, Tensor | None]] = {}
        for task in tasks:
            tensors = load_file(task.head.path)
            weight = tensors[task.head.weight].to(self.device, torch.float32)
            bias = None if task.head.bias is None else tensors[task.head.bias].to(self.device, torch.float32)
            self.heads[task.name] = weight, bias
        self._check_hidden_size(tasks)

    def _check_hidden_size(self, tasks: Sequence[TaskRows]) -> None:
        """Find the encoder's hidden size with one text of the first task, and compare the heads with it."""
        row = tasks[0].scored[next(iter(tasks[0].scored))][0]
        batch = self.batches(self.encode([row.text], where=f"task {tasks[0].name!r}"), size=1)[0]
        with _eval_mode(self.model), torch.inference_mode():
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise StudyFileError(
                "classification needs an encoder whose output has last_hidden_state, "
                f"got {type(self.model).__name__}; judge language models with lm_eval"
            )
        size = hidden.shape[-1]
        problems = [
            f"tasks.{t.name}.head: {t.head.path} has hidden size {t.head.hidden}, but the encoder's is {size}"
            for t in tasks
            if t.head.hidden != size
        ]
        if problems:
            raise StudyFileError(problems)

    def encode(self, texts: Sequence[str], *, where: str) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut at `max_length`.

        Args:
            texts: The texts.
            where: Their place, for the message.

        Raises:
            StudyFileError: A text has no token.
        """
        if not texts:
            return []
        out: list[list[int]] = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, return_attention_mask=False
        )["input_ids"]
        empty = [text for text, ids in zip(texts, out, strict=True) if not ids]
        if empty:
            raise StudyFileError(
                f"{where}: the tokenizer finds no token in {len(empty)} texts, the first is {empty[0]!r}"
            )
        return out

    def batches(self, tokens: Sequence[Sequence[int]], *, size: int) -> list[Batch]:
        """Batches of up to `size` texts of similar length. They depend on `tokens` and `size` alone."""
        order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
        return [self._pad(tokens, order[at : at + size]) for at in range(0, len(order), size)]

    def trim_batches(self, tokens: Sequence[Sequence[int]]) -> list[Batch]:
        """All texts in up to three batches with the least padding; on a GPU in one, where one long pass is faster.

        A gradient through several passes is held until the last of them. That takes the memory of one more copy of the
        weights.
        """
        if self.device.type != "cpu":
            return self.batches(tokens, size=max(1, len(tokens)))
        order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
        first, second = _cuts([len(tokens[i]) for i in order])
        parts = (order[:first], order[first:second], order[second:])
        return [self._pad(tokens, part) for part in parts if part]

    def _pad(self, tokens: Sequence[Sequence[int]], rows: list[int]) -> Batch:
        length = max(len(tokens[i]) for i in rows)
        ids = np.full((len(rows), length), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for at, i in enumerate(rows):
            ids[at, : len(tokens[i])] = tokens[i]
            mask[at, : len(tokens[i])] = 1
        return Batch(rows, torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device))

    def score(
        self, task: str, batches: Sequence[Batch], *, on_asked: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Logits of all texts of `batches`, in the order in which they were batched, without a graph.

        Args:
            task: The task whose head is used.
            batches: As `batches` returns them.
            on_asked: Called before each batch with its number of rows.

        Returns:
            Shape (n, n_classes).

        Raises:
            NonFiniteError: NaN or infinity among the logits.
            EvaluationError: The model failed otherwise. Out-of-memory errors pass.
        """
        out = np.empty((sum(len(b.rows) for b in batches), len(self.heads[task][0])), dtype=np.float32)
        with torch.inference_mode():
            for batch in batches:
                if on_asked is not None:
                    on_asked(len(batch.rows))
                out[batch.rows] = self.logits(task, batch).cpu().numpy()
        return out

    def logits(self, task: str, batch: Batch) -> Tensor:
        """Logits of one batch in the order of ``batch.rows``, with a graph to the parameters that require gradients.

        Pooling and head are computed in float32 whatever the model's dtype.

        Returns:
            Shape (n, n_classes), float32.

        Raises:
            NonFiniteError: As `score`.
            EvaluationError: As `score`.
        """
        weight, bias = self.heads[task]
        with _eval_mode(self.model), _failures(f"task {task!r}, batch of shape {tuple(batch.input_ids.shape)}"):
            with short_attention(batch.input_ids.shape[1], self.device):
                output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            hidden = output.last_hidden_state.float()
            if self.pooling[task] == "cls":
                pooled = hidden[:, 0]
            else:
                mask = batch.attention_mask.unsqueeze(-1)
                pooled = (hidden * mask).sum(1) / mask.sum(1)
            logits = functional.linear(pooled, weight, bias)
            n_bad = int((~torch.isfinite(logits.detach())).any(1).sum())
        if n_bad:
            raise NonFiniteError(
                f"logits must be finite, got NaN or infinity for {n_bad} of {len(logits)} questions of task {task!r}"
            )
        return logits


def _cuts(lengths: Sequence[int]) -> tuple[int, int]:
    """The two places at which to part ascending lengths so that three padded batches have the fewest tokens."""
    n, ascending = len(lengths), np.array([0, *lengths])
    cuts = np.unique(np.linspace(0, n, min(n, _MOST_CUTS) + 1).round().astype(int))
    first, second = cuts[:, None], cuts[None, :]
    size = first * ascending[first] + (second - first) * ascending[second] + (n - second) * ascending[n]
    at, then = np.unravel_index(np.where(first <= second, size, size.max() + 1).argmin(), size.shape)
    return int(cuts[at]), int(cuts[then])


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside. Afterwards every module has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _failures(where: str) -> Iterator[None]:
    """Turn any failure of the model into an `EvaluationError`. Model code may raise any kind of exception."""
    try:
        yield
    except (MergeSearchError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise EvaluationError(f"{where}: the encoder failed with {type(error).__name__}: {error}") from error
