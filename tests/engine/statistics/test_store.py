"""Statistics from data: the live model is restored, measured files are found again and stay bounded."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from token_bench import NAME, OWNERS, Bench, apply, snapshot

from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.statistics import provider
from merge_search.engine.statistics.provider import RECENT, DataStatistics
from merge_search.errors import NonFiniteError
from merge_search.presets import preset

# --- the live model, the cache


def test_measuring_in_the_middle_of_a_merge_changes_no_bit_of_it(
    bench: Bench, make_models: Any, tmp_path: Path
) -> None:
    recipe = preset("fisher", bench.pool.models)
    cold = apply(bench, recipe)
    assert bench.statistics.questions > 0
    warm = Bench(bench.pool, bench.live, bench.folder)
    MergeEngine(bench.pool).apply(preset("average", bench.pool.models), bench.live.views)
    again = apply(warm, recipe)
    assert warm.statistics.questions == 0
    assert all(torch.equal(cold[n], again[n]) for n in cold)
    assert not any(p.requires_grad or p.grad is not None for p in bench.live.model.parameters())


def test_an_engine_sees_that_its_weights_were_touched_and_they_are_right(bench: Bench) -> None:
    engine, recipe = MergeEngine(bench.pool), preset("average", bench.pool.models)
    engine.apply(recipe, bench.live.views)
    before = snapshot(bench.live)
    bench.statistics.get("gram", "a", "lm_head.weight")
    assert all(torch.equal(before[n], v) for n, v in bench.live.views.items())
    assert engine.apply(recipe, bench.live.views).skipped == 0
    assert engine.apply(recipe, bench.live.views).written == 0


def test_a_measurement_that_fails_says_so_and_gives_the_model_back(bench: Bench) -> None:
    before = snapshot(bench.live)
    bench.tasks.broken = True
    with pytest.raises(NonFiniteError, match="measuring 'fisher' of expert 'a': gradients must be finite"):
        bench.statistics.get("fisher", "a", "lm_head.weight")
    assert all(torch.equal(before[n], v) for n, v in bench.live.views.items())
    assert not list(bench.folder.glob("*"))
    bench.tasks.broken = False
    assert bench.statistics.get("fisher", "a", "lm_head.weight") is not None


@pytest.mark.parametrize("kind", ["fisher", "gradient", "absolute_gradient", "activation_norm", "gram"])
def test_a_statistic_from_the_cache_has_the_bits_that_were_measured(bench: Bench, kind: str) -> None:
    warm = Bench(bench.pool, bench.live, bench.folder)
    for name in bench.pool.groups:
        cold, found = bench.statistics.get(kind, "b", name), warm.statistics.get(kind, "b", name)
        assert (cold is None) == (found is None)
        assert cold is None or found is None or torch.equal(cold, found)
    assert warm.statistics.questions == 0
    assert len(list(bench.folder.iterdir())) == 1


@pytest.mark.parametrize(
    "change", ["rows", "seed", "questions", "dtype", "version", "weights"]
)  # fmt: skip
def test_another_key_is_measured_again(
    bench: Bench, change: str, make_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"n_rows": 3}
    bench = Bench(bench.pool, bench.live, bench.folder, **settings)
    bench.statistics.get("gram", "b", "lm_head.weight")
    pool, live = bench.pool, bench.live
    if change == "weights":
        path = Path(pool.models.experts["b"]) / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.5
        save_file(tensors, path, metadata={"format": "pt"})
        pool = ModelPool(pool.models, device="cpu")
    if change == "version":
        monkeypatch.setattr(provider, "VERSION", 2)
    settings |= {"rows": {"n_rows": 2}, "seed": {"seed": 1}, "dtype": {"dtype": "float32"}}.get(change, {})
    other = Bench(pool, live, bench.folder, **settings)
    other.tasks.name = "other questions" if change == "questions" else other.tasks.name
    other.statistics.get("gram", "b", "lm_head.weight")
    assert other.statistics.questions == (4 if change == "rows" else 6)
    assert len(list(bench.folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_measured_again_with_a_warning(
    bench: Bench, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = "lm_head.weight"
    cold = bench.statistics.get("fisher", "a", name)
    assert cold is not None
    (path,) = bench.folder.iterdir()
    data = path.read_bytes()
    bad = {"cut": data[: len(data) // 2], "empty": b"", "flipped": data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]}
    path.unlink()  # the old file is memory-mapped
    path.write_bytes(bad[damage])
    warm = Bench(bench.pool, bench.live, bench.folder)
    with caplog.at_level(logging.WARNING):
        found = warm.statistics.get("fisher", "a", name)
    assert "measured again" in caplog.text
    assert found is not None
    assert torch.equal(cold, found)
    assert path.read_bytes() == data


def test_files_beyond_the_bound_are_removed_the_longest_unused_first_and_measured_again(bench: Bench) -> None:
    first = bench.statistics.get("fisher@0.25", "a", NAME)
    (path,) = bench.folder.glob("*.safetensors")
    os.utime(path, ns=(1, 1))
    given = bench.folder / "external" / "a.safetensors"
    given.parent.mkdir()
    given.write_bytes(path.read_bytes())
    bound = 1.5 * path.stat().st_size / 2**30
    small = DataStatistics(bench.pool, bench.live, [bench.tasks], OWNERS, folder=bench.folder, max_gib=bound)
    kept = [(kind, e) for kind in ("fisher", "gradient") for e in ("a", "b")]
    for kind, expert in kept:
        small.get(kind, expert, NAME)
    assert not path.exists()
    assert given.is_file()
    assert len(list(bench.folder.glob("*.safetensors"))) == len(
        kept
    )  # files that this process uses stay, whatever they take
    again = small.get("fisher@0.25", "a", NAME)
    assert torch.equal(first, again)


def test_files_at_scaled_models_stay_bounded_while_a_search_goes_on(bench: Bench) -> None:
    small = DataStatistics(bench.pool, bench.live, [bench.tasks], OWNERS, folder=bench.folder, max_gib=1e-9)
    for i in range(14):
        small.get(f"fisher@{(i + 1) / 16!r}", "a", NAME)
    assert len(list(bench.folder.glob("*.safetensors"))) == RECENT * len(bench.pool.models.experts) < 14


def test_a_folder_that_cannot_be_written_costs_the_file_not_the_trial(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.folder.write_text("a file, not a folder")
    with caplog.at_level(logging.WARNING):
        found = bench.statistics.get("gram", "a", "lm_head.weight")
    assert found is not None
    assert "kept in memory" in caplog.text
    asked = bench.statistics.questions
    assert torch.equal(found, bench.statistics.get("gram", "a", "lm_head.weight"))  # type: ignore[arg-type]
    assert bench.statistics.questions == asked
