"""torch's private interfaces that the engine uses.

`tests/library_internals/test_torch.py` fails when torch moves one of them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Graph", "compile_apart", "mark_lengths_dynamic", "unobserved"]

Graph = Callable[..., Tensor]


def compile_apart(function: Graph, label: str) -> Graph:
    """`function`, compiled whole, with graphs of its own.

    The compiler keeps its graphs by code object, eight at most, and then gives up. All closures of one `def` share a
    code object. Each therefore gets a copy of it, under its own `label`.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=label)
    apart = types.FunctionType(code, function.__globals__, label, function.__defaults__, function.__closure__)
    graph: Graph = torch.compile(apart, fullgraph=True)
    return graph


def unobserved() -> AbstractContextManager[None]:
    """Inside the context no `TorchFunctionMode` sees a call."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def mark_lengths_dynamic(tensors: Iterable[Tensor]) -> None:
    """Let one graph serve every length of these tensors. The compiler takes lengths of one and less for fixed."""
    dynamo: Any = torch._dynamo
    for t in tensors:
        if t.numel() > 1:
            dynamo.mark_dynamic(t, 0)
