"""Search spaces of opponents, loaded as a user's own plug-in is (``space: {type: live_spaces.py:NAME}``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_search.presets import PRESETS, preset
from merge_search.recipe import Recipe
from merge_search.space import Categorical, Parameter, Point, SpaceContext
from search_spaces.mergekit_genome import MergekitGenome

__all__ = ["Evolve", "PresetGrid"]

Values = dict[str, str | int | float | bool]


class Evolve(MergekitGenome):
    """mergekit-evolve's genome, which has no uniform recipes to begin with, unlike our own spaces."""

    def initial_points(self) -> list[Values]:
        return []


class PresetGrid:
    """Published presets, each at its published or usual settings (`Preset.grid`): one category, tried in order.

    The order goes round the presets: every preset's first setting, then every preset's second one, and so on.

    Args:
        options: ``presets``: names.
        context: The study's models.
    """

    def __init__(self, options: Mapping[str, Any], context: SpaceContext) -> None:
        self.context = context
        grids = {name: PRESETS[name].grid for name in options["presets"]}
        longest = max(map(len, grids.values()))
        self._entries = {f"{n}.{i}": (n, g[i]) for i in range(longest) for n, g in grids.items() if i < len(g)}
        self.parameters: Mapping[str, Parameter] = {"entry": Categorical(tuple(self._entries))}

    def decode(self, point: Point) -> Recipe:
        name, chosen = self._entries[str(point["entry"])]
        return preset(
            name,
            self.context.models,
            coefficients=chosen.get("coefficient"),
            densities=chosen.get("density"),
            scale=chosen.get("scale"),
            seed=self.context.seed,
            dtype=self.context.dtype,
            **chosen.get("settings", {}),
        )

    def encode(self, recipe: Recipe) -> Values | None:
        found = (e for e in self._entries if self.decode({"entry": e}).fingerprint == recipe.fingerprint)
        entry = next(found, None)
        return None if entry is None else {"entry": entry}

    def initial_points(self) -> list[Values]:
        return [{"entry": entry} for entry in self._entries]
