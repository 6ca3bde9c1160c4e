"""The definition of a merge: one tensor, step by step in plain torch, in its own shape, without chunks or compiler.

`execute.runner` must give the same bits. The formulas of the steps are in `methods.stages`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.contracts import Pass, Tensors, output_dtype
from merge_search.engine.execute.runner import WHOLE, scalars
from merge_search.engine.kernels.random_bits import wrapped
from merge_search.engine.methods import stages
from merge_search.engine.methods.primitives import EAGER
from merge_search.engine.passes.planner import Planner
from merge_search.recipe import Recipe

__all__ = ["merge_tensor", "run_pass"]


def merge_tensor(recipe: Recipe, tensors: Tensors, name: str) -> Tensor:
    """The merged tensor `name` of a recipe without operator or post rules.

    Returns:
        New tensor of the base's shape, in the recipe's dtype or the base's; the base's bits where no expert changed it.
    """
    planner = Planner(tensors)
    p = planner.plan(recipe, name)
    base = tensors.base(name)
    if p is None:
        return base.to(output_dtype(recipe, base), copy=True)
    return run_pass(p, tensors).to(output_dtype(recipe, base))


def run_pass(p: Pass, tensors: Tensors) -> Tensor:
    """One pass over whole tensors. float32, before the cast."""
    device = tensors.device
    base = tensors.base(p.name).to(device)
    experts = [tensors.expert(e, p.name).to(device) for e in p.experts]
    given = {k: v if k in WHOLE else [t.reshape(base.shape) for t in v] for k, v in p.given.items()}
    index = torch.tensor(wrapped(p.index), dtype=torch.int32, device=device)
    return stages.merge(p.structure, base, experts, given, scalars(p.numbers, device), index, EAGER)
