"""Short forms of mergekit's YAML for small llamas. Shared by several test files."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from merge_search.engine.checkpoints.layout import name_groups
from merge_search.mergekit import read_mergekit
from merge_search.recipe import Recipe

PARTS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def llama_names(n_layers: int) -> list[str]:
    inside = [f"model.layers.{i}.{part}.weight" for i in range(n_layers) for part in PARTS]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", "lm_head.weight"]


def write_llamas(root: Path) -> Path:
    """Write ``base``, ``a``, ``b`` and ``c``: llama checkpoints of five layers with random weights."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(8, 4, generator=generator) for n in llama_names(5)}
    for name in ("base", "a", "b", "c"):
        folder = root / name
        folder.mkdir()
        (folder / "config.json").write_text(
            '{"model_type": "llama", "num_hidden_layers": 5, "architectures": ["LlamaForCausalLM"]}'
        )
        noise = 0.0 if name == "base" else 0.1
        tensors = {n: t + noise * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return root


def read(root: Path, data: dict) -> Recipe:
    file = root / "merge.yml"
    file.write_text(yaml.safe_dump(data))
    return read_mergekit(file)


def model(name: str, **parameters: object) -> dict:
    return {"model": name, "parameters": parameters} if parameters else {"model": name}


def task_arithmetic(*models: dict, **more: object) -> dict:
    return {"merge_method": "task_arithmetic", "base_model": "base", "models": list(models), **more}


def slices(*parts: tuple[list[int], list[dict]]) -> list[dict]:
    return [{"sources": [{**source, "layer_range": layers} for source in sources]} for layers, sources in parts]


def weights(recipe: Recipe, expert: str, part: str = "mlp.up_proj") -> list[float]:
    groups = name_groups(llama_names(5))
    return [recipe.coefficient(expert, groups[f"model.layers.{i}.{part}.weight"]) for i in range(5)]


def weight_of(recipe: Recipe, expert: str, tensor: str) -> float:
    return recipe.coefficient(expert, name_groups(llama_names(5))[tensor])
