"""The study file's ``search.sampler_options``, checked without torch and before any weight is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from merge_search.errors import StudyFileError, sentences

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

__all__ = ["BotorchOptions", "KernelName", "MultiObjective", "check_options", "optuna_options"]

KernelName = Literal["tied", "plain"]
MultiObjective = Literal["auto", "hypervolume", "parego"]
PLACE = "search.sampler_options"
SAYABLE: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "dict[str, Any]": dict[str, Any]}
"""Types whose values a YAML text can hold, as Optuna's signatures write them."""


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BotorchOptions(_Options):
    """Options of ``botorch``. `NoisyGPSampler` says what they mean."""

    kernel: KernelName = "tied"
    multi_objective: MultiObjective = "auto"
    n_startup: Annotated[int, Field(ge=1)] | None = None
    cost_power: Annotated[float, Field(ge=0, le=1)] = 0.0


def optuna_options(kind: type[BaseSampler]) -> type[BaseModel]:
    """Options of an Optuna class that a study file can hold: no functions, samplers or trials, and not the seed."""
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        text = str(parameter.annotation)
        sayable = SAYABLE.get(text.removesuffix(" | None"))
        if sayable is not None and name != "seed":
            fields[name] = (sayable | None if text.endswith(" | None") else sayable, parameter.default)
    return create_model(kind.__name__, __base__=_Options, **fields)


def check_options(kind: type[BaseModel], options: Mapping[str, Any]) -> None:
    """Raise `StudyFileError` with every unknown or wrong option, and the nearest known one."""
    try:
        kind.model_validate(dict(options))
    except ValidationError as error:
        raise StudyFileError(sentences(error, kind, at=lambda place: ".".join([PLACE, *map(str, place)]))) from None
