"""SVC: shrinks the singular directions of the combined delta that several experts contributed to."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.matrix import active, is_matrix, oriented, svd, working
from merge_search.errors import RecipeError

__all__ = ["gammas", "post"]


def post(context: OperatorContext, combined: Tensor) -> Tensor:
    """S_r <- gamma_r S_r with gamma_r = M / sum_i max(alpha, s_ri), s_ri = <u_r^T D, u_r^T tau_i> / ||u_r^T tau_i||^2.

    D = U diag(S) V^T is the combined delta and tau_i are the experts' raw deltas. M counts the experts that changed the
    matrix. A factor on D cancels (above the floor alpha). To scale D, use the recipe's scale, which is applied
    afterwards.

    Options: ``alpha`` > 0 (released: 0.1, for Iso-CTS 0.2, for TSV-M 1); gamma is at most 1 / alpha. ``cap``: upper
    bound of gamma, none by default.

    Args:
        context: The tensor, its deltas and the options.
        combined: The combined delta D, float32.
    Returns:
        float32, shape of `combined`. Vectors stay as they are.
    Raises:
        RecipeError: ``alpha`` is not positive.
        NonFiniteError: A delta holds NaN or infinity.
    Cost: one SVD per matrix and candidate.
    Source: SVC, arXiv 2602.05536. Differs: float64 for small matrices only.
    """
    if context.number("alpha") <= 0:
        raise RecipeError(f"svc: alpha must be > 0, got {context.number('alpha'):g}")
    alive = active(context)
    if not is_matrix(context) or not alive:
        return combined
    u, s, vh = svd(working(oriented(context, combined)))
    taus = [oriented(context, context.deltas[i]).to(u.dtype) for i in alive]
    gamma = gammas(u, s, vh, taus, alpha=context.number("alpha"))
    if "cap" in context.options:
        gamma = gamma.clamp_max(context.number("cap"))
    return oriented(context, (u * (gamma * s)[..., None, :]) @ vh).to(torch.float32).contiguous()


def gammas(u: Tensor, s: Tensor, vh: Tensor, taus: list[Tensor], *, alpha: float) -> Tensor:
    """Return gamma_r of every singular direction, shape of `s`.

    s_ri counts as 0 if expert i has nothing in direction r.
    """
    total, n = torch.zeros_like(s), torch.zeros_like(s[..., :1])
    for tau in taus:
        projected = u.mT @ tau
        energy = projected.square().sum(-1)
        ratio = s * (projected * vh).sum(-1) / torch.where(energy > 0, energy, 1.0)
        present = (torch.linalg.matrix_norm(tau) > 0)[..., None]
        total += torch.where(present, ratio.clamp_min(alpha), 0.0)
        n += present
    return torch.where(n > 0, n / torch.where(n > 0, total, 1.0), 1.0)
