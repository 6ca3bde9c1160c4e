"""Tiny models of one or several shapes, on disk: what transforms read. Shared by several test files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_lm import make_model, make_tokenizer

from merge_search.recipe import Models


def save(model: Any, folder: Path, *, tokenizer: Any = None) -> Path:
    """Save a model with `tiny_lm`'s tokenizer."""
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def nudged(model: Any, seed: int, size: float = 0.1) -> Any:
    """The model with noise on every weight, in place."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * p.std().clamp_min(0.1) * torch.randn(p.shape, generator=draw).to(p.dtype))
    return model


def write_family(
    folder: Path, kind: str = "llama", *, experts: tuple[str, ...] = ("a", "b"), **settings: Any
) -> Models:
    """A base and fine-tunes of it."""
    places = {"base": str(save(make_model(kind, seed=0, **settings), folder / "base"))}
    for i, name in enumerate(experts):
        places[name] = str(save(nudged(make_model(kind, seed=0, **settings), 1 + i), folder / name))
    return Models(base=places.pop("base"), experts=places)


def add_adapter(folder: Path, base: str, *, seed: int = 0, rank: int = 2) -> str:
    """A LoRA adapter on a llama's query projections, with random factors."""
    import json

    from safetensors.torch import save_file

    from merge_search.engine.checkpoints.headers import read_checkpoint

    draw = torch.Generator().manual_seed(seed)
    factors = {}
    for name, t in read_checkpoint(base).tensors.items():
        if name.endswith("q_proj.weight"):
            module = "base_model.model." + name.removesuffix(".weight")
            factors[f"{module}.lora_A.weight"] = 0.3 * torch.randn(rank, t.shape[1], generator=draw)
            factors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(t.shape[0], rank, generator=draw)
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return str(folder)
