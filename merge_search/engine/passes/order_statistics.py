"""Order statistics made once, so that any density becomes a threshold without another pass over memory.

One rule covers exact and approximate statistics. An element is kept when

    score >= high   or   (score >= low and index * stride <= last)          (wrapping int32 arithmetic)

- Up to `EXACT_LIMIT` elements the sorted scores are held: ``[low, high)`` is the k-th value alone, `stride` is 1,
  exactly k elements are kept, ties by lowest index.
- Above, a histogram of the upper 20 bits of the scores is held (bins 0.05 % wide): ``[low, high)`` is the bin of the
  k-th value, and the share of that bin that is due is taken evenly over the tensor by a golden-ratio stride. Taking the
  lowest index first would pile all ties, of which bfloat16 checkpoints have many, into the first rows. The kept count
  differs from k by the sampling error of one bin, below sqrt(ties) / 2: 1e-4 n or less unless one value is shared by a
  tenth of less than a few million elements.

In both, masks are nested in the density.

A planner asks `Thresholds`. `OrderStatistics` answers from all scores of a tensor or a model. A merge that reads each
tensor once answers from two sweeps instead (`streaming.thresholds`). Both take their cuts from `cut_in_bin`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_search.engine.kernels.ranks import BITS, count_deltas, count_scores, counts_at_once
from merge_search.recipe import Select

__all__ = [
    "BIN_SHIFT",
    "EVERYTHING",
    "EXACT_LIMIT",
    "GOLDEN_STRIDE",
    "NOTHING",
    "ZERO_BIN",
    "Cut",
    "OrderStatistics",
    "OrderStatisticsBuilder",
    "Thresholds",
    "bin_edges",
    "cut_in_bin",
    "dropped_count",
    "kept_count",
    "order_statistics",
    "place_in_bins",
]

EXACT_LIMIT = 2**16
BIN_SHIFT = 32 - BITS
"""Lower bits of a float32 that a histogram does not look at."""
ZERO_BIN = 2 ** (BITS - 1)
"""The histogram bin that begins at zero."""
GOLDEN_STRIDE = 0x9E3779B1 - 2**32
"""Odd and near 2**32 / golden ratio: its multiples spread evenly over the circle."""
_FLUSH = 2**22


class Cut(NamedTuple):
    """Numbers of the rule above; `last` is a signed 32-bit integer."""

    low: float
    high: float
    last: int


NOTHING = Cut(math.inf, math.inf, -(2**31))
EVERYTHING = Cut(-math.inf, -math.inf, 2**31 - 1)


def kept_count(density: float, n: int, rounding: str = "nearest") -> int:
    """density * n, rounded; at least one where there is anything to keep."""
    return min(n, max(1, math.floor(density * n) if rounding == "down" else round(density * n))) if n else 0


def dropped_count(select: Select, n: int, kept: int) -> int:
    """How many of the largest of n scores a band drops, of which `kept` stay."""
    if select.rounding == "down":
        return min(math.floor(select.gamma * n), n - kept)
    return round(select.gamma * n)


class Thresholds(Protocol):
    """The distribution of one expert's scores over one tensor, or over all tensors that are ranked together.

    Attributes:
        n: Scores.
        n_positive: Scores above zero; in a histogram, those in bins whose lower edge is above zero.
        maximum: The largest score.
        stride: An element's index is multiplied by it before it is compared with `Cut.last`.
    """

    @property
    def n(self) -> int: ...

    @property
    def n_positive(self) -> int: ...

    @property
    def maximum(self) -> float: ...

    @property
    def stride(self) -> int: ...

    def cut(self, k: int) -> Cut:
        """The rule that keeps the k largest scores."""
        ...

    def value(self, k: int) -> float:
        """The k-th largest score, k in 1..n; linear within a histogram bin."""
        ...

    def count_for_mass(self, share: float) -> int:
        """Smallest k whose k largest scores sum to `share` of the total."""
        ...

    def kappa(self, density: float) -> float:
        """kappa such that min(1, kappa * score) has mean `density`; the largest float32 if too few are positive."""
        ...


def place_in_bins(reach: NDArray[np.int64], k: int, above: int = 0) -> tuple[int, float]:
    """The bin of the k-th largest score, and the share of that bin that the k largest take.

    Args:
        reach: Scores in all bins up to each, from the largest scores down.
        above: Scores above the first bin; `reach` counts them.
    """
    i = int(np.searchsorted(reach, k))
    before = int(reach[i - 1]) if i else above
    return i, (k - before) / (int(reach[i]) - before)


def cut_in_bin(low: float, high: float, share: float) -> Cut:
    """The cut that keeps all scores from `high` on and, spread over the tensor, a share of those in [low, high)."""
    return Cut(low, high, math.floor(share * 2**32) - 2**31 - 1)


def bin_edges(bins: NDArray[np.int64]) -> NDArray[np.float32]:
    """Smallest float32 of each histogram bin; `ZERO_BIN` begins at zero."""
    keys = ((bins - ZERO_BIN) << BIN_SHIFT).clip(-(2**31), 2**31 - 1).astype(np.int32)
    edges = np.where(keys < 0, keys ^ np.int32(0x7FFFFFFF), keys).astype(np.int32).view(np.float32)
    return np.where(np.isnan(edges), np.float32(np.inf), edges)


class OrderStatistics:
    """`Thresholds` from all scores: sorted, or as a histogram.

    Args:
        values: Sorted scores, or lower edges of the filled bins; descending.
        highs: Upper edges of the bins; None for sorted scores.
        reach: `reach[i]` scores are in the entries 0..i.
        order: Positions of sorted scores; None for a histogram.
        maximum: The largest score.
    """

    def __init__(self, values: NDArray[np.float32], highs: NDArray[np.float32] | None, reach: NDArray[np.int64],
                 order: NDArray[np.int32] | None, maximum: float) -> None:  # fmt: skip
        self._values, self._highs, self._reach, self._order = values, highs, reach, order
        self.n = int(reach[-1]) if len(reach) else 0
        self.maximum = maximum
        self.stride = 1 if order is not None else GOLDEN_STRIDE
        positive = int(np.searchsorted(-values, 0.0, side="left"))  # entries whose lower edge is above zero
        self.n_positive = int(reach[positive - 1]) if positive else 0

    def cut(self, k: int) -> Cut:
        """The rule that keeps the k largest scores."""
        if k <= 0 or self.n == 0:
            return NOTHING
        if k >= self.n:
            return EVERYTHING
        i, share = place_in_bins(self._reach, k)
        low = float(self._values[i])
        if self._order is not None:
            return Cut(low, float(np.nextafter(np.float32(low), np.float32(np.inf))), int(self._order[k - 1]))
        assert self._highs is not None
        return cut_in_bin(low, float(self._highs[i]), share)

    def value(self, k: int) -> float:
        """The k-th largest score, k in 1..n; linear within a histogram bin."""
        i, share = place_in_bins(self._reach, min(max(k, 1), self.n))
        low = float(self._values[i])
        if self._highs is None:
            return low
        return float(np.float32(min(self.maximum, low + (1 - share) * (float(self._highs[i]) - low))))

    def _weights(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        values = self._values.astype(np.float64)
        if self._highs is not None:
            values = np.minimum((values + self._highs) / 2, self.maximum)
            values[self._values == 0] = 0.0
        return np.maximum(values, 0.0), np.diff(self._reach, prepend=0).astype(np.float64)

    def count_for_mass(self, share: float) -> int:
        """Smallest k whose k largest scores sum to `share` of the total."""
        values, counts = self._weights()
        total = np.cumsum(values * counts)
        if not len(total) or total[-1] <= 0:
            return 0
        i = int(np.searchsorted(total, share * total[-1] * (1 - 1e-12)))
        if i >= len(total):
            return self.n
        before, reached = (int(self._reach[i - 1]), total[i - 1]) if i else (0, 0.0)
        due = math.ceil(float(share * total[-1] - reached) / float(values[i]) - 1e-9)
        return min(self.n, before + max(1, due))

    def kappa(self, density: float) -> float:
        """kappa such that min(1, kappa * score) has mean `density`; the largest float32 if too few are positive."""
        values, counts = self._weights()
        target = density * self.n
        reach = np.cumsum(counts)
        tail = (values * counts).sum() - np.cumsum(values * counts)  # sum of what lies after entry i
        if not len(values) or values[0] <= 0 or target >= self.n_positive:
            return float(np.finfo(np.float32).max)
        best = target / (values * counts).sum()
        if best * values[0] <= 1:
            return float(best)
        with np.errstate(divide="ignore", invalid="ignore"):
            kappas = (target - reach) / tail  # entries 0..i are certain
            fits = (kappas * values >= 1 - 1e-12) & (kappas > 0)
            fits[:-1] &= kappas[:-1] * values[1:] <= 1 + 1e-12
        hits = np.flatnonzero(fits)
        return float(kappas[hits[0]]) if len(hits) else float(best)


class OrderStatisticsBuilder:
    """Collects scores chunk by chunk, then makes the statistics.

    Args:
        n: Scores that will come in all.
    """

    def __init__(self, n: int) -> None:
        self._exact = n <= EXACT_LIMIT
        self._chunks: list[Tensor] = []
        self._starts: list[int] = []
        self._next = 0
        self._waiting = 0
        self._counts: Tensor | None = None
        self._maximum = -math.inf

    def add(self, scores: Tensor, start: int | None = None) -> None:
        """Take the next scores.

        Args:
            scores: float32, any shape, read in memory order.
            start: Position of the first one; None: they follow the last ones.
        """
        flat = scores.reshape(-1)
        start = self._next if start is None else start
        self._next = start + flat.numel()
        if not flat.numel():
            return
        self._maximum = max(self._maximum, float(flat.max()))
        if self._exact:
            self._chunks.append(flat + 0.0)  # -0.0 becomes 0.0
            self._starts.append(start)
            return
        self._chunks.append(flat)
        self._waiting += flat.numel()
        if self._waiting >= _FLUSH or counts_at_once(flat):
            self._flush()

    def add_deltas(self, base: Tensor, own: Tensor, largest: float, start: int | None = None) -> None:
        """Take |own - base| as the next scores, subtracted in float32.

        Args:
            base: Flat, finite.
            own: Flat, finite, as long as `base`.
            largest: The largest |own - base|.
            start: As in `add`.
        """
        if self._exact:
            device = own.device
            self.add((own.to(torch.float32) - base.to(device, torch.float32)).abs(), start)
            return
        self._next = (self._next if start is None else start) + own.numel()
        self._maximum = max(self._maximum, largest)
        count_deltas(base, own, self._histogram_on(own.device))

    def _flush(self) -> None:
        """Count the waiting scores."""
        if self._chunks:
            flat = self._chunks[0] if len(self._chunks) == 1 else torch.cat(self._chunks)
            count_scores(flat, self._histogram_on(flat.device))
        self._chunks, self._waiting = [], 0

    def _histogram_on(self, device: torch.device) -> Tensor:
        if self._counts is None:
            self._counts = torch.zeros(2**BITS, dtype=torch.int64, device=device)
        return self._counts

    def finish(self) -> OrderStatistics:
        """The statistics of all scores that were taken."""
        if not self._exact:
            self._flush()
            assert self._counts is not None
            return self._histogram(self._counts)
        flat = torch.cat(self._chunks) if self._chunks else torch.zeros(0)
        values, order = torch.sort(flat, descending=True, stable=True)
        places = [
            torch.arange(start, start + len(c), device=c.device)
            for start, c in zip(self._starts, self._chunks, strict=True)
        ]
        positions = torch.cat(places)[order].to(torch.int32) if places else order.to(torch.int32)
        reach = np.arange(1, len(values) + 1, dtype=np.int64)
        return OrderStatistics(values.cpu().numpy(), None, reach, positions.cpu().numpy(), self._maximum)

    def _histogram(self, counts: Tensor) -> OrderStatistics:
        filled = torch.nonzero(counts).reshape(-1).flip(0)
        reach = torch.cumsum(counts[filled], 0).cpu().numpy()
        bins = filled.cpu().numpy()
        return OrderStatistics(bin_edges(bins), bin_edges(bins + 1), reach, None, self._maximum)


def order_statistics(scores: Tensor | Sequence[Tensor]) -> OrderStatistics:
    """The order statistics of one tensor of scores, or of several that are ranked together."""
    parts: Iterable[Tensor] = [scores] if isinstance(scores, Tensor) else scores
    parts = list(parts)
    builder = OrderStatisticsBuilder(sum(p.numel() for p in parts))
    for part in parts:
        builder.add(part)
    return builder.finish()
