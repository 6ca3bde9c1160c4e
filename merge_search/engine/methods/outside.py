"""Rules from outside at work: what their functions are given, and the checks of what they return.

A function that fails, changes what it was given, or returns another number of tensors, another shape or dtype is a
`RuleError`; NaN or infinity is a `NonFiniteError`. Both name the function's file and line, the tensor and the expert.
Such functions run in plain torch on every path, so that a merge has the same bits in memory, from files to files and
step by step.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from merge_search.engine.kernels.random_bits import indices, mask_keys, uniform
from merge_search.errors import MergeSearchError, NonFiniteError, RuleError
from merge_search.memory import is_memory_error
from merge_search.recipe import Group, Scalar
from merge_search.rules import SPLICES, Measure, OperatorInfo, Rule, Selection

if TYPE_CHECKING:
    from merge_search.engine.contracts import Source
    from merge_search.engine.methods.contexts import AssessContext, OperatorContext

__all__ = [
    "Call",
    "SelectContext",
    "SpliceContext",
    "on_tensor",
    "outside_masks",
    "outside_operator",
    "outside_post",
    "outside_scores",
    "outside_splice",
]


@dataclass(frozen=True)
class SelectContext:
    """What a selection from outside may read. Lists have one entry per active expert.

    Attributes:
        scores: float32, shape of the tensor; empty where the rule reads none.
        densities: The kept fraction of each expert, in (0, 1]; empty where the rule reads none.
        experts: Their names.
        group: The tensor's name, block and module kind.
        shape: Of the tensor.
        scope: What is ranked together: ``tensor`` or ``row``.
        device: Where masks are wanted.
        seed: Of the recipe; None where the rule is not declared random.
    """

    scores: tuple[Tensor, ...]
    densities: tuple[float, ...]
    experts: tuple[str, ...]
    group: Group
    shape: tuple[int, ...]
    scope: str
    device: torch.device
    seed: int | None = None

    def uniform(self, expert: str) -> Tensor:
        """Uniform numbers in [0, 1), float32, one per parameter.

        They are a function of the recipe's seed, the expert, the tensor and the position alone.

        Raises:
            ValueError: the rule is not declared with ``is_random=True``.
        """
        if self.seed is None:
            raise ValueError("a selection that draws numbers must be declared with is_random=True")
        n = int(torch.Size(self.shape).numel())
        keys = mask_keys(self.seed, expert, self.group.tensor)
        return uniform(indices(n, device=self.device), *keys).reshape(self.shape)


@dataclass(frozen=True)
class SpliceContext:
    """What a splice from outside may read, of a piece of a tensor. Lists have one entry per active expert.

    Attributes:
        base: float32.
        deltas: float32, winsorised, masked and rescaled; zero where the expert does not take part.
        masks: float32 in [0, 1]; zero where the expert does not take part: dropped, or outvoted.
        coefficients: float32, one number each, or one per entry where the recipe has coefficients per row.
        scores: Mixing scores, float32; empty where the rule reads none.
    """

    base: Tensor
    deltas: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    coefficients: tuple[Tensor, ...]
    scores: tuple[Tensor, ...] = ()


# ------------------------------------------------------------------------------------------------ the five kinds


def outside_scores(row: Measure, context: AssessContext) -> list[Tensor]:
    """Scores of a measure: float32, one per expert, of the tensor's shape or broadcastable to it."""
    call = Call("measure", row, context.group)
    result = call(context.options, context, given=(context.base, *context.deltas, *context.raw))
    scores = call.tensors(result, context.experts)
    for expert, t in zip(context.experts, scores, strict=True):
        call.require_floats(t, expert)
        call.require_broadcastable(t, tuple(context.base.shape), expert)
        if row.bounded and bool((t < 0).any()):
            call.refuse("is declared bounded and must not be negative, got a score below zero", expert)
    return [t.to(context.base.device, torch.float32) for t in scores]


def outside_masks(row: Selection, context: SelectContext, options: Mapping[str, Scalar]) -> list[Tensor]:
    """Masks of a selection: boolean, flat, one per expert."""
    call = Call("selection", row, context.group)
    masks = call.tensors(call(options, context, given=context.scores), context.experts)
    for expert, t in zip(context.experts, masks, strict=True):
        call.require_shape(t, context.shape, expert)
        if t.dtype != torch.bool:
            call.refuse(f"must be boolean, got {t.dtype}", expert)
    return [t.to(context.device).reshape(-1) for t in masks]


def outside_splice(source: Source, context: SpliceContext) -> Tensor:
    """The combined delta: float32."""
    call = Call("splice", SPLICES[source.measure])
    result = call(dict(source.options), context, given=(context.base, *context.deltas, *context.masks, *context.scores))
    (combined,) = call.tensors([result])
    call.require_shape(combined, tuple(context.base.shape))
    call.require_floats(combined)
    return combined.to(torch.float32)


