"""LoRA factors of single parameters (peft's ``target_parameters``): experts stacked in one tensor, and other matrices.

peft wraps a module once per parameter, in the order in which the module has them. The first parameter is innermost,
under as many ``.base_layer`` as there are other parameters. A key gives only the depth; the model without weights gives
the parameter.

Source: Hu et al. 2021, arXiv 2106.09685, applied to every expert of a stack by itself.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from merge_search._compat.transformers import has_transposed_experts

if TYPE_CHECKING:
    from torch import Tensor

    from merge_search.engine.checkpoints.headers import CheckpointInfo

__all__ = ["Wrapped", "parameter_delta", "wrapped_parameters"]


class Wrapped(NamedTuple):
    """A parameter with factors of its own.

    Attributes:
        name: Name in the model: ``model.layers.0.mlp.experts.down_proj``.
        shape: (out, in); for stacked experts (experts, out, in), or (experts, in, out) if `is_transposed`.
        is_transposed: Whether the experts are stored (in, out).
    """

    name: str
    shape: tuple[int, ...]
    is_transposed: bool

    @property
    def n_experts(self) -> int:
        """Number of stacked experts; 1 for a matrix."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in) of one expert."""
        first, second = self.shape[-2:]
        return (second, first) if self.is_transposed else (first, second)

    @property
    def problem(self) -> str:
        """Why peft cannot merge it either; '' if it can."""
        if len(self.shape) not in (2, 3):
            return f"has {len(self.shape)} dimensions, where peft adapts 2 or 3"
        if self.is_transposed and self.n_experts == 1:
            return "is a stack of one expert stored (in, out), which peft cannot merge"
        return ""


def wrapped_parameters(base: CheckpointInfo, targets: Collection[str]) -> dict[str, Wrapped] | None:
    """Return the parameters that peft wraps, by the module under which it saves the factors.

    Such a module is ``model.layers.0.mlp.experts.base_layer``.

    Args:
        base: The base's config.
        targets: Names of parameters, or ends of them.
    Returns:
        None where transformers does not know the base's model.
    """
    from merge_search.engine.checkpoints.module_names import skeleton

    model = skeleton(base)
    if model is None:
        return None
    wrapped = {}
    for module_name, module in model.named_modules():
        names = [n for n, _ in module.named_parameters(recurse=False)]
        targeted = [n for n in names if _is_target(f"{module_name}.{n}", targets)]
        for depth, name in enumerate(reversed(targeted)):
            shape = tuple(getattr(module, name).shape)
            is_transposed = len(shape) == 3 and has_transposed_experts(module)
            wrapped[module_name + depth * ".base_layer"] = Wrapped(f"{module_name}.{name}", shape, is_transposed)
    return wrapped


def _is_target(name: str, targets: Collection[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def parameter_delta(a: Tensor, b: Tensor, wrapped: Wrapped, scale: float) -> Tensor:
    """Return scale * B_e @ A_e of every expert e: float32, the parameter's shape, contiguous.

    Args:
        a: Shape (experts * r, in). The rows of one expert are adjacent.
        b: Shape (out, r * experts). The columns of one expert are `experts` apart.
        wrapped: The parameter.
        scale: Factor of the product.
    """
    import torch

    a, b, n = a.float(), b.float(), wrapped.n_experts
    if n == 1:
        delta = b @ a
    else:  # the same contraction as peft's, to give its bits
        order = "eio" if wrapped.is_transposed else "eoi"
        delta = torch.einsum(f"ore,eri->{order}", b.reshape(len(b), -1, n), a.reshape(n, -1, a.shape[1]))
    return (delta * scale).reshape(wrapped.shape).contiguous()
