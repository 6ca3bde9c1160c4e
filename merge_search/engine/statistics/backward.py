"""Gradients row by row, summed as they arrive, so that one gradient of the model is never held whole beside the sum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from merge_search.engine.learners.slopes import Place, parameter_places
from merge_search.engine.statistics.rows import Work
from merge_search.errors import NonFiniteError

__all__ = ["mean_of_gradients"]


def mean_of_gradients(work: Work, rule: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """mean over tasks of the mean over rows of rule(d loss(row) / d tensor).

    Args:
        rule: Element-wise; float32 in, float32 out.
    Returns:
        By tensor name, float32, shape of the tensor, on its device; zero where no gradient arrives.
    Raises:
        NonFiniteError: NaN or infinity, naming the tensor.
    Cost: one forward and one backward per row; 4 bytes per parameter.
    Determinism: rows in a fixed order, sums in float32. ``.grad`` and ``requires_grad`` are as before afterwards.
    """
    totals = {name: torch.zeros(v.shape, dtype=torch.float32, device=v.device) for name, v in work.views.items()}
    found = parameter_places(work.model, work.views)
    before = [(p, p.requires_grad, p.grad) for p, _ in found]
    handles = []
    weight = 0.0

    @torch.no_grad()
    def arrive(places: list[Place], parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        flat = gradient.contiguous()
        for place in places:
            mine = torch.as_strided(flat, place.shape, place.stride, flat.storage_offset() + place.offset)
            totals[place.name].add_(rule(mine.to(torch.float32)), alpha=weight)

    try:
        for parameter, places in found:
            parameter.requires_grad_(True).grad = None
            hook = partial(arrive, places)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        with torch.enable_grad():
            for weight, loss in work.each():  # noqa: B007, read by `arrive`
                torch.autograd.backward(loss())
    finally:
        for handle in handles:
            handle.remove()
        for parameter, needed, gradient in before:
            parameter.requires_grad_(needed).grad = gradient
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise NonFiniteError(f"gradients must be finite, found NaN or infinity for tensor {name!r}")
    return totals
