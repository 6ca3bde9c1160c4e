"""n:m masks: in every block of consecutive entries of a row, the same number is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["balanced_masks", "counts_of"]

_PAIRS = 16
_PART = 2**18  # elements at a time


def counts_of(density: float, columns: int, block_size: int) -> tuple[int, int]:
    """How many entries of every whole block are kept, and how many of the shorter last block of a row."""
    return max(1, round(density * block_size)), max(1, round(density * (columns % block_size)))


def balanced_masks(
    scores: Sequence[Tensor], densities: Sequence[float], block_size: int, *, exclusive: bool
) -> list[Tensor]:
    """The max(1, round(density * block)) largest scores of each block, for each expert in order.

    Blocks do not straddle rows. The last block of a row may be shorter and keeps the same share. An entry with
    score zero is never kept.

    Args:
        scores: One per expert, all of one shape (..., columns), float32, >= 0.
        densities: Kept fraction of each expert.
        block_size: Entries of a block.
        exclusive: Whether an entry that an earlier expert kept is closed to the later ones (CABS).

    Returns:
        Flat boolean masks.

    Source: CABS, arXiv 2503.01874. Differs: the reference cuts blocks from the flattened tensor.
    """
    columns = max(1, scores[0].shape[-1])
    rows = [score.reshape(-1, columns) for score in scores]
    masks = [torch.empty(t.shape, dtype=torch.bool, device=t.device) for t in rows]
    step = max(1, _PART // columns)
    for start in range(0, rows[0].shape[0], step):  # intermediate tensors stay small, and their memory is used again
        part = slice(start, start + step)
        _fill([m[part] for m in masks], [t[part] for t in rows], densities, block_size, exclusive=exclusive)
    return [m.reshape(-1) for m in masks]


def _fill(
    masks: Sequence[Tensor], scores: Sequence[Tensor], densities: Sequence[float], block_size: int, *, exclusive: bool
) -> None:
    free = torch.ones_like(masks[0])
    for mask, score, density in zip(masks, scores, densities, strict=True):
        keep, rest = counts_of(density, score.shape[-1], block_size)
        candidate = torch.where(free & (score > 0), score, -1.0)
        torch.logical_and(_largest(candidate, block_size, keep, rest), candidate > 0, out=mask)
        if exclusive:
            free &= ~mask


def _largest(score: Tensor, block_size: int, keep: int, rest: int) -> Tensor:
    columns = score.shape[-1]
    whole = columns // block_size * block_size
    parts = []
    if whole:
        blocks = score[..., :whole].reshape(*score.shape[:-1], whole // block_size, block_size)
        parts.append((_places(blocks) < keep).reshape(*score.shape[:-1], whole))
    if whole < columns:
        parts.append(_places(score[..., whole:]) < rest)
    return torch.cat(parts, -1)


def _places(blocks: Tensor) -> Tensor:
    """Rank of each entry in the last axis: 0 is the largest, and of equal ones the first. By counting, not sorting."""
    size = blocks.shape[-1]
    if size <= _PAIRS:  # every pair compared once, along memory
        lanes = blocks.reshape(-1, size).t().contiguous()
        places = torch.zeros(lanes.shape, dtype=torch.int8, device=lanes.device)
        for i in range(size):
            for j in range(i + 1, size):
                later = lanes[j] > lanes[i]
                places[i] += later
                places[j] += ~later
        return places.t().reshape(blocks.shape)
    places = torch.zeros_like(blocks, dtype=torch.int16)
    for i in range(size):
        other = blocks[..., i : i + 1]
        ahead = other > blocks
        ahead[..., i + 1 :] |= (other == blocks)[..., i + 1 :]
        places += ahead
    return places
