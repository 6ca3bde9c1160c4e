"""n:m masks: in every block of consecutive entries of a row, the same number is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["balanced_masks"]


def balanced_masks(
    scores: Sequence[Tensor], densities: Sequence[float], block_size: int, *, exclusive: bool
) -> list[Tensor]:
    """The max(1, round(density * block)) largest scores of each block, for each expert in order.

    Blocks do not straddle rows; the last one of a row may be shorter and keeps what fits its share. An entry with score
    zero is never kept. With `exclusive` an entry that an earlier expert kept is not free any more (CABS).

    Args:
        scores: Same shape (..., columns), float32, >= 0, one per expert.
    Returns:
        Flat boolean masks.
    Source: CABS, arXiv 2503.01874. Differs: the reference cuts blocks from the flattened tensor.
    """
    free = torch.ones_like(scores[0], dtype=torch.bool)
    masks = []
    for score, density in zip(scores, densities, strict=True):
        keep = max(1, round(density * block_size))
        candidate = torch.where(free & (score > 0), score, -1.0)
        mask = _largest(candidate, block_size, keep, density) & (candidate > 0)
        if exclusive:
            free &= ~mask
        masks.append(mask.reshape(-1))
    return masks


def _largest(score: Tensor, block_size: int, keep: int, density: float) -> Tensor:
    columns = score.shape[-1]
    whole = columns // block_size * block_size
    parts = []
    if whole:
        blocks = score[..., :whole].reshape(*score.shape[:-1], whole // block_size, block_size)
        parts.append((_places(blocks) < keep).reshape(*score.shape[:-1], whole))
    if whole < columns:
        parts.append(_places(score[..., whole:]) < max(1, round(density * (columns - whole))))
    return torch.cat(parts, -1)


def _places(blocks: Tensor) -> Tensor:
    """Rank of each entry in the last axis, 0 the largest, ties by lowest index; by counting, which beats sorting here."""
    places = torch.zeros_like(blocks, dtype=torch.int16)
    for i in range(blocks.shape[-1]):
        other = blocks[..., i : i + 1]
        ahead = other > blocks
        ahead[..., i + 1 :] |= (other == blocks)[..., i + 1 :]
        places += ahead
    return places
