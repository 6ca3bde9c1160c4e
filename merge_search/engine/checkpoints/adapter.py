"""LoRA adapters as experts, from their headers: which tensor of the base each factor changes, and by what scale.

A key is ``base_model.model.<module>.lora_A.weight``, ``.lora_B.weight``, ``.lora_embedding_A``, ``.lora_embedding_B``
or ``.lora_magnitude_vector`` (DoRA); modules saved whole and biases stand under their plain names and replace the
base's. Adapters name *modules*: where a module has another name on disk (ViT, GPT-NeoX's head, a router of Mixtral), or
is several tensors there (experts saved whole), `module_names` says which. Factors of single parameters (``target_parameters``)
are told apart by `adapter_parameters`. The arithmetic is in `checkpoint`.

Source: Hu et al. 2021, arXiv 2106.09685; scale alpha / sqrt(r): Kalajdzievski 2023, arXiv 2312.03732;
DoRA: Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from merge_search.engine.checkpoints.adapter_parameters import Wrapped, wrapped_parameters
from merge_search.engine.checkpoints.headers import CheckpointInfo

if TYPE_CHECKING:
    from merge_search.engine.checkpoints.module_names import Part

__all__ = ["AdapterEntry", "plan_adapter"]

PREFIX = "base_model.model."
FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.default)?(\.weight)?"
)
# Options under which the expert is more than base + scale * B @ A of the base as it lies on disk.
REFUSED_OPTIONS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "megatron_config",
    "monteclora_config", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True)
class AdapterEntry:
    """How one tensor of the base changes; the fields are names of the adapter's tensors.

    Either `whole` alone (the tensor is replaced, by `part` of it where one is given), or `a` and `b`: W + scale * B @ A, transposed where
    `transpose`; with `magnitude` (DoRA) every row of that is scaled to a learned norm. With `whole` as well,
    W is `whole` (peft saves an embedding that it also adapts). With `wrapped` the factors are those of that parameter, of
    which the tensor is `part`.
    """

    whole: str = ""
    a: str = ""
    b: str = ""
    magnitude: str = ""
    scale: float = 1.0
    transpose: bool = False
    is_embedding: bool = False
    module: str = ""
    part: Part | None = None
    wrapped: Wrapped | None = None


def plan_adapter(base: CheckpointInfo, adapter: CheckpointInfo) -> tuple[dict[str, AdapterEntry], list[str]]:
    """Entries by name of the base's tensor, and every problem found."""
    problems = _check_config(adapter.config)
    if not adapter.tensors:
        problems.append("the adapter holds no tensors")
    wrapped = _wrapped(base, adapter.config, problems)
    named = {key: _named(key, wrapped) for key in adapter.tensors}
    renamed = _renamed(base, {parameter for parameter, _, _ in named.values()})
    entries: dict[str, AdapterEntry] = {}
    for key, (parameter, factor, own) in named.items():
        parts = renamed.get(parameter, ())
        if parameter in base.tensors:
            targets: dict[str, Part | None] = {parameter: None}
        elif factor and own is None and not (len(parts) == 1 and parts[0].is_whole):
            problems.append(_unknown(key, parameter, base, len(parts)))
            continue
        else:
            targets = {p.name: None if p.is_whole else p for p in parts}
        if not targets:
            problems.append(_unknown(key, parameter, base, 0))
        for target, part in targets.items():
            known = entries.get(target, AdapterEntry(module=parameter.removesuffix(".weight")))
            entries[target] = _extended(replace(known, wrapped=own or known.wrapped), key, factor, part, adapter)
    for target, entry in entries.items():
        if entry.a or entry.b or entry.magnitude:
            entries[target] = _with_scale(target, entry, base, adapter, problems)
        elif entry.part is not None:
            if adapter.tensors[entry.whole].n_elements != entry.part.n_elements:
                problems.append(
                    f"{entry.whole!r} must have {entry.part.n_elements} elements, found {adapter.tensors[entry.whole].n_elements}"
                )
        elif adapter.tensors[entry.whole].shape != base.tensors[target].shape:
            shapes = f"{list(base.tensors[target].shape)} in the base, {list(adapter.tensors[entry.whole].shape)} in the adapter"
            problems.append(f"tensor {target!r} must have one shape, found {shapes}")
    return entries, problems


