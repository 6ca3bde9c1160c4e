"""Headers give the contents of a checkpoint; a damaged one is refused with a sentence, before any tensor is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from merge_search.engine.checkpoints.compatibility import check_models
from merge_search.engine.checkpoints.headers import natural_key, read_checkpoint, read_header, resolve_model
from merge_search.errors import WeightsError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.arange(4, dtype=torch.int64), "empty": torch.zeros(0, 3)}
    tensors["half"] = torch.ones(3, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def write(file: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def test_a_header_gives_dtype_shape_and_place(file: Path) -> None:
    headers = read_header(file)
    assert {n: (t.dtype, t.shape) for n, t in headers.items()} == {
        "a": ("I64", (4,)),
        "b": ("F32", (2, 3)),
        "empty": ("F32", (0, 3)),
        "half": ("BF16", (3,)),
    }
    b = headers["b"]
    assert torch.frombuffer(bytearray(file.read_bytes()[b.start : b.end]), dtype=torch.float32).tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]


def test_a_file_cut_off_at_any_byte_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for n in range(len(whole)):
        cut.write_bytes(whole[:n])
        with pytest.raises(WeightsError, match=r"cut\.safetensors.*damaged or incomplete"):
            read_header(cut)


def test_trailing_bytes_are_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(WeightsError, match="1 trailing bytes"):
        read_header(file)


F32 = {"dtype": "F32", "shape": [1]}


@pytest.mark.parametrize(
    ("header", "n_data", "reason"),
    [
        (b"", 0, "does not begin with"),
        (b"[]", 0, "does not begin with"),
        (b'{"a": ', 0, "must be JSON"),
        (b'{"a\xff": 1}', 0, "must be JSON"),
        (b'{"a":' * 100000, 0, "must be JSON"),
        ({"a": 1}, 0, "exactly dtype, shape and data_offsets"),
        ({"__metadata__": {"format": 1}}, 0, "must map text to text"),
        ({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, 4, "unknown dtype 'F99'"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4, "list of sizes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4, "is 8 bytes, its data 4"),
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, 4, "its data 4"),
        ({"a": {**F32, "data_offsets": [4, 0]}}, 4, r"\[begin, end\]"),
        ({"a": {**F32, "data_offsets": [0, 4]}, "b": {**F32, "data_offsets": [0, 4]}}, 4, "overlaps"),
        ({"a": {**F32, "data_offsets": [4, 8]}}, 8, "hole of 4 bytes"),
        ({"a": {**F32, "data_offsets": [0, 4]}}, 3, "cut off in tensor 'a'"),
    ],
)
def test_what_safetensors_refuses_is_refused(tmp_path: Path, header: object, n_data: int, reason: str) -> None:
    file = write(tmp_path / "x.safetensors", header, bytes(n_data))
    with pytest.raises(WeightsError, match=reason):
        read_header(file)
    with pytest.raises(SafetensorError):
        safe_open(str(file), framework="pt")


def test_an_entry_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    """This is stricter than safetensors, which would silently ignore a field of a later format."""
    file = write(tmp_path / "x.safetensors", {"a": {**F32, "data_offsets": [0, 4], "more": 1}}, bytes(4))
    with pytest.raises(WeightsError, match="exactly dtype, shape and data_offsets"):
        read_header(file)


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    file = write(tmp_path / "x.safetensors", f'{{"a":{entry},"a":{entry}}}'.encode(), bytes(4))
    with pytest.raises(WeightsError, match="'a' occurs twice"):
        read_header(file)


def test_a_header_length_beyond_the_limit_is_refused_without_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as f:
        f.write((200_000_000).to_bytes(8, "little"))
        f.truncate(300_000_000)
    with pytest.raises(WeightsError, match="at most 100000000 bytes"):
        read_header(file)


def test_numbers_in_names_sort_as_numbers() -> None:
    names = ["h.10.b", "h.2.b", "a", "h.2.a"]
    assert sorted(names, key=natural_key) == ["a", "h.2.a", "h.2.b", "h.10.b"]


# ------------------------------------------------------------------------------------------ folders


def test_shards_and_one_file_hold_the_same_tensors(save_model) -> None:
    one = read_checkpoint(save_model("llama", name="one"))
    many = read_checkpoint(save_model("llama", name="many", shards="5KB"))
    assert len(many.files) > 2
    assert len(one.files) == 1
    assert [(t.name, t.dtype, t.shape) for t in one.tensors.values()] == [
        (t.name, t.dtype, t.shape) for t in many.tensors.values()
    ]
    assert one.config["model_type"] == "llama"


def test_a_missing_shard_is_named(save_model) -> None:
    folder = save_model("llama", shards="5KB")
    sorted(folder.glob("model-*"))[1].unlink()
    with pytest.raises(WeightsError, match=r"1 of the \d+ shards .* missing \(model-00002"):
        read_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(save_model, keep: int) -> None:
    folder = save_model("llama", shards="5KB")
    shard = sorted(folder.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"model-00002.*damaged or incomplete"):
        read_checkpoint(folder)


def test_an_index_of_another_save_is_refused(save_model) -> None:
    folder = save_model("llama", shards="5KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.other.weight"] = next(iter(index["weight_map"].values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"holds 'model.other.weight', but it does not"):
        read_checkpoint(folder)


def test_an_index_that_points_outside_its_folder_is_refused(save_model) -> None:
    folder = save_model("llama", shards="5KB")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(WeightsError, match="of the same folder"):
        read_checkpoint(folder)


def test_a_stale_index_beside_a_whole_file_is_ignored_as_transformers_does(save_model) -> None:
    folder = save_model("llama")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert len(read_checkpoint(folder).files) == 1


def test_folders_without_usable_weights_are_refused_with_a_reason(tmp_path: Path, save_model) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        read_checkpoint(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="the folder is empty"):
        read_checkpoint(tmp_path / "empty")
    bare = save_model("llama", name="bare")
    (bare / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"must have a config\.json"):
        read_checkpoint(bare)
    (bare / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json: must be JSON"):
        read_checkpoint(bare)
    (bare / "model.safetensors").rename(bare / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"found only weights\.safetensors"):
        read_checkpoint(bare)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save(Payload(), folder / name)
    with pytest.raises(WeightsError, match=rf"pickled weights \({name}\).*convert"):
        read_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_a_name_that_is_neither_folder_nor_reachable_says_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="no-such-org/none: no such folder, and the hub could not be reached"):
        resolve_model("no-such-org/none")
    with pytest.raises(WeightsError, match=r"^\./models/none: no such folder; correct the path"):
        resolve_model("./models/none")
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="is a file"):
        resolve_model("file")


# ------------------------------------------------------------------------------------------ base against experts


def test_models_that_fit_have_no_problems(save_model) -> None:
    base = save_model("llama", tie_word_embeddings=False)
    half = save_model("llama", name="half", seed=1, dtype="bfloat16", tie_word_embeddings=False)
    sharded = save_model("llama", name="sharded", seed=2, shards="5KB", tie_word_embeddings=False)
    assert check_models(base, {"half": half, "sharded": sharded}) == []


def test_all_problems_of_all_models_come_at_once(save_model, tmp_path: Path) -> None:
    base = save_model("llama", tie_word_embeddings=True)
    wide = save_model("llama", name="wide", tie_word_embeddings=True, head_dim=4)
    untied = save_model("llama", name="untied", tie_word_embeddings=False)
    deep = save_model("llama", name="short", tie_word_embeddings=True)
    tensors = {n: t for n, t in _tensors(deep).items() if "layers.1." not in n}
    save_file({**tensors, "model.more.weight": torch.ones(2)}, deep / "model.safetensors")
    experts = {"wide": wide, "same": base, "untied": untied, "short": deep, "gone": tmp_path / "gone dir"}
    problems = check_models(base, experts)
    text = "\n".join(problems)
    assert "expert 'wide'" in text
    assert (
        "'model.layers.0.self_attn.q_proj.weight' must have the base's shape, got [16, 16] in the base and [8, 16]"
        in text
    )
    assert "expert 'same': is the base's own folder" in text
    assert "tie_word_embeddings must be equal, got True in the base and False in the expert" in text
    assert "must have only tensors of the base, 1 is too many (lm_head.weight)" in text
    assert "must have every tensor of the base, 9 are missing (model.layers.1." in text
    assert "1 is too many (model.more.weight)" in text
    assert "expert 'gone'" in text
    assert "no such folder" in text


def test_a_quantised_expert_is_refused(save_model) -> None:
    base, expert = save_model("llama"), save_model("llama", name="expert", seed=1)
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert any("found quantised ones (fp8)" in p for p in check_models(base, {"x": expert}))


def test_an_expert_may_add_tokens_and_nothing_else(save_model, save_tokenizer) -> None:
    tokens = [f"t{i}" for i in range(64)]
    base = save_model("llama")
    save_tokenizer(base, tokens)
    longer = save_model("llama", name="longer", seed=1)
    _resize(longer, 66)
    assert any("rows can be matched only by tokenizers" in p for p in check_models(base, {"x": longer}))
    save_tokenizer(longer, tokens, added={"<chat>": 64, "<end>": 65})
    assert check_models(base, {"x": longer}) == []
    swapped = save_model("llama", name="swapped", seed=1)
    save_tokenizer(swapped, ["t1", "t0", *tokens[2:]])
    (problem,) = check_models(base, {"x": swapped})
    assert "2 tokens have other ids: 't0' (0 in the base, 1 in the expert), 't1'" in problem
    other = save_model("llama", name="other", seed=1)
    save_tokenizer(other, [*tokens[:63], "new"])
    (problem,) = check_models(base, {"x": other})
    assert (
        "1 tokens of the base are not in the expert: 't63'; 1 tokens of the expert are not in the base: 'new'"
        in problem
    )


def test_a_folder_that_holds_a_model_and_an_adapter_is_refused(save_model) -> None:
    folder = save_model("llama")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"a whole model and also adapter_config\.json"):
        read_checkpoint(folder)


def test_hub_caches_of_links_are_read(save_model, tmp_path: Path) -> None:
    folder = save_model("llama")
    linked = tmp_path / "linked"
    linked.mkdir()
    for f in folder.iterdir():
        (linked / f.name).symlink_to(f)
    assert list(read_checkpoint(linked).tensors) == list(read_checkpoint(folder).tensors)
    shutil.rmtree(folder)
    with pytest.raises(WeightsError, match="found links that lead nowhere"):
        read_checkpoint(linked)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(folder / "model.safetensors"), framework="pt") as f:
        return {n: f.get_tensor(n).clone() for n in f.keys()}  # noqa: SIM118


def _resize(folder: Path, n: int) -> None:
    tensors = _tensors(folder)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if name in tensors:
            extra = torch.full((n - len(tensors[name]), tensors[name].shape[1]), 9.0)
            tensors[name] = torch.cat([tensors[name], extra])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": n}))
