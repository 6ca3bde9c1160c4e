"""Gradients row by row, summed as they arrive, so that a whole gradient of the model is never held beside the sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from merge_search.engine.resident.parameters import parameter_slices, receiving_gradients
from merge_search.engine.statistics.rows import Work
from merge_search.errors import NonFiniteError

__all__ = ["mean_of_gradients"]


def mean_of_gradients(
    work: Work, rule: Callable[[Tensor], Tensor], losses: Iterable[tuple[float, Tensor]] | None = None
) -> dict[str, Tensor]:
    """Return the mean over tasks of the mean over rows of rule(d loss(row) / d tensor).

    Args:
        work: The model, its weights and the rows.
        rule: Element-wise function, float32 in and float32 out.
        losses: Weights and losses in place of those of the rows, one by one. A graph may serve several of them.
    Returns:
        By tensor name: float32, the shape and device of the tensor. Zero where no gradient arrives.
    Raises:
        NonFiniteError: NaN or infinity in a mean; the message names the tensor.
    Cost: one forward and one backward pass per row, and 4 bytes per parameter.
    Determinism: rows come in a fixed order, sums are float32. ``.grad`` and ``requires_grad`` are restored afterwards.
    """
    totals = {name: torch.zeros(v.shape, dtype=torch.float32, device=v.device) for name, v in work.views.items()}
    weight = 0.0

    def add(name: str, gradient: Tensor) -> None:
        totals[name].add_(rule(gradient.to(torch.float32)), alpha=weight)

    with receiving_gradients(parameter_slices(work.model, work.views), add):
        for weight, loss in work.each() if losses is None else losses:  # noqa: B007, read by `add`
            torch.autograd.backward(loss, retain_graph=losses is not None)
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise NonFiniteError(f"gradients must be finite, found NaN or infinity for tensor {name!r}")
    return totals
