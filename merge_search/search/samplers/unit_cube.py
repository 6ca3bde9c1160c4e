"""Parameters as Optuna distributions and as coordinates of the unit cube.

The numeric parameters come first, in [0, 1] (logarithmic if `log`), then one column per category with the index of the
choice. A whole number lies in the middle of its cell of width 1 / (high - low + 1), so both ends are as likely as the
rest. Parameters with a single value take no column.
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
"""User attribute of a trial that fitted fewer steps than its point asks for, since the budget paid for no more. Its
score counts in the study but is no measurement of its point."""


def distributions(parameters: Mapping[str, Parameter]) -> dict[str, BaseDistribution]:
    """Optuna's distribution of every parameter, in the same order.

    Raises:
        SpaceError: Optuna refuses bounds or choices. It lists all of them.
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
    """A value for every parameter, asked for in the space's order."""
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
    """Whether `point` has a value in the domain of every parameter. Trials without are not of this space."""
    return all(name in point and _contains(parameter, point[name]) for name, parameter in parameters.items())


def _contains(parameter: Parameter, value: Any) -> bool:
    if isinstance(parameter, Categorical):
        return _index(parameter, value) is not None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_right_kind = is_number and (isinstance(parameter, Float) or float(value).is_integer())
    return is_right_kind and parameter.low <= value <= parameter.high


def _index(parameter: Categorical, value: Any) -> int | None:
    """Position of a choice, where True and 1 are different choices. None if it is not there."""
    same = (i for i, choice in enumerate(parameter.choices) if type(choice) is type(value) and choice == value)
    return next(same, None)


def _is_single(parameter: Parameter) -> bool:
    return len(parameter.choices) == 1 if isinstance(parameter, Categorical) else parameter.low == parameter.high


class UnitCube:
    """Converts points of a space to coordinates and back.

    Attributes:
        numeric: Names of the numeric columns, which come first.
        categories: Names of the category columns.
        n_choices: Number of choices of each category column.
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
        """Coordinates of a point; None if a value is missing or outside its domain."""
        if not holds(self.parameters, point):
            return None
        numbers = [_to_unit(self.parameters[name], point[name]) for name in self.numeric]
        return numbers + [float(_index(p, point[name]) or 0) for name, p in self._categorical.items()]

    def decode(self, coordinates: Sequence[float]) -> dict[str, Value]:
        """The point at the nearest valid coordinates, without the parameters that have a single value."""
        n = len(self.numeric)
        numbers = zip(self.numeric, coordinates[:n], strict=True)
        point: dict[str, Value] = {name: _from_unit(self.parameters[name], u) for name, u in numbers}
        for (name, p), c in zip(self._categorical.items(), coordinates[n:], strict=True):
            point[name] = p.choices[min(max(round(c), 0), len(p.choices) - 1)]
        return {name: point[name] for name in self.parameters if name in point}

    def snap(self, coordinates: Sequence[float]) -> list[float]:
        """The coordinates of a trial at `coordinates`, once its whole numbers are rounded."""
        point = self.decode(coordinates)
        numbers = [_to_unit(self.parameters[name], point[name]) for name in self.numeric]
        return numbers + [float(_index(p, point[name]) or 0) for name, p in self._categorical.items()]


def _scale(parameter: Float | Integer) -> tuple[float, float]:
    """Both ends of the axis that is mapped to [0, 1]."""
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
