"""The models that a transform reads: base and experts, opened lazily, adapters made dense tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_search.engine.checkpoints.compatibility import misfits
from merge_search.engine.checkpoints.hashing import hash_once
from merge_search.engine.checkpoints.headers import CheckpointInfo, TensorHeader, read_checkpoint, resolve_model
from merge_search.engine.checkpoints.layout import layout
from merge_search.recipe import Group, Models

if TYPE_CHECKING:
    from torch import Tensor

    from merge_search.engine.checkpoints.checkpoint import Checkpoint, Expert

__all__ = ["Source", "Sources"]


class Source:
    """One model as a transform reads it.

    Attributes:
        name: ``base``, or the expert's name.
        folder: Its folder.
        problems: Why it is not a fine-tune of the base, a sentence each; () for the base and for what fits it.
        info: Headers and config of the files; an adapter's are those of its factors.
    """

    def __init__(self, name: str, base: CheckpointInfo, folder: Path, problems: tuple[str, ...] = ()) -> None:
        self.name, self.folder, self.problems = name, folder, problems
        self._base = base
        self.info = base if name == "base" else read_checkpoint(folder)

    @cached_property
    def _of(self) -> Checkpoint | Expert:
        from merge_search.engine.checkpoints.checkpoint import Checkpoint, Expert  # load torch, and headers do not

        fits = self.name != "base" and self.fits
        return Expert(Checkpoint(self._base.folder), self.folder, name=self.name) if fits else Checkpoint(self.folder)

    @property
    def fits(self) -> bool:
        """Whether it has the base's tensors: the base, a fine-tune of it, an adapter on it."""
        return not self.problems

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json; for an adapter the base's."""
        return self._base.config if self.info.is_adapter else self.info.config

    @property
    def settings_folder(self) -> Path:
        """The folder whose config and tokenizer files are its own; for an adapter the base's."""
        return self._base.folder if self.info.is_adapter else self.folder

    @cached_property
    def headers(self) -> Mapping[str, TensorHeader]:
        """Dtype and shape of every tensor that `tensor` returns. What fits the base has the base's names and shapes."""
        if self.name == "base" or not self.fits:
            return self.info.tensors
        own = {} if self.info.is_adapter else self.info.tensors
        base = self._base.tensors
        return {n: replace(own.get(n, t), shape=t.shape) for n, t in base.items()}

    @property
    def groups(self) -> dict[str, Group]:
        """Group of every tensor that a merge would touch, by name."""
        return layout(CheckpointInfo(self.folder, self.headers, self.config))

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, on the CPU: of an adapter the adapted weights, of other vocabularies the base's rows.

        Do not write into it.
        """
        of = self._of
        if self.fits and self.name != "base" and not self.info.is_adapter and name not in self.info.tensors:
            return of.base.tensor(name)  # type: ignore[union-attr]
        return of.tensor(name)

    @property
    def is_dense(self) -> bool:
        """Whether its files hold the tensors exactly as `tensor` returns them."""
        return all(map(self._of.is_stored, self.groups))

    @property
    def hash(self) -> str:
        """sha256 of its files' tensors. Computed once per process."""
        return hash_once(self.info)


class Sources:
    """Base and experts of a recipe.

    Args:
        models: Folders or hub ids.

    Attributes:
        base: The base.
        experts: The experts by name, in the recipe's order.

    Raises:
        WeightsError: A folder is not a whole, valid checkpoint.
    Cost: headers, configs and tokenizer files. Tensors are mapped when they are asked for.
    """

    def __init__(self, models: Models) -> None:
        folder = resolve_model(models.base)
        info = read_checkpoint(folder)
        problems = misfits(models.base, models.experts)
        self.base = Source("base", info, folder)
        self.experts = {
            name: Source(name, info, resolve_model(place), tuple(problems.get(name, ())))
            for name, place in models.experts.items()
        }

    def __iter__(self) -> Iterator[Source]:
        yield self.base
        yield from self.experts.values()
