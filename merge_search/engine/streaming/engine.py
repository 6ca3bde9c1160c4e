"""Streaming, one merge from files to files: each tensor is read once, merged and let go, several at a time.

`StreamingEngine` runs the passes of `MergeEngine` over a resident pool and gives the same bits. Reading and hashing
(`reader`), merging, and writing by the caller go on at the same time. `thresholds` finds the numbers that a pass needs:
largest deltas of all experts in one sweep, and of the order statistics only those that one density asks for. Except for
small models, C loops are compiled; graphs never are, because compiling them takes longer than the merge.
"""

from __future__ import annotations

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from merge_search.engine.contracts import output_dtype
from merge_search.engine.engine import MergeEngine
from merge_search.engine.execute.runner import LoopRunner, Runner
from merge_search.engine.methods.assess import load, measure_of
from merge_search.engine.passes.measurements import Measurements
from merge_search.engine.passes.order_statistics import EXACT_LIMIT, Thresholds
from merge_search.engine.passes.settings import Assessment
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.streaming.buffers import Buffers
from merge_search.engine.streaming.reader import Feed
from merge_search.engine.streaming.thresholds import SweptThresholds, largest_values
from merge_search.memory import MemoryBudget
from merge_search.recipe import Recipe
from merge_search.rules import SELECTIONS, SPLICES

T = TypeVar("T")

__all__ = ["StreamingEngine", "StreamingMeasurements", "is_element_wise"]

_WORKERS = 4  # threads at most: each holds a tensor of every model
_AHEAD = 1  # tensors that are read before their turn, or merged and not taken yet
_CACHE_BYTES = 2**30
_LOOPS_FROM = 2**23  # parameters: below, a loop that was never compiled costs more than it saves
_LONG_TENSOR_QUANTILE = 0.9  # "nearly the longest": at the 90th percentile of tensor sizes


