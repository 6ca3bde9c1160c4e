"""Tiny checkpoints with random weights, made when a test needs them: every architecture in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SaveModel = Callable[..., Path]


@pytest.fixture
def save_model(tmp_path: Path) -> SaveModel:
    """``save_model("llama", name="base", seed=0, dtype="float32", **config)`` returns a folder with random weights."""

    def save(
        kind: str, *, name: str = "base", seed: int = 0, dtype: str = "float32", shards: str = "50GB", **config: Any
    ) -> Path:
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build_model(kind, **config)
            for parameter in model.parameters():  # norms and biases too: ones and zeros would hide mistakes
                torch.nn.init.normal_(parameter, std=0.2)
        model = model.to(getattr(torch, dtype))
        model.config.dtype = getattr(torch, dtype)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=shards)
        return folder

    return save


@pytest.fixture
def save_tokenizer() -> Callable[..., None]:
    """``save_tokenizer(folder, ["a", "b"], added={"<pad>": 2})`` writes a word-level tokenizer.json."""

    def save(folder: Path, tokens: list[str], added: dict[str, int] | None = None) -> None:
        vocab = {token: i for i, token in enumerate(tokens)}
        special = [
            {
                "id": i,
                "content": t,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for t, i in (added or {}).items()
        ]
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": tokens[0]}
        data = {"version": "1.0", "added_tokens": special, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
        (folder / "tokenizer.json").write_text(json.dumps(data))

    return save


def build_model(kind: str, **config: Any) -> Any:
    """Return a transformers model with two blocks of width 16 and 64 tokens."""
    import transformers as tf

    size = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    causal = {**size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64}
    if kind == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**causal, num_key_value_heads=1, **config))
    if kind == "gpt2":
        small = {
            "vocab_size": 64,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return tf.GPT2LMHeadModel(tf.GPT2Config(**small, **config))
    if kind == "mixtral":
        return tf.MixtralForCausalLM(tf.MixtralConfig(**causal, num_local_experts=3, num_key_value_heads=1, **config))
    if kind == "gpt_oss":
        head = {"head_dim": 8, "num_key_value_heads": 1, "layer_types": ["full_attention"] * 2}
        return tf.GptOssForCausalLM(
            tf.GptOssConfig(**causal, **head, num_local_experts=3, num_experts_per_tok=2, **config)
        )
    if kind == "gpt_neox":
        return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**causal, **config))
    if kind == "bert":
        return tf.BertForMaskedLM(tf.BertConfig(**size, max_position_embeddings=32, **config))
    if kind == "bert_encoder":
        return tf.BertModel(tf.BertConfig(**size, max_position_embeddings=32, **config), add_pooling_layer=False)
    if kind == "vit":
        del size["vocab_size"]
        return tf.ViTForImageClassification(tf.ViTConfig(**size, image_size=8, patch_size=4, num_labels=3, **config))
    if kind == "t5":
        small = {
            "vocab_size": 64,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        }
        return tf.T5ForConditionalGeneration(tf.T5Config(**small, **config))
    raise ValueError(kind)
