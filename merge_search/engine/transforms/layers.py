"""Layers of a model by number: texts that name them, and the settings of a config that count them. torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from merge_search.engine.checkpoints.headers import CheckpointInfo
from merge_search.engine.checkpoints.layout import layer_of

__all__ = ["DEPTH_KEYS", "config_problems", "read_layers", "restacked_config", "restacked_names", "stack_of"]

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NONE = "-"
_NUMBERED = ("mlp_only_layers", "moe_layers")  # lists of layer numbers
# Settings by which transformers makes layers of one model differ, by their number. ``layer_types`` takes their place.
_PERIODIC = (
    "sliding_window_pattern", "full_attention_interval", "decoder_sparse_step", "interleave_moe_layer_step",
    "attn_layer_period", "expert_layer_period", "num_kv_shared_layers", "first_k_dense_replace",
)  # fmt: skip


def stack_of(info: CheckpointInfo) -> tuple[str, int] | None:
    """Name and depth of a model's stack of layers; None if it has none, several, or gaps in it."""
    layers: dict[str, set[int]] = {}
    for name in info.tensors:
        if (place := layer_of(name)) is not None:
            layers.setdefault(place[0], set()).add(place[1])
    if len(layers) != 1:
        return None
    ((stack, numbers),) = layers.items()
    return (stack, len(numbers)) if numbers == set(range(len(numbers))) else None


def read_layers(text: str, depth: int, *, what: str, may_be_none: bool = False) -> tuple[list[int | None], list[str]]:
    """Numbers of layers in a text such as ``0 1 1 2``, with ``-`` for none, and what is wrong with them."""
    out: list[int | None] = []
    wrong = []
    for word in text.replace(",", " ").split():
        if word == NONE and may_be_none:
            out.append(None)
        elif word.isdecimal() and int(word) < depth:
            out.append(int(word))
        else:
            wrong.append(word)
    problems = []
    if wrong:
        also = f", or {NONE} for none" if may_be_none else ""
        problems.append(f"{what} must have layers from 0 to {depth - 1}{also}, got {', '.join(wrong)} in {text!r}")
    elif all(layer is None for layer in out):
        problems.append(f"{what} must name at least one layer, got {text!r}")
    return out, problems


def config_problems(config: Mapping[str, Any], depth: int) -> list[str]:
    """Why a config cannot follow when layers are moved, repeated or left out."""
    keys = [key for key in DEPTH_KEYS if isinstance(config.get(key), int)]
    if not keys:
        return [f"config.json must have its number of layers as one of {', '.join(DEPTH_KEYS)}"]
    if config[keys[0]] != depth:
        return [f"config.json: {keys[0]} must be the number of layers in the files, {depth}, got {config[keys[0]]}"]
    if isinstance(config.get("layer_types"), list):
        return []
    odd = [key for key in _PERIODIC if config.get(key) not in (None, 0, 1)]
    if config.get("use_sliding_window"):
        odd.append("use_sliding_window")
    return (
        [f"config.json: {', '.join(odd)} makes layers differ by their number, and layer_types is missing"]
        if odd
        else []
    )


def restacked_names(names: Iterable[str], layers: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(new name, old name) of every tensor of a model whose new layer i is the old one `layers[i]`."""
    for name in names:
        place = layer_of(name)
        if place is None:
            yield name, name
            continue
        for new, old in enumerate(layers):
            if old == place[1]:
                yield f"{place[0]}.{new}.{place[2]}", name


def restacked_config(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """A config whose new layer i is the old one `layers[i]`: the depth, and every list with one entry a layer."""
    out = dict(config)
    keys = [key for key in DEPTH_KEYS if isinstance(config.get(key), int)]
    depth = config[keys[0]]
    for key in keys:
        out[key] = len(layers)
    for key, value in config.items():
        if not isinstance(value, list) or "layer" not in key:
            continue
        if key in _NUMBERED:
            out[key] = [i for i, layer in enumerate(layers) if layer in value]
        elif len(value) == depth:
            out[key] = [value[layer] for layer in layers]
    return out
