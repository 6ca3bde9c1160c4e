"""Merges from files to files, in their small parts: counting in C, tracing, reading ahead, and being stopped."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_search.engine.checkpoints import writer as export
from merge_search.engine.checkpoints.hashing import hash_checkpoint, hash_once
from merge_search.engine.checkpoints.headers import read_checkpoint
from merge_search.engine.codegen import compiler, kernel
from merge_search.engine.codegen.trace import Untraceable, trace
from merge_search.engine.methods import stages
from merge_search.engine.passes.byte_cache import ByteCache
from merge_search.engine.passes.order_statistics import EXACT_LIMIT, order_statistics
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.streaming import engine as one_off
from merge_search.engine.streaming import thresholds
from merge_search.engine.streaming.buffers import Buffers
from merge_search.engine.streaming.engine import StreamingEngine
from merge_search.engine.streaming.reader import Feed
from merge_search.errors import WeightsError
from merge_search.merge_recipe import merge_recipe
from merge_search.presets import preset
from merge_search.recipe import Models, Recipe

needs_compiler = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYERS, WIDTH = 3, 400  # 160 000 elements a matrix: counted in C, and more than a table sorts
FIRST, LAST = "model.layers.0.mlp.gate_proj.weight", f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loops of this run's own, and sweeps that are looked for anew."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cold"))
    monkeypatch.setattr(one_off, "_LOOPS_FROM", 0)  # small models go the way of large ones
    thresholds._loaded.cache_clear()
    yield
    thresholds._loaded.cache_clear()


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """``recipe.json`` of TIES over a base and two experts, beside them."""
    generator = torch.Generator().manual_seed(1)
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(LAYERS) for part in ("gate", "up")]
    base = {n: torch.randn(WIDTH, WIDTH, generator=generator) for n in names}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS}
    for folder in (tmp_path / "base", tmp_path / "one", tmp_path / "two"):
        step = 0.0 if folder.name == "base" else 0.1
        own = {n: (t + step * torch.randn(t.shape, generator=generator)).bfloat16() for n, t in base.items()}
        folder.mkdir()
        save_file(own, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
    models = Models(base=str(tmp_path / "base"), experts={n: str(tmp_path / n) for n in ("one", "two")})
    file = tmp_path / "recipe.json"
    recipe = preset("ties", models)
    select = recipe.select.model_copy(update={"scope": "tensor"})
    file.write_text(recipe.model_copy(update={"select": select}).to_json())
    return file


def during(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], name: str = FIRST) -> None:  # fmt: skip
    """Have something happen while one tensor is being merged."""
    merge = StreamingEngine._merge

    def merged(self: StreamingEngine, recipe, tensor, asked) -> Tensor:
        if tensor == name:
            act()
        return merge(self, recipe, tensor, asked)

    monkeypatch.setattr(StreamingEngine, "_merge", merged)


def merge_and_fail(file: Path, error: type[BaseException], match: str | None = None) -> None:
    """Merging raises; no thread goes on, torch has its threads again, and nothing was written."""
    before, count, entries = set(threading.enumerate()), torch.get_num_threads(), set(file.parent.iterdir())
    with pytest.raises(error, match=match):
        merge_recipe(file, file.parent / "out")
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("merge_"):  # a loop's, kept for the next
            thread.join(20)  # one that Ctrl-C met while it started ends by itself
            assert not thread.is_alive(), thread.name
    assert torch.get_num_threads() == count
    assert set(file.parent.iterdir()) == entries


# ------------------------------------------------------------------------------------------------ thresholds


def deltas(kind: str, base: Tensor, dtype: torch.dtype) -> Tensor:
    """An expert's tensor: base plus a change of some kind, rounded to `dtype`."""
    step = torch.randn(base.numel(), generator=torch.Generator().manual_seed(3))
    signs = torch.where(step < 0, -1.0, 1.0)
    change = {
        "normal": 0.1 * step,
        "ties": step.round(),
        "mostly zero": step * (step > 2),
        "equal magnitudes": 0.5 * signs,
        "all zero": 0 * step,
        "tiny": 1e-7 * step,
        "one is large": 1000.0 * (torch.arange(base.numel()) == 5),
    }[kind]
    return (base.float() + change).to(dtype)


