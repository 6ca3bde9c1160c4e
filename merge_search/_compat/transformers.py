"""The undocumented parts of transformers that this project uses. Importing this file loads no library.

`tests/library_internals/test_transformers.py` fails when transformers moves or changes one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["as_saved", "attention_of", "converts_weights", "has_transposed_experts"]


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


@dataclass(frozen=True)
class Attention:
    """How a model attends.

    Attributes:
        implementation: ``sdpa``, ``eager``, ...
        has_window: Whether a token sees only the tokens near it, in any layer.
        depends_on_length: Whether a token's position encoding depends on the length of its row.
    """

    implementation: str
    has_window: bool
    depends_on_length: bool


def attention_of(config: Any) -> Attention:
    """How a model with this configuration attends. Configurations have these attributes only where they apply."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return Attention(
        implementation=str(getattr(config, "_attn_implementation", None)),
        has_window=bool(layers != {"full_attention"} or window),
        depends_on_length=rope.get("rope_type", "default") in ("dynamic", "longrope"),
    )
