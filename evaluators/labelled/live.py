"""A live model's logits over the answers of a task: batches in, float32 out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from merge_search.errors import EvaluationError, MergeSearchError, NonFiniteError

__all__ = ["Batch", "LiveOutputs", "eval_mode"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Questions of one forward pass.

    Attributes:
        rows: The position of each question in the list that was batched. Shape (n,).
        inputs: Arguments of the model, on its device. First dimension n.
    """

    rows: list[int]
    inputs: Mapping[str, Tensor]


class LiveOutputs(ABC, Generic[Item]):
    """A live model, used as it is at each call. An item is a question as `encode` prepares it.

    Args:
        model: The live model.
    """

    def __init__(self, model: Any) -> None:
        self.model: nn.Module = model
        self.device = next(model.parameters()).device

    @abstractmethod
    def encode(self, rows: Sequence[Any], *, where: str) -> list[Item]:
        """Prepare questions once.

        Args:
            rows: A task's rows.
            where: Their place, for messages.

        Raises:
            StudyFileError: A question is none to this model.
        """

    @abstractmethod
    def batches(self, items: Sequence[Item], *, size: int) -> list[Batch]:
        """Batches of up to `size` questions. They depend on `items` and `size` alone."""

    def trim_batches(self, items: Sequence[Item]) -> list[Batch]:
        """All questions in few batches, for a gradient."""
        return self.batches(items, size=max(1, len(items)))

    @abstractmethod
    def outputs(self, task: str, batch: Batch) -> Tensor:
        """Logits of one batch, with a graph. Shape (n, n_outcomes), float32."""

    def logits(self, task: str, batch: Batch) -> Tensor:
        """Logits of one batch in the order of ``batch.rows``, with a graph to the parameters that require gradients.

        Dropout is off.

        Returns:
            Shape (n, n_outcomes), float32.

        Raises:
            NonFiniteError: NaN or infinity among the logits.
            EvaluationError: The model failed otherwise. Out-of-memory errors pass.
        """
        shape = tuple(next(iter(batch.inputs.values())).shape)
        with eval_mode(self.model), _failures(f"task {task!r}, batch of shape {shape}"):
            logits = self.outputs(task, batch)
            n_bad = int((~torch.isfinite(logits.detach())).any(1).sum())
        if n_bad:
            raise NonFiniteError(
                f"logits must be finite, got NaN or infinity for {n_bad} of {len(logits)} questions of task {task!r}"
            )
        return logits

    def score(
        self, task: str, batches: Sequence[Batch], *, on_asked: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Logits of all questions of `batches`, in the order in which they were batched, without a graph.

        Args:
            task: The task.
            batches: As `batches` returns them; at least one.
            on_asked: Called before each batch with its number of rows.

        Returns:
            Shape (n, n_outcomes).

        Raises:
            NonFiniteError: As `logits`.
            EvaluationError: As `logits`.
        """
        out: NDArray[np.float32] | None = None
        with torch.inference_mode():
            for batch in batches:
                if on_asked is not None:
                    on_asked(len(batch.rows))
                found = self.logits(task, batch).cpu().numpy()
                if out is None:
                    out = np.empty((sum(len(b.rows) for b in batches), found.shape[1]), dtype=np.float32)
                out[batch.rows] = found
        assert out is not None
        return out


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
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
        raise EvaluationError(f"{where}: the model failed with {type(error).__name__}: {error}") from error
