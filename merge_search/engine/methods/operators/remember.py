"""Cache processed deltas that do not depend on the candidate: a search over coefficients pays for one SVD per tensor.

A cached result has the bits that would be computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext

__all__ = ["remembered"]

Parts = Callable[[OperatorContext], list[Tensor]]


def remembered(name: str) -> Callable[[Parts], Parts]:
    """Decorate an operator: its result is kept per tensor and experts, for the options it was last called with.

    Results are kept in `OperatorContext.cache`, on the device of the deltas, while there is room. The others are
    computed every time: a merge asks for every tensor once, so dropping another tensor's result would gain nothing.
    Callers must not write to them.

    Args:
        name: Name of the operator, part of the key.
    """

    def decorate(parts: Parts) -> Parts:
        @wraps(parts)
        def cached(context: OperatorContext) -> list[Tensor]:
            if context.cache is None:
                return parts(context)
            key, options = (name, context.name, context.experts), tuple(sorted(context.options.items()))
            known = context.cache.get(key)
            if known is not None and known[0] == options:
                return list(known[1])
            result = parts(context)
            context.cache.put(key, (options, result), sum(t.numel() * t.element_size() for t in result))
            return list(result)

        return cached

    return decorate
