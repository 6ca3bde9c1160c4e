"""torch's internals that `_compat.torch` uses still behave as it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from merge_search._compat.torch import compile_apart, mark_lengths_dynamic, unobserved


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Graphs that torch hands to its backend, which runs them as they are."""
    made: list[object] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> object:
        made.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
    torch._dynamo.reset()
    return made


def made_again(factor: float) -> object:
    def run(x: Tensor) -> Tensor:
        return x * factor

    return run


def test_every_copy_of_a_closure_has_graphs_of_its_own(graphs: list[object]) -> None:
    limit = torch._dynamo.config.recompile_limit
    for i in range(limit + 3):
        compiled = compile_apart(made_again(float(i)), f"run_{i}")
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), float(i)))
    assert len(graphs) == limit + 3


def test_one_graph_serves_every_length(graphs: list[object]) -> None:
    compiled = compile_apart(made_again(2.0), "every_length")
    for n in (5, 8, 13, 21):
        x = torch.ones(n)
        mark_lengths_dynamic([x, torch.ones(1), torch.ones(())])
        assert compiled(x).numel() == n
    assert len(graphs) == 1


def test_unobserved_calls_are_seen_by_no_mode() -> None:
    class Seen(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[object] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Seen() as mode:
        torch.sin(x)
        with unobserved():
            torch.cos(x)
        torch.exp(x)
    assert mode.calls == [torch.sin, torch.exp]
