"""A recorded pass gives the bits of the pass itself, in few buffers, and says when it cannot be recorded."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from merge_search.engine.fused import Runner, has_compiler
from merge_search.engine.memory import MemoryTensors
from merge_search.engine.pipeline import Pass
from merge_search.engine.plan import Planner
from merge_search.engine.replay import CHUNK, ReplayRunner, record
from merge_search.presets import preset
from merge_search.recipe import Models

NAME = "model.layers.0.mlp.up_proj.weight"
CPU = torch.device("cpu")
REPLAYED = (
    "ties",
    "ties_mergekit",
    "dare_ties",
    "della",
    "breadcrumbs",
    "task_arithmetic",
    "linear",
    "consensus",
    "cabs",
)
NOT_REPLAYED = ("pcb", "cki_soft", "magmax")


def planned(name: str, n: int, dtype: torch.dtype) -> tuple[Pass, Tensor, list[Tensor]]:
    """A preset's pass over n elements, of which some deltas are zero, equal or opposite, and some weights -0.0."""
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(1, n, generator=generator)
    base[:, ::7] = -0.0
    step = 0.1 * torch.randn(3, 1, n, generator=generator).round(decimals=1)
    step[1, :, ::5] = -step[0, :, ::5]
    weights = {e: {NAME: (base + s).to(dtype)} for e, s in zip(("one", "two", "three"), step, strict=True)}
    tensors = MemoryTensors({NAME: base.to(dtype)}, weights)
    planner = Planner(tensors)
    p = planner.plan(preset(name, Models(base="base", experts={e: e for e in weights})), NAME)
    assert p is not None
    return p, *planner.facts.flats(NAME, p.experts)


def merged(runner: Runner, p: Pass, base: Tensor, experts: list[Tensor]) -> Tensor:
    out = torch.empty(base.shape, dtype=torch.float32)
    runner.run(p, base, experts, out)
    return out.view(torch.int32)


@pytest.mark.parametrize("n", [40, CHUNK, 2 * CHUNK + 17])
@pytest.mark.parametrize("name", REPLAYED)
def test_a_replayed_pass_gives_the_bits_of_the_pass(name: str, n: int) -> None:
    p, base, experts = planned(name, n, torch.bfloat16)
    assert record(p, [t.dtype for t in (base, *experts, *(t for v in p.given.values() for t in v))]) is not None
    assert torch.equal(merged(ReplayRunner(), p, base, experts), merged(Runner(CPU, compile=False), p, base, experts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["ties_mergekit", "dare_ties"])
def test_a_replayed_pass_gives_the_bits_of_the_pass_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    p, base, experts = planned(name, CHUNK + 1, dtype)
    assert torch.equal(merged(ReplayRunner(), p, base, experts), merged(Runner(CPU, compile=False), p, base, experts))


@pytest.mark.parametrize("name", NOT_REPLAYED)
def test_a_pass_that_cannot_be_replayed_runs_as_it_is(name: str) -> None:
    p, base, experts = planned(name, 5000, torch.bfloat16)
    assert record(p, [torch.bfloat16] * 4) is None
    assert torch.equal(merged(ReplayRunner(), p, base, experts), merged(Runner(CPU, compile=False), p, base, experts))


def test_one_recording_serves_other_numbers_and_lengths() -> None:
    runner = ReplayRunner()
    for n in (3 * CHUNK, 900, CHUNK + 5):
        p, base, experts = planned("ties", n, torch.bfloat16)
        p.numbers["coefficient"] = [0.1 * n % 1, 0.25, -3.0]
        assert torch.equal(merged(runner, p, base, experts), merged(Runner(CPU, compile=False), p, base, experts))
    assert len(runner._programs) == 1


def test_threads_that_share_a_recording_do_not_share_its_buffers() -> None:
    runner = ReplayRunner()
    passes = [planned("ties", 4 * CHUNK + i, torch.bfloat16) for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda x: merged(runner, *x), passes))
    for one, x in zip(found, passes, strict=True):
        assert torch.equal(one, merged(Runner(CPU, compile=False), *x))


@pytest.mark.skipif(not has_compiler(CPU), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["ties_mergekit", "dare_ties"])
def test_loops_give_the_bits_of_a_replay(name: str) -> None:
    p, base, experts = planned(name, 2 * CHUNK + 17, torch.bfloat16)
    assert torch.equal(merged(ReplayRunner(loops=True), p, base, experts), merged(ReplayRunner(), p, base, experts))
