"""Parameters as Optuna distributions and as coordinates of the unit cube.

Coordinates: numeric parameters first, in [0, 1] (logarithmic where `log`), then one column per category
holding the index of the choice. A whole number sits in the middle of its cell of width 1 / (high - low + 1),
so that both ends are as likely as the rest. Parameters with a single value take no column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from merge_search.errors import SpaceError
from merge_search.space import Categorical, Float, Integer, Parameter

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["CUT_ATTRIBUTE", "UnitCube", "Value", "distributions", "holds", "suggest"]

Value = str | int | float | bool

CUT_ATTRIBUTE = "cut_short"
"""User attribute of a trial that fitted fewer steps than its point says, since the budget paid for no more: its score is
one of the study's, and says nothing about its point."""


def distributions(parameters: Mapping[str, Parameter]) -> dict[str, BaseDistribution]:
    """Optuna's distribution of every parameter, in the same order.

    Raises:
        SpaceError: bounds or choices that Optuna refuses; all of them at once.
    """
    result, problems = {}, []
    for name, parameter in parameters.items():
        try:
            result[name] = _distribution(parameter)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise SpaceError(problems, where="search space")
    return result


def _distribution(parameter: Parameter) -> BaseDistribution:
    match parameter:
        case Float(low, high, log):
            return FloatDistribution(low, high, log=log)
        case Integer(low, high, log):
            return IntDistribution(low, high, log=log)
        case Categorical(choices):
            return CategoricalDistribution(choices)


def suggest(trial: Trial, parameters: Mapping[str, Parameter]) -> dict[str, Value]:
    """A value for every parameter, asked in the space's order. Nothing is computed before the first is asked."""
    return {name: _suggest(trial, name, parameter) for name, parameter in parameters.items()}


def _suggest(trial: Trial, name: str, parameter: Parameter) -> Value:
    match parameter:
        case Float(low, high, log):
            return trial.suggest_float(name, low, high, log=log)
        case Integer(low, high, log):
            return trial.suggest_int(name, low, high, log=log)
        case Categorical(choices):
            value: Value = trial.suggest_categorical(name, choices)  # type: ignore[assignment]  # None is no choice
            return value


def holds(parameters: Mapping[str, Parameter], point: Mapping[str, Any]) -> bool:
    """Whether `point` has a value of its domain for every parameter: trials without are not of this space."""
    return all(name in point and _contains(parameter, point[name]) for name, parameter in parameters.items())


def _contains(parameter: Parameter, value: Any) -> bool:
    if isinstance(parameter, Categorical):
        return _index(parameter, value) is not None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_right_kind = is_number and (isinstance(parameter, Float) or float(value).is_integer())
    return is_right_kind and parameter.low <= value <= parameter.high


def _index(parameter: Categorical, value: Any) -> int | None:
    """Position of a choice; True and 1 are different choices."""
    same = (i for i, choice in enumerate(parameter.choices) if type(choice) is type(value) and choice == value)
    return next(same, None)


def _is_single(parameter: Parameter) -> bool:
    return len(parameter.choices) == 1 if isinstance(parameter, Categorical) else parameter.low == parameter.high


class UnitCube:
    """Points of a space <-> coordinates.

    Attributes:
        numeric, categories: Names of the columns, numeric ones first.
        n_choices: Choices of each category column.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        free = {name: p for name, p in parameters.items() if not _is_single(p)}
        self.parameters = parameters
        self.numeric = [name for name, p in free.items() if not isinstance(p, Categorical)]
        self._categorical = {name: p for name, p in free.items() if isinstance(p, Categorical)}
        self.categories = list(self._categorical)
        self.n_choices = [len(p.choices) for p in self._categorical.values()]

    @property
    def n_columns(self) -> int:
        return len(self.numeric) + len(self.categories)

    def encode(self, point: Mapping[str, Any]) -> list[float] | None:
        """Coordinates, or None where a value is missing or outside its domain."""
        if not holds(self.parameters, point):
            return None
        numbers = [_to_unit(self.parameters[name], point[name]) for name in self.numeric]
        return numbers + [float(_index(p, point[name]) or 0) for name, p in self._categorical.items()]

    def decode(self, coordinates: Sequence[float]) -> dict[str, Value]:
        """The point of the nearest valid coordinates, without the parameters that have a single value."""
        n = len(self.numeric)
        numbers = zip(self.numeric, coordinates[:n], strict=True)
        point: dict[str, Value] = {name: _from_unit(self.parameters[name], u) for name, u in numbers}
        for (name, p), c in zip(self._categorical.items(), coordinates[n:], strict=True):
            point[name] = p.choices[min(max(round(c), 0), len(p.choices) - 1)]
        return {name: point[name] for name in self.parameters if name in point}

    def snap(self, coordinates: Sequence[float]) -> list[float]:
        """Coordinates that a trial at `coordinates` will have once its whole numbers are rounded."""
        point = self.decode(coordinates)
        numbers = [_to_unit(self.parameters[name], point[name]) for name in self.numeric]
        return numbers + [float(_index(p, point[name]) or 0) for name, p in self._categorical.items()]


def _scale(parameter: Float | Integer) -> tuple[float, float]:
    """Ends of the axis that [0, 1] stands for."""
    half = 0.5 if isinstance(parameter, Integer) else 0.0
    low, high = parameter.low - half, parameter.high + half
    return (math.log(low), math.log(high)) if parameter.log else (low, high)


def _to_unit(parameter: Parameter, value: Any) -> float:
    assert not isinstance(parameter, Categorical)
    low, high = _scale(parameter)
    u = ((math.log(value) if parameter.log else float(value)) - low) / (high - low)
    return min(max(u, 0.0), 1.0)


def _from_unit(parameter: Parameter, u: float) -> float | int:
    assert not isinstance(parameter, Categorical)
    low, high = _scale(parameter)
    value = low + min(max(float(u), 0.0), 1.0) * (high - low)
    value = math.exp(value) if parameter.log else value
    if isinstance(parameter, Integer):
        value = round(value)
    return min(max(value, parameter.low), parameter.high)
