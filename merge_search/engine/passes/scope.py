"""Which experts are ranked against what, for one recipe."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from merge_search.engine.contracts import is_vector
from merge_search.recipe import Select

__all__ = ["Scope"]


@dataclass(frozen=True)
class Scope:
    """What scores are made from and ranked within, for one recipe.

    experts: All of the recipe, in processing order. select: its `Select`. seed: of random scores.
    """

    experts: tuple[str, ...]
    select: Select
    winsorise: float
    seed: int

    def covers(self, shape: tuple[int, ...] | torch.Size) -> bool:
        """Whether selection applies to tensors of this shape."""
        return self.select.vectors or not is_vector(shape)

    def key(self) -> tuple[Hashable, ...]:
        scope = "model" if self.select.scope == "model" else "tensor"
        return (self.experts, scope, self.select.vectors, self.winsorise)
