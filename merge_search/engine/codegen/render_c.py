"""C++ for a traced element-wise function: one table entry an operation, one line of C++ a node.

Every operation rounds as torch's does, without contraction or reordering, so that the loop gives the bits of the same
function run step by step. Comparisons stay bit masks, and positions are counted instead of stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from merge_search.engine.codegen.dtypes import C_TYPES
from merge_search.engine.codegen.loop_template import Array, Body

__all__ = ["Unsupported", "render"]


class Unsupported(Exception):
    """The function holds an operation that has no C++ form here, or no compiler took it."""


def render(graph: Graph, reads: Sequence[Array], out: torch.dtype | None) -> Body:
    """The body of a loop that does what `graph` does.

    Args:
        graph: Its inputs are `reads`, the float32 numbers, the int32 numbers and the index of the first element.
        reads: Tensors that the loop reads.
        out: Dtype that results are rounded to; None if the graph makes sums.

    Raises:
        Unsupported: An operation or a dtype has no C++ form.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    names = [*(f"x_{array.name}" for array in reads), "f", "k", "index"]
    writer = _Writer(dict(zip((node.name for node in inputs), names, strict=True)))
    for node in graph.nodes:
        if node.op == "call_function":
            writer.write(node)
    results: Any
    (results,) = (node.args[0] for node in graph.nodes if node.op == "output")
    stored = [writer.value(result, torch.float32) for result in results] if out else []
    return Body(writer.lines, stored, writer.sums)


class _Writer:
    """Writes the body, a line per node.

    Attributes:
        names: C++ expression of every node, by the node's name.
        lines: Statements so far.
        sums: Expressions to add up.
    """

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names
        self.lines: list[str] = []
        self.sums: list[str] = []

    def write(self, node: Node) -> None:
        """Add the lines of one node.

        Raises:
            Unsupported: It has no C++ form.
        """
        name = getattr(node.target, "_opname", None) or str(node.target).split(".")[1]
        if not isinstance(node.meta["val"], Tensor) or name not in _OPERATIONS:
            raise Unsupported(str(node.target))
        expression = _OPERATIONS[name](self, node)
        if expression is None:  # the node needs no line
            return
        dtype = _dtype(node)
        if dtype not in C_TYPES or C_TYPES[dtype].suffix:
            raise Unsupported(f"{node.target} in {dtype}")
        self.names[node.name] = self.line(dtype, expression)

    def line(self, dtype: torch.dtype, expression: str) -> str:
        """Write a constant; returns its name."""
        name = f"v{len(self.lines)}"
        self.lines.append(f"const {C_TYPES[dtype].value} {name} = {expression};")
        return name

    def value(self, argument: Any, dtype: torch.dtype) -> str:
        """An argument as a C++ expression of `dtype`."""
        if dtype not in C_TYPES:
            raise Unsupported(f"numbers of {dtype}")
        if not isinstance(argument, Node):
            return _literal(argument, dtype)
        name, own = self.names[argument.name], _dtype(argument)
        if own == dtype or C_TYPES[own].value == C_TYPES[dtype].value:
            return name
        if dtype == torch.bool:
            return f"({name} != 0)"
        c_type = C_TYPES[dtype].value
        return f"({name} ? ({c_type})1 : ({c_type})0)" if own == torch.bool else f"(({c_type}){name})"


