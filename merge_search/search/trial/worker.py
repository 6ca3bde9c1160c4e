"""One live model, one engine, the evaluators: where a recipe becomes scores."""

from __future__ import annotations

import gc
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from merge_search.cpu_matmul import fast_products
from merge_search.engine.engine import MergeEngine
from merge_search.engine.learners.block_outputs import MOST_INPUTS, PASSES, fit_blocks
from merge_search.engine.learners.expert_labels import ExpertLabels
from merge_search.engine.learners.fit import (
    QUESTIONS_PER_ROW,
    FitSettings,
    Fitted,
    drawn_rows,
    fit,
    task_losses,
)
from merge_search.engine.resident.coefficient_maps import FOLDER as MAPS
from merge_search.engine.resident.live_model import LiveModel
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.statistics.provider import DataStatistics
from merge_search.errors import EvaluationError
from merge_search.evaluation import Cost, Evaluation, Evaluator, Split, asking
from merge_search.memory import is_memory_error
from merge_search.outcome import Outcome
from merge_search.recipe import Recipe
from merge_search.search.prepare import Plan
from merge_search.study_file import StudyFile

__all__ = ["Scored", "Workbench", "maps_of", "memory_errors_said", "statistics_of"]


@dataclass(frozen=True)
class Scored:
    """A recipe's scores, and the hash of the weights that gave them."""

    evaluation: Evaluation
    weights_sha256: str
    merge_s: float = 0.0
    outcome: Outcome = Outcome.OK
    extra: Cost = field(default_factory=Cost)
    """Of the learner."""


def maps_of(file: StudyFile) -> Path:
    """Where a study keeps its maps: beside the study file, by the study's name."""
    return file.folder / f"{file.study.name}.{MAPS}"


def statistics_of(plan: Plan, pool: ModelPool, owners: Mapping[str, str], live: LiveModel | None) -> DataStatistics:
    """A study's statistics, kept beside the study file by its name.

    Args:
        owners: Task -> its best expert, or ``base``.
        live: Bound to the plan's evaluators; None: only what the study measured can be had (an export).
    """
    file = plan.file
    folder = file.folder / f"{file.study.name}.statistics"
    section = file.statistics
    return DataStatistics(
        pool, live, plan.evaluators, owners, folder=folder, n_rows=section.n_rows, seed=file.study.seed,
        dtype=file.models.dtype, max_gib=section.max_gib,
    )  # fmt: skip


