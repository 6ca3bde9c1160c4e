"""Runs a pass over flattened tensors: in chunks that fit the cache, or as one compiled loop per structure.

Chunks give the bits of `reference`, five times faster than whole tensors. Compilation fuses load, subtract, mask,
scale, elect, mix, add and cast into one loop. It serves every length and every candidate, because all numbers are
inputs. On a CPU the loop is C++ (`codegen`) and gives the same bits, whatever the number of threads. torch.compile
makes the loops of a GPU, and on a CPU those of passes that have no C++ form (coefficients per output row). It may
contract a multiplication and an addition into one rounding.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from merge_search._compat.torch import Graph, compile_apart, mark_lengths_dynamic
from merge_search.engine.codegen.compiler import CompilerError, library
from merge_search.engine.codegen.kernel import Loop, Unsupported, compile_kernel
from merge_search.engine.contracts import Given, Numbers, Pass, Structure
from merge_search.engine.execute.sums import survivor_sum_list, survivor_sums, votes
from merge_search.engine.kernels.numerics import is_finite
from merge_search.engine.kernels.random_bits import wrapped
from merge_search.engine.methods import stages
from merge_search.engine.methods.assess import load
from merge_search.engine.methods.primitives import EAGER
from merge_search.engine.methods.traced_primitives import TRACED

__all__ = ["CHUNK", "WHOLE", "LoopRunner", "Runner", "has_compiler", "scalars", "sweep"]

CHUNK = 2**18
WHOLE = frozenset({"rows"})
"""Given tensors that are not one value per element."""

_INTEGERS = frozenset({"stride", "cut", "cut2", "key1", "key2", "limit", "gate", "start", "columns"})
_GRAPH_FROM = 2**14  # elements: the call of a graph costs more than a pass over a shorter tensor
_LOOP_FROM = 2**8  # the same for a loop
_NEW_LOOP_FROM = 2**14  # the same for a loop that may have to be compiled first, of a merge that runs once
_VOTES = "votes"
_SCORES = "scores"

log = logging.getLogger(__name__)
Layout = tuple[tuple[str, int], ...]


def has_compiler(device: torch.device) -> bool:
    """Whether passes can be compiled here. On a CPU this needs the system's C++ compiler, even if its cache is warm."""
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
    first = torch.tensor(wrapped(p.index), dtype=torch.int32, device=device)
    for start in range(0, base.numel(), CHUNK):
        part = slice(start, min(start + CHUNK, base.numel()))
        given = {k: list(v) if k in WHOLE else [t[part] for t in v] for k, v in p.given.items()}
        yield part, base[part].to(device), [e[part].to(device) for e in experts], given, first + start


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
        return self.compile and x.numel() >= (_LOOP_FROM if self.device.type == "cpu" else _GRAPH_FROM)

    def _run_chunks(self, p: Pass, base: Tensor, experts: Sequence[Tensor], out: Tensor) -> None:
        n = scalars(p.numbers, self.device)
        for part, b, e, given, index in sweep(p, base, experts, self.device):
            out[part] = stages.merge(p.structure, b, e, given, n, index, EAGER)

    def scores(
        self, p: Pass, base: Tensor, experts: Sequence[Tensor], form: str = ""
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """(position, `stages.assessed`, new and float32) of chunk after chunk."""
        size, wanted = CHUNK * torch.get_num_threads(), (_SCORES, form)
        has_loop = self._is_long(base) and self.device.type == "cpu"
        if has_loop:
            tensors = [*[torch.empty(0)] * len(p.experts), base, *experts, *self._given(p)]
            has_loop = self._loop(p, wanted, tensors) is not None
        if not has_loop:
            n = scalars(p.numbers, self.device)
            for part, b, e, given, index in sweep(p, base, experts, self.device):
                yield part.start, stages.assessed(p.structure, b, e, given, n, index, form, EAGER)
            return
        for start in range(0, base.numel(), size):
            part = slice(start, start + size)
            piece = replace(p, given={k: [t[part] for t in v] for k, v in p.given.items()})
            made = [torch.empty(base[part].numel()) for _ in p.experts]
            self._call(piece, [*made, base[part], *(e[part] for e in experts)], wanted)
            yield start, made

    def sums(self, p: Pass, base: Tensor, experts: Sequence[Tensor], wanted: tuple[str, ...]) -> Tensor:
        """`sums.survivor_sums` of a whole tensor: shape (len(wanted), experts), float64, on the CPU."""
        if self._is_long(base):
            return self._call(p, [t.to(self.device) for t in (base, *experts)], wanted).cpu()
        n = scalars(p.numbers, self.device)
        total = torch.zeros(len(wanted), len(p.experts), dtype=torch.float64, device=self.device)
        for _, b, e, given, index in sweep(p, base, experts, self.device):
            total += survivor_sums(p.structure, b, e, given, n, index, wanted, EAGER)
        return total.cpu()

    def votes(self, p: Pass, base: Tensor, experts: Sequence[Tensor], where: Tensor) -> float:
        """`sums.votes` of a few entries, at the positions `where`."""
        if self.compile and self.device.type == "cpu":
            return float(self._call(p, [base, *experts, where], (_VOTES,)))
        n = scalars(p.numbers, self.device)
        return float(votes(p.structure, base, experts, p.given, n, where, EAGER))

    def _key(self, p: Pass, wanted: tuple[str, ...], tensors: Sequence[Tensor]) -> tuple[Layout, Hashable]:
        """Names of the given tensors, and what loops and graphs are kept by; `tensors` with the given ones."""
        names = tuple((name, len(values)) for name, values in sorted(p.given.items()))
        numbers = tuple((k, len(v)) for k, v in sorted(p.numbers.items()))
        return names, (p.structure, numbers, names, wanted, tuple(t.dtype for t in tensors))

    def _given(self, p: Pass) -> list[Tensor]:
        return [t.to(self.device) for _, values in sorted(p.given.items()) for t in values]

    def _loop(self, p: Pass, wanted: tuple[str, ...], tensors: Sequence[Tensor]) -> Loop | None:
        """The C++ loop of a pass on a CPU; None where it has none."""
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

    def _call_graph(
        self,
        p: Pass,
        key: Hashable,
        tensors: list[Tensor],
        given: list[Tensor],
        names: Layout,
        wanted: tuple[str, ...],
    ) -> Tensor:
        layout, floats, integers = _pack(p.numbers, self.device)
        if key not in self._graphs:
            self._graphs[key] = _graph(p.structure, layout, names, wanted)
        index = torch.tensor(wrapped(p.index), dtype=torch.int32, device=self.device)
        mark_lengths_dynamic(tensors + given)
        with warnings.catch_warnings():  # the compiler warns of the mix; results are the same
            warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")
            return self._graphs[key](tensors, given, floats, integers, index)


def _unpacked(
    layout: Layout, names: Layout, given: Sequence[Tensor], floats: Tensor, integers: Tensor
) -> tuple[Given, dict[str, list[Tensor]]]:
    """Given tensors and numbers by name."""
    named, start = {}, 0
    for name, count in names:
        named[name], start = list(given[start : start + count]), start + count
    return named, _unpack(layout, floats, integers)


def _load_measures(s: Structure) -> None:
    for source in (s.assess, s.mixing):
        if source.kind == "cheap":
            load(source.measure)


def _pass(
    s: Structure,
    wanted: tuple[str, ...],
    tensors: Sequence[Tensor],
    given: Given,
    n: dict[str, list[Tensor]],
    index: Tensor,
) -> list[Tensor]:
    """The function that is compiled for a pass: its result, or the scores or sums that are `wanted`."""
    base, experts = tensors[0], tensors[1 : 1 + s.experts]
    if wanted == (_VOTES,):
        return [votes(s, base, experts, given, n, tensors[1 + s.experts], TRACED)]
    if wanted[:1] == (_SCORES,):
        return stages.assessed(s, base, experts, given, n, index, wanted[1], TRACED)
    if wanted:
        return survivor_sum_list(s, base, experts, given, n, index, wanted, TRACED)
    return [stages.merge(s, base, experts, given, n, index, TRACED)]


def _loop(p: Pass, names: Layout, wanted: tuple[str, ...], dtypes: list[torch.dtype]) -> Loop | None:
    """The C++ loop of a pass; None where it has none."""
    s, layout = p.structure, tuple((name, len(values)) for name, values in sorted(p.numbers.items()))
    _load_measures(s)
    floats, integers = _numbers(p.numbers)
    written = s.experts if wanted[:1] == (_SCORES,) else 0 if wanted else 1
    reads, n_given = dtypes[written:], sum(count for _, count in names)

    def body(tensors: Sequence[Tensor], f: Tensor, i: Tensor, index: Tensor) -> Sequence[Tensor]:
        given, n = _unpacked(layout, names, tensors[len(tensors) - n_given :], f, i)
        return _pass(s, wanted, tensors, given, n, index)

    try:
        return compile_kernel(body, reads, dtypes[0] if written else None, len(floats), len(integers))
    except Unsupported as error:
        log.info("no C++ loop for %s, torch.compile makes one: %s", s, error)
        return None


def _graph(s: Structure, layout: Layout, names: Layout, wanted: tuple[str, ...]) -> Graph:
    _load_measures(s)

    def run(tensors: list[Tensor], given: list[Tensor], floats: Tensor, integers: Tensor, index: Tensor) -> Tensor:
        named, n = _unpacked(layout, names, given, floats, integers)
        if wanted == (_VOTES,):
            return votes(s, tensors[0], tensors[1:-1], named, n, tensors[-1], TRACED)
        if wanted:
            return survivor_sums(s, tensors[0], tensors[1:], named, n, index, wanted, TRACED)
        tensors[0].copy_(stages.merge(s, tensors[1], tensors[2:], named, n, index, TRACED))
        return index

    return compile_apart(run, f"merge_{abs(hash((s, layout, names, wanted))):x}")


class _NoLoopError(Exception):
    """A pass that has no C++ form, or no compiler."""


class _Loops(Runner):
    """A `Runner` that makes C++ loops, and no graphs. Safe to use from several threads."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), compile=True)
        self._ready: set[object] = set()
        self._lock = threading.Lock()

    def run(self, p: Pass, base: Tensor, experts: Sequence[Tensor], out: Tensor) -> bool:
        key = (p.structure, out.dtype)
        if key in self._ready:
            return super().run(p, base, experts, out)
        with self._lock:  # one thread traces and compiles
            finite = super().run(p, base, experts, out)
        self._ready.add(key)
        return finite

    def _call_graph(self, *_: object) -> Tensor:
        raise _NoLoopError


class LoopRunner(Runner):
    """A `Runner` on the CPU that compiles C++ loops for passes over long tensors and runs all else in chunks.

    The bits are those of chunks. The first loop of a structure takes half a second, and less if it was compiled before.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), compile=False)
        self._compiled = _Loops()

    def run(self, p: Pass, base: Tensor, experts: Sequence[Tensor], out: Tensor) -> bool:
        if base.numel() >= _NEW_LOOP_FROM:
            try:
                return self._compiled.run(p, base, experts, out)
            except _NoLoopError:
                pass
        return super().run(p, base, experts, out)
