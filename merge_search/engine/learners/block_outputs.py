"""Fit coefficients block after block to the teachers' hidden states, without a backward pass through the whole model.

    min over lambda^l   mean over tasks i of   sum_x || f(W^l(lambda^l); h^{l-1}(x)) - f(W_i^l; h_i^{l-1}(x)) ||^2
                                               / sum_x || f(W_i^l; h_i^{l-1}(x)) ||^2

h are the hidden states of the merge as fitted so far, h_i those of the task's teacher. Both move on after each block.
Tensors outside blocks keep the recipe's coefficients.
Source: ProDistill (Xu et al. 2025, arXiv 2502.12706), with the dual inputs of its released code. Differs: masks and
elections of any recipe, coefficients of any granularity within a block, errors relative to the teacher's outputs, no
padding.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_search.engine.checkpoints.layout import name_groups
from merge_search.engine.engine import MergeEngine
from merge_search.engine.learners.fit import (
    QUESTIONS_PER_ROW,
    FitSettings,
    Fitted,
    State,
    TaskLoss,
    teacher_recipe,
)
from merge_search.engine.learners.granularity import Granularity, make_granularity
from merge_search.engine.learners.slopes import Parts, Slopes
from merge_search.errors import InputError, NonFiniteError, RecipeError
from merge_search.recipe import Recipe
from merge_search.rules.granularities import block_output_problems

__all__ = ["MOST_INPUTS", "PASSES", "fit_blocks"]

MOST_INPUTS = 1024
"""Most rows of a task whose hidden states are held, for the merge and for the teacher. The paper takes 16 to 64."""
PASSES = 4
"""Forward passes of every such row besides the steps: the first hidden states and every block, by merge and teacher."""
FIRST_PASSES = 2
"""Those of the `PASSES` that come before the first block is fitted: one by the merge and one by the teacher."""


@dataclass(frozen=True)
class _Call:
    """The arguments of a call of a block, except the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_keyword: bool

    def run(self, block: torch.nn.Module, hidden: Tensor) -> Tensor:
        """Return the hidden states after the block. Input and output have shape (n, length, width)."""
        args, kwargs = _spread(self.args, len(hidden)), _spread(self.kwargs, len(hidden))
        out = block(*args, hidden_states=hidden, **kwargs) if self.is_keyword else block(hidden, *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


@dataclass
class _Inputs:
    """Rows of one task on their way through the blocks.

    Attributes:
        teacher: The expert, or ``base``, whose hidden states the task follows.
        kind: Kind of each row. Rows of one kind have one length and are called alike, so they go through a block
            together.
        calls: Calls by kind, then by block.
        merged: Hidden states of each row in the merge: shape (1, length, width), the model's dtype.
        expert: Hidden states of each row in the teacher, likewise.
    """

    teacher: str
    kind: list[int] = field(default_factory=list)
    calls: list[list[_Call]] = field(default_factory=list)
    merged: list[Tensor] = field(default_factory=list)
    expert: list[Tensor] = field(default_factory=list)

    def by_kind(self, rows: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield (kind, rows of that kind), in ascending order of kinds."""
        for kind in sorted({self.kind[row] for row in rows}):
            yield kind, [row for row in rows if self.kind[row] == kind]

    @torch.no_grad()
    def advance(self, block: torch.nn.Module, at: int, states: list[Tensor], size: int) -> None:
        """Replace each row's hidden states by those after the block, `size` rows at a time."""
        for kind, members in self.by_kind(range(len(states))):
            for start in range(0, len(members), size):
                some = members[start : start + size]
                out = self.calls[kind][at].run(block, torch.cat([states[row] for row in some]))
                for row, after in zip(some, torch.split(out, 1), strict=True):
                    states[row] = after.clone()  # a view would keep the whole batch alive

    def error(self, block: torch.nn.Module, at: int, scale: float, rows: Sequence[int]) -> Tensor:
        """Return the mean over rows of the squared distance to the teacher's outputs, divided by `scale`.

        `expert` must already hold the outputs of this block.
        """
        total = torch.zeros((), device=self.expert[0].device)
        for kind, members in self.by_kind(rows):
            outputs = self.calls[kind][at].run(block, torch.cat([self.merged[row] for row in members]))
            wanted = torch.cat([self.expert[row] for row in members])
            total = total + (outputs.float() - wanted.float()).square().sum()
        return total / (scale * len(rows))


def fit_blocks(
    engine: MergeEngine,
    model: Any,
    views: Mapping[str, Tensor],
    recipe: Recipe,
    losses: Mapping[str, TaskLoss],
    teachers: Mapping[str, str],
    settings: FitSettings,
    *,
    map_folder: str | Path | None = None,
    cache_bytes: int | None = None,
    on_asked: Callable[[int], None] | None = None,
) -> Fitted:
    """As `fit.fit`, from the inside: each block takes `settings.steps` steps, one block after the other.

    Args:
        engine: The engine that merges the recipe.
        model: The live model. Its blocks must follow each other.
        views: Live views by tensor name on disk.
        recipe: The start.
        losses: Losses by task. They are called without a graph, for their forward pass alone: the fit learns from the
            inputs of the blocks and ignores the values.
        teachers: Task -> the expert, or ``base``, to follow.
        settings: How to fit.
        map_folder: As in `fit.fit`.
        cache_bytes: As in `fit.fit`.
        on_asked: Called with the number of questions that follow: those of the first hidden states, then those of each
            block.
    Returns:
        As `fit.fit`. `Fitted.losses` are means over the blocks, each relative to the teacher's outputs.
    Raises:
        InputError: A task has no teacher, blocks share a coefficient, or the model's blocks do not simply follow each
            other (encoder and decoder, layers used twice, something in between).
        RecipeError: As `fit.fit`.
        NonFiniteError: As `fit.fit`.
    Cost: four forward passes per row; a forward and a backward pass through the block per step and block. Hidden states
    of `MOST_INPUTS` rows a task are held twice, and activations of one block and one batch.
    Determinism: as `fit.fit`.
    """
    _require(losses, teachers, recipe, settings)
    report = on_asked or (lambda _: None)
    began = time.perf_counter()
    parts = Parts(engine, recipe, cache_bytes=cache_bytes)
    granularity = make_granularity(settings.per, parts, recipe, map_folder=map_folder)
    blocks = _blocks(model)
    n_rows = {task: min(loss.n_rows, MOST_INPUTS) for task, loss in losses.items()}
    at_first, in_blocks = _questions(list(n_rows.values()), settings)
    report(at_first)
    order, inputs = _enter(engine, views, recipe, blocks, losses, teachers, n_rows)
    vector, history = torch.nn.Parameter(granularity.start.clone()), []
    for at, i in enumerate(order):
        report(in_blocks * (at + 1) // len(order) - in_blocks * at // len(order))
        block = _Block(blocks[i], at, _own_views(blocks[i], views), inputs, settings)
        block.follow_teachers(engine, recipe)
        if any(parts.get(name)[0] for name in block.views if name in engine.tensors.groups):
            history.append(block.fit(model, parts, granularity, vector))
        block.advance()
    if not history:
        raise RecipeError("no expert of the recipe changes a block of the live model: there is nothing to learn")
    learned = granularity.recipe(vector.detach()) if settings.steps else recipe
    engine.apply(learned, views)
    return Fitted(
        learned,
        tuple(losses),
        np.mean(history, axis=0, dtype=np.float64).reshape(settings.steps, len(losses)),
        granularity.start.numel(),
        at_first + in_blocks,
        time.perf_counter() - began,
    )


@dataclass(frozen=True)
class _Block:
    """One block of the live model.

    Attributes:
        module: The block.
        at: Its position in the order in which blocks run.
        views: Live views of its own weights.
    """

    module: torch.nn.Module
    at: int
    views: Mapping[str, Tensor]
    inputs: Mapping[str, _Inputs]
    settings: FitSettings

    def follow_teachers(self, engine: MergeEngine, recipe: Recipe) -> None:
        """Move the teachers' hidden states on. The block holds the weights of `recipe` afterwards."""
        for teacher, tasks in _by_teacher(self.inputs).items():
            engine.apply(teacher_recipe(recipe, teacher), self.views)
            for task in tasks:
                rows = self.inputs[task]
                rows.advance(self.module, self.at, rows.expert, self.settings.batch_rows)
        engine.apply(recipe, self.views)

    def fit(self, model: Any, parts: Parts, granularity: Granularity, vector: torch.nn.Parameter) -> list[list[float]]:
        """Fit this block's share of `vector` in place and write the weights. Return the losses by step and task."""
        losses = {}
        for task, rows in self.inputs.items():
            scale = sum(float(t.float().square().sum()) for t in rows.expert) / len(rows.expert)
            if not 0 < scale < float("inf"):
                raise NonFiniteError(f"hidden states of the expert of task {task!r} must be finite and not all zero")
            losses[task] = TaskLoss(len(rows.expert), partial(rows.error, self.module, self.at, scale))
        slopes = Slopes(parts, model, self.views, rows=granularity.needs_rows)
        before = vector.detach().clone()
        state = State(parts, granularity, slopes, self.views, replace(self.settings, normalise=False), vector)
        history = [list(state.step(step, losses).values()) for step in range(self.settings.steps)]
        state.finish()
        of_this_block = granularity.gradient({name: torch.ones_like(s) for name, s in slopes.values.items()}) != 0
        with torch.no_grad():  # `pull` moved the coefficients of other blocks too: undo that
            vector.copy_(torch.where(of_this_block, vector, before))
        return history

    def advance(self) -> None:
        """Move the merge's hidden states on."""
        for rows in self.inputs.values():
            rows.advance(self.module, self.at, rows.merged, self.settings.batch_rows)


def _require(
    losses: Mapping[str, TaskLoss], teachers: Mapping[str, str], recipe: Recipe, settings: FitSettings
) -> None:
    problems = [
        f"task {task!r} needs a model that is best at it, whose hidden states it follows"
        for task in losses
        if teachers.get(task) not in {"base", *recipe.models.experts}
    ]
    if not losses:
        problems.append("there must be a task to fit on")
    problems += block_output_problems([settings.per])
    if problems:
        raise InputError(problems, where="learner")


def _questions(n_rows: Sequence[int], settings: FitSettings) -> tuple[int, int]:
    """Return the questions of the first hidden states, and those of all blocks together."""
    steps = QUESTIONS_PER_ROW * settings.steps * sum(min(settings.batch_rows, n) for n in n_rows)
    return FIRST_PASSES * sum(n_rows), (PASSES - FIRST_PASSES) * sum(n_rows) + steps


def _enter(
    engine: MergeEngine,
    views: Mapping[str, Tensor],
    recipe: Recipe,
    blocks: Sequence[torch.nn.Module],
    losses: Mapping[str, TaskLoss],
    teachers: Mapping[str, str],
    n_rows: Mapping[str, int],
) -> tuple[list[int], dict[str, _Inputs]]:
    """Return the order of the blocks, and what enters the first one by merge and teachers.

    `recipe` is live afterwards.
    """
    inputs = {task: _Inputs(teachers[task]) for task in losses}
    engine.apply(recipe, views)
    order = _capture(blocks, losses, inputs, n_rows)
    for teacher, tasks in _by_teacher(inputs).items():
        engine.apply(teacher_recipe(recipe, teacher), views)
        for task in tasks:
            inputs[task].expert = [_first(blocks[order[0]], losses[task], row) for row in range(n_rows[task])]
    engine.apply(recipe, views)
    return order, inputs


def _own_views(block: torch.nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the views of the block's own weights."""
    storages = {p.untyped_storage().data_ptr() for p in block.parameters()}
    return {name: view for name, view in views.items() if view.untyped_storage().data_ptr() in storages}


def _by_teacher(inputs: Mapping[str, _Inputs]) -> dict[str, list[str]]:
    """Return the tasks of each teacher."""
    tasks: dict[str, list[str]] = {}
    for task, rows in inputs.items():
        tasks.setdefault(rows.teacher, []).append(task)
    return tasks


def _blocks(model: Any) -> list[torch.nn.Module]:
    """Return the modules that hold the model's blocks, found by name alone (`layout`)."""
    names = [name for name, _ in model.named_parameters()]
    groups, paths = name_groups(names), dict[int, str]()
    for name in names:
        block, pieces = groups[name].block, name.split(".")
        if block is not None:
            end = next(i for i, piece in enumerate(pieces) if i and piece.isdecimal())
            paths.setdefault(block, ".".join(pieces[: end + 1]))
    if not paths:
        raise InputError("learner: the model has no blocks whose outputs could be matched; take another loss")
    modules = dict(model.named_modules())
    return [modules[paths[block]] for block in sorted(paths)]


@dataclass(frozen=True)
class _Seen:
    """A call of a block as observed, and its output."""

    block: int
    hidden: Tensor
    call: _Call
    output: list[Tensor] = field(default_factory=list)


@contextmanager
def _watching(blocks: Sequence[torch.nn.Module], *, outputs: bool = True) -> Iterator[list[_Seen]]:
    """Record the calls of `blocks` inside the context, in their order."""
    seen: list[_Seen] = []

    def before(i: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_keyword = "hidden_states" in kwargs
        hidden = kwargs["hidden_states"] if is_keyword else args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[0] != 1:
            raise InputError(
                "learner: blocks must take hidden states of shape (1, length, width) first to match their outputs; "
                "take another loss"
            )
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        call = _Call(args if is_keyword else args[1:], rest, is_keyword)
        seen.append(_Seen(i, hidden.detach(), call))

    def after(_: Any, __: tuple[Any, ...], out: Any) -> None:
        seen[-1].output.append((out[0] if isinstance(out, tuple) else out).detach())

    handles = [b.register_forward_pre_hook(partial(before, i), with_kwargs=True) for i, b in enumerate(blocks)]
    handles += [b.register_forward_hook(after) for b in blocks] if outputs else []
    try:
        with torch.no_grad():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first(block: torch.nn.Module, loss: TaskLoss, row: int) -> Tensor:
    """Return what enters `block` when `row` runs through the live model."""
    with _watching([block], outputs=False) as seen:
        loss.loss([row])
    return seen[0].hidden.clone()


def _capture(
    blocks: Sequence[torch.nn.Module],
    losses: Mapping[str, TaskLoss],
    inputs: Mapping[str, _Inputs],
    n_rows: Mapping[str, int],
) -> list[int]:
    """Run every row alone through the live model and record what enters its first block and how all blocks are called.

    Returns:
        The order in which the blocks run.
    Raises:
        InputError: The model's blocks do not simply follow each other.
    """
    order: list[int] | None = None
    for task, rows in inputs.items():
        for row in range(n_rows[task]):
            with _watching(blocks) as seen:
                losses[task].loss([row])
            order = order or _order(seen, len(blocks))
            if [s.block for s in seen] != order:
                raise InputError("learner: blocks run in another order on other rows; take another loss")
            calls, shape = [s.call for s in seen], seen[0].hidden.shape
            alike = (
                kind
                for kind, known in enumerate(rows.calls)
                if rows.merged[rows.kind.index(kind)].shape == shape and _equal_calls(known, calls)
            )
            kind = next(alike, len(rows.calls))
            if kind == len(rows.calls):
                rows.calls.append(calls)
            rows.kind.append(kind)
            rows.merged.append(seen[0].hidden.clone())

    assert order is not None
    return order


def _order(seen: Sequence[_Seen], n_blocks: int) -> list[int]:
    """Return the order in which blocks run.

    Raises:
        InputError: A block runs more than once, or its input is not the output of the block before it.
    """
    order = [s.block for s in seen]
    follows = all(torch.equal(a.output[0], b.hidden) for a, b in itertools.pairwise(seen) if a.output)
    if sorted(order) != list(range(n_blocks)) or not follows:
        raise InputError(
            "learner: block outputs need a model whose blocks follow each other, each once and with nothing "
            f"in between, found {len(order)} calls of {n_blocks} blocks; take another loss"
        )
    _require_plain([s.call for s in seen])
    return order


def _require_plain(calls: Sequence[_Call]) -> None:
    """Raise `InputError` unless all arguments are tensors, plain values or tuples of them.

    Only those can be passed to the block again.
    """
    for value in (v for call in calls for v in (*call.args, *call.kwargs.values())):
        inner = value if isinstance(value, tuple) else (value,)
        if bad := [v for v in inner if not isinstance(v, Tensor | bool | int | float | str | None)]:
            raise InputError(f"learner: blocks are called with a {type(bad[0]).__name__}, which cannot be repeated")


def _equal_calls(a: Sequence[_Call], b: Sequence[_Call]) -> bool:
    return all(_equal(x.args, y.args) and _equal(x.kwargs, y.kwargs) for x, y in zip(a, b, strict=True))


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments of a block are equal: tensors element by element, containers entry by entry."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def _spread(value: Any, n: int) -> Any:
    """Expand the arguments of one row to n rows: tensors with more than one axis, the first of size 1, are repeated."""
    if isinstance(value, Tensor):
        return value.expand(n, *value.shape[1:]) if value.ndim > 1 and value.shape[0] == 1 else value
    if isinstance(value, tuple):
        return tuple(_spread(v, n) for v in value)
    return {k: _spread(v, n) for k, v in value.items()} if isinstance(value, dict) else value
