"""An element-wise function as a graph of torch's operations, by noting them while it runs once on a few elements.

What torch's own tracers do for much more than is needed here, with a second and a half to import them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["Untraceable", "trace"]


class Untraceable(Exception):
    """The function does what cannot be noted: it looks at values, or changes a tensor that is seen elsewhere."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Appends what torch is asked to do to a graph; ``meta["val"]`` of a node is its tensor."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self._held: list[Tensor] = []  # so that ids and addresses stay theirs
        self._nodes: dict[int, Node] = {}
        self._in_place: dict[int, set[int]] = {}  # ids of the tensors at an address
        for i, tensor in enumerate(inputs):
            self._note(self.graph.placeholder(f"input_{i}"), tensor)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own switch: nothing here is compiled, and its compiler takes a second to import."""
        return False

    def _note(self, node: Node, tensor: Tensor) -> None:
        node.meta["val"] = tensor
        self._held.append(tensor)
        self._nodes[id(tensor)] = node
        self._in_place.setdefault(tensor.untyped_storage().data_ptr(), set()).add(id(tensor))

    def node(self, x: Any) -> Any:
        """The node of a tensor; anything else as it is."""
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self._nodes:
            raise Untraceable("a tensor that is neither an argument nor made from one")
        return self._nodes[id(x)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        noted, named = tree_map(self.node, args), tree_map(self.node, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            raise Untraceable(f"{func} gives no tensor")
        if func._schema.is_mutable:  # in place: from now on the tensor is what the operation gives
            if result is not args[0] or self._is_shared(result):
                raise Untraceable(f"{func} changes a tensor that is seen elsewhere")
            func = getattr(getattr(torch.ops.aten, func._opname.removesuffix("_")), func._overloadname)
        self._note(self.graph.call_function(func, noted, named), result)
        return result

    def _is_shared(self, tensor: Tensor) -> bool:
        """Whether it is an input, or another tensor lies in the same memory."""
        there = self._in_place[tensor.untyped_storage().data_ptr()]
        return self._nodes[id(tensor)].op == "placeholder" or bool(there - {id(tensor)})


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Graph:
    """The graph of `function`: a placeholder per input, its results in the output node.

    Raises:
        Untraceable: it looks at values, or changes what it should not.
    """
    recorder = _Recorder(inputs)
    with torch.no_grad(), recorder:
        results = function(*inputs)
    recorder.graph.output([recorder.node(t) for t in results])
    return recorder.graph
