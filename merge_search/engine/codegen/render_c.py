"""An element-wise function as one C loop: traced, written out operation by operation, compiled by the system's compiler.

For CPUs, where it does what a general compiler of graphs leaves undone: comparisons stay bit masks, positions are counted
instead of made, and a loop compiles in a fraction of a second. Every operation rounds as torch's does (no contraction, no
reordering), so that a loop gives the bits of the same function run step by step.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from merge_search.engine.codegen.compiler import CompilerError, library
from merge_search.engine.codegen.loop_template import C_TYPES as _C
from merge_search.engine.codegen.loop_template import CONVERSIONS, PART, SHORT, STORED, Array, Body, program
from merge_search.engine.codegen.trace import Untraceable, trace

__all__ = ["CONVERSIONS", "Loop", "Unsupported", "compile_loop", "is_traced"]

_TRACED: ContextVar[bool] = ContextVar("merge_search_traced", default=False)

log = logging.getLogger(__name__)


class Unsupported(Exception):
    """A function holds an operation that is not written out here, or no compiler took it."""


def is_traced() -> bool:
    """Whether the operations that run now are being recorded for a compiler, which likes other forms than torch does."""
    return torch.compiler.is_compiling() or _TRACED.get()


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    token = _TRACED.set(True)
    try:
        yield
    finally:
        _TRACED.reset(token)


# ------------------------------------------------------------------------------------------------ the language

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^",
    "__rshift__": ">>", "__lshift__": "<<", "__and__": "&", "__or__": "|", "__xor__": "^",
    "bitwise_right_shift": ">>", "bitwise_left_shift": "<<", "logical_and": "&", "logical_or": "|",
}  # fmt: skip
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_SAME = {"view", "_unsafe_view", "reshape", "expand", "clone", "alias", "detach", "lift_fresh_copy", "squeeze", "unsqueeze"}  # fmt: skip
_FILLED = {"full": 1, "full_like": 1, "scalar_tensor": 0}


def _literal(value: float | int | bool, dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        value = float(torch.tensor(value, dtype=dtype))
        if math.isnan(value):
            raise Unsupported("a constant that is not a number")
        if math.isinf(value):
            return "__builtin_inff()" if value > 0 else "(-__builtin_inff())"
        return f"({_C[dtype]})({value.hex()})"
    return f"(({_C[dtype]})({int(value)}))"


class _Writer:
    """Writes the body of the loop, a line per node."""

    def __init__(self, loads: dict[str, str]) -> None:
        self.names = loads
        self.lines: list[str] = []
        self.sums: list[str] = []

    def value(self, argument: Any, dtype: torch.dtype) -> str:
        """An argument as a C expression of `dtype`."""
        if not isinstance(argument, Node):
            return _literal(argument, dtype)
        name, own = self.names[argument.name], argument.meta["val"].dtype
        if own == dtype or (own in SHORT and dtype == torch.float32):
            return name
        if dtype == torch.bool:
            return f"({name} != 0)"
        return f"({name} ? ({_C[dtype]})1 : ({_C[dtype]})0)" if own == torch.bool else f"(({_C[dtype]}){name})"

    def write(self, node: Node) -> None:
        target = node.target
        name = getattr(target, "_opname", None) or str(target).split(".")[1]
        if not isinstance(node.meta["val"], Tensor):
            raise Unsupported(str(target))
        dtype = node.meta["val"].dtype
        expression = self.expression(name, node, dtype)
        if expression is None:
            return
        if dtype not in _C:
            raise Unsupported(f"{target} in {dtype}")
        self.names[node.name] = f"v{len(self.lines)}"
        self.lines.append(f"const {_C[dtype]} {self.names[node.name]} = {expression};")

    def expression(self, name: str, node: Node, dtype: torch.dtype) -> str | None:
        """C for one node; None where it needs no line of its own."""
        arguments = node.args
        if name == "view" and isinstance(arguments[1], torch.dtype):
            own = _node(arguments[0]).meta["val"].dtype
            cast = {(torch.float32, torch.int32): "as_int", (torch.int32, torch.float32): "as_float"}.get((own, dtype))
            if cast is None:
                raise Unsupported(f"the bits of {own} as {dtype}")
            return f"{cast}({self.value(arguments[0], own)})"
        if name in _SAME:
            self.names[node.name] = self.names[_node(arguments[0]).name]
            return None
        if name == "sum":
            if node.kwargs.get("dtype") != torch.float64:
                raise Unsupported("a sum that is not float64")
            self.names[node.name] = f"sum{len(self.sums)}"
            self.sums.append(self.value(arguments[0], torch.float32))
            return None
        if name == "select":
            return f"{self.names[_node(arguments[0]).name]}[{arguments[2]}]"
        if name == "arange":
            if len(arguments) != 1 or dtype != torch.int32:
                raise Unsupported("a range that does not count elements")
            return "at"
        if name in _FILLED:
            return _literal(arguments[_FILLED[name]], dtype)  # type: ignore[arg-type]
        if name in ("ones_like", "zeros_like", "ones", "zeros"):
            return _literal(name.startswith("ones"), dtype)
        return self.arithmetic(name, node, dtype)

    def arithmetic(self, name: str, node: Node, dtype: torch.dtype) -> str:
        arguments = node.args
        if name in _INFIX:
            if node.kwargs.get("alpha", 1) != 1 or "rounding_mode" in node.kwargs:
                raise Unsupported(f"{node.target} with options")
            return f"{self.value(arguments[0], dtype)} {_INFIX[name]} {self.value(arguments[1], dtype)}"
        if name == "rsub":
            return f"{self.value(arguments[1], dtype)} - {self.value(arguments[0], dtype)}"
        if name in _COMPARE:
            common = _common(arguments[:2])
            return f"{self.value(arguments[0], common)} {_COMPARE[name]} {self.value(arguments[1], common)}"
        if name == "where":
            yes, no = self.value(arguments[1], dtype), self.value(arguments[2], dtype)
            return f"{self.value(arguments[0], torch.bool)} ? {yes} : {no}"
        x = self.value(arguments[0], dtype)
        if name in ("_to_copy", "convert_element_type", "to", "lift_fresh"):
            return x
        if name in ("bitwise_not", "logical_not"):
            return f"!{x}" if dtype == torch.bool else f"~{x}"
        if name == "neg":
            return f"-{x}"
        if name == "reciprocal" and dtype == torch.float32:
            return f"{_literal(1, dtype)} / {x}"
        if name == "abs":
            return f"__builtin_fabsf({x})" if dtype == torch.float32 else f"({x} < 0 ? -{x} : {x})"
        if name in ("sign", "sgn"):
            one, zero = _literal(1, dtype), _literal(0, dtype)
            return f"{x} > {zero} ? {one} : ({x} < {zero} ? -{one} : {x})"
        if name in ("maximum", "minimum"):
            y, sign = self.value(arguments[1], dtype), ">" if name == "maximum" else "<"
            return f"{x} {sign} {y} ? {x} : {y}"  # passes on a NaN of the second alone: with a test of both, compilers give up
        if name in ("clamp", "clamp_min", "clamp_max"):
            return self.clamp(name, node, dtype, x)
        raise Unsupported(str(node.target))

    def clamp(self, name: str, node: Node, dtype: torch.dtype, x: str) -> str:
        low, high = [*node.args[1:], None, None][:2]
        low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
        if name == "clamp_max":
            low, high = None, node.args[1]
        if low is not None:
            bound = self.value(low, dtype)
            x = f"({x} < {bound} ? {bound} : {x})"
        if high is not None:
            self.lines.append(f"const {_C[dtype]} c{len(self.lines)} = {x};")
            x, bound = f"c{len(self.lines) - 1}", self.value(high, dtype)
            x = f"({x} > {bound} ? {bound} : {x})"
        return x


def _node(argument: Any) -> Node:
    assert isinstance(argument, Node)
    return argument


def _common(arguments: Sequence[Any]) -> torch.dtype:
    values = [a.meta["val"] if isinstance(a, Node) else a for a in arguments]
    dtype = torch.result_type(values[0], values[1])
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


# ------------------------------------------------------------------------------------------------ the loop


class Loop:
    """A compiled loop.

    Args:
        source: C++ of `merge`; loaded: what it compiles to. sums: How many sums it makes.
    """

    def __init__(self, source: str, loaded: ctypes.CDLL, sums: int) -> None:
        self.source, self.sums = source, sums
        self._call = loaded.merge
        self._call.restype = None
        self._call.argtypes = [*[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 3, ctypes.c_int32, ctypes.c_void_p]

    def __call__(self, tensors: Sequence[Tensor], floats: Sequence[float], integers: Sequence[int], index: int) -> Tensor:  # fmt: skip
        """Run over all elements, by as many threads as torch has.

        Args:
            tensors: Flat, contiguous, equally long, of the dtypes that the loop was made for.
            index: Position of the first element; wraps at 2**32.
        Returns:
            The sums, float64; the same whatever the number of threads.
        """
        n = tensors[0].numel()
        pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        f, i = (ctypes.c_float * len(floats))(*floats), (ctypes.c_int32 * len(integers))(*integers)
        parts = -(-n // PART)
        found = torch.zeros(parts, self.sums, dtype=torch.float64) if self.sums else _NO_SUMS
        place, first = found.data_ptr(), (index + 2**31) % 2**32 - 2**31

        def run(begin: int, end: int) -> None:
            self._call(begin, end, n, pointers, f, i, first, place)

        threads = min(torch.get_num_threads(), parts)
        if threads <= 1:
            run(0, parts)
        else:
            edges = [parts * t // threads for t in range(threads + 1)]
            list(_pool(threads).map(run, edges[:-1], edges[1:]))
        return found.sum(0)


_NO_SUMS = torch.zeros(1, 0, dtype=torch.float64)
_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    key = (os.getpid(), threads)  # a forked process has none of its parent's threads
    if key not in _POOLS:
        _POOLS[key] = ThreadPoolExecutor(threads, thread_name_prefix="merge")
    return _POOLS[key]


def compile_loop(
    function: Callable[..., Sequence[Tensor]], dtypes: Sequence[torch.dtype], out: torch.dtype | None, floats: int, integers: int
) -> Loop:  # fmt: skip
    """One loop that does what `function` does.

    Args:
        function: (tensors, floats, integers, index) -> tensors to store, or, if `out` is None, sums.
            Element-wise; `floats` and `integers` are one-dimensional tensors, `index` is 0-d.
        dtypes: Of the tensors that are read. out: Of those written, the first that the loop is called with; float32 if
            they are several.
    Raises:
        Unsupported: an operation has no C form here, or the compiler failed.
    """
    source, sums = _source(function, dtypes, out, floats, integers)
    try:
        return Loop(source, library(source), sums)
    except CompilerError as error:
        raise Unsupported(str(error)) from error


def _source(
    function: Callable[..., Sequence[Tensor]], dtypes: Sequence[torch.dtype], out: torch.dtype | None, floats: int, integers: int
) -> tuple[str, int]:  # fmt: skip
    examples = [torch.ones(7, dtype=dtype) for dtype in dtypes]
    numbers = (torch.ones(floats), torch.ones(integers, dtype=torch.int32), torch.zeros((), dtype=torch.int32))

    def flat(*values: Tensor) -> Sequence[Tensor]:
        return function(list(values[: len(dtypes)]), *values[len(dtypes) :])

    try:
        with _tracing():
            graph = trace(flat, [*examples, *numbers])
    except Untraceable as error:
        raise Unsupported(str(error)) from error
    graph.eliminate_dead_code()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if unknown := {*dtypes, *([out] if out else [])} - set(STORED):
        raise Unsupported(f"tensors of {unknown.pop()}")
    reads = [Array(f"p{place}", dtype) for place, dtype in enumerate(dtypes)]
    names = [*(f"x_{array.name}" for array in reads), "f", "k", "index"]
    writer = _Writer(dict(zip((node.name for node in inputs), names, strict=True)))
    for node in graph.nodes:
        if node.op == "call_function":
            writer.write(node)
    results: Any
    (results,) = (node.args[0] for node in graph.nodes if node.op == "output")
    stored = [writer.value(result, torch.float32) for result in results] if out else []
    if len(stored) > 1 and out != torch.float32:
        raise Unsupported(f"several results in {out}")
    outs = [Array("out" if len(stored) == 1 else f"out{place}", out) for place in range(len(stored)) if out]
    return program(Body(writer.lines, stored, writer.sums), reads, outs, floats, integers), len(writer.sums)
