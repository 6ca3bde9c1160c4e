"""Numbers that depend on who survived selection: norms, counts, and the majority sign. Made once per set of masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from merge_search.engine.contracts import Pass, Source
from merge_search.engine.execute.runner import WHOLE, Runner
from merge_search.engine.passes.measurements import Measurements

__all__ = ["MAJORITY_SAMPLE", "Samples", "SurvivorNumbers"]

MAJORITY_SAMPLE = 2**11
_KEPT = 4096  # results

T = TypeVar("T")


class SurvivorNumbers:
    """Makes numbers of the survivors of a pass and keeps them by the pass's masks."""

    def __init__(self, measurements: Measurements, runner: Runner) -> None:
        self._measurements, self._runner = measurements, runner
        self._samples = Samples(measurements)
        self._results: dict[Hashable, Any] = {}

    def sums(self, p: Pass, given_key: str, kinds: tuple[str, ...]) -> dict[str, list[float]]:
        """Sums over the survivors of each expert (`sums.KINDS`), before any rescaling.

        Args:
            given_key: What the tensors given to the pass depend on.
        Cost: one read of the inputs.
        Determinism: float64 sums, rounded to float32 where they are used, so that chunks and the compiled pass agree.
        """
        return self._once(kinds, p, given_key, lambda: self._make_sums(p, kinds))

    def _make_sums(self, p: Pass, kinds: tuple[str, ...]) -> dict[str, list[float]]:
        base, experts = self._measurements.flats(p.name, p.experts)
        plain = replace(p, structure=p.structure._replace(rescale="none", boost=False, mixing=Source()))
        rows: list[list[float]] = self._runner.sums(plain, base, experts, kinds).tolist()
        return dict(zip(kinds, rows, strict=True))

    def majority_sign(self, p: Pass, given_key: str) -> float:
        """The sign that most entries of the tensor elect, plus if they are even.

        Long tensors are sampled at `MAJORITY_SAMPLE` evenly spaced entries. Only exact ties use the answer, and a
        reduction over all entries would double the cost of the pass.

        Args:
            given_key: What the tensors given to the pass depend on.
        """
        return self._once("majority", p, given_key, lambda: self._make_majority_sign(p))

    def _make_majority_sign(self, p: Pass) -> float:
        base, *experts = self._samples.entries(p.name, p.experts)
        if p.given:
            step, device = _step(math.prod(p.shape)), base.device
            p = replace(
                p, given={k: v if k in WHOLE else [t[::step].to(device) for t in v] for k, v in p.given.items()}
            )
        return -1.0 if self._runner.votes(p, base, experts, self._samples.positions(p)) < 0 else 1.0

    def _once(self, what: Hashable, p: Pass, given_key: str, make: Callable[[], T]) -> T:
        """A result that depends on the masks of a pass alone, made the first time that it is asked for."""
        structure = p.structure._replace(emit="", mixing=Source())
        key = (p.name, structure, _mask_numbers(p), given_key, what)
        if key not in self._results:
            if len(self._results) > _KEPT:
                self._results.clear()
            self._results[key] = make()
        result: T = self._results[key]
        return result


def _mask_numbers(p: Pass) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """The numbers of a pass that its masks depend on."""
    skip = {"scale", "sharpness", "majority"} | (set() if p.structure.weighted else {"coefficient"})
    return tuple(sorted((k, tuple(v)) for k, v in p.numbers.items() if k not in skip))


class Samples:
    """Evenly spaced entries of tensors, gathered once: a candidate that asks finds them side by side in memory."""

    def __init__(self, measurements: Measurements) -> None:
        self._measurements = measurements
        self._entries: dict[tuple[str, str], Tensor] = {}
        self._positions: dict[tuple[str, int], Tensor] = {}

    def entries(self, name: str, experts: Sequence[str]) -> list[Tensor]:
        """Entries of the base and of each expert: `MAJORITY_SAMPLE` or fewer, flat, on the engine's device."""
        keys = [("", name), *((e, name) for e in experts)]  # no expert is called ""
        if any(key not in self._entries for key in keys):
            base, tensors = self._measurements.flats(name, experts)
            device, step = self._measurements.tensors.device, _step(base.numel())
            for key, t in zip(keys, (base, *tensors), strict=True):
                self._entries[key] = t[::step].to(device, copy=True).contiguous()
        return [self._entries[key] for key in keys]

    def positions(self, p: Pass) -> Tensor:
        """Positions of the entries, int32, from `p.index` on."""
        key = (p.name, p.index)
        if key not in self._positions:
            n = math.prod(p.shape)
            positions = torch.arange(p.index, p.index + n, _step(n), device=self._measurements.tensors.device)
            self._positions[key] = positions.to(torch.int32)
        return self._positions[key]


def _step(n: int) -> int:
    return max(1, -(-n // MAJORITY_SAMPLE))