KINDS = ["normal", "ties", "mostly zero", "equal magnitudes", "all zero", "tiny", "one is large"]


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_counted_in_c_are_those_of_numpy_and_of_the_whole_histogram(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = EXACT_LIMIT + 4099  # ends in the middle of a block, and of eight elements
    coarse = torch.randint(-8, 8, (n,), generator=torch.Generator().manual_seed(2)) / 4  # exact in every dtype
    base = (coarse * (kind != "tiny")).to(dtype)
    own = deltas(kind, base, dtype)
    size = (own.float() - base.float()).abs()
    whole, largest = order_statistics(size), float(size.max())
    counts = [1, 2, n // 1000, n // 3, n - 1]
    in_c = [thresholds.cut_of_deltas(base, own, k, largest) for k in counts]
    assert thresholds._loaded() is not None
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    thresholds._loaded.cache_clear()
    assert [thresholds.cut_of_deltas(base, own, k, largest) for k in counts] == in_c
    assert thresholds._loaded() is None
    swept = thresholds.SweptThresholds(n, largest, lambda: (base, own), lambda: whole)
    assert [swept.cut(k) for k in (0, *counts, n)] == [whole.cut(k) for k in (0, *counts, n)]  # n: density 1.0
    assert [found for found in in_c if found is None] == []


@needs_compiler
@pytest.mark.parametrize("n", [1, 7, 8, 4096, 5003])
@pytest.mark.parametrize(("b", "o"), list(itertools.product(DTYPES, DTYPES)))
def test_sweeps_in_c_give_the_numbers_of_torch_whatever_the_dtypes_and_the_length(
    b: torch.dtype, o: torch.dtype, n: int
) -> None:
    swept = thresholds._loaded()
    assert swept is not None
    base = torch.randn(n, generator=torch.Generator().manual_seed(4)).to(b)
    for kind in ("normal", "all zero", "mostly zero"):
        own = deltas(kind, base, o)
        largest = thresholds._largest(base, own)
        assert swept.largest(base, own) == largest
        assert swept.largest(None, own) == thresholds._largest(None, own)
        end = thresholds._bin(largest) + 1
        for bottom, top in ((0, end), (end // 2, end), (end - 1, end), (0, 1)):
            above, bins = swept.count(base, own, bottom, top)
            expected, histogram = thresholds.count(base, own, bottom, top)
            assert above == expected
            assert bins.tolist() == histogram.tolist()
            assert above + bins.sum() <= n
        assert sum(map(int, swept.count(base, own, 0, end)[1])) == n


@needs_compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_found_by_the_sweeps_too(bad: float) -> None:
    base, own = torch.zeros(2**17 + 3).bfloat16(), torch.ones(2**17 + 3).bfloat16()
    own[-2] = bad
    found = thresholds.largest_values(base, [own, base])
    assert found[0] == found[2] == 0.0
    assert str(found[1]) == str(thresholds._largest(base, own)) == str(abs(bad))


# ------------------------------------------------------------------------------------------------ without a compiler


@needs_compiler
def test_the_same_bytes_are_merged_where_there_is_no_compiler(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    merge_recipe(recipe_file, recipe_file.parent / "out")
    assert thresholds._loaded() is not None
    thresholds._loaded.cache_clear()
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    merge_recipe(recipe_file, recipe_file.parent / "plain")
    assert thresholds._loaded() is None
    compiled, plain = (recipe_file.parent / n / "model.safetensors" for n in ("out", "plain"))
    assert compiled.read_bytes() == plain.read_bytes()


# ------------------------------------------------------------------------------------------------ tracing


OTHER = torch.ones(4)
UNTRACEABLE = {
    "looks at a value": lambda x: [x * 2 if float(x[0]) > 0 else x],
    "decides by a value": lambda x: [x if bool((x > 0).all()) else -x],
    "changes its input": lambda x: [x.add_(1)],
    "changes what is seen elsewhere": lambda x: (y := x * 2, [y, y.view(-1).add_(1)])[1],
    "gives two tensors": lambda x: [torch.aminmax(x)[0]],
    "knows another tensor": lambda x: [x + OTHER[0]],
}


@pytest.mark.parametrize("what", UNTRACEABLE)
def test_a_function_that_cannot_be_said_in_operations_is_refused(what: str) -> None:
    with pytest.raises(Untraceable):
        trace(UNTRACEABLE[what], [torch.ones(7)])
    with pytest.raises(kernel.Unsupported):
        kernel.compile_kernel(lambda t, f, i, at: UNTRACEABLE[what](t[0]), [torch.float32], torch.float32, 0, 0)


def test_a_graph_says_in_place_operations_as_the_plain_ones() -> None:
    graph = trace(lambda x: [(x * 2).add_(1).clamp_(0.0, 5.0)], [torch.ones(7)])
    said = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert said == ["aten.mul.Tensor", "aten.add.Tensor", "aten.clamp.default"]


def test_the_engine_merges_in_chunks_what_cannot_be_traced(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    recipe = Recipe.from_json(recipe_file.read_text())

    def merged() -> tuple[StreamingEngine, dict[str, Tensor]]:
        engine = StreamingEngine(ModelPool(recipe.models, device="cpu", streaming=True), threads=threads)
        return engine, dict(engine.merged(recipe))

    _, expected = merged()
    merge, calls = stages.merge, []

    def looking(structure, base, *rest) -> Tensor:
        calls.append(float(base[0]))  # a value, which is nowhere in a graph
        return merge(structure, base, *rest)

    monkeypatch.setattr(stages, "merge", looking)
    engine, found = merged()
    assert isinstance(engine._runner, one_off.LoopRunner)
    assert list(engine._runner._compiled._loops.values()) == [None]
    assert len(calls) >= len(found)
    assert found.keys() == expected.keys()
    assert [n for n in found if not torch.equal(found[n], expected[n])] == []


# ------------------------------------------------------------------------------------------------ reading ahead


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def data(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def rewrite(file: Path) -> None:
    """Other weights in the same place, and a file that is said to be newer."""
    before, tensor = file.stat().st_mtime_ns, load_file(file)[LAST]
    with file.open("r+b") as f:
        f.seek(file.read_bytes().index(data(tensor)))
        f.write(data(-tensor))
    os.utime(file, ns=(before + 10**9, before + 10**9))


def test_a_file_cut_off_in_the_middle_is_one_error_and_leaves_nothing(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    file = recipe_file.parent / "two" / "model.safetensors"
    during(monkeypatch, lambda: cut(file))
    merge_and_fail(
        recipe_file,
        WeightsError,
        "two/model.safetensors: (was cut off while it was read, in tensor|tensor .* cannot be read)",
    )


@pytest.mark.parametrize("known", [False, True], ids=["new files", "files whose hash is known"])
def test_a_file_changed_while_it_is_read_is_refused(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, threads: int, known: bool
) -> None:
    folder = recipe_file.parent / "two"
    if known:
        hash_once(read_checkpoint(folder))
    during(monkeypatch, lambda: rewrite(folder / "model.safetensors"))
    merge_and_fail(recipe_file, WeightsError, "two: was changed while it was read")


@pytest.mark.parametrize("known", [False, True], ids=["new files", "files whose hash is known"])
def test_a_file_removed_while_it_is_read_is_refused(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    folder = recipe_file.parent / "two"
    if known:
        hash_once(read_checkpoint(folder))
    during(monkeypatch, (folder / "model.safetensors").unlink, LAST)
    merge_and_fail(recipe_file, WeightsError, "two")


def test_a_full_disk_ends_the_threads_too(recipe_file: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    def full(tensor: Tensor) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "raw_bytes", full)
    merge_and_fail(recipe_file, OSError, "No space left")


def test_ctrl_c_in_the_middle_leaves_nothing_behind(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    during(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        merge_and_fail(recipe_file, KeyboardInterrupt)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stopped_reader_ends_and_memory_that_nobody_holds_is_used_again(recipe_file: Path) -> None:
    pool = ModelPool(Recipe.from_json(recipe_file.read_text()).models, device="cpu", streaming=True)
    reading = Feed(pool, Buffers())
    places, kept = set(), []
    for name in sorted(pool.groups):
        tensors = [future.result() for future in reading.ask(name)]
        assert all(torch.equal(t, s.tensor(name)) for t, s in zip(tensors, pool.sources, strict=True))
        places |= {t.data_ptr() for t in tensors}
        kept.append((name, tensors[0][0]))  # one row, which keeps all of its tensor
    assert len(places) <= len(kept) + 2 * len(pool.sources)
    assert all(torch.equal(row, pool.base(name)[0]) for name, row in kept)
    reading.finish()
    for source in pool.sources:
        assert hash_once(source.info) == hash_checkpoint(source.info)
    reading.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("read")]


def caches_in_use() -> list[ByteCache]:
    return [a for a in gc.get_objects() if type(a) is ByteCache and a.held]


def test_an_engine_that_streams_keeps_no_weights_of_a_softmax(recipe_file: Path) -> None:
    recipe = Recipe.from_json(recipe_file.read_text())
    recipe = preset("cki_recommender", recipe.models, splice={"kind": "softmax", "score": {"measure": "magnitude"}})
    engine = StreamingEngine(ModelPool(recipe.models, streaming=True, device="cpu"), threads=1)
    before = caches_in_use()
    (first, second) = (dict(engine.merged(recipe)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in engine.tensors.groups)
    assert all(cache in before for cache in caches_in_use())


def test_very_long_tensors_are_taken_ahead_one_at_a_time_and_others_by_count() -> None:
    sizes = {"a": 100, "b": 90, **dict.fromkeys("cdefghijklmnopqrstuvwxyz", 10)}
    taken, in_flight = [], []
    for name, what in one_off._ahead(sorted(sizes), lambda n: taken.append(n) or n.upper(), 3, sizes):
        assert what == name.upper()
        in_flight.append(len(taken) - len(in_flight))
    assert taken == sorted(sizes)
    assert in_flight[:4] == [1, 2, 4, 4]  # a; b and c; then four, the last of them given
    equal = dict.fromkeys("abcdefgh", 7)
    taken.clear()
    next(one_off._ahead(equal, taken.append, 3, equal))
    assert taken == ["a", "b", "c", "d"]
