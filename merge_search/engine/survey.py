"""Numbers that depend on who survived selection: norms, counts, and the majority sign."""

from __future__ import annotations

from dataclasses import replace

import torch

from merge_search.engine.facts import Facts
from merge_search.engine.fused import WHOLE, Runner
from merge_search.engine.pipeline import Pass, Source

__all__ = ["MAJORITY_SAMPLE", "majority_sign", "measure"]

MAJORITY_SAMPLE = 2**11


def measure(p: Pass, facts: Facts, runner: Runner, wanted: tuple[str, ...]) -> dict[str, list[float]]:
    """Sums over the survivors of each expert (`sums.KINDS`), before any rescaling.

    Cost: one read of the inputs. Determinism: float64 sums, rounded to float32 where they are used, so that chunks and
    the compiled pass agree.
    """
    base, experts = facts.flats(p.name, p.experts)
    plain = replace(p, structure=replace(p.structure, rescale="none", boost=False, mixing=Source()))
    rows: list[list[float]] = runner.sums(plain, base, experts, wanted).tolist()
    return dict(zip(wanted, rows, strict=True))


def majority_sign(p: Pass, facts: Facts, runner: Runner) -> float:
    """The sign that most entries of the tensor elect, plus if they are even.

    Long tensors are asked at `MAJORITY_SAMPLE` evenly spaced entries: only exact ties use the answer, and a reduction over
    all entries would double the cost of the pass.
    """
    base, experts = facts.flats(p.name, p.experts)
    step = max(1, -(-base.numel() // MAJORITY_SAMPLE))
    device = facts.tensors.device
    where = torch.arange(p.index, p.index + base.numel(), step, device=device).to(torch.int32)
    given = {k: v if k in WHOLE else [t[::step].to(device) for t in v] for k, v in p.given.items()}
    sampled = replace(p, given=given)
    return (
        -1.0
        if runner.votes(sampled, base[::step].to(device), [e[::step].to(device) for e in experts], where) < 0
        else 1.0
    )
