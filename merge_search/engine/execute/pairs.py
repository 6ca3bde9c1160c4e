"""Merges of LoRA adapters that are LoRA pairs again: sums of the experts' pairs, each times a number.

    sum_i w_i b_i a_i  =  [w_1 b_1 | w_2 b_2 | ...] [a_1; a_2; ...]

Source: the concatenation of factors is peft's combination type ``cat``; the truncation is its ``svd``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from merge_search.engine.contracts import Factors, Pass
from merge_search.engine.execute.runner import scalars
from merge_search.engine.methods import stages
from merge_search.engine.methods.operators.matrix import pair_by_svd
from merge_search.engine.methods.primitives import EAGER
from merge_search.errors import RecipeError
from merge_search.recipe import Recipe
from merge_search.rules import MEASURES, OPERATORS

__all__ = ["joined", "nearest", "nearest_of", "pair_problems", "weights_of"]

_ENTRY_WISE = ("sum", "count", "mask", "coefficient")
"""Splices that, where everything survives, give each expert one weight a tensor."""


def pair_problems(recipe: Recipe) -> list[str]:
    """Reasons why a recipe's merge of pairs is no pair of factors; empty if it is one."""
    out = [f"post rule {rule.name!r} works on the whole matrix" for rule in recipe.post]
    if recipe.operator is not None:
        info = OPERATORS.get(recipe.operator.name)
        if info is None or not info.pairs:
            out.append(f"operator {recipe.operator.name!r} works on the whole matrix")
        return out
    if recipe.select.kind != "all":
        out.append(f"selection {recipe.select.kind!r} leaves single entries out")
    if recipe.winsorise:
        out.append("winsorising clips single entries")
    if recipe.resolve.kind != "none":
        out.append("signs are elected entry by entry")
    splice = recipe.splice
    score = MEASURES.get((splice.score or recipe.assess).measure)
    if splice.kind not in _ENTRY_WISE and not (splice.kind == "score" and score is not None and score.after_mask):
        out.append(f"splice {splice.kind!r} weighs single entries")
    return out


def weights_of(p: Pass) -> list[float]:
    """The number by which each expert's delta enters a pass without `pair_problems`: scale included, maps left out."""
    n = len(p.experts)
    unit = torch.eye(n)  # entry j: expert j has the delta 1, the others have none
    structure = p.structure._replace(rows=False)
    numbers, index = scalars(p.numbers, unit.device), torch.zeros((), dtype=torch.int32)
    weights: list[float] = stages.merge(structure, torch.zeros(n), list(unit), {}, numbers, index, EAGER).tolist()
    return weights


def joined(terms: Iterable[tuple[float, Tensor | None, Factors]]) -> Factors | None:
    """One pair of the sum of weighed pairs; None for a sum of nothing.

    Args:
        terms: Weight, coefficients by row of the tensor as stored (None: all 1), and pair. Pairs that share their A are
            added up in B.
    Raises:
        RecipeError: Experts keep the tensor in two orientations.
    """
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    orientations = set()
    for weight, rows, f in terms:
        if weight == 0:
            continue
        b, a = f.b * weight, f.a
        if rows is not None:
            b, a = (b, a * rows) if f.transpose else (b * rows[:, None], a)
        known = parts.get(id(a))
        parts[id(a)] = (b if known is None else known[0] + b, a)
        orientations.add(f.transpose)
    if len(orientations) > 1:
        raise RecipeError("adapters must agree in fan_in_fan_out where they change the same tensor")
    if not parts:
        return None
    pairs = list(parts.values())
    return Factors(torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs], 0), orientations.pop())


def nearest(f: Factors, rank: int) -> tuple[Factors, float, float]:
    """The pair of at most this rank that is nearest in the Frobenius norm, by SVD.

    Returns:
        The pair, the square of its distance, and the square of the norm of `f`.
    """
    whole = pair_by_svd(f)
    squares = whole.b.double().square().sum(0) * whole.a.double().square().sum(1)
    left_out, total = float(squares[rank:].sum()), float(squares.sum())
    return (f, 0.0, total) if f.rank <= rank else (_cut(whole, rank), left_out, total)


def nearest_of(delta: Tensor, rank: int, *, transpose: bool) -> tuple[Factors, float, float]:
    """As `nearest`, of a whole matrix; `transpose` if it is stored (in, out)."""
    whole = delta.T if transpose else delta
    n, m = whole.shape
    eye = torch.eye(min(n, m), device=delta.device)
    return nearest(Factors(whole, eye, transpose) if m <= n else Factors(eye, whole, transpose), rank)


def _cut(f: Factors, rank: int) -> Factors:
    return Factors(f.b[:, :rank].contiguous(), f.a[:rank].contiguous(), f.transpose)
