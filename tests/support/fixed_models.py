"""Models whose tensors are the same on any machine, for tests that compare with what an earlier version made of them.

They are made by integer arithmetic and single IEEE operations: no generator draws them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save, save_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXPERTS = ("a", "b", "c")
ADAPTER = "d"
ALL_EXPERTS = (*EXPERTS, ADAPTER)
VARIED: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (523, 129),  # longer than what is ranked exactly, 2**16
    "model.layers.0.input_layernorm.weight": (257,),  # longer than what a loop pays for, 2**8
    "model.layers.0.self_attn.q_proj.weight": (129, 131),  # longer than 2**14
    "model.layers.0.mlp.experts.gate_up_proj": (3, 12, 20),
    "model.layers.1.input_layernorm.weight": (13,),
    "model.layers.1.self_attn.o_proj.weight": (37, 29),
    "model.layers.1.mlp.down_proj.weight": (5, 7),
    "model.norm.weight": (301,),
}
UNCHANGED = {"model.layers.1.input_layernorm.weight": EXPERTS, "model.layers.1.self_attn.o_proj.weight": ("b",)}
"""Tensors that experts left as the base has them."""
LONG = {"model.layers.0.mlp.up_proj.weight": (521, 509)}
"""Longer than what is worked on at a time, 2**18."""
_PARTS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
LLAMA = {
    "model.embed_tokens.weight": (11, 8),
    **{f"model.layers.{i}.{part}.weight": (8,) if "norm" in part else (9, 8) for i in range(5) for part in _PARTS},
    "model.norm.weight": (8,),
    "lm_head.weight": (11, 8),
}
"""Five layers, for mergekit's gradients and slices."""
GPT2 = {
    "transformer.wte.weight": (19, 8),
    "transformer.h.0.attn.bias": (1, 1, 6, 6),  # a causal mask, which is not merged
    "transformer.h.0.attn.c_attn.weight": (8, 24),  # stored (in, out)
    "transformer.h.0.attn.c_attn.bias": (24,),
    "transformer.h.0.ln_1.weight": (8,),
    "transformer.h.0.mlp.c_fc.weight": (8, 20),
    "transformer.ln_f.weight": (8,),
    "lm_head.weight": (19, 8),  # the embedding's numbers, stored a second time
}
"""What is stored otherwise than in a llama."""
Array = NDArray[np.float32]


def noise(name: str, shape: tuple[int, ...]) -> Array:
    """Numbers k / 2**23 in [-1, 1) by a hash of their places (the finalizer of splitmix64)."""
    start = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    x = np.arange(math.prod(shape), dtype=np.uint64) + start
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return ((x >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def _base(name: str, shape: tuple[int, ...]) -> Array:
    """Half of the noise; a few zeros of either sign, and a few entries on which experts disagree exactly."""
    made = (noise(f"base {name}", shape) * np.float32(0.5)).reshape(-1)
    if len(made) > 64:
        made[:3], made[3:6], made[6:12] = 0.0, -0.0, 0.25
    return made.reshape(shape)


def _expert(expert: str, name: str, base: Array) -> Array:
    """The base plus cubes of noise, a part of it common to all experts; a quarter of the entries as they were."""
    if expert in UNCHANGED.get(name, ()) and base.shape == VARIED[name]:
        return base
    common, own = noise(f"common {name}", base.shape), noise(f"{expert} {name}", base.shape)
    delta = (common * common * common + own * own * own) * np.float32(2**-4)
    delta[noise(f"kept {expert} {name}", base.shape) < -0.5] = 0.0
    made, flat = (base + delta).reshape(-1), base.reshape(-1)
    if len(made) > 64:
        made[:6] = flat[:6]
        made[6:12] = flat[6:12] + np.float32({"a": 2**-5, "b": -(2**-5), "c": 0.0}[expert])
    return made.reshape(base.shape)


def write_models(root: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> Path:
    """Folders ``base``, ``a``, ``b``, ``c``; ``statistics`` and ``maps`` that recipes beside them may ask for."""
    is_tied = shapes is GPT2
    bases = {name: _base(name, shape) for name, shape in shapes.items()}
    for model in ("base", *EXPERTS):
        own = {n: t if model == "base" else _expert(model, n, t) for n, t in bases.items()}
        tensors = {n: torch.from_numpy(t).to(DTYPES[dtype]) for n, t in own.items()}
        if is_tied:
            tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
            tensors["transformer.position_ids"] = torch.arange(6)
        (root / model).mkdir(parents=True)
        kind = "gpt2" if shapes is GPT2 else "llama"
        config = {"model_type": kind, "num_hidden_layers": 5, "dtype": dtype, "tie_word_embeddings": is_tied}
        (root / model / "config.json").write_text(json.dumps(config))
        save_file(tensors, root / model / "model.safetensors", metadata={"format": "pt"})
    if shapes is VARIED:
        _write_statistics(root / "statistics", shapes)
        _write_adapter(root / ADAPTER)
        (root / "maps").mkdir()
        for expert in EXPERTS:
            name, data = map_of(expert)
            (root / "maps" / f"{name}.safetensors").write_bytes(data)
    return root


def _write_adapter(folder: Path) -> None:
    """A LoRA adapter of two matrices; its factors are whole numbers, so that no product is rounded."""
    tensors = {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"):
        for factor, shape in (("A", (2, VARIED[f"{name}.weight"][1])), ("B", (VARIED[f"{name}.weight"][0], 2))):
            numbers = np.floor(noise(f"{factor} {name}", shape) * np.float32(4))
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = torch.from_numpy(numbers)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2**-6, "target_modules": ["q_proj", "o_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@functools.cache
def map_of(expert: str) -> tuple[str, bytes]:
    """Hash and content of the file with an expert's coefficients per output row."""
    numbers = {
        n: torch.from_numpy(noise(f"map {expert} {n}", VARIED[n][:1]) + np.float32(0.75)) for n in sorted(VARIED)
    }
    data = save(numbers)
    return hashlib.sha256(data).hexdigest(), data


KINDS = (
    "fisher",
    "fisher@0.5",
    "gradient",
    "absolute_gradient",
    "external",
    "activation_norm",
    "gram",
    "prompt_gram@prompts=64",
)
"""Statistics that the fixed cases read."""


def _write_statistics(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for expert in EXPERTS:
            made = {n: torch.from_numpy(_statistic(kind, expert, n, shape)) for n, shape in shapes.items()}
            save_file(made, folder / kind / f"{expert}.safetensors")


def _statistic(kind: str, expert: str, name: str, shape: tuple[int, ...]) -> Array:
    drawn = noise(f"{kind} {expert} {name}", shape)
    if kind.partition("@")[0] in ("gram", "prompt_gram") and len(shape) > 1:  # whole numbers: no sum is rounded
        x = np.floor(drawn * np.float32(4)).astype(np.int64)
        return ((np.swapaxes(x, -1, -2) @ x) / np.float32(2**6)).astype(np.float32)
    if kind == "activation_norm":
        return np.abs(noise(f"{kind} {expert} {name}", shape[-1:]))
    return drawn if kind == "gradient" else np.abs(drawn) * np.abs(drawn)
