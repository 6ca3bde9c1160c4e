"""Find NaN and infinity in checkpoints before anything is made of them, by one read of the files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from merge_search.engine.checkpoints.checkpoint import Checkpoint, Expert
from merge_search.engine.checkpoints.dtypes import FLOATING
from merge_search.engine.checkpoints.hashing import CHUNK_BYTES, pieces
from merge_search.engine.checkpoints.headers import TensorHeader
from merge_search.engine.kernels.numerics import is_finite
from merge_search.errors import WeightsError

__all__ = ["file_problems", "refuse", "tensor_problem"]

_SHOWN = 20  # most tensors that a message names
_BITS = {  # unsigned type, all bits except the sign, bits of infinity (NaN is larger)
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "F32": ("<u4", 0x7FFFFFFF, 0x7F800000),
    "F64": ("<u8", 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}


def refuse(problems: Sequence[str]) -> None:
    """Raise `WeightsError` with all `problems`, if there are any."""
    if len(problems) == 1:
        raise WeightsError(problems[0])
    if problems:
        shown = [f"  - {p}" for p in problems[:_SHOWN]]
        more = [f"  - and {len(problems) - _SHOWN} more tensors"] * (len(problems) > _SHOWN)
        raise WeightsError(f"{len(problems)} tensors are not finite:\n" + "\n".join([*shown, *more]))


def tensor_problem(tensor: Tensor, name: str, who: str, source: Checkpoint | Expert) -> str:
    """Return what is wrong with a tensor read from `source`; '' if it is finite."""
    if is_finite(tensor):
        return ""
    t = source.info.tensors.get(name)
    n_bad = int((~torch.isfinite(tensor)).sum())
    return _problem(source.info.folder if t is None else t.file, n_bad, tensor.numel(), who, name)


def file_problems(sources: Sequence[tuple[str, Checkpoint | Expert]], names: Iterable[str]) -> list[str]:
    """Return what is wrong with the tensors `names` of base and experts.

    Args:
        sources: Checkpoints, each with the words that messages use for its owner. An adapter's factors are read, not
            the tensors that they make.
        names: Names of the base's tensors.
    Raises:
        WeightsError: A file cannot be read.
    Cost: one read of the files, through a small buffer.
    """
    chosen = list(names)
    with ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1), thread_name_prefix="scan") as threads:
        per_source = list(threads.map(lambda pair: _problems_of(pair[0], pair[1], chosen), sources))
    return [problem for problems in per_source for problem in problems]


def _problems_of(who: str, source: Checkpoint | Expert, names: Sequence[str]) -> list[str]:
    tensors = source.info.tensors
    headers = list(tensors.values()) if source.info.is_adapter else [tensors[n] for n in names if n in tensors]
    problems = []
    for t in sorted((t for t in headers if t.dtype in FLOATING), key=lambda t: (t.file, t.start)):
        n_bad = _count(t)
        if n_bad and (source.info.is_adapter or source.is_stored(t.name)):
            problems.append(_problem(t.file, n_bad, t.n_elements, who, t.name))
        elif n_bad:  # some rows are left out, perhaps all those with bad entries
            problems.append(tensor_problem(source.tensor(t.name), t.name, who, source))
    return [p for p in problems if p]


def _count(t: TensorHeader) -> int:
    """Return how many entries of a tensor in a file are not finite, by their bits."""
    kind, mask, infinite = _BITS[t.dtype]
    buffer = memoryview(bytearray(min(t.n_bytes, CHUNK_BYTES)))
    sizes = np.empty(len(buffer) // np.dtype(kind).itemsize, dtype=kind)
    n_bad = 0
    for piece in pieces(t, buffer):
        bits = np.frombuffer(piece, dtype=kind)
        size = np.bitwise_and(bits, mask, out=sizes[: len(bits)])
        if size.max() >= infinite:
            n_bad += int(np.count_nonzero(size >= infinite))
    return n_bad


def _problem(file: Path, n_bad: int, n: int, who: str, name: str) -> str:
    return (
        f"{file}: weights must be finite, found NaN or infinity in {n_bad} of {n} entries of {who}, "
        f"tensor {name!r}; train or download it again"
    )
