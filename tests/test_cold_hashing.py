"""Merges from files to files: checkpoints hashed while they are read, bytes kept while they fit."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merge_search.engine.byte_cache import ByteCache
from merge_search.engine.hashing import HashedReader, HashInTurn, hash_folder, hash_once
from merge_search.engine.headers import read_checkpoint

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
    cache = ByteCache(100)
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
