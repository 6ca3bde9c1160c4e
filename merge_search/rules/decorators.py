"""Rules from outside: one decorated function each.

    # my_rules.py
    import torch
    from merge_search.rules import measure, operator

    @measure("log_size")
    def log_size(context, *, eps: float = 1e-3):
        "log(1 + |delta| / eps)"
        return [torch.log1p(delta.abs() / eps) for delta in context.deltas]

    @operator("median")
    def median(context):
        "entry-wise median of the experts' weights"
        return context.base + torch.stack(context.deltas).median(0).values

The function takes one context (a post rule also the combined delta, a transform its sources and a folder, a statistic
what it may ask of the live model, a granularity a tensor's group). Its
keyword-only parameters are the rule's options: each has a default, whose type a recipe's value must have;
``Literal["a", "b"]`` allows these words only.
``Annotated[float, OptionInfo("size that counts as zero", bounds=(1e-6, 1.0), log=True)]`` gives a number its bounds and
the range of a search. The first line of its docstring is the rule's line in lists. A function does not change what it
is given. What it returns is checked: the number of tensors, their shapes, their dtype, and that every number is finite.

A function sees the experts in alphabetical order, unless it is declared `ordered`; it sees the recipe's seed and
coefficients only if it is declared to depend on them. torch-free: a context is made where the rule runs.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from merge_search.errors import RuleError
from merge_search.rules.granularities import GRANULARITIES, GranularityInfo
from merge_search.rules.measures import MEASURES, Measure
from merge_search.rules.operators import OPERATORS, POSTS, OperatorInfo
from merge_search.rules.stages import SELECTIONS, SPLICES, Selection, Splicing
from merge_search.rules.statistics import STATISTICS, StatisticInfo
from merge_search.rules.table import OptionInfo, Origin, Scalar, register
from merge_search.rules.transforms import TRANSFORMS, Preview, TransformInfo

__all__ = ["granularity", "measure", "operator", "post", "selection", "splice", "statistic", "transform"]

F = TypeVar("F", bound=Callable[..., Any])


def measure(
    name: str = "",
    *,
    summary: str = "",
    statistics: tuple[str, ...] = (),
    needs_data: bool = False,
    shared: bool = False,
    per_tensor: bool = False,
    bounded: bool = False,
    ordered: bool = False,
    is_random: bool = False,
    depends_on_coefficients: bool = False,
) -> Callable[[F], F]:
    """Register ``function(context) -> list of float32 tensors``: one score per parameter of each expert.

    The context is an `engine.methods.contexts.AssessContext`: ``context.deltas``, ``context.base``,
    ``context.statistic(kind, expert)``. Scores have the shape of the tensor, or one that broadcasts to it.

    Args:
        name: The name that recipes use; the function's own if not given.
        summary: One line; the docstring's first if not given.
        statistics: Names of the statistics that it reads (``gradient``, ``fisher``, one from outside). ``{option}``
            stands for the value of an option: ``"signal@power={power}"``.
        needs_data: It reads statistics whose kinds are not known beforehand.
        shared: It returns the same scores for all experts.
        per_tensor: It returns one number per tensor.
        bounded: Scores are never negative; checked.
        ordered: It depends on the order of the experts in the recipe.
        is_random: It reads ``context.seed``.
        depends_on_coefficients: It reads ``context.coefficients``.
    """

    def add(function: F) -> F:
        row = Measure(
            **_described(function, name, summary), function=function, needs_data=needs_data or bool(statistics),
            statistics=tuple(statistics), shared=shared, per_tensor=per_tensor, bounded=bounded, ordered=ordered,
            is_random=is_random, at_coefficients=("", "") if depends_on_coefficients else None,
        )  # fmt: skip
        _check_statistics(row)
        register(MEASURES, row)
        return function

    return add


def selection(
    name: str = "",
    *,
    summary: str = "",
    uses_scores: bool = True,
    uses_density: bool = True,
    is_random: bool = False,
    compares: bool = True,
    scopes: tuple[str, ...] = ("tensor",),
    rescale: Literal["none", "inverse_density"] = "none",
    usual: Mapping[str, Scalar] | None = None,
) -> Callable[[F], F]:
    """Register ``function(context) -> list of boolean tensors``: which parameters of each expert are kept.

    The context is an `engine.methods.outside.SelectContext`: ``context.scores``, ``context.densities``,
    ``context.uniform(expert)``. Masks have the shape of the tensor.

    Args:
        name: The name that recipes use; the function's own if not given.
        summary: One line; the docstring's first if not given.
        uses_scores: It reads ``context.scores``, those of the recipe's measure.
        uses_density: It reads ``context.densities``.
        is_random: It reads ``context.uniform``.
        compares: It compares scores with each other.
        scopes: What it can rank together: ``tensor``, ``row``.
        rescale: How a search space scales what is kept: ``inverse_density`` for random masks.
        usual: Fields of `Select` for a search space that names the rule alone.
    """

    def add(function: F) -> F:
        described = _described(function, name, summary)
        if not scopes or not set(scopes) <= {"tensor", "row"}:
            raise RuleError(
                f"{described['origin']}: scopes must be among tensor, row, got {', '.join(scopes) or 'none'}"
            )
        row = Selection(
            **described, function=function, uses_scores=uses_scores, uses_density=uses_density, is_random=is_random,
            compares=compares and uses_scores, scopes=tuple(scopes), rescale=rescale, usual=dict(usual or {}),
        )  # fmt: skip
        register(SELECTIONS, row)
        return function

    return add


def splice(
    name: str = "",
    *,
    summary: str = "",
    is_scored: bool = False,
    is_linear: bool = False,
    ordered: bool = False,
) -> Callable[[F], F]:
    """Register ``function(context) -> tensor``: the combined delta, entry by entry.

    The context is an `engine.methods.outside.SpliceContext`: ``context.deltas`` (what survived, zero elsewhere),
    ``context.masks``, ``context.coefficients``, ``context.scores``. The function is called for pieces of a tensor and
    must treat every entry alike.

    Args:
        name: The name that recipes use; the function's own if not given.
        summary: One line; the docstring's first if not given.
        is_scored: It reads ``context.scores``, the mixing scores.
        is_linear: The result is linear in the coefficients. A learner needs that.
        ordered: It depends on the order of the experts in the recipe.
    """

    def add(function: F) -> F:
        described = _described(function, name, summary)
        row = Splicing(**described, function=function, is_scored=is_scored, is_linear=is_linear, ordered=ordered)
        register(SPLICES, row)
        return function

    return add


def operator(
    name: str = "",
    *,
    summary: str = "",
    decomposing: bool = False,
    ndim: tuple[int, ...] = (),
    experts: tuple[int, int | None] = (1, None),
    exact: bool = False,
    statistics: tuple[str, ...] = (),
    needs_factors: bool = False,
    uses_density: bool = False,
    paper: str = "-",
    scales: tuple[float, ...] = (1.0,),
) -> Callable[[F], F]:
    """Register ``function(context) -> tensor or list of tensors``: a rule on whole tensors in place of the stages.

    The context is an `engine.methods.contexts.OperatorContext`. A tensor is the merged weights, coefficients and scale
    included. A list has one processed delta per expert: the engine applies coefficients, scale and post rules.

    Args:
        name: The name that recipes use; the function's own if not given.
        summary: One line; the docstring's first if not given.
        decomposing: It returns a list. Coefficients per group, learners and search spaces apply to it.
        ndim: Numbers of axes it handles, () for all; other tensors get the mean of the deltas times their coefficients.
        experts: Smallest and largest number of experts; None for no bound.
        exact: It must run even where no expert changed the tensor.
        statistics: Names of the statistics that it reads through ``context.statistic``, as for a measure.
        needs_factors: It reads LoRA pairs through ``context.factors``, so every expert must be an adapter.
        uses_density: It reads ``context.densities``.
        paper: Where it was published.
        scales: Values of the recipe's scale that are usually tried.
    """
    return _whole(OPERATORS, name, summary, ("context",), decomposing=decomposing, ndim=tuple(ndim),
                  experts=tuple(experts), exact=exact, statistics=tuple(statistics), needs_factors=needs_factors,
                  uses_density=uses_density, paper=paper, scales=tuple(scales))  # fmt: skip


def post(name: str = "", *, summary: str = "", ndim: tuple[int, ...] = (), paper: str = "-") -> Callable[[F], F]:
    """Register ``function(context, delta) -> tensor``: a rule on the combined delta of each tensor.

    Args:
        name: The name that recipes use; the function's own if not given.
        summary: One line; the docstring's first if not given.
        ndim: Numbers of axes it handles, () for all; other tensors keep their combined delta.
        paper: Where it was published.
    """
    return _whole(POSTS, name, summary, ("context", "delta"), ndim=tuple(ndim), paper=paper)


def _whole(table: Any, name: str, summary: str, takes: tuple[str, ...], **rest: Any) -> Callable[[F], F]:
    def add(function: F) -> F:
        row = OperatorInfo(**_described(function, name, summary, takes), function=function, **rest)
        _check_statistics(row)
        register(table, row)
        return function

    return add


def transform(
    name: str = "",
    *,
    summary: str = "",
    check: Callable[..., Preview] | None = None,
    result: Literal["known", "own"] = "known",
    aligns: bool = False,
    merges: bool = True,
    paper: str = "-",
    version: int = 1,
) -> Callable[[F], F]:
    """Register ``function(sources, out) -> Transformed``: other models in place of the recipe's, before the merge.

    `sources` is an `engine.transforms.sources.Sources`, `out` an empty folder for what is written. The function writes
    ordinary Hugging Face folders (`engine.checkpoints.writer.write_model`) and depends on its arguments alone.

    Args:
        name: The name that recipes use; the function's own if not given.
        summary: One line; the docstring's first if not given.
        check: ``check(sources, **options) -> Preview``: what it would make, from headers alone. None: it takes any
            models and keeps names and config of the base.
        result: ``own`` if transformers alone cannot load what it writes.
        aligns: It takes experts whose tensors do not have the base's names and shapes.
        merges: Whether its result has experts. Without, the written base is the merge.
        paper: Where it was published.
        version: To be changed when it writes other weights for the same options. A rule file has its hash besides.
    """

    def add(function: F) -> F:
        described = _described(function, name, summary, ("sources", "out"))
        row = TransformInfo(**described, function=function, checker=check, result=result, aligns=aligns,
                            merges=merges, paper=paper, version=version)  # fmt: skip
        register(TRANSFORMS, row)
        return function

    return add


def statistic(
    name: str = "",
    *,
    summary: str = "",
    point: Literal["base", "expert", "either"] = "expert",
    reads: Literal["point", "pair", "all"] = "point",
    questions: int = 3,
    broadcasts: bool = True,
    version: int = 1,
) -> Callable[[F], F]:
    """Register ``function(work) -> dict of tensor name -> tensor``: numbers measured on data, for other rules to read.

    `work` is an `engine.statistics.rows.Work`: ``work.each()`` yields the weight and the loss of every row,
    ``work.views`` the live weights. `engine.statistics.backward.mean_of_gradients` and
    `engine.statistics.forward.mean_over_inputs` pass over the rows. It runs once per study and expert, and the result
    is stored. The live weights are put back afterwards. A measure, and an operator, name it in ``statistics``. With an
    option ``prompts`` it gets at most so many rows of each task, without right answers where a task has none.

    Args:
        name: The name by which rules ask for it; the function's own if not given.
        summary: One line; the docstring's first if not given.
        point: The weights at which it is measured: ``base``, ``expert``, or ``either``: the expert, or base + c delta
            where a rule asks for ``NAME@c``. Such a statistic has no options.
        reads: Models whose weights the numbers depend on: that of the ``point``, base and expert (``pair``), or base
            and ``all`` experts in their order. ``work.models`` has them, except for ``point``.
        questions: Questions that a row counts as: one for a forward pass, two more for a backward pass. It reports all
            others by ``work.on_asked(n)``.
        broadcasts: Its tensors broadcast to the weights; checked. Without, any shape will do.
        version: To be changed when it measures other numbers. A rule file has its hash besides.
    """

    def add(function: F) -> F:
        described = _described(function, name, summary, ("work",))
        for argument, value, allowed in (("point", point, _POINTS), ("reads", reads, _READS)):
            if value not in allowed:
                raise RuleError(f"{described['origin']}: {argument} must be among {', '.join(allowed)}, got {value!r}")
        if point == "either" and described["options"]:
            raise RuleError(f"{described['origin']}: a statistic at scaled experts can have no options")
        row = StatisticInfo(
            **described, function=function, point=point, reads=reads, questions=questions, broadcasts=broadcasts,
            version=version,
        )  # fmt: skip
        register(STATISTICS, row)
        return function

    return add


def granularity(name: str = "", *, summary: str = "", rows: int = 0) -> Callable[[F], F]:
    """Register ``function(group) -> text``: tensors with the same text share one coefficient per expert in a fit.

    `group` is a `recipe.Group`: ``group.tensor``, ``group.block`` (None outside all blocks), ``group.kind``. It has no
    options.

    Args:
        name: The name that a learner's ``per`` uses; the function's own if not given.
        summary: One line; the docstring's first if not given.
        rows: Fit rows per task from which it pays. A search begins with the largest that its rows are enough for.
    """

    def add(function: F) -> F:
        described = _described(function, name, summary, ("group",))
        if described["options"]:
            raise RuleError(f"{described['origin']}: a granularity can have no options")
        row = GranularityInfo(**described, function=function, rows=rows, is_within_blocks=False)
        register(GRANULARITIES, row)
        return function

    return add


_POINTS, _READS = ("base", "expert", "either"), ("point", "pair", "all")


# ------------------------------------------------------------------------------------------- reading a function


def _described(function: Any, name: str, summary: str, takes: tuple[str, ...] = ("context",)) -> dict[str, Any]:
    """Name, summary, options, choices, ranges and origin of a decorated function.

    Raises:
        RuleError: it is no function, or has the wrong signature, with its file and line.
    """
    if not inspect.isfunction(function):
        frame = sys._getframe(2)
        raise RuleError(f"{frame.f_code.co_filename}:{frame.f_lineno}: a rule must be a function, got {function!r}")
    code = function.__code__
    origin = Origin(code.co_filename, code.co_firstlineno)
    options = _options(function, origin, takes)
    lines = (summary or inspect.getdoc(function) or "").strip().splitlines()
    if not lines:
        raise RuleError(f"{origin}: {function.__name__} needs one line on what it does: a docstring, or summary=")
    return {
        "name": name or function.__name__, "summary": lines[0].rstrip("."), "options": options,
        "choices": _choices(function), "about": _about(function, origin, options), "origin": origin,
    }  # fmt: skip


def _check_statistics(row: Measure | OperatorInfo) -> None:
    try:
        row.statistics_asked({})
    except (KeyError, ValueError, IndexError) as error:
        raise RuleError(
            f"{row.origin}: statistics may name options with a default in braces, got {', '.join(row.statistics)}"
        ) from error


def _options(function: Callable[..., Any], origin: Origin, takes: tuple[str, ...]) -> dict[str, Scalar | None]:
    """Keyword-only parameters and their defaults."""
    options: dict[str, Scalar | None] = {}
    n_given = 0
    wanted = f"must take ({', '.join(takes)}, *, option=default)"
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            n_given += 1
        elif parameter.kind != parameter.KEYWORD_ONLY:
            raise RuleError(f"{origin}: {function.__name__} {wanted}, found {parameter}")
        elif parameter.default is not None and not isinstance(parameter.default, Scalar):
            raise RuleError(
                f"{origin}: option {parameter.name!r} of {function.__name__} needs a default that is a number, a text "
                "or a switch"
            )
        else:
            options[parameter.name] = parameter.default
    if n_given != len(takes):
        found = str(inspect.signature(function))
        raise RuleError(f"{origin}: {function.__name__} {wanted}, found {found}")
    return options


def _choices(function: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    """Options whose annotation is ``Literal["a", "b"]``, and these words."""
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # annotations are a help, not a duty
        return {}
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Literal}


def _about(function: Callable[..., Any], origin: Origin, options: Mapping[str, Scalar | None]) -> dict[str, OptionInfo]:
    """Options whose annotation is ``Annotated[float, OptionInfo(...)]``, and what that says."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:  # annotations are a help, not a duty
        return {}
    out = {}
    for name, hint in hints.items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo) and name in options:
                out[name] = info
                _check_bounds(function, origin, name, info, options[name])
    return out


def _check_bounds(
    function: Callable[..., Any], origin: Origin, name: str, info: OptionInfo, default: Scalar | None
) -> None:
    what = f"{origin}: option {name!r} of {function.__name__}"
    for bounds in (info.bounds, info.usual):
        if bounds is not None and not bounds[0] < bounds[1]:
            raise RuleError(f"{what} must have bounds (low, high) with low < high, got {bounds}")
    if info.bounds is None:
        return
    if isinstance(default, bool | str):
        raise RuleError(f"{what} has bounds, so its default must be a number, got {default!r}")
    if default is not None and not info.bounds[0] <= default <= info.bounds[1]:
        raise RuleError(f"{what} must have its default in its bounds {info.bounds}, got {default!r}")
    searched = info.usual or info.bounds
    if not info.bounds[0] <= searched[0] < searched[1] <= info.bounds[1] or (info.log and searched[0] <= 0):
        scale = " and above 0, as its scale is logarithmic" if info.log else ""
        raise RuleError(f"{what} must have its usual range within its bounds{scale}, got {searched}")
