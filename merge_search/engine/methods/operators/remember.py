"""Cache processed deltas that do not depend on the candidate: a search over coefficients pays for one SVD per tensor.

A cached result has the bits that would be computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.passes.byte_cache import room

__all__ = ["remembered"]

Parts = Callable[[OperatorContext], list[Tensor]]
_LEDGER = ("operators", "bytes")


def remembered(name: str) -> Callable[[Parts], Parts]:
    """Decorate an operator: its result is kept per tensor and experts, for the options it was last called with.

    Results are kept in `OperatorContext.memory`, on the device of the deltas, up to a third of the memory that is free
    when the first is kept. Beyond that they are computed every time. Callers must not write to them.

    Args:
        name: Name of the operator, part of the key.
    """

    def decorate(parts: Parts) -> Parts:
        @wraps(parts)
        def cached(context: OperatorContext) -> list[Tensor]:
            key, options = (name, context.name, context.experts), tuple(sorted(context.options.items()))
            known = context.memory.get(key)
            if known is not None and known[0] == options:
                kept: list[Tensor] = known[1]
                return list(kept)
            result = parts(context)
            _keep(context, key, options, result)
            return list(result)

        return cached

    return decorate


def _keep(context: OperatorContext, key: tuple[object, ...], options: tuple[object, ...], result: list[Tensor]) -> None:
    left = context.memory.get(_LEDGER)
    if left is None:
        left = room(context.base.device)
    dropped = context.memory.pop(key, None)
    left += _size(dropped[1]) if dropped is not None else 0
    if _size(result) <= left:
        context.memory[key] = (options, result)
        left -= _size(result)
    context.memory[_LEDGER] = left


def _size(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
