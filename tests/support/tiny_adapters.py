"""LoRA adapters with random factors on a small base, written and merged by peft: experts of systems that take pairs.

peft warns of much that is right here: `PEFT_WARNS` marks tests that make adapters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PEFT_WARNS = pytest.mark.filterwarnings(
    "ignore::UserWarning",
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:.*_pattern keys did not match any targeted module:RuntimeWarning",  # these patterns match parameters
)


def save_adapter(base: Path, out: Path, *, seed: int = 3, size: float = 0.3, **options: Any) -> Path:
    """Write an adapter of the causal model in `base` to `out`.

    Factors are normal with the standard deviation `size`; a magnitude of DoRA is 1 more. Modules that are saved whole
    and biases that are trained move by normal numbers.

    Args:
        options: Those of `peft.LoraConfig`; by default rank 4 and alpha 8 on ``q_proj`` and ``down_proj``.
    """
    import peft

    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(load(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn_like(p) * size + (1.0 if "magnitude" in name else 0.0))
                elif "modules_to_save" in name or (options.get("bias") == "all" and name.endswith("bias")):
                    p.add_(torch.randn_like(p))
    adapted.save_pretrained(out)
    return out


def save_adapters(base: Path, folder: Path, n: int = 3, **options: Any) -> dict[str, str]:
    """Write `n` adapters that differ in their numbers. Returns their folders by expert: a, b, ..."""
    names = "abcdefgh"[:n]
    return {name: str(save_adapter(base, folder / name, seed=i, **options)) for i, name in enumerate(names)}


def peft_merged(base: Path, adapter: Path, *, dtype: Any = "auto") -> dict[str, Tensor]:
    """The base's tensors after peft's ``merge_and_unload`` with an adapter."""
    import peft

    merged = peft.PeftModel.from_pretrained(load(base, dtype=dtype), adapter).merge_and_unload()
    return {n: t.detach().clone() for n, t in merged.state_dict().items()}


def load(base: Path, *, dtype: Any = "auto") -> Any:
    """The causal model in a folder, in its own dtype or another."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def extract_adapter(base: Path, expert: Path, out: Path, *, rank: int = 16) -> Path:
    """Write a whole fine-tune's change of its matrices as an adapter, cut to a rank: an expert that knows its task."""
    from merge_search.engine.checkpoints.adapter_writer import export_adapter
    from merge_search.engine.checkpoints.checkpoint import Checkpoint
    from merge_search.engine.execute.pairs import nearest_of

    before, after = Checkpoint(base), Checkpoint(expert)
    matrices = [n for n, t in before.info.tensors.items() if len(t.shape) == 2 and ".layers." in n]
    pairs = {
        name.removesuffix(".weight"): nearest_of(
            after.tensor(name).float() - before.tensor(name).float(), rank, transpose=False
        )[0]
        for name in matrices
    }
    configs = [{"task_type": "CAUSAL_LM"}]
    export_adapter(out, base=str(base), pairs=pairs, embeddings=(), configs=configs, files={})
    return out
