"""MergeEngine makes weights from recipes: one tensor at a time, or in place in a live model."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merge_search.engine import check
from merge_search.engine.contracts import Factors, Pass, Tensors, output_dtype, statistic_of
from merge_search.engine.execute.pairs import joined, pair_problems, weights_of
from merge_search.engine.execute.parts import pass_parts, unit_recipe
from merge_search.engine.execute.runner import Runner, has_compiler
from merge_search.engine.methods.operators import (
    OPERATORS,
    POSTS,
    OperatorContext,
    completed_options,
    load_operator,
    load_pairs,
    require_known,
)
from merge_search.engine.methods.outside import on_tensor
from merge_search.engine.passes.measurements import Measurements
from merge_search.engine.passes.planner import Planner
from merge_search.engine.resident.coefficient_maps import rows_of
from merge_search.errors import NonFiniteError, RecipeError
from merge_search.memory import BudgetedCache, MemoryBudget
from merge_search.recipe import Operator, Recipe, Splice

__all__ = ["ApplyReport", "MergeEngine"]

_COMPILE_FROM_PARAMETERS = 1_000_000  # the loops of a recipe compile in half a second: earned back by ten candidates


@dataclass(frozen=True)
class ApplyReport:
    """Counts and time of one `MergeEngine.apply`.

    Attributes:
        written: Tensors that were written.
        skipped: Tensors that held the right weights already.
        elements: Elements of the written tensors.
        seconds: Wall time.
    """

    written: int
    skipped: int
    elements: int
    seconds: float


@dataclass(frozen=True)
class _Written:
    key: Hashable
    place: Hashable
    version: int


class MergeEngine:
    """Merges tensors as a recipe says.

    - Arithmetic is float32 whatever the dtypes of the inputs are. The result is rounded once, at the end.
    - An expert that did not change a tensor is *inactive* there: it is not counted, does not vote and is in no
      denominator. Where all experts are inactive the base is copied bit for bit.
    - An expert with a coefficient of zero is still active: it votes (unless ``resolve.weighted``) and counts in the
      denominators of ``count``, ``mask``, ``score`` and ``softmax``.
    - One-dimensional tensors are sparsified only with ``select.vectors``.
    - The order of the experts in the recipe changes no bit, except where it has a meaning: exclusive selection, ties of
      ``argmax``, CKI.
    - An exact tie of an election goes to the sign that most of at most 2048 evenly spaced entries of the tensor elect.
    - On CPUs the compiled pass gives the bits of the chunked one.

    Args:
        tensors: Base and experts.
        compile: Whether passes are compiled. "auto": on GPUs, and on CPUs above a million parameters, if there is a
            compiler.
        cache_bytes: Most bytes of scores and ranks stored per element; None: a third of the free memory.
        runner: Runs the passes in place of one that `compile` asks for.
        measurements: Measures the tensors; None: made for them.
    """

    def __init__(
        self,
        tensors: Tensors,
        *,
        compile: bool | str = "auto",
        cache_bytes: int | None = None,
        runner: Runner | None = None,
        measurements: Measurements | None = None,
    ) -> None:
        self.tensors = tensors
        self._runner = runner or _make_runner(tensors, compile)
        self._measurements = measurements or Measurements(tensors, cache_bytes=cache_bytes, runner=self._runner)
        self._planner = Planner(tensors, measurements=self._measurements, runner=self._runner)
        self._written: dict[str, _Written] = {}
        self._operator_memory: dict[Hashable, object] = {}
        self._operator_cache: BudgetedCache[tuple[object, list[Tensor]]] = BudgetedCache(self.budget)

    @property
    def budget(self) -> MemoryBudget:
        """Memory that is shared by all caches over this engine's tensors."""
        return self._measurements.budget

    @property
    def is_compiled(self) -> bool:
        """Whether passes over long tensors are compiled."""
        return self._runner.compile

    def check(self, recipe: Recipe) -> list[str]:
        """Known reasons why `recipe` cannot be merged; empty if there are none. Reads no weights."""
        return check.problems(recipe, self.tensors)

    def _require(self, recipe: Recipe) -> None:
        problems = self.check(recipe)
        if problems:
            raise RecipeError(problems, where=f"recipe {recipe.preset!r}" if recipe.preset else "recipe")

    @torch.no_grad()
    def merged(self, recipe: Recipe) -> Generator[tuple[str, Tensor], None, None]:
        """(name, merged tensor) in checkpoint order; new tensors on the engine's device.

        Raises:
            RecipeError: The recipe cannot be merged. Raised before the first tensor.
            NonFiniteError: A result is NaN or infinite.
        """
        self._require(recipe)
        with self._in_turn(list(self.tensors.groups)):
            for name in self.tensors.groups:
                base = self.tensors.base(name)
                out = torch.empty(base.shape, dtype=output_dtype(recipe, base), device=self.tensors.device)
                with torch.no_grad():
                    self._merge_into(recipe, name, out)
                yield name, out

    @torch.no_grad()
    def apply(self, recipe: Recipe, views: Mapping[str, Tensor]) -> ApplyReport:
        """Write the merged tensors in place, through `views` of a live model's parameters.

        A tensor is skipped when everything that determines it is as it was at the last `apply` to the same view and
        nobody wrote to the view since. Writes are seen by the view's version counter, which ``.data`` writes evade.

        Args:
            views: By tensor name; names that are not in `tensors.groups` are left alone. Shape as on disk, any strides,
                any device. Written in the view's own dtype.
        Raises:
            RecipeError: The recipe cannot be merged. Nothing was written.
            NonFiniteError: A result is NaN or infinite. Earlier tensors are written, later ones are not.
        """
        self._require(recipe)
        start, skipped, elements = time.perf_counter(), 0, 0
        common = self._common_key(recipe)
        keys: dict[str, Hashable] = {
            n: (common, self._planner.settings(recipe, n)) for n in self.tensors.groups if n in views
        }
        current = {name for name, key in keys.items() if self._is_current(name, views[name], key)}
        done: dict[str, Hashable] = {}
        try:
            with self._in_turn([name for name in keys if name not in current]):
                for name, key in keys.items():
                    if name in current:
                        skipped += 1
                    else:
                        self._written.pop(name, None)
                        self._write(recipe, name, views[name])
                        elements += views[name].numel()
                    done[name] = key
        finally:  # views of one storage share a version counter: compare before all writes, note after all writes
            for name, key in done.items():
                if not views[name].is_inference():
                    self._written[name] = _Written(key, _place(views[name]), views[name]._version)
        return ApplyReport(len(done) - skipped, skipped, elements, time.perf_counter() - start)

    @contextmanager
    def _in_turn(self, names: Sequence[str]) -> Iterator[None]:
        """Begin one merge, and announce the order in which tensors are needed."""
        self.budget.next_turn()
        self.tensors.expect(names)
        try:
            yield
        finally:
            self.tensors.expect(())

    def _common_key(self, recipe: Recipe) -> Hashable:
        """Everything that the result of any tensor depends on, besides its `TensorSettings`."""
        blank = {"coefficients": {}, "densities": {}, "scale": 1.0}
        return recipe.model_copy(update=blank).fingerprint

    def _is_current(self, name: str, view: Tensor, key: Hashable) -> bool:
        last = self._written.get(name)
        if last is None or view.is_inference():
            return False
        return last.key == key and last.place == _place(view) and last.version == view._version

    def forget(self) -> None:
        """Make the next `apply` write every tensor."""
        self._written.clear()

    def _write(self, recipe: Recipe, name: str, view: Tensor) -> None:
        direct = view.is_contiguous() and view.device == self.tensors.device
        out = view if direct else torch.empty(view.shape, dtype=view.dtype, device=self.tensors.device)
        self._merge_into(recipe, name, out)
        if not direct:
            view.copy_(out)

    # --- one tensor

    def _merge_into(self, recipe: Recipe, name: str, out: Tensor) -> None:
        base = self.tensors.base(name)
        if out.shape != base.shape:
            raise RecipeError(
                f"the view of tensor {name!r} must have its shape {tuple(base.shape)}, got {tuple(out.shape)}"
            )
        if recipe.operator is not None:
            finite = self._operate(recipe, recipe.operator, name, out)
        else:
            emit = "delta" if recipe.post else "weights"
            p = self._planner.plan(recipe, name, emit=emit)
            finite = self._finish(recipe, name, p, out)
        if not finite:
            raise NonFiniteError(
                f"merged weights must be finite, found NaN or infinity in tensor {name!r} "
                f"(recipe {recipe.preset or recipe.fingerprint[:12]!r}, stored as {out.dtype}); "
                "lower the coefficients or the scale"
            )

    def _finish(self, recipe: Recipe, name: str, p: Pass | None, out: Tensor) -> bool:
        base = self.tensors.base(name)
        if p is None:
            out.copy_(base)
            return True
        if p.structure.emit == "weights":
            return self._run(p, out)
        delta = torch.empty(base.shape, dtype=torch.float32, device=self.tensors.device)
        context = self._context(recipe, name)
        return self._run(p, delta) and self._add(recipe, context, delta, context.scale, out)

    def _run(self, p: Pass, out: Tensor) -> bool:
        base, experts = self._measurements.flats(p.name, p.experts)
        with on_tensor(p.name):
            return self._runner.run(p, base, experts, out.view(-1))

    def _add(self, recipe: Recipe, context: OperatorContext, delta: Tensor, scale: float, out: Tensor) -> bool:
        """out = base + scale * post(delta)."""
        for rule in recipe.post:
            info = require_known(rule, POSTS, "post", len(context.experts))
            if not info.ndim or delta.ndim in info.ndim:
                delta = load_operator(info)(self._with_options(context, rule, completed_options(rule, info)), delta)
        out.copy_(context.base + torch.tensor(scale, dtype=torch.float32, device=delta.device) * delta)
        return bool(torch.isfinite(out).all())

    def _operate(self, recipe: Recipe, operator: Operator, name: str, out: Tensor) -> bool:
        info = require_known(operator, OPERATORS, "operator", len(recipe.models.experts))
        active = self._measurements.active(name, tuple(recipe.models.experts))
        if not active and not info.exact:
            out.copy_(self.tensors.base(name))
            return True
        if info.ndim and out.ndim not in info.ndim:
            return self._finish(recipe, name, self._fallback(recipe, name), out)
        context = self._with_options(self._context(recipe, name), operator, completed_options(operator, info))
        result = load_operator(info)(context)
        if isinstance(result, list):
            total = torch.zeros_like(context.base)
            for e, c, part in zip(context.experts, context.coefficients, result, strict=True):
                factor = torch.tensor(c, dtype=torch.float32, device=total.device)
                if (rows := rows_of(self.tensors, recipe, e, name)) is not None:
                    factor = (factor * rows).reshape(-1, *[1] * (part.ndim - 1)) if part.ndim else factor * rows[0]
                total += factor * part
            return self._add(recipe, context, total, context.scale, out)
        if recipe.post:
            return self._add(recipe, context, result - context.base, 1.0, out)
        out.copy_(result)
        return bool(torch.isfinite(out).all())

    @torch.no_grad()
    def parts(self, recipe: Recipe, name: str) -> tuple[tuple[str, ...], Tensor]:
        """The derivative of a merged tensor by each expert's coefficient, masks held fixed (`parts`).

        Where the merge is linear in its coefficients (`parts.linearity_problems`), the merged tensor is
        base + sum_i lambda_i part_i within float32 rounding. The recipe's own coefficients and maps do not enter.

        Returns:
            Experts whose part need not be zero, and their parts: float32, shape (experts, *shape), scale included.
        Raises:
            RecipeError: the recipe is not linear in its coefficients.
        Cost: one pass over the tensor.
        """
        linear, shape = unit_recipe(recipe), self.tensors.base(name).shape
        experts = tuple(recipe.models.experts)
        if not self._measurements.active(name, experts):
            return (), torch.zeros(0, *shape, device=self.tensors.device)
        if linear.operator is not None:
            info = require_known(linear.operator, OPERATORS, "operator", len(experts))
            if not info.ndim or len(shape) in info.ndim:
                context = self._with_options(
                    self._context(linear, name), linear.operator, completed_options(linear.operator, info)
                )
                return experts, torch.stack(load_operator(info)(context)) * context.scale
            p = self._fallback(linear, name)
        else:
            p = self._planner.plan(linear, name, emit="delta")
        assert p is not None
        with on_tensor(name):
            return p.experts, pass_parts(p, *self._measurements.flats(name, p.experts), self.tensors.device)

    @torch.no_grad()
    def pair(self, recipe: Recipe, name: str) -> Factors | None:
        """What the merge of LoRA adapters adds to a tensor, as one LoRA pair: base + b @ a within float32 rounding.

        Returns:
            None where nothing is added. The rank is at most the sum of the experts' ranks.
        Raises:
            RecipeError: The merge is no sum of pairs (`pairs.pair_problems`), or an expert's change is no pair.
        """
        if problems := pair_problems(recipe):
            raise RecipeError(problems, where=f"recipe {recipe.preset!r}" if recipe.preset else "recipe")
        active = self._measurements.active(name, tuple(recipe.models.experts))
        own = {e: self.tensors.factors(e, name) for e in active}
        if whole := [e for e, f in own.items() if f is None]:
            raise RecipeError(f"tensor {name!r} is changed by expert {whole[0]!r}, but not by a pair of factors")
        if not active:
            return None
        if recipe.operator is not None:
            info = require_known(recipe.operator, OPERATORS, "operator", len(recipe.models.experts))
            context = self._with_options(
                self._context(recipe, name), recipe.operator, completed_options(recipe.operator, info)
            )
            parts = load_pairs(info)(context)
            assert parts is not None
            own = dict(zip(context.experts, parts, strict=True))
            weights = dict(zip(context.experts, (c * context.scale for c in context.coefficients), strict=True))
        else:
            p = self._planner.plan(recipe, name)
            assert p is not None
            weights = dict(zip(p.experts, weights_of(p), strict=True))
        return joined((weights[e], rows_of(self.tensors, recipe, e, name), f) for e, f in own.items() if f is not None)

    def _fallback(self, recipe: Recipe, name: str) -> Pass | None:
        """Mean of lambda_i tau_i over the active experts: for tensors with axes an operator does not handle."""
        plain = Recipe(
            models=recipe.models,
            coefficients=recipe.coefficients,
            scale=recipe.scale,
            maps=recipe.maps,
            post=recipe.post,
            splice=Splice(kind="count"),
        )
        return self._planner.plan(plain, name, emit="delta" if recipe.post else "weights")

    def _context(self, recipe: Recipe, name: str) -> OperatorContext:
        experts = tuple(recipe.models.experts)
        base = self.tensors.base(name).to(self.tensors.device, torch.float32)
        deltas = tuple(self.tensors.expert(e, name).to(base.device, torch.float32) - base for e in experts)
        active = set(self._measurements.active(name, experts))
        group = self.tensors.groups[name]
        settings = self._planner.settings(recipe, name)
        lambdas = dict(zip(settings.experts, settings.coefficients, strict=True))
        return OperatorContext(
            name, group, base, deltas, experts,
            active=tuple(e in active for e in experts),
            coefficients=tuple(lambdas[e] for e in experts),
            options={},
            scale=settings.scale,
            transposed=self.tensors.is_transposed(name),
            densities=tuple(dict(zip(settings.experts, settings.densities, strict=True))[e] for e in experts),
            factors=lambda expert: self.tensors.factors(expert, name),
            stored=lambda expert: self.tensors.expert(expert, name),
            statistic=lambda kind, expert: statistic_of(self.tensors, kind, expert, name),
            siblings=lambda: self._siblings(name, experts),
            seed=recipe.seed,
            memory=self._operator_memory,
            cache=self._operator_cache,
        )  # fmt: skip

    def _siblings(self, name: str, experts: tuple[str, ...]) -> Iterator[tuple[Tensor, ...]]:
        """Deltas of every tensor of the same block (of the tensor alone outside blocks)."""
        block = self.tensors.groups[name].block
        for other, group in self.tensors.groups.items():
            if other == name or (block is not None and group.block == block):
                base = self.tensors.base(other).to(self.tensors.device, torch.float32)
                yield tuple(self.tensors.expert(e, other).to(base.device, torch.float32) - base for e in experts)

    @staticmethod
    def _with_options(
        context: OperatorContext, operator: Operator, options: Mapping[str, bool | int | float | str]
    ) -> OperatorContext:
        return replace(context, options=options)


def _make_runner(tensors: Tensors, compile: bool | str) -> Runner:
    """A runner that compiles as `MergeEngine` says."""
    if compile == "auto":
        n_parameters = sum(math.prod(tensors.shape(name)) for name in tensors.groups)
        compile = tensors.device.type == "cuda" or n_parameters > _COMPILE_FROM_PARAMETERS
    return Runner(tensors.device, compile=bool(compile) and has_compiler(tensors.device))


def _place(view: Tensor) -> Hashable:
    return (view.data_ptr(), tuple(view.shape), view.stride(), view.dtype)
