"""SASRec: its formula written out, causality, padding, and loading as a live model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModel

from merge_search.engine.architectures import SASREC, model_class, register
from merge_search.engine.architectures.sasrec import SasRec, SasRecConfig
from merge_search.engine.checkpoints.headers import read_checkpoint
from merge_search.engine.checkpoints.layout import layout
from merge_search.engine.resident.live_model import LiveModel


def make(**changes: Any) -> SasRec:
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = SasRec(SasRecConfig(**{**sizes, "max_position_embeddings": 6, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return model.eval()


def by_hand(model: SasRec, items: list[int]) -> torch.Tensor:
    """Scores after the last item of one sequence. Shape (vocab,)."""
    w = dict(model.named_parameters())
    d, n = 4, len(items)
    x = w["item_embeddings.weight"][items] * math.sqrt(d) + w["position_embeddings.weight"][:n]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (d,), w[f"{name}.weight"], w[f"{name}.bias"])

    for i in range(2):
        at = f"layers.{i}"
        q_in = norm(x, f"{at}.attention_norm")
        q, k, v = (
            source @ w[f"{at}.attention.{p}_proj.weight"].T + w[f"{at}.attention.{p}_proj.bias"]
            for p, source in (("q", q_in), ("k", x), ("v", x))
        )
        heads = []
        for h in (slice(0, 2), slice(2, 4)):
            scores = q[:, h] @ k[:, h].T / math.sqrt(2)
            scores = scores.masked_fill(torch.triu(torch.ones(n, n, dtype=torch.bool), 1), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, h])
        mixed = torch.cat(heads, 1) @ w[f"{at}.attention.o_proj.weight"].T + w[f"{at}.attention.o_proj.bias"]
        x = norm(q_in + mixed, f"{at}.mlp_norm")
        inner = (x @ w[f"{at}.mlp.fc1.weight"].T + w[f"{at}.mlp.fc1.bias"]).relu()
        x = x + inner @ w[f"{at}.mlp.fc2.weight"].T + w[f"{at}.mlp.fc2.bias"]
    return norm(x, "final_norm")[-1] @ w["item_embeddings.weight"].T


@torch.no_grad()
def test_the_scores_are_those_of_the_formula_and_padding_changes_nothing() -> None:
    model = make()
    for items in ([3], [3, 1, 8], [2, 2, 5, 7]):
        found = model(input_ids=torch.tensor([items])).logits[0, -1]
        torch.testing.assert_close(found, by_hand(model, items), rtol=1e-4, atol=1e-5)
        padded = model(input_ids=torch.tensor([[*items, 0, 0]])).logits[0, len(items) - 1]
        torch.testing.assert_close(padded, found, rtol=1e-4, atol=1e-5)


def test_it_is_loaded_as_a_live_model_and_by_auto_model(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == SASREC
    live = LiveModel.load(tmp_path)
    assert type(live.model) is SasRec
    assert live.tokenizer is None
    assert set(live.views) == {name for name, _ in model.named_parameters()}
    register()
    again = AutoModel.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(live.model(input_ids=ids).logits, expected)
        assert torch.equal(again(input_ids=ids).logits, expected)
    assert model_class({"model_type": SASREC}) is SasRec


def test_its_tensors_have_blocks_and_kinds(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    groups = layout(read_checkpoint(tmp_path))
    found = {name: (g.block, g.kind) for name, g in groups.items()}
    assert found["item_embeddings.weight"] == (None, "embedding")
    assert found["layers.1.attention.q_proj.weight"] == (1, "attention")
    assert found["layers.0.mlp.fc2.weight"] == (0, "mlp")
    assert found["layers.0.attention_norm.weight"] == (0, "norm")
    assert found["final_norm.bias"][1] == "norm"


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    model, ids = make(dropout=0.5), torch.tensor([[1, 2, 3]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("n_heads", [1, 2])
def test_a_gradient_reaches_every_weight_but_the_padding(n_heads: int) -> None:
    model = make(num_attention_heads=n_heads)
    model(input_ids=torch.tensor([[1, 2, 3, 4, 5, 6]])).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
