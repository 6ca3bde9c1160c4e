"""Write LoRA pairs as an adapter folder that peft loads: either whole or not at all, as `writer` does.

The scale is in B: alpha is the rank, module by module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from merge_search.engine.checkpoints.adapter import PREFIX
from merge_search.engine.checkpoints.writer import whole_folder, write_file
from merge_search.engine.contracts import Factors

__all__ = ["export_adapter"]


def export_adapter(
    out: Path,
    *,
    base: str,
    pairs: Mapping[str, Factors],
    embeddings: Sequence[str],
    configs: Sequence[Mapping[str, Any]],
    files: Mapping[str, str | bytes | Path],
) -> None:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and other files to `out`.

    Args:
        out: Must not exist, or be an empty folder.
        base: Folder or hub id of the base.
        pairs: By module of the model; not empty.
        embeddings: Those of the modules that are embeddings.
        configs: Configs of the adapters that were merged. What they agree in and peft asks for is kept.
        files: More files by name: text, bytes, or a file to copy.
    Raises:
        InputError: `out` exists and is not empty, or the disk has too little room. Nothing was touched.
    """
    ranks = {module: f.rank for module, f in pairs.items()}
    rank = max(ranks.values())
    patterns = {module: r for module, r in sorted(ranks.items()) if r != rank}
    tasks = {config.get("task_type") for config in configs}
    config = {
        "peft_type": "LORA",
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(pairs),
        "fan_in_fan_out": any(f.transpose for module, f in pairs.items() if module not in embeddings),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {}
    for module, f in pairs.items():
        for factor, tensor in (("A", f.a), ("B", f.b)):
            key = f"lora_embedding_{factor}" if module in embeddings else f"lora_{factor}.weight"
            tensors[f"{PREFIX}{module}.{key}"] = tensor.cpu().contiguous()
    data = save(dict(sorted(tensors.items())), metadata={"format": "pt"})
    with whole_folder(out, len(data)) as folder:
        write_file(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        write_file(folder / "adapter_model.safetensors", data)
        for name, content in files.items():
            write_file(folder / name, content)
