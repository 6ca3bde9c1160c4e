"""What the axes of a transformer's tensors count, by the tensors' names and the config alone. torch-free.

    d  the residual stream, one for the whole model      v  tokens        p  positions      t  token types
    m  inner units of a block's MLP                      h  entries of one head
    q  query heads of a block, k  key/value heads        3  queries, keys, values in one tensor (GPT-2)

Families: Llama and its kin (Mistral, Qwen2 and 3, Gemma), BERT and its kin, GPT-2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from merge_search.engine.checkpoints.headers import TensorHeader

__all__ = ["Sizes", "axes_of", "is_head", "shape_problem", "sizes_of", "stored_name"]

_AXES: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), weight, bias)
    for pattern, weight, bias in (
        (r"(embed_tokens|word_embeddings|wte|lm_head|predictions\.decoder)$", "vd", "v"),
        (r"(position_embeddings|wpe)$", "pd", ""),
        (r"token_type_embeddings$", "td", ""),
        (r"(q_proj|self\.query)$", "qd", "q"),
        (r"(k_proj|v_proj|self\.key|self\.value)$", "kd", "k"),
        (r"(o_proj|attention\.output\.dense)$", "dq", "d"),
        (r"(gate_proj|up_proj|intermediate\.dense)$", "md", "m"),
        (r"(down_proj|\d\.output\.dense)$", "dm", "d"),
        (r"(pooler\.dense|transform\.dense)$", "dd", "d"),
        (r"(q_norm|k_norm)$", "h", "h"),
        (r"attn\.c_attn$", "d3q", "3q"),
        (r"attn\.c_proj$", "qd", "d"),
        (r"mlp\.c_fc$", "dm", "m"),
        (r"mlp\.c_proj$", "md", "d"),
        (r"(norm|LayerNorm|ln_\w+)$", "d", "d"),
        (r"cls\.predictions$", "", "v"),
    )
)


def axes_of(name: str) -> str:
    """One letter for each axis of a tensor; '' where they are not known.

    Example:
        >>> axes_of("model.layers.0.mlp.down_proj.weight"), axes_of("bert.encoder.layer.0.attention.self.query.bias")
        ('dm', 'q')
    """
    owner, _, last = name.rpartition(".")
    for pattern, weight, bias in _AXES:
        if pattern.search(owner) and last in ("weight", "bias"):
            return weight if last == "weight" else bias
    return ""


def is_head(name: str) -> bool:
    """Whether a tensor is a head over the vocabulary."""
    return name.endswith(("lm_head.weight", "predictions.decoder.weight"))


def stored_name(name: str, names: Collection[str], config: Mapping[str, Any]) -> str | None:
    """An expert's own name of a tensor; its embedding for a head that is tied to it. None: it has none."""
    if name in names:
        return name
    if is_head(name) and config.get("tie_word_embeddings", True):
        embeddings = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight")
        return next((n for n in names if n.endswith(embeddings)), None)
    return None


@dataclass(frozen=True)
class Sizes:
    """Numbers of units of a model.

    Attributes:
        d: Width of the residual stream.
        m: Inner units of an MLP.
        heads: Query heads.
        kv: Key/value heads.
        head: Entries of one head.
    """

    d: int
    m: int
    heads: int
    kv: int
    head: int

    def of(self, axis: str) -> int | None:
        """Length of an axis of this letter; None where the tensor says it."""
        known = {"d": self.d, "m": self.m, "q": self.heads * self.head, "k": self.kv * self.head, "h": self.head}
        return known.get(axis)


def sizes_of(config: Mapping[str, Any]) -> Sizes | None:
    """The sizes in a config; None where it lacks one."""

    def first(*keys: str) -> int | None:
        return next((config[key] for key in keys if isinstance(config.get(key), int)), None)

    d, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
    if d is None or heads is None:
        return None
    m = first("intermediate_size", "n_inner") or 4 * d
    return Sizes(d, m, heads, first("num_key_value_heads") or heads, first("head_dim") or d // heads)


def shape_problem(name: str, header: TensorHeader, sizes: Sizes) -> str:
    """Why a tensor's axes are not known; '' if they are."""
    axes = axes_of(name)
    if not axes:
        return f"no alignment is known for tensor {name!r}"
    known = [3 if a == "3" else sizes.of(a) for a in axes]
    if "3" in axes:
        wanted = [n for n in known if n is not None]
        fits = math.prod(header.shape) == math.prod(wanted)
    else:
        fits = len(axes) == len(header.shape) and all(n in (None, s) for n, s in zip(known, header.shape, strict=True))
    return "" if fits else f"tensor {name!r} has shape {list(header.shape)}, which does not follow from config.json"