def outside_operator(row: OperatorInfo, context: OperatorContext) -> Tensor | list[Tensor]:
    """What an operator returns: merged weights, or one processed delta per expert; float32."""
    call = Call("operator", row, context.group)
    result = call(context.options, context, given=(context.base, *context.deltas))
    parts = call.tensors(result, context.experts) if row.decomposing else call.tensors([result])
    for i, t in enumerate(parts):
        expert = context.experts[i] if row.decomposing else ""
        call.require_shape(t, tuple(context.base.shape), expert)
        call.require_floats(t, expert)
    parts = [t.to(context.base.device, torch.float32) for t in parts]
    return parts if row.decomposing else parts[0]


def outside_post(row: OperatorInfo, context: OperatorContext, delta: Tensor) -> Tensor:
    """What a post rule makes of the combined delta: float32."""
    call = Call("post rule", row, context.group)
    result = call(context.options, context, delta, given=(context.base, *context.deltas, delta))
    (combined,) = call.tensors([result])
    call.require_shape(combined, tuple(delta.shape))
    call.require_floats(combined)
    return combined.to(delta.device, torch.float32)


@contextmanager
def on_tensor(name: str) -> Iterator[None]:
    """Name the tensor in the error of a rule that does not know it."""
    try:
        yield
    except RuleError as error:
        raise RuleError([_with_tensor(p, name) for p in error.problems]) from error
    except NonFiniteError as error:
        raise NonFiniteError(_with_tensor(str(error), name)) from error


def _with_tensor(text: str, name: str) -> str:
    return text if "tensor " in text else f"{text} (tensor {name!r})"


# --------------------------------------------------------------------------------------------------- one call


class Call:
    """One call of a function from outside.

    Args:
        kind: What the rule is, for messages.
        group: The tensor's; None where it is not known here.
    """

    def __init__(self, kind: str, row: Rule, group: Group | None = None) -> None:
        self._who = f"{kind} {row.name!r}"
        self._row, self._where = row, "" if group is None else f" for tensor {group.tensor!r}"

    def __call__(self, options: Mapping[str, Scalar], *arguments: Any, given: Sequence[Tensor]) -> Any:
        """What the function returns.

        Raises:
            RuleError: it fails, or changes one of the `given` tensors.
        """
        before = [_version(t) for t in given]
        function: Callable[..., Any] = self._row.function  # type: ignore[assignment]
        try:
            result = function(*arguments, **self._row.typed(options))
        except MergeSearchError:
            raise
        except Exception as error:
            if is_memory_error(error):
                raise
            text = f"{self._line_of(error)}: {self._who} failed{self._where}: {type(error).__name__}: {error}"
            raise RuleError(text) from error
        if [_version(t) for t in given] != before:
            raise RuleError(
                f"{self._row.origin}: {self._who} changed a tensor that it was given{self._where}; make a new one"
            )
        return result

    def _line_of(self, error: Exception) -> str:
        """Where in the rule's file the error was raised."""
        origin = self._row.origin
        assert origin is not None
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == origin.path]
        return f"{origin.path}:{lines[-1]}" if lines else str(origin)

    def refuse(self, problem: str, expert: str = "") -> NoReturn:
        """Raise a `RuleError` about what was returned."""
        raise RuleError(f"{self._row.origin}: what {self._who} returns{self._of(expert)} {problem}")

    def _of(self, expert: str) -> str:
        return self._where + (f", expert {expert!r}" if expert else "")

    def tensors(self, result: Any, experts: Sequence[str] | None = None) -> list[Tensor]:
        """The returned tensors: one per expert, or, with `experts` of None, the one in `result`."""
        wanted = "one tensor" if experts is None else f"a list of {len(experts)} tensors, one per expert"
        found = list(result) if isinstance(result, list | tuple) else None
        n = 1 if experts is None else len(experts)
        if found is None or len(found) != n or not all(isinstance(t, Tensor) for t in found):
            shown = result if experts is not None or found is None else found[0]
            self.refuse(f"must be {wanted}, got {_described(shown)}")
        return found

    def require_shape(self, t: Tensor, shape: tuple[int, ...], expert: str = "") -> None:
        if tuple(t.shape) != tuple(shape):
            self.refuse(f"must have the tensor's shape {tuple(shape)}, got {tuple(t.shape)}", expert)

    def require_broadcastable(self, t: Tensor, shape: tuple[int, ...], expert: str = "") -> None:
        try:
            t.broadcast_to(shape)
        except RuntimeError:
            self.require_shape(t, shape, expert)

    def require_floats(self, t: Tensor, expert: str = "") -> None:
        """
        Raises:
            NonFiniteError: NaN or infinity.
        """
        if not t.is_floating_point():
            self.refuse(f"must be a floating dtype, got {t.dtype}", expert)
        if not bool(torch.isfinite(t).all()):
            who = f"what {self._who} returns{self._of(expert)}"
            raise NonFiniteError(f"{self._row.origin}: {who} must be finite, got NaN or infinity")


def _version(t: Tensor) -> int:
    """How often a tensor was written to; 0 where torch does not count."""
    return 0 if t.is_inference() else t._version


def _described(result: Any) -> str:
    if isinstance(result, list | tuple):
        odd = next((t for t in result if not isinstance(t, Tensor)), None)
        return f"a list of {len(result)}" + ("" if odd is None else f" with {type(odd).__name__}")
    return "one tensor" if isinstance(result, Tensor) else type(result).__name__
