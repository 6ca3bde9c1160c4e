"""Slopes: d loss / d coefficient of every expert, tensor by tensor, while a backward pass runs.

    d loss / d lambda_i = < d loss / d merged, part_i >            part_i = d merged / d lambda_i (`execute.parts`)

The slopes are exact wherever coefficients enter linearly. The slope of one output row is that row's share of the inner
product. Each gradient is used and dropped as soon as it arrives, so only a few tensors of it are held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.execute.parts import unit_recipe
from merge_search.engine.resident.coefficient_maps import n_rows
from merge_search.engine.resident.parameters import parameter_slices, receiving_gradients
from merge_search.errors import RecipeError
from merge_search.memory import BudgetedCache
from merge_search.recipe import Recipe

__all__ = ["Parts", "Slopes"]

_CHUNK = 2**18  # elements of the parts multiplied at a time


class Parts:
    """The parts of a recipe's tensors.

    They stay on the engine's device while they fit, and are computed again otherwise.

    Args:
        engine: The engine that merges the recipe.
        recipe: A recipe that is linear in its coefficients. The values of the coefficients do not matter.
        cache_bytes: Most bytes to keep on the device. None: as many as the engine's budget allows one cache.
    Raises:
        RecipeError: The recipe is not linear in its coefficients, or cannot be merged.
    """

    def __init__(self, engine: MergeEngine, recipe: Recipe, *, cache_bytes: int | None = None) -> None:
        if problems := engine.check(recipe):
            raise RecipeError(problems, where=f"recipe {recipe.preset!r}" if recipe.preset else "recipe")
        self.engine, self.recipe = engine, unit_recipe(recipe)
        self.experts = tuple(recipe.models.experts)
        self.device = engine.tensors.device
        engine.budget.next_turn()
        self._cache: BudgetedCache[tuple[tuple[int, ...], Tensor]] = BudgetedCache(engine.budget, cache_bytes)

    def get(self, name: str) -> tuple[tuple[int, ...], Tensor]:
        """Return the indices (in `experts`) of the experts that can move a tensor, and their parts.

        Returns:
            The indices, and the parts: float32, shape (indices, *shape).
        """
        if (kept := self._cache.get(name)) is not None:
            return kept
        experts, parts = self.engine.parts(self.recipe, name)
        indices = tuple(self.experts.index(e) for e in experts)
        # Nothing is evicted: a learner scans all tensors, which would empty an evicting cache.
        self._cache.put(name, (indices, parts), parts.numel() * parts.element_size())
        return indices, parts

    @torch.no_grad()
    def merged(self, name: str, coefficients: Tensor) -> Tensor:
        """Return base + sum_i lambda_i part_i as a new float32 tensor: the engine's result within rounding.

        Args:
            name: Name of the tensor.
            coefficients: Shape (experts,) or (experts, rows), float32, on the engine's device.
        """
        indices, parts = self.get(name)
        base = self.engine.tensors.base(name)
        out = base.to(self.device, torch.float32, copy=True).reshape(n_rows(base.shape), -1)
        for part, index in zip(parts, indices, strict=True):
            out.addcmul_(part.reshape(out.shape), coefficients[index].reshape(-1, 1))
        return out.reshape(base.shape)


class Slopes:
    """Collects the slopes of losses of a live model whose weights are a recipe's.

    Args:
        parts: The parts of the recipe that the live model holds, whatever its coefficients.
        model: A module whose parameters `views` look into.
        views: Live views by tensor name on disk. Buffers and names that the engine does not merge are ignored.
        rows: Collect one slope per output row instead of one per tensor.
    Attributes:
        values: Slopes by tensor name, float64, on the engine's device. The shape is (experts,), in the order of
            ``recipe.models.experts``, or (experts, rows). A slope is zero where an expert cannot move the tensor.
    Raises:
        WeightsError: A parameter is not contiguous.
        RecipeError: No expert moves any parameter of the model.
    Determinism: sums run in a fixed order. Products are float32; sums are float32 within a row and float64 above.
    Source: the chain rule. AdaMerging (arXiv 2310.02575) computes it per tensor, by autograd through a merged copy.
    """

    def __init__(self, parts: Parts, model: Any, views: Mapping[str, Tensor], *, rows: bool = False) -> None:
        self.parts, self.rows = parts, rows
        tensors = parts.engine.tensors
        moved = {name: view for name, view in views.items() if name in tensors.groups and parts.get(name)[0]}
        self._slices = parameter_slices(model, moved)
        if not self._slices:
            raise RecipeError(
                "no expert of the recipe changes a parameter of the live model: there is nothing to learn"
            )
        self.values: dict[str, Tensor] = {}
        for name in (piece.name for _, pieces in self._slices for piece in pieces):
            shape = (len(parts.experts), n_rows(moved[name].shape)) if rows else (len(parts.experts),)
            self.values[name] = torch.zeros(shape, dtype=torch.float64, device=parts.device)

    def clear(self) -> None:
        """Set all slopes to zero."""
        for value in self.values.values():
            value.zero_()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Add the slopes of every backward pass inside the context to `values`.

        The parameters need gradients inside the context only. Their ``.grad`` is restored on exit.

        Cost: one pass over the parts per backward pass.
        """
        with receiving_gradients(self._slices, self._add):
            yield

    def _add(self, name: str, gradient: Tensor) -> None:
        indices, parts = self.parts.get(name)
        rows = n_rows(gradient.shape)
        gradient = gradient.to(self.parts.device).reshape(rows, -1)
        parts = parts.reshape(len(indices), rows, -1)
        step = max(1, _CHUNK // max(1, len(indices) * gradient.shape[1]))
        sums = [
            (parts[:, at : at + step] * gradient[at : at + step].to(torch.float32)).sum(-1)
            for at in range(0, rows, step)
        ]
        slopes = torch.cat(sums, 1).to(torch.float64)
        for index, per_row in zip(indices, slopes, strict=True):
            self.values[name][index] += per_row if self.rows else per_row.sum()
