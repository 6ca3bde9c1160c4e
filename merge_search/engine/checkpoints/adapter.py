"""LoRA adapters as experts, from their headers: which tensor of the base each factor changes, and by what scale.

A key is ``base_model.model.<module>.lora_A.weight``, ``.lora_B.weight``, ``.lora_embedding_A``, ``.lora_embedding_B``
or ``.lora_magnitude_vector`` (DoRA). Modules saved whole and biases have their plain names and replace the base's
tensors. Adapters name *modules*. A module may have another name on disk (ViT, GPT-NeoX's head, a router of Mixtral), or
be several tensors there (experts saved whole); `module_names` finds them. `adapter_parameters` finds the factors of
single parameters (``target_parameters``). The arithmetic is in `checkpoint`.

Source: Hu et al. 2021, arXiv 2106.09685; scale alpha / sqrt(r): Kalajdzievski 2023, arXiv 2312.03732; DoRA: Liu et al.
2024, arXiv 2402.09353.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from merge_search.engine.checkpoints.adapter_parameters import Wrapped, wrapped_parameters
from merge_search.engine.checkpoints.headers import CheckpointInfo

if TYPE_CHECKING:
    from merge_search.engine.checkpoints.module_names import Part

__all__ = ["AdapterEntry", "factors_problem", "plan_adapter", "saved_whole"]

PREFIX = "base_model.model."
FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?"
)
# Options under which the expert is more than base + scale * B @ A of the base as it lies on disk.
REFUSED_OPTIONS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "megatron_config",
    "monteclora_config", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
# Values of init_lora_weights that change the base's own weights.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_MERGE_FIRST = "merge it with peft's merge_and_unload and give that folder"


@dataclass(frozen=True)
class AdapterEntry:
    """How one tensor of the base changes. The strings are names of the adapter's tensors, '' where there is none.

    With `whole` alone, the tensor is replaced. With `a` and `b` it becomes W + scale * B @ A. If `whole` is given as
    well, it takes the place of W (peft saves an embedding that it also adapts).

    Attributes:
        whole: The tensor that replaces the base's.
        a: Factor A.
        b: Factor B.
        magnitude: DoRA's magnitudes, to which every row of the sum is scaled.
        scale: Factor of B @ A.
        transpose: Add the transposed product.
        is_embedding: The factors adapt an embedding.
        module: Name of the module, for patterns of the adapter's config.
        part: The part of `whole`, or of the parameter `wrapped`, that the tensor is; None for all of it.
        wrapped: The parameter that the factors belong to, if it has factors of its own.
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
    """Plan how an adapter changes a base.

    Args:
        base: The base's headers and config.
        adapter: The adapter's headers and config.
    Returns:
        Entries by name of the base's tensor, and every problem found.
    """
    problems = _check_config(adapter.config)
    if not adapter.tensors:
        problems.append("the adapter holds no tensors")
    wrapped = _wrapped(base, adapter.config, problems)
    keys = [_parse_key(key, wrapped) for key in adapter.tensors]
    renamed = _renamed(base, {key.parameter for key in keys})
    entries: dict[str, AdapterEntry] = {}
    for key in keys:
        parts = renamed.get(key.parameter, ())
        targets = _targets(key, parts, base)
        if not targets:
            problems.append(_unknown(key, base, len(parts)))
        for target, part in targets.items():
            entry = entries.get(target, AdapterEntry(module=key.parameter.removesuffix(".weight")))
            entries[target] = _extended(entry, key, part, adapter.config)
    for target, entry in entries.items():
        if entry.a or entry.b or entry.magnitude:
            entries[target] = _with_scale(target, entry, base, adapter, problems)
        elif problem := _replacement_problem(target, entry, base, adapter):
            problems.append(problem)
    return entries, problems


def factors_problem(base: CheckpointInfo, expert: CheckpointInfo) -> str:
    """Return why an expert cannot be merged as LoRA pairs, '' if it can.

    Args:
        base: The base's headers and config.
        expert: The expert's headers and config.
    """
    if not expert.is_adapter:
        return f"{expert.folder} is a whole model and no LoRA adapter"
    for name, entry in plan_adapter(base, expert)[0].items():
        if entry.magnitude:
            return f"{expert.folder} is a DoRA adapter, whose magnitudes scale whole rows of {name!r}"
        if entry.wrapped is not None:
            return f"{expert.folder} adapts the parameter {entry.wrapped.name!r} by itself (target_parameters)"
    return ""


