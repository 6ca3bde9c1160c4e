"""The undocumented parts of transformers that this project uses. Importing this file loads no library.

`tests/library_internals/test_transformers.py` fails when transformers moves or changes one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["as_saved", "converts_weights", "has_transposed_experts"]


def converts_weights(model: Any) -> bool:
    """Whether `from_pretrained` renamed, split or stacked tensors when it loaded this model."""
    return bool(getattr(model, "_weight_conversions", None))


def as_saved(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply the conversion of `save_pretrained` to tensors named as in the model. Return them as they would be saved.

    Args:
        model: A transformers model.
        tensors: Some of the entries of its state dict, or other tensors of the same names and shapes.
    """
    from transformers.core_model_loading import revert_weight_conversion

    saved: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return saved


def has_transposed_experts(module: Any) -> bool:
    """Whether a module stores its stacked experts as (experts, in, out) instead of (experts, out, in)."""
    return bool(getattr(module, "is_transposed", False))
