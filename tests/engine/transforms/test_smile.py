"""What SMILE writes: the base, an expert and their mixtures, layer by layer and as whole models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import add_adapter
from torch import Tensor

from merge_search.engine.checkpoints.hashing import hash_folder
from merge_search.engine.resident.live_model import LiveModel
from merge_search.engine.transforms import smile as room
from merge_search.engine.transforms.sources import Sources
from merge_search.engine.transforms.store import preview
from merge_search.errors import NonFiniteError
from merge_search.recipe import Models, Transform
from merge_search.rules import TRANSFORMS

IDS = torch.tensor([[1, 7, 9, 12, 5, 8, 33], [1, 6, 6, 20, 11, 5, 2]])
FULL = 24
"""The rank of every delta of the tiny models is smaller."""


def models(base: Path, **experts: Path) -> Models:
    return Models(base=str(base), experts={name: str(folder) for name, folder in experts.items()})


def written(base: Path, out: Path, experts: dict[str, Path], **options: Any) -> Path:
    """The folder of the mixture, with the row's defaults for other options."""
    whole: dict[str, Any] = TRANSFORMS["smile"].completed({"rank": 8, "gate_rank": 1, **options})
    made = room.smile(Sources(models(base, **experts)), out, **whole)
    assert made.experts == {}
    return made.base


