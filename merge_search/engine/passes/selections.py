"""Adds a recipe's selection to a pass: the form of it that runs, its scores, and every number that its masks need.

There is one function a case. Selections that rank rows or work in blocks read stored ranks or masks. The others compare
scores with numbers inside the pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from merge_search.engine.contracts import Pass
from merge_search.engine.kernels.n_m_masks import balanced_masks, counts_of
from merge_search.engine.kernels.random_bits import draw_limit, mask_keys
from merge_search.engine.methods.outside import SelectContext, outside_masks
from merge_search.engine.passes.measurements import Measurements
from merge_search.engine.passes.order_statistics import Thresholds, dropped_count, kept_count
from merge_search.engine.passes.settings import ResolvedRecipe, TensorSettings

__all__ = ["Selections", "largest_factors"]

_LARGEST = torch.finfo(torch.float32).max
Case = Callable[[ResolvedRecipe, TensorSettings, Pass], Pass]


class Selections:
    """Adds selections to passes."""

    def __init__(self, measurements: Measurements) -> None:
        self._measurements = measurements
        self._cases: dict[str, Case] = {
            "all": self._everything,
            "threshold": self._threshold,
            "top_k": self._top_k,
            "mass": self._top_k,
            "band": self._band,
            "soft_threshold": self._soft_threshold,
            "bernoulli": self._bernoulli,
            "proportional": self._proportional,
            "rank_probability": self._rank_probability,
            "n_m": self._n_m,
        }
        self._cases_of_rows: dict[str, Case] = {"top_k": self._top_k_of_rows, "band": self._band_of_rows}

    def add(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        """The pass with the recipe's selection, winsorising and rescaling by density.

        Args:
            settings: Of the pass's experts.
        """
        select, rescale = resolved.recipe.select, resolved.recipe.rescale.kind
        clip = self._measurements.clip(resolved.assess, p.name)
        p.numbers.update(clip)
        is_gated = select.gate > 0
        p = _with(p, winsorise=bool(clip), exclusive=select.exclusive, gate=is_gated)
        if is_gated:
            p.numbers["gate"] = [select.gate]
        p = self._case(resolved)(resolved, settings, p)
        if rescale == "inverse_probability" and p.structure.select in ("rank_probability", "proportional"):
            return _with(p, rescale="probability")
        if rescale in ("inverse_density", "inverse_probability"):
            p.numbers["rho"] = [1.0 / d for d in settings.densities]
            return _with(p, rescale="number")
        return p

    def _case(self, resolved: ResolvedRecipe) -> Case:
        kind = resolved.selection.name
        if resolved.scope.select.scope == "row" and kind in self._cases_of_rows:
            return self._cases_of_rows[kind]
        return self._cases.get(kind, self._outside)

    def _scored(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass, kind: str) -> Pass:
        """The pass with selection scores, selecting by `kind`."""
        source = self._measurements.give_scores(p, "a", resolved.assess, settings.coefficients)
        return _with(p, select=kind, assess=source)

    def _thresholds(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> list[Thresholds]:
        by_expert = self._measurements.thresholds(resolved.assess, p.name, settings.coefficients)
        return [by_expert[e] for e in p.experts]

    # --- scores are compared with numbers

    def _everything(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        return p

    def _threshold(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        p = self._scored(resolved, settings, p, "threshold")
        p.numbers["threshold"] = [resolved.recipe.select.threshold]
        return p

    def _top_k(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        p = self._scored(resolved, settings, p, "top_k")
        thresholds = self._thresholds(resolved, settings, p)
        counts = _counts(resolved, thresholds, settings)
        _add_cuts(p, resolved, thresholds, counts)
        return self._ranked_together(resolved, settings, p, thresholds)

    def _band(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        p = self._scored(resolved, settings, p, "band")
        thresholds = self._thresholds(resolved, settings, p)
        counts = _counts(resolved, thresholds, settings)
        drops = [dropped_count(resolved.recipe.select, t.n, k) for t, k in zip(thresholds, counts, strict=True)]
        _add_cuts(p, resolved, thresholds, [drop + k for drop, k in zip(drops, counts, strict=True)])
        _add_cuts(p, resolved, thresholds, drops, "2")
        return self._ranked_together(resolved, settings, p, thresholds)

    def _ranked_together(
        self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass, thresholds: list[Thresholds]
    ) -> Pass:
        """The pass with the strides of its cuts and its place among all that is ranked together."""
        n, scope = p.numbers, resolved.scope
        strides = [t.stride for t in thresholds]
        n["stride"] = strides if len(set(strides)) > 1 else strides[:1]
        if resolved.assess.measure.shared and len(set(settings.densities)) == 1:
            n.update({key: n[key][:1] for key in ("low", "high", "cut", "low2", "high2", "cut2") if key in n})
        return replace(
            p, index=self._measurements.offset(p.name, vectors=scope.select.vectors) if scope.is_model else 0
        )

    def _soft_threshold(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        p = self._scored(resolved, settings, p, "soft_threshold")
        n, thresholds = p.numbers, self._thresholds(resolved, settings, p)
        counts = _counts(resolved, thresholds, settings)
        n["low"] = [t.value(k) for t, k in zip(thresholds, counts, strict=True)]
        spans = [t.maximum - low for t, low in zip(thresholds, n["low"], strict=True)]
        n["slope"] = [min(1.0 / x, _LARGEST) if x > 0 else 0.0 for x in spans]
        n["flat"] = [float(x <= 0) for x in spans]
        return p

    # --- at random

    def _bernoulli(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        _add_keys(p, resolved)
        p.numbers["limit"] = [draw_limit(d) for d in settings.densities]
        return _with(p, select="bernoulli")

    def _proportional(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        p = self._scored(resolved, settings, p, "proportional")
        _add_keys(p, resolved)
        thresholds = self._thresholds(resolved, settings, p)
        p.numbers["kappa"] = [t.kappa(d) for t, d in zip(thresholds, settings.densities, strict=True)]
        return p

    def _rank_probability(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        self._add_ranks(resolved, settings, p)
        columns = _ranked_together(resolved, p)
        _add_keys(p, resolved)
        epsilons = [min(resolved.recipe.select.epsilon, d, 1 - d) if columns > 1 else 0.0 for d in settings.densities]
        p.numbers["first"] = [d + e for d, e in zip(settings.densities, epsilons, strict=True)]
        p.numbers["fall"] = [2 * e / max(1, columns - 1) for e in epsilons]
        return _with(p, select="rank_probability")

    # --- ranks within rows

    def _add_ranks(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> None:
        p.given["rank"] = self._measurements.ranks(resolved.assess, p.name, settings.coefficients)

    def _top_k_of_rows(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        self._add_ranks(resolved, settings, p)
        columns, rounding = _ranked_together(resolved, p), resolved.recipe.select.rounding
        p.numbers["count"] = [kept_count(d, columns, rounding) for d in settings.densities]
        return _with(p, select="rank")

    def _band_of_rows(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        self._add_ranks(resolved, settings, p)
        columns, select = _ranked_together(resolved, p), resolved.recipe.select
        counts = [kept_count(d, columns, select.rounding) for d in settings.densities]
        drops = [dropped_count(select, columns, k) for k in counts]
        p.numbers["count"] = [min(columns, drop + k) for drop, k in zip(drops, counts, strict=True)]
        p.numbers["drop"] = drops
        return _with(p, select="rank_band")

    # --- masks of whole tensors, stored

    def _n_m(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        select, densities = resolved.recipe.select, settings.densities
        columns = p.shape[-1] if p.shape else 1
        counts = tuple(counts_of(d, columns, select.block_size) for d in densities)
        at = resolved.assess.at(settings.coefficients)
        key = ("n_m", resolved.assess.key, select.block_size, select.exclusive, p.name, counts, at)

        def make() -> list[torch.Tensor]:
            scores = self._measurements.whole_scores(resolved.assess, p.name, settings.coefficients)
            shape = p.shape if p.shape else (1,)
            rows = [a.reshape(shape) for a in scores]
            return balanced_masks(rows, densities, select.block_size, exclusive=select.exclusive)

        return _with(self._masked(p, key, make), exclusive=False)

    def _outside(self, resolved: ResolvedRecipe, settings: TensorSettings, p: Pass) -> Pass:
        """The pass with masks of a selection from outside."""
        select, row, measurements = resolved.recipe.select, resolved.selection, self._measurements
        densities = settings.densities if row.uses_density else ()
        scored_by = (resolved.assess.key, resolved.assess.at(settings.coefficients)) if row.uses_scores else None
        drawn_by = (resolved.scope.seed, resolved.scope.key())
        key = ("outside", row.origin, select.model_dump_json(), scored_by, drawn_by, p.name, densities)

        def make() -> list[torch.Tensor]:
            scores = []
            if row.uses_scores:
                scores = measurements.whole_scores(resolved.assess, p.name, settings.coefficients)
            context = SelectContext(
                tuple(a.reshape(p.shape) for a in scores), densities, p.experts, measurements.tensors.groups[p.name],
                p.shape, select.scope, measurements.tensors.device, resolved.scope.seed if row.is_random else None,
            )  # fmt: skip
            return outside_masks(row, context, row.completed(select.options))

        return self._masked(p, key, make)

    def _masked(self, p: Pass, key: object, make: Callable[[], list[torch.Tensor]]) -> Pass:
        """The pass with given masks, which are made unless they are stored."""
        masks = self._measurements.stored.get(key)
        if masks is None:
            dtype = self._measurements.tensors.base(p.name).dtype
            dtype = dtype if dtype.itemsize == 2 else torch.bfloat16  # booleans load slowly
            masks = [m.to(dtype) for m in make()]
            self._measurements.store(key, p.name, masks)
        p.given["mask"] = masks
        return _with(p, select="mask")


def _with(p: Pass, **changes: Any) -> Pass:
    """The pass with another structure."""
    return replace(p, structure=p.structure._replace(**changes))


def _counts(resolved: ResolvedRecipe, thresholds: list[Thresholds], settings: TensorSettings) -> list[int]:
    """How many scores of each expert are kept."""
    select, pairs = resolved.recipe.select, zip(thresholds, settings.densities, strict=True)
    if select.kind == "mass":
        return [t.count_for_mass(d) for t, d in pairs]
    return [kept_count(d, t.n_positive if select.nonzero else t.n, select.rounding) for t, d in pairs]


def _add_cuts(
    p: Pass, resolved: ResolvedRecipe, thresholds: list[Thresholds], counts: list[int], suffix: str = ""
) -> None:
    """Add the numbers that keep the `counts` largest scores, under names that end in `suffix`."""
    cuts = resolved.cuts(thresholds, counts)
    p.numbers["low" + suffix] = [cut.low for cut in cuts]
    p.numbers["high" + suffix] = [cut.high for cut in cuts]
    p.numbers["cut" + suffix] = [cut.last for cut in cuts]


def _add_keys(p: Pass, resolved: ResolvedRecipe) -> None:
    """Add the keys of each expert's random bits."""
    keys = [mask_keys(resolved.scope.seed, e, p.name) for e in p.experts]
    p.numbers["key1"], p.numbers["key2"] = [k[0] for k in keys], [k[1] for k in keys]


def _ranked_together(resolved: ResolvedRecipe, p: Pass) -> int:
    """How many entries are ranked together."""
    if resolved.recipe.select.scope == "row":
        return p.shape[-1] if p.shape else 1
    return math.prod(p.shape)


def largest_factors(resolved: ResolvedRecipe, p: Pass) -> list[float]:
    """1 / the smallest keep probability of each expert; infinite where that is not known, or almost nothing."""
    if p.structure.select != "rank_probability":
        return [math.inf] * len(p.experts)
    last = _ranked_together(resolved, p) - 1
    smallest = [first - fall * last for first, fall in zip(p.numbers["first"], p.numbers["fall"], strict=True)]
    return [1.001 / least if least > 1e-3 else math.inf for least in smallest]
