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


def scrambled(model: Any, seed: int, n_more: int = 0) -> Any:
    """The model with units in another order, and zeros in new ones: residual stream, MLPs and heads.

    There are `n_more` new heads, with eight new residual units and inner units each (a head has eight entries). Where
    key heads are shared, each of them gets equally many new query heads.
    """
    import copy
    import re

    from merge_search.engine.transforms.axes import axes_of, sizes_of

    sizes, draw = sizes_of(model.config.to_dict()), torch.Generator().manual_seed(seed)
    head, per = sizes.head, sizes.heads // sizes.kv
    extra = 0 if per == 1 else -(-n_more // sizes.kv)
    new = head * (n_more if per == 1 else extra * sizes.kv)
    more = {"d": new, "m": new}

    def order(n: int, n_new: int) -> torch.Tensor:  # new unit -> old unit, -1 for a unit of zeros
        return torch.cat([torch.arange(n), torch.full((n_new,), -1)])[torch.randperm(n + n_new, generator=draw)]

    def entries(heads: torch.Tensor) -> torch.Tensor:
        return torch.where(heads[:, None] < 0, -1, heads[:, None] * head + torch.arange(head)).flatten()

    stream, blocks = order(sizes.d, more["d"]), {}

    def of_block(block: str) -> dict[str, torch.Tensor]:
        if block not in blocks:
            keys = order(sizes.kv, n_more if per == 1 else 0)
            groups = [order(per, extra) for _ in keys]
            queries = [
                torch.where(g < 0, -1, g + k * per) if k >= 0 else torch.full_like(g, -1)
                for k, g in zip(keys.tolist(), groups, strict=True)
            ]
            inner = order(sizes.m, more["m"])
            blocks[block] = {"m": inner, "k": entries(keys), "q": entries(torch.cat(queries))}
        return blocks[block]

    state = {}
    for name, tensor in model.state_dict().items():
        number = re.search(r"\.(\d+)\.", name)
        axes, out = axes_of(name), tensor
        if "3" in axes:
            out = out.reshape(*out.shape[: axes.index("3")], 3, -1)
        for i, axis in enumerate(axes):
            if axis in "dmkq":
                index = stream if axis == "d" else of_block(number[1] if number else "")[axis]
                zeros = (index < 0).reshape([-1 if j == i else 1 for j in range(out.ndim)])
                out = out.index_select(i, index.clamp_min(0)).masked_fill(zeros, 0)
        state[name] = out.reshape(*out.shape[: axes.index("3")], -1) if "3" in axes else out
    config = copy.deepcopy(model.config)
    if n_more:
        queries = len(next(iter(blocks.values()))["q"]) // head
        wanted = {
            "hidden_size": len(stream), "n_embd": len(stream), "intermediate_size": sizes.m + more["m"],
            "n_inner": sizes.m + more["m"], "num_attention_heads": queries, "n_head": queries,
            "num_key_value_heads": queries if per == 1 else sizes.kv, "head_dim": head,
        }  # fmt: skip
        for key, value in wanted.items():
            if key in config.to_dict():
                setattr(config, key, value)
    other = type(model)(config).eval()
    other.load_state_dict(state)
    return other


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
