"""An expert's units, matched with the base's by assignment problems. `mal` has the formula and its limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from merge_search.engine.checkpoints.checkpoint import TORCH_DTYPES, dtype_name
from merge_search.engine.checkpoints.layout import layer_of
from merge_search.engine.checkpoints.vocabulary import read_vocabulary, row_map
from merge_search.engine.transforms.axes import Sizes, axes_of, sizes_of, stored_name
from merge_search.engine.transforms.sources import Source

__all__ = ["Alignment"]

Units = tuple[Tensor, Tensor]
"""Matched units of one axis: their numbers in the base, ascending, and in the expert."""


@dataclass
class Alignment:
    """Units of an expert matched with the base's.

    Args:
        base: The base.
        expert: The expert.
        blocks: The expert's block that feeds each of the base's; None for none.

    Attributes:
        units: Matched units by axis: ``d``, ``m.3``, ``q.3``, ``k.3`` (heads, not entries), ``v``.
    """

    base: Source
    expert: Source
    blocks: Sequence[int | None]
    units: dict[str, Units] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [sizes_of(source.config) for source in (self.base, self.expert)]
        assert sizes[0] is not None
        assert sizes[1] is not None
        self._sizes: tuple[Sizes, Sizes] = (sizes[0], sizes[1])
        self._pairs = dict(self._matched_names())
        self._vocabulary = [read_vocabulary(s.settings_folder) for s in (self.base, self.expert)]

    def _matched_names(self) -> Iterator[tuple[str, str]]:
        """(name in the base, name in the expert) of every tensor that the expert covers."""
        for name in self.base.groups:
            place = layer_of(name)
            own: str | None = name
            if place is not None:
                block = self.blocks[place[1]]
                own = None if block is None else f"{place[0]}.{block}.{place[2]}"
            if own is not None and (stored := stored_name(own, self.expert.headers, self.expert.config)) is not None:
                yield name, stored

    def solve(self, passes: int) -> None:
        """Match the residual stream by what is outside the blocks, then blocks and residual stream in turn."""
        self.units["d"] = self._assigned(self._scores_of("d", self._sizes[0].d, self._sizes[1].d, outside_only=True))
        for i in range(passes):
            for block in [b for b, own in enumerate(self.blocks) if own is not None]:
                self._match_heads(block)
                self.units[f"m.{block}"] = self._assigned(
                    self._scores_of(f"m.{block}", self._sizes[0].m, self._sizes[1].m)
                )
            before = self.units["d"][1]
            self.units["d"] = self._assigned(self._scores_of("d", self._sizes[0].d, self._sizes[1].d))
            if i and torch.equal(before, self.units["d"][1]):
                return

    def _match_heads(self, block: int) -> None:
        """Match key/value heads, each with its query heads: an assignment problem inside each pair, and one over pairs.

        score of a pair = < key and value rows > + the best assignment of its query heads
        """
        (a, b), q, k = self._sizes, f"q.{block}", f"k.{block}"
        queries = self._scores_of(q, a.heads, b.heads)
        keys = self._scores_of(k, a.kv, b.kv)
        per, own_per = a.heads // a.kv, b.heads // b.kv
        inner = {}
        for i in range(a.kv):
            for j in range(b.kv):
                part = queries[i * per : (i + 1) * per, j * own_per : (j + 1) * own_per]
                inner[i, j] = linear_sum_assignment(part, maximize=True)
                keys[i, j] += part[inner[i, j]].sum()
        self.units[k] = self._assigned(keys)
        rows = [(i, j, *inner[i, j]) for i, j in zip(*(u.tolist() for u in self.units[k]), strict=True)]
        ours = np.concatenate([i * per + mine for i, _, mine, _ in rows])
        theirs = np.concatenate([j * own_per + other for _, j, _, other in rows])
        self.units[q] = (torch.from_numpy(ours), torch.from_numpy(theirs))

    @staticmethod
    def _assigned(scores: NDArray[np.float64]) -> Units:
        rows, columns = linear_sum_assignment(scores, maximize=True)
        return torch.from_numpy(rows), torch.from_numpy(columns)

    def _scores_of(self, axis: str, n: int, own_n: int, *, outside_only: bool = False) -> NDArray[np.float64]:
        """Inner products of the base's units with the expert's, shape (n, own_n), over all tensors with the axis.

        Only entries count whose other units are matched.
        """
        scores = torch.zeros(n, own_n, dtype=torch.float64)
        letter, _, block = axis.partition(".")
        for name, own in self._pairs.items():
            axes, place = axes_of(name), layer_of(name)
            if letter not in axes or (block and (place is None or place[1] != int(block))):
                continue
            if outside_only and place is not None and len(axes) > 1:
                continue  # the units of its other axis are not known yet
            one, two = self._unfolded(name, own)
            for at in (i for i, a in enumerate(axes) if a == letter):
                a, b = one, two
                for i in range(len(axes)):
                    if i != at:
                        ours, theirs = self._rows(axes[i], place, a.shape[i], b.shape[i])
                        a, b = a.index_select(i, ours), b.index_select(i, theirs)
                scores += a.movedim(at, 0).reshape(n, -1).double() @ b.movedim(at, 0).reshape(own_n, -1).double().T
        return scores.numpy()

    def _unfolded(self, name: str, own: str) -> tuple[Tensor, Tensor]:
        """The tensor of both, with one axis for every letter."""
        tensors = self.base.tensor(name), self.expert.tensor(own)
        axes = axes_of(name)
        if "3" not in axes:
            return tensors
        at = axes.index("3")
        one, two = (t.reshape(*t.shape[:at], 3, -1) for t in tensors)
        return one, two

    def _rows(self, axis: str, place: tuple[str, int, str] | None, n: int, own_n: int) -> Units:
        """Matched indices of one axis of a tensor, of lengths `n` and `own_n`."""
        if axis == "d" and "d" in self.units:
            return self.units["d"]
        if axis in "mqk":
            assert place is not None
            units = self.units.get(f"{axis}.{place[1]}")
            if units is None:
                return torch.arange(0), torch.arange(0)
            return (
                units
                if axis == "m"
                else (_entries(units[0], self._sizes[0].head), _entries(units[1], self._sizes[1].head))
            )
        one, two = self._vocabulary
        if axis == "v" and one is not None and two is not None and (rows := row_map(one, two, n, own_n)) is not None:
            return torch.tensor(rows.base, dtype=torch.long), torch.tensor(rows.expert, dtype=torch.long)
        same = torch.arange(min(n, own_n))
        return same, same

    def aligned(self, name: str) -> Tensor:
        """A tensor of the expert in the base's shape: the base's values where it covers nothing.

        The dtype is the wider of the two, so that those entries have a delta of exactly zero.
        """
        own = self._pairs.get(name)
        if own is None:
            return self.base.tensor(name)
        one, two = self._unfolded(name, own)
        axes, place = axes_of(name), layer_of(name)
        found = [self._rows(a, place, one.shape[i], two.shape[i]) for i, a in enumerate(axes)]
        result = one.to(torch.promote_types(one.dtype, two.dtype), copy=True)
        for i, (_, theirs) in enumerate(found):
            two = two.index_select(i, theirs)
        result[torch.meshgrid(*(ours for ours, _ in found), indexing="ij")] = two.to(result.dtype)
        return result.reshape(self.base.headers[name].shape)

    def dtype(self, name: str) -> str:
        """The dtype of an aligned tensor, as safetensors calls it."""
        dtype, own = self.base.headers[name].dtype, self._pairs.get(name)
        if own is None:
            return dtype
        return dtype_name(torch.promote_types(TORCH_DTYPES[dtype], TORCH_DTYPES[self.expert.headers[own].dtype]))

    def covered(self) -> float:
        """Share of the base's entries that the expert covers."""
        n = total = 0
        for name in self.base.groups:
            header = self.base.headers[name]
            total += header.n_elements
            if name in self._pairs:
                one, two = self._unfolded(name, self._pairs[name])
                place = layer_of(name)
                rows = [self._rows(a, place, one.shape[i], two.shape[i])[0] for i, a in enumerate(axes_of(name))]
                n += int(np.prod([len(r) for r in rows]))
        return n / total


def _entries(heads: Tensor, size: int) -> Tensor:
    """Indices of the entries of whole heads."""
    return (heads[:, None] * size + torch.arange(size)).flatten()
