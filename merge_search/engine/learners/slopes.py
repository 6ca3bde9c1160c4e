"""Slopes: d loss / d coefficient of every expert, tensor by tensor, while a backward pass runs.

    d loss / d lambda_i = < d loss / d merged, part_i >            part_i = d merged / d lambda_i (`parts`)

exact wherever coefficients enter linearly; per output row, each row's share of the inner product. A gradient is used and
dropped as soon as it arrives, so that never more than a few tensors of it are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.execute.parts import unit_recipe
from merge_search.engine.resident.coefficient_maps import n_rows
from merge_search.errors import RecipeError, WeightsError
from merge_search.memory import BudgetedCache
from merge_search.recipe import Recipe

__all__ = ["Parts", "Place", "Slopes", "parameter_places"]

_CHUNK = 2**18  # elements of the parts that are multiplied at once


class Parts:
    """The parts of a recipe's tensors, kept on the engine's device while they fit, else made anew when asked for.

    Args:
        recipe: Linear in its coefficients, which do not matter.
        cache_bytes: Most bytes; None: what the engine's budget allows one cache.
    Raises:
        RecipeError: the recipe is not linear in its coefficients, or cannot be merged.
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
        """Places (in `experts`) of those that can move a tensor, and their parts: float32, shape (places, *shape)."""
        if (kept := self._cache.get(name)) is not None:
            return kept
        experts, parts = self.engine.parts(self.recipe, name)
        made = tuple(self.experts.index(e) for e in experts), parts
        self._cache.put(
            name, made, parts.numel() * parts.element_size()
        )  # a sweep over all tensors: the first are kept
        return made

    @torch.no_grad()
    def merged(self, name: str, coefficients: Tensor) -> Tensor:
        """base + sum_i lambda_i part_i, new, float32: the engine's result within rounding.

        Args:
            coefficients: Shape (experts,) or (experts, rows), float32, on the engine's device.
        """
        places, parts = self.get(name)
        base = self.engine.tensors.base(name)
        out = base.to(self.device, torch.float32, copy=True).reshape(n_rows(base.shape), -1)
        for part, place in zip(parts, places, strict=True):
            out.addcmul_(part.reshape(out.shape), coefficients[place].reshape(-1, 1))
        return out.reshape(base.shape)


@dataclass(frozen=True)
class Place:
    """Where a tensor on disk lies among the elements of a parameter."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Slopes:
    """Collects the slopes of losses of a live model whose weights are a recipe's.

    Attributes:
        values: Tensor name -> slopes on the engine's device, float64: shape (experts,), in the order of
            ``recipe.models.experts``, or (experts, rows). Zero where an expert cannot move a tensor.

    Args:
        parts: Of the recipe that the live model holds, whatever its coefficients.
        model: A module whose parameters `views` look into.
        views: By tensor name on disk; names that the engine does not merge, and buffers, are left out.
        rows: One slope per output row instead of one per tensor.
    Raises:
        WeightsError: a parameter is not contiguous.
        RecipeError: no parameter of the model is moved by any expert.
    Determinism: sums run in a fixed order; products are float32, sums float32 over a row, float64 above.
    Source: the chain rule; AdaMerging (arXiv 2310.02575) has it per tensor, by autograd through a merged copy.
    """

    def __init__(self, parts: Parts, model: Any, views: Mapping[str, Tensor], *, rows: bool = False) -> None:
        self.parts, self.rows = parts, rows
        tensors = parts.engine.tensors
        mine = {name: view for name, view in views.items() if name in tensors.groups and parts.get(name)[0]}
        self._places = parameter_places(model, mine)
        if not self._places:
            raise RecipeError(
                "no expert of the recipe changes a parameter of the live model: there is nothing to learn"
            )
        self.values: dict[str, Tensor] = {}
        for name in (place.name for _, places in self._places for place in places):
            shape = (len(parts.experts), n_rows(mine[name].shape)) if rows else (len(parts.experts),)
            self.values[name] = torch.zeros(shape, dtype=torch.float64, device=parts.device)

    def clear(self) -> None:
        """Set all slopes to zero."""
        for value in self.values.values():
            value.zero_()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Slopes of every backward pass inside are added to `values`; parameters need gradients only inside.

        ``.grad`` of the parameters is None afterwards. Cost: one pass over the parts per backward pass.
        """
        before = [(p, p.requires_grad) for p, _ in self._places]
        handles = []
        try:
            for parameter, places in self._places:
                parameter.requires_grad_(True).grad = None
                hook = partial(self._arrive, places)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, needed in before:
                parameter.grad = None
                parameter.requires_grad_(needed)

    @torch.no_grad()
    def _arrive(self, places: Sequence[Place], parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        flat = gradient.contiguous()
        for place in places:
            offset = flat.storage_offset() + place.offset
            self._add(place.name, torch.as_strided(flat, place.shape, place.stride, offset))

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
        found = torch.cat(sums, 1).to(torch.float64)
        for place, mine in zip(indices, found, strict=True):
            self.values[name][place] += mine if self.rows else mine.sum()


def parameter_places(model: Any, views: Mapping[str, Tensor]) -> list[tuple[Tensor, list[Place]]]:
    """Parameters of a module and the tensors on disk that lie in each; a tied parameter comes once.

    Raises:
        WeightsError: a parameter is not contiguous.
    """
    by_storage: dict[int, list[Tensor]] = {}
    for parameter in model.parameters():  # a tied one comes once
        by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)
    found: dict[int, tuple[Tensor, list[Place]]] = {}
    for name, view in views.items():
        for p in by_storage.get(view.untyped_storage().data_ptr(), ()):
            offset = int(view.storage_offset()) - int(p.storage_offset())
            last = offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
            if p.device == view.device and offset >= 0 and last < p.numel():
                if not p.is_contiguous():
                    raise WeightsError(f"the parameter of tensor {name!r} must be contiguous, got strides {p.stride()}")
                place = Place(name, tuple(view.shape), view.stride(), offset)
                found.setdefault(id(p), (p, []))[1].append(place)
                break
    return list(found.values())
