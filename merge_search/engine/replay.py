"""A pass recorded once and replayed chunk after chunk in memory that is kept: the fast way without a compiler.

`stages` is written for clarity: every step makes a new tensor, and masks are booleans. On CPUs new memory costs ten times
the arithmetic, and booleans cost five times as much as numbers. So the operations of a pass are recorded on two
elements, and replayed with ``out=`` in a few buffers that stay in the processor's cache; masks become 0.0 and 1.0. Each
operation is the recorded one, rounded as before: the same bits. What cannot be replayed so (`_OPERATIONS` lists what can)
runs as it did.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from merge_search.engine import stages
from merge_search.engine.fused import WHOLE, Runner, has_compiler, scalars
from merge_search.engine.pipeline import Pass

__all__ = ["CHUNK", "Program", "ReplayRunner", "record"]

CHUNK = 2**16  # float32 buffers of 256 KiB: longer ones leave the cache, shorter ones wait for Python

Function = Callable[..., Any]
# Exactly rounded, so that an element's result does not depend on its place in a chunk; no exp, no log.
_OPERATIONS: dict[str, Function] = {
    "abs": torch.abs, "add": torch.add, "bitwise_and": torch.bitwise_and, "bitwise_xor": torch.bitwise_xor,
    "clamp": torch.clamp, "div": torch.div, "maximum": torch.maximum, "mul": torch.mul, "neg": torch.neg,
    "__rshift__": torch.bitwise_right_shift, "sign": torch.sign, "sub": torch.sub,
}  # fmt: skip
_COMPARISONS: dict[str, Function] = {"eq": torch.eq, "ge": torch.ge, "gt": torch.gt, "le": torch.le, "lt": torch.lt, "ne": torch.ne}  # fmt: skip
_ON_MASKS: dict[str, Function] = {"bitwise_and": torch.mul, "bitwise_or": torch.maximum, "mul": torch.mul}
_DTYPES = (torch.float32, torch.int32)


class _CannotReplayError(Exception):
    """An operation that has no form with ``out=`` here."""


@dataclass(frozen=True)
class _Value:
    """One register while recording. `constant`: what it holds for ever; a function makes one of a chunk's length."""

    dtype: torch.dtype | None = None
    is_mask: bool = False
    is_single: bool = False
    is_input: bool = False
    is_positive: bool = False  # no negative numbers and no -0.0
    constant: Any = None


