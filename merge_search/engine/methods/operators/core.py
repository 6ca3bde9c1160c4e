"""Core Space: a spectral operator on the small cores of LoRA pairs in place of the whole matrices."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from merge_search.engine.contracts import Factors
from merge_search.engine.methods.operators import OPERATORS, OperatorContext, load_operator
from merge_search.engine.methods.operators.matrix import active, mean_parts, working, zero_parts
from merge_search.recipe import Group

__all__ = ["pairs", "parts"]


def parts(context: OperatorContext) -> list[Tensor]:
    """processed_i = U rule_i(M_1, M_2, ...) V^T with the cores M_i = U^T B_i A_i V.

    U and V are orthonormal frames of all experts' B and of all their A^T side by side, so that no delta loses anything
    and the cores are as wide as the ranks together. A rule on singular values gives there what it gives on the whole
    matrices, at the cost of small SVDs, and the merge is a LoRA adapter. TSV-M's rank share is of the core. A tensor
    that an expert changed without a pair is averaged.

    Options: ``rule``: ``tsv_m``, ``iso_c`` or ``iso_cts``; ``rank_share``, ``power`` and ``common`` as these have them.
    Differs: the paper also merges cores entry by entry (TIES), which depends on the choice of the frames.

    Returns:
        float32, one tensor per expert.
    Raises:
        NonFiniteError: A delta holds NaN or infinity.
    Cost: two QRs of the stacked factors, and the rule on matrices as wide as the ranks together.
    Source: Core Space, 2025, arXiv 2509.17786.
    """
    found = pairs(context)
    if found is None:
        return mean_parts(context)
    return [zero if f is None else f.delta() for f, zero in zip(found, zero_parts(context), strict=True)]


def pairs(context: OperatorContext) -> list[Factors | None] | None:
    """`parts` as pairs with one A, None for an expert without part; None alone where the tensor is averaged."""
    alive = active(context)
    given = [context.factors(context.experts[i]) if context.factors else None for i in alive]
    found = {i: f for i, f in zip(alive, given, strict=True) if f is not None}
    if not found or len(found) < len(alive):
        return None
    left = torch.linalg.qr(working(torch.cat([f.b for f in found.values()], 1)))[0]
    right = torch.linalg.qr(torch.cat([f.a.T for f in found.values()], 1).to(left.dtype))[0]
    zero = torch.zeros(left.shape[1], right.shape[1], device=left.device)
    cores = {i: ((left.T @ f.b.to(left.dtype)) @ (f.a.to(left.dtype) @ right)).float() for i, f in found.items()}
    rule = OPERATORS[str(context.options["rule"])]
    inner = replace(
        context,
        group=Group(context.name, context.group.block, "mlp"),
        base=zero,
        deltas=tuple(cores.get(i, zero) for i in range(len(context.experts))),
        options=rule.completed({k: v for k, v in context.options.items() if k in rule.options}),
        transposed=False,
        cache=None,
    )
    processed: list[Tensor] = load_operator(rule)(inner)
    transpose, shared = next(iter(found.values())).transpose, right.T.float().contiguous()
    return [
        Factors((left @ part.to(left.dtype)).float(), shared, transpose) if i in found else None
        for i, part in enumerate(processed)
    ]