def changed(base: Path, folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of the base whose tensors are `change` of its own."""
    folder.mkdir()
    for file in base.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {n: change(n, t.clone()).contiguous() for n, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def noisy(seed: int, where: str = "") -> Callable[[str, Tensor], Tensor]:
    """Adds noise to the tensors that have `where` in their name."""

    def change(name: str, tensor: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(seed + sum(name.encode()))
        return tensor + 0.1 * torch.randn(tensor.shape, generator=draw) if where in name else tensor

    return change


def answers(folder: Path) -> Tensor:
    live = LiveModel.load(folder)
    name = type(live.model).__name__
    with torch.no_grad():
        if "ViT" in name:
            pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
            return live.model(pixel_values=pixels).logits
        extra = {"decoder_input_ids": IDS} if "T5" in name else {}
        output = live.model(input_ids=IDS, **extra)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert_encoder", "vit", "t5", "mixtral"])
def test_one_expert_at_full_rank_with_its_own_rest_answers_as_the_expert(save_model, tmp_path: Path, kind: str) -> None:
    base = save_model(kind)
    expert = changed(base, tmp_path / "expert", noisy(1))
    made = written(base, tmp_path / "out", {"a": expert}, rank=FULL, rest="average")
    assert torch.allclose(answers(made), answers(expert), atol=1e-5)
    assert not torch.allclose(answers(made), answers(base), atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_rank_0_answers_as_the_base_bit_for_bit(save_model, tmp_path: Path, kind: str) -> None:
    base = save_model(kind)
    made = written(base, tmp_path / "out", {"a": changed(base, tmp_path / "expert", noisy(1))}, rank=0)
    assert torch.equal(answers(made), answers(base))


def test_experts_that_changed_different_layers_are_both_there_whatever_top_k(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    first = changed(base, tmp_path / "a", noisy(1, "layers.0.mlp"))
    second = changed(base, tmp_path / "b", noisy(2, "layers.1.self_attn"))
    both = changed(
        base, tmp_path / "both", lambda n, t: noisy(2, "layers.1.self_attn")(n, noisy(1, "layers.0.mlp")(n, t))
    )
    made = written(base, tmp_path / "out", {"a": first, "b": second}, rank=FULL)
    assert torch.allclose(answers(made), answers(both), atol=1e-5)
    modules = json.loads((made / "config.json").read_text())["smile"]["modules"]
    assert sorted({name.rsplit(".", 1)[0] for name in modules}) == ["model.layers.0.mlp", "model.layers.1.self_attn"]


def test_inputs_in_the_directions_of_an_expert_get_its_layer(save_model, tmp_path: Path) -> None:
    """Expert a changes what the layer makes of its first 6 inputs, expert b what it makes of the others."""
    base = save_model("llama")
    name, noise = (
        "model.layers.1.mlp.up_proj.weight",
        0.5 * torch.randn(24, 16, generator=torch.Generator().manual_seed(5)),
    )
    is_first = torch.arange(16) < 6

    def half(columns: Tensor) -> Callable[[str, Tensor], Tensor]:
        return lambda n, t: t + noise * columns if n == name else t

    experts = {"a": changed(base, tmp_path / "a", half(is_first)), "b": changed(base, tmp_path / "b", half(~is_first))}
    made = written(base, tmp_path / "out", experts, rank=FULL, gate_rank=FULL)
    layer = LiveModel.load(made).model.get_submodule(name.removesuffix(".weight"))
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(6))
    for expert, columns in (("a", is_first), ("b", ~is_first)):
        weight = load_file(experts[expert] / "model.safetensors")[name]
        assert torch.allclose(layer(x * columns), (x * columns) @ weight.T, atol=1e-5)


def test_parameters_are_those_of_the_base_and_the_factors(save_model, tmp_path: Path) -> None:
    base = save_model("llama")  # two blocks, width 16, two heads of 8 that share one key and value, MLP of 24
    experts = {e: changed(base, tmp_path / e, noisy(i)) for i, e in enumerate("abc")}
    before = sum(p.numel() for p in LiveModel.load(base).model.parameters())
    attention = [(16, 16), (8, 16), (8, 16), (16, 16)]
    mlp = [(24, 16), (24, 16), (16, 24)]
    for modules, gate_rank, layers in (("all", 1, attention + mlp), ("attention", 5, attention), ("mlp", 2, mlp)):
        out = tmp_path / modules
        made = written(base, out, experts, rank=3, gate_rank=gate_rank, modules=modules)
        added = 2 * 3 * sum(3 * n_out + max(3, gate_rank) * n_in for n_out, n_in in layers)
        assert sum(p.numel() for p in LiveModel.load(made).model.parameters()) == before + added


def test_truncated_deltas_are_the_nearest_of_their_rank(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    expert = changed(base, tmp_path / "a", noisy(1))
    made = load_file(written(base, tmp_path / "out", {"a": expert}, rank=2) / "model.safetensors")
    for name, weight in load_file(base / "model.safetensors").items():
        if f"{name.removesuffix('weight')}expert_left" in made:
            layer = name.removesuffix("weight")
            delta = (load_file(expert / "model.safetensors")[name] - weight).double()
            low = (made[f"{layer}expert_left"][0] @ made[f"{layer}expert_right"][0]).double()
            values = torch.linalg.svdvals(delta)  # Eckart and Young: what is left has the other singular values
            assert torch.linalg.norm(delta - low).item() == pytest.approx(values[2:].norm().item(), rel=1e-4)
            assert torch.equal(made[name], weight)


@pytest.mark.parametrize("rest", ["base", "average"])
def test_everything_else_is_the_base_or_the_average(save_model, tmp_path: Path, rest: str) -> None:
    base = save_model("llama")
    experts = {e: changed(base, tmp_path / e, noisy(i)) for i, e in enumerate("ab")}
    made = load_file(written(base, tmp_path / "out", experts, rest=rest, modules="mlp") / "model.safetensors")
    stored = load_file(base / "model.safetensors")
    tensors = [load_file(e / "model.safetensors") for e in experts.values()]
    for name in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight",
                 "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"):  # fmt: skip
        expected = stored[name] if rest == "base" else (tensors[0][name] + tensors[1][name]) / 2
        assert torch.allclose(made[name], expected, atol=1e-6), name
    assert torch.equal(made["model.layers.0.mlp.up_proj.weight"], stored["model.layers.0.mlp.up_proj.weight"])


def test_around_the_average_the_deltas_sum_to_zero(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    experts = {e: changed(base, tmp_path / e, noisy(i)) for i, e in enumerate("abc")}
    made = load_file(written(base, tmp_path / "out", experts, rank=FULL, shared="average") / "model.safetensors")
    layer, tensors = "model.layers.0.self_attn.o_proj", [load_file(e / "model.safetensors") for e in experts.values()]
    mean = sum(t[f"{layer}.weight"] for t in tensors) / 3
    assert torch.allclose(made[f"{layer}.weight"], mean, atol=1e-6)
    deltas = made[f"{layer}.expert_left"] @ made[f"{layer}.expert_right"]
    assert torch.allclose(deltas.sum(0), torch.zeros(16, 16), atol=1e-5)
    assert torch.allclose(deltas[1], tensors[1][f"{layer}.weight"] - mean, atol=1e-5)


def test_routes_along_the_weights_are_their_own_right_singular_vectors(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    experts = {e: changed(base, tmp_path / e, noisy(i)) for i, e in enumerate("ab")}
    made = load_file(
        written(base, tmp_path / "out", experts, rank=1, gate_rank=2, route="weights") / "model.safetensors"
    )
    layer = "model.layers.0.mlp.down_proj"
    weight = load_file(experts["b"] / "model.safetensors")[f"{layer}.weight"]
    gate = made[f"{layer}.expert_gate"][1]
    assert torch.allclose((weight @ gate.T).norm(dim=0), torch.linalg.svdvals(weight)[:2], rtol=1e-4)
    assert made[f"{layer}.expert_right"].shape == (2, 1, 24)


def test_ranks_stop_at_those_of_the_deltas(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    draw = torch.Generator().manual_seed(8)
    a, b = torch.randn(24, 2, generator=draw), torch.randn(2, 16, generator=draw)
    name = "model.layers.0.mlp.gate_proj.weight"
    expert = changed(base, tmp_path / "a", lambda n, t: t + a @ b if n == name else t)
    config = json.loads((written(base, tmp_path / "out", {"a": expert}, rank=9) / "config.json").read_text())
    assert config["smile"]["modules"] == {name.removesuffix(".weight"): [2, 1]}


def test_an_adapter_counts_by_its_dense_delta(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    adapter = Path(add_adapter(tmp_path / "adapter", str(base), rank=2))  # on q_proj, with random factors
    factors = load_file(adapter / "adapter_model.safetensors")
    scale = (settings := json.loads((adapter / "adapter_config.json").read_text()))["lora_alpha"] / settings["r"]

    def adapted(name: str, tensor: Tensor) -> Tensor:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in factors:
            return tensor
        return tensor + scale * factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]

    made = written(base, tmp_path / "out", {"a": adapter}, rank=8)
    assert torch.allclose(answers(made), answers(changed(base, tmp_path / "dense", adapted)), atol=1e-5)
    modules = json.loads((made / "config.json").read_text())["smile"]["modules"]
    assert modules == {f"model.layers.{i}.self_attn.q_proj": [2, 1] for i in (0, 1)}


def test_written_twice_the_folder_is_the_same_and_the_live_model_has_its_hash(save_model, tmp_path: Path) -> None:
    base = save_model("llama", dtype="bfloat16")
    experts = {e: changed(base, tmp_path / e, lambda n, t, i=i: noisy(i)(n, t).bfloat16()) for i, e in enumerate("ab")}
    made = [written(base, tmp_path / out, experts, rank=2, top_k=2) for out in ("one", "two")]
    assert all((made[0] / f.name).read_bytes() == f.read_bytes() for f in made[1].iterdir())
    live = LiveModel.load(made[0])
    assert live.hash() == hash_folder(made[0])
    assert {v.dtype for v in live.views.values()} == {torch.bfloat16}


def test_a_search_over_ranks_decomposes_each_delta_once(save_model, tmp_path: Path, monkeypatch) -> None:
    base = save_model("llama", seed=77)
    expert = changed(base, tmp_path / "a", noisy(77))
    calls: list[int] = []
    monkeypatch.setattr(room, "svd", lambda x, svd=room.svd: (calls.append(1), svd(x))[1])
    for rank in (1, 4, 2):
        written(base, tmp_path / f"out{rank}", {"a": expert}, rank=rank)
    assert len(calls) == 14  # two blocks with four layers of attention and three of the MLP


def test_nan_in_a_delta_is_named(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    expert = changed(base, tmp_path / "a", lambda n, t: t * float("nan") if "up_proj" in n else t)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        written(base, tmp_path / "out", {"a": expert})


def test_all_problems_are_found_from_headers_alone(save_model, tmp_path: Path, monkeypatch) -> None:
    base = save_model("llama")
    sources = Sources(models(base, a=changed(base, tmp_path / "a", noisy(1))))
    monkeypatch.setattr("merge_search.engine.checkpoints.checkpoint.Checkpoint.tensor", None)

    def problems(**options: Any) -> str:
        whole = {"rank": 8, "gate_rank": 1, **options}
        return "\n".join(preview(Transform(name="smile", options=whole), sources).problems)

    assert problems(rank=16) == ""
    found = problems(rank=17, gate_rank=40, top_k=2, temperature=0.0)
    assert "smile.rank must be at most 16, the largest that a layer has, got 17" in found
    assert "smile.gate_rank must be at most 16" in found
    assert "smile.top_k must be at most the number of experts, 1, got 2" in found
    assert "smile.temperature must be > 0" in found
    found = problems(rank=1.5, gate_rank=0, top_k=-1)
    assert "smile.rank must be a whole number from 0 on, got 1.5" in found
    assert "smile.gate_rank must be a whole number from 1 on, got 0" in found
    assert "smile.top_k must be a whole number from 1 on, got -1" in found
    assert "one of all, attention, mlp, got 'head'" in problems(modules="head")
    assert "'route'" in problems(route="x")
    assert "no option 'ranks'" in problems(ranks=3)


def test_the_preview_has_the_config_that_is_written(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    experts = {"a": changed(base, tmp_path / "a", noisy(1))}
    shown = preview(Transform(name="smile", options={"rank": 3, "gate_rank": 1}), Sources(models(base, **experts)))
    made = written(base, tmp_path / "out", experts, rank=3)
    assert shown.config == json.loads((made / "config.json").read_text())


def test_a_base_that_transformers_does_not_know_is_refused(save_model, tmp_path: Path) -> None:
    base = save_model("llama")
    expert = changed(base, tmp_path / "a", noisy(1))
    for folder in (base, expert):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["UnheardOf"]}))
    found = preview(Transform(name="smile", options={"rank": 1}), Sources(models(base, a=expert))).problems
    assert len(found) == 1
    assert "an architecture that transformers knows, got UnheardOf" in found[0]
