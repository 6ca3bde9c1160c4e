"""What is measured once and kept."""

from __future__ import annotations

import pytest
import torch

from merge_search.engine.balanced import balanced_masks, counts_of
from merge_search.engine.engine import MergeEngine
from merge_search.engine.facts import Facts, Scope
from merge_search.engine.memory import MemoryTensors
from merge_search.engine.order import row_ranks
from merge_search.engine.pipeline import SHORT_RANKS
from merge_search.presets import preset
from merge_search.recipe import Assess, Select


def tensors(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(shape, generator=generator)}
    return MemoryTensors(
        base, {e: {"w": base["w"] + 0.1 * torch.randn(shape, generator=generator)} for e in ("a", "b")}
    )


@pytest.mark.parametrize("columns", [1, 5, SHORT_RANKS, SHORT_RANKS + 1])
def test_stored_ranks_are_exact(columns):
    models = tensors((3, columns))
    scope = Scope(("a", "b"), Select(kind="rank_probability", scope="row"), 0.0, 0)
    (found, _) = Facts(models, cache_bytes=2**30).ranks(Assess(), scope, "w")
    delta = models.expert("a", "w") - models.base("w")
    assert found.dtype == (torch.int16 if columns <= SHORT_RANKS else torch.float32)
    assert torch.equal(found.reshape(3, columns).int(), row_ranks(delta.abs()))


def test_two_densities_that_keep_the_same_counts_have_the_same_masks():
    assert counts_of(0.25, 10, 4) == counts_of(0.3, 10, 4) == (1, 1)
    assert counts_of(0.8, 10, 4) == (3, 2)
    models = tensors((4, 10))
    engine = MergeEngine(models, compile=False)
    low = dict(engine.merged(preset("cabs", models.models, densities=0.25)))
    high = dict(engine.merged(preset("cabs", models.models, densities=0.8)))
    again = dict(engine.merged(preset("cabs", models.models, densities=0.3)))
    assert torch.equal(low["w"], again["w"])
    assert not torch.equal(low["w"], high["w"])


@pytest.mark.parametrize("block_size", [2, 4, 16, 17])
def test_ties_in_a_block_go_to_the_lowest_index_whatever_its_size(block_size):
    scores = torch.randint(1, 4, (5, 3 * block_size), generator=torch.Generator().manual_seed(1)).float()
    (mask,) = balanced_masks([scores], [0.5], block_size, exclusive=False)
    keep = max(1, round(0.5 * block_size))
    for block, kept in zip(scores.reshape(-1, block_size).tolist(), mask.reshape(-1, block_size).tolist(), strict=True):
        order = sorted(range(block_size), key=lambda i: (-block[i], i))
        assert [i in order[:keep] for i in range(block_size)] == kept
