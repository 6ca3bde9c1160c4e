"""What candidates of one transform are made on: its models, their engine and their live model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.learners.expert_labels import ExpertLabels
from merge_search.engine.resident.live_model import LiveModel
from merge_search.engine.resident.pool import ModelPool, chosen_device
from merge_search.engine.statistics.provider import DataStatistics
from merge_search.engine.transforms.store import transformed
from merge_search.errors import RecipeError
from merge_search.recipe import Models, Recipe, Transform

__all__ = ["Bench"]


class Bench:
    """One set of models in memory: a recipe's own, or those that its transform makes.

    Args:
        recipe: Any recipe of these models and this transform.
        device: As in the study file.
        dtype: As in the study file.
        map_folder: Where the maps of recipes are looked for.
        transforms: Where results of transforms are kept.

    Attributes:
        transform: The recipes' transform.
        folder: Folder of the live model's checkpoint.
        live: The live model.
        labels: Answers of the experts, for fits.
        statistics: What was measured on data; None before the teachers are known.
        notes: Sentences about the models' memory and the live model, for the user.
    """

    def __init__(
        self, recipe: Recipe, *, device: str, dtype: str | None, map_folder: Path, transforms: Path,
        evaluators: Sequence[object],
    ) -> None:  # fmt: skip
        self.transform: Transform | None = recipe.transform
        models, self._base = recipe.models.model_copy(update={"hashes": {}}), ""
        if recipe.transform is not None:
            made = transformed(recipe, transforms)
            self._base = str(made.base)
            if made.experts:
                models = Models(base=self._base, experts={e: str(path) for e, path in made.experts.items()})
        self._pool = None
        if recipe.transform is None or made.experts:
            self._pool = ModelPool(models, device=device, map_folders=[map_folder])
        self.folder = self._pool.base_folder if self._pool is not None else Path(self._base)
        on = self._pool.device if self._pool is not None else chosen_device(device)
        self.live = LiveModel.load(self.folder, device=on, dtype=dtype)
        self.labels = ExpertLabels(evaluators)
        self.statistics: DataStatistics | None = None
        self.notes = [*([self._pool.placement_report, *self._pool.notes] if self._pool else []), *self.live.notes]

    @property
    def merges(self) -> bool:
        """Whether recipes are merged here. Without, the live model is the result."""
        return self._pool is not None

    @property
    def pool(self) -> ModelPool:
        """The models that are merged.

        Raises:
            RecipeError: The transform left nothing to merge.
        """
        if self._pool is None:
            raise RecipeError(f"the transform {self.transform and self.transform.name!r} leaves nothing to merge")
        return self._pool

    @cached_property
    def engine(self) -> MergeEngine:
        """The engine on these models."""
        return MergeEngine(self.pool)

    @cached_property
    def views(self) -> dict[str, Tensor]:
        """Live views of what is merged; of everything where nothing is."""
        views = self.live.views
        return {n: view for n, view in views.items() if n in self.pool.groups} if self._pool is not None else views

    def splice(self, recipe: Recipe) -> tuple[str, float]:
        """Write `recipe` into the live model. Returns the hash of its weights, and the seconds that it took."""
        began = time.perf_counter()
        if self._pool is not None:
            self.engine.apply(recipe, self.views)
        return self.live.hash(), time.perf_counter() - began

    @property
    def asked(self) -> int:
        """Questions of the live model for statistics and teachers' answers."""
        return self.labels.asked + (0 if self.statistics is None else self.statistics.questions)

    def forget(self) -> None:
        """Drop what the engine keeps of a job that failed."""
        if self._pool is not None:
            self.engine.forget()

    def free(self) -> None:
        """Give the live model's memory back, also where an evaluator still holds the model. It is not used any more."""
        model = self.live.model
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
