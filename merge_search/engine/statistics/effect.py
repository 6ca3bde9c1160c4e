"""Causal effect of every part of an expert on its loss, with the base's other weights or without them.

A part p is the model, a block, a block's module kind or a tensor (`recipe.Group.key`). With L the loss of a row,
theta_0 the base, theta_t the expert and delta their difference, the setting ``form`` selects

    activation    L(theta_0 with theta_t on p) - L(theta_0)        what p of the expert does in the base
    ablation      L(theta_t with theta_0 on p) - L(theta_t)        what the expert lacks without p
    gradient      < delta on p, gradient of L at theta_0 >         activation to first order; signs may cancel within p

The first two are exact and cost (1 + number of parts) forward passes a row, the third one backward pass.
Source: APL, arXiv 2408.09485 (causal intervention on model, layer and module partitions; gradient of the pretrained
model). No code was released, and the exact forms are reconstructed from the paper's abstract and digests: UNVERIFIED.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.resident.parameters import parameter_slices, receiving_gradients
from merge_search.engine.statistics.rows import Work, is_changed
from merge_search.errors import NonFiniteError

__all__ = ["measure"]


def measure(work: Work, form: str, partition: str) -> dict[str, Tensor]:
    """Return by tensor name (mean change, mean of |change|) of its part over the rows: float32, shape (2,).

    Zeros for the tensors of a part that the expert left as it was; such a part is not asked about.

    Args:
        work: The live model, which holds the base. It holds any weights afterwards.
        form: ``gradient``, ``activation`` or ``ablation``.
        partition: As `recipe.Group.key` takes it.
    Raises:
        NonFiniteError: A change is NaN or infinite; the message names the part.
    """
    assert work.models is not None
    parts: dict[str, list[str]] = {}
    for name in work.views:
        if is_changed(work.models, work.expert, name):
            parts.setdefault(work.groups[name].key(partition), []).append(name)
    work.on_asked((3 if form == "gradient" else 1 + len(parts)) * work.n_rows)
    changes = _first_order(work, parts) if form == "gradient" else _exact(work, parts, is_ablation=form == "ablation")
    weights = torch.tensor(work.weights, dtype=torch.float64)
    values = torch.stack([changes @ weights, changes.abs() @ weights], 1)
    for part, value in zip(parts, values, strict=True):
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"changes of the loss must be finite, found NaN or infinity for part {part!r}")
    by_part = dict(zip(parts, values.to(torch.float32), strict=True))
    nothing = torch.zeros(2)
    return {name: by_part.get(work.groups[name].key(partition), nothing).clone() for name in work.views}


def _first_order(work: Work, parts: dict[str, list[str]]) -> Tensor:
    """Return < delta, gradient > of every part and row: float64, shape (parts, rows). Products are float64."""
    assert work.models is not None
    base, expert, place = work.models.base, work.models.expert, {n: i for i, p in enumerate(parts.values()) for n in p}
    changes = torch.zeros(len(parts), work.n_rows, dtype=torch.float64)
    at = 0

    def add(name: str, gradient: Tensor) -> None:
        delta = expert(work.expert, name).to(gradient.device, torch.float64) - base(name).to(gradient.device)
        changes[place[name], at] += float((delta * gradient.to(torch.float64)).sum())

    with receiving_gradients(parameter_slices(work.model, {name: work.views[name] for name in place}), add):
        for at, (_, loss) in enumerate(work.each()):  # noqa: B007, read by `add`
            torch.autograd.backward(loss)
    return changes


@torch.no_grad()
def _exact(work: Work, parts: dict[str, list[str]], *, is_ablation: bool) -> Tensor:
    """Return the change of the loss by every part, row by row: float64, shape (parts, rows)."""
    models = work.models
    assert models is not None

    def write(names: list[str], *, from_expert: bool) -> None:
        for name in names:
            work.views[name].copy_(models.expert(work.expert, name) if from_expert else models.base(name))

    def losses() -> Tensor:
        return torch.tensor([float(loss) for _, loss in work.each()], dtype=torch.float64)

    if is_ablation:
        for names in parts.values():
            write(names, from_expert=True)
    before, changes = losses(), torch.zeros(len(parts), work.n_rows, dtype=torch.float64)
    for i, names in enumerate(parts.values()):
        write(names, from_expert=not is_ablation)
        changes[i] = losses() - before
        write(names, from_expert=is_ablation)
    return changes
