"""Hard splicing by block: every block is taken whole from one expert or from the base.

The chosen expert has coefficient 1 and all others have 0, so the merged block equals the expert's.

Dimension: ceil(L / span) categories for L blocks, and one more for the tensors outside them (embedding, head and last
norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from merge_search.errors import SpaceError
from merge_search.recipe import Group
from merge_search.space import Categorical, Parameter, Point, SpaceContext
from search_spaces.parts.axes import Read
from search_spaces.parts.composed import FEWEST, MOST, Composed, Values
from search_spaces.parts.entries import preset_methods
from search_spaces.parts.grouping import REST, Slots
from search_spaces.parts.options import Options, space_options

__all__ = ["ExpertChoice"]

BASE = "base"


class ExpertChoiceOptions(Options):
    """Options of ``type: expert_choice``.

    Attributes:
        span: Number of neighbouring blocks that are chosen together.
        base: Whether the base is a choice.
    """

    span: Annotated[int, Field(ge=1)] = 1
    base: bool = True


class ExpertChoice(Composed):
    """Parameters: ``choice.J`` for the J-th span of blocks, ``choice.rest``."""

    def __init__(self, options: Mapping[str, Any], context: SpaceContext, *, folder: Path | None = None) -> None:
        chosen = space_options(ExpertChoiceOptions, options)
        choices = (*context.experts, *([BASE] if chosen.base else []))
        if len(choices) < 2:
            raise SpaceError("space.base: with one expert there is nothing to choose from; write base: true")
        self._axis = _Choice(context, choices, chosen.span)
        super().__init__(context, preset_methods(["task_arithmetic"], context, at="space"), self._axis)

    def initial_points(self) -> list[Values]:
        """Every expert alone, then pairs of experts that each have one end of the model, cut at a half, 3/4 and 2/3."""
        experts = self.context.experts
        names = list(self.parameters)
        points: list[Values] = [{n: e for n in names} for e in experts[:FEWEST]]  # noqa: C420
        pairs = [(a, b) for a in (*experts, BASE) for b in experts if a != b]
        allowed = self._axis.choices
        for step in (2, 4, 3):
            cut = len(names) * (step - 1) // step
            for a, b in pairs:
                point: Values = {n: a if i < cut else b for i, n in enumerate(names)}
                if a in allowed and point not in points:
                    points.append(point)
        return points[:MOST]


class _Choice:
    """The axis of coefficients: one categorical parameter per span of blocks."""

    bounds = (0.0, 1.0)

    def __init__(self, context: SpaceContext, choices: tuple[str, ...], span: int) -> None:
        self.choices = choices
        self._experts = context.experts

        def label(group: Group) -> str:
            return f"choice.{REST}" if group.block is None else f"choice.{group.block // span}"

        self._slots = Slots(context, label)
        self.parameters: dict[str, Parameter] = {name: Categorical(choices) for name in self._slots.labels}

    def values(self, point: Point) -> dict[str, float | dict[str, float]]:
        return {e: self._slots.spread({n: float(point[n] == e) for n in self._slots.labels}) for e in self._experts}

    def read(self, value: Read) -> Values:
        out: Values = {}
        for name, group in self._slots.first.items():
            ones = [e for e in self._experts if value(e, group) == 1.0]
            out[name] = ones[0] if ones else BASE
        return out

    def uniform(self, level: float) -> Values:
        return dict.fromkeys(self.parameters, self.choices[0])
