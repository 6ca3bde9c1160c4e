"""Read a family's options. Every problem is reported at once, with its place and the nearest known word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict

from merge_search.errors import SpaceError
from merge_search.options import read_options

__all__ = ["Bounds", "DensityBounds", "Options", "space_options"]


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if not (bounds[0] < bounds[1] and abs(bounds[0]) < float("inf") and abs(bounds[1]) < float("inf")):
        raise ValueError(f"bounds must be [low, high], finite, with low < high, got {list(bounds)}")
    return bounds


def _densities(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] < bounds[1] <= 1:
        raise ValueError(f"densities must lie in (0, 1], got bounds {list(bounds)}; write for example [0.05, 1]")
    return bounds


Bounds = Annotated[tuple[float, float], AfterValidator(_ordered)]
DensityBounds = Annotated[tuple[float, float], AfterValidator(_densities)]


class Options(BaseModel):
    """A family's part of the ``space`` entry of the study file (without ``type``)."""

    model_config = ConfigDict(extra="forbid", frozen=True)


O = TypeVar("O", bound=BaseModel)  # noqa: E741


def space_options(kind: type[O], options: Mapping[str, Any], *, at: tuple[str, ...] = ("space",)) -> O:
    """The options as values. Raises `SpaceError` with every problem found."""
    return read_options(kind, options, at=at, error=SpaceError)
