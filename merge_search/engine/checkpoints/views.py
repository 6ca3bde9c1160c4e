"""Views of a live model's weights under the names that they have on disk.

transformers renames, splits and stacks tensors when it loads some architectures (fused experts of Mixtral, ViT, LLaVA).
This file runs transformers' own conversion for saving on *addresses* instead of weights: every element holds its
position in the model. The result shows, for each tensor on disk, where in which parameter its elements are. As long as
that is an offset and strides, a view of the parameter is the tensor on disk, and writing into the view is exact.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merge_search._compat.transformers import as_saved, converts_weights
from merge_search.engine.checkpoints.layout import name_groups
from merge_search.errors import WeightsError

__all__ = ["affine", "disk_views", "storages_shared"]


def disk_views(model: Any) -> dict[str, Tensor]:
    """Return live views by name on disk: every parameter and persistent buffer, tied names included.

    Writing into a view under `torch.no_grad` writes into the model.

    Args:
        model: A transformers model made by `from_pretrained`.
    Raises:
        WeightsError: A tensor on disk is not a strided part of one parameter.
    Cost: none where the names are equal; otherwise 8 bytes per element of one block at a time, on the CPU.
    """
    state: dict[str, Tensor] = model.state_dict()
    if not converts_weights(model):
        return dict(state)
    views: dict[str, Tensor] = {}
    for names in _portions(state):
        views.update(_convert(model, {name: state[name] for name in names}))
    return views


def _portions(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names block by block. A conversion never spans two blocks.

    The addresses of one block fit in memory; those of the whole model may not.
    """
    groups = name_groups(state)
    portions: dict[int | None, list[str]] = {}
    for name in state:
        portions.setdefault(groups[name].block, []).append(name)
    return list(portions.values())


def _convert(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the views of the tensors on disk that `state` is saved as.

    Raises:
        WeightsError: A tensor on disk is not a strided part of one parameter.
    """
    addresses, starts, parameters, n = {}, [], [], 0
    for name, tensor in state.items():
        if not tensor.is_contiguous():
            raise WeightsError(f"parameter {name!r} must be contiguous in memory, got strides {tensor.stride()}")
        addresses[name] = torch.arange(n, n + tensor.numel()).view(tensor.shape)
        if tensor.numel():
            starts.append(n)
            parameters.append(tensor)
        n += tensor.numel()
    views = {}
    for name, address in as_saved(model, addresses).items():
        if address.numel() == 0:
            continue
        first, strides = affine(name, address)
        index = bisect_right(starts, first) - 1
        parameter, offset = parameters[index], first - starts[index]
        last = offset + sum((size - 1) * stride for size, stride in zip(address.shape, strides, strict=True))
        if last >= parameter.numel():
            raise WeightsError(f"tensor {name!r} must lie in one parameter of the model, but spans several; {_HINT}")
        views[name] = torch.as_strided(parameter, address.shape, strides, parameter.storage_offset() + offset)
    return views


_HINT = "this architecture cannot be written in place"


def affine(name: str, address: Tensor) -> tuple[int, list[int]]:
    """Return first address and strides of a tensor of addresses.

    Raises:
        WeightsError: An offset and strides do not describe all of the tensor.
    """
    first = int(address[(0,) * address.dim()])
    strides = []
    for d, size in enumerate(address.shape):
        step = [0] * address.dim()
        step[d] = 1
        strides.append(int(address[tuple(step)]) - first if size > 1 else math.prod(address.shape[d + 1 :]))
    expected = torch.full((), first)
    for d, (size, stride) in enumerate(zip(address.shape, strides, strict=True)):
        shape = [1] * address.dim()
        shape[d] = size
        expected = expected + (torch.arange(size) * stride).view(shape)
    if any(s < 0 for s in strides) or not torch.equal(expected, address):
        raise WeightsError(
            f"tensor {name!r} must be a strided part of a parameter, but transformers rearranges it; {_HINT}"
        )
    return first, strides


def storages_shared(views: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return pairs of names whose views begin at the same position of the same storage: tied tensors."""
    seen: dict[tuple[object, ...], str] = {}
    pairs = []
    for name, view in views.items():
        key = (view.data_ptr(), view.storage_offset(), view.shape)
        if view.numel() and key in seen:
            pairs.append((seen[key], name))
        seen.setdefault(key, name)
    return pairs