def _wrapped(base: CheckpointInfo, config: Mapping[str, Any], problems: list[str]) -> Mapping[str, Wrapped]:
    """Parameters with factors of their own; problems are appended."""
    targets = config.get("target_parameters")
    if not targets:
        return {}
    found = wrapped_parameters(base, targets)
    if not found:
        why = "the base's config.json names no model that transformers knows" if found is None else "the model has none"
        problems.append(f"target_parameters {sorted(targets)} must be parameters of the base's model, but {why}")
    problems += [f"target_parameters: {w.name!r} {w.problem}" for w in (found or {}).values() if w.problem]
    return found or {}


def _named(key: str, wrapped: Mapping[str, Wrapped]) -> tuple[str, str, Wrapped | None]:
    """(parameter, field of the entry that the key fills; '' for ``whole``, the parameter if it has factors of its own)."""
    name = key.removeprefix(PREFIX)
    found = FACTOR.fullmatch(name)
    if found is None:
        return re.sub(r"\.(base_layer|modules_to_save(\.default)?|original_module)(?=\.)", "", name), "", None
    own = wrapped.get(found["module"])
    return f"{found['module']}.weight" if own is None else own.name, found["factor"], own


def _extended(known: AdapterEntry, key: str, factor: str, part: Part | None, adapter: CheckpointInfo) -> AdapterEntry:
    if not factor:
        return replace(known, whole=key, part=part)
    is_embedding = known.is_embedding or "embedding" in factor
    transpose = is_embedding or bool(adapter.config.get("fan_in_fan_out"))
    change: dict[str, Any] = {{"A": "a", "B": "b", "r": "magnitude"}[factor[-1]]: key}
    return replace(known, is_embedding=is_embedding, transpose=transpose, part=part, **change)


def _renamed(base: CheckpointInfo, parameters: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    missing = sorted(p for p in parameters if p not in base.tensors)
    if not missing:
        return {}
    from merge_search.engine.checkpoints.module_names import parts_on_disk

    return parts_on_disk(base, missing)


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


def _unknown(key: str, target: str, base: CheckpointInfo, n_parts: int) -> str:
    if target in ("lm_head.weight", "embed_out.weight") and base.config.get("tie_word_embeddings"):
        why = "the base ties its head to the embedding, which the adapter would change apart"
    elif n_parts:
        why = f"that module is {n_parts} tensors on disk, which factors of low rank cannot be divided among"
    else:
        why = "neither the base's files nor the model that transformers makes of its config.json have it"
    return f"{key!r} changes {target!r}, but {why}; merge it with peft's merge_and_unload and give that folder"


def _with_scale(
    target: str, entry: AdapterEntry, base: CheckpointInfo, adapter: CheckpointInfo, problems: list[str]
) -> AdapterEntry:
    """`entry` with its scale; problems with shapes and ranks are appended."""
    if not (entry.a and entry.b):
        problems.append(f"tensor {target!r} must have both factors, A and B; found only one")
        return entry
    a, b = adapter.tensors[entry.a].shape, adapter.tensors[entry.b].shape
    shape, own = base.tensors[target].shape, entry.wrapped
    if own is not None and entry.part is None and shape != own.shape:
        problems.append(
            f"tensor {target!r} must have the shape {list(own.shape)} of the parameter, found {list(shape)}"
        )
        return entry
    n, sizes = (1, shape[::-1] if entry.transpose else shape) if own is None else (own.n_experts, own.sizes)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != sizes:
        stack = f" of {n} experts" if n > 1 else ""
        problems.append(
            f"tensor {target!r}: factors B {list(b)} and A {list(a)}{stack} do not give the base's shape {list(sizes)}"
        )
        return entry
    config, module = adapter.config, entry.module if own is None else own.name
    r = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(r, int) or r * n != a[0] or not isinstance(alpha, int | float):
        stack = f" for {n} experts" if n > 1 else ""
        problems.append(
            f"tensor {target!r}: adapter_config.json says r={r!r}, lora_alpha={alpha!r}, the factors have rank {a[0]}{stack}"
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