def _dtype(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _node(argument: Any) -> Node:
    assert isinstance(argument, Node)
    return argument


def _literal(value: float | int | bool, dtype: torch.dtype) -> str:
    c_type = C_TYPES[dtype].value
    if dtype.is_floating_point:
        value = float(torch.tensor(value, dtype=dtype))
        if math.isnan(value):
            raise Unsupported("a constant that is not a number")
        if math.isinf(value):
            return "__builtin_inff()" if value > 0 else "(-__builtin_inff())"
        return f"({c_type})({value.hex()})"
    return f"(({c_type})({int(value)}))"


# ------------------------------------------------------------------------------------------------ the operations

_Operation = Callable[[_Writer, Node], str | None]
"""C++ of a node; None if it needs no line of its own."""


def _infix(symbol: str) -> _Operation:
    def render(w: _Writer, node: Node) -> str:
        if node.kwargs.get("alpha", 1) != 1 or "rounding_mode" in node.kwargs:
            raise Unsupported(f"{node.target} with options")
        left, right = (w.value(argument, _dtype(node)) for argument in node.args[:2])
        return f"{left} {symbol} {right}"

    return render


def _compare(symbol: str) -> _Operation:
    def render(w: _Writer, node: Node) -> str:
        values = [a.meta["val"] if isinstance(a, Node) else a for a in node.args[:2]]
        common = torch.result_type(values[0], values[1])  # type: ignore[arg-type]
        left, right = (w.value(argument, common) for argument in node.args[:2])
        return f"{left} {symbol} {right}"

    return render


def _unary(form: Callable[[str], str], *, integer: Callable[[str], str] | None = None) -> _Operation:
    """An operation on one value; `integer`: its form for anything but float32, if that is another."""

    def render(w: _Writer, node: Node) -> str:
        x = w.value(node.args[0], _dtype(node))
        return (form if integer is None or _dtype(node) == torch.float32 else integer)(x)

    return render


def _same(w: _Writer, node: Node) -> None:
    """Another shape of the same values."""
    w.names[node.name] = w.names[_node(node.args[0]).name]


def _view(w: _Writer, node: Node) -> str | None:
    if not isinstance(node.args[1], torch.dtype):
        _same(w, node)
        return None
    own = _dtype(_node(node.args[0]))
    casts = {(torch.float32, torch.int32): "as_int", (torch.int32, torch.float32): "as_float"}
    if (own, _dtype(node)) not in casts:
        raise Unsupported(f"the bits of {own} as {_dtype(node)}")
    return f"{casts[own, _dtype(node)]}({w.value(node.args[0], own)})"


def _sum(w: _Writer, node: Node) -> None:
    if node.kwargs.get("dtype") != torch.float64:
        raise Unsupported("a sum that is not float64")
    w.names[node.name] = f"sum{len(w.sums)}"
    w.sums.append(w.value(node.args[0], torch.float32))


def _select(w: _Writer, node: Node) -> str:
    return f"{w.names[_node(node.args[0]).name]}[{node.args[2]}]"


def _arange(w: _Writer, node: Node) -> str:
    if len(node.args) != 1 or _dtype(node) != torch.int32:
        raise Unsupported("a range that does not count elements")
    return "at"


def _filled(place: int) -> _Operation:
    return lambda w, node: _literal(node.args[place], _dtype(node))  # type: ignore[arg-type]


def _constant(value: float) -> _Operation:
    return lambda w, node: _literal(value, _dtype(node))


def _rsub(w: _Writer, node: Node) -> str:
    return f"{w.value(node.args[1], _dtype(node))} - {w.value(node.args[0], _dtype(node))}"


def _where(w: _Writer, node: Node) -> str:
    yes, no = (w.value(argument, _dtype(node)) for argument in node.args[1:3])
    return f"{w.value(node.args[0], torch.bool)} ? {yes} : {no}"


def _not(w: _Writer, node: Node) -> str:
    return f"{'!' if _dtype(node) == torch.bool else '~'}{w.value(node.args[0], _dtype(node))}"


def _reciprocal(w: _Writer, node: Node) -> str:
    if _dtype(node) != torch.float32:
        raise Unsupported(f"{node.target} in {_dtype(node)}")
    return f"{_literal(1, torch.float32)} / {w.value(node.args[0], torch.float32)}"


def _sign(w: _Writer, node: Node) -> str:
    dtype = _dtype(node)
    x, one, zero = w.value(node.args[0], dtype), _literal(1, dtype), _literal(0, dtype)
    return f"{x} > {zero} ? {one} : ({x} < {zero} ? -{one} : {x})"


def _extreme(symbol: str) -> _Operation:
    """The larger or smaller of two. Only a NaN of the second is passed on: a test of both stays scalar."""

    def render(w: _Writer, node: Node) -> str:
        x, y = (w.value(argument, _dtype(node)) for argument in node.args[:2])
        return f"{x} {symbol} {y} ? {x} : {y}"

    return render


def _clamp(w: _Writer, node: Node) -> str:
    low, high = [*node.args[1:], None, None][:2]
    return _clamped(w, node, node.kwargs.get("min", low), node.kwargs.get("max", high))


def _clamp_max(w: _Writer, node: Node) -> str:
    return _clamped(w, node, None, node.args[1])


def _clamped(w: _Writer, node: Node, low: Any, high: Any) -> str:
    dtype = _dtype(node)
    x = w.value(node.args[0], dtype)
    if low is not None:
        bound = w.value(low, dtype)
        x = f"({x} < {bound} ? {bound} : {x})"
    if high is not None:
        x, bound = w.line(dtype, x), w.value(high, dtype)
        x = f"({x} > {bound} ? {bound} : {x})"
    return x


_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^",
    "__rshift__": ">>", "__lshift__": "<<", "__and__": "&", "__or__": "|", "__xor__": "^",
    "bitwise_right_shift": ">>", "bitwise_left_shift": "<<", "logical_and": "&", "logical_or": "|",
}  # fmt: skip
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_SAME = ("_unsafe_view", "reshape", "expand", "clone", "alias", "detach", "lift_fresh_copy", "squeeze", "unsqueeze")
_CASTS = ("_to_copy", "convert_element_type", "to", "lift_fresh")

_OPERATIONS: dict[str, _Operation] = {
    **{name: _infix(symbol) for name, symbol in _INFIX.items()},
    **{name: _compare(symbol) for name, symbol in _COMPARE.items()},
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_CASTS, _unary(lambda x: x)),
    "view": _view,
    "select": _select,
    "arange": _arange,
    "full": _filled(1),
    "full_like": _filled(1),
    "scalar_tensor": _filled(0),
    **dict.fromkeys(("ones", "ones_like"), _constant(1)),
    **dict.fromkeys(("zeros", "zeros_like"), _constant(0)),
    "sum": _sum,
    "rsub": _rsub,
    "where": _where,
    **dict.fromkeys(("bitwise_not", "logical_not"), _not),
    "neg": _unary(lambda x: f"-{x}"),
    "abs": _unary(lambda x: f"__builtin_fabsf({x})", integer=lambda x: f"({x} < 0 ? -{x} : {x})"),
    "reciprocal": _reciprocal,
    **dict.fromkeys(("sign", "sgn"), _sign),
    "maximum": _extreme(">"),
    "minimum": _extreme("<"),
    **dict.fromkeys(("clamp", "clamp_min"), _clamp),
    "clamp_max": _clamp_max,
}
"""Every operation that has a C++ form, by torch's name."""
