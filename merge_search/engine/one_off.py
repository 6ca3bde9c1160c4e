"""One merge from files to files: each tensor is read once, merged and let go, several at a time.

The same passes and the same bits as `MergeEngine` over a resident pool. What differs is how the numbers that a pass
needs are found: largest deltas of all experts in one sweep, and of the order statistics only what one density asks for.
Passes are replayed (`replay`); for large models C loops are compiled, never graphs, which take longer than the merge.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_search.engine.assess import load, measure_of
from merge_search.engine.engine import MergeEngine
from merge_search.engine.facts import ByteCache, Facts, Scope
from merge_search.engine.order import _GOLDEN as GOLDEN
from merge_search.engine.order import EVERYTHING, EXACT_LIMIT, NOTHING, Keep, Table
from merge_search.engine.pipeline import output_dtype
from merge_search.engine.plan import Planner
from merge_search.engine.pool import ModelPool
from merge_search.engine.replay import ReplayRunner
from merge_search.recipe import Assess, Recipe

__all__ = ["OneOffEngine", "OneOffFacts", "is_element_wise"]

_CHUNK = 2**17
_SAMPLE = 2**14
_RUN = 8  # neighbours that a sample takes together: one wait for memory
_SHIFT = 12  # bins of a table: the upper 20 bits of a float32
_WORKERS = 4  # at most: each holds a tensor of every model
_CACHE_BYTES = 2**30
_LOOPS_FROM = 2**28  # parameters: below, compiling a loop costs more than it saves


class OneOffEngine(MergeEngine):
    """A `MergeEngine` that streams.

    Args:
        tensors: A pool made with ``once=True``.
        threads: Tensors merged at a time, where that changes no bit; None: as many as torch has threads, four at most.
    Memory: base, experts and result of the largest tensors, `threads` + 1 of them, and float32 chunks.
    """

    def __init__(self, tensors: ModelPool, *, threads: int | None = None) -> None:
        super().__init__(tensors, compile=False)
        self._pool = tensors
        self._facts = OneOffFacts(tensors)
        if tensors.device.type == "cpu":
            size = sum(math.prod(tensors.base_info.tensors[n].shape) for n in tensors.groups)
            self._runner = ReplayRunner(loops=size >= _LOOPS_FROM)
        self._planner = Planner(tensors, runner=self._runner)
        self._planner.facts = self._facts
        if threads is None:
            threads = (
                1 if tensors.device.type == "cuda" else min(_WORKERS, torch.get_num_threads(), os.cpu_count() or 1)
            )
        self._threads = threads

    def merged(self, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
        """As `MergeEngine.merged`: the same bits in the same order."""
        self._require(recipe)
        names = list(self.tensors.groups)
        if self._threads > 1 and is_element_wise(recipe):
            yield from self._several(recipe, names)
            return
        for name in names:
            yield name, self._merge(recipe, name)
            self._facts.stored = ByteCache(_CACHE_BYTES)  # scores of this tensor are not needed again

    @torch.no_grad()
    def _merge(self, recipe: Recipe, name: str) -> Tensor:
        with self._pool.holding(name):
            base = self.tensors.base(name)
            out = torch.empty(base.shape, dtype=output_dtype(recipe, base), device=self.tensors.device)
            self._merge_into(recipe, name, out)
            return out

    def _several(self, recipe: Recipe, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """A tensor per thread. torch's own threads rest meanwhile: they wait for each other after every operation, which
        on a busy machine costs many times the work."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        waiting: deque[tuple[str, Future[Tensor]]] = deque()
        pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            if recipe.select.scope == "model":  # one thread finds what all tensors share
                yield names[0], pool.submit(self._merge, recipe, names[0]).result()
                names = names[1:]
            for name in names:
                waiting.append((name, pool.submit(self._merge, recipe, name)))
                if len(waiting) > self._threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


def is_element_wise(recipe: Recipe) -> bool:
    """Whether no float of a merge depends on how many threads torch sums with: each rule works on elements, counts or orders."""
    return (
        recipe.operator is None
        and not recipe.post
        and recipe.allocate.kind == "constant"
        and recipe.select.kind in ("all", "top_k", "band", "threshold", "bernoulli", "soft_threshold")
        and recipe.select.scope != "row"
        and recipe.rescale.kind not in ("match_l1", "match_l2")
        and recipe.splice.kind in ("sum", "count", "mask", "coefficient")
        and not recipe.splice.unique_boost
        and measure_of(recipe.assess).cheap
        and not hasattr(load(recipe.assess.measure), "reduce")
    )


