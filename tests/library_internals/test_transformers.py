"""The undocumented parts of transformers that `merge_search._compat.transformers` uses still exist and do the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from merge_search._compat.transformers import as_saved, converts_weights, has_transposed_experts

SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
}


@pytest.fixture
def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SIZES))


def test_the_conversion_of_saving_unstacks_experts(mixtral: MixtralForCausalLM) -> None:
    state = mixtral.state_dict()
    saved = as_saved(mixtral, state)
    first = saved["model.layers.0.block_sparse_moe.experts.0.w2.weight"]
    assert torch.equal(first, state["model.layers.0.mlp.experts.down_proj"][0])


def test_saving_and_the_conversion_give_the_same_names(mixtral: MixtralForCausalLM, tmp_path: Path) -> None:
    from safetensors import safe_open

    mixtral.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(as_saved(mixtral, mixtral.state_dict()))


def test_a_loaded_model_knows_whether_its_tensors_were_converted(mixtral: MixtralForCausalLM, tmp_path: Path) -> None:
    mixtral.save_pretrained(tmp_path)
    assert converts_weights(MixtralForCausalLM.from_pretrained(tmp_path, disable_mmap=True))


def test_modules_of_stacked_experts_say_whether_they_are_transposed(mixtral: MixtralForCausalLM) -> None:
    transposed = GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=4)).model.layers[0].mlp.experts
    assert has_transposed_experts(transposed)
    assert not has_transposed_experts(mixtral.model.layers[0].mlp.experts)
