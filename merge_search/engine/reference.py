"""The definition: one tensor merged step by step in plain torch, in its own shape, without chunks or compiler.

`fused` must give the same bits. Read `stages` for what each step does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.contracts import Pass, Tensors, output_dtype
from merge_search.engine.execute.runner import WHOLE, scalars
from merge_search.engine.methods import stages
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
    index = torch.tensor((p.index + 2**31) % 2**32 - 2**31, dtype=torch.int32, device=device)
    return stages.merge(p.structure, base, experts, given, scalars(p.numbers, device), index)
