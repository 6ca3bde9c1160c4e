"""NaN and infinity in checkpoints are refused before anything is merged, and all their positions are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_search.engine.checkpoints import finite, hashing
from merge_search.engine.checkpoints.headers import read_checkpoint
from merge_search.engine.resident import pool
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.streaming.engine import StreamingEngine
from merge_search.errors import WeightsError
from merge_search.merge_recipe import merge_recipe
from merge_search.presets import preset
from merge_search.recipe import Models

FIRST, LAST = "model.embed_tokens.weight", "model.norm.weight"


def spoil(folder: Path, name: str, *bad: float) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[: len(bad)] = torch.tensor(bad, dtype=tensors[name].dtype)
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def spoiled(make_models: Callable[[], Any]) -> Models:
    """Experts a and b with NaN or infinity in three tensors."""
    models: Models = make_models()[0].models
    a, b = (Path(models.experts[e]) for e in "ab")
    spoil(a, FIRST, torch.nan, 1.0, torch.inf)
    spoil(a, LAST, -torch.inf)
    spoil(b, FIRST, torch.nan)
    return models


@pytest.mark.parametrize("streaming", [True, False])
def test_all_tensors_that_are_not_finite_are_named_at_once(spoiled: Models, streaming: bool) -> None:
    with pytest.raises(WeightsError) as caught:
        ModelPool(spoiled, device="cpu", streaming=streaming)
    text = str(caught.value)
    assert text.startswith("3 tensors are not finite:\n")
    for expert, name, n_bad in (("a", FIRST, 2), ("a", LAST, 1), ("b", FIRST, 1)):
        assert f"{expert}/model.safetensors: weights must be finite, found NaN or infinity in {n_bad} of " in text
        assert f"expert {expert!r}, tensor {name!r}; train or download it again" in text


def test_a_merge_of_bad_files_ends_before_the_first_tensor_and_writes_nothing(
    spoiled: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[str] = []
    monkeypatch.setattr(StreamingEngine, "_merge", lambda *_: merged.append("a tensor"))
    file = tmp_path / "recipe.json"
    file.write_text(preset("task_arithmetic", spoiled).to_json())
    before = set(tmp_path.iterdir())
    with pytest.raises(WeightsError, match="3 tensors are not finite"):
        merge_recipe(file, tmp_path / "out")
    assert merged == []
    assert set(tmp_path.iterdir()) == before


def test_tensors_of_files_larger_than_free_memory_are_checked_when_they_are_merged(
    spoiled: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "free_bytes", lambda _: 1000)
    engine = StreamingEngine(ModelPool(spoiled, device="cpu", streaming=True), threads=1)
    with pytest.raises(WeightsError, match=r"a/model\.safetensors: .* expert 'a', tensor 'model.embed_tokens.weight'"):
        list(engine.merged(preset("ties", spoiled)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_entries_are_counted_by_their_bits_in_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    n = 3 * hashing.CHUNK_BYTES // dtype.itemsize + 5  # whole pieces and a shorter last one
    weight = torch.linspace(-1, 1, n, dtype=torch.float64).to(dtype)
    weight[:4] = torch.tensor(
        [torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny, -0.0], dtype=dtype
    )
    fine = weight.clone()
    weight[[7, n // 2, n - 1]] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    weight[8] = -weight[7]  # NaN with its sign bit set
    save_file({"fine": fine, "weight": weight, "empty": fine[:0]}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    tensors = read_checkpoint(tmp_path).tensors
    assert {name: finite._count(t) for name, t in tensors.items()} == {"fine": 0, "weight": 4, "empty": 0}


def test_long_lists_are_cut_short() -> None:
    with pytest.raises(
        WeightsError, match=r"(?s)^25 tensors are not finite:\n  - p0\n.*  - p19\n  - and 5 more tensors$"
    ):
        finite.refuse([f"p{i}" for i in range(25)])
    finite.refuse([])


def test_pieces_are_whole_where_the_system_gives_less_than_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"weight": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    t = read_checkpoint(tmp_path).tensors["weight"]

    class Slow:
        """A file that hands out three bytes at a time."""

        def __init__(self, data: bytes) -> None:
            self.data = data

        def readinto(self, buffer: memoryview) -> int:
            n = min(3, len(buffer), len(self.data))
            buffer[:n], self.data = self.data[:n], self.data[n:]
            return n

    buffer = memoryview(bytearray(64))
    assert hashing._fill(Slow(bytes(range(64))), buffer)  # type: ignore[arg-type]
    assert bytes(buffer) == bytes(range(64))
    assert not hashing._fill(Slow(b"short"), buffer)  # type: ignore[arg-type]
    monkeypatch.setattr(hashing, "CHUNK_BYTES", 1024)
    whole = b"".join(bytes(p) for p in hashing.pieces(t, memoryview(bytearray(1024))))
    assert np.array_equal(np.frombuffer(whole, dtype=np.float32), np.arange(1000.0, dtype=np.float32))
