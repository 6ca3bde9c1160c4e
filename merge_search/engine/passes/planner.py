"""Recipe + tensor -> `Pass`: which rules run, and every number they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from merge_search.engine.contracts import Given, Numbers, Pass, Source, Structure, Tensors
from merge_search.engine.execute.runner import Runner
from merge_search.engine.kernels.n_m_masks import balanced_masks, counts_of
from merge_search.engine.kernels.random_bits import draw_limit, mask_keys, wrapped
from merge_search.engine.methods.allocate import Allocation, allocate
from merge_search.engine.methods.assess import measure_of
from merge_search.engine.passes.measurements import Facts, Scope
from merge_search.engine.passes.order_statistics import Table, dropped_count, kept_count
from merge_search.engine.passes.settings import Known, TensorSettings, cuts, largest_factors, ranked_together
from merge_search.engine.passes.softmax_weights import Mixtures
from merge_search.engine.passes.survivors import Samples, majority_sign, measure
from merge_search.engine.resident.coefficient_maps import n_rows, rows_of
from merge_search.recipe import Assess, Recipe, value_for

__all__ = ["Planner", "TensorSettings"]

T = TypeVar("T")
_SCORED = {"top_k", "threshold", "band", "rank_probability", "proportional", "soft_threshold", "n_m", "mass"}
_LARGEST = torch.finfo(torch.float32).max
_MIXED = {"score", "softmax", "argmax"}


class Planner:
    """Makes passes. Keeps what a candidate's passes share with earlier ones (`facts`, surveys)."""

    def __init__(self, tensors: Tensors, *, facts: Facts | None = None, runner: Runner | None = None) -> None:
        self.tensors = tensors
        self._runner = runner or Runner(tensors.device, compile=False)
        self.facts = facts or Facts(tensors, runner=self._runner)
        self._samples, self._mixtures = Samples(self.facts), Mixtures(self.facts)
        self._allocations: dict[str, Allocation] = {}
        self._surveys: dict[Hashable, Any] = {}
        self._means: dict[Hashable, dict[str, float]] = {}
        self._known: Known | None = None

    # --- recipe level

    @staticmethod
    def processing_order(recipe: Recipe) -> tuple[str, ...]:
        """Experts in the order in which they are added up.

        By name, so that listing them otherwise changes no bit; as listed where the order means something. Under names
        that sort otherwise the sums, and so the weights, may differ in their last bits.
        """
        measures = [recipe.assess, recipe.splice.score or recipe.assess]
        if recipe.select.exclusive or recipe.splice.kind == "argmax" or any(measure_of(m).ordered for m in measures):
            return tuple(recipe.models.experts)
        return tuple(sorted(recipe.models.experts))

    def _of(self, recipe: Recipe) -> Known:
        """What is known of the recipe that was asked about last; recipes are values, and do not change."""
        if self._known is None or self._known.recipe is not recipe:
            scope = Scope(self.processing_order(recipe), recipe.select, recipe.winsorise, recipe.seed)
            self._known = Known(recipe, scope)
        return self._known

    def scope(self, recipe: Recipe) -> Scope:
        return self._of(recipe).scope

    def settings(self, recipe: Recipe, name: str) -> TensorSettings:
        """Numbers of all experts for one tensor, after `Allocate`."""
        known = self._of(recipe).settings
        if name not in known:
            known[name] = self._settings(recipe, name)
        return known[name]

    def _settings(self, recipe: Recipe, name: str) -> TensorSettings:
        group, experts = self.tensors.groups[name], self.scope(recipe).experts
        scale = value_for(recipe.scale, group)
        if recipe.allocate.kind == "constant":
            return TensorSettings(
                experts,
                tuple(recipe.coefficient(e, group) for e in experts),
                tuple(recipe.density(e, group) for e in experts),
                scale,
            )
        table = self._allocation(recipe)
        return TensorSettings(
            experts,
            tuple(table.coefficient[e, name] for e in experts),
            tuple(table.density[e, name] for e in experts),
            scale,
        )

    def _allocation(self, recipe: Recipe) -> Allocation:
        key = recipe.fingerprint
        if key not in self._allocations:
            rule = Assess(measure=recipe.allocate.measure, options=recipe.allocate.options)
            scope = Scope(tuple(recipe.models.experts), recipe.select, 0.0, recipe.seed)

            def importance(expert: str, name: str) -> float:
                return self._importance(rule, scope, expert, name)

            made = allocate(recipe, self.tensors, lambda name: self.facts.active(name, scope.experts), importance)
            self._allocations = {key: made}  # a candidate's own; importance itself is remembered
        return self._allocations[key]

    def _importance(self, rule: Assess, scope: Scope, expert: str, name: str) -> float:
        """Mean score of an expert on a tensor."""
        seed = scope.seed if rule.measure == "random" else 0
        key = (rule.model_dump_json(), scope.key(), seed, name)
        if key not in self._means:
            scores = self.facts.whole_scores(rule, scope, name)
            active = self.facts.active(name, scope.experts)
            self._means[key] = {e: float(a.to(torch.float64).mean()) for e, a in zip(active, scores, strict=True)}
        return self._means[key][expert]

    # --- tensor level

    def plan(self, recipe: Recipe, name: str, *, emit: str = "weights") -> Pass | None:
        """The pass of one tensor; None where no expert is active, so that the base's bits are copied.

        Args:
            emit: ``weights``, or ``delta`` for the combined delta before scale and post rules.
        """
        scope, settings = self.scope(recipe), self.settings(recipe, name)
        active = self.facts.active(name, scope.experts)
        if not active:
            return None
        picked = [settings.experts.index(e) for e in active]
        coefficients = tuple(settings.coefficients[i] for i in picked)
        densities = tuple(settings.densities[i] for i in picked)
        shape = tuple(self.tensors.base(name).shape)
        numbers: Numbers = {"coefficient": list(coefficients), "scale": [settings.scale]}
        given: Given = {}
        structure = Structure(
            experts=len(active), resolve=recipe.resolve.kind, weighted=recipe.resolve.weighted, tie=recipe.resolve.tie,
            splice=recipe.splice.kind, ties=recipe.splice.ties, emit=emit,
        )  # fmt: skip
        if structure.resolve != "none" and structure.tie == "majority":
            numbers["majority"] = [1.0]
        p = Pass(name, shape, structure, active, numbers, given)
        if scope.covers(shape):
            p = self._selection(recipe, scope, p, densities, coefficients)
        p = self._mixing(recipe, scope, p, coefficients)
        p = self._surveyed(recipe, self._rows(recipe, p))
        if "majority" in numbers:
            numbers["majority"] = [self._majority(recipe, p)]
        return replace(p, bound=self._bound(recipe, p))

    def _bound(self, recipe: Recipe, p: Pass) -> float:
        """What no merged element can exceed; infinite where weights are not known to lie in [0, 1]."""
        s, n = p.structure, p.numbers
        if s.rows or (s.splice == "coefficient" and min(n["coefficient"]) < 0):
            return math.inf
        if s.splice in _MIXED and not measure_of(recipe.splice.score or recipe.assess).bounded:
            return math.inf
        if recipe.splice.kind == "softmax" and recipe.splice.temperature < 1e-30:
            return math.inf
        rho = n.get("rho", [1.0] * s.experts)
        if s.rescale == "probability":
            rho = largest_factors(recipe, p)
        boost = n.get("boost", [1.0] * s.experts)
        parts = zip(n["coefficient"], rho, boost, p.experts, strict=True)
        delta = sum(abs(c * r * b) * self.facts.largest_delta(e, p.name) for c, r, b, e in parts)
        return self.facts.largest_base(p.name) + abs(n["scale"][0]) * delta * 1.0001

    def _slot(self, assess: Assess, scope: Scope, p: Pass, slot: str, coefficients: tuple[float, ...]) -> Source:
        """Fill in the scores of `assess` under `slot`; returns where the pass finds them."""
        source, logarithm = self.facts.source(assess), slot == "b" and p.structure.splice == "softmax"
        if source.kind == "given" or (self._runner.compile and self.facts.keeps(assess, scope, p.name)):
            added = measure_of(assess).added
            if slot == "b" and added and not logarithm:
                p.numbers[slot] = [float(self.facts.options(assess)[added])]
                assess = Assess(measure=assess.measure, options={**assess.options, added: 0.0})
            p.given[slot] = self.facts.scores(assess, scope, p.name, coefficients, logarithm=logarithm)
            return Source("given log" if logarithm else "given")
        if values := self.facts.numbers(assess, scope, p.name):
            p.numbers[slot] = values
        return source

    def _selection(
        self, recipe: Recipe, scope: Scope, p: Pass, densities: tuple[float, ...], coefficients: tuple[float, ...]
    ) -> Pass:
        select, s = recipe.select, p.structure
        clip = self.facts.clip(scope, p.name)
        p.numbers.update(clip)
        p = replace(p, structure=s._replace(winsorise=bool(clip), exclusive=select.exclusive, gate=select.gate > 0))
        if select.gate:
            p.numbers["gate"] = [select.gate]
        kind: str = "top_k" if select.kind == "mass" else select.kind
        ranked = select.scope == "row" and kind in ("top_k", "band")
        if kind == "n_m":
            p = self._balanced(recipe, scope, p, densities, coefficients)
        elif ranked or kind == "rank_probability":
            p.given["rank"] = self.facts.ranks(recipe.assess, scope, p.name, coefficients)
            kind = {"top_k": "rank", "band": "rank_band"}.get(kind, kind)
            self._rank_numbers(recipe, p, densities, kind)
            p = replace(p, structure=p.structure._replace(select=kind))
        else:
            source = Source()
            if kind in _SCORED:
                source = self._slot(recipe.assess, scope, p, "a", coefficients)
            p = replace(p, structure=p.structure._replace(select=kind, assess=source))
            p = self._threshold_numbers(recipe, scope, p, densities, coefficients)
        if recipe.rescale.kind == "inverse_probability" and p.structure.select in ("rank_probability", "proportional"):
            return replace(p, structure=p.structure._replace(rescale="probability"))
        if recipe.rescale.kind in ("inverse_density", "inverse_probability"):
            p.numbers["rho"] = [1.0 / d for d in densities]
            return replace(p, structure=p.structure._replace(rescale="number"))
        return p

    def _rank_numbers(self, recipe: Recipe, p: Pass, densities: tuple[float, ...], kind: str) -> None:
        columns = ranked_together(recipe, p)
        if kind == "rank_probability":
            self._probability_numbers(recipe, p, densities)
            epsilons = [min(recipe.select.epsilon, d, 1 - d) if columns > 1 else 0.0 for d in densities]
            p.numbers["first"] = [d + e for d, e in zip(densities, epsilons, strict=True)]
            p.numbers["fall"] = [2 * e / max(1, columns - 1) for e in epsilons]
            return
        counts = [kept_count(d, columns, recipe.select.rounding) for d in densities]
        drops = [dropped_count(recipe.select, columns, k) if kind == "rank_band" else 0 for k in counts]
        p.numbers["count"] = [min(columns, drop + k) for drop, k in zip(drops, counts, strict=True)]
        if kind == "rank_band":
            p.numbers["drop"] = drops

    def _probability_numbers(self, recipe: Recipe, p: Pass, densities: tuple[float, ...]) -> None:
        keys = [mask_keys(recipe.seed, e, p.name) for e in p.experts]
        p.numbers["key1"], p.numbers["key2"] = [k[0] for k in keys], [k[1] for k in keys]
        if p.structure.select == "bernoulli":
            p.numbers["limit"] = [draw_limit(d) for d in densities]

    def _threshold_numbers(
        self, recipe: Recipe, scope: Scope, p: Pass, densities: tuple[float, ...], coefficients: tuple[float, ...]
    ) -> Pass:
        select, kind, n = recipe.select, p.structure.select, p.numbers
        if kind == "threshold":
            n["threshold"] = [select.threshold]
        if kind in ("bernoulli", "proportional"):
            self._probability_numbers(recipe, p, densities)
        if kind not in ("top_k", "band", "soft_threshold", "proportional"):
            return p
        tables = self.facts.tables(recipe.assess, scope, p.name, coefficients)
        mine = [tables[e] for e in p.experts]
        if kind == "proportional":
            n["kappa"] = [t.kappa(d) for t, d in zip(mine, densities, strict=True)]
            return p
        counts = [_count(recipe, t, d) for t, d in zip(mine, densities, strict=True)]
        if kind == "soft_threshold":
            n["low"] = [t.value(k) for t, k in zip(mine, counts, strict=True)]
            spans = [t.maximum - low for t, low in zip(mine, n["low"], strict=True)]
            n["slope"] = [min(1.0 / x, _LARGEST) if x > 0 else 0.0 for x in spans]
            n["flat"] = [float(x <= 0) for x in spans]
            return p
        drops = [dropped_count(select, t.n, k) if kind == "band" else 0 for t, k in zip(mine, counts, strict=True)]
        known = self._of(recipe)
        n.update(cuts(known, mine, [drop + k for drop, k in zip(drops, counts, strict=True)]))
        n["stride"] = [t.stride for t in mine] if len({t.stride for t in mine}) > 1 else [mine[0].stride]
        if kind == "band":
            n.update(cuts(known, mine, drops, "2"))
        if measure_of(recipe.assess).shared and len(set(densities)) == 1:
            n.update({key: n[key][:1] for key in ("low", "high", "cut", "low2", "high2", "cut2") if key in n})
        index = self.facts.offset(p.name, vectors=select.vectors) if select.scope == "model" else 0
        return replace(p, index=index)

    def _balanced(
        self, recipe: Recipe, scope: Scope, p: Pass, densities: tuple[float, ...], coefficients: tuple[float, ...]
    ) -> Pass:
        select = recipe.select
        key = (
            "n_m",
            recipe.assess.model_dump_json(),
            scope.key(),
            select.block_size,
            select.exclusive,
            p.name,
            tuple(counts_of(d, p.shape[-1] if p.shape else 1, select.block_size) for d in densities),
            scope.seed,
            coefficients if recipe.assess.options.get("at") == "scaled" else (),
        )
        masks = self.facts.stored.get(key)
        if masks is None:
            scores = self.facts.whole_scores(recipe.assess, scope, p.name, coefficients)
            shape = p.shape if p.shape else (1,)
            found = balanced_masks(
                [a.reshape(shape) for a in scores], densities, select.block_size, exclusive=select.exclusive
            )
            dtype = self.tensors.base(p.name).dtype
            masks = [m.to(dtype if dtype.itemsize == 2 else torch.bfloat16) for m in found]  # booleans load slowly
            self.facts.store(key, p.name, masks)
        p.given["mask"] = masks
        return replace(p, structure=p.structure._replace(select="mask", exclusive=False))

    def _mixing(self, recipe: Recipe, scope: Scope, p: Pass, coefficients: tuple[float, ...]) -> Pass:
        splice, s = recipe.splice, p.structure
        if splice.kind not in _MIXED:
            return p
        mixing = splice.score or recipe.assess
        if splice.kind == "softmax":
            sharpness = min(max(1.0 / splice.temperature, 1e-30), _LARGEST)
            if (weights := self._mixtures.weights(mixing, scope, p, coefficients, sharpness)) is not None:
                p.given["b"] = weights  # scores of a mean
                return replace(p, structure=s._replace(splice="score", mixing=Source("given")))
            p.numbers["sharpness"] = [sharpness]
        if measure_of(mixing).after_mask:
            return replace(p, structure=s._replace(mixing=Source("number")))
        if mixing == recipe.assess and s.assess.kind in ("cheap", "given"):
            return replace(p, structure=s._replace(mixing=Source("same")))
        return replace(p, structure=s._replace(mixing=self._slot(mixing, scope, p, "b", coefficients)))

    def _rows(self, recipe: Recipe, p: Pass) -> Pass:
        if not any(e in recipe.maps for e in p.experts):
            return p
        rows = n_rows(p.shape)
        maps = []
        for e in p.experts:
            found = rows_of(self.tensors, recipe, e, p.name)
            found = torch.ones(rows, device=self.tensors.device) if found is None else found
            maps.append(
                found if rows > 1 else found.expand(2).contiguous()
            )  # the compiler takes lengths of 1 for fixed
        p.given["rows"] = maps
        p.numbers["start"] = [wrapped(p.index)]
        p.numbers["columns"] = [max(1, self.tensors.base(p.name).numel() // max(1, rows))]
        return replace(p, structure=p.structure._replace(rows=True))

    # --- reductions over the survivors

    def _surveyed(self, recipe: Recipe, p: Pass) -> Pass:
        match = recipe.rescale.kind in ("match_l1", "match_l2") and p.structure.select != "all"
        number = p.structure.mixing.kind == "number"
        boost = recipe.splice.unique_boost != 0 and p.structure.select != "all"
        if not (match or number or boost):
            return p
        which = "l1" if recipe.rescale.kind == "match_l1" else "l2"
        wanted = [f"{which}_before", f"{which}_after"] * match + ["l2_after"] * number + ["alone", "shared"] * boost
        found = self.survey(p, _given_key(recipe, p), tuple(sorted(set(wanted))))
        s = p.structure
        if number:
            energy = [v / max(1, self.tensors.base(p.name).numel()) for v in found["l2_after"]]
            floor = float((recipe.splice.score or recipe.assess).options.get("floor", 0.0))
            p.numbers["b"] = energy if sum(energy) >= floor else [1.0] * len(p.experts)
        if match:
            power = 1.0 if which == "l1" else 0.5
            pairs = zip(found[f"{which}_before"], found[f"{which}_after"], strict=True)
            p.numbers["rho"] = [(b / a) ** power if a > 0 else 1.0 for b, a in pairs]
            s = s._replace(rescale="number")
        if boost:
            r, cap = recipe.splice.unique_boost, recipe.splice.boost_cap
            ratios = [
                shared / alone if alone else cap for shared, alone in zip(found["shared"], found["alone"], strict=True)
            ]
            p.numbers["boost"] = [1.0 + r * min(ratio, cap) for ratio in ratios]
            s = s._replace(boost=True)
        return replace(p, structure=s)

    def _majority(self, recipe: Recipe, p: Pass) -> float:
        """`majority_sign`, remembered for the same masks."""
        return self._remembered(
            "majority", p, _given_key(recipe, p), lambda: [majority_sign(p, self._samples, self._runner)]
        )[0]

    def survey(self, p: Pass, given_key: str, wanted: tuple[str, ...]) -> dict[str, list[float]]:
        """`survey.measure`, remembered for the same masks."""
        return self._remembered(wanted, p, given_key, lambda: measure(p, self.facts, self._runner, wanted))

    def _remembered(self, what: Hashable, p: Pass, given_key: str, make: Callable[[], T]) -> T:
        """What depends on the masks of a pass alone."""
        structure = p.structure._replace(emit="", mixing=Source())
        key = (p.name, structure, _mask_numbers(p), given_key, what)
        if key not in self._surveys:
            if len(self._surveys) > 4096:
                self._surveys.clear()
            self._surveys[key] = make()
        found: T = self._surveys[key]
        return found


def _given_key(recipe: Recipe, p: Pass) -> str:
    """What the tensors given to a pass depend on."""
    if not p.given:
        return ""
    blank: dict[str, Any] = {"scale": 1.0, "preset": ""}
    if recipe.assess.options.get("at") != "scaled":
        blank["coefficients"] = {}
    return recipe.model_copy(update=blank).fingerprint


def _mask_numbers(p: Pass) -> tuple[tuple[str, tuple[float, ...]], ...]:
    skip = {"scale", "sharpness", "majority"} | (set() if p.structure.weighted else {"coefficient"})
    return tuple(sorted((k, tuple(v)) for k, v in p.numbers.items() if k not in skip))


def _count(recipe: Recipe, t: Table, density: float) -> int:
    n = t.n_positive if recipe.select.nonzero else t.n
    return t.count_for_mass(density) if recipe.select.kind == "mass" else kept_count(density, n, recipe.select.rounding)
