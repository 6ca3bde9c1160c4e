"""Runs a pass over flattened tensors: in chunks that fit the cache, or as one compiled loop per structure.

Chunks give the bits of `reference`, five times faster than whole tensors. Compiled, load, subtract, mask, scale, elect,
mix, add and cast become one loop, and one loop serves every length and every candidate: all numbers are inputs.
On a CPU the loop is C (`native`) and gives the same bits, whatever the threads; torch.compile makes what `native` cannot
(coefficients per output row) and all that runs on a GPU, which may contract a multiplication and an addition into one
rounding.
"""

from __future__ import annotations

import logging
import math
import types
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from merge_search.engine.codegen.compiler import CompilerError, library
from merge_search.engine.codegen.render_c import Loop, Unsupported, compile_loop
from merge_search.engine.contracts import Given, Numbers, Pass, Structure
from merge_search.engine.execute.sums import survivor_sum_list, survivor_sums, votes
from merge_search.engine.methods import stages
from merge_search.engine.methods.assess import load

__all__ = ["CHUNK", "WHOLE", "Runner", "has_compiler", "is_finite", "scalars", "sweep"]

CHUNK = 2**18
_COMPILE_FROM = 2**14  # shorter tensors: a call costs more than the pass
_INTEGERS = frozenset({"stride", "cut", "cut2", "key1", "key2", "limit", "gate", "start", "columns"})
_LOOP_FROM = 2**8
_VOTES = "votes"
_SCORES = "scores"
WHOLE = frozenset({"rows"})  # given tensors that are not one value per element

log = logging.getLogger(__name__)
Layout = tuple[tuple[str, int], ...]
Graph = Callable[..., Tensor]


def has_compiler(device: torch.device) -> bool:
    """Whether passes can be compiled here; on a CPU the system's C++ compiler must be there, even if its cache is warm."""
    if device.type == "cuda":
        return True
    try:
        library('extern "C" int merge_search_compiles() { return 1; }\n')
    except CompilerError as error:
        log.warning("merges run in chunks, many times slower than compiled; the same bits: %s", error)
        return False
    return True


def scalars(numbers: Numbers, device: torch.device) -> dict[str, list[Tensor]]:
    """Numbers as 0-d tensors, int32 or float32."""
    layout, floats, integers = _pack(numbers, device)
    return _unpack(layout, floats, integers)


def _pack(numbers: Numbers, device: torch.device) -> tuple[Layout, Tensor, Tensor]:
    layout = tuple((name, len(values)) for name, values in sorted(numbers.items()))
    floats, integers = _numbers(numbers)
    return (
        layout,
        torch.tensor(floats, dtype=torch.float32, device=device),
        torch.tensor(integers, dtype=torch.int32, device=device),
    )