def saved_whole(base: CheckpointInfo, adapter: CheckpointInfo) -> list[str]:
    """Return the base's tensors that an adapter replaces, in place of adding a product of factors."""
    return [name for name, entry in plan_adapter(base, adapter)[0].items() if entry.whole and not entry.a]


class _Key(NamedTuple):
    """A key of the adapter, parsed.

    Attributes:
        name: The key itself.
        parameter: Name of the parameter that it changes, as the model has it.
        factor: Which factor it is, as peft names it; '' for a tensor that replaces the parameter.
        wrapped: The parameter, if it has factors of its own.
    """

    name: str
    parameter: str
    factor: str
    wrapped: Wrapped | None


def _parse_key(name: str, wrapped: Mapping[str, Wrapped]) -> _Key:
    plain = name.removeprefix(PREFIX)
    match = FACTOR.fullmatch(plain)
    if match is None:
        inner = r"\.(base_layer|modules_to_save(\.default)?|original_module)(?=\.)"
        return _Key(name, re.sub(inner, "", plain), "", None)
    parameter = wrapped.get(match["module"])
    if parameter is None:
        return _Key(name, f"{match['module']}.weight", match["factor"], None)
    return _Key(name, parameter.name, match["factor"], parameter)


def _targets(key: _Key, parts: Sequence[Part], base: CheckpointInfo) -> dict[str, Part | None]:
    """Return the tensors of the base that a key changes, each with the part of the parameter that it is.

    The part is None for a whole parameter. The table is empty if the key cannot be applied to the base.
    """
    if key.parameter in base.tensors:
        return {key.parameter: None}
    is_one_tensor = len(parts) == 1 and parts[0].is_whole
    if key.factor and key.wrapped is None and not is_one_tensor:
        return {}
    return {part.name: None if part.is_whole else part for part in parts}


def _extended(entry: AdapterEntry, key: _Key, part: Part | None, config: Mapping[str, Any]) -> AdapterEntry:
    """Return `entry` with the adapter's tensor `key` added."""
    entry = replace(entry, wrapped=key.wrapped or entry.wrapped, part=part)
    if not key.factor:
        return replace(entry, whole=key.name)
    is_embedding = entry.is_embedding or "embedding" in key.factor
    transpose = is_embedding or bool(config.get("fan_in_fan_out"))
    field: dict[str, Any] = {{"A": "a", "B": "b", "r": "magnitude"}[key.factor[-1]]: key.name}
    return replace(entry, is_embedding=is_embedding, transpose=transpose, **field)


def _wrapped(base: CheckpointInfo, config: Mapping[str, Any], problems: list[str]) -> Mapping[str, Wrapped]:
    """Return the parameters with factors of their own. Problems are appended to `problems`."""
    targets = config.get("target_parameters")
    if not targets:
        return {}
    parameters = wrapped_parameters(base, targets)
    if not parameters:
        is_unknown = parameters is None
        why = "the base's config.json names no model that transformers knows" if is_unknown else "the model has none"
        problems.append(f"target_parameters {sorted(targets)} must be parameters of the base's model, but {why}")
        return {}
    problems += [f"target_parameters: {w.name!r} {w.problem}" for w in parameters.values() if w.problem]
    return parameters


