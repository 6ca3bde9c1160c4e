"""Labels of tensors as keys of a `PerGroup` value, and back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from merge_search.recipe import Group
from merge_search.space import SpaceContext
from search_spaces.parts.options import Bounds, DensityBounds, Options

__all__ = ["REST", "DensityRange", "Per", "Range", "Slots", "cell", "in_depth_order"]

Per = Literal["expert", "block", "kind", "block_kind"]

REST = "rest"
"""The cell of tensors outside all blocks and, per block and kind, of norm gains."""


class Range(Options):
    """``{per: block, bounds: [0, 1.5]}``: one parameter per expert and cell.

    Attributes:
        per: The cells.
        bounds: The bounds of every parameter.
    """

    per: Per = "expert"
    bounds: Bounds = (0.0, 1.5)


class DensityRange(Options):
    """As `Range`, for densities. They are searched on a logarithmic scale.

    Attributes:
        per: The cells.
        bounds: The bounds of every parameter.
        fixed: One density for everything, which is not searched. ``density: 0.1`` means ``density: {fixed: 0.1}``.
    """

    per: Per = "expert"
    bounds: DensityBounds = (0.05, 1.0)
    fixed: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return {"fixed": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_way(self) -> DensityRange:
        if self.fixed is not None and (searched := self.model_fields_set - {"fixed"}):
            raise ValueError(f"a fixed density is not searched; leave out {' and '.join(sorted(searched))}, or fixed")
        return self


def cell(per: Per, group: Group) -> str:
    """The cell of a tensor: ``block.3``, ``mlp``, ``block.3.mlp``, ``rest`` or, per expert, the empty text.

    Norm gains are few and small, so per block and kind they share the cell ``rest`` with the tensors outside blocks.
    """
    match per:
        case "expert":
            return ""
        case "kind":
            return group.kind
        case "block":
            return REST if group.block is None else f"block.{group.block}"
        case "block_kind":
            return REST if group.block is None or group.kind == "norm" else f"block.{group.block}.{group.kind}"


def in_depth_order(context: SpaceContext) -> list[Group]:
    """Groups in the order of blocks, those outside all blocks last. Within a block they keep the checkpoint's order."""
    return sorted(context.groups, key=lambda g: (g.block is None, g.block or 0))


def _outside(group: Group, inside: str) -> str:
    return group.kind if group.block is None else inside


_RESOLUTIONS: tuple[Callable[[Group], str], ...] = (
    lambda g: "*",
    lambda g: g.kind,
    lambda g: _outside(g, f"block.{g.block}"),
    lambda g: _outside(g, f"block.{g.block}.{g.kind}"),
    lambda g: g.tensor,
)
"""The key of a tensor at each resolution of a `PerGroup` value, from coarse to fine."""

L = TypeVar("L", bound=Hashable)


class Slots(Generic[L]):
    """The coarsest keys that distinguish all labels.

    Args:
        context: The models of the study.
        label: Group -> its label.

    Attributes:
        labels: The different labels in the order of depth, those outside blocks last.
        first: Label -> the first tensor that has it.

    Determinism: Keys depend on the context and the labels only, never on values. If all values are equal, they become
    one number, so that a uniform recipe has one form.
    """

    def __init__(self, context: SpaceContext, label: Callable[[Group], L]) -> None:
        groups = in_depth_order(context)
        self.first: dict[L, Group] = {}
        for group in groups:
            self.first.setdefault(label(group), group)
        self.labels = tuple(self.first)
        keys = next(k for r in _RESOLUTIONS if (k := _keys(groups, label, r)) is not None)
        self._rest = label(groups[-1])
        kept = {key: name for key, name in keys.items() if name != self._rest}
        shadowed = any(key in kept for g in groups if label(g) == self._rest for key in g.keys())  # noqa: SIM118
        self._keys = keys if shadowed else kept

    def spread(self, values: Mapping[L, float]) -> float | dict[str, float]:
        """The `PerGroup` value that gives every tensor the number of its label."""
        numbers = {values[name] for name in self.labels}
        if len(numbers) == 1:
            return numbers.pop()
        return {**{key: values[name] for key, name in self._keys.items()}, "*": values[self._rest]}


def _keys(groups: list[Group], label: Callable[[Group], L], resolution: Callable[[Group], str]) -> dict[str, L] | None:
    keys: dict[str, L] = {}
    for group in groups:
        if keys.setdefault(resolution(group), label(group)) != label(group):
            return None
    return keys