class _Step(NamedTuple):
    function: Function
    arguments: tuple[int, ...]
    result: int


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what torch is asked to do, as steps between registers."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = [_Value(t.dtype, is_single=not t.ndim, is_input=True) for t in inputs]
        self.steps: list[_Step] = []
        self._held = list(inputs)  # so that ids stay theirs
        self._registers = {id(t): i for i, t in enumerate(inputs)}
        self._known: dict[object, int] = {}
        self._shared: set[int] = set()  # tensors that are views of each other

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own switch: nothing here is compiled, and its compiler takes a second to import."""
        return False

    def register(self, tensor: Tensor) -> int:
        return self._registers[id(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if args and result is args[0]:  # in place: from now on the tensor is another register
            if id(result) in self._shared or self.values[self.register(result)].is_input:
                raise _CannotReplayError(name)
            name = name.removesuffix("_")
        self._held.append(result)
        self._registers[id(result)] = self._note(name, args, kwargs or {}, result)
        return result

    def _note(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> int:
        is_mask = result.dtype == torch.bool
        if name == "arange" and len(args) == 1:
            return self._constant(("arange",), lambda n: torch.arange(n, dtype=torch.int32), result)
        if name in ("ones_like", "zeros_like") and result.ndim:
            number = float(name == "ones_like")
            return self._constant((number, result.dtype), lambda n: torch.full((n,), number, dtype=torch.float32 if is_mask else result.dtype), result)  # fmt: skip
        if name == "detach" or (name == "view" and result.shape == args[0].shape):
            self._shared |= {id(args[0]), id(result)}
            return self.register(args[0])
        dtypes = {a.dtype for a in args if isinstance(a, Tensor)} if name != "clamp" else set()
        registers = tuple(self._argument(a, dtypes) for a in args)
        first = self.values[registers[0]]
        if name == "_to_copy":
            same = first.is_mask and result.dtype == torch.float32
            return registers[0] if same else self._step(_copy, registers[:1], result, first.is_mask)
        if kwargs:
            raise _CannotReplayError(name)
        masks = [self.values[r].is_mask for r, a in zip(registers, args, strict=True) if isinstance(a, Tensor)]
        if name in _COMPARISONS and not any(masks):
            return self._step(_COMPARISONS[name], registers, result)
        if name == "bitwise_not" and all(masks):
            return self._step(torch.eq, (registers[0], self._argument(0.0, {torch.float32})), result)
        if name in _ON_MASKS and all(masks) and len(masks) == len(args):
            return self._step(_ON_MASKS[name], registers, result, True)
        if name not in _OPERATIONS or is_mask or (any(masks) and result.dtype != torch.float32):
            raise _CannotReplayError(name)
        positive = all(self.values[r].is_positive for r in registers)
        if (
            name == "add" and not isinstance(args[1], Tensor) and args[1] == 0 and positive
        ):  # only -0.0 would be changed
            return registers[0]
        return self._step(_OPERATIONS[name], registers, result, positive and name in ("add", "mul", "maximum"))

    def _argument(self, a: Any, dtypes: AbstractSet[torch.dtype]) -> int:
        """Register of an argument; `dtypes`: of the tensors beside it."""
        if isinstance(a, Tensor):
            return self._registers[id(a)]
        if a is not None and not isinstance(a, (int, float)):
            raise _CannotReplayError(repr(a))
        positive = a is not None and (a > 0 or str(a) in ("0", "0.0"))
        for dtype in dtypes & {torch.float32} or dtypes & {torch.int32} if isinstance(a, (int, float)) else ():
            if dtype.is_floating_point or isinstance(a, int):  # what torch makes of a number each time, made once
                value = _Value(is_positive=positive, is_single=True, constant=torch.tensor(a, dtype=dtype))
                return self._new((dtype, repr(a)), value)
        return self._new((type(a), repr(a)), _Value(constant=a, is_positive=positive, is_single=True))

    def _constant(self, key: object, make: Callable[[int], Tensor], like: Tensor) -> int:
        is_mask = like.dtype == torch.bool
        if like.dtype not in _DTYPES and not is_mask:
            raise _CannotReplayError(str(like.dtype))
        return self._new(key, _Value(like.dtype, is_mask=is_mask, is_positive=True, constant=make))

    def _step(self, function: Function, arguments: tuple[int, ...], result: Tensor, is_positive: bool = False) -> int:
        """Register of a step's result; that of the same step if it was taken before."""
        is_mask = result.dtype == torch.bool
        dtype = torch.float32 if is_mask else result.dtype
        if dtype not in _DTYPES:
            raise _CannotReplayError(str(dtype))
        key = (function, arguments, dtype)
        if key not in self._known:
            value = _Value(dtype, is_mask=is_mask, is_single=not result.ndim, is_positive=is_positive or is_mask)
            self.steps.append(_Step(function, arguments, self._new(key, value)))
        return self._known[key]

    def _new(self, key: object, value: _Value) -> int:
        if key not in self._known:
            self._known[key] = len(self.values)
            self.values.append(value)
        return self._known[key]


def _copy(source: Tensor, *, out: Tensor) -> None:
    out.copy_(source)


