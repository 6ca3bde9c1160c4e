"""Experts of other widths and depths are brought back to the base's shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import nudged, save, scrambled, write_family
from tiny_lm import make_model
from torch import Tensor

from merge_search.engine.transforms.alignment import Alignment
from merge_search.engine.transforms.mal import spread
from merge_search.engine.transforms.sources import Sources
from merge_search.engine.transforms.store import preview, transformed
from merge_search.recipe import Models, Recipe, Transform

BERT = {"vocab_size": 21, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def model_of(kind: str, seed: int = 0, **settings: Any) -> Any:
    """A tiny Llama, GPT-2 or BERT with a language-model head."""
    if kind != "bert":
        return make_model(kind, seed=seed, **settings)
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    config = BertConfig(**{**BERT, "max_position_embeddings": 16, "initializer_range": 0.4, **settings})
    return BertForMaskedLM(config).eval()


def pair(folder: Path, kind: str, expert: Any, **settings: Any) -> Sources:
    """The base of a kind, and an expert."""
    base = save(model_of(kind, **settings), folder / "base")
    return Sources(Models(base=str(base), experts={"e": str(save(expert, folder / "e"))}))


def align(sources: Sources, blocks: list[int | None], passes: int = 2) -> Alignment:
    alignment = Alignment(sources.base, sources.experts["e"], blocks)
    alignment.solve(passes)
    return alignment


def weights(model: Any) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if t.is_floating_point()}


@pytest.mark.parametrize("wider", [False, True], ids=["permuted", "widened"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_permuted_and_widened_copy_of_an_expert_is_recovered_exactly(tmp_path: Path, kind: str, wider: bool) -> None:
    """A fine-tune whose residual units, inner units and heads were shuffled, with units of zeros between them."""
    expert = nudged(model_of(kind), 1, 0.2)
    wanted = weights(expert)
    sources = pair(tmp_path, kind, scrambled(expert, seed=5, n_more=2 if wider else 0))
    assert not wider or not sources.experts["e"].fits
    alignment = align(sources, [0, 1])
    moved = sources.experts["e"]
    assert any(moved.tensor(n).shape != t.shape or (moved.tensor(n) != t).any() for n, t in wanted.items())
    for name in sources.base.groups:
        assert torch.equal(alignment.aligned(name), wanted[name]), name
    assert alignment.covered() == 1.0


def test_a_deeper_copy_is_recovered_with_its_blocks_named(tmp_path: Path) -> None:
    """Between the blocks of a scrambled fine-tune stand blocks that add nothing to the residual stream."""
    expert = nudged(model_of("llama"), 1, 0.2)
    wanted = weights(expert)
    deep = model_of("llama", seed=3, num_hidden_layers=4)
    state = deep.state_dict()
    for name, tensor in weights(expert).items():
        state[name.replace("layers.1.", "layers.2.")] = tensor
    for block in (1, 3):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            state[f"model.layers.{block}.{part}.weight"].zero_()
    deep.load_state_dict(state)
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        assert torch.allclose(deep(ids).logits, expert(ids).logits, atol=1e-5)
    sources = pair(tmp_path, "llama", scrambled(deep, seed=2, n_more=1))
    recovered = align(sources, [0, 2])
    assert all(torch.equal(recovered.aligned(n), wanted[n]) for n in sources.base.groups)
    made = transformed(
        Recipe(
            models=Models(base=str(tmp_path / "base"), experts={"e": str(tmp_path / "e")}),
            transform=Transform(name="mal", options={"blocks": "0 2"}),
        ),
        tmp_path / "made",
    )
    from safetensors.torch import load_file

    written = load_file(made.experts["e"] / "model.safetensors")
    assert all(torch.equal(written[n], wanted[n]) for n in sources.base.groups)


def test_what_a_narrower_expert_does_not_cover_stays_the_base(tmp_path: Path) -> None:
    narrow = model_of(
        "llama", seed=4, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=20
    )
    sources = pair(tmp_path, "llama", narrow)
    alignment = align(sources, [1, None])
    d = alignment.units["d"][0]
    assert len(d) == 16
    for name in sources.base.groups:
        base, found = sources.base.tensor(name), alignment.aligned(name)
        changed = found != base
        if ".layers.1." in name:
            assert not changed.any(), name
        elif name.endswith("down_proj.weight"):
            rows = torch.zeros(32, dtype=torch.bool)
            rows[d] = True
            assert not changed[~rows].any()
            assert changed.sum() == 16 * 20  # every covered entry, and nothing else
    # 21 tokens x 16 twice; norm 16; of block 0: q and o 16 x 16, k and v 8 x 16, MLP 3 x 16 x 20, norms 2 x 16
    covered = 2 * 21 * 16 + 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 20 + 2 * 16
    total = sum(sources.base.headers[n].n_elements for n in sources.base.groups)
    assert alignment.covered() == pytest.approx(covered / total)


def test_alignment_is_nearer_to_the_base_than_a_random_one(tmp_path: Path) -> None:
    wide = scrambled(nudged(model_of("llama"), 1, 0.5), seed=5, n_more=1)
    sources = pair(tmp_path, "llama", nudged(wide, 8, 0.3))
    by_mal = align(sources, [0, 1])
    by_chance = Alignment(sources.base, sources.experts["e"], [0, 1])
    draw = torch.Generator().manual_seed(0)
    for axis, (ours, theirs) in by_mal.units.items():
        by_chance.units[axis] = ours, theirs[torch.randperm(len(theirs), generator=draw)]
    distance = [
        sum(float((a.aligned(n) - sources.base.tensor(n)).square().sum()) for n in sources.base.groups)
        for a in (by_mal, by_chance)
    ]
    assert distance[0] < 0.5 * distance[1]


def test_query_heads_stay_with_their_key_head(tmp_path: Path) -> None:
    """Base and expert have two key heads; the expert has three query heads for each, the base two."""
    wide = model_of("llama", seed=2, hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
    sources = pair(tmp_path, "llama", wide)
    alignment = align(sources, [0, 1])
    for block in (0, 1):
        (keys, own_keys), (queries, own_queries) = alignment.units[f"k.{block}"], alignment.units[f"q.{block}"]
        feeds = dict(zip(keys.tolist(), own_keys.tolist(), strict=True))
        assert sorted(queries.tolist()) == [0, 1, 2, 3]
        for mine, theirs in zip(queries.tolist(), own_queries.tolist(), strict=True):
            assert feeds[mine // 2] == theirs // 3


def test_blocks_are_spread_evenly_unless_they_are_named() -> None:
    assert [spread(3, 3), spread(2, 4), spread(4, 2), spread(1, 5)] == [[0, 1, 2], [0, 3], [0, 0, 1, 1], [0]]


def test_an_expert_of_the_bases_shapes_stays_as_it_is_unless_asked(tmp_path: Path) -> None:
    models = write_family(tmp_path, experts=("a",))
    wanted = weights(nudged(make_model(), 1))
    save(scrambled(nudged(make_model(), 1), seed=3), tmp_path / "a")
    plain = transformed(Recipe(models=models, transform=Transform(name="mal")), tmp_path / "made")
    assert plain.experts["a"] == tmp_path / "a"
    asked = Transform(name="mal", options={"same_shape": True})
    aligned = transformed(Recipe(models=models, transform=asked), tmp_path / "made")
    from safetensors.torch import load_file

    written = load_file(aligned.experts["a"] / "model.safetensors")
    assert all(torch.equal(written[n], wanted[n]) for n in written)


@pytest.mark.parametrize(
    ("kind", "settings", "options", "problem"),
    [
        ("gpt2", {}, {}, "model_type must be the base's, 'llama', got 'gpt2'"),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2}, {}, "must have the base's size, 8, got 16"),
        ("llama", {"num_hidden_layers": 3}, {"blocks": "0 3"}, "layers from 0 to 2, or - for none, got 3 in '0 3'"),
        ("llama", {"num_hidden_layers": 3}, {"blocks": "0 1 2"}, "for each of the base's 2, got '0 1 2'"),
        ("llama", {"num_hidden_layers": 3}, {"blocks": "- -"}, "must name at least one layer"),
        ("llama", {"intermediate_size": 24, "attention_bias": True}, {}, "k_proj.bias' has no place in the base"),
        ("llama", {"intermediate_size": 24, "hidden_act": "relu"}, {}, "hidden_act must be the base's, 'silu'"),
    ],
)
def test_an_expert_that_no_alignment_fits_is_refused_from_headers(
    tmp_path: Path, kind: str, settings: dict[str, Any], options: dict[str, Any], problem: str
) -> None:
    sources = pair(tmp_path, "llama", model_of(kind, seed=1, **settings))
    (found, *_) = preview(Transform(name="mal", options=options), sources).problems
    assert problem in found


def test_tensors_that_the_expert_lacks_are_named(tmp_path: Path) -> None:
    lacking = model_of("llama", seed=1, num_hidden_layers=3)
    sources = pair(tmp_path, "llama", lacking, attention_bias=True)
    found = preview(Transform(name="mal"), sources).problems
    assert any("model.layers.0.self_attn.k_proj.bias' is missing" in p for p in found)


def test_tokens_are_matched_by_the_tokenizers(tmp_path: Path) -> None:
    """The expert has two more tokens, and a wider MLP."""
    from tiny_lm import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    base = save(make_model(), tmp_path / "base")
    wide = save(make_model(seed=0, vocab_size=23, intermediate_size=64), tmp_path / "e", tokenizer=tokenizer)
    sources = Sources(Models(base=str(base), experts={"e": str(wide)}))
    assert preview(Transform(name="mal"), sources).problems == ()
    alignment = align(sources, [0, 1])
    found, own = alignment.aligned("lm_head.weight"), sources.experts["e"].tensor("lm_head.weight")
    assert found.shape == (21, 32)
    assert torch.equal(found[:, alignment.units["d"][0]], own[:21, alignment.units["d"][1]])
