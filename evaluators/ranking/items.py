"""A live recommender: histories in, float32 scores of a task's items out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluators.labelled.live import Batch, LiveOutputs, eval_mode
from evaluators.ranking.rows import RankingTask, SequenceRow
from merge_search.errors import StudyFileError

__all__ = ["ItemScores"]


class ItemScores(LiveOutputs[list[int]]):
    """Scores of the items that a task may recommend, after the last item of each history.

    Args:
        model: Called with ``input_ids`` and ``attention_mask``, padded on the right with 0. Its output must have
            ``logits`` of shape (n, length, items + 1): the score of every item as the next one.
        tasks: The tasks.
        max_length: Longest history. It is lowered to what the model allows.

    Raises:
        StudyFileError: The model scores no items, or too few for a task.
    """

    def __init__(self, model: Any, tasks: Sequence[RankingTask], *, max_length: int) -> None:
        super().__init__(model)
        self.max_length = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
        self.items: Mapping[str, Tensor] = {t.name: torch.tensor(t.items, device=self.device) for t in tasks}
        largest = {t.name: max([*t.items, *(i for rows in _all(t) for r in rows for i in r.history)]) for t in tasks}
        known = getattr(model.config, "vocab_size", None)
        if problems := [
            f"tasks.{name}: its items go up to {item}, but the model knows items 1 to {known - 1}"
            for name, item in largest.items()
            if known is not None and item >= known
        ]:
            raise StudyFileError(problems)
        with eval_mode(self.model), torch.inference_mode():
            output = self.model(**self._pad([[1]], [0]).inputs)
        if getattr(output, "logits", None) is None or output.logits.ndim != 3:
            raise StudyFileError(
                "ranking needs a model whose output has logits over items at every place, "
                f"got {type(model).__name__}; judge encoders with classification"
            )

    def encode(self, rows: Sequence[SequenceRow], *, where: str) -> list[list[int]]:
        """The last `max_length` items of each history."""
        return [list(row.history[-self.max_length :]) for row in rows]

    def batches(self, items: Sequence[Sequence[int]], *, size: int) -> list[Batch]:
        """Batches of histories of similar length."""
        order = sorted(range(len(items)), key=lambda i: (len(items[i]), i))
        return [self._pad(items, order[at : at + size]) for at in range(0, len(order), size)]

    def _pad(self, items: Sequence[Sequence[int]], rows: list[int]) -> Batch:
        length = max(len(items[i]) for i in rows)
        ids = np.zeros((len(rows), length), dtype=np.int64)
        for at, i in enumerate(rows):
            ids[at, : len(items[i])] = items[i]
        tensor = torch.from_numpy(ids).to(self.device)
        return Batch(rows, {"input_ids": tensor, "attention_mask": (tensor != 0).long()})

    def outputs(self, task: str, batch: Batch) -> Tensor:
        last = batch.inputs["attention_mask"].sum(1) - 1
        logits = self.model(**batch.inputs).logits
        return logits[torch.arange(len(last), device=self.device), last][:, self.items[task]].float()


def _all(task: RankingTask) -> list[tuple[SequenceRow, ...]]:
    return [*task.scored.values(), task.fit]
