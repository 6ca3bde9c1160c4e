"""Which coefficients share one number: the map between a learner's flat vector, the tensors of a model and a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from merge_search.engine.learners.slopes import Parts
from merge_search.engine.methods.outside import Call
from merge_search.engine.resident.coefficient_maps import n_rows, rows_of, write_map
from merge_search.errors import NonFiniteError, RecipeError
from merge_search.recipe import Group, Recipe
from merge_search.rules import GRANULARITIES

__all__ = ["Granularity", "PerGroup", "PerRow", "make_granularity"]


class Granularity(Protocol):
    """A vector of coefficients and what it means.

    Attributes:
        start: The coefficients of the recipe. Shape (n,), float64, on the device on which a learner steps.
        needs_rows: Whether `gradient` needs slopes per output row.
        together: By coefficient, the number of the set that also moves as one (`fit.State`): int64, shape (n,). None:
            every coefficient moves alone.
    """

    start: Tensor
    needs_rows: bool
    together: Tensor | None

    def gradient(self, slopes: Mapping[str, Tensor]) -> Tensor:
        """Return the slopes of the vector, shape (n,), float64. Tensors missing from `slopes` contribute zero."""
        ...

    def coefficients(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the coefficients of every tensor that an expert can move.

        Yields:
            float32 coefficients of shape (experts,) or (experts, rows).
        """
        ...

    def recipe(self, vector: Tensor) -> Recipe:
        """Return the recipe with these coefficients as plain numbers."""
        ...


def make_granularity(per: str, parts: Parts, recipe: Recipe, *, map_folder: str | Path | None = None) -> Granularity:
    """Return the granularity named `per`.

    Args:
        per: One of `rules.GRANULARITIES`.
        parts: The parts of the recipe.
        recipe: The recipe whose coefficients are the start.
        map_folder: Folder into which ``row`` writes maps. The engine's tensors look for maps there from now on.
    Raises:
        RecipeError: `per` is ``row`` and `map_folder` is None.
        RuleError: A granularity from outside failed, or returned no text.
    """
    if per != "row":
        return PerGroup(per, parts, recipe)
    if map_folder is None:
        raise RecipeError("coefficients per row are kept in a map: give the folder for it, or learn per tensor")
    folder = Path(map_folder)
    parts.engine.tensors.look_for_maps(folder)
    return PerRow(parts, recipe, folder)


