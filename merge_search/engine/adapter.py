"""LoRA adapters as experts, from their headers: which tensor of the base each factor changes, and by what scale.

A key is ``base_model.model.<module>.lora_A.weight``, ``.lora_B.weight``, ``.lora_embedding_A``, ``.lora_embedding_B``
or ``.lora_magnitude_vector`` (DoRA); modules saved whole and biases stand under their plain names and replace the
base's. Adapters name *modules*; they are used where the module's weight has the same name on disk, which holds for
Llama, Mistral, Qwen, Gemma, Phi, GPT-2, OPT, BERT and their like. The arithmetic is in `checkpoint`.

Source: Hu et al. 2021, arXiv 2106.09685; scale alpha / sqrt(r): Kalajdzievski 2023, arXiv 2312.03732;
DoRA: Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from merge_search.engine.headers import CheckpointInfo

__all__ = ["AdapterEntry", "plan_adapter"]

PREFIX = "base_model.model."
FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.default)?(\.weight)?"
)
# Options under which the expert is more than base + scale * B @ A of the base as it lies on disk.
REFUSED_OPTIONS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "megatron_config",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True)
class AdapterEntry:
    """How one tensor of the base changes; the fields are names of the adapter's tensors.

    Either `whole` alone (the tensor is replaced), or `a` and `b`: W + scale * B @ A, transposed where
    `transpose`; with `magnitude` (DoRA) every row of that is scaled to a learned norm. With `whole` as well,
    W is `whole` (peft saves an embedding that it also adapts).
    """

    whole: str = ""
    a: str = ""
    b: str = ""
    magnitude: str = ""
    scale: float = 1.0
    transpose: bool = False
    is_embedding: bool = False


def plan_adapter(base: CheckpointInfo, adapter: CheckpointInfo) -> tuple[dict[str, AdapterEntry], list[str]]:
    """Entries by name of the base's tensor, and every problem found."""
    problems = _check_config(adapter.config)
    entries: dict[str, AdapterEntry] = {}
    for key in adapter.tensors:
        name = key.removeprefix(PREFIX)
        found = FACTOR.fullmatch(name)
        if found is None:
            plain = re.sub(r"\.(base_layer|modules_to_save(\.default)?|original_module)(?=\.)", "", name)
            target, change = plain, {"whole": key}
        else:
            target = f"{found['module']}.weight"
            factor = found["factor"]
            change = {{"A": "a", "B": "b", "r": "magnitude"}[factor[-1]]: key}
        if target not in base.tensors:
            problems.append(_unknown(key, target, base))
            continue
        entry = replace(entries.get(target, AdapterEntry()), **change)  # type: ignore[arg-type]
        if found is not None:
            is_embedding = entry.is_embedding or "embedding" in found["factor"]
            transpose = is_embedding or bool(adapter.config.get("fan_in_fan_out"))
            entry = replace(entry, is_embedding=is_embedding, transpose=transpose)
        entries[target] = entry
    for target, entry in entries.items():
        if entry.a or entry.b or entry.magnitude:
            entries[target] = _with_scale(target, entry, base, adapter, problems)
        elif adapter.tensors[entry.whole].shape != base.tensors[target].shape:
            shapes = f"{list(base.tensors[target].shape)} in the base, {list(adapter.tensors[entry.whole].shape)} in the adapter"
            problems.append(f"tensor {target!r} must have one shape, found {shapes}")
    if not adapter.tensors:
        problems.append("the adapter holds no tensors")
    return entries, problems


def _check_config(config: Mapping[str, Any]) -> list[str]:
    merge_first = "merge it with peft's merge_and_unload and give that folder"
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type must be 'LORA', got {config.get('peft_type')!r}; {merge_first}")
    for option in REFUSED_OPTIONS:
        if config.get(option):
            problems.append(f"adapters with {option} are not supported; {merge_first}")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_BASE):
        problems.append(
            f"an adapter begun with init_lora_weights={start!r} changes the base's own weights; {merge_first}"
        )
    return problems


def _unknown(key: str, target: str, base: CheckpointInfo) -> str:
    if target in ("lm_head.weight", "embed_out.weight") and base.config.get("tie_word_embeddings"):
        why = "the base ties its head to the embedding, which the adapter would change apart"
    else:
        why = "the base has no tensor of that name (adapters name modules, and this module has another name on disk)"
    return f"{key!r} changes {target!r}, but {why}; merge it with peft's merge_and_unload and give that folder"


def _with_scale(
    target: str, entry: AdapterEntry, base: CheckpointInfo, adapter: CheckpointInfo, problems: list[str]
) -> AdapterEntry:
    """`entry` with its scale; problems with shapes and ranks are appended."""
    if not (entry.a and entry.b):
        problems.append(f"tensor {target!r} must have both factors, A and B; found only one")
        return entry
    a, b = adapter.tensors[entry.a].shape, adapter.tensors[entry.b].shape
    shape = base.tensors[target].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != (shape[::-1] if entry.transpose else shape):
        problems.append(
            f"tensor {target!r}: factors B {list(b)} and A {list(a)} do not give the base's shape {list(shape)}"
        )
        return entry
    config, module = adapter.config, target.removesuffix(".weight")
    r = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if r != a[0] or not isinstance(alpha, int | float):
        problems.append(
            f"tensor {target!r}: adapter_config.json says r={r!r}, lora_alpha={alpha!r}, the factors have rank {a[0]}"
        )
        return entry
    n_norms = shape[1] if entry.transpose else shape[0]
    if entry.magnitude and math.prod(adapter.tensors[entry.magnitude].shape) != n_norms:
        problems.append(
            f"tensor {target!r}: DoRA's magnitudes must be {n_norms}, found {adapter.tensors[entry.magnitude].shape}"
        )
    return replace(entry, scale=alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """peft's rule: the value of the first pattern that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
