"""A live encoder with linear heads: texts or images in, float32 logits out."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from evaluators.classification.image_rows import ImageRow
from evaluators.classification.rows import HeadTask
from evaluators.labelled.live import Batch, LiveOutputs, eval_mode
from merge_search.cpu_matmul import short_attention
from merge_search.errors import StudyFileError

__all__ = ["ImageHeads", "TextHeads"]

_MOST_CUTS = 128
"""Largest number of places at which a batch may be parted. All pairs of them are compared."""


class Heads(LiveOutputs[Any]):
    """An encoder, used as it is at each call, and heads in float32, which never change.

    Args:
        model: Its output must have ``last_hidden_state``.
        tasks: The tasks whose heads are loaded.

    Raises:
        StudyFileError: The model is no encoder, or heads have another hidden size.
    """

    noun = ""
    advice = ""

    def __init__(self, model: Any, tasks: Sequence[HeadTask]) -> None:
        super().__init__(model)
        self.pooling = {t.name: t.pooling for t in tasks}
        self.n_positions = 0
        self.heads: dict[str, tuple[Tensor, Tensor | None]] = {}
        for task in tasks:
            tensors = load_file(task.head.path)
            weight = tensors[task.head.weight].to(self.device, torch.float32)
            bias = None if task.head.bias is None else tensors[task.head.bias].to(self.device, torch.float32)
            self.heads[task.name] = weight, bias

    def check_hidden_size(self, tasks: Sequence[HeadTask]) -> None:
        """Find the encoder's hidden size with one question of the first task, and compare the heads with it."""
        row = tasks[0].scored[next(iter(tasks[0].scored))][0]
        batch = self.batches(self.encode([row], where=f"task {tasks[0].name!r}"), size=1)[0]
        with eval_mode(self.model), torch.inference_mode():
            output = self.model(**batch.inputs)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise StudyFileError(
                f"{self.noun} needs an encoder whose output has last_hidden_state, "
                f"got {type(self.model).__name__}; {self.advice}"
            )
        self.n_positions, size = self.states(hidden).shape[1:]
        problems = [
            f"tasks.{t.name}.head: {t.head.path} has hidden size {t.head.hidden}, but the encoder's is {size}"
            for t in tasks
            if t.head.hidden != size
        ]
        if problems:
            raise StudyFileError(problems)

    def states(self, hidden: Tensor) -> Tensor:
        """The encoder's states as (n, positions, hidden)."""
        return hidden

    def length(self, batch: Batch) -> int:
        """The number of positions of a batch."""
        return self.n_positions

    @abstractmethod
    def pooled(self, hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
        """One vector per question from float32 states (n, positions, hidden). Shape (n, hidden)."""

    def outputs(self, task: str, batch: Batch) -> Tensor:
        """Pooling and head are computed in float32 whatever the model's dtype."""
        weight, bias = self.heads[task]
        with short_attention(self.length(batch), self.device):
            output = self.model(**batch.inputs)
        hidden = self.states(output.last_hidden_state.float())
        return functional.linear(self.pooled(hidden, batch, self.pooling[task]), weight, bias)


class TextHeads(Heads):
    """Texts, as token ids, padded on the right.

    Args:
        model: Called with ``input_ids`` and ``attention_mask``.
        tokenizer: A Hugging Face tokenizer.
        tasks: The tasks whose heads are loaded.
        max_length: Most tokens per text. It is lowered to what the tokenizer and the encoder allow.
    """

    noun = "classification"
    advice = "judge language models with lm_eval"

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[HeadTask], *, max_length: int) -> None:
        super().__init__(model, tasks)
        self.tokenizer = tokenizer
        positions = getattr(model.config, "max_position_embeddings", None) or max_length
        self.max_length = min(max_length, tokenizer.model_max_length, positions)
        self.check_hidden_size(tasks)

    def encode(self, rows: Sequence[Any], *, where: str) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut at `max_length`.

        Raises:
            StudyFileError: A text has no token.
        """
        texts = [row.text for row in rows]
        if not texts:
            return []
        out: list[list[int]] = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, return_attention_mask=False
        )["input_ids"]
        empty = [text for text, ids in zip(texts, out, strict=True) if not ids]
        if empty:
            raise StudyFileError(
                f"{where}: the tokenizer finds no token in {len(empty)} texts, the first is {empty[0]!r}"
            )
        return out

    def batches(self, items: Sequence[Sequence[int]], *, size: int) -> list[Batch]:
        """Batches of texts of similar length."""
        order = sorted(range(len(items)), key=lambda i: (len(items[i]), i))
        return [self._pad(items, order[at : at + size]) for at in range(0, len(order), size)]

    def trim_batches(self, items: Sequence[Sequence[int]]) -> list[Batch]:
        """All texts in up to three batches with the least padding; on a GPU in one, where one long pass is faster.

        A gradient through several passes is held until the last of them. That takes the memory of one more copy of the
        weights.
        """
        if self.device.type != "cpu":
            return super().trim_batches(items)
        order = sorted(range(len(items)), key=lambda i: (len(items[i]), i))
        first, second = _cuts([len(items[i]) for i in order])
        parts = (order[:first], order[first:second], order[second:])
        return [self._pad(items, part) for part in parts if part]

    def _pad(self, items: Sequence[Sequence[int]], rows: list[int]) -> Batch:
        length = max(len(items[i]) for i in rows)
        ids = np.full((len(rows), length), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for at, i in enumerate(rows):
            ids[at, : len(items[i])] = items[i]
            mask[at, : len(items[i])] = 1
        arrays = {"input_ids": ids, "attention_mask": mask}
        return Batch(rows, {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()})

    def length(self, batch: Batch) -> int:
        return batch.inputs["input_ids"].shape[1]

    def pooled(self, hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
        if pooling == "cls":
            return hidden[:, 0]
        mask = batch.inputs["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)


class ImageHeads(Heads):
    """Images of one size, called as ``pixel_values``.

    Args:
        model: A vision encoder of transformers. Its states are (n, positions, hidden), or (n, hidden, height, width).
        tasks: The tasks whose heads are loaded.
        mean, std: What is subtracted from the pixels of each channel, which lie in [0, 1], and what they are divided by
            then.
    """

    noun = "image_classification"
    advice = "judge texts with classification or lm_eval"

    def __init__(self, model: Any, tasks: Sequence[HeadTask], *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(model, tasks)
        self.dtype = next(model.parameters()).dtype
        self.mean, self.std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (mean, std))
        self.check_hidden_size(tasks)

    def encode(self, rows: Sequence[ImageRow], *, where: str) -> list[NDArray[np.float32]]:
        """Pixels as float32 (channels, height, width), normalised.

        Raises:
            StudyFileError: An image has another size or number of channels than the model takes.
        """
        size = getattr(self.model.config, "image_size", None)
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        wanted = (getattr(self.model.config, "num_channels", None), *sides)
        if rows:  # what the encoder leaves open, the first image decides
            wanted = tuple(n if w is None else w for w, n in zip(wanted, rows[0].image.shape, strict=True))
        wrong = [r for r in rows if r.image.shape != wanted]
        if wrong:
            raise StudyFileError(
                f"{where}: images must be {_by(wanted)} (channels x height x width) for this encoder, found "
                f"{_by(wrong[0].image.shape)} in {wrong[0].where} and {len(wrong)} such in all; write them in that size"
            )
        if lengths := {len(v) for v in (self.mean, self.std)} - {1, wanted[0]}:
            raise StudyFileError(f"mean, std: must be one number or one per channel ({wanted[0]}), got {max(lengths)}")
        return [(row.pixels() - self.mean) / self.std for row in rows]

    def batches(self, items: Sequence[NDArray[np.float32]], *, size: int) -> list[Batch]:
        """Batches in the order of the images."""
        return [self._stack(items, range(at, min(at + size, len(items)))) for at in range(0, len(items), size)]

    def _stack(self, items: Sequence[NDArray[np.float32]], rows: Sequence[int]) -> Batch:
        pixels = torch.from_numpy(np.stack([items[i] for i in rows])).to(self.device, self.dtype)
        return Batch(list(rows), {"pixel_values": pixels})

    def states(self, hidden: Tensor) -> Tensor:
        return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden

    def pooled(self, hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
        return hidden[:, 0] if pooling == "cls" else hidden.mean(1)


def pixel_statistics(folder: str, *, at: str = "preprocessor_config.json") -> Mapping[str, Any]:
    """Mean and standard deviation of a model's pixels from its folder; {} where it has none."""
    path = Path(folder) / at
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyFileError(f"{path} is not JSON: {error}; set mean and std instead") from error
    names = {"mean": "image_mean", "std": "image_std"}
    return {name: data[key] for name, key in names.items() if isinstance(data.get(key), list)}


def _by(shape: Sequence[int | None]) -> str:
    return " x ".join("any" if n is None else str(n) for n in shape)


def _cuts(lengths: Sequence[int]) -> tuple[int, int]:
    """The two places at which to part ascending lengths so that three padded batches have the fewest tokens."""
    n, ascending = len(lengths), np.array([0, *lengths])
    cuts = np.unique(np.linspace(0, n, min(n, _MOST_CUTS) + 1).round().astype(int))
    first, second = cuts[:, None], cuts[None, :]
    size = first * ascending[first] + (second - first) * ascending[second] + (n - second) * ascending[n]
    at, then = np.unravel_index(np.where(first <= second, size, size.max() + 1).argmin(), size.shape)
    return int(cuts[at]), int(cuts[then])
