"""The mission's own space: published settings x coefficients per group x densities per group.

Dimension: 1 + M * (coefficient groups) + M * (density groups); the density axis is there only if some preset
uses it. The category ``preset`` names the assessment, selection, rescaling, conflict rule and splicing together.
Densities are searched on a logarithmic scale: halving matters as much from 0.2 as from 0.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merge_search.errors import SpaceError, nearest
from merge_search.presets import PRESETS, preset
from merge_search.recipe import Recipe
from merge_search.space import Categorical, Float, Parameter, Point, SpaceContext
from search_spaces.grouping import Range, keys_for, parameter_name, representative

__all__ = ["Compatibility"]

DEFAULT_PRESETS = ("task_arithmetic", "ties", "dare", "della", "magnitude_soft", "magnitude_hard")
LEVELS = (0.4, 0.7, 1.0)
DENSITIES = (0.2, 0.5)


class Options(BaseModel):
    """The ``space`` entry of the study file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    coefficients: Range = Range(per="block", bounds=(0.0, 1.5))
    density: Range = Range(per="expert", bounds=(0.05, 1.0))
    presets: Annotated[tuple[str, ...], Field(min_length=1)] = DEFAULT_PRESETS


class Compatibility:
    """Preset x coefficients x densities; see the module's notes."""

    def __init__(self, options: Mapping[str, Any], context: SpaceContext) -> None:
        self.context = context
        self.options = _read(options)
        self._coefficient_keys = keys_for(self.options.coefficients.per, context)
        self._density_keys = keys_for(self.options.density.per, context)
        self._uses_density = any(PRESETS[p].uses_density for p in self.options.presets)
        self.parameters: Mapping[str, Parameter] = self._parameters()

    def _parameters(self) -> dict[str, Parameter]:
        out: dict[str, Parameter] = {}
        if len(self.options.presets) > 1:
            out["preset"] = Categorical(self.options.presets)
        for expert in self.context.experts:
            for key in self._coefficient_keys:
                name = parameter_name("coefficient", expert, key, self._coefficient_keys)
                out[name] = Float(*self.options.coefficients.bounds)
        for expert in self.context.experts if self._uses_density else ():
            for key in self._density_keys:
                out[parameter_name("density", expert, key, self._density_keys)] = Float(
                    *self.options.density.bounds, log=True
                )
        return out

    def decode(self, point: Point) -> Recipe:
        name = str(point.get("preset", self.options.presets[0]))
        coefficients = {e: self._values("coefficient", e, self._coefficient_keys, point) for e in self.context.experts}
        densities = None
        if PRESETS[name].uses_density:
            densities = {e: self._values("density", e, self._density_keys, point) for e in self.context.experts}
        recipe = preset(name, self.context.models, coefficients=coefficients, densities=densities, scale=1.0)
        return recipe.model_copy(update={"seed": self.context.seed, "dtype": self.context.dtype})

    def _values(self, what: str, expert: str, keys: list[str], point: Point) -> float | dict[str, float]:
        values = {key: float(point[parameter_name(what, expert, key, keys)]) for key in keys}
        if len(values) == 1:
            return next(iter(values.values()))
        return {**values, "*": values.get("*", values[keys[-1]])}

    def encode(self, recipe: Recipe) -> dict[str, str | int | float | bool] | None:
        for name in self.options.presets:
            point: dict[str, str | int | float | bool] = {"preset": name} if "preset" in self.parameters else {}
            for expert in self.context.experts:
                point |= self._read_off("coefficient", expert, self._coefficient_keys, recipe)
                if self._uses_density:
                    point |= self._read_off("density", expert, self._density_keys, recipe)
            if self._holds(point) and self._same(self.decode(point), recipe):
                return point
        return None

    def _read_off(self, what: str, expert: str, keys: list[str], recipe: Recipe) -> dict[str, float]:
        read = recipe.coefficient if what == "coefficient" else recipe.density
        out = {}
        for key in keys:
            group = representative(key, keys, self.context)
            if group is not None:
                scale = float(recipe.scale) if what == "coefficient" and not isinstance(recipe.scale, dict) else 1.0
                out[parameter_name(what, expert, key, keys)] = read(expert, group) * scale
        return out

    def _holds(self, point: Point) -> bool:
        for name, domain in self.parameters.items():
            if name not in point:
                return False
            if isinstance(domain, Float) and not domain.low <= float(point[name]) <= domain.high:
                return False
        return True

    def _same(self, ours: Recipe, theirs: Recipe) -> bool:
        """Equal stages, and equal numbers for every tensor (scale times coefficient where splicing is linear)."""
        stages = (
            "winsorise",
            "assess",
            "allocate",
            "select",
            "rescale",
            "resolve",
            "splice",
            "operator",
            "post",
            "maps",
        )
        if any(getattr(ours, s) != getattr(theirs, s) for s in stages) or isinstance(theirs.scale, dict):
            return False
        if theirs.scale != 1.0 and theirs.splice.kind == "coefficient":
            return False
        return all(
            abs(ours.coefficient(e, g) - theirs.coefficient(e, g) * theirs.scale) < 1e-12
            and abs(ours.density(e, g) - theirs.density(e, g)) < 1e-12
            for e in self.context.experts
            for g in self.context.groups
        )

    def initial_points(self) -> list[dict[str, str | int | float | bool]]:
        """Uniform recipes: presets x strengths, densities at their usual values; the cheapest good start known."""
        low, high = self.options.coefficients.bounds
        d_low, d_high = self.options.density.bounds
        points = []
        for i, name in enumerate(self.options.presets):
            for j, level in enumerate(LEVELS):
                density = DENSITIES[(i + j) % len(DENSITIES)]
                point: dict[str, str | int | float | bool] = {"preset": name} if "preset" in self.parameters else {}
                for parameter in self.parameters:
                    if parameter.startswith("coefficient."):
                        point[parameter] = min(max(level, low), high)
                    elif parameter.startswith("density."):
                        point[parameter] = min(max(density, d_low), d_high)
                points.append(point)
        points.sort(key=lambda p: abs(float(next(v for k, v in p.items() if k.startswith("coefficient."))) - LEVELS[1]))
        return points


def _read(options: Mapping[str, Any]) -> Options:
    problems = []
    try:
        parsed = Options.model_validate(options)
    except ValidationError as error:
        for e in error.errors():
            at = ".".join(map(str, ("space", *e["loc"])))
            if e["type"] == "extra_forbidden":
                problems.append(f"{at}: unknown key{nearest(str(e['loc'][-1]), _known(e['loc']))}")
            else:
                problems.append(f"{at}: {e['msg'].removeprefix('Value error, ')}, got {e['input']!r}")
        raise SpaceError(problems) from None
    low, high = parsed.density.bounds
    if not 0 < low < high <= 1:
        problems.append(f"space.density.bounds: densities must lie in (0, 1], got [{low:g}, {high:g}]")
    for name in parsed.presets:
        if name not in PRESETS:
            problems.append(f"space.presets: no preset is called {name!r}{nearest(name, PRESETS)}")
        elif PRESETS[name].recipe.get("operator"):
            problems.append(
                f"space.presets: {name!r} acts on whole matrices and has no place on these axes; list it under search.baselines"
            )
    if problems:
        raise SpaceError(problems)
    return parsed


def _known(loc: tuple[str | int, ...]) -> list[str]:
    return list(Options.model_fields if len(loc) == 1 else Range.model_fields)
