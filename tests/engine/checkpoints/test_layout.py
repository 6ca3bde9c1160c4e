"""A tensor's block and module kind follow from its name, for every architecture that people merge."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_search.engine.checkpoints.headers import CheckpointInfo, TensorHeader
from merge_search.engine.checkpoints.layout import is_mergeable, layout, name_groups

# name -> (block, kind), as the files of real checkpoints have them.
TABLES = {
    "llama, mistral, qwen2": """
        model.embed_tokens.weight                          - embedding
        model.layers.0.self_attn.q_proj.weight             0 attention
        model.layers.0.self_attn.q_proj.bias               0 attention
        model.layers.0.self_attn.o_proj.weight             0 attention
        model.layers.0.mlp.gate_proj.weight                0 mlp
        model.layers.0.mlp.down_proj.weight                0 mlp
        model.layers.0.input_layernorm.weight              0 norm
        model.layers.0.post_attention_layernorm.weight     0 norm
        model.layers.10.mlp.up_proj.weight                 1 mlp
        model.norm.weight                                  - norm
        lm_head.weight                                     - head""",
    "qwen3, gemma": """
        model.layers.0.self_attn.q_norm.weight             0 norm
        model.layers.0.self_attn.k_norm.weight             0 norm
        model.layers.0.pre_feedforward_layernorm.weight    0 norm
        model.layers.0.post_feedforward_layernorm.weight   0 norm""",
    "phi, phi-3": """
        model.layers.0.self_attn.dense.weight              0 attention
        model.layers.0.self_attn.qkv_proj.weight           0 attention
        model.layers.0.mlp.fc1.weight                      0 mlp
        model.layers.0.mlp.gate_up_proj.weight             0 mlp
        model.final_layernorm.weight                       - norm
        lm_head.bias                                       - head""",
    "gpt2": """
        wte.weight                                         - embedding
        wpe.weight                                         - embedding
        h.0.ln_1.weight                                    0 norm
        h.0.attn.c_attn.weight                             0 attention
        h.0.attn.c_proj.bias                               0 attention
        h.0.mlp.c_fc.weight                                0 mlp
        h.1.mlp.c_proj.weight                              1 mlp
        ln_f.weight                                        - norm""",
    "gpt-neox": """
        gpt_neox.embed_in.weight                           - embedding
        gpt_neox.layers.0.attention.query_key_value.weight 0 attention
        gpt_neox.layers.0.attention.dense.weight           0 attention
        gpt_neox.layers.0.mlp.dense_h_to_4h.weight         0 mlp
        gpt_neox.layers.0.mlp.dense_4h_to_h.bias           0 mlp
        gpt_neox.layers.0.post_attention_layernorm.bias    0 norm
        gpt_neox.final_layer_norm.weight                   - norm
        embed_out.weight                                   - head""",
    "opt": """
        model.decoder.embed_tokens.weight                  - embedding
        model.decoder.embed_positions.weight               - embedding
        model.decoder.layers.0.self_attn.out_proj.weight   0 attention
        model.decoder.layers.0.self_attn_layer_norm.weight 0 norm
        model.decoder.layers.0.fc1.weight                  0 mlp
        model.decoder.layers.0.fc2.bias                    0 mlp
        model.decoder.layers.0.final_layer_norm.bias       0 norm""",
    "bert": """
        embeddings.word_embeddings.weight                  - embedding
        embeddings.LayerNorm.gamma                         - norm
        encoder.layer.0.attention.self.query.weight        0 attention
        encoder.layer.0.attention.output.dense.weight      0 attention
        encoder.layer.0.attention.output.LayerNorm.weight  0 norm
        encoder.layer.0.intermediate.dense.weight          0 mlp
        encoder.layer.0.output.dense.bias                  0 mlp
        encoder.layer.0.output.LayerNorm.beta              0 norm
        pooler.dense.weight                                - head
        cls.predictions.transform.dense.weight             - head
        cls.predictions.bias                               - head""",
    "roberta": """
        roberta.embeddings.token_type_embeddings.weight    - embedding
        roberta.encoder.layer.0.output.dense.weight        0 mlp
        lm_head.layer_norm.weight                          - norm
        lm_head.dense.weight                               - head
        classifier.out_proj.weight                         - head""",
    "t5: the decoder's blocks come first, its name sorts first": """
        shared.weight                                                     - embedding
        encoder.block.0.layer.0.SelfAttention.q.weight                    2 attention
        encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight 2 attention
        encoder.block.0.layer.1.DenseReluDense.wi_0.weight                2 mlp
        encoder.block.0.layer.1.layer_norm.weight                         2 norm
        decoder.block.0.layer.1.EncDecAttention.k.weight                  0 attention
        decoder.block.1.layer.2.DenseReluDense.wo.weight                  1 mlp
        encoder.final_layer_norm.weight                                   - norm""",
    "vit": """
        vit.embeddings.cls_token                                  - embedding
        vit.embeddings.patch_embeddings.projection.weight         - embedding
        vit.encoder.layer.0.attention.attention.query.weight      0 attention
        vit.encoder.layer.0.attention.output.dense.weight         0 attention
        vit.encoder.layer.0.intermediate.dense.weight             0 mlp
        vit.encoder.layer.0.output.dense.weight                   0 mlp
        vit.encoder.layer.0.layernorm_before.weight               0 norm
        classifier.weight                                         - head""",
    "clip": """
        logit_scale                                               - other
        text_model.embeddings.token_embedding.weight              - embedding
        text_model.encoder.layers.0.self_attn.q_proj.weight       0 attention
        text_model.encoder.layers.0.layer_norm1.weight            0 norm
        vision_model.embeddings.class_embedding                   - embedding
        vision_model.pre_layrnorm.weight                          - norm
        vision_model.encoder.layers.0.mlp.fc1.weight              1 mlp
        visual_projection.weight                                  - head""",
    "mixtral": """
        model.layers.0.block_sparse_moe.gate.weight               0 mlp
        model.layers.0.block_sparse_moe.experts.7.w1.weight       0 mlp
        model.layers.1.block_sparse_moe.experts.0.w2.weight       1 mlp""",
    "qwen3-moe": """
        model.layers.0.mlp.gate.weight                            0 mlp
        model.layers.0.mlp.experts.12.up_proj.weight              0 mlp
        model.layers.0.mlp.shared_expert.down_proj.weight         0 mlp""",
    "mamba": """
        backbone.embeddings.weight                                - embedding
        backbone.layers.0.mixer.A_log                             0 other
        backbone.layers.0.mixer.in_proj.weight                    0 other
        backbone.layers.0.norm.weight                             0 norm
        backbone.norm_f.weight                                    - norm""",
    "numbers that are no layers": """
        visual.blocks.0.attn.qkv.weight                           0 attention
        visual.merger.mlp.0.weight                                - other
        classifier.3.weight                                       - head""",
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_names_of_real_checkpoints_have_their_block_and_kind(table: str) -> None:
    rows = [line.split() for line in table.strip().splitlines()]
    expected = {name: (None if block == "-" else int(block), kind) for name, block, kind in rows}
    groups = name_groups(expected)
    assert {name: (g.block, g.kind) for name, g in groups.items()} == expected
    assert all(g.tensor == name for name, g in groups.items())


def test_groups_do_not_depend_on_the_order_of_names() -> None:
    names = [line.split()[0] for line in TABLES["clip"].strip().splitlines()]
    assert list(name_groups(names).items()) == list(name_groups(reversed(names)).items())


def test_only_learned_floating_tensors_are_merged_in_natural_order() -> None:
    tensors = [
        header("h.2.attn.c_attn.weight", "F32", (4, 12)),
        header("h.10.attn.c_attn.bias", "BF16", (12,)),
        header("h.10.attn.bias", "F32", (1, 1, 8, 8)),  # GPT-2's causal mask
        header("h.10.attn.masked_bias", "F32", ()),
        header("embeddings.position_ids", "I64", (1, 8)),
        header("mask", "BOOL", (3,)),
        header("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (4,)),
        header("quantised.weight", "F8_E4M3", (4, 4)),
        header("layer.0.attention.bias", "F16", (4,)),  # a true bias
    ]
    info = CheckpointInfo(Path(), {t.name: t for t in tensors})
    assert list(layout(info)) == ["h.2.attn.c_attn.weight", "h.10.attn.c_attn.bias", "layer.0.attention.bias"]
    assert [is_mergeable(t) for t in tensors] == [True, True, *[False] * 6, True]


def header(name: str, dtype: str, shape: tuple[int, ...]) -> TensorHeader:
    return TensorHeader(name, dtype, shape, Path(), 0, 0)
