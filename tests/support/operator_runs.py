"""Run tensor operators and post rules alone on small deltas. Shared by several test files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from merge_search.engine.contracts import Factors
from merge_search.engine.methods.operators import (
    OPERATORS,
    POSTS,
    OperatorContext,
    completed_options,
    load_operator,
    operator_problems,
)
from merge_search.recipe import Group, Operator

TAU_1 = torch.tensor([[0.40, -0.20, 0.10, 0.00], [0.30, -0.50, 0.05, -0.10]])
TAU_2 = torch.tensor([[0.10, 0.30, -0.10, 0.20], [-0.60, -0.40, 0.00, 0.20]])
TOY = (TAU_1, TAU_2)
MLP = Group("w", 0, "mlp")


def whole_pair(delta: Tensor) -> Factors | None:
    """Return a matrix as the product of itself and ones on the diagonal."""
    return Factors(delta.float(), torch.eye(delta.shape[1])) if delta.ndim == 2 else None


def context(deltas: Sequence[Tensor], base: Tensor | None = None, **fields: Any) -> OperatorContext:
    base = torch.zeros_like(deltas[0]) if base is None else base
    n = len(deltas)
    defaults: dict[str, Any] = {
        "experts": tuple(f"e{i}" for i in range(n)),
        "active": tuple(bool(d.any()) for d in deltas),
        "coefficients": (1.0,) * n,
        "options": {},
        "group": MLP,
        "factors": lambda expert: whole_pair(deltas[names.index(expert)]),
    }
    names = list(fields.get("experts", defaults["experts"]))
    return OperatorContext(name="w", base=base, deltas=tuple(deltas), **{**defaults, **fields})


def run(
    name: str, deltas: Sequence[Tensor], base: Tensor | None = None, combined: Tensor | None = None, **rest: Any
) -> Any:
    """Return the result of an operator (parts or weights), or of a post rule if `combined` is given.

    `options` override the defaults.
    """
    table = OPERATORS if combined is None else POSTS
    operator = Operator(name=name, options=rest.pop("options", {}))
    assert operator_problems(operator, table, "operator", len(deltas)) == []
    asked = context(deltas, base, options=completed_options(operator, table[name]), **rest)
    function = load_operator(table[name])
    return function(asked) if combined is None else function(asked, combined)


def total(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def random_deltas(n: int, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [1e-2 * torch.randn(shape, generator=generator) for _ in range(n)]


def grams(n: int, n_in: int, *, equal: bool = False) -> Any:
    """Return a `statistic` function over random inputs, 64 rows each."""
    found = {}
    for i in range(n):
        x = torch.randn(64, n_in, generator=torch.Generator().manual_seed(0 if equal else i))
        found[f"e{i}"] = x.T @ x / 64
    return lambda kind, expert: found[expert]


def near(found: Tensor, wanted: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(
        found, torch.as_tensor(wanted, dtype=found.dtype).reshape(found.shape), atol=atol, rtol=1e-4
    )
