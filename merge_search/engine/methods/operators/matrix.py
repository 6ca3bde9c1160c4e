"""What the matrix operators share: which tensors are matrices, safe decompositions, the fallback of the papers.

Matrices are (..., out, in); a 3-D tensor is a stack of them. Decompositions run in float32, small ones in float64, and
retry in float64 where float32 does not converge; half precision has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.errors import NonFiniteError, TrialError

__all__ = [
    "SMALL",
    "active",
    "is_matrix",
    "mean_parts",
    "oriented",
    "polar",
    "right_divide",
    "spectrum_factors",
    "svd",
    "working",
    "zero_parts",
]

SMALL = 2**16
"""Up to so many elements float64 costs nothing worth saving."""
_POLAR_TOLERANCE = 1e-5
"""Directions that the stacked frames share to this relative size are one direction: below it float32 has only noise."""

_SINGULAR = 1e-7
"""Ratio of Cholesky pivots, a square root: below it float64 has about two digits left."""


def is_matrix(context: OperatorContext) -> bool:
    """Whether the tensor is a matrix or a stack of them, and not an embedding that the options leave out.

    Single rows and columns (a head with one output, depthwise convolutions) have no spectrum to speak of.
    """
    shape = context.base.shape
    if len(shape) not in (2, 3) or min(shape[-2:]) < 2:
        return False
    return context.group.kind not in ("embedding", "head") or bool(context.options.get("embeddings", True))


def active(context: OperatorContext) -> list[int]:
    """Experts that changed the tensor.

    Raises:
        NonFiniteError: a delta has NaN or infinity.
    """
    found = [i for i, is_active in enumerate(context.active) if is_active]
    for i in found:
        if not bool(torch.isfinite(context.deltas[i]).all()):
            raise NonFiniteError(
                f"deltas must be finite, found NaN or infinity in {context.where()} of expert {context.experts[i]!r}; "
                "check its checkpoint"
            )
    return found


def mean_parts(context: OperatorContext) -> list[Tensor]:
    """processed_i = tau_i / M, M the number of experts that changed the tensor, as the engine does for other tensors."""
    return [delta / max(1, sum(context.active)) for delta in context.deltas]


def zero_parts(context: OperatorContext) -> list[Tensor]:
    """No expert changed the tensor: processed deltas of zeros."""
    return [torch.zeros_like(delta) for delta in context.deltas]


def oriented(context: OperatorContext, x: Tensor) -> Tensor:
    """x as (..., out, in), and back: a view."""
    return x.mT if context.transposed else x


def working(x: Tensor) -> Tensor:
    """x in the precision in which its decomposition runs."""
    return x.to(torch.float64 if x.numel() <= SMALL else torch.float32)


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD x = U diag(S) Vh, batched, in the dtype of x (float32 or float64).

    Raises:
        TrialError: float64 did not converge either.
    """
    for dtype in dict.fromkeys((x.dtype, torch.float64)):
        try:
            u, s, vh = torch.linalg.svd(x.to(dtype), full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        return u.to(x.dtype), s.to(x.dtype), vh.to(x.dtype)
    raise TrialError(
        f"the singular value decomposition of a matrix of shape {tuple(x.shape)} did not converge in float64; use another operator"
    )


def polar(frame: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows if wide): P Q^T of the SVD P S Q^T.

    Columns of zeros stay zero, and directions with S = 0 are left out: the released codes keep them, with whatever vectors the
    SVD happens to return, which differ from machine to machine.

    Args:
        frame: Shape (..., n, k).
    """
    p, s, qh = svd(frame)
    kept = s > _POLAR_TOLERANCE * s[..., :1]
    return (p * kept[..., None, :]) @ qh


def spectrum_factors(s: Tensor, *, power: float, tolerance: float) -> Tensor:
    """What singular values are multiplied by to become c * s**power with the same sum.

    Power 1 changes nothing, power 0 makes them all equal to their mean. Values up to `tolerance` times the largest count as
    noise: they become zero and do not enter the mean (deltas of low rank have many).

    Args:
        s: Shape (..., k), descending, >= 0.
    Returns:
        Same shape and dtype.
    """
    kept = (s > tolerance * s[..., :1]) & (s > 0)
    safe = torch.where(kept, s, 1.0)
    flat = torch.where(kept, safe**power, 0.0)
    total = torch.where(kept, s, 0.0).sum(-1, keepdim=True)
    ratio = total / flat.sum(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    return flat / safe * ratio


def right_divide(top: Tensor, bottom: Tensor) -> Tensor:
    """top @ bottom^-1 for a symmetric, positive (semi-)definite bottom; with its pseudo-inverse where it is singular.

    Args:
        top: Shape (..., m, n). bottom: Shape (..., n, n). Both float64.
    """
    factor, failed = torch.linalg.cholesky_ex(bottom)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    sound = pivots.amin(-1) > _SINGULAR * pivots.amax(-1)
    if not bool(failed.any()) and bool(sound.all()):
        quotient: Tensor = torch.cholesky_solve(top.mT, factor).mT
        return quotient
    inverse: Tensor = torch.linalg.pinv(bottom, hermitian=True)
    return top @ inverse