class PerGroup:
    """One number per expert and group of tensors.

    A map of the recipe stays, and each of its rows is multiplied by its group's number. Outside blocks, ``block`` and
    ``block_kind`` have one number per module kind (embedding, head, norm). A group starts at the size-weighted mean of
    its tensors' coefficients in the recipe. With a granularity from outside the recipe has each tensor's number.
    """

    together: Tensor | None = None

    def __init__(self, per: str, parts: Parts, recipe: Recipe) -> None:
        self._recipe, self._experts = recipe, parts.experts
        tensors = parts.engine.tensors
        self._keys: dict[tuple[str, str], int] = {}
        self._index: dict[str, Tensor] = {}
        self._recipe_keys: dict[str, dict[str, None]] = {}  # by key: where its number stands in a recipe
        values: list[list[tuple[float, int]]] = []
        for name, group in tensors.groups.items():
            movers = parts.get(name)[0]
            key = _key(per, group)
            self._recipe_keys.setdefault(key, {})[name if GRANULARITIES[per].is_outside else key] = None
            index = [self._keys.setdefault((e, key), len(self._keys)) for e in parts.experts]
            values += [[] for _ in range(len(self._keys) - len(values))]
            for i, (expert, at) in enumerate(zip(parts.experts, index, strict=True)):
                size = tensors.base(name).numel() if i in movers else 0
                values[at].append((recipe.coefficient(expert, group), size))
            if movers:
                self._index[name] = torch.tensor(index)
        self.start = torch.tensor([_mean(v) for v in values], dtype=torch.float64)  # CPU: see `gradient`
        self._device = parts.device
        self._maps = {name: maps for name in self._index if (maps := _maps(parts, recipe, name)) is not None}
        self.needs_rows = bool(self._maps)

    def gradient(self, slopes: Mapping[str, Tensor]) -> Tensor:
        names = [name for name in self._index if name in slopes]
        index = torch.cat([self._index[name] for name in names])
        if self._maps:
            per_tensor = [(slopes[name] * self._maps[name]).sum(1) for name in names]
        else:
            per_tensor = [slopes[name] for name in names]
        # NOTE: on the CPU. On a GPU `index_add_` sums in a varying order, which would change the last bits.
        return torch.zeros_like(self.start).index_add_(0, index, torch.cat(per_tensor).cpu())

    def coefficients(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        single = vector.to(torch.float32)
        for name, index in self._index.items():
            values = single[index].to(self._device)
            yield name, values if name not in self._maps else values[:, None] * self._maps[name]

    def recipe(self, vector: Tensor) -> Recipe:
        numbers = vector.tolist()
        _require_finite(numbers)
        tables: dict[str, float | dict[str, float]] = {}
        for expert in self._experts:
            learned = {
                k: numbers[at] for (e, key), at in self._keys.items() if e == expert for k in self._recipe_keys[key]
            }
            before = self._recipe.coefficients.get(expert, 1.0)
            rest = before["*"] if isinstance(before, dict) else before
            tables[expert] = learned["*"] if learned.keys() == {"*"} else {**learned, "*": rest}
        return _with(self._recipe, tables, dict(self._recipe.maps))


class PerRow:
    """One number per expert, tensor and output row, in maps. The recipe's own coefficients become 1.

    The rows of a tensor also move together, expert by expert.
    """

    needs_rows = True

    def __init__(self, parts: Parts, recipe: Recipe, folder: Path) -> None:
        self._recipe, self._parts, self._folder = recipe, parts, folder
        tensors, n = parts.engine.tensors, 0
        self._where: dict[str, tuple[int, int]] = {}
        pieces: list[Tensor] = []
        sets: list[Tensor] = []
        for name in tensors.groups:
            if not parts.get(name)[0]:
                continue
            start = _start_rows(parts, recipe, name)
            self._where[name] = (n, n + start.numel())
            n += start.numel()
            pieces.append(start.reshape(-1))
            first = len(sets) * len(parts.experts)
            sets.append((first + torch.arange(len(parts.experts))).repeat_interleave(start.shape[1]))
        self.start = torch.cat(pieces).to(torch.float64)
        self.together: Tensor | None = torch.cat(sets).to(self.start.device)

    def _part(self, vector: Tensor, name: str) -> Tensor:
        at, end = self._where[name]
        return vector[at:end].reshape(len(self._parts.experts), -1)

    def gradient(self, slopes: Mapping[str, Tensor]) -> Tensor:
        result = torch.zeros_like(self.start)
        for name in self._where:
            if name in slopes:
                self._part(result, name).copy_(slopes[name])
        return result

    def coefficients(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        single = vector.to(torch.float32)
        for name in self._where:
            yield name, self._part(single, name)

    def recipe(self, vector: Tensor) -> Recipe:
        _require_finite(vector.tolist())
        learned = dict(self.coefficients(vector.cpu()))
        maps = {}
        for i, expert in enumerate(self._parts.experts):
            tensors = {}
            for name in self._parts.engine.tensors.groups:
                rows = learned[name] if name in learned else _start_rows(self._parts, self._recipe, name)
                tensors[name] = rows[i]
            maps[expert] = write_map(self._folder, tensors)
        return _with(self._recipe, dict.fromkeys(self._parts.experts, 1.0), maps)


def _key(per: str, group: Group) -> str:
    """Return what tensors share that share a number; of a built-in granularity, the key of a recipe's `PerGroup`."""
    row = GRANULARITIES[per]
    if not row.is_outside:
        return group.key("model" if per == "expert" else per)
    call = Call("granularity", row, group)
    part = call({}, group, given=())
    if not isinstance(part, str):
        call.refuse(f"must be a text, got {type(part).__name__}")
    return part


def _mean(values: list[tuple[float, int]]) -> float:
    """Return the mean of (value, size) pairs weighted by size.

    A value that all share comes back exactly. If all sizes are zero, the first value comes back.
    """
    total = sum(n for _, n in values)
    if not total or len({v for v, n in values if n}) == 1:
        return next((v for v, n in values if n), values[0][0])
    return math.fsum(v * n for v, n in values) / total


def _maps(parts: Parts, recipe: Recipe, name: str) -> Tensor | None:
    """Return the recipe's maps for a tensor; None if no expert has one.

    Returns:
        Shape (experts, rows), float32, with ones for experts without a map.
    """
    if not recipe.maps:
        return None
    maps = [rows_of(parts.engine.tensors, recipe, expert, name) for expert in parts.experts]
    ones = torch.ones(n_rows(parts.engine.tensors.base(name).shape), device=parts.device)
    return torch.stack([ones if rows is None else rows for rows in maps])


def _start_rows(parts: Parts, recipe: Recipe, name: str) -> Tensor:
    """Return the recipe's coefficients of a tensor per row: float32, shape (experts, rows)."""
    tensors = parts.engine.tensors
    numbers = [recipe.coefficient(expert, tensors.groups[name]) for expert in parts.experts]
    column = torch.tensor(numbers, dtype=torch.float32, device=parts.device)[:, None]
    maps = _maps(parts, recipe, name)
    return column.repeat(1, n_rows(tensors.base(name).shape)) if maps is None else column * maps


def _require_finite(numbers: list[float]) -> None:
    if bad := sum(not math.isfinite(v) for v in numbers):
        raise NonFiniteError(
            f"learned coefficients must be finite, found NaN or infinity in {bad} of {len(numbers)}; take smaller steps"
        )


def _with(recipe: Recipe, coefficients: dict[str, float | dict[str, float]], maps: dict[str, str]) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(), "coefficients": coefficients, "maps": maps})
