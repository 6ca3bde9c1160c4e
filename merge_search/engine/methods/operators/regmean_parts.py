"""RegMean in parts: every expert counts by its effect on its own outputs, measured on a few prompts without answers."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.matrix import oriented, right_divide
from merge_search.engine.methods.operators.remember import remembered
from merge_search.errors import NotMeasuredError, RecipeError

__all__ = ["parts"]

_TINY = 1e-300
_LAYER_RIDGE = 0.01


@remembered("regmean_parts")
def parts(context: OperatorContext) -> list[Tensor]:
    """The least-squares match of all experts' layer outputs, as one processed delta per expert.

        e_i    = tr(tau_i G_i tau_i^T)                        change of expert i's outputs on its own prompts
        w_i    = 1 / e_i
        S      = sum_i w_i G_i,   r = ridge * mean diag S
        part_i = (w_i tau_i G_i + r lam_i tau_i) (S + r I)^-1
        gain   = n / sum_i (<M G_i, tau_i> / e_i),   M = sum_i part_i
        processed_i = gain^p part_i                           p: option ``gain``

    G_i is the statistic ``prompt_gram`` of expert i: X^T X / n of the layer's inputs. lam solves the layer's
    least-squares problem with one coefficient per expert, pulled to 1 / n, so directions that no prompt uses get
    lam_i tau_i. With p = 1 the mean gain along the experts' own output changes is one. Every sum runs over the n
    experts that changed the tensor.

    A row of an embedding is the mean of the experts, weighted by 1 / e_i times the share of tokens that look it up.
    Norms and biases, and matrices that some expert's prompts never reach, are the mean weighted by 1 / e_i, where every
    entry counts alike.

    Options: ``weights`` takes e_i from the ``outputs``, as above, from the ``inputs`` (mean diag G_i) or treats all
    experts ``equal``. ``prompts``: most prompts of a task.
    Differs from RegMean: weights, lam, gain, and what is done with embeddings, norms and biases.

    Returns:
        float32, one tensor per expert.
    Raises:
        RecipeError: A Gram matrix has another size, or cannot be measured.
    Cost: one Cholesky factor of (in, in), and n products of (out, in) with it, in float64.
    Source: after Jin et al. 2022, arXiv 2212.09849.
    """
    active = [i for i, is_active in enumerate(context.active) if is_active]
    result = [torch.zeros_like(delta) for delta in context.deltas]
    if not active:
        return result
    deltas = [oriented(context, context.deltas[i]).to(torch.float64) for i in active]
    grams = _measured(context, active) if context.base.ndim == 2 else []
    n_out, n_in = deltas[0].shape[0], deltas[0].shape[-1]
    if grams and all(g.shape == (n_in, n_in) for g in grams):
        made = _matched(context, deltas, grams)
    elif not grams or all(g.shape == (n_out, 1) for g in grams):
        made = _averaged(context, deltas, grams or [torch.ones_like(d) for d in deltas])
    else:
        raise RecipeError(
            f"regmean_parts: the statistic 'prompt_gram' of {context.where()} must have shape {(n_in, n_in)}, or "
            f"{(n_out, 1)} for an embedding, found {', '.join(str(tuple(g.shape)) for g in grams)}; measure it again"
        )
    for i, part in zip(active, made, strict=True):
        result[i] = oriented(context, part).to(torch.float32).contiguous()
    return result


def _measured(context: OperatorContext, active: list[int]) -> list[Tensor]:
    """Float64 copies of the active experts' Gram matrices; [] where the prompts of some expert miss the tensor."""
    if context.statistic is None:
        return []
    kind = f"prompt_gram@prompts={context.options['prompts']}"
    try:
        grams = [context.statistic(kind, context.experts[i]) for i in active]
    except NotMeasuredError:  # an expert of a mixture that no token was sent to
        return []
    return [g.to(device=context.base.device, dtype=torch.float64, copy=True) for g in grams]


def _weights(context: OperatorContext, outputs: Tensor, inputs: Tensor) -> Tensor:
    """1 / e_i; an expert without any change of its outputs has no weight."""
    kind = context.options["weights"]
    energies = {"outputs": outputs, "inputs": inputs, "equal": torch.ones_like(outputs)}[str(kind)]
    weights = torch.where(energies > 0, 1.0 / energies.clamp_min(_TINY), 0.0)
    return weights if bool((weights > 0).any()) else torch.ones_like(weights)


def _averaged(context: OperatorContext, deltas: list[Tensor], moments: list[Tensor]) -> list[Tensor]:
    """Mean of the experts, entry by entry; `moments` broadcast to the deltas."""
    outputs = torch.stack([(m * d.square()).sum() for m, d in zip(moments, deltas, strict=True)])
    weights = _weights(context, outputs, torch.stack([m.mean() for m in moments]))
    used = torch.stack([w * m for w, m in zip(weights, moments, strict=True)])
    total = used.sum(0)
    shares = torch.where(total > 0, used / total.clamp_min(_TINY), 1.0 / len(deltas))
    return [share * d for share, d in zip(shares, deltas, strict=True)]


def _matched(context: OperatorContext, deltas: list[Tensor], grams: list[Tensor]) -> list[Tensor]:
    """Parts of a matrix whose inputs have these Gram matrices."""
    outputs = torch.stack([(d @ g * d).sum() for d, g in zip(deltas, grams, strict=True)])
    weights = _weights(context, outputs, torch.stack([g.diagonal().mean() for g in grams]))
    weighted = [w * g for w, g in zip(weights, grams, strict=True)]
    total = torch.stack(weighted).sum(0)
    ridge = context.number("ridge") * total.diagonal().mean()
    added = ridge * _coefficients(deltas, weighted)
    total.diagonal().add_(ridge)
    made = [right_divide(d @ g + a * d, total) for d, g, a in zip(deltas, weighted, added, strict=True)]
    merged = torch.stack(made).sum(0)
    gains = [(merged @ g * d).sum() / e for g, d, e in zip(grams, deltas, outputs, strict=True) if e > 0]
    mean = float(sum(gains)) / max(1, len(gains))
    factor = mean ** -context.number("gain") if mean > 0 else 1.0
    return [factor * part for part in made]


def _coefficients(deltas: list[Tensor], weighted: list[Tensor]) -> Tensor:
    """One coefficient per expert for the layer: least squares with a ridge towards 1 / n."""
    n = len(deltas)
    total = torch.stack(weighted).sum(0)
    a = torch.stack([torch.stack([(x @ total * y).sum() for y in deltas]) for x in deltas])
    b = torch.stack([sum((x @ g * y).sum() for g, y in zip(weighted, deltas, strict=True)) for x in deltas])  # type: ignore[misc]
    ridge = _LAYER_RIDGE * a.diagonal().sum() / n
    if not bool(ridge > 0):
        return torch.full_like(b, 1.0 / n)
    solved: Tensor = torch.linalg.solve(a + ridge * torch.eye(n, dtype=a.dtype, device=a.device), b + ridge / n)
    return solved
