"""SASRec: causal self-attention that scores the next item of a sequence (Kang and McAuley 2018, arXiv 1808.09781).

With the item matrix E and learned positions P, a sequence s_1 ... s_n gives

    x_t = E[s_t] sqrt(d) + P[t]
    x   = LN(x) + attention(LN(x), x, x)         causal, one block
    x   = LN(x) + W_2 relu(W_1 LN(x))
    r_t = E LN(x_t)                              the score of every item as the next one

as in the authors' code, where the residual starts from the normalised input. Item 0 is padding, on the right: with a
causal mask it changes nothing before it. Differs: positions count from the first item and not from the last.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from merge_search.engine.architectures import SASREC

__all__ = ["SasRec", "SasRecConfig"]


class SasRecConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of a `SasRec`.

    Args:
        vocab_size: The number of items, and one for padding.
        hidden_size: Width d.
        num_hidden_layers: Blocks.
        num_attention_heads: Heads; they divide the width.
        max_position_embeddings: Longest sequence.
        dropout: Share of dropped activations in training.
    """

    model_type = SASREC

    def __init__(
        self,
        vocab_size: int = 100,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        max_position_embeddings: int = 50,
        dropout: float = 0.2,
        **more: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.max_position_embeddings, self.dropout = max_position_embeddings, dropout
        super().__init__(**{"pad_token_id": 0, **more})


class _Attention(nn.Module):
    def __init__(self, config: SasRecConfig) -> None:
        super().__init__()
        self.n_heads, self.dropout = config.num_attention_heads, config.dropout
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        q, k, v = self.q_proj(queries), self.k_proj(keys), self.v_proj(keys)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, config: SasRecConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = _Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size)
        self.mlp = nn.ModuleDict({n: nn.Linear(config.hidden_size, config.hidden_size) for n in ("fc1", "fc2")})
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        x = self.mlp_norm(normed + self.dropout(self.attention(normed, x)))
        inner = self.dropout(self.mlp["fc1"](x).relu())
        return x + self.dropout(self.mlp["fc2"](inner))  # type: ignore[no-any-return]


class SasRec(PreTrainedModel):  # type: ignore[misc]
    """Scores of all items as the next one, after every item of a sequence."""

    config_class = SasRecConfig
    base_model_prefix = "sasrec"

    def __init__(self, config: SasRecConfig) -> None:
        super().__init__(config)
        self.item_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.item_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Score every item after every place.

        Args:
            input_ids: Items, 0 for padding on the right. Shape (n, length), int64.
            attention_mask: Not used: no place sees what is on its right.

        Returns:
            ``logits`` of shape (n, length, vocab_size).
        """
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.item_embeddings(input_ids) * math.sqrt(self.config.hidden_size) + self.position_embeddings(places)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=functional.linear(self.final_norm(x), self.item_embeddings.weight))
