"""What an executor promises: whatever runs the jobs, the search relies on these tests."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from merge_search.evaluation import Split
from merge_search.recipe import Recipe
from merge_search.search.trial.job import Failed, Job, Learned, Report, Result, Scored, Spent

if TYPE_CHECKING:
    from merge_search.search.trial.executor import Executor

__all__ = ["ExecutorCase", "ExecutorConformance"]

T = TypeVar("T")


@dataclass(frozen=True)
class ExecutorCase:
    """An executor to test.

    Attributes:
        make: Makes an executor of a small study with at least one expert.
        broken: Changes to the recipe of the experts' average (`Recipe` fields) with which it cannot be scored, for a
            reason of its own such as weights that overflow.
        fit: Settings of a short fit (`FitSettings` fields) with the loss ``gold``. None: the study has no such loss.
    """

    make: Callable[[], Executor]
    broken: Mapping[str, Any]
    fit: Mapping[str, Any] | None = None

    @contextmanager
    def executor(self) -> Iterator[Executor]:
        """An executor that is shut down afterwards."""
        executor = self.make()
        try:
            yield executor
        finally:
            executor.shutdown()

    @staticmethod
    def recipe(executor: Executor, **changes: Any) -> str:
        """The average of the experts with these changes, as JSON."""
        experts = executor.models.experts
        average = {"models": executor.models, "coefficients": dict.fromkeys(experts, 1 / len(experts))}
        return Recipe.model_validate({**average, **changes}).to_json()


def _there_and_back(value: T) -> T:
    """The value after its way to another process, which copies it, and back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        return other.submit(copy.copy, value).result()


def _scored(result: Result) -> Scored:
    assert isinstance(result, Scored), result
    return result


class ExecutorConformance:
    """Derive a class, define the fixture ``case``, and pytest runs these tests on it."""

    def test_a_job_and_its_result_reach_another_process_unchanged(self, case: ExecutorCase) -> None:
        """Jobs and results are plain values, so an executor can have workers in other processes."""
        with case.executor() as executor:
            job = Job(case.recipe(executor))
            sent = _there_and_back(job)
            assert sent == job
            result = _scored(executor.submit(sent).result())
        again = _there_and_back(result)
        assert again.weights_sha256 == result.weights_sha256
        assert again.evaluation.to_attribute() == result.evaluation.to_attribute()

    def test_a_recipe_gives_the_same_weights_and_answers_each_time(self, case: ExecutorCase) -> None:
        """A result depends on its job alone, not on the jobs before it."""
        with case.executor() as executor:
            average, base = case.recipe(executor), case.recipe(executor, scale=0.0)
            results = [_scored(executor.submit(Job(recipe)).result()) for recipe in (average, base, average)]
        first, other, second = results
        assert first.weights_sha256 == second.weights_sha256 != other.weights_sha256
        assert first.evaluation.to_attribute()["scores"] == second.evaluation.to_attribute()["scores"]

    def test_more_jobs_than_workers_are_all_done(self, case: ExecutorCase) -> None:
        """Futures work with `concurrent.futures.wait`."""
        with case.executor() as executor:
            assert executor.capacity >= 1
            job = Job(case.recipe(executor))
            pending: set[Future[Result]] = {executor.submit(job) for _ in range(executor.capacity + 2)}
            n_submitted, n_done = len(pending), 0
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                n_done += sum(isinstance(future.result(), Scored) for future in done)
        assert n_done == n_submitted

    def test_a_recipe_that_fails_is_a_result_and_the_next_job_runs(self, case: ExecutorCase) -> None:
        """A failure that belongs to the recipe is typed, has a reason and the questions that were asked."""
        reports: list[Report] = []
        with case.executor() as executor:
            failed = executor.submit(Job(case.recipe(executor, **case.broken)), reports.append).result()
            _scored(executor.submit(Job(case.recipe(executor))).result())
        assert isinstance(failed, Failed)
        assert not failed.outcome.is_scored
        assert failed.reason
        assert reports[-1] == Spent(failed.questions)

    def test_split_and_fidelity_are_those_of_the_job(self, case: ExecutorCase) -> None:
        """A job asks its own questions."""
        with case.executor() as executor:
            recipe = case.recipe(executor)
            part = _scored(executor.submit(Job(recipe, Split.SEARCH, 0.5)).result()).evaluation
            validation = _scored(executor.submit(Job(recipe, Split.VALIDATION)).result()).evaluation
        assert (part.split, part.fidelity) == (Split.SEARCH, 0.5)
        assert validation.split is Split.VALIDATION

    def test_a_fit_is_reported_before_its_recipe_is_scored(self, case: ExecutorCase) -> None:
        """The questions of every step and then the fitted recipe are reported, and they are as many as foreseen."""
        if case.fit is None:
            return
        reports: list[Report] = []
        with case.executor() as executor:
            executor.set_teachers({})
            foreseen = executor.fit_questions(case.fit)
            job = Job(case.recipe(executor), fit=case.fit)
            result = _scored(executor.submit(job, reports.append).result())
        *steps, learned = reports
        assert isinstance(learned, Learned)
        assert _there_and_back(learned) == learned
        assert learned.questions == result.extra.questions == foreseen
        asked = [report.questions for report in steps if isinstance(report, Spent)]
        assert len(asked) == len(steps) == case.fit["steps"]
        assert asked == sorted(asked)
        assert asked[-1] <= foreseen
