"""Layers and models of SMILE, with values by hand: routes, mixtures, loading, saving and generation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import make_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from merge_search.engine.architectures import SMILE, model_class, register
from merge_search.engine.architectures.smile import LINEAR, SmileConfig
from merge_search.engine.resident.live_model import LiveModel
from merge_search.errors import WeightsError

SETTINGS = {"top_k": 1, "temperature": 1.0, "route": "deltas"}


def two_by_two(**settings: Any) -> Any:
    """W = 1, b = (10, 20). Expert 0 triples the first entry and has the bias (11, 20); expert 1 adds 4 y to y."""
    layer: Any = nn.Linear(2, 2)
    layer.__class__ = LINEAR[nn.Linear]
    layer.upscale(2, {**SETTINGS, **settings}, 1, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
        layer.expert_right.copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        layer.expert_left.copy_(torch.tensor([[[2.0], [0.0]], [[0.0], [4.0]]]))
        layer.expert_bias[0, 0] = 1.0
        if layer.expert_gate is not None:
            layer.expert_gate.copy_(layer.expert_right.flip(0))
    return layer.eval()


def test_each_token_goes_to_the_expert_whose_directions_hold_most_of_it() -> None:
    x = torch.tensor([[[2.0, 1.0], [1.0, -2.0]], [[-3.0, 0.0], [1.0, 1.0]]])
    expected = [[[17.0, 21.0], [11.0, 10.0]], [[2.0, 20.0], [14.0, 21.0]]]  # equal norms: the first expert
    assert two_by_two()(x).tolist() == expected


def test_two_of_two_experts_are_mixed_by_the_softmax_of_their_norms() -> None:
    x = torch.tensor([[2.0, 1.0]])
    first = math.e / (1 + math.e)
    expected = [2 + 10 + first * (4 + 1), 1 + 20 + (1 - first) * 4]
    assert two_by_two(top_k=2)(x)[0].tolist() == pytest.approx(expected, rel=1e-6)
    cold = 1 / (1 + math.exp(-1 / 0.25))
    assert two_by_two(top_k=2, temperature=0.25)(x)[0, 0].item() == pytest.approx(12 + cold * 5, rel=1e-6)


def test_routes_along_the_weights_have_a_gate_of_their_own() -> None:
    layer = two_by_two(route="weights")  # the gates are swapped: the larger entry picks the other expert
    assert layer(torch.tensor([[2.0, 1.0]])).tolist() == [[12.0, 25.0]]


def test_the_weights_of_the_chosen_are_those_of_all_cut_and_scaled_to_the_sum_1() -> None:
    layer: Any = nn.Linear(6, 3)
    layer.__class__ = LINEAR[nn.Linear]
    layer.upscale(4, {**SETTINGS, "top_k": 2}, 2, 3)
    nn.init.normal_(layer.expert_right, generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    chosen, weights = layer.routes(x)
    norms = (x @ layer.expert_right[:, :3].reshape(12, 6).T).view(50, 4, 3).norm(dim=-1)
    everyone = norms.softmax(-1)
    kept = everyone.gather(1, chosen)
    assert torch.equal(chosen, everyone.topk(2).indices)
    assert weights.sum(-1).tolist() == pytest.approx([1.0] * 50)
    assert torch.allclose(weights, kept / kept.sum(-1, keepdim=True))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_tokens_in_batches_get_what_each_gets_by_the_formula(kind: Any, top_k: int) -> None:
    draw = torch.Generator().manual_seed(2)
    layer: Any = nn.Linear(8, 5) if kind is nn.Linear else Conv1D(5, 8)
    layer.__class__ = LINEAR[kind]
    layer.upscale(3, {**SETTINGS, "top_k": top_k}, 2, 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, generator=draw)
    x = torch.randn(2, 7, 8, generator=draw)
    weight = layer.weight if kind is nn.Linear else layer.weight.T

    def by_formula(token: Tensor) -> Tensor:
        norms = [(layer.expert_right[i, :1] @ token).norm() for i in range(3)]
        best = sorted(range(3), key=lambda i: -norms[i].item())[:top_k]
        shares = torch.stack([norms[i] for i in best]).softmax(0)
        deltas = [layer.expert_left[i] @ layer.expert_right[i] @ token + layer.expert_bias[i] for i in best]
        return weight @ token + layer.bias + sum(s * d for s, d in zip(shares, deltas, strict=True))

    expected = torch.stack([torch.stack([by_formula(t) for t in row]) for row in x])
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_a_single_expert_answers_every_token_with_weight_1() -> None:
    layer: Any = nn.Linear(3, 2, bias=False)
    layer.__class__ = LINEAR[nn.Linear]
    layer.upscale(1, SETTINGS, 1, 1)
    assert layer.expert_bias is None
    with torch.no_grad():
        layer.weight.zero_()
        layer.expert_right.copy_(torch.tensor([[[0.0, 1.0, 0.0]]]))
        layer.expert_left.copy_(torch.tensor([[[3.0], [5.0]]]))
    assert layer(torch.tensor([[7.0, 2.0, 7.0], [1.0, 0.0, 0.0]])).tolist() == [[6.0, 10.0], [0.0, 0.0]]


# ---------------------------------------------------------------------------------------------- models


def mixture(kind: str = "llama", **settings: Any) -> Any:
    """A tiny language model with three random experts in every block, in eval mode."""
    register()
    inner = make_model(kind)
    named = [n for n, layer in inner.named_modules() if type(layer) in LINEAR and n != "lm_head"]
    smile = {
        "model_type": kind, "experts": ["a", "b", "c"], "rank": 4, "gate_rank": 2, "top_k": 2, "temperature": 1.0,
        "route": "deltas", "modules": {n: [4, 2] for n in named}, **settings,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(SmileConfig.from_dict({**inner.config.to_dict(), "smile": smile}))
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        model.load_state_dict(inner.state_dict(), strict=False)
        for name, parameter in model.named_parameters():
            if ".expert_" in name:
                nn.init.normal_(parameter, std=0.2, generator=draw)
    return model.eval()


IDS = torch.tensor([[1, 7, 9, 12, 5, 8], [1, 6, 6, 20, 11, 5]])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_saved_model_is_loaded_by_the_auto_classes_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    model = mixture(kind)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == SMILE
    assert config["architectures"] == [type(model).__name__]
    assert "auto_map" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) is model_class(config)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in model.named_parameters()}
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(IDS).logits.dtype == torch.bfloat16


def test_the_body_alone_finds_its_layers_without_the_prefix_of_the_head(tmp_path: Path) -> None:
    model = mixture()
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(body(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_generation_with_a_cache_in_a_padded_batch_is_that_of_each_prompt_alone() -> None:
    model = mixture()
    short = IDS[1:, :4]
    padded = torch.cat([IDS[:1], torch.cat([torch.zeros(1, 2, dtype=torch.long), short], 1)])
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = model.generate(padded, attention_mask=(padded != 0).long(), **how)[:, 6:]
    for at, prompt in enumerate((IDS[:1], short)):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **how)
        assert together[at].tolist() == alone[0, prompt.shape[1] :].tolist()


def test_a_live_model_of_a_mixture_has_its_tensors_by_name_and_no_gradients(tmp_path: Path) -> None:
    model = mixture()
    model.save_pretrained(tmp_path)
    live = LiveModel.load(tmp_path)
    assert live.views.keys() == model.state_dict().keys()
    assert not any(p.requires_grad for p in live.model.parameters())
    assert not live.model.training


def test_a_loaded_mixture_can_be_trained(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model(IDS, labels=IDS).loss.backward()
    layer = model.model.layers[0].mlp.up_proj
    assert all(p.grad is not None and bool(p.grad.any()) for p in (layer.weight, layer.expert_left, layer.expert_right))


def test_settings_that_are_missing_are_named_before_weights_are_read(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "smile": {"rank": 2}}))
    with pytest.raises(WeightsError, match=r"config.json.*mapping smile with experts, gate_rank"):
        LiveModel.load(tmp_path)
    file.write_text(json.dumps({**config, "architectures": ["SmileUnheardOfForCausalLM"]}))
    with pytest.raises(WeightsError, match="SmileUnheardOfForCausalLM"):
        LiveModel.load(tmp_path)


def test_the_config_alone_is_known_to_auto_config(tmp_path: Path) -> None:
    mixture().config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == SMILE
    assert config.hidden_size == 32
    assert config.smile["experts"] == ["a", "b", "c"]
