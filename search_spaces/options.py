"""Reading a family's options: every problem at once, each with its place and the nearest known word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from merge_search.errors import SpaceError, nearest

__all__ = ["Bounds", "DensityBounds", "Options", "read_options", "sentences"]


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


def read_options(kind: type[O], options: Mapping[str, Any], *, at: tuple[str, ...] = ("space",)) -> O:
    """Options as values.

    Raises:
        SpaceError: with every problem found.
    """
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        raise SpaceError(sentences(error, kind, at)) from None


def sentences(error: ValidationError, kind: type[BaseModel], at: Iterable[str] = ("space",)) -> list[str]:
    """One sentence per problem: the place, what is wrong, what was found, the nearest known key."""
    out: list[str] = []
    for e in error.errors():
        place = ".".join(map(str, (*at, *e["loc"])))
        if e["type"] == "extra_forbidden":
            text = f"{place}: unknown key{nearest(str(e['loc'][-1]), _keys(kind, e['loc'][:-1]))}"
        elif e["type"] == "missing":
            text = f"{place}: is missing"
        else:
            message = e["msg"].removeprefix("Value error, ")
            found = "" if "got" in message else f", got {e['input']!r}"
            text = f"{place}: {message[0].lower() + message[1:]}{found}"
        if text not in out:
            out.append(text)
    return out


def _keys(kind: Any, loc: tuple[str | int, ...]) -> list[str]:
    for part in loc:
        fields = getattr(kind, "model_fields", None)
        if fields is not None and part in fields:
            kind = fields[part].annotation
        inner = _models_in(kind)
        kind = next((m for m in inner if m.__name__ == part), inner[0] if inner else kind)
    return list(getattr(kind, "model_fields", {}))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in get_args(annotation) for m in _models_in(a)]