class Program:
    """A recorded pass: steps between registers, of which results share buffers as soon as they can.

    Buffers belong to the thread that runs it, and stay.
    """

    def __init__(self, steps: Sequence[_Step], values: Sequence[_Value], result: int) -> None:
        self._n_inputs = sum(v.is_input for v in values)
        self._fixed = [v.constant for v in values]
        self._values = values
        self._local = threading.local()
        last = {r: i for i, s in enumerate(steps) for r in s.arguments} | {result: len(steps)}
        place = list(range(len(values)))  # register -> where it lies
        self._buffers: list[tuple[int, torch.dtype, bool]] = []
        free: dict[tuple[torch.dtype, bool], list[int]] = {}
        self._steps = []
        for i, step in enumerate(steps):
            if step.result not in last:
                continue
            arguments = tuple(place[a] for a in step.arguments)
            for a in set(step.arguments):
                v = values[a]
                if last[a] == i and not v.is_input and v.constant is None and v.dtype is not None:
                    free.setdefault((v.dtype, v.is_single), []).append(place[a])
            v = values[step.result]
            assert v.dtype is not None
            waiting = free.get((v.dtype, v.is_single))
            if waiting:
                place[step.result] = waiting.pop()
            else:
                self._buffers.append((step.result, v.dtype, v.is_single))
            self._steps.append((step.function, arguments, place[step.result]))
        self._result = place[result]

    def __call__(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        """Merge one chunk.

        Args:
            inputs: As recorded, up to `CHUNK` elements or one.
            out: As long; its dtype is what the result is rounded to.
        """
        registers = self._registers(out.numel())
        registers[: self._n_inputs] = inputs
        for function, arguments, result in self._steps:
            function(*[registers[a] for a in arguments], out=registers[result])
        out.copy_(registers[self._result])

    def _registers(self, length: int) -> list[Any]:
        made: dict[int, list[Any]] = self._local.__dict__.setdefault("made", {})
        if CHUNK not in made:
            registers = [c(CHUNK) if callable(c) else c for c in self._fixed]
            for register, dtype, is_single in self._buffers:
                registers[register] = torch.empty(() if is_single else (CHUNK,), dtype=dtype)
            made[CHUNK] = registers
        if length not in made:  # the end of a tensor
            whole, inputs = made[CHUNK][self._n_inputs :], [None] * self._n_inputs
            tail = [r[:length] if isinstance(r, Tensor) and r.ndim else r for r in whole]
            return inputs + tail
        return made[length]


def record(p: Pass, dtypes: Sequence[torch.dtype]) -> Program | None:
    """The program of a pass's structure; its numbers are inputs. None if it cannot be replayed.

    Args:
        dtypes: Of base, experts and given tensors.
    """
    if any(name in WHOLE for name in p.given):
        return None
    tensors = [torch.zeros(2, dtype=dtype) for dtype in dtypes]
    base, experts, rest = tensors[0], tensors[1 : 1 + len(p.experts)], iter(tensors[1 + len(p.experts) :])
    given = {name: [next(rest) for _ in p.given[name]] for name in sorted(p.given)}
    index, n = torch.zeros((), dtype=torch.int32), scalars(p.numbers, torch.device("cpu"))
    recorder = _Recorder(_inputs(base, experts, given, n, index))
    try:
        with recorder:
            merged = stages.merge(p.structure, base, experts, given, n, index)
    except _CannotReplayError:
        return None
    return Program(recorder.steps, recorder.values, recorder.register(merged))


def _inputs(base: Tensor, experts: Sequence[Tensor], given: Mapping[str, Sequence[Tensor]],
            n: Mapping[str, Sequence[Tensor]], index: Tensor) -> list[Tensor]:  # fmt: skip
    named = [t for name in sorted(given) for t in given[name]]
    return [base, *experts, *named, *(t for name in sorted(n) for t in n[name]), index]


class _NoLoopError(Exception):
    """A pass that `native` does not write out."""


class _Loops(Runner):
    """A `Runner` that makes C loops, and no graphs: those take longer to compile than a merge."""

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


class ReplayRunner(Runner):
    """A `Runner` on the CPU that replays what it can. Safe to use from several threads.

    Args:
        loops: Compile C loops for long tensors: each takes about a second and is then ten times as fast as a replay.
            Used where a compiler is there.
    """

    def __init__(self, *, loops: bool = False) -> None:
        super().__init__(torch.device("cpu"), compile=False)
        self._programs: dict[object, Program | None] = {}
        self._compiled = _Loops() if loops and has_compiler(self.device) else None

    def run(self, p: Pass, base: Tensor, experts: Sequence[Tensor], out: Tensor) -> bool:
        if self._compiled is not None and base.numel() >= CHUNK:
            try:
                return self._compiled.run(p, base, experts, out)
            except _NoLoopError:
                pass
        return super().run(p, base, experts, out)

    def _run_chunks(self, p: Pass, base: Tensor, experts: Sequence[Tensor], out: Tensor) -> None:
        given = [t for name in sorted(p.given) for t in p.given[name]]
        dtypes = [t.dtype for t in (base, *experts, *given)]
        counts = tuple((name, len(v)) for named in (p.given, p.numbers) for name, v in sorted(named.items()))
        key = (p.structure, counts, tuple(dtypes))
        if key not in self._programs:
            self._programs[key] = record(p, dtypes)
        program = self._programs[key]
        if program is None:
            super()._run_chunks(p, base, experts, out)
            return
        n = scalars(p.numbers, self.device)
        first = torch.tensor((p.index + 2**31) % 2**32 - 2**31, dtype=torch.int32)
        for start in range(0, base.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            chunk = {name: [t[part] for t in v] for name, v in p.given.items()}
            program(_inputs(base[part], [e[part] for e in experts], chunk, n, first + start), out[part])
