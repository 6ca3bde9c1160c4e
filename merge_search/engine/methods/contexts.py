"""What a measure and an operator may read of the tensor that is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_search.engine.contracts import Factors, statistic_of
from merge_search.memory import BudgetedCache
from merge_search.recipe import Group, Scalar

__all__ = ["AssessContext", "OperatorContext"]


class AssessContext(NamedTuple):
    """What a measure may read. Experts whose delta is zero everywhere are left out.

    Attributes:
        base: float32, read only; in its stored dtype where the measure does not read weights.
        deltas: float32, one per expert, winsorised if the recipe says so; empty where the measure does not read
            weights.
        raw: The deltas before winsorising.
        numbers: 0-d float32 tensors that the measure's `numbers` made; empty for a measure without.
        options: The recipe's options, completed by the defaults.
        n_experts: Number of experts of the recipe, those that are left out included.
        experts: Names of those with a delta; empty inside a pass.
        every_expert: Names of all experts of the recipe; empty inside a pass.
        group: The tensor's name, block and module kind; None inside a pass.
        seed: The recipe's seed where the measure's row says that scores depend on it, else 0.
        coefficients: One per expert where the measure's row says that scores depend on them, else empty.
        tensors: The source of tensors and statistics; None inside a pass.
    """

    base: Tensor
    deltas: Sequence[Tensor]
    raw: Sequence[Tensor]
    numbers: Sequence[Tensor]
    options: Mapping[str, Scalar]
    n_experts: int = 0
    experts: tuple[str, ...] = ()
    every_expert: tuple[str, ...] = ()
    group: Group | None = None
    seed: int = 0
    coefficients: tuple[float, ...] = ()
    tensors: Any = None

    def statistic(self, kind: str, expert: str) -> Tensor:
        """A statistic of this tensor that was measured on data: float32, on the device of the base.

        Raises:
            RecipeError: it was never measured.
        """
        assert self.group is not None
        return statistic_of(self.tensors, kind, expert, self.group.tensor).to(self.base.device, torch.float32)


@dataclass(frozen=True)
class OperatorContext:
    """What an operator may read.

    Attributes:
        name: Name of the tensor.
        group: Its block and module kind.
        base: float32.
        deltas: float32, one per expert in the recipe's order; zero deltas included.
        experts: Names of the experts.
        active: Which deltas are not zero.
        coefficients: lambda_i of this tensor.
        options: The recipe's options, completed by the defaults.
        scale: lambda_out of this tensor, for an operator that returns weights.
        transposed: Whether the tensor is stored (in, out), as in GPT-2's Conv1D.
        densities: Kept fraction of every expert, in (0, 1]; empty for all ones.
        factors: Expert -> the LoRA pair whose product is its delta, float32; None for an expert without one here.
        stored: Expert -> its tensor as stored; None where only deltas are known.
        statistic: (kind, expert) -> a statistic measured on data; raises `RecipeError` where there is none.
        siblings: () -> deltas of every tensor of the same block, one tuple per tensor; None where the engine has none.
        seed: Seed of the recipe.
        memory: Small results that do not depend on the candidate, by a key that names the operator, the tensor, the
            experts and the options. It lives as long as the engine.
        cache: Processed deltas that do not depend on the candidate (`remember.remembered`); None: nothing is kept.
    """

    name: str
    group: Group
    base: Tensor
    deltas: tuple[Tensor, ...]
    experts: tuple[str, ...]
    active: tuple[bool, ...]
    coefficients: tuple[float, ...]
    options: Mapping[str, Scalar]
    scale: float = 1.0
    transposed: bool = False
    densities: tuple[float, ...] = ()
    factors: Callable[[str], Factors | None] | None = None
    stored: Callable[[str], Tensor] | None = None
    statistic: Callable[[str, str], Tensor] | None = None
    siblings: Callable[[], Iterable[tuple[Tensor, ...]]] | None = None
    seed: int = 0
    memory: dict[Any, Any] = field(default_factory=dict)
    cache: BudgetedCache[tuple[Any, list[Tensor]]] | None = None

    def number(self, option: str) -> float:
        """A numeric option."""
        return float(self.options[option])

    def where(self) -> str:
        """The tensor, for messages."""
        return f"tensor {self.name!r}"
