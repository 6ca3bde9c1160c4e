"""Where the parameters of a module lie on disk, for architectures that transformers renames, splits or stacks.

Adapters name modules. transformers' own rule for saving is run on the addresses of single parameters of a model without
weights: what comes out says which tensors on disk a parameter is made of, and which of its elements each one holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from merge_search.engine.checkpoints.headers import CheckpointInfo
from merge_search.engine.checkpoints.views import affine
from merge_search.errors import WeightsError

__all__ = ["Part", "parts_on_disk", "skeleton"]


@dataclass(frozen=True)
class Part:
    """The tensor `name` on disk is a strided view of a parameter.

    Attributes:
        n_elements: Of the parameter.
        is_whole: It is the parameter: the same shape, every element in its place.
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    n_elements: int
    is_whole: bool

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The view of a contiguous tensor."""
        return torch.as_strided(parameter, self.shape, self.strides, parameter.storage_offset() + self.offset)


def parts_on_disk(base: CheckpointInfo, parameters: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    """Parts of each parameter; a parameter is left out that the model lacks, or whose parts the base's files lack.

    Cost: a model without weights, 8 bytes per element of one parameter at a time.
    """
    wanted = list(parameters)
    model = skeleton(base) if wanted else None
    if model is None:
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {}
    for name in wanted:
        if name not in shapes:
            continue
        address = torch.arange(torch.Size(shapes[name]).numel()).view(shapes[name])
        try:
            parts = [_part(n, a, address) for n, a in revert_weight_conversion(model, {name: address}).items()]
        except WeightsError:  # rearranged: no view of the parameter
            continue
        if all(p.name in base.tensors and base.tensors[p.name].shape == p.shape for p in parts):
            found[name] = tuple(parts)
    return found


def _part(name: str, address: torch.Tensor, parameter: torch.Tensor) -> Part:
    first, strides = affine(name, address)
    return Part(name, tuple(address.shape), tuple(strides), first, parameter.numel(), torch.equal(address, parameter))


def skeleton(base: CheckpointInfo) -> Any:
    """The base's model on the meta device; None where transformers does not know it."""
    import transformers

    names = base.config.get("architectures") or []
    kind = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if kind is None:
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(base.folder), trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            return kind(config) if names else kind.from_config(config)
    except (OSError, ValueError, KeyError, TypeError):
        return None
