"""Where the parameters of a module are on disk, for architectures that transformers renames, splits or stacks.

Adapters name modules. This file runs transformers' own conversion for saving on the addresses of single parameters of a
model without weights. The result shows which tensors on disk a parameter is made of, and which of its elements each one
holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from merge_search._compat.transformers import as_saved
from merge_search.engine.architectures import model_class
from merge_search.engine.checkpoints.headers import CheckpointInfo
from merge_search.engine.checkpoints.views import affine
from merge_search.errors import WeightsError

__all__ = ["Part", "parts_on_disk", "skeleton"]


@dataclass(frozen=True)
class Part:
    """A tensor on disk that is a strided view of a parameter.

    Attributes:
        name: Name of the tensor on disk.
        shape: Its shape.
        strides: Its strides in the parameter, in elements.
        offset: Its first element in the parameter.
        n_elements: Number of elements of the parameter.
        is_whole: Whether it is the parameter itself: the same shape, every element in its place.
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    n_elements: int
    is_whole: bool

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the view of a contiguous tensor."""
        return torch.as_strided(parameter, self.shape, self.strides, parameter.storage_offset() + self.offset)


def parts_on_disk(base: CheckpointInfo, parameters: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    """Return the parts of each parameter.

    Parameters that the model lacks, or whose parts the base's files lack, are left out.

    Args:
        base: The base's headers and config.
        parameters: Names of parameters in the model.
    Cost: a model without weights, and 8 bytes per element of one parameter at a time.
    """
    wanted = list(parameters)
    model = skeleton(base) if wanted else None
    if model is None:
        return {}
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    parts_of = {}
    for name in wanted:
        if name not in shapes:
            continue
        address = torch.arange(torch.Size(shapes[name]).numel()).view(shapes[name])
        try:
            parts = [_part(n, a, address) for n, a in as_saved(model, {name: address}).items()]
        except WeightsError:  # the tensors on disk are no views of the parameter
            continue
        if all(p.name in base.tensors and base.tensors[p.name].shape == p.shape for p in parts):
            parts_of[name] = tuple(parts)
    return parts_of


def _part(name: str, address: torch.Tensor, parameter: torch.Tensor) -> Part:
    first, strides = affine(name, address)
    return Part(name, tuple(address.shape), tuple(strides), first, parameter.numel(), torch.equal(address, parameter))


def skeleton(base: CheckpointInfo) -> Any:
    """Return the base's model on the meta device; None where neither transformers nor this package knows it."""
    import transformers

    names = base.config.get("architectures") or []
    try:
        kind = model_class(base.config)
        if kind is None:
            return None
        config = transformers.AutoConfig.from_pretrained(
            str(base.folder), trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            return kind(config) if names else kind.from_config(config)
    except (OSError, ValueError, KeyError, TypeError):
        return None
