"""The model class that a config.json names: one of transformers, or one of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["SASREC", "SMILE", "model_class", "register"]

SASREC = "merge_search_sasrec"
"""``model_type`` of `engine.architectures.sasrec`."""

SMILE = "merge_search_smile"
"""``model_type`` of `engine.architectures.smile`."""


def model_class(config: Mapping[str, Any]) -> Any | None:
    """Return the class named first under ``architectures``, or `AutoModel` where none is named.

    Args:
        config: The fields of config.json.

    Returns:
        None: neither transformers nor this package has the class. Code that a folder brings along is never run.
    """
    import transformers

    register()
    names = config.get("architectures") or []
    if config.get("model_type") == SMILE:
        from merge_search.engine.architectures.smile import class_of

        return class_of(config)
    if config.get("model_type") == SASREC:
        from merge_search.engine.architectures.sasrec import SasRec

        return SasRec
    return getattr(transformers, names[0], None) if names else transformers.AutoModel


def register() -> None:
    """Let transformers' Auto classes load the architectures of this package. Repeated calls change nothing."""
    from transformers import AutoConfig, AutoModel

    from merge_search.engine.architectures.sasrec import SasRec, SasRecConfig
    from merge_search.engine.architectures.smile import SmileConfig

    AutoConfig.register(SMILE, SmileConfig, exist_ok=True)
    AutoConfig.register(SASREC, SasRecConfig, exist_ok=True)
    AutoModel.register(SasRecConfig, SasRec, exist_ok=True)
