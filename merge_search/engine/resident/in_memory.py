"""Tensors straight from state dicts, for Python users who have models in memory, for tests and for benchmarks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from merge_search.engine.contracts import Factors, Tensors
from merge_search.errors import WeightsError
from merge_search.recipe import Group, Models

__all__ = ["MemoryTensors"]


class MemoryTensors(Tensors):
    """A `contracts.Tensors` over dicts of tensors.

    Args:
        base: Name -> tensor. Floating tensors are mergeable.
        experts: Expert -> dict with the same names and shapes.
        groups: Group of each tensor. None: all are outside any block, with kind ``other``.
        statistics: (kind, expert, name) -> tensor.
        factors: (expert, name) -> the LoRA pair whose product is the expert's delta. An expert with one counts as an
            adapter.
    Raises:
        WeightsError: An expert lacks a tensor or has it in another shape.
    Example:
        >>> from merge_search.engine.engine import MergeEngine
        >>> from merge_search.presets import preset
        >>> base, expert = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2.0])}
        >>> tensors = MemoryTensors(base, {"a": expert})
        >>> dict(MergeEngine(tensors).merged(preset("task_arithmetic", tensors.models)))["w"]  # coefficient 0.3
        tensor([0.3000, 0.6000])
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]],
        *,
        groups: Mapping[str, Group] | None = None,
        statistics: Mapping[tuple[str, str, str], Tensor] | None = None,
        factors: Mapping[tuple[str, str], Factors] | None = None,
    ) -> None:
        names = [name for name, t in base.items() if t.is_floating_point()]
        for expert, tensors in experts.items():
            for name in names:
                if name not in tensors:
                    raise WeightsError(
                        f"expert {expert!r} has no tensor {name!r}; experts must have every tensor of the base"
                    )
                if tensors[name].shape != base[name].shape:
                    raise WeightsError(
                        f"tensor {name!r} of expert {expert!r} must have the base's shape {tuple(base[name].shape)}, "
                        f"got {tuple(tensors[name].shape)}"
                    )
        self.models = Models(base="memory", experts=dict.fromkeys(experts, "memory"))
        self.groups = {name: (groups or {}).get(name, Group(name, None, "other")) for name in names}
        self.device = next((t.device for t in base.values()), torch.device("cpu"))
        self._base, self._experts, self._statistics = base, experts, statistics or {}
        self._factors = factors or {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._base[name].shape)

    def base(self, name: str) -> Tensor:
        return self._base[name]

    def expert(self, expert: str, name: str) -> Tensor:
        return self._experts[expert][name]

    def factors(self, expert: str, name: str) -> Factors | None:
        return self._factors.get((expert, name))

    def factors_problem(self, expert: str) -> str:
        return "" if any(e == expert for e, _ in self._factors) else super().factors_problem(expert)

    @property
    def has_statistics(self) -> bool:
        """True, because even an empty mapping may compute statistics when it is asked."""
        return True

    def statistic(self, kind: str, expert: str, name: str) -> Tensor | None:
        return self._statistics.get((kind, expert, name))
