"""The undocumented parts of transformers that `merge_search._compat.transformers` uses still exist and do the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
)

from merge_search._compat.transformers import (
    Attention,
    as_saved,
    attention_of,
    auto_model_classes,
    config_class_of,
    converts_weights,
    has_transposed_experts,
)

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


def test_configurations_say_how_a_model_attends() -> None:
    llama = {key: value for key, value in SIZES.items() if key != "num_local_experts"}
    model = LlamaForCausalLM(LlamaConfig(**llama))
    assert attention_of(model.config) == Attention("sdpa", has_window=False, depends_on_length=False)
    model.set_attn_implementation("eager")
    assert attention_of(model.config).implementation == "eager"
    assert attention_of(MistralConfig(**llama, sliding_window=4)).has_window
    assert attention_of(Qwen2Config(**llama, use_sliding_window=True, sliding_window=4, max_window_layers=0)).has_window
    assert not attention_of(Qwen2Config(**llama, sliding_window=4)).has_window
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert attention_of(LlamaConfig(**llama, rope_parameters=dynamic)).depends_on_length


def test_auto_classes_and_configs_are_found_by_the_model_type() -> None:
    from transformers import AutoModel, AutoModelForCausalLM, LlamaModel

    assert config_class_of("llama") is LlamaConfig
    with pytest.raises(ValueError, match="'unheard_of'"):
        config_class_of("unheard_of")
    known = dict(auto_model_classes(LlamaConfig))
    assert known[AutoModelForCausalLM] is LlamaForCausalLM
    assert known[AutoModel] is LlamaModel
