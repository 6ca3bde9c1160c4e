"""Runs a pass over flattened tensors: in chunks that fit the cache, or as one compiled graph per structure.

Chunks give the bits of `reference`, five times faster than whole tensors. Compiled, load, subtract, mask, scale, elect,
mix, add and cast become one loop, and one graph serves every length and every candidate: all numbers are inputs.
It gives the same bits on CPUs except where a rule contains exp, log or tanh (PCB, CKI, softmax: last-bit differences
before the cast); a GPU may contract a multiplication and an addition into one rounding.
"""

from __future__ import annotations

import logging
import math
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from merge_search.engine import stages
from merge_search.engine.assess import load
from merge_search.engine.pipeline import Given, Numbers, Pass, Structure

__all__ = ["CHUNK", "WHOLE", "Runner", "has_compiler", "is_finite", "scalars", "sweep"]

CHUNK = 2**18
_COMPILE_FROM = 2**14  # shorter tensors: a call costs more than the pass
_INTEGERS = frozenset({"stride", "cut", "cut2", "key1", "key2", "limit", "gate", "start", "columns"})
WHOLE = frozenset({"rows"})  # given tensors that are not one value per element

log = logging.getLogger(__name__)
Layout = tuple[tuple[str, int], ...]
Graph = Callable[..., None]


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can work here; on a CPU it needs g++ at run time even if its cache is warm."""
    if device.type == "cuda":
        return True
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # what it raises changes between versions; all of it means no compiler
        log.info("no C++ compiler, merging in chunks: %s", error)
        return False
    return True


def scalars(numbers: Numbers, device: torch.device) -> dict[str, list[Tensor]]:
    """Numbers as 0-d tensors, int32 or float32."""
    layout, floats, integers = _pack(numbers, device)
    return _unpack(layout, floats, integers)


def _pack(numbers: Numbers, device: torch.device) -> tuple[Layout, Tensor, Tensor]:
    layout = tuple((name, len(values)) for name, values in sorted(numbers.items()))
    floats = [v for name, _ in layout if name not in _INTEGERS for v in numbers[name]]
    integers = [v for name, _ in layout if name in _INTEGERS for v in numbers[name]]
    return (
        layout,
        torch.tensor(floats, dtype=torch.float32, device=device),
        torch.tensor(integers, dtype=torch.int32, device=device),
    )


def _unpack(layout: Layout, floats: Tensor, integers: Tensor) -> dict[str, list[Tensor]]:
    result: dict[str, list[Tensor]] = {}
    f = i = 0
    for name, count in layout:
        if name in _INTEGERS:
            result[name], i = [integers[i + j] for j in range(count)], i + count
        else:
            result[name], f = [floats[f + j] for j in range(count)], f + count
    return result


Chunk = tuple[slice, Tensor, list[Tensor], dict[str, list[Tensor]], Tensor]


def sweep(p: Pass, base: Tensor, experts: Sequence[Tensor], device: torch.device) -> Iterator[Chunk]:
    """(where, base, experts, given, index of the first element) of every chunk, on `device`."""
    first = torch.tensor((p.index + 2**31) % 2**32 - 2**31, dtype=torch.int32, device=device)
    for start in range(0, base.numel(), CHUNK):
        part = slice(start, min(start + CHUNK, base.numel()))
        given = {k: list(v) if k in WHOLE else [t[part] for t in v] for k, v in p.given.items()}
        yield part, base[part].to(device), [e[part].to(device) for e in experts], given, first + start


def is_finite(x: Tensor) -> bool:
    """Whether there is no NaN and no infinity; one read of memory, where `torch.isfinite` makes three."""
    if not x.numel():
        return True
    low, high = torch.aminmax(x)
    return math.isfinite(float(low)) and math.isfinite(float(high))


class Runner:
    """Runs passes; keeps the compiled graphs.

    Args:
        device: Where arithmetic happens.
        compile: Use torch.compile for tensors long enough to repay it.
    """

    def __init__(self, device: torch.device, *, compile: bool) -> None:
        self.device = device
        self.compile = compile
        self._graphs: dict[Any, Graph] = {}

    def run(self, p: Pass, base: Tensor, experts: Sequence[Tensor], out: Tensor) -> bool:
        """Write the merged elements into `out`.

        Args:
            base, experts: Flat, any floating dtype, read only.
            out: Flat, contiguous, the same length; its dtype is what the result is rounded to.
        Returns:
            Whether all of `out` is finite.
        """
        if self.compile and base.numel() >= _COMPILE_FROM:
            self._run_compiled(p, base, experts, out)
        else:
            self._run_chunks(p, base, experts, out)
        return p.bound < torch.finfo(out.dtype).max or is_finite(out)

    def _run_chunks(self, p: Pass, base: Tensor, experts: Sequence[Tensor], out: Tensor) -> None:
        n = scalars(p.numbers, self.device)
        for part, b, e, given, index in sweep(p, base, experts, self.device):
            out[part] = stages.merge(p.structure, b, e, given, n, index)

    def _run_compiled(self, p: Pass, base: Tensor, experts: Sequence[Tensor], out: Tensor) -> None:
        layout, floats, integers = _pack(p.numbers, self.device)
        tensors = [t.to(self.device) for t in (base, *experts)]
        names = tuple((name, len(values)) for name, values in sorted(p.given.items()))
        given = [t.to(self.device) for name, _ in names for t in p.given[name]]
        key = (p.structure, layout, names, out.dtype, tuple(t.dtype for t in tensors + given))
        if key not in self._graphs:
            self._graphs[key] = _graph(p.structure, layout, names)
        index = torch.tensor((p.index + 2**31) % 2**32 - 2**31, dtype=torch.int32, device=self.device)
        flats = [out, *tensors, *given]
        for t in flats:
            torch._dynamo.mark_dynamic(t, 0)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="bf16 and fp16 are mixed"
            )  # the compiler's; the result is the same
            self._graphs[key](flats, floats, integers, index)


def _graph(s: Structure, layout: Layout, names: Layout) -> Graph:
    for source in (s.assess, s.mixing):
        if source.kind == "cheap":
            load(source.measure)

    def run(flats: list[Tensor], floats: Tensor, integers: Tensor, index: Tensor) -> None:
        out, base, experts, rest = flats[0], flats[1], flats[2 : 2 + s.experts], flats[2 + s.experts :]
        given: Given = {}
        start = 0
        for name, count in names:
            given[name] = rest[start : start + count]
            start += count
        result = stages.merge(s, base, experts, given, _unpack(layout, floats, integers), index)
        out.copy_(result)

    # The compiler keeps its graphs, eight at most, by code object: each structure gets its own.
    own = types.FunctionType(
        run.__code__.replace(co_name=f"merge_{abs(hash((s, layout))):x}"), run.__globals__, "run", None, run.__closure__
    )
    graph: Graph = torch.compile(own, fullgraph=True)
    return graph