def _renamed(base: CheckpointInfo, parameters: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    """Return the parts on disk of the parameters that the base's files do not name."""
    missing = sorted(p for p in parameters if p not in base.tensors)
    if not missing:
        return {}
    from merge_search.engine.checkpoints.module_names import parts_on_disk

    return parts_on_disk(base, missing)


def _check_config(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type must be 'LORA', got {config.get('peft_type')!r}; {_MERGE_FIRST}")
    for option in REFUSED_OPTIONS:
        if config.get(option):
            problems.append(f"adapters with {option} are not supported; {_MERGE_FIRST}")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_BASE):
        problems.append(
            f"an adapter begun with init_lora_weights={start!r} changes the base's own weights; {_MERGE_FIRST}"
        )
    return problems


def _unknown(key: _Key, base: CheckpointInfo, n_parts: int) -> str:
    if key.parameter in ("lm_head.weight", "embed_out.weight") and base.config.get("tie_word_embeddings"):
        why = "the base ties its head to the embedding, and the adapter would change the head alone"
    elif n_parts:
        why = f"that module is {n_parts} tensors on disk, and factors of low rank cannot be divided among them"
    else:
        why = "neither the base's files nor the model that transformers makes of its config.json have it"
    return f"{key.name!r} changes {key.parameter!r}, but {why}; {_MERGE_FIRST}"


def _replacement_problem(target: str, entry: AdapterEntry, base: CheckpointInfo, adapter: CheckpointInfo) -> str:
    """Return why `entry.whole` cannot replace the tensor, '' if it can."""
    whole = adapter.tensors[entry.whole]
    if entry.part is not None:
        if whole.n_elements == entry.part.n_elements:
            return ""
        return f"{entry.whole!r} must have {entry.part.n_elements} elements, found {whole.n_elements}"
    if whole.shape == base.tensors[target].shape:
        return ""
    shapes = f"{list(base.tensors[target].shape)} in the base, {list(whole.shape)} in the adapter"
    return f"tensor {target!r} must have one shape, found {shapes}"


def _with_scale(
    target: str, entry: AdapterEntry, base: CheckpointInfo, adapter: CheckpointInfo, problems: list[str]
) -> AdapterEntry:
    """Return `entry` with its scale. Problems with shapes and ranks are appended to `problems`."""
    problem = _factor_problem(target, entry, base, adapter)
    if problem:
        problems.append(problem)
        return entry
    config = adapter.config
    n_experts = 1 if entry.wrapped is None else entry.wrapped.n_experts
    module = entry.module if entry.wrapped is None else entry.wrapped.name
    r = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    rank = adapter.tensors[entry.a].shape[0]
    if not isinstance(r, int) or r * n_experts != rank or not isinstance(alpha, int | float):
        stack = f" for {n_experts} experts" if n_experts > 1 else ""
        problems.append(
            f"tensor {target!r}: adapter_config.json says r={r!r}, lora_alpha={alpha!r}, "
            f"the factors have rank {rank}{stack}"
        )
        return entry
    if problem := _magnitude_problem(target, entry, base, adapter):
        problems.append(problem)
    return replace(entry, scale=alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def _factor_problem(target: str, entry: AdapterEntry, base: CheckpointInfo, adapter: CheckpointInfo) -> str:
    """Return why the factors A and B do not fit the tensor, '' if they do."""
    if not (entry.a and entry.b):
        return f"tensor {target!r} must have both factors, A and B; found only one"
    a, b = adapter.tensors[entry.a].shape, adapter.tensors[entry.b].shape
    shape, parameter = base.tensors[target].shape, entry.wrapped
    if parameter is None:
        n_experts, sizes = 1, shape[::-1] if entry.transpose else shape
    else:
        if entry.part is None and shape != parameter.shape:
            wanted = list(parameter.shape)
            return f"tensor {target!r} must have the shape {wanted} of the parameter, found {list(shape)}"
        n_experts, sizes = parameter.n_experts, parameter.sizes
    are_matrices = len(a) == 2 and len(b) == 2
    if are_matrices and a[0] == b[1] and (b[0], a[1]) == sizes:
        return ""
    stack = f" of {n_experts} experts" if n_experts > 1 else ""
    return f"tensor {target!r}: factors B {list(b)} and A {list(a)}{stack} do not give the base's shape {list(sizes)}"


def _magnitude_problem(target: str, entry: AdapterEntry, base: CheckpointInfo, adapter: CheckpointInfo) -> str:
    """Return why DoRA's magnitudes do not fit the tensor, '' if they do or there are none."""
    shape = base.tensors[target].shape
    n_norms = shape[1] if entry.transpose else shape[0]
    if not entry.magnitude or math.prod(adapter.tensors[entry.magnitude].shape) == n_norms:
        return ""
    return f"tensor {target!r}: DoRA's magnitudes must be {n_norms}, found {adapter.tensors[entry.magnitude].shape}"


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the module's name, as peft does."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
