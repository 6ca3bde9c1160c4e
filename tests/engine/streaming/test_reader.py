"""Merges from files to files: checkpoints hashed while they are read, bytes kept while they fit, memory used again."""

from __future__ import annotations

import hashlib
import itertools
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merge_search.engine.checkpoints.hashing import HashedReader, HashInTurn, hash_folder, hash_once
from merge_search.engine.checkpoints.headers import read_checkpoint
from merge_search.engine.passes.byte_cache import ByteCache
from merge_search.engine.streaming.buffers import Buffers
from merge_search.memory import MemoryBudget

PARTS = {
    "a": torch.arange(6).reshape(2, 3).float(),
    "b": torch.ones(5).bfloat16(),
    "c.x": torch.zeros(0),
    "d": torch.ones(4),
}
WORDS = {torch.float32: "F32", torch.bfloat16: "BF16"}


def data(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, str]:
    """A folder, and the sha256 that the module's rule gives its tensors."""
    save_file(PARTS, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    head = {n: f"{n}|{WORDS[t.dtype]}|{','.join(map(str, t.shape))}".encode() for n, t in PARTS.items()}
    return tmp_path, hashlib.sha256(b"".join(head[n] + data(PARTS[n]) for n in sorted(PARTS))).hexdigest()


def test_the_hash_in_turn_is_the_plain_one_whatever_order_parts_come_in(parts: tuple[Path, str]) -> None:
    folder, digest = parts
    info = read_checkpoint(folder)
    assert hash_folder(folder) == digest
    for n in range(len(PARTS) + 1):
        for order in itertools.permutations(PARTS, n):
            in_turn = HashInTurn(PARTS)
            for name in order:
                whole = data(PARTS[name])
                in_turn.add(name, WORDS[PARTS[name].dtype], PARTS[name].shape, [whole[:3], whole[3:]])
            assert in_turn.finish(info) == digest, order


@pytest.mark.parametrize("order", ["abcd", "dcba", "bd", "", "cab"])
def test_a_reader_hashes_what_it_reads_in_any_order(parts: tuple[Path, str], order: str) -> None:
    folder, digest = parts
    info = read_checkpoint(folder)
    reader = HashedReader(info)
    for name in (n for letter in order for n in PARTS if n[0] == letter):
        buffer = bytearray(len(data(PARTS[name])))
        reader.read(name, memoryview(buffer))
        assert buffer == data(PARTS[name])
    reader.finish()
    assert hash_once(info) == digest


# ------------------------------------------------------------------------------------------------ the cache


def test_a_cache_drops_what_was_not_used_for_longest() -> None:
    cache = ByteCache(MemoryBudget(100))
    for key in "abc":
        cache.put(key, [torch.zeros(10)])  # 40 bytes
        cache.get("a")
    assert (cache.get("a") is None, cache.get("b") is None, cache.get("c") is None) == (False, True, False)
    cache.put("too large", [torch.zeros(26)])
    assert cache.get("too large") is None
    cache.put("a", [torch.zeros(5)])
    assert cache.held == 60
    cache.drop("a")
    cache.drop("a")
    assert cache.held == 40


# ------------------------------------------------------------------------------------------------ memory


MIB = 2**20


def test_memory_is_used_again_once_nothing_lies_in_it_any_more() -> None:
    buffers = Buffers()
    first = buffers.tensor((2, MIB), torch.bfloat16)
    place, part = first.data_ptr(), first[1:, :5]
    del first
    other = buffers.take(4 * MIB)
    assert other.ctypes.data != place  # a part is left
    del part
    assert buffers.take(4 * MIB).ctypes.data == place


def test_memory_serves_somewhat_shorter_tensors_and_what_does_not_fit_makes_room() -> None:
    buffers = Buffers()
    place = {n: buffers.take(n * MIB).ctypes.data for n in (2, 5, 3, 16)}  # each in turn
    assert place[3] == place[5]
    assert [len(pages) for pages in buffers._free] == [16 * MIB]  # 2 and 5 were given up, in this order
    held = buffers.take(3 * MIB)  # 16 is more than four times as long, and given up too
    assert buffers._free == []
    del held
    assert [len(pages) for pages in buffers._free] == [3 * MIB]
    assert (len(buffers.take(0)), len(buffers.take(5))) == (0, 5)


def test_threads_that_take_memory_at_once_never_share_it() -> None:
    buffers, clashes = Buffers(), []

    def work(number: int) -> None:
        for i in range(200):
            mine = buffers.take((1 + (i + number) % 3) * MIB)
            mine[:: MIB // 4] = number
            if (mine[:: MIB // 4] != number).any():
                clashes.append(number)
            del mine  # else a thread holds its last memory still when it takes the next

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
    assert sum(map(len, buffers._free)) <= 4 * 3 * MIB
