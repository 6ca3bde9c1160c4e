"""Numbers that depend on who survived selection: norms, counts, and the majority sign."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from merge_search.engine.facts import Facts
from merge_search.engine.fused import WHOLE, scalars, sweep
from merge_search.engine.pipeline import Pass
from merge_search.engine.stages import elect, survivors, voices

__all__ = ["MAJORITY_SAMPLE", "majority_sign", "measure"]

MAJORITY_SAMPLE = 2**13


def measure(p: Pass, facts: Facts) -> dict[str, list[float]]:
    """Norms and counts of the survivors of each expert.

    l1_before, l2_before, l1_after, l2_after of the delta; energy: mean square after; alone, shared: entries kept by this
    expert only, or also by another.

    Cost: one pass in chunks. Determinism: sums are float64, chunk by chunk.
    """
    device = facts.tensors.device
    base, experts = facts.flats(p.name, p.experts)
    n = scalars(p.numbers, device)
    sums = torch.zeros(6, len(p.experts), dtype=torch.float64, device=device)
    plain = replace(p.structure, rescale="none")
    for _, b, e, given, index in sweep(p, base, experts, device):
        left = survivors(plain, b.to(torch.float32), e, given, n, index)
        sums += _sums(left.deltas, left.x, left.kept, elect(plain, left.x, n))
    rows = sums.tolist()
    size = max(1, base.numel())
    return {
        "l1_before": rows[0],
        "l2_before": [v**0.5 for v in rows[1]],
        "l1_after": rows[2],
        "l2_after": [v**0.5 for v in rows[3]],
        "energy": [v / size for v in rows[3]],
        "alone": rows[4],
        "shared": rows[5],
    }


def _sums(deltas: list[Tensor], x: list[Tensor], kept: list[Tensor | None], agreed: list[Tensor | None]) -> Tensor:
    alive = []
    for t, m, c in zip(x, kept, agreed, strict=True):
        mine = torch.ones_like(t, dtype=torch.bool) if m is None else m > 0
        alive.append(mine if c is None else mine & c)
    crowd = torch.stack(alive).sum(0)
    wide, left = [t.to(torch.float64) for t in deltas], [t.to(torch.float64) for t in x]
    rows = [
        torch.stack([t.abs().sum() for t in wide]),
        torch.stack([(t * t).sum() for t in wide]),
        torch.stack([t.abs().sum() for t in left]),
        torch.stack([(t * t).sum() for t in left]),
        torch.stack([(m & (crowd == 1)).sum() for m in alive]).to(torch.float64),
        torch.stack([(m & (crowd > 1)).sum() for m in alive]).to(torch.float64),
    ]
    return torch.stack(rows)


def majority_sign(p: Pass, facts: Facts) -> float:
    """The sign that most entries of the tensor elect, plus if they are even.

    Long tensors are asked at `MAJORITY_SAMPLE` evenly spaced entries: only exact ties use the answer, and a reduction over
    all entries would double the cost of the pass.
    """
    base, experts = facts.flats(p.name, p.experts)
    step = max(1, -(-base.numel() // MAJORITY_SAMPLE))
    device = facts.tensors.device
    place = torch.arange(0, base.numel(), step, device=device)
    where = (place + p.index).to(torch.int32) if step > 1 else None
    first = torch.tensor((p.index + 2**31) % 2**32 - 2**31, dtype=torch.int32, device=device)
    given = {k: v if k in WHOLE else [t[::step].to(device) for t in v] for k, v in p.given.items()}
    n = scalars(p.numbers, device)
    origin = base[::step].to(device, torch.float32)
    index = first if where is None else where
    left = survivors(p.structure, origin, [e[::step].to(device) for e in experts], given, n, index)
    return -1.0 if float(torch.sign(voices(p.structure, left.x, n)).sum()) < 0 else 1.0
