"""A worker: models, live model and evaluators, loaded once. It turns jobs into scores.

Recipes of another transform than the last one need other models: these are loaded in place of the old ones, and the
evaluators are bound to the new live model.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from merge_search.cpu_matmul import fast_products
from merge_search.engine.checkpoints.hashing import hash_once
from merge_search.engine.checkpoints.headers import read_checkpoint, resolve_model
from merge_search.engine.engine import MergeEngine
from merge_search.engine.learners.block_outputs import MOST_INPUTS, PASSES, fit_blocks
from merge_search.engine.learners.fit import (
    FitSettings,
    Fitted,
    TaskLoss,
    drawn_rows,
    fit,
    task_losses,
)
from merge_search.engine.resident.coefficient_maps import FOLDER as MAPS
from merge_search.engine.resident.live_model import LiveModel
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.statistics.provider import DataStatistics
from merge_search.engine.transforms.store import FOLDER as TRANSFORMED
from merge_search.errors import EvaluationError, TrialError, WeightsError
from merge_search.evaluation import ComparesWithExperts, Cost, Evaluation, Evaluator, Split, asking
from merge_search.outcome import Outcome
from merge_search.recipe import Models, Recipe, Transform
from merge_search.search.plan import Plan
from merge_search.search.start.baselines import reference_recipes
from merge_search.search.trial.bench import Bench
from merge_search.search.trial.job import Failed, Job, Learned, Reporter, Result, Scored, Spent, failure_of
from merge_search.search.trial.racing import ask_in_parts
from merge_search.study_file import StudyFile

__all__ = ["Worker", "maps_of", "statistics_of", "transforms_of"]

_LEAST_RIGHT = 0.1
"""Smallest share of a teacher's answers that must be right for the loss ``correct``."""


def maps_of(file: StudyFile) -> Path:
    """The folder of a study's coefficient maps: beside the study file, with the study's name."""
    return file.folder / f"{file.study.name}.{MAPS}"


def transforms_of(file: StudyFile) -> Path:
    """The folder of what a study's transforms wrote: beside the study file, with the study's name."""
    return file.folder / f"{file.study.name}.{TRANSFORMED}"


def statistics_of(plan: Plan, pool: ModelPool, teachers: Mapping[str, str], live: LiveModel | None) -> DataStatistics:
    """A study's statistics, which are kept beside the study file under the study's name.

    Args:
        plan: The checked study.
        pool: Its models.
        teachers: Task -> its best expert, or ``base``.
        live: The live model that the plan's evaluators are bound to. None: nothing is measured, and only statistics
            that the study measured before can be read (for an export).
    """
    file = plan.file
    return DataStatistics(
        pool,
        live,
        plan.evaluators,
        teachers,
        folder=file.folder / f"{file.study.name}.statistics",
        n_rows=file.statistics.n_rows,
        seed=file.study.seed,
        dtype=file.models.dtype,
        max_gib=file.statistics.max_gib,
    )


