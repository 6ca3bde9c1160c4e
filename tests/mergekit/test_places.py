"""Where tensors outside the layers stand in a mergekit file: measured on mergekit 0.1.5."""

from __future__ import annotations

import json

import pytest

from merge_search.engine.checkpoints.layout import name_groups
from merge_search.mergekit.document import read_document
from merge_search.mergekit.values import place_of

NAMES = {
    "model.embed_tokens.weight": 0,
    "embeddings.LayerNorm.weight": 0,
    "bert.embeddings.LayerNorm.bias": 0,
    "model.layers.0.input_layernorm.weight": 0,
    "model.layers.1.mlp.up_proj.weight": 0,
    "model.layers.2.mlp.up_proj.weight": 1,
    "model.layers.3.mlp.up_proj.weight": 1,
    "model.norm.weight": 1,
    "lm_head.weight": 1,
    "embed_out.weight": 1,
}


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_and_their_norms_stand_before_the_layers_and_the_last_norm_and_the_head_behind(name: str) -> None:
    halves = [{"sources": [{"model": m, "layer_range": r}]} for m, r in (("a", [0, 2]), ("b", [2, 4]))]
    text = json.dumps({"merge_method": "passthrough", "slices": halves})
    document = read_document(text, None, [], where="merge.yml")
    assert document is not None
    assert place_of(name_groups(NAMES)[name], document.slices)[0] == NAMES[name]