def _numbers(numbers: Numbers) -> tuple[list[float], list[int]]:
    """All float32 numbers and all int32 numbers, by name."""
    names = sorted(numbers)
    floats = [float(v) for name in names if name not in _INTEGERS for v in numbers[name]]
    return floats, [int(v) for name in names if name in _INTEGERS for v in numbers[name]]


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
        compile: Compile passes over tensors long enough to repay it.
    """

    def __init__(self, device: torch.device, *, compile: bool) -> None:
        self.device = device
        self.compile = compile
        self._graphs: dict[Hashable, Graph] = {}
        self._loops: dict[Hashable, Loop | None] = {}

    def run(self, p: Pass, base: Tensor, experts: Sequence[Tensor], out: Tensor) -> bool:
        """Write the merged elements into `out`.

        Args:
            base, experts: Flat, any floating dtype, read only.
            out: Flat, contiguous, the same length; its dtype is what the result is rounded to.
        Returns:
            Whether all of `out` is finite.
        """
        if self._is_long(base) and not p.structure.outside.measure:
            self._call(p, [out, *(t.to(self.device) for t in (base, *experts))], ())
        else:
            self._run_chunks(p, base, experts, out)
        return p.bound < torch.finfo(out.dtype).max or is_finite(out)

    def _is_long(self, x: Tensor) -> bool:
        return self.compile and x.numel() >= (_LOOP_FROM if self.device.type == "cpu" else _COMPILE_FROM)

    def _run_chunks(self, p: Pass, base: Tensor, experts: Sequence[Tensor], out: Tensor) -> None:
        n = scalars(p.numbers, self.device)
        for part, b, e, given, index in sweep(p, base, experts, self.device):
            out[part] = stages.merge(p.structure, b, e, given, n, index)

    def scores(self, p: Pass, base: Tensor, experts: Sequence[Tensor], form: str = "") -> Iterator[tuple[int, list[Tensor]]]:  # fmt: skip
        """(position, `stages.assessed`, new and float32) of chunk after chunk."""
        size, wanted = CHUNK * torch.get_num_threads(), (_SCORES, form)
        has_loop = self._is_long(base) and self.device.type == "cpu"
        if has_loop:
            tensors = [*[torch.empty(0)] * len(p.experts), base, *experts, *self._given(p)]
            has_loop = self._loop(p, wanted, tensors) is not None
        if not has_loop:
            n = scalars(p.numbers, self.device)
            for part, b, e, given, index in sweep(p, base, experts, self.device):
                yield part.start, stages.assessed(p.structure, b, e, given, n, index, form)
            return
        for start in range(0, base.numel(), size):
            part = slice(start, start + size)
            mine = replace(p, given={k: [t[part] for t in v] for k, v in p.given.items()})
            made = [torch.empty(base[part].numel()) for _ in p.experts]
            self._call(mine, [*made, base[part], *(e[part] for e in experts)], wanted)
            yield start, made

    def sums(self, p: Pass, base: Tensor, experts: Sequence[Tensor], wanted: tuple[str, ...]) -> Tensor:
        """`sums.survivor_sums` of a whole tensor: shape (len(wanted), experts), float64, on the CPU."""
        if self._is_long(base):
            return self._call(p, [t.to(self.device) for t in (base, *experts)], wanted).cpu()
        n = scalars(p.numbers, self.device)
        total = torch.zeros(len(wanted), len(p.experts), dtype=torch.float64, device=self.device)
        for _, b, e, given, index in sweep(p, base, experts, self.device):
            total += survivor_sums(p.structure, b, e, given, n, index, wanted)
        return total.cpu()

    def votes(self, p: Pass, base: Tensor, experts: Sequence[Tensor], where: Tensor) -> float:
        """`sums.votes` of a few entries, at the positions `where`."""
        if self.compile and self.device.type == "cpu":
            return float(self._call(p, [base, *experts, where], (_VOTES,)))
        return float(votes(p.structure, base, experts, p.given, scalars(p.numbers, self.device), where))

    def _key(self, p: Pass, wanted: tuple[str, ...], tensors: Sequence[Tensor]) -> tuple[Layout, Hashable]:
        """Names of the given tensors, and what loops and graphs are kept by; `tensors` with the given ones."""
        names = tuple((name, len(values)) for name, values in sorted(p.given.items()))
        numbers = tuple((k, len(v)) for k, v in sorted(p.numbers.items()))
        return names, (p.structure, numbers, names, wanted, tuple(t.dtype for t in tensors))

    def _given(self, p: Pass) -> list[Tensor]:
        return [t.to(self.device) for _, values in sorted(p.given.items()) for t in values]

    def _loop(self, p: Pass, wanted: tuple[str, ...], tensors: Sequence[Tensor]) -> Loop | None:
        """The C loop of a pass on a CPU; None where it has none."""
        names, key = self._key(p, wanted, tensors)
        if key not in self._loops:
            self._loops[key] = _loop(p, names, wanted, [t.dtype for t in tensors])
        return self._loops[key]

    def _call(self, p: Pass, tensors: list[Tensor], wanted: tuple[str, ...]) -> Tensor:
        """Run the loop or graph of a pass: sums if any are `wanted`, else a merge into the first tensor."""
        given = self._given(p)
        if self.device.type == "cpu" and (loop := self._loop(p, wanted, tensors + given)):
            floats, integers = _numbers(p.numbers)
            sums = loop(
                [t if t.is_contiguous() else t.contiguous() for t in tensors + given], floats, integers, p.index
            )
            return sums.reshape(len(wanted), -1) if loop.sums else sums
        names, key = self._key(p, wanted, tensors + given)
        return self._call_graph(p, key, tensors, given, names, wanted)

    def _call_graph(self, p: Pass, key: Hashable, tensors: list[Tensor], given: list[Tensor], names: Layout, wanted: tuple[str, ...]) -> Tensor:  # fmt: skip
        layout, floats, integers = _pack(p.numbers, self.device)
        if key not in self._graphs:
            self._graphs[key] = _graph(p.structure, layout, names, wanted)
        index = torch.tensor((p.index + 2**31) % 2**32 - 2**31, dtype=torch.int32, device=self.device)
        for t in tensors + given:
            if t.numel() > 1:
                torch._dynamo.mark_dynamic(t, 0)
        with warnings.catch_warnings():  # the compiler's; the result is the same
            warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")
            return self._graphs[key](tensors, given, floats, integers, index)


def _unpacked(layout: Layout, names: Layout, given: Sequence[Tensor], floats: Tensor, integers: Tensor) -> tuple[Given, dict[str, list[Tensor]]]:  # fmt: skip
    """Given tensors and numbers by name."""
    named, start = {}, 0
    for name, count in names:
        named[name], start = list(given[start : start + count]), start + count
    return named, _unpack(layout, floats, integers)


def _load_measures(s: Structure) -> None:
    for source in (s.assess, s.mixing):
        if source.kind == "cheap":
            load(source.measure)


def _loop(p: Pass, names: Layout, wanted: tuple[str, ...], dtypes: list[torch.dtype]) -> Loop | None:
    """The C loop of a pass; None where it has none."""
    s, layout = p.structure, tuple((name, len(values)) for name, values in sorted(p.numbers.items()))
    _load_measures(s)
    floats, integers = _numbers(p.numbers)
    written = s.experts if wanted[:1] == (_SCORES,) else 0 if wanted else 1
    reads, n_given = dtypes[written:], sum(count for _, count in names)

    def body(tensors: Sequence[Tensor], f: Tensor, i: Tensor, index: Tensor) -> Sequence[Tensor]:
        base, experts, given = tensors[0], tensors[1 : 1 + s.experts], tensors[len(tensors) - n_given :]
        named, n = _unpacked(layout, names, given, f, i)
        if wanted == (_VOTES,):
            return [votes(s, base, experts, named, n, tensors[1 + s.experts])]
        if wanted[:1] == (_SCORES,):
            return stages.assessed(s, base, experts, named, n, index, wanted[1])
        if wanted:
            return survivor_sum_list(s, base, experts, named, n, index, wanted)
        return [stages.merge(s, base, experts, named, n, index)]

    try:
        return compile_loop(body, reads, dtypes[0] if written else None, len(floats), len(integers))
    except Unsupported as error:
        log.info("no loop of one's own for %s, torch.compile makes one: %s", s, error)
        return None


def _graph(s: Structure, layout: Layout, names: Layout, wanted: tuple[str, ...]) -> Graph:
    _load_measures(s)

    def run(tensors: list[Tensor], given: list[Tensor], floats: Tensor, integers: Tensor, index: Tensor) -> Tensor:
        named, n = _unpacked(layout, names, given, floats, integers)
        if wanted == (_VOTES,):
            return votes(s, tensors[0], tensors[1:-1], named, n, tensors[-1])
        if wanted:
            return survivor_sums(s, tensors[0], tensors[1:], named, n, index, wanted)
        tensors[0].copy_(stages.merge(s, tensors[1], tensors[2:], named, n, index))
        return index

    # The compiler keeps its graphs, eight at most, by code object: each structure gets its own.
    label = f"merge_{abs(hash((s, layout, names, wanted))):x}"
    own = types.FunctionType(run.__code__.replace(co_name=label), run.__globals__, label, None, run.__closure__)
    graph: Graph = torch.compile(own, fullgraph=True)
    return graph
