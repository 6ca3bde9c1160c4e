"""Check a study before any weight is loaded, and list every problem in one message."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import TypeVar

from merge_search import catalogue
from merge_search.engine.checkpoints.compatibility import misfits, unusable_models, without_factors
from merge_search.engine.checkpoints.headers import read_checkpoint, resolve_model
from merge_search.engine.checkpoints.layout import layout, name_groups
from merge_search.engine.transforms.sources import Sources
from merge_search.engine.transforms.store import preview
from merge_search.errors import InputError, MergeSearchError, RuleError, StudyFileError, WeightsError, nearest
from merge_search.evaluation import (
    ChecksModels,
    ChecksPrompts,
    ComparesWithExperts,
    Differentiable,
    Evaluator,
    Grading,
    MetricInfo,
    Split,
    SplitShares,
)
from merge_search.objective import Objective
from merge_search.presets import PRESETS
from merge_search.recipe import Group, Models, Transform
from merge_search.rules import GRANULARITIES, TRANSFORMS, RuleFile, use_rule_files
from merge_search.rules.granularities import block_output_problems
from merge_search.rules.operators import pairs_refusal
from merge_search.search.budget import planned_fidelity
from merge_search.search.checks import search_problems
from merge_search.search.plan import Baseline, Plan
from merge_search.search.samplers import SAMPLERS, check_sampler
from merge_search.search.start.baselines import ALWAYS, UNASKED, read_baselines
from merge_search.search.start.earlier_studies import earlier_problems
from merge_search.search.start.learned_space import LearnedSpace
from merge_search.space import SearchSpace, SpaceContext
from merge_search.study_file import Learner, StudyFile

__all__ = ["prepare", "wrong_gold"]

T = TypeVar("T")


class _Problems:
    """Collects the problems of a study.

    Attributes:
        sentences: A sentence for each problem.
    """

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def attempt(self, step: Callable[[], T]) -> T | None:
        """The result of `step`; None, with its problems collected, if it fails."""
        try:
            return step()
        except InputError as error:
            self.sentences += error.problems
        except MergeSearchError as error:
            self.sentences.append(str(error))
        return None


def _context(file: StudyFile, problems: _Problems) -> SpaceContext | None:
    """The models and their groups, from the headers of the files. None if the base cannot be read."""
    models = Models(
        base=file.model_reference(file.models.base),
        experts={k: file.model_reference(v) for k, v in file.models.experts.items()},
    )
    problems.sentences += [f"models: {p}" for p in unusable_models(models.base, models.experts)]
    if "transform" not in file.space.options:
        problems.sentences += [f"models: {p}" for p in _misfit_problems(models)]
    try:
        info = read_checkpoint(resolve_model(models.base))
    except WeightsError:  # `unusable_models` has found it
        return None
    groups = tuple(layout(info).values())
    after = partial(_groups_after, Sources(models), groups) if not problems.sentences else None
    if "transform" in file.space.options:
        whole = dict.fromkeys(models.experts, "space.transform makes whole models of all experts")
    else:
        whole = {} if problems.sentences else without_factors(models.base, models.experts)
    return SpaceContext(
        models, groups, seed=file.study.seed, dtype=file.models.dtype, groups_after=after, without_factors=whole
    )


def _misfit_problems(models: Models) -> list[str]:
    """Why experts are no fine-tunes of the base, and what can be done about other shapes."""
    odd = misfits(models.base, models.experts)
    out = [p for found in odd.values() for p in found]
    return [*out, f"{', '.join(odd)}: {_ALIGN}"] if odd and any(" shape" in p or "missing" in p for p in out) else out


_ALIGN = (
    "an expert of another width or depth can be merged once it is aligned to the base: set space.transform: {mal: {}}"
)


def _groups_after(sources: Sources, groups: tuple[Group, ...], transform: Transform) -> tuple[Group, ...]:
    names = preview(transform, sources).names
    return groups if names is None else tuple(name_groups(names).values())


def _check_transforms(
    file: StudyFile, space: SearchSpace, context: SpaceContext, evaluators: Sequence[Evaluator], problems: _Problems
) -> SpaceContext:
    """Check what the space's transforms make of the models, and whether it can be judged. Reads headers alone.

    Returns:
        The context, with the transform of baselines where an expert does not have the base's shapes.
    """
    odd = misfits(context.models.base, context.models.experts)
    if None in space.transforms and "transform" in file.space.options:
        problems.sentences += [f"space.transform: none: {p}" for p in _misfit_problems(context.models)]
    chosen = [t for t in space.transforms if t is not None]
    if not chosen or context.groups_after is None:
        return context
    sources = Sources(context.models)
    configs = {f"expert {s.name!r}": s.config for s in sources.experts.values() if s.name in odd}
    for transform in chosen:
        found = preview(transform, sources)
        sentences = (f"space.transform: {p}" for p in found.problems)
        problems.sentences += [s for s in sentences if s not in problems.sentences]  # other options, same problem
        if found.config is not None and not found.problems:
            configs[f"what transform {transform.name!r} makes"] = found.config
    for (what, config), evaluator in product(configs.items(), evaluators):
        if isinstance(evaluator, ChecksModels):
            problems.attempt(partial(evaluator.check_model, config, what))
    learner = file.search.learner
    if learner is not None and 0 not in learner.steps and not any(_merges(t) for t in space.transforms):
        problems.sentences.append(
            f"search.learner: {chosen[0].name} leaves nothing to merge, and so no coefficient to fit; leave learner out"
        )
    return replace(context, transform=chosen[0]) if odd else context


def _merges(transform: Transform | None) -> bool:
    return transform is None or transform.name not in TRANSFORMS or TRANSFORMS[transform.name].merges


def prepare(file: StudyFile, *, is_new: bool = False) -> Plan:
    """Check the whole study.

    Args:
        file: The study file.
        is_new: Also check what a study that goes on has behind it: that the studies of ``search.learn_from`` exist, and
            that no gold text is wrong (`wrong_gold`).

    Returns:
        The checked study.

    Raises:
        StudyFileError: It lists every problem with models, space, tasks, metrics, sampler and baselines.
    """
    problems = _Problems()
    rules = problems.attempt(lambda: _rules(file))
    context = _context(file, problems)
    space = problems.attempt(partial(_space, file, context)) if context is not None else None
    built = [problems.attempt(partial(_evaluator, file, i)) for i in range(len(file.evaluate))]
    evaluators = [e for e in built if e is not None]
    problems.sentences += [
        f"evaluate: {name!r} must be an expert under models.experts{nearest(name, file.models.experts)}"
        for e in evaluators
        if isinstance(e, ComparesWithExperts)
        for name in e.compared_experts()
        if name not in file.models.experts
    ]
    if context is not None and space is not None:
        context = _check_transforms(file, space, context, evaluators, problems)
    if context is not None and not problems.sentences:
        folder = str(resolve_model(context.models.base))
        for evaluator in evaluators:
            if isinstance(evaluator, ChecksPrompts):
                problems.attempt(partial(evaluator.check_prompts, folder))
    metrics = [m for e in evaluators for m in e.metrics()]
    objective = _objective(file, metrics, problems) if len(evaluators) == len(built) else None
    learner, named = file.search.learner, _baselines(file, problems)
    n_first = 1 + len(file.models.experts) + len(ALWAYS) + len(named)
    fidelity = planned_fidelity(file.search, _search_questions(metrics), n_first)
    if learner is not None and len(evaluators) == len(built):
        problems.sentences += _learner_problems(learner, evaluators, file.splits.search)
    if space is not None and objective is not None:
        if learner is not None and not problems.sentences:
            space = LearnedSpace(space, learner, n_rows=min(_fit_rows(evaluators).values()))
        problems.sentences += search_problems(file.search, space.parameters, objective, fidelity)
    problems.attempt(lambda: _check_sampler(file, 1 if objective is None else len(objective.names)))
    if context is not None:
        problems.sentences += [
            pairs_refusal(f"search.baselines: {b.label!r}", expert, why)
            for b in (named if file.search.baselines else ())
            if PRESETS[b.name].needs_factors
            for expert, why in context.without_factors.items()
        ]
    problems.sentences += [
        f"models.experts: {name!r} is the name of a baseline that is tried, too; give the expert another name"
        for name in file.models.experts
        if name in {*ALWAYS, *(b.label for b in named)}
    ]
    if len(evaluators) == len(built):
        problems.sentences += [text for b in named if b.fit for text in _loss_problems(b, evaluators)]
    if is_new:
        problems.sentences += earlier_problems(file)
        problems.sentences += wrong_gold(file, evaluators)
    if problems.sentences:
        raise StudyFileError(problems.sentences, where=file.path.name)
    assert context is not None
    assert space is not None
    assert objective is not None
    return Plan(file, context, space, evaluators, metrics, objective, named, tuple(rules or ()), fidelity)


def _rules(file: StudyFile) -> list[RuleFile]:
    try:
        return use_rule_files(file.rule_files)
    except RuleError as error:
        raise StudyFileError([f"rules: {p}" for p in error.problems]) from error


def _objective(file: StudyFile, metrics: list[MetricInfo], problems: _Problems) -> Objective | None:
    names = [m.name for m in metrics]
    problems.sentences += [
        f"evaluate: two evaluators report {n!r}; name each task once"
        for n in sorted({n for n in names if names.count(n) > 1})
    ]
    return problems.attempt(lambda: Objective.from_settings(file.objective.settings, metrics))


def _space(file: StudyFile, context: SpaceContext) -> SearchSpace:
    return catalogue.build_space(file.space.type, file.space.options, context, folder=file.folder)


def _evaluator(file: StudyFile, index: int) -> Evaluator:
    entry = file.evaluate[index]
    shares = SplitShares(file.splits.search, file.splits.validation, file.splits.test, file.splits.fit)
    try:
        return catalogue.build_evaluator(
            entry.evaluator, entry.options, shares=shares, seed=file.study.seed, folder=file.folder
        )
    except InputError as error:
        raise StudyFileError([f"evaluate.{index}: {p}" for p in error.problems]) from None


def _check_sampler(file: StudyFile, n_objectives: int) -> None:
    name = file.search.sampler
    if name not in SAMPLERS:
        raise StudyFileError(f"search.sampler: no sampler is called {name!r}{nearest(name, SAMPLERS)}")
    check_sampler(name, file.search.sampler_options, n_objectives=n_objectives)


def _search_questions(metrics: Sequence[MetricInfo]) -> dict[str, int]:
    """Number of search questions by task. Costs are no tasks, and members of a group are asked with it."""
    counted = [m for m in metrics if not m.is_cost and not m.member_of]
    return {m.task: m.n_questions.get(Split.SEARCH, 0) for m in counted}


def _fit_rows(evaluators: list[Evaluator]) -> dict[str, int]:
    return {task: n for e in evaluators if isinstance(e, Differentiable) for task, n in e.fit_tasks().items()}


def _learner_problems(learner: Learner, evaluators: list[Evaluator], search_share: float) -> list[str]:
    """Problems of a study whose trials fit coefficients: tasks without the loss or without enough rows."""
    rows = _fit_rows(evaluators)
    if not rows:
        return ["search.learner: no evaluator of this study has a differentiable loss; leave the learner out"]
    able = [e for e in evaluators if isinstance(e, Differentiable)]
    lacking = _lacking("search.learner.loss", learner.loss, able)
    unknown = _unfit_granularities("search.learner.per", learner.per, learner.loss)
    return [*unknown, *lacking, *_few_rows(learner.batch_rows, rows, able, search_share)]


def _unfit_granularities(at: str, granularities: Sequence[str], losses: Sequence[str]) -> list[str]:
    """A sentence for each granularity that is unknown or that a loss cannot have."""
    unknown = [f"{at}: {problem}" for per in granularities if (problem := GRANULARITIES.unknown(per))]
    if "block_output" in losses:
        unknown += [f"{at}: {problem}" for problem in block_output_problems(granularities)]
    return unknown


def _lacking(at: str, losses: Sequence[str], evaluators: Sequence[Differentiable]) -> list[str]:
    """A sentence for each task that lacks one of the losses."""
    # Block outputs are compared on the experts' answers, so a task needs the loss on these.
    wanted = [(kind, "pseudo" if kind == "block_output" else kind) for kind in losses if kind != "auto"]
    return [
        f"{at}: task {task!r} has no loss {named!r}; it has {', '.join(e.losses(task))}"
        for e in evaluators
        for task in e.fit_tasks()
        for named, kind in wanted
        if kind not in e.losses(task) and not (kind == "gold" and _why_not_gold(e, task))  # see `wrong_gold`
    ]


def wrong_gold(file: StudyFile, evaluators: Sequence[Evaluator]) -> list[str]:
    """A sentence for each task that the file fits on a gold text which the task's own metric scores wrong.

    A study that began before this was checked goes on with what it learned.
    """
    named = {f"search.baselines: {b.label!r}": [b.fit.loss] for b in _baselines(file, _Problems()) if b.fit}
    if file.search.learner is not None:
        named["search.learner.loss"] = file.search.learner.loss
    return [
        f"{at}: task {task!r} has no loss 'gold': {why}; auto takes another loss for it"
        for at, losses in named.items()
        if "gold" in losses
        for e in evaluators
        if isinstance(e, Differentiable)
        for task in e.fit_tasks()
        if (why := _why_not_gold(e, task))
    ]


def _why_not_gold(evaluator: Differentiable, task: str) -> str | None:
    return evaluator.why_not_gold(task) if isinstance(evaluator, Grading) else None


def _loss_problems(baseline: Baseline, evaluators: list[Evaluator]) -> list[str]:
    """Problems of a baseline whose coefficients are fitted: tasks without the loss or without rows."""
    assert baseline.fit is not None
    at, rows = f"search.baselines: {baseline.label!r} is fitted", _fit_rows(evaluators)
    if not rows:
        return [f"{at}, and no evaluator of this study has a differentiable loss; leave it out"]
    empty = [
        f"{at}, and task {task!r} has no rows to fit on; give it a training split of its own, or set splits.fit"
        for task, n in rows.items()
        if not n
    ]
    unfit = _unfit_granularities(at, [baseline.fit.per], [baseline.fit.loss])
    return unfit + empty + _lacking(at, [baseline.fit.loss], [e for e in evaluators if isinstance(e, Differentiable)])


def _few_rows(wanted: int, rows: dict[str, int], evaluators: Sequence[Evaluator], search_share: float) -> Iterator[str]:
    """A sentence for each task with fewer fit rows than a batch, with the batch size or the share that would do."""
    fewest = min(rows.values())
    totals = {m.task: sum(m.n_questions.values()) for e in evaluators for m in e.metrics()}
    for task, n in rows.items():
        if n >= wanted:
            continue
        ways = [f"batch_rows: {fewest} would do for every task"] if fewest else []
        share = math.ceil(20 * 1.25 * wanted / max(totals.get(task, 0), 1)) / 20  # a share is met by chance
        if not n and share < search_share:
            ways.append(f"splits.fit: {share:g} would give it about {share * totals[task]:.0f}")
        more = "give it a training split of its own or a larger limit on its rows" + (
            "" if ways else ", or raise splits.fit"
        )
        yield (
            f"search.learner: task {task!r} must have at least one batch of {wanted} rows to fit on, found {n}; "
            + "; or ".join([*ways, more])
        )


def _baselines(file: StudyFile, problems: _Problems) -> list[Baseline]:
    entries = file.search.baselines
    if entries is None:
        listed = file.space.options.get("presets")
        if not isinstance(listed, list):
            listed = ["ties", "dare", "della"]
        named = [next(iter(n), None) if isinstance(n, dict) else n for n in listed]
        usable = [n for n in named if isinstance(n, str) and n in PRESETS and PRESETS[n].fit is None]
        return read_baselines([*UNASKED, *(n for n in dict.fromkeys(usable) if n not in UNASKED)], [])
    return read_baselines(entries, problems.sentences)
