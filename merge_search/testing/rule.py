"""What every rule of a recipe promises: a measure, a selection, a splice, an operator or a post rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge_search.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from merge_search.engine.contracts import Factors

__all__ = ["RuleCase", "RuleConformance", "whole_pairs"]

_TOLERANCE = 1e-5
_SIZE = 0.1
"""Standard deviation of the deltas; that of the base is 1."""


@dataclass(frozen=True)
class RuleCase:
    """A rule to test, in a recipe that uses it.

    Attributes:
        settings: Fields of `Recipe` that name the rule, such as ``{"splice": {"kind": "median"}}``.
        n_experts: The number of experts to merge.
        shapes: Shapes of the tensors to merge.
        dtypes: Names of torch dtypes to merge in.
        is_ordered: Whether the order of the experts changes the merge.
        is_element_wise: Whether every entry of a tensor is merged on its own.
        has_pairs: Whether experts are LoRA adapters: every change of a matrix is a pair of factors.
        statistic: (kind, expert, tensor name, shape) -> what was measured on data; None: the rule needs no data.
    """

    settings: Mapping[str, Any]
    n_experts: int = 3
    shapes: Sequence[tuple[int, ...]] = ((7,), (5, 9), (9, 5), (3, 4, 6))
    dtypes: Sequence[str] = ("float32", "bfloat16")
    is_ordered: bool = False
    is_element_wise: bool = False
    has_pairs: bool = False
    statistic: Callable[[str, str, str, tuple[int, ...]], Tensor] | None = field(default=None, compare=False)

    def tensors(self, dtype: str = "float32", *, size: float = _SIZE) -> dict[str, dict[str, Tensor]]:
        """Model -> tensor name -> tensor: ``base`` and as many experts as there are. The same ones in every call."""
        import torch

        draw = torch.Generator().manual_seed(0)
        base = {f"w{i}": torch.randn(shape, generator=draw) for i, shape in enumerate(self.shapes)}
        models = {"base": base}
        for number in range(self.n_experts):
            models[f"e{number}"] = {n: t + size * torch.randn(t.shape, generator=draw) for n, t in base.items()}
        return {m: {n: t.to(getattr(torch, dtype)) for n, t in found.items()} for m, found in models.items()}

    def merged(self, models: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The merge of `models` by the rule, by tensor name."""
        from merge_search.engine.engine import MergeEngine
        from merge_search.engine.resident.in_memory import MemoryTensors

        case = self

        class Measured(MemoryTensors):
            def statistic(self, kind: str, expert: str, name: str) -> Tensor | None:
                return None if case.statistic is None else case.statistic(kind, expert, name, self.shape(name))

        experts = {name: tensors for name, tensors in models.items() if name != "base"}
        made = Measured(models["base"], experts, factors=whole_pairs(models["base"], experts) if self.has_pairs else {})
        recipe = Recipe.model_validate({"models": made.models, **self.settings})
        return {name: t.clone() for name, t in MergeEngine(made, compile=False).merged(recipe)}


class RuleConformance:
    """Inherit and define the fixture `case`, which returns a `RuleCase`."""

    def test_every_merged_tensor_is_finite_and_has_the_shape_and_dtype_of_the_base(self, case: RuleCase) -> None:
        """Vectors, matrices and stacks of matrices are merged in every dtype."""
        for dtype in case.dtypes:
            models = case.tensors(dtype)
            merged = case.merged(models)
            assert set(merged) == set(models["base"])
            for name, tensor in merged.items():
                assert tensor.shape == models["base"][name].shape, f"{name} in {dtype}"
                assert tensor.dtype == models["base"][name].dtype, f"{name} in {dtype}"
                assert tensor.isfinite().all(), f"{name} in {dtype}"

    def test_the_rule_does_something(self, case: RuleCase) -> None:
        """A merge of experts that differ from the base differs from the base."""
        models = case.tensors()
        merged = case.merged(models)
        assert any((tensor != models["base"][name]).any() for name, tensor in merged.items())

    def test_what_it_is_given_is_left_alone(self, case: RuleCase) -> None:
        """The tensors of the base and of the experts are not changed."""
        models = case.tensors()
        case.merged(models)
        for model, tensors in case.tensors().items():
            for name, tensor in tensors.items():
                assert (models[model][name] == tensor).all(), f"{name} of {model}"

    def test_the_same_recipe_gives_the_same_bits(self, case: RuleCase) -> None:
        """A rule depends on its arguments and the recipe's seed alone."""
        models = case.tensors()
        one, two = case.merged(models), case.merged(models)
        for name, tensor in one.items():
            assert (tensor == two[name]).all(), name

    def test_global_random_generators_are_left_alone(self, case: RuleCase) -> None:
        """A random rule draws from the recipe's seed, never from torch's generator."""
        import torch

        models = case.tensors()
        before = torch.get_rng_state()
        case.merged(models)
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_order_of_the_experts_does_not_matter(self, case: RuleCase) -> None:
        """Experts listed in another order give the same merge, unless the rule is declared to depend on it."""
        if case.is_ordered:
            return
        models = case.tensors()
        experts = [name for name in models if name != "base"]
        turned = {name: models[name] for name in ("base", *experts[1:], experts[0])}
        one, two = case.merged(models), case.merged(turned)
        for name, tensor in one.items():
            assert (tensor - two[name]).abs().max() <= _TOLERANCE, name

    def test_experts_that_are_the_base_leave_the_base(self, case: RuleCase) -> None:
        """Where no expert differs from the base, the merge is the base to the bit."""
        models = case.tensors(size=0.0)
        for name, tensor in case.merged(models).items():
            assert (tensor == models["base"][name]).all(), name

    def test_entries_are_merged_alone_where_the_rule_says_so(self, case: RuleCase) -> None:
        """An element-wise rule merges two halves of a tensor to the bits that it merges the whole to."""
        if not case.is_element_wise:
            return
        models = case.tensors()
        whole = case.merged(models)
        halves = case.merged({model: dict(_halves(tensors)) for model, tensors in models.items()})
        for name, tensor in _halves(whole):
            assert (halves[name] == tensor).all(), name


def whole_pairs(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]
) -> dict[tuple[str, str], Factors]:
    """Every change of a matrix as the product of itself and ones on the diagonal, by expert and tensor name."""
    import torch

    from merge_search.engine.contracts import Factors

    return {
        (e, n): Factors(t.float() - base[n].float(), torch.eye(t.shape[1]))
        for e, tensors in experts.items()
        for n, t in tensors.items()
        if t.ndim == 2
    }


def _halves(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as two flat ones."""
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        yield f"{name}.first", flat[: len(flat) // 2].clone()
        yield f"{name}.second", flat[len(flat) // 2 :].clone()
