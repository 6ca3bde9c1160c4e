"""Functions that the matrix operators share: recognising matrices, safe decompositions, the papers' fallback.

Matrices are (..., out, in); a 3-D tensor is a stack of them. Decompositions run in float32, small ones in float64, and
are repeated in float64 if float32 does not converge. No decomposition runs in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.contracts import Factors
from merge_search.engine.methods.operators import OperatorContext
from merge_search.errors import NonFiniteError, TrialError

__all__ = [
    "SMALL",
    "active",
    "is_matrix",
    "mean_parts",
    "oriented",
    "pair_by_svd",
    "polar",
    "right_divide",
    "spectrum_factors",
    "svd",
    "working",
    "zero_parts",
]

SMALL = 2**16
"""Most elements of a matrix that is decomposed in float64, where its extra cost does not matter."""
_POLAR_TOLERANCE = 1e-5
"""Relative singular value below which directions of the stacked frames count as shared: the noise of float32."""

_SINGULAR = 1e-7
"""Ratio of Cholesky pivots (a square root) below which float64 has about two digits left."""


def is_matrix(context: OperatorContext) -> bool:
    """Whether the tensor is a matrix or a stack of them, and not an embedding that the options leave out.

    Single rows and columns (a head with one output, depthwise convolutions) have no useful spectrum and do not count.
    """
    shape = context.base.shape
    if len(shape) not in (2, 3) or min(shape[-2:]) < 2:
        return False
    return context.group.kind not in ("embedding", "head") or bool(context.options.get("embeddings", True))


def active(context: OperatorContext) -> list[int]:
    """Return the indices of the experts that changed the tensor.

    Raises:
        NonFiniteError: A delta holds NaN or infinity.
    """
    indices = [i for i, is_active in enumerate(context.active) if is_active]
    for i in indices:
        if not bool(torch.isfinite(context.deltas[i]).all()):
            raise NonFiniteError(
                f"deltas must be finite, found NaN or infinity in {context.where()} of expert {context.experts[i]!r}; "
                "check its checkpoint"
            )
    return indices


def mean_parts(context: OperatorContext) -> list[Tensor]:
    """processed_i = tau_i / M, as the engine does for other tensors. M counts the experts that changed the tensor."""
    return [delta / max(1, sum(context.active)) for delta in context.deltas]


def zero_parts(context: OperatorContext) -> list[Tensor]:
    """Return processed deltas of zeros."""
    return [torch.zeros_like(delta) for delta in context.deltas]


def oriented(context: OperatorContext, x: Tensor) -> Tensor:
    """Return `x` as (..., out, in), or back: a view."""
    return x.mT if context.transposed else x


def working(x: Tensor) -> Tensor:
    """Return `x` in the precision in which it is decomposed."""
    return x.to(torch.float64 if x.numel() <= SMALL else torch.float32)


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD x = U diag(S) Vh, batched, in the dtype of `x` (float32 or float64).

    Raises:
        TrialError: It did not converge in float64 either.
    """
    for dtype in dict.fromkeys((x.dtype, torch.float64)):
        try:
            u, s, vh = torch.linalg.svd(x.to(dtype), full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        return u.to(x.dtype), s.to(x.dtype), vh.to(x.dtype)
    raise TrialError(
        f"the singular value decomposition of a matrix of shape {tuple(x.shape)} did not converge in float64; "
        "use another operator"
    )


def polar(frame: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns (rows if wide): P Q^T of the SVD P S Q^T.

    Columns of zeros stay zero, and directions with S = 0 are left out. The released codes keep such directions, with
    arbitrary vectors of the SVD that differ from machine to machine.

    Args:
        frame: Shape (..., n, k).
    """
    p, s, qh = svd(frame)
    kept = s > _POLAR_TOLERANCE * s[..., :1]
    return (p * kept[..., None, :]) @ qh


def spectrum_factors(s: Tensor, *, power: float, tolerance: float) -> Tensor:
    """Return the factors that turn singular values into c * s**power with the same sum.

    Power 1 changes nothing, power 0 makes all equal to their mean. Values up to `tolerance` times the largest count as
    noise: they become zero and do not enter the mean (deltas of low rank have many).

    Args:
        s: Shape (..., k), descending, >= 0.
        power: Exponent.
        tolerance: In [0, 1].
    Returns:
        Shape and dtype of `s`.
    """
    kept = (s > tolerance * s[..., :1]) & (s > 0)
    safe = torch.where(kept, s, 1.0)
    flat = torch.where(kept, safe**power, 0.0)
    total = torch.where(kept, s, 0.0).sum(-1, keepdim=True)
    ratio = total / flat.sum(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    return flat / safe * ratio


def right_divide(top: Tensor, bottom: Tensor) -> Tensor:
    """Return top @ bottom^-1 for a symmetric, positive (semi-)definite bottom; its pseudo-inverse where it is singular.

    Args:
        top: Shape (..., m, n), float64.
        bottom: Shape (..., n, n), float64.
    """
    factor, failed = torch.linalg.cholesky_ex(bottom)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    sound = pivots.amin(-1) > _SINGULAR * pivots.amax(-1)
    if not bool(failed.any()) and bool(sound.all()):
        quotient: Tensor = torch.cholesky_solve(top.mT, factor).mT
        return quotient
    inverse: Tensor = torch.linalg.pinv(bottom, hermitian=True)
    return top @ inverse


def pair_by_svd(f: Factors) -> Factors:
    """Return the pair U sqrt(S), sqrt(S) V^T of the same product, by descending singular values.

    The largest entry of each left vector is positive. Cost: SVDs of the size of the rank.
    """
    left, lower = torch.linalg.qr(working(f.b))
    right, upper = torch.linalg.qr(f.a.T.to(left.dtype))
    u, s, vh = svd(lower @ upper.T)
    u, v, root = left @ u, right @ vh.T, torch.sqrt(s)
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    b, a = u * signs * root, (v * signs * root).T
    return Factors(b.to(f.b.dtype), a.to(f.a.dtype).contiguous(), f.transpose)
