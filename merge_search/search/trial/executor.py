"""Where jobs run. The search submits jobs and waits for their futures; it does not know how many workers there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from merge_search.engine.learners.fit import FitSettings
from merge_search.recipe import Models
from merge_search.search.plan import Plan
from merge_search.search.trial.job import Job, Reporter, Result
from merge_search.search.trial.worker import Worker

__all__ = ["Executor", "LocalExecutor"]


class Executor(Protocol):
    """Runs jobs on one or more workers, with the semantics of `concurrent.futures.Executor`.

    Attributes:
        capacity: Number of jobs that can run at the same time.
        models: The study's models with their hashes.
        notes: Sentences about the workers for the user.
    """

    @property
    def capacity(self) -> int: ...
    @property
    def models(self) -> Models: ...
    @property
    def notes(self) -> Sequence[str]: ...

    def set_teachers(self, teachers: Mapping[str, str]) -> None:
        """Tell all workers each task's best expert, once base and experts are scored.

        Recipes that need data and fits that need teachers can run only afterwards.
        """
        ...

    def can_measure(self, kind: str) -> bool:
        """Whether recipes that need this statistic from data can run."""
        ...

    def fit_questions(self, settings: Mapping[str, Any]) -> int:
        """Number of questions that a fit with these settings (`FitSettings` fields) would ask now."""
        ...

    def submit(self, job: Job, report: Reporter = lambda report: None) -> Future[Result]:
        """Run a job when a worker is free.

        A failure that belongs to the recipe is a result (`Failed`). Any other error is the future's exception, or is
        raised here if it stops the executor, as Ctrl-C does.

        Args:
            job: The recipe to fit and score.
            report: Called with the job's reports, in their order, before the future is done. Calls of one executor do
                not overlap.
        """
        ...

    def shutdown(self) -> None:
        """Free the workers."""
        ...


class LocalExecutor:
    """One worker in this process: `submit` runs the job at once and returns a future that is done.

    Args:
        plan: The checked study.
        device: As in the study file.
    """

    capacity = 1

    def __init__(self, plan: Plan, *, device: str) -> None:
        self.worker = Worker(plan, device=device)

    @property
    def models(self) -> Models:
        return self.worker.models

    @property
    def notes(self) -> Sequence[str]:
        return self.worker.notes

    def set_teachers(self, teachers: Mapping[str, str]) -> None:
        self.worker.set_teachers(teachers)

    def can_measure(self, kind: str) -> bool:
        return self.worker.can_measure(kind)

    def fit_questions(self, settings: Mapping[str, Any]) -> int:
        return self.worker.fit_questions(FitSettings(**settings))

    def submit(self, job: Job, report: Reporter = lambda report: None) -> Future[Result]:
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(self.worker.run(job, report))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        """Nothing to do: the worker lives as long as this object."""
