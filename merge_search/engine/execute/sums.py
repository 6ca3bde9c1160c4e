"""Sums over the survivors of a pass, in float64, for rules that need norms or counts of the entries kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_search.engine.contracts import Structure
from merge_search.engine.methods.primitives import Mask, Primitives
from merge_search.engine.methods.stages import Scalars, Survivors, Tensors, elect, survivors, voices

__all__ = ["KINDS", "survivor_sum_list", "survivor_sums", "votes"]

KINDS = ("l1_before", "l2_before", "l1_after", "l2_after", "alone", "shared")
"""Sum of |delta| and of its square before and after selection; entries kept by one expert alone, or by others too."""


def survivor_sums(
    s: Structure,
    base: Tensor,
    experts: Sequence[Tensor],
    given: Tensors,
    n: Scalars,
    index: Tensor,
    wanted: Sequence[str],
    ops: Primitives,
) -> Tensor:
    """One row per kind of `wanted`, one column per expert; other arguments as in `stages.merge`. float64."""
    sums = survivor_sum_list(s, base, experts, given, n, index, wanted, ops)
    return torch.stack(sums).reshape(len(wanted), -1)


def survivor_sum_list(
    s: Structure,
    base: Tensor,
    experts: Sequence[Tensor],
    given: Tensors,
    n: Scalars,
    index: Tensor,
    wanted: Sequence[str],
    ops: Primitives,
) -> list[Tensor]:
    """The entries of `survivor_sums`, row by row."""
    left = survivors(s, base.to(torch.float32), experts, given, n, index, ops)
    alive = _alive(left, elect(s, left.x, n, ops)) if "alone" in wanted or "shared" in wanted else []
    return [entry for kind in wanted for entry in _row(kind, left, alive)]


def votes(
    s: Structure, base: Tensor, experts: Sequence[Tensor], given: Tensors, n: Scalars, index: Tensor, ops: Primitives
) -> Tensor:
    """Entries that elect plus, less those that elect minus. float64, 0-d."""
    left = survivors(s, base.to(torch.float32), experts, given, n, index, ops)
    return torch.sign(voices(s, left.x, n)).sum(dtype=torch.float64)


def _row(kind: str, left: Survivors, alive: Sequence[Tensor]) -> list[Tensor]:
    if kind in ("alone", "shared"):
        crowd = torch.zeros_like(left.x[0])
        for m in alive:
            crowd = crowd + m
        # counts are whole numbers: float32 is exact within a chunk, float64 beyond
        return [(m * ((crowd == 1) if kind == "alone" else (crowd > 1))).sum(dtype=torch.float64) for m in alive]
    values = left.x if kind.endswith("after") else left.deltas
    if kind.startswith("l1"):
        return [t.abs().sum(dtype=torch.float64) for t in values]
    return [(t * t).sum(dtype=torch.float64) for t in values]


def _alive(left: Survivors, agreed: Sequence[Mask]) -> list[Tensor]:
    """1 where an expert takes part in an entry, else 0. float32."""
    alive = []
    for t, m, c in zip(left.x, left.kept, agreed, strict=True):
        kept = torch.ones_like(t) if m is None else (m > 0).to(torch.float32)
        alive.append(kept if c is None else c.to(torch.float32))
    return alive