class StreamingEngine(MergeEngine):
    """A `MergeEngine` that streams.

    Args:
        tensors: A pool made with ``streaming=True``.
        threads: Tensors that are merged at a time, where that changes no bit. None: as many as torch has threads, at
            most four.
    Memory: Base, experts and result of `threads` + 2 tensors, or of one that is longer than those; and float32 chunks.
    """

    def __init__(self, tensors: ModelPool, *, threads: int | None = None) -> None:
        self._pool, self._buffers = tensors, Buffers()
        self._sizes = {n: tensors.base_info.tensors[n].n_elements for n in tensors.groups}
        has_loops = tensors.device.type == "cpu" and sum(self._sizes.values()) >= _LOOPS_FROM
        runner = LoopRunner() if has_loops else Runner(tensors.device, compile=False)
        super().__init__(tensors, runner=runner, measurements=StreamingMeasurements(tensors))
        if threads is None:
            threads = (
                1 if tensors.device.type == "cuda" else min(_WORKERS, torch.get_num_threads(), os.cpu_count() or 1)
            )
        self._threads = threads

    def merged(self, recipe: Recipe) -> Generator[tuple[str, Tensor], None, None]:
        """The bits of `MergeEngine.merged`, in the order of names. At its end `ModelPool.hashes` costs nothing."""
        self._require(recipe)
        names = sorted(self.tensors.groups)
        feed, several = Feed(self._pool, self._buffers), self._threads > 1 and is_element_wise(recipe)
        try:
            yield from self._several(recipe, names, feed) if several else self._one_by_one(recipe, names, feed)
            feed.finish()
        finally:
            feed.close()

    @torch.no_grad()
    def _merge(self, recipe: Recipe, name: str, asked: Sequence[Future[Tensor | None]]) -> Tensor:
        base, *own = (future.result() for future in asked)
        assert base is not None
        with self._pool.holding(name, [base, *(base if t is None else t for t in own)]):
            out = self._empty(base.shape, output_dtype(recipe, base))
            self._merge_into(recipe, name, out)
        return out

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        device = self.tensors.device
        return (
            self._buffers.tensor(shape, dtype)
            if device.type == "cpu"
            else torch.empty(shape, dtype=dtype, device=device)
        )

    def _one_by_one(self, recipe: Recipe, names: Sequence[str], feed: Feed) -> Iterator[tuple[str, Tensor]]:
        for name, asked in _ahead(names, feed.ask, _AHEAD, self._sizes):
            out = self._merge(recipe, name, asked)
            asked.clear()
            yield name, out
            self._measurements.stored.clear()  # scores of this tensor are not needed again
            self._operator_cache.clear()

    def _several(self, recipe: Recipe, names: Sequence[str], feed: Feed) -> Iterator[tuple[str, Tensor]]:
        """Merge a tensor per thread, with torch's own threads switched off.

        torch's threads wait for each other after every operation, which on a busy machine costs many times the work.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))

        def submit(name: str) -> Future[Tensor]:
            return pool.submit(self._merge, recipe, name, feed.ask(name))

        try:
            if recipe.select.scope == "model":  # one thread finds what all tensors share
                yield names[0], submit(names[0]).result()
                names = names[1:]
            for name, future in _ahead(names, submit, self._threads + _AHEAD, self._sizes):
                yield name, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


def _ahead(names: Iterable[str], take: Callable[[str], T], n: int, sizes: Mapping[str, int]) -> Iterator[tuple[str, T]]:
    """Yield `take(name)` for each name, in order; up to `n` are taken ahead.

    Fewer very long tensors are taken ahead: together they are no longer than the longest one, or than n + 1 tensors of
    nearly the longest.
    """
    longest = sorted(sizes.values())
    limit = max(longest[-1], (n + 1) * longest[int(_LONG_TENSOR_QUANTILE * (len(longest) - 1))])
    waiting: deque[tuple[str, T]] = deque()
    for name in names:
        while waiting and (len(waiting) > n or sizes[name] + sum(sizes[w] for w, _ in waiting) > limit):
            yield waiting.popleft()
        waiting.append((name, take(name)))
    while waiting:
        yield waiting.popleft()


def is_element_wise(recipe: Recipe) -> bool:
    """Whether the merge has the same bits on any number of torch threads: its rules use elements, counts or orders."""
    return (
        recipe.operator is None
        and not recipe.post
        and recipe.allocate.kind == "constant"
        and SELECTIONS[recipe.select.kind].is_element_wise
        and recipe.select.scope != "row"
        and recipe.rescale.kind not in ("match_l1", "match_l2")
        and not (SPLICES[recipe.splice.kind].is_scored or SPLICES[recipe.splice.kind].is_outside)
        and not recipe.splice.unique_boost
        and measure_of(recipe.assess).cheap
        and load(recipe.assess.measure).reduce is None
    )


class StreamingMeasurements(Measurements):
    """`Measurements` of tensors that are asked about once."""

    def __init__(self, tensors: ModelPool) -> None:
        super().__init__(tensors, budget=MemoryBudget(_CACHE_BYTES))
        self._pool = tensors

    def flats(self, name: str, experts: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """Base and experts of a tensor, flattened; read from the files unless the pool holds them."""
        base, *own = (t.reshape(-1) for t in self._pool.read(name, experts))
        return base, own

    def largest_base(self, name: str) -> float:
        """As `Measurements.largest_base`, found for base and experts in one sweep."""
        if name not in self._largest_base:
            self._sweep_largest(name)
        return super().largest_base(name)

    def largest_delta(self, expert: str, name: str) -> float:
        """As `Measurements.largest_delta`, found for base and experts in one sweep."""
        if (expert, name) not in self._largest:
            self._sweep_largest(name)
        return super().largest_delta(expert, name)

    def _sweep_largest(self, name: str) -> None:
        """Find the largest |base| and |delta| of every expert in one sweep.

        Raises:
            WeightsError: A weight is NaN or infinite. The message names the file.
        """
        names = tuple(self.tensors.models.experts)
        base, own = self.flats(name, names)
        largest = largest_values(base, own)
        if not all(map(math.isfinite, largest)):
            self._pool.require_finite(name)
        else:
            self._largest_base[name] = largest[0]
            self._largest.update({(e, name): x for e, x in zip(names, largest[1:], strict=True)})

    def thresholds(
        self, assessment: Assessment, name: str, coefficients: tuple[float, ...] = ()
    ) -> dict[str, Thresholds]:
        """As `Measurements.thresholds`; of long tensors' |delta|, each cut is found by itself, without a histogram."""
        scope, n = assessment.scope, math.prod(self._pool.base_info.tensors[name].shape)
        is_swept = assessment.is_plain_delta and not scope.winsorise and not scope.is_model
        if not is_swept or n <= EXACT_LIMIT or self.tensors.device.type != "cpu":
            return super().thresholds(assessment, name, coefficients)
        whole = functools.cache(lambda: super(StreamingMeasurements, self).thresholds(assessment, name, coefficients))
        return {e: self._swept_thresholds(n, e, name, whole) for e in self.active(name, scope.experts)}

    def _swept_thresholds(
        self, n: int, expert: str, name: str, whole: Callable[[], dict[str, Thresholds]]
    ) -> SweptThresholds:
        def tensors() -> tuple[Tensor, Tensor]:
            base, (own,) = self.flats(name, [expert])
            return base, own

        return SweptThresholds(n, self.largest_delta(expert, name), tensors, lambda: whole()[expert])
