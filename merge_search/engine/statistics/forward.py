"""The inputs of every matrix of the live model, observed while it runs.

Calls are observed, not modules, and a matrix is recognised by its address. So fused projections, routers and experts
that a model slices out of one parameter are told apart by their names on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from merge_search.engine.statistics.rows import Work
from merge_search.errors import NonFiniteError

__all__ = ["Role", "mean_over_inputs"]

Role = Literal["linear", "conv1d", "embedding"]
"""How a matrix is used: x W^T with W (out, in); x W with W (in, out), as in GPT-2; rows looked up."""

Rule = Callable[[Role, Tensor, Tensor], Tensor | None]
_Key = tuple[str, Role]


def mean_over_inputs(work: Work, rule: Rule, *, prompts: bool = False) -> dict[_Key, Tensor]:
    """Return the mean over tasks of (sum of rule over all calls) / (number of inputs).

    Args:
        work: The model and the rows.
        rule: (role, inputs, matrix) -> a sum over inputs, or None if the role does not matter. Inputs have shape (n,
            in) and the model's dtype. For an embedding they are the looked-up rows: shape (n,), int64.
        prompts: Put the prompts alone to the model, and no right answers (`TaskRows.ask`).
    Returns:
        By tensor name on disk and role, in the rule's dtype. Matrices that no row reaches are left out.
    Raises:
        NonFiniteError: NaN or infinity in a mean; the message names the tensor.
    Cost: one forward pass per row, without gradients. Rows run one by one, so there is no padding.
    """
    means: dict[_Key, Tensor] = {}
    n_tasks: dict[_Key, int] = {}
    for task in work.tasks:
        watch = _Watch(work.views, rule)
        with torch.no_grad(), watch:
            for row in task.rows:
                (task.ask or task.loss if prompts else task.loss)([row])
        for key, total in watch.sums.items():
            mean = total / watch.counts[key]
            if not bool(torch.isfinite(mean).all()):
                raise NonFiniteError(f"inputs of a matrix must be finite, found NaN or infinity for tensor {key[0]!r}")
            means[key] = means[key] + mean if key in means else mean
            n_tasks[key] = n_tasks.get(key, 0) + 1
    return {key: mean / n_tasks[key] for key, mean in means.items()}


class _Watch(TorchFunctionMode):
    """Sums of a rule over the inputs of every named matrix."""

    def __init__(self, views: Mapping[str, Tensor], rule: Rule) -> None:
        super().__init__()
        self.sums: dict[_Key, Tensor] = {}
        self.counts: dict[_Key, int] = {}
        self._rule = rule
        self._views: dict[int, list[tuple[str, Tensor]]] = {}
        for name, view in views.items():
            if view.ndim == 2:
                self._views.setdefault(view.untyped_storage().data_ptr(), []).append((name, view))
        self._known: dict[tuple[Any, ...], list[str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is functional.linear:
            self._add("linear", *_named(args, kwargs, "input", "weight"))
        elif func is functional.embedding:
            self._add("embedding", *_named(args, kwargs, "input", "weight"))
        elif func is torch.addmm and len(args) >= 3:
            self._add("conv1d", args[1], args[2])
        return out

    def _add(self, role: Role, inputs: Tensor, weight: Tensor) -> None:
        names = self._names(weight)
        if not names:
            return
        rows = inputs.detach().reshape(-1) if role == "embedding" else inputs.detach().reshape(-1, inputs.shape[-1])
        total = self._rule(role, rows, weight)
        if total is None:
            return
        for name in names:
            key = (name, role)
            self.sums[key] = self.sums[key] + total if key in self.sums else total
            self.counts[key] = self.counts.get(key, 0) + len(rows)

    def _names(self, weight: Tensor) -> list[str]:
        """Return the tensors on disk that are rows of `weight`, all or some of them."""
        if weight.ndim != 2 or weight.layout is not torch.strided:
            return []
        key = (weight.data_ptr(), tuple(weight.shape), weight.stride())
        if key not in self._known:
            candidates = self._views.get(weight.untyped_storage().data_ptr(), [])
            self._known[key] = [name for name, view in candidates if _is_rows_of(view, weight)]
        return self._known[key]


def _named(args: Any, kwargs: Any, first: str, second: str) -> tuple[Tensor, Tensor]:
    return (args[0] if args else kwargs[first], args[1] if len(args) > 1 else kwargs[second])


def _is_rows_of(view: Tensor, weight: Tensor) -> bool:
    """Return whether `view` is a range of whole rows of `weight`, which shares its storage."""
    has_same_columns = view.shape[1] == weight.shape[1] and view.stride() == weight.stride()
    if not has_same_columns or weight.stride(1) != 1:
        return False
    start = int(view.storage_offset()) - int(weight.storage_offset())
    row, rest = divmod(start, weight.stride(0))
    return start >= 0 and rest == 0 and row + view.shape[0] <= weight.shape[0]
