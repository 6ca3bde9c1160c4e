"""Recipe + tensor -> `Pass`: which rules run, and every number they need."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace

import torch

from merge_search.engine.contracts import Numbers, Pass, Source, Structure, Tensors
from merge_search.engine.execute.runner import Runner
from merge_search.engine.kernels.random_bits import wrapped
from merge_search.engine.methods.allocate import Allocation, allocate
from merge_search.engine.passes.measurements import Measurements
from merge_search.engine.passes.selections import Selections, largest_factors
from merge_search.engine.passes.settings import Assessment, ResolvedRecipe, Scope, TensorSettings
from merge_search.engine.passes.softmax_weights import SoftmaxWeights
from merge_search.engine.passes.survivors import SurvivorNumbers
from merge_search.engine.resident.coefficient_maps import n_rows, rows_of
from merge_search.recipe import Assess, Group, Recipe, groups_named

__all__ = ["Planner", "TensorSettings"]

_LARGEST = torch.finfo(torch.float32).max


class Planner:
    """Makes passes. Keeps what a candidate's passes share with earlier ones.

    Attributes:
        measurements: Everything that was measured on the tensors.
    """

    def __init__(
        self, tensors: Tensors, *, measurements: Measurements | None = None, runner: Runner | None = None
    ) -> None:
        self.tensors = tensors
        runner = runner or Runner(tensors.device, compile=False)
        self.measurements = measurements or Measurements(tensors, runner=runner)
        self._selections = Selections(self.measurements)
        self._softmax_weights = SoftmaxWeights(self.measurements)
        self._survivors = SurvivorNumbers(self.measurements, runner)
        self._allocations: dict[str, Allocation] = {}
        self._mean_scores: dict[Hashable, dict[str, float]] = {}
        self._last: ResolvedRecipe | None = None

    # --- recipe level

    def resolved(self, recipe: Recipe) -> ResolvedRecipe:
        """The recipe, resolved; the last one is kept. Recipes are values, and do not change."""
        if self._last is None or self._last.recipe is not recipe:
            self._last = ResolvedRecipe.resolve(recipe)
        return self._last

    def settings(self, recipe: Recipe, name: str) -> TensorSettings:
        """Numbers of all experts for one tensor, after `Allocate`."""
        resolved = self.resolved(recipe)
        if name not in resolved.settings:
            resolved.settings[name] = self._make_settings(resolved, name)
        return resolved.settings[name]

    def _make_settings(self, resolved: ResolvedRecipe, name: str) -> TensorSettings:
        recipe, experts = resolved.recipe, resolved.scope.experts
        coefficients, densities, scale = recipe.numbers_of(experts, self.tensors.groups[name])
        if recipe.allocate.kind != "constant":
            table = self._allocation(resolved)
            coefficients = tuple(table.coefficient[e, name] for e in experts)
            densities = tuple(table.density[e, name] for e in experts)
        return TensorSettings(experts, coefficients, densities, scale)

    def _allocation(self, resolved: ResolvedRecipe) -> Allocation:
        recipe = resolved.recipe
        if resolved.fingerprint not in self._allocations:
            rule = Assess(measure=recipe.allocate.measure, options=recipe.allocate.options)
            scope = Scope(tuple(recipe.models.experts), recipe.select, 0.0, recipe.seed)
            assessment = Assessment.resolve(rule, scope)
            allocation = allocate(
                recipe,
                self.tensors,
                active=lambda name: self.measurements.active(name, scope.experts),
                importance=lambda expert, name: self._importance(assessment, expert, name),
                per=str(assessment.options[assessment.measure.partition]) if assessment.measure.partition else "tensor",
            )
            self._allocations = {resolved.fingerprint: allocation}  # of one candidate; mean scores serve all of them
        return self._allocations[resolved.fingerprint]

    def _importance(self, assessment: Assessment, expert: str, name: str) -> float:
        """Mean score of an expert on a tensor."""
        key = (assessment.key, name)
        if key not in self._mean_scores:
            scores = self.measurements.whole_scores(assessment, name)
            active = self.measurements.active(name, assessment.scope.experts)
            self._mean_scores[key] = {e: float(a.to(torch.float64).mean()) for e, a in zip(active, scores, strict=True)}
        return self._mean_scores[key][expert]

    # --- tensor level

    def plan(self, recipe: Recipe, name: str, *, emit: str = "weights") -> Pass | None:
        """The pass of one tensor; None where no expert is active, so that the base's bits are copied.

        Args:
            emit: ``weights``, or ``delta`` for the combined delta before scale and post rules.
        """
        resolved = self.resolved(recipe)
        active = self.measurements.active(name, resolved.scope.experts)
        if not self._is_spliced(resolved, name):
            return self._rest(resolved, name, active, emit)
        if not active:
            return None
        settings = self.settings(recipe, name)
        if active != settings.experts:
            settings = settings.of(active)
        numbers: Numbers = {"coefficient": list(settings.coefficients), "scale": [settings.scale]}
        structure = Structure(
            experts=len(active), resolve=recipe.resolve.kind, weighted=recipe.resolve.weighted, tie=recipe.resolve.tie,
            splice=recipe.splice.kind, ties=recipe.splice.ties, emit=emit,
        )  # fmt: skip
        has_majority = structure.resolve != "none" and structure.tie == "majority"
        if has_majority:
            numbers["majority"] = [1.0]
        p = Pass(name, self.tensors.shape(name), structure, active, numbers, {})
        if resolved.scope.covers(p.shape):
            p = self._selections.add(resolved, settings, p)
        p = self._mixing(resolved, settings, p)
        p = self._rows(resolved, p)
        p = self._survivor_numbers(resolved, p)
        if has_majority:
            numbers["majority"] = [self._survivors.majority_sign(p, _given_key(resolved, p))]
        return replace(p, bound=self._bound(resolved, p))

    def _is_spliced(self, resolved: ResolvedRecipe, name: str) -> bool:
        """Whether the tensor is among those that a scored splice is limited to (the mixing measure's option `only`)."""
        options = resolved.mixing.options
        if not (resolved.splice.is_scored and options.get("only") and "rest" in options):
            return True
        keys = groups_named(str(options["only"]), self.tensors.groups.values())
        return keys is None or any(key in keys for key in Group.keys(self.tensors.groups[name]))

    def _rest(self, resolved: ResolvedRecipe, name: str, active: tuple[str, ...], emit: str) -> Pass | None:
        """The pass of a tensor that is not spliced: the delta of one expert, whole; None for the base's bits."""
        experts, rest = tuple(resolved.recipe.models.experts), resolved.mixing.options["rest"]
        kept = {"base": (), "first": experts[:1], "last": experts[-1:]}[str(rest)]
        if not kept or kept[0] not in active:
            return None
        settings = self.settings(resolved.recipe, name).of(kept)
        numbers: Numbers = {"coefficient": list(settings.coefficients), "scale": [settings.scale]}
        p = Pass(name, self.tensors.shape(name), Structure(experts=1, emit=emit), kept, numbers, {})
        p = self._rows(resolved, p)
        delta = abs(numbers["coefficient"][0]) * self.measurements.largest_delta(kept[0], name)
        bound = self.measurements.largest_base(name) + abs(settings.scale) * delta * 1.0001
        return replace(p, bound=math.inf if p.structure.rows else bound)

    def _mixing(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        """The pass with its mixing scores, and with a splice from outside."""
        splice, mixing, s = resolved.recipe.splice, resolved.mixing, p.structure
        if resolved.splice.is_outside:
            options = resolved.splice.completed(splice.options)
            s = s._replace(outside=Source("splice", splice.kind, tuple(sorted(options.items()))))
            p = replace(p, structure=s)
        if not resolved.splice.is_scored:
            return p
        if splice.kind == "softmax":
            sharpness = min(max(1.0 / splice.temperature, 1e-30), _LARGEST)
            weights = self._softmax_weights.get(mixing, p, settings.coefficients, sharpness)
            if weights is not None:
                p.given["b"] = weights  # scores of a mean
                return replace(p, structure=s._replace(splice="score", mixing=Source("given")))
            p.numbers["sharpness"] = [sharpness]
        if mixing.measure.after_mask:
            return replace(p, structure=s._replace(mixing=Source("number")))
        if mixing is resolved.assess and s.assess.kind in ("cheap", "given"):
            return replace(p, structure=s._replace(mixing=Source("same")))
        source = self.measurements.give_scores(p, "b", mixing, settings.coefficients)
        return replace(p, structure=s._replace(mixing=source))

    def _rows(self, resolved: ResolvedRecipe, p: Pass) -> Pass:
        """The pass with the coefficient maps of its experts."""
        recipe = resolved.recipe
        if not any(e in recipe.maps for e in p.experts):
            return p
        n, maps = n_rows(p.shape), []
        for e in p.experts:
            rows = rows_of(self.tensors, recipe, e, p.name)
            rows = torch.ones(n, device=self.tensors.device) if rows is None else rows
            maps.append(rows if n > 1 else rows.expand(2).contiguous())  # the compiler takes lengths of 1 for fixed
        p.given["rows"] = maps
        p.numbers["start"] = [wrapped(p.index)]
        p.numbers["columns"] = [max(1, math.prod(p.shape) // max(1, n))]
        return replace(p, structure=p.structure._replace(rows=True))

    # --- numbers that depend on the survivors

    def _survivor_numbers(self, resolved: ResolvedRecipe, p: Pass) -> Pass:
        """The pass with numbers that its masks decide: energies, factors that keep norms, boosts of lone survivors."""
        recipe, is_masked = resolved.recipe, p.structure.select != "all"
        has_energy = p.structure.mixing.kind == "number"
        keeps_norm = is_masked and recipe.rescale.kind in ("match_l1", "match_l2")
        has_boost = is_masked and recipe.splice.unique_boost != 0
        if not (has_energy or keeps_norm or has_boost):
            return p
        norm = "l1" if recipe.rescale.kind == "match_l1" else "l2"
        kinds = {"l2_after"} if has_energy else set()
        if keeps_norm:
            kinds |= {f"{norm}_before", f"{norm}_after"}
        if has_boost:
            kinds |= {"alone", "shared"}
        sums = self._survivors.sums(p, _given_key(resolved, p), tuple(sorted(kinds)))
        s = p.structure
        if has_energy:
            p.numbers["b"] = _energies(resolved, p, sums["l2_after"])
        if keeps_norm:
            power = 1.0 if norm == "l1" else 0.5
            pairs = zip(sums[f"{norm}_before"], sums[f"{norm}_after"], strict=True)
            p.numbers["rho"] = [(before / after) ** power if after > 0 else 1.0 for before, after in pairs]
            s = s._replace(rescale="number")
        if has_boost:
            p.numbers["boost"] = _boosts(recipe, sums["alone"], sums["shared"])
            s = s._replace(boost=True)
        return replace(p, structure=s)

    def _bound(self, resolved: ResolvedRecipe, p: Pass) -> float:
        """A number that no merged element can exceed; infinite where weights are not known to lie in [0, 1]."""
        s, n, splice = p.structure, p.numbers, resolved.splice
        if s.rows or s.outside.measure or (splice.divides_by_coefficients and min(n["coefficient"]) < 0):
            return math.inf
        if splice.is_scored and not resolved.mixing.measure.bounded:
            return math.inf
        if splice.name == "softmax" and resolved.recipe.splice.temperature < 1e-30:
            return math.inf
        rho = n.get("rho", [1.0] * s.experts)
        if s.rescale == "probability":
            rho = largest_factors(resolved, p)
        boost = n.get("boost", [1.0] * s.experts)
        largest = self.measurements.largest_deltas(p.experts, p.name)
        delta = sum(abs(c * r * b) * x for c, r, b, x in zip(n["coefficient"], rho, boost, largest, strict=True))
        return self.measurements.largest_base(p.name) + abs(n["scale"][0]) * delta * 1.0001


def _energies(resolved: ResolvedRecipe, p: Pass, squares: list[float]) -> list[float]:
    """Mean squares of the survivors; ones where they sum to less than the measure's floor."""
    energies = [v / max(1, math.prod(p.shape)) for v in squares]
    floor = float(resolved.mixing.options.get("floor", 0.0))
    return energies if sum(energies) >= floor else [1.0] * len(p.experts)


def _boosts(recipe: Recipe, alone: list[float], shared: list[float]) -> list[float]:
    """Factors of entries where one expert survives alone."""
    share, cap = recipe.splice.unique_boost, recipe.splice.boost_cap
    ratios = [s / a if a else cap for s, a in zip(shared, alone, strict=True)]
    return [1.0 + share * min(ratio, cap) for ratio in ratios]


def _given_key(resolved: ResolvedRecipe, p: Pass) -> str:
    """What the tensors given to a pass depend on."""
    return resolved.masks_fingerprint if p.given else ""