class OneOffFacts(Facts):
    """`Facts` of tensors that are asked about once."""

    def __init__(self, tensors: ModelPool) -> None:
        super().__init__(tensors, cache_bytes=_CACHE_BYTES)
        self._pool = tensors

    def flats(self, name: str, experts: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        base, *own = (t.reshape(-1) for t in self._pool.read(name, experts))
        return base, own

    def largest_base(self, name: str) -> float:
        if name not in self._largest_base:
            self._sweep_largest(name)
        return super().largest_base(name)

    def largest_delta(self, expert: str, name: str) -> float:
        if (expert, name) not in self._largest:
            self._sweep_largest(name)
        return super().largest_delta(expert, name)

    def _sweep_largest(self, name: str) -> None:
        """Largest |base| and |delta| of every expert in one sweep.

        Raises:
            WeightsError: NaN or infinity, with the file.
        """
        names = tuple(self.tensors.models.experts)
        base, own = self.flats(name, names)
        changed = [t.data_ptr() != base.data_ptr() for t in own]
        found: list[list[Tensor]] = [[torch.zeros((), device=base.device)] for _ in range(1 + len(names))]
        origin, delta = torch.empty(2, min(_CHUNK, base.numel()), dtype=torch.float32, device=base.device)
        for start in range(0, base.numel(), _CHUNK):
            n = min(_CHUNK, base.numel() - start)
            part, o, d = slice(start, start + n), origin[:n], delta[:n]
            found[0].append(torch.abs(o.copy_(base[part]), out=d).amax())
            for sizes, tensor, is_changed in zip(found[1:], own, changed, strict=True):
                if is_changed:
                    sizes.append(d.copy_(tensor[part]).sub_(o).abs_().amax())
        largest = [float(torch.stack(sizes).max()) for sizes in found]
        if not all(map(math.isfinite, largest)):
            self._pool.require_finite(name)
        else:
            self._largest_base[name] = largest[0]
            self._largest.update({(e, name): x for e, x in zip(names, largest[1:], strict=True)})

    def tables(self, assess: Assess, scope: Scope, name: str, coefficients: tuple[float, ...] = ()) -> dict[str, Table]:
        n = math.prod(self._pool.base_info.tensors[name].shape)
        is_plain = assess.measure == "magnitude" and not scope.winsorise and scope.select.scope != "model"
        if not is_plain or n <= EXACT_LIMIT or self.tensors.device.type != "cpu":
            return super().tables(assess, scope, name, coefficients)
        made: dict[str, dict[str, Table]] = {}

        def whole() -> dict[str, Table]:
            if not made:
                made[name] = super(OneOffFacts, self).tables(assess, scope, name, coefficients)
            return made[name]

        return {
            e: LateTable(n, lambda k, e=e: self._keep(e, name, k), lambda e=e: whole()[e])  # type: ignore[misc]
            for e in self.active(name, scope.experts)
        }

    def _keep(self, expert: str, name: str, k: int) -> Keep | None:
        base, (own,) = self.flats(name, [expert])
        return keep_of_deltas(base, own, k, self.largest_delta(expert, name))


class LateTable(Table):
    """A `Table` that finds single thresholds by itself and makes the whole histogram only if something else is asked.

    Args:
        n: Elements, above `EXACT_LIMIT`.
        find: k -> the rule that keeps the k largest; None if it was not found.
        whole: Makes the whole table.
    """

    def __init__(self, n: int, find: Callable[[int], Keep | None], whole: Callable[[], Table]) -> None:
        self.n = n
        self._find, self._whole = find, whole

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("n", "_find", "_whole"):
            raise AttributeError(name)
        return getattr(self._whole(), name)

    @property
    def stride(self) -> int:
        return GOLDEN

    def keep(self, k: int) -> Keep:
        if k <= 0:
            return NOTHING
        if k >= self.n:
            return EVERYTHING
        return self._find(k) or self._whole().keep(k)


def keep_of_deltas(base: Tensor, own: Tensor, k: int, largest: float) -> Keep | None:
    """The rule of `Table.keep` for the histogram of |own - base|, without the histogram.

    A sample brackets the k-th largest value; one sweep counts what is above the bracket and takes out what is in it.

    Args:
        base, own: Flat, finite, on the CPU.
        k: In 1..n - 1.
        largest: max |own - base|.
    Returns:
        The same numbers as the histogram gives; None if the sample's bracket missed (4 standard errors to either side).
    """
    bottom, top = _bracket(base, own, k / base.numel(), largest)
    low, high = np.float32(_edge(bottom)), np.float32(_edge(top))
    above, taken = 0, []
    for size in _sizes(base, own):
        over, inside = size >= high, size >= low
        above += int(np.count_nonzero(over))
        taken.append(size[np.logical_xor(inside, over, out=inside)])
    bins = (np.concatenate(taken).view(np.int32) >> _SHIFT) - bottom
    reach = above + np.bincount(bins, minlength=top - bottom)[::-1].cumsum()
    if above >= k or reach[-1] < k:
        return None
    i = int(np.searchsorted(reach, k))
    before = int(reach[i - 1]) if i else above
    share = (k - before) / (int(reach[i]) - before)
    return Keep(_edge(top - 1 - i), _edge(top - i), math.floor(share * 2**32) - 2**31 - 1)


def _sizes(base: Tensor, own: Tensor) -> Iterator[NDArray[np.float32]]:
    """|own - base| chunk by chunk, each in the place of the last: torch converts, and numpy compares, several times faster."""
    origin, delta = torch.empty(2, min(_CHUNK, base.numel()), dtype=torch.float32)
    for start in range(0, base.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        n = base[part].numel()
        yield delta[:n].copy_(own[part]).sub_(origin[:n].copy_(base[part])).abs_().numpy()


def _bracket(base: Tensor, own: Tensor, density: float, largest: float) -> tuple[int, int]:
    """Bins [bottom, top) that hold the value of which a share `density` is larger, by a sample spread over the tensor."""
    n = min(max(_SAMPLE, base.numel() // 128), 16 * _SAMPLE) // _RUN * _RUN
    rows = base.numel() // _RUN
    places = (torch.arange(n // _RUN) * 0x9E3779B1 % 2**32) * rows >> 32
    mine, origin = (t[: rows * _RUN].view(rows, _RUN)[places].reshape(-1).to(torch.float32) for t in (own, base))
    sample = mine.sub_(origin).abs_().numpy()
    sample[::-1].sort()
    margin = 4 * math.sqrt(n * density * (1 - density)) + 8
    first, last = math.floor(density * n - margin), math.ceil(density * n + margin)
    top = _bin(float(sample[first]) if first >= 0 else largest) + 1
    return (_bin(float(sample[last])) if last < n else 0), top


def _bin(value: float) -> int:
    return int(np.float32(value).view(np.int32)) >> _SHIFT


def _edge(number: int) -> float:
    """Smallest float32 of a bin."""
    return float(np.int32(number << _SHIFT).view(np.float32))