class Worker:
    """The models of one study in memory, and what can be done with them.

    Args:
        plan: The checked study.
        device: As in the study file.

    Attributes:
        models: The study's models with their hashes.
        on_step: Called before each step of a fit, when `asked` includes the step's questions.
    """

    def __init__(self, plan: Plan, *, device: str) -> None:
        self._plan, self._device = plan, device
        self._teachers: Mapping[str, str] = {}
        self._knows_teachers = False
        self._answered = self._charged = 0
        self.on_step: Callable[[], None] = lambda: None
        self.map_folder = maps_of(plan.file)
        self.models = _with_hashes(plan.context.models)
        self.evaluators: list[Evaluator] = plan.evaluators
        # Evaluators see the base first: some keep its answers to compare with.
        self._first = None if plan.context.transform is None else Transform(name="alone")
        self._bench: Bench | None = self._set_up(self._first)
        with _out_of_memory_explained("while the experts answer the evaluators that compare merges with them"):
            self._show_experts()

    def _set_up(self, transform: Transform | None) -> Bench:
        """Load the models of a transform, and bind the evaluators to their live model."""
        bench = Bench(
            self._plan.context.recipe(models=self.models, transform=transform),
            device=self._device,
            dtype=self._plan.file.models.dtype,
            map_folder=self.map_folder,
            transforms=transforms_of(self._plan.file),
            evaluators=self.evaluators,
        )
        with _out_of_memory_explained("while the evaluators prepare their questions"):
            for evaluator in self.evaluators:
                evaluator.bind(bench.live.model, bench.live.tokenizer, folder=str(bench.folder))
        if self._knows_teachers:
            self._measure_on(bench)
        return bench

    def _take_bench(self, transform: Transform | None) -> None:
        """Make the models of a transform those that recipes are merged from. Only one set of them is in memory."""
        if self._bench is not None and transform == self._bench.transform:
            return
        if self._bench is not None:
            self._answered += self._bench.asked
            self._bench.free()
            self._bench = None
            _free_memory()
        self._bench = self._set_up(transform)

    @property
    def _here(self) -> Bench:
        """The models at hand: those of the last job, or the first ones if its models could not be loaded."""
        if self._bench is None:
            self._bench = self._set_up(self._first)
        return self._bench

    def _measure_on(self, bench: Bench) -> None:
        if bench.merges:
            bench.statistics = statistics_of(self._plan, bench.pool, self._teachers, bench.live)
            bench.pool.statistics = bench.statistics

    @property
    def pool(self) -> ModelPool:
        """The models that recipes are merged from now."""
        return self._here.pool

    @property
    def live(self) -> LiveModel:
        """The model that is scored."""
        return self._here.live

    @property
    def engine(self) -> MergeEngine:
        """The engine that writes into it."""
        return self._here.engine

    @property
    def views(self) -> dict[str, torch.Tensor]:
        """Live views of what is merged."""
        return self._here.views

    def _show_experts(self) -> None:
        """Let evaluators that compare merges with experts see each of these experts once. Then the model is the base.

        Raises:
            WeightsError: An expert cannot be asked.
        """
        watching = [e for e in self.evaluators if isinstance(e, ComparesWithExperts)]
        recipes = reference_recipes(self._plan.context)
        for expert in dict.fromkeys(name for e in watching for name in e.compared_experts()):
            try:
                self.splice(recipes[expert])
                for evaluator in watching:
                    if expert in evaluator.compared_experts():
                        self._show(evaluator, expert)
            except TrialError as error:
                raise WeightsError(f"expert {expert!r} cannot be asked, so nothing can be compared: {error}") from error
        if watching:
            self.splice(recipes["base"])

    def _show(self, evaluator: Any, expert: str) -> None:
        before = evaluator.n_asked
        with fast_products(self.views), asking(f"evaluator {type(evaluator).__name__}"):
            evaluator.cache_expert(expert)
        self._answered += evaluator.n_asked - before

    @property
    def notes(self) -> list[str]:
        """Sentences about the models' memory and the live model, for the user."""
        return self._here.notes

    def run(self, job: Job, report: Reporter = lambda report: None) -> Result:
        """Do a job. A failure that belongs to its recipe is a result, and leaves the worker ready for the next job.

        Args:
            job: The recipe to fit and score.
            report: Called with the questions asked before each step of a fit and wherever the job ends early, and with
                the fitted recipe before it is scored.

        Raises:
            BaseException: Any error that says nothing about the recipe. The last report has the questions asked.
        """
        before = self._charged  # with what experts were asked before the first job
        self.on_step = lambda: report(Spent(self.asked - before))
        failed: Failed | None
        try:
            return self._run(job, report)
        except BaseException as error:
            questions = self.asked - before
            report(Spent(questions))
            failed = failure_of(error, questions)
            if failed is None:
                raise
        self.recover()  # after the except clause: until its end the traceback holds tensors
        return failed

    def _run(self, job: Job, report: Reporter) -> Scored:
        recipe, extra = Recipe.from_json(job.recipe), Cost()
        if job.fit is not None:
            fitted = self.fit(recipe, FitSettings(**job.fit), self._teachers)
            report(_learned(fitted))
            recipe, extra = fitted.recipe, Cost(fitted.seconds, 0.0, fitted.questions)
        digest, seconds = self.splice(recipe)
        if job.race is None:
            return Scored(self.ask(job.split, job.fidelity), digest, seconds, extra=extra)

        def ask(share: float, after: float) -> Evaluation:
            return self.ask(job.split, share * job.fidelity, after=after * job.fidelity)

        evaluation, is_stopped = ask_in_parts(ask, job.race)
        return Scored(evaluation, digest, seconds, Outcome.RACED if is_stopped else Outcome.OK, extra)

    def set_teachers(self, teachers: Mapping[str, str]) -> None:
        """Let recipes use measures and operators that need data, and fits use the experts' answers.

        Nothing is read or measured here: each statistic is measured when a recipe first asks for it.

        Args:
            teachers: Task -> its best expert, or ``base``.
        """
        self._teachers, self._knows_teachers = teachers, True
        self._measure_on(self._here)

    def can_measure(self, kind: str) -> bool:
        """Whether the teachers are known and every expert has rows to measure the statistic on."""
        if not self._knows_teachers:
            return False
        if not self._here.merges:  # the base alone: baselines are merged from these models
            self._take_bench(self._plan.context.transform)
        statistics = self._here.statistics
        return statistics is not None and not any(statistics.problem(kind, e) for e in self.models.experts)

    def splice(self, recipe: Recipe) -> tuple[str, float]:
        """Write `recipe` into the live model.

        Returns:
            The hash of its weights, and the seconds that it took.

        Raises:
            RecipeError: The recipe does not fit the models.
            NonFiniteError: Its weights have NaN or infinity.
            torch.OutOfMemoryError: The device has too little memory.
            MemoryError: The host has too little memory.
        """
        self._take_bench(recipe.transform)
        return self._here.splice(recipe)

    def ask(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        """Ask the live model questions. The cost includes statistics that splicing its recipe measured.

        Raises:
            NonFiniteError: A score is NaN or infinity.
            EvaluationError: An evaluator failed, or does not report a metric.
            MemoryError: There is too little memory.
        """
        began, parts = time.perf_counter(), []
        for evaluator in self.evaluators:
            before = evaluator.n_asked
            try:
                with fast_products(self.views):
                    parts.append(_evaluate(evaluator, split, fidelity, after))
            except BaseException:
                self._answered += evaluator.n_asked - before
                raise
            self._answered += parts[-1].cost.questions
        scores = {name: s for part in parts for name, s in part.scores.items()}
        if missing := [m.name for m in self._plan.metrics if m.name not in scores]:
            raise EvaluationError(
                f"an evaluator must report every metric that its metrics() names, found no {', '.join(missing)} on the "
                f"{split} split among {', '.join(scores) or 'none'}"
            )
        cost = Cost(0.0, time.perf_counter() - began, self._uncharged())
        answers = {task: ends for part in parts for task, ends in part.answers.items()}
        evaluation = Evaluation(split, fidelity, scores, cost, answers)
        evaluation.check_finite()
        return evaluation

    @property
    def asked(self) -> int:
        """Questions of the live model so far, for scores, statistics, teachers' answers and fits, completed or not."""
        return self._answered + (0 if self._bench is None else self._bench.asked)

    def _uncharged(self) -> int:
        """Questions since the last call. They are charged to the step that ends now."""
        new, self._charged = self.asked - self._charged, self.asked
        return new

    def _count(self, questions: int) -> None:
        self._answered += questions
        self.on_step()

    def score(self, recipe: Recipe, split: Split, fidelity: float = 1.0) -> Scored:
        """Write `recipe` into the live model and ask it questions. Raises as `splice` and `ask`."""
        digest, seconds = self.splice(recipe)
        return Scored(self.ask(split, fidelity), digest, merge_s=seconds)

    def fit(self, recipe: Recipe, settings: FitSettings, teachers: Mapping[str, str]) -> Fitted:
        """Fit the coefficients of `recipe`; the live model holds the result. It asks `fit_questions(settings)`.

        `Fitted.questions` includes the questions of statistics that the recipe needs and that are measured now.

        Args:
            recipe: Where the fit begins.
            settings: How it is run.
            teachers: Task -> the expert whose answers are its labels. The losses ``gold``, ``choice`` and ``entropy``
                do without.

        Raises:
            EvaluationError: The loss is ``correct``, and a teacher has too few right answers.
        """
        kind = _kind_on_rows(settings.loss)
        self._take_bench(recipe.transform)
        rows = self._fit_rows(settings)
        self._here.labels.ask(self.engine, self.views, recipe, teachers, kind, rows)
        losses, folder = self._losses_on_right_rows(recipe, teachers, kind, rows), self.map_folder
        live = (self.engine, self.live.model, self.views)
        if settings.loss == "block_output":
            fitted = fit_blocks(*live, recipe, losses, teachers, settings, map_folder=folder, on_asked=self._count)
        else:
            fitted = fit(*live, recipe, losses, settings, map_folder=folder, on_asked=self._count)
        return replace(fitted, questions=self._uncharged())

    def _losses_on_right_rows(
        self, recipe: Recipe, teachers: Mapping[str, str], kind: str, rows: Mapping[str, Iterable[int]]
    ) -> dict[str, TaskLoss]:
        """The losses of a fit. Those of kind ``correct`` draw from the rows alone that the teacher answers right.

        Where ``auto`` stands for ``correct`` and the teacher has too few right answers, it asks the teacher again and
        gives ``kl``.
        """
        right = self._here.labels.right(kind, rows)
        few = [task for task, found in right.items() if len(found) < _LEAST_RIGHT * len(list(rows[task]))]
        if few and kind != "auto":
            raise EvaluationError(
                f"learner: fewer than {_LEAST_RIGHT:.0%} of the answers of the teacher of {', '.join(map(repr, few))} "
                "are right, which is too few for the loss correct; take the loss kl"
            )
        self._here.labels.ask(self.engine, self.views, recipe, teachers, "kl", {task: rows[task] for task in few})
        losses = task_losses(self.evaluators, kind, dict.fromkeys(few, "kl"))
        return losses | {task: losses[task].on(found) for task, found in right.items() if task not in few}

    def fit_questions(self, settings: FitSettings) -> int:
        """Number of questions that `fit` would ask now, with those of the teachers. It grows with the steps.

        A teacher that has too few right answers for ``auto`` is asked more than this, once.
        """
        kind, losses = _kind_on_rows(settings.loss), self._fit_losses(settings)
        asked = settings.steps * sum(loss.questions_per_step(settings) for loss in losses.values())
        if settings.loss == "block_output":
            asked += PASSES * sum(loss.n_rows for loss in losses.values())
        return asked + self._here.labels.questions(kind, self._fit_rows(settings))

    def _fit_losses(self, settings: FitSettings) -> dict[str, TaskLoss]:
        """The tasks that a fit runs on, with the number of rows that it chooses from."""
        losses = task_losses(self.evaluators, _kind_on_rows(settings.loss))
        if settings.loss != "block_output":
            return losses
        return {task: replace(loss, n_rows=min(loss.n_rows, MOST_INPUTS)) for task, loss in losses.items()}

    def _fit_rows(self, settings: FitSettings) -> Mapping[str, Iterable[int]]:
        """The rows of each task that a fit runs through the model. For block outputs these are all it chooses from."""
        n_rows = {task: loss.n_rows for task, loss in self._fit_losses(settings).items()}
        if settings.loss == "block_output":
            return {task: range(n) for task, n in n_rows.items()}
        return drawn_rows(settings, n_rows)

    def recover(self) -> None:
        """Free the memory that a failed job left behind. Its questions are charged to it and not to the next job."""
        self._uncharged()
        if self._bench is not None:
            self._bench.forget()
        _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _with_hashes(models: Models) -> Models:
    """`models` with the hashes of their files."""
    places = {"base": models.base, **models.experts}
    infos = [read_checkpoint(resolve_model(place)) for place in places.values()]
    with ThreadPoolExecutor(min(len(infos), os.cpu_count() or 1)) as threads:
        return models.model_copy(update={"hashes": dict(zip(places, threads.map(hash_once, infos), strict=True))})


def _learned(fitted: Fitted) -> Learned:
    ends = zip(fitted.tasks, fitted.losses[0], fitted.losses[-1], strict=True)
    losses = {task: [float(first), float(last)] for task, first, last in ends}
    return Learned(fitted.recipe.to_json(), fitted.seconds, fitted.questions, losses, fitted.n_coefficients)


@contextmanager
def _out_of_memory_explained(when: str) -> Iterator[None]:
    """Turn out-of-memory errors inside into an `EvaluationError` that says when it happened and what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        failed = failure_of(error)
        if failed is None:
            raise
        raise replace(failed, reason=failed.reason or type(error).__name__).to_error(when) from error


def _kind_on_rows(loss: str) -> str:
    """The kind of loss on rows. Block outputs are compared on the prompts with the experts' own answers."""
    return "pseudo" if loss == "block_output" else loss


def _evaluate(evaluator: Evaluator, split: Split, fidelity: float, after: float) -> Evaluation:
    with asking(f"evaluator {type(evaluator).__name__}"):
        return evaluator.evaluate(split, fidelity, after=after)