class Workbench:
    """One live model, one engine, the evaluators: a recipe in, scores out.

    Attributes:
        on_step: Called before each step of a fit, when `asked` holds its questions.
    """

    def __init__(self, plan: Plan, *, device: str) -> None:
        self._plan = plan
        self._statistics: DataStatistics | None = None
        self._answered = self._charged = 0
        self.on_step: Callable[[], None] = lambda: None
        self.map_folder = maps_of(plan.file)
        self.pool = ModelPool(plan.context.models, device=device, map_folders=[self.map_folder])
        self.models = plan.context.models.model_copy(update={"hashes": self.pool.hashes()})
        self.live = LiveModel.load(self.pool.base_folder, device=self.pool.device, dtype=plan.file.models.dtype)
        self.engine = MergeEngine(self.pool)
        self.views = {name: view for name, view in self.live.views.items() if name in self.pool.groups}
        self.evaluators: list[Evaluator] = plan.evaluators
        self._labels = ExpertLabels(plan.evaluators)
        with memory_errors_said("while the evaluators prepare their questions"):
            for evaluator in self.evaluators:
                evaluator.bind(self.live.model, self.live.tokenizer, folder=str(self.pool.base_folder))

    def offer_statistics(self, owners: Mapping[str, str]) -> None:
        """Let recipes use measures and operators that need data; each statistic is measured when first asked for.

        Args:
            owners: Task -> its best expert. Nothing is read or measured here.
        """
        self._statistics = self.pool.statistics = statistics_of(self._plan, self.pool, owners, self.live)

    def can_measure(self) -> bool:
        """Whether statistics were offered and every expert has rows to measure them on."""
        found = self._statistics
        return found is not None and not any(found.problem("fisher", e) for e in self.models.experts)

    def splice(self, recipe: Recipe) -> tuple[str, float]:
        """Write `recipe` into the live model; the hash of its weights, and seconds.

        Raises:
            RecipeError, NonFiniteError, torch.OutOfMemoryError, MemoryError.
        """
        began = time.perf_counter()
        self.engine.apply(recipe, self.views)
        return self.live.hash(), time.perf_counter() - began

    def ask(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        """Put questions to the live model as it is now. The cost includes statistics that splicing it measured.

        Raises:
            NonFiniteError, EvaluationError, MemoryError.
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
                f"an evaluator must report every metric that its metrics() names, found no {', '.join(missing)} on the {split} "
                f"split among {', '.join(scores) or 'none'}"
            )
        cost = Cost(0.0, time.perf_counter() - began, self._uncharged())
        evaluation = Evaluation(split, fidelity, scores, cost)
        evaluation.check_finite()
        return evaluation

    @property
    def asked(self) -> int:
        """Questions put to the live model so far: scores, statistics, experts' answers, fits, the unfinished ones, too."""
        measured = 0 if self._statistics is None else self._statistics.questions
        return self._answered + self._labels.asked + measured

    def _uncharged(self) -> int:
        """Questions since the last call: charged to what ends now."""
        new, self._charged = self.asked - self._charged, self.asked
        return new

    def _count(self, questions: int) -> None:
        self._answered += questions
        self.on_step()

    def score(self, recipe: Recipe, split: Split, fidelity: float = 1.0) -> Scored:
        """Splice and ask."""
        digest, seconds = self.splice(recipe)
        return Scored(self.ask(split, fidelity), digest, merge_s=seconds)

    def fit(self, recipe: Recipe, settings: FitSettings, owners: Mapping[str, str]) -> Fitted:
        """Fit the coefficients of `recipe`; the live model holds the result. It asks `fit_questions(settings)`.

        `Fitted.questions` holds those of statistics, too, that the recipe needs and that are measured now.

        Args:
            owners: Task -> the expert whose answers are its labels, for all losses but ``gold``, ``choice`` and ``entropy``.
        """
        kind = _told_by_experts(settings.loss)
        if kind in ("pseudo", "kl"):
            self._labels.ask(self.engine, self.views, recipe, owners, kind, self._fit_rows(settings))
        losses, folder = task_losses(self.evaluators, kind), self.map_folder
        live = (self.engine, self.live.model, self.views)
        if settings.loss == "block_output":
            fitted = fit_blocks(*live, recipe, losses, owners, settings, map_folder=folder, on_asked=self._count)
        else:
            fitted = fit(*live, recipe, losses, settings, map_folder=folder, on_asked=self._count)
        return replace(fitted, questions=self._uncharged())

    def fit_questions(self, settings: FitSettings) -> int:
        """How many questions `fit` would ask now, of the experts too: more for more steps."""
        kind, n_rows = _told_by_experts(settings.loss), self._n_fit_rows(settings)
        asked = QUESTIONS_PER_ROW * settings.steps * sum(min(settings.batch_rows, n) for n in n_rows.values())
        if settings.loss == "block_output":
            asked += PASSES * sum(n_rows.values())
        if kind in ("pseudo", "kl"):
            asked += self._labels.questions(kind, self._fit_rows(settings))
        return asked

    def affordable_steps(self, settings: FitSettings, questions: int) -> int:
        """The most steps, those of `settings` at most, that ask no more than `questions`; may be 0."""
        steps = range(1, settings.steps + 1)
        return bisect_right(steps, questions, key=lambda n: self.fit_questions(replace(settings, steps=n)))

    def _n_fit_rows(self, settings: FitSettings) -> dict[str, int]:
        """How many rows of each task a fit chooses from."""
        most = MOST_INPUTS if settings.loss == "block_output" else None
        losses = task_losses(self.evaluators, _told_by_experts(settings.loss))
        return {task: loss.n_rows if most is None else min(loss.n_rows, most) for task, loss in losses.items()}

    def _fit_rows(self, settings: FitSettings) -> Mapping[str, Iterable[int]]:
        """The rows of each task that a fit runs through the model: block outputs all they choose from."""
        n_rows = self._n_fit_rows(settings)
        if settings.loss == "block_output":
            return {task: range(n) for task, n in n_rows.items()}
        return drawn_rows(settings, n_rows)

    def recover(self) -> None:
        """Free what a failed trial left behind; what it asked is charged to it, and to nothing that follows."""
        self._uncharged()
        self.engine.forget()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def memory_errors_said(when: str) -> Iterator[None]:
    """Out of memory inside becomes an `EvaluationError` that says `when`, and what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
        raise EvaluationError(
            f"out of memory {when} ({error or type(error).__name__}): give evaluate a smaller batch_size or max_length, "
            "models a dtype of fewer bytes (bfloat16), or take a device with more memory"
        ) from error


def _told_by_experts(loss: str) -> str:
    """The kind of loss on rows: block outputs are compared on the prompts with the experts' own answers."""
    return "pseudo" if loss == "block_output" else loss


def _evaluate(evaluator: Evaluator, split: Split, fidelity: float, after: float) -> Evaluation:
    with asking(f"evaluator {type(evaluator).__name__}"):
        return evaluator.evaluate(split, fidelity, after=after)
