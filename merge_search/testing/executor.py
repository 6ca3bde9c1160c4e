"""Conformance tests of an executor: what the search relies on, whatever runs the jobs."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

from merge_search.evaluation import Split
from merge_search.recipe import Recipe
from merge_search.search.trial.executor import Executor
from merge_search.search.trial.job import Failed, Job, Learned, Report, Scored, Spent

__all__ = ["ExecutorTests"]


class ExecutorTests(ABC):
    """Inherit from this class in a test file, as ``TestMyExecutor``, and define the abstract methods.

    Every test makes an executor of its own with `make_executor`, and shuts it down.
    """

    @abstractmethod
    def make_executor(self) -> Executor:
        """An executor of a small study with at least one expert."""

    @abstractmethod
    def broken_recipe(self, executor: Executor) -> Recipe:
        """A recipe over `executor.models` that cannot be scored, for a reason that is its own (such as an overflow)."""

    def fit_settings(self) -> dict[str, Any] | None:
        """Settings of a short fit (`FitSettings` fields); None if the study has no evaluator with a loss."""
        return None

    def good_recipe(self, executor: Executor) -> Recipe:
        """A recipe over `executor.models` that can be scored. By default the average of the experts."""
        experts = executor.models.experts
        return Recipe(models=executor.models, coefficients=dict.fromkeys(experts, 1 / len(experts)))

    def test_a_job_and_its_result_can_be_pickled(self) -> None:
        executor = self.make_executor()
        job = Job(self.good_recipe(executor).to_json())
        result = executor.submit(pickle.loads(pickle.dumps(job))).result()
        executor.shutdown()
        assert isinstance(result, Scored)
        again = pickle.loads(pickle.dumps(result))
        assert again.weights_sha256 == result.weights_sha256
        assert again.evaluation.to_attribute() == result.evaluation.to_attribute()

    def test_one_recipe_gives_the_same_weights_and_answers_each_time(self) -> None:
        executor = self.make_executor()
        good, base = self.good_recipe(executor), Recipe(models=executor.models, preset="base", scale=0.0)
        results = [executor.submit(Job(recipe.to_json())).result() for recipe in (good, base, good)]
        executor.shutdown()
        first, other, second = results
        assert isinstance(first, Scored)
        assert isinstance(other, Scored)
        assert isinstance(second, Scored)
        assert first.weights_sha256 == second.weights_sha256 != other.weights_sha256
        answers = [r.evaluation.to_attribute()["scores"] for r in (first, second)]
        assert answers[0] == answers[1]

    def test_more_jobs_than_workers_are_all_done(self) -> None:
        executor = self.make_executor()
        assert executor.capacity >= 1
        job = Job(self.good_recipe(executor).to_json())
        pending = {executor.submit(job) for _ in range(executor.capacity + 2)}
        results = []
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            results += [future.result() for future in done]
        n = executor.capacity + 2
        executor.shutdown()
        assert len(results) == n
        assert all(isinstance(r, Scored) for r in results)

    def test_a_recipe_that_fails_is_a_result_and_the_next_job_runs(self) -> None:
        executor = self.make_executor()
        reports: list[Report] = []
        failed = executor.submit(Job(self.broken_recipe(executor).to_json()), reports.append).result()
        scored = executor.submit(Job(self.good_recipe(executor).to_json())).result()
        executor.shutdown()
        assert isinstance(failed, Failed)
        assert not failed.outcome.is_scored
        assert failed.reason
        assert isinstance(reports[-1], Spent)
        assert reports[-1].questions == failed.questions
        assert isinstance(scored, Scored)

    def test_split_and_fidelity_are_those_of_the_job(self) -> None:
        executor = self.make_executor()
        recipe = self.good_recipe(executor).to_json()
        part = executor.submit(Job(recipe, Split.SEARCH, 0.5)).result()
        validation = executor.submit(Job(recipe, Split.VALIDATION)).result()
        executor.shutdown()
        assert isinstance(part, Scored)
        assert isinstance(validation, Scored)
        assert (part.evaluation.split, part.evaluation.fidelity) == (Split.SEARCH, 0.5)
        assert validation.evaluation.split is Split.VALIDATION

    def test_a_fit_reports_its_recipe_before_it_is_scored_and_asks_what_was_foreseen(self) -> None:
        settings = self.fit_settings()
        if settings is None:
            return
        executor = self.make_executor()
        executor.set_teachers({})
        foreseen = executor.fit_questions(settings)
        reports: list[Report] = []
        result = executor.submit(Job(self.good_recipe(executor).to_json(), fit=settings), reports.append).result()
        executor.shutdown()
        assert isinstance(result, Scored)
        learned = [r for r in reports if isinstance(r, Learned)]
        assert len(learned) == 1
        assert learned[0].questions == result.extra.questions == foreseen
        assert pickle.loads(pickle.dumps(learned[0])) == learned[0]
        asked = [r.questions for r in reports if isinstance(r, Spent)]
        assert asked == sorted(asked)
        assert len(asked) == settings["steps"]
