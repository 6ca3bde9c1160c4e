"""Where the tensors of a checkpoint lie in the parameters of a live model, and their gradients as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merge_search.errors import WeightsError

__all__ = ["ParameterSlice", "parameter_slices", "receiving_gradients"]


@dataclass(frozen=True)
class ParameterSlice:
    """The elements of a parameter that belong to one tensor on disk.

    Attributes:
        name: Name of the tensor on disk.
        shape: Its shape.
        stride: Its strides in the parameter, in elements.
        offset: Its first element, counted from the parameter's first.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, values: Tensor) -> Tensor:
        """View of this slice in `values`, a contiguous tensor with the parameter's shape."""
        return torch.as_strided(values, self.shape, self.stride, values.storage_offset() + self.offset)


def parameter_slices(model: Any, views: Mapping[str, Tensor]) -> list[tuple[Tensor, list[ParameterSlice]]]:
    """Return every parameter that holds tensors of `views`, with its slices. A tied parameter comes once.

    Args:
        model: The module that owns the parameters.
        views: Live views by tensor name on disk. Views of buffers are ignored.
    Raises:
        WeightsError: A parameter is not contiguous.
    """
    by_storage: dict[int, list[Tensor]] = {}
    for parameter in model.parameters():
        by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)
    slices: dict[int, tuple[Tensor, list[ParameterSlice]]] = {}
    for name, view in views.items():
        for parameter in by_storage.get(view.untyped_storage().data_ptr(), ()):
            offset = int(view.storage_offset()) - int(parameter.storage_offset())
            if not _contains(parameter, view, offset):
                continue
            if not parameter.is_contiguous():
                raise WeightsError(
                    f"the parameter of tensor {name!r} must be contiguous, got strides {parameter.stride()}"
                )
            piece = ParameterSlice(name, tuple(view.shape), view.stride(), offset)
            slices.setdefault(id(parameter), (parameter, []))[1].append(piece)
            break
    return list(slices.values())


def _contains(parameter: Tensor, view: Tensor, offset: int) -> bool:
    """Whether all elements of `view` lie in a parameter of the same storage, `offset` elements after its first."""
    last = offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return parameter.device == view.device and offset >= 0 and last < parameter.numel()


@contextmanager
def receiving_gradients(
    slices: Sequence[tuple[Tensor, Sequence[ParameterSlice]]], receive: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `receive` with the gradient of every tensor on disk, as soon as a backward pass makes it.

    Each gradient of a parameter is dropped after use, so the gradients of the whole model are never held at once.
    Gradients are enabled inside. ``requires_grad`` and ``.grad`` of the parameters are restored on exit.

    Args:
        slices: The parameters and their slices, from `parameter_slices`.
        receive: Called without a graph with the tensor's name and its gradient, a view of the shape on disk.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter, _ in slices]
    handles = []
    try:
        for parameter, pieces in slices:
            parameter.requires_grad_(True).grad = None
            hook = partial(_pass_on, receive, pieces)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, needed_gradient, gradient in before:
            parameter.requires_grad_(needed_gradient).grad = gradient


@torch.no_grad()
def _pass_on(receive: Callable[[str, Tensor], None], pieces: Sequence[ParameterSlice], parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    flat = gradient.contiguous()
    for piece in pieces:
        receive(piece.name, piece.of(flat))
