"""Numbers that depend on who survived selection: norms, counts, and the majority sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from merge_search.engine.contracts import Pass, Source
from merge_search.engine.execute.runner import WHOLE, Runner
from merge_search.engine.passes.measurements import Facts

__all__ = ["MAJORITY_SAMPLE", "Samples", "majority_sign", "measure"]

MAJORITY_SAMPLE = 2**11


def measure(p: Pass, facts: Facts, runner: Runner, wanted: tuple[str, ...]) -> dict[str, list[float]]:
    """Sums over the survivors of each expert (`sums.KINDS`), before any rescaling.

    Cost: one read of the inputs. Determinism: float64 sums, rounded to float32 where they are used, so that chunks and
    the compiled pass agree.
    """
    base, experts = facts.flats(p.name, p.experts)
    plain = replace(p, structure=p.structure._replace(rescale="none", boost=False, mixing=Source()))
    rows: list[list[float]] = runner.sums(plain, base, experts, wanted).tolist()
    return dict(zip(wanted, rows, strict=True))


class Samples:
    """Evenly spaced entries of tensors, gathered once: a candidate that asks finds them side by side in memory."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._places: dict[tuple[str, int], Tensor] = {}

    def entries(self, name: str, experts: Sequence[str]) -> list[Tensor]:
        """Those of the base and of each expert: `MAJORITY_SAMPLE` or fewer, flat, on the engine's device."""
        wanted = [("", name), *((e, name) for e in experts)]  # no expert is called ""
        if any(key not in self._kept for key in wanted):
            base, tensors = self.facts.flats(name, experts)
            device, step = self.facts.tensors.device, _step(base.numel())
            for key, t in zip(wanted, (base, *tensors), strict=True):
                self._kept[key] = t[::step].to(device, copy=True).contiguous()
        return [self._kept[key] for key in wanted]

    def places(self, p: Pass) -> Tensor:
        """Their positions, int32, from `p.index` on."""
        key = (p.name, p.index)
        if key not in self._places:
            n = math.prod(p.shape)
            found = torch.arange(p.index, p.index + n, _step(n), device=self.facts.tensors.device)
            self._places[key] = found.to(torch.int32)
        return self._places[key]


def _step(n: int) -> int:
    return max(1, -(-n // MAJORITY_SAMPLE))


def majority_sign(p: Pass, samples: Samples, runner: Runner) -> float:
    """The sign that most entries of the tensor elect, plus if they are even.

    Long tensors are asked at `MAJORITY_SAMPLE` evenly spaced entries: only exact ties use the answer, and a reduction over
    all entries would double the cost of the pass.
    """
    base, *experts = samples.entries(p.name, p.experts)
    if p.given:
        step, device = _step(math.prod(p.shape)), base.device
        p = replace(p, given={k: v if k in WHOLE else [t[::step].to(device) for t in v] for k, v in p.given.items()})
    return -1.0 if runner.votes(p, base, experts, samples.places(p)) < 0 else 1.0
