"""The group of a tensor, by its name alone: its block and its module kind.

A *stack* is a list of like layers (``model.layers``, ``encoder.block``). The first number in a name that follows a
stack's name is the layer. Blocks are counted over all stacks. Stacks come in the order in which they appear among the
naturally sorted names, so a decoder's blocks come before an encoder's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from merge_search.engine.checkpoints.dtypes import FLOATING
from merge_search.engine.checkpoints.headers import CheckpointInfo, TensorHeader, natural_key
from merge_search.recipe import Group

__all__ = ["is_before_blocks", "is_mergeable", "layer_of", "layout", "name_groups"]

# Parts that may stand before a number without being a stack of layers: ``classifier.0``, ``merger.mlp.2``.
NOT_A_STACK = re.compile(
    r"(mlp|classifier|head|heads|proj|projector|projection|linear|dense|fc|conv|downsample|upsample|predictions|experts)$"
)
NORM = re.compile(r"norm|layrnorm|^ln(_|$|\d)|_ln$|^bn\d*$")
ATTENTION = re.compile(r"attention|attn|^(wqkv|qkv|qkv_proj|[qkvo]_proj|query|key|value|query_key_value)$")
MLP = re.compile(
    r"mlp|ffn?$|^ffn|feed_?forward|^fc\d?$|^intermediate$|^output$|densereludense|dense_(h_to_4h|4h_to_h)|moe|expert|^router$"
    r"|^(gate|up|down|gate_up)_proj$|^w[123]$|^lin[12]$"
)
HEAD = re.compile(
    r"(^|_)head$|^embed_out$|^(classifier|score|cls|predictions|qa_outputs|pooler|proj_out|lm_logits|mlm|vocab_projector"
    r"|vocab_transform|pre_classifier|output_projection|text_projection|visual_projection|final_logits_bias)$"
)
EMBEDDING = re.compile(r"embed|^(wte|wpe|shared|cls_token|mask_token|distillation_token|relative_attention_bias)$")
MIXER = re.compile(r"^(mixer|mamba|ssm|recurrent|temporal_block|conv)$")

# Buffers that old checkpoints store as floats although no model learns them: causal masks and rotary frequencies.
BUFFER = re.compile(r"(attn|attention)\.(masked_)?bias$")
# Model classes with and without the heads of pretraining. A head that is never computed is not merged.
LANGUAGE_MODELS = ("ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForTokenClassification", "ForQuestionAnswering")
PRETRAINING = ("ForPreTraining", "ForNextSentencePrediction")
FREQUENCIES = re.compile(r"(^|\.)(inv_freq|rotary_pos_emb\.\w+)$")


def is_mergeable(tensor: TensorHeader) -> bool:
    """Whether a tensor takes part in merging: it is floating and learned. All others are copied from the base."""
    if tensor.dtype not in FLOATING or FREQUENCIES.search(tensor.name):
        return False
    # A causal mask is (1, 1, n, n) and its fill value a scalar; a real bias has one dimension.
    return len(tensor.shape) == 1 or not BUFFER.search(tensor.name)


def layout(info: CheckpointInfo) -> dict[str, Group]:
    """Return the group of every tensor of a checkpoint that is merged, in the checkpoint's order.

    Tensors that `is_mergeable` excludes, and poolers of language models, are left out and so stay the base's.
    """
    groups = name_groups(info.tensors)
    names = info.config.get("architectures") or [""]
    return {n: groups[n] for n, t in info.tensors.items() if is_mergeable(t) and _is_used(n, str(names[0]))}


def _is_used(name: str, architecture: str) -> bool:
    parts = name.split(".")
    if "seq_relationship" in parts:
        return architecture.endswith(PRETRAINING)
    return "pooler" not in parts or not architecture.endswith(LANGUAGE_MODELS)


def name_groups(names: Iterable[str]) -> dict[str, Group]:
    """Return the group of every name, in natural order.

    Determinism: depends on the set of names only.
    Example:
        >>> groups = name_groups(["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"])
        >>> for group in groups.values():
        ...     print(group.block, group.kind)
        None embedding
        0 attention
    """
    positions = {name: layer_of(name) for name in sorted(names, key=natural_key)}
    stacks: dict[str, set[int]] = {}
    for position in positions.values():
        if position is not None:
            stacks.setdefault(position[0], set()).add(position[1])
    block: dict[tuple[str, int], int] = {}
    for stack, layers in stacks.items():
        for layer in sorted(layers):
            block[stack, layer] = len(block)
    groups = {}
    for name, position in positions.items():
        if position is None:
            groups[name] = Group(name, None, _kind(name, None))
        else:
            stack, layer, tail = position
            groups[name] = Group(name, block[stack, layer], _kind(name, tail))
    return groups


def is_before_blocks(group: Group) -> bool:
    """Whether a tensor comes before all blocks: an embedding, or its norm (``embeddings.LayerNorm`` of BERT)."""
    parts = group.tensor.lower().split(".")
    return group.kind == "embedding" or (
        group.block is None and group.kind == "norm" and any(EMBEDDING.search(p) for p in parts)
    )


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Return stack, layer and the rest of a name; None outside any stack.

    Example:
        >>> layer_of("model.layers.3.mlp.up_proj.weight")
        ('model.layers', 3, 'mlp.up_proj.weight')
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and i > 0:
            if NOT_A_STACK.search(parts[i - 1].lower()):
                return None
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return None


def _kind(name: str, tail: str | None) -> str:
    """Return the module kind. `tail` is the part of the name after the layer's number, None outside any stack."""
    parts = (name if tail is None else tail).lower().split(".")
    # The module that holds the parameter decides about norms: ``self_attn.q_norm.weight`` is a norm, not attention.
    owner = parts[-2] if len(parts) > 1 else parts[-1]
    if NORM.search(owner):
        return "norm"
    order: tuple[tuple[str, re.Pattern[str]], ...]
    if tail is None:
        order = (("head", HEAD), ("embedding", EMBEDDING))
    else:
        order = (("other", MIXER), ("attention", ATTENTION), ("mlp", MLP))
    for kind, pattern in order:
        if any(pattern.search(p) for p in parts):
            return kind
    return "other"
