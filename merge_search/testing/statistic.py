"""What every statistic promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from merge_search.engine.resident.in_memory import MemoryTensors
    from merge_search.engine.statistics.rows import TaskRows, Work
    from merge_search.rules import StatisticInfo

__all__ = ["StatisticCase", "StatisticConformance"]

_WORDS, _WIDTH, _N_ROWS = 12, 6, {"one": 5, "two": 3}
_SIZE = 0.1
"""Standard deviation of the deltas; that of the base is 1."""


@dataclass
class StatisticCase:
    """A statistic to test, on a model of one embedding, two linear layers and a gain, with two experts and two tasks.

    Attributes:
        kind: Its name, with options as rules ask for it: ``signal@power=3.0``.
        asked: Questions that the losses were really asked, by `measured`: one per row of a loss, and two per row whose
            gradient was taken.
        charged: Questions that the statistic says it asked.
    """

    kind: str
    asked: int = field(default=0, init=False)
    charged: int = field(default=0, init=False)

    @property
    def row(self) -> StatisticInfo:
        """Its row, with the options of the name."""
        from merge_search.rules import statistic_named

        named = statistic_named(self.kind)
        assert named is not None, f"no statistic is called {self.kind!r}"
        return named[0]

    @cached_property
    def models(self) -> MemoryTensors:
        """Base and two experts."""
        import torch

        from merge_search.engine.resident.in_memory import MemoryTensors
        from merge_search.recipe import Group

        draw = torch.Generator().manual_seed(0)
        base = {n: torch.randn(p.shape, generator=draw) for n, p in _model().state_dict().items()}
        experts = {
            e: {n: t + _SIZE * torch.randn(t.shape, generator=draw) for n, t in base.items()} for e in ("a", "b")
        }
        blocks = {"up.weight": 0, "up.bias": 0, "gain": 1}
        groups = {n: Group(n, blocks.get(n), "mlp" if n in blocks else "head") for n in base}
        return MemoryTensors(base, experts, groups=groups)

    @cached_property
    def model(self) -> Any:
        """The live module."""
        return _model().eval().requires_grad_(False)

    def measured(self, expert: str = "a", *, seed: int = 0) -> dict[str, Tensor]:
        """What it measures of an expert, by tensor name."""
        import torch

        from merge_search.engine.statistics.outside import measured

        row, live = self.row, dict(self.model.named_parameters())
        self.asked, self.charged = 0, row.questions * sum(_N_ROWS.values())
        with torch.no_grad():
            for name, parameter in live.items():
                at_base = row.point == "base"
                parameter.copy_(self.models.base(name) if at_base else self.models.expert(expert, name))
        return {name: t.clone() for name, t in measured(row, self._work(expert, seed)).items()}

    def _work(self, expert: str, seed: int) -> Work:
        from merge_search.engine.statistics.rows import Work

        views = {name: p.detach() for name, p in self.model.named_parameters()}
        tasks = tuple(self._tasks())
        return Work(self.model, views, self.models.groups, tasks, self._charge, self.models, expert, seed)

    def _charge(self, questions: int) -> None:
        self.charged += questions

    def _tasks(self) -> Iterator[TaskRows]:
        import torch

        from merge_search.engine.statistics.rows import TaskRows

        draw = torch.Generator().manual_seed(1)
        for task, n in _N_ROWS.items():
            tokens = torch.randint(_WORDS, (n, 2, 4), generator=draw)
            yield TaskRows(task, tuple(range(n)), _Loss(self, tokens), "rows")


@dataclass
class _Loss:
    """Rows -> mean of -log p of their second tokens after their first ones. Counts what it is asked."""

    case: StatisticCase
    tokens: Tensor

    def __call__(self, rows: Sequence[int]) -> Tensor:
        from torch.nn.functional import cross_entropy

        self.case.asked += len(rows)
        before, after = self.tokens[list(rows)].unbind(1)
        loss = cross_entropy(self.case.model(before.flatten()), after.flatten())
        if loss.requires_grad:
            loss.register_hook(lambda _: self._count_backward(len(rows)))  # type: ignore[no-untyped-call]
        return loss

    def _count_backward(self, n_rows: int) -> None:
        self.case.asked += 2 * n_rows


def _model() -> Any:
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(_WORDS, _WIDTH)
            self.up = nn.Linear(_WIDTH, 2 * _WIDTH)
            self.gain = nn.Parameter(torch.ones(2 * _WIDTH))
            self.head = nn.Linear(2 * _WIDTH, _WORDS, bias=False)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.gain * self.up(self.embed(tokens)).tanh())  # type: ignore[no-any-return]

    with torch.random.fork_rng(devices=[]):
        return Tiny()


@contextmanager
def _unchanged(what: str, of: Any) -> Iterator[None]:
    """Assert that what a function returns is the same afterwards, tensors to the bit."""
    before = of()
    yield
    after = of()
    for name, value in before.items():
        assert (value == after[name]).all() if hasattr(value, "all") else value == after[name], f"{what}: {name}"


class StatisticConformance:
    """Inherit and define the fixture `case`, which returns a `StatisticCase`."""

    def test_it_measures_finite_numbers_of_merged_tensors(self, case: StatisticCase) -> None:
        """Numbers are float32 and finite, named like the tensors, of a shape that broadcasts to them if declared."""
        found = case.measured()
        assert found
        assert any(bool(t.any()) for t in found.values()), "zeros alone"
        for name, tensor in found.items():
            assert tensor.dtype.is_floating_point, name
            assert bool(tensor.isfinite().all()), name
            if case.row.broadcasts:
                tensor.broadcast_to(case.models.shape(name))

    def test_the_same_weights_and_rows_give_the_same_bits(self, case: StatisticCase) -> None:
        """It depends on its arguments alone, so that a stored file holds what would be measured."""
        one, two = case.measured(), case.measured()
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert (tensor == two[name]).all(), name

    def test_it_depends_on_the_weights(self, case: StatisticCase) -> None:
        """Two experts differ, where it is measured at them or reads them; else it is the same for both."""
        one, two = case.measured("a"), case.measured("b")
        is_same = all(bool((tensor == two[name]).all()) for name, tensor in one.items())
        assert is_same != case.row.is_of_one_expert

    def test_global_random_generators_are_left_alone(self, case: StatisticCase) -> None:
        """It draws from the study's seed, `work.seed`, never from torch's generator."""
        import torch

        with _unchanged("torch's generator", lambda: {"state": torch.get_rng_state()}):
            case.measured()

    def test_base_and_experts_are_left_alone(self, case: StatisticCase) -> None:
        """It may write into the live weights, which are put back, and not into those of the models."""

        def weights() -> dict[str, Tensor]:
            models = case.models
            out = {f"{name} of the base": models.base(name).clone() for name in models.groups}
            return out | {f"{n} of {e}": models.expert(e, n).clone() for e in ("a", "b") for n in models.groups}

        with _unchanged("weights", weights):
            case.measured()

    def test_the_live_model_keeps_no_trace(self, case: StatisticCase) -> None:
        """No gradient, no hook and no training mode is left on it."""

        def traces() -> dict[str, Any]:
            out: dict[str, Any] = {}
            for name, parameter in case.model.named_parameters():
                out[name] = (parameter.requires_grad, parameter.grad is None, len(parameter._backward_hooks or ()))
            for name, module in case.model.named_modules():
                hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
                out[f"module {name}"] = (module.training, *map(len, hooks))
            return out

        with _unchanged("the live model", traces):
            case.measured()

    def test_its_questions_are_counted(self, case: StatisticCase) -> None:
        """It is charged for what it asks at least: a question per row and forward pass, two per backward pass."""
        case.measured()
        assert case.charged >= case.asked > 0
