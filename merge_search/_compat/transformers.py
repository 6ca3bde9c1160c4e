"""The undocumented parts of transformers that this project uses. Importing this file loads no library.

`tests/library_internals/test_transformers.py` fails when transformers moves or changes one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

__all__ = [
    "as_saved",
    "attention_of",
    "auto_model_classes",
    "config_class_of",
    "converts_weights",
    "has_transposed_experts",
]


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


def config_class_of(model_type: str) -> Any:
    """The config class of a ``model_type``.

    Raises:
        ValueError: transformers does not know it.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers does not know the model_type {model_type!r}")
    return CONFIG_MAPPING[model_type]


def auto_model_classes(config_class: Any) -> Iterator[tuple[Any, Any]]:
    """Every Auto class for models that knows a config class, with the model class that it makes of it."""
    from transformers.models.auto import modeling_auto

    for name in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        model = None if mapping is None else mapping.get(config_class, None)
        if isinstance(model, type):  # a few architectures have a choice of classes, which the config decides
            yield getattr(modeling_auto, name), model


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
