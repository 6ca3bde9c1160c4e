"""A chat template without its model, so that prompts can be rendered before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

__all__ = ["TemplateOnly"]


class TemplateOnly:
    """What lm-eval's model is to a prompt: its chat template.

    Args:
        folder: A folder with a tokenizer.
        arguments: What the template is called with besides the messages.
    """

    def __init__(self, folder: str, arguments: Mapping[str, Any]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.chat_template_args = dict(arguments)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, as lm-eval's model renders it."""
        text: str = HFLM.apply_chat_template(self, chat_history, add_generation_prompt)
        return text
