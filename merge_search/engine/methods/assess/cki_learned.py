"""CKI with its learned map: w_loc = sigmoid(gain (D A^T + b)), A and b trained on fit rows.

D = |W_i - W_j| of two experts has the shape of the weights (out, in), and A mixes along the inputs. The other formulas
and options are those of ``cki``. More than two experts share one map of their distances D_i from their mean, and
exp(u_i) with u_i = sign a z(H_i) - gain (D_i A^T + b) is divided by its sum.

    map      full       A is (in, in), b is (in,), as released
             diagonal   A is a number per input: for wide models
             scalar     A and b are one number each; always so for tensors that are no matrices
    inputs   standardised   D minus its mean, over its standard deviation, within the tensor
             raw            D, as released. Its entries are small, so Adam's steps hardly move D A^T
    start    identity   A = 1, b = 0: with standardised inputs the untrained map is that of ``cki``
             xavier     drawn, as released

The statistic ``cki_map`` trains the map at soft splicing with coefficients 1. Hard splicing then uses the same map; the
release leaves it untrained there, because no gradient reaches it. Source: CKI, arXiv 2501.07596, released code.
Differs: standardised inputs, the start, and more than two experts, which are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merge_search.engine.kernels.numerics import exp, sigmoid
from merge_search.engine.methods.assess import AssessContext, cki
from merge_search.errors import RecipeError
from merge_search.recipe import Scalar
from merge_search.rules import MEASURES

__all__ = ["inputs", "logits", "scores", "start", "weights"]


def inputs(context: AssessContext) -> tuple[list[Tensor], list[float]]:
    """Return the map's input D of each expert, and the global terms of `cki.numbers`.

    Args:
        context: Base and deltas of at least two experts, of any floating dtype; options of ``cki_learned``.
    """
    options = {**context.options, "bias": 0.0, "standardise": "all"}
    numbers = cki.numbers(options, cki.reduce(context), context.n_experts, len(context.deltas))
    found = cki.distances(context.deltas)
    if options["inputs"] == "standardised":
        found = [(d - numbers[3 + 3 * i]) * numbers[4 + 3 * i] for i, d in enumerate(found)]
    return found, numbers[2::3]


def start(options: Mapping[str, Scalar], shape: Sequence[int], *, transposed: bool, seed: int) -> Tensor:
    """Return the untrained map of a tensor: float32.

    Args:
        options: Options of ``cki_learned``.
        shape: The tensor's shape.
        transposed: Whether it is stored (in, out).
        seed: Of the drawn start.
    Returns:
        A^T above b, shape (in + 1, in); for the other maps A above b, shape (2, in) or (2, 1).
    """
    n = 1
    if options["map"] != "scalar" and len(shape) == 2:
        n = shape[0] if transposed else shape[1]
    is_full = options["map"] == "full" and len(shape) == 2
    if options["start"] == "identity":
        above = torch.eye(n) if is_full else torch.ones(1, n)
        return torch.cat([above, torch.zeros(1, n)])
    draw = torch.Generator().manual_seed(seed)
    limit = math.sqrt(6.0 / (2 * n))
    above = torch.empty(n if is_full else 1, n).uniform_(-limit, limit, generator=draw)
    return torch.cat([above, torch.empty(1, n).uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n), generator=draw)])


def logits(gain: float, parameters: Tensor, distance: Tensor, *, transposed: bool) -> Tensor:
    """Return gain (D A^T + b), of D's shape and dtype.

    Args:
        gain: The option.
        parameters: As `start` returns them.
        distance: D.
        transposed: Whether the tensor is stored (in, out).
    """
    d = distance.mT if transposed and distance.ndim == 2 else distance
    u = gain * (d @ parameters[:-1] + parameters[-1] if len(parameters) > 2 else d * parameters[0] + parameters[1])
    return u.mT if transposed and distance.ndim == 2 else u


def weights(
    options: Mapping[str, Scalar],
    u: Sequence[Tensor],
    terms: Sequence[Tensor],
    *,
    exp: cki.Rule = exp,
    sigmoid: cki.Rule = sigmoid,
) -> list[Tensor]:
    """Return the scores of each expert.

    Args:
        options: Options of ``cki_learned``.
        u: Logits of each expert; two experts have the same.
        terms: Global terms of each expert, 0-d.
        exp: The exponential function: torch's own where gradients are needed.
        sigmoid: The same.
    """
    kind = str(options["kind"])
    if len(u) == 2:
        i = 1 if options["order"] == "reversed" else 0
        scores = cki.pair(kind, sigmoid(u[i]), terms[i], exp)
        return scores[::-1] if i else scores
    use_global = float(kind != "local")
    return cki.shares([use_global * term - x for term, x in zip(terms, u, strict=True)], exp)


def scores(context: AssessContext) -> list[Tensor]:
    """Return the scores of each expert, float32. One expert alone has ones. Logits are float64.

    Raises:
        RecipeError: The statistic ``cki_map`` was not measured, or was measured for other experts.
    """
    if len(context.deltas) < 2:
        return [torch.ones_like(context.base) for _ in context.deltas]
    assert context.group is not None
    known = tuple(context.tensors.models.experts)
    if context.every_expert != known:
        raise RecipeError(
            f"'cki_learned': the map is trained for the experts {', '.join(known)} in this order, and the recipe has "
            f"{', '.join(context.every_expert)}"
        )
    (kind,) = MEASURES["cki_learned"].statistics_asked(context.options)
    maps = [context.statistic(kind, e) for e in context.every_expert]  # one map, which an export keeps for each
    parameters = maps[0].to(torch.float64)
    found, terms = inputs(context)
    transposed, gain = context.tensors.is_transposed(context.group.tensor), float(context.options["gain"])
    u = [logits(gain, parameters, d.to(torch.float64), transposed=transposed).to(torch.float32) for d in found]
    return weights(context.options, u, [torch.tensor(t, dtype=torch.float32, device=u[0].device) for t in terms])
