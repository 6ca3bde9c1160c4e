"""The local executor keeps the contract, and the search keeps its promises with several workers."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import optuna
import pytest
from failing_studies import LEARNER, Quiet, evaluator, write_study
from optuna.trial import TrialState

from merge_search.errors import EvaluationError, InputError, NonFiniteError
from merge_search.outcome import Outcome
from merge_search.search import run as module
from merge_search.search.budget import questions_asked
from merge_search.search.prepare import prepare
from merge_search.search.records import finished_records
from merge_search.search.run import run
from merge_search.search.storage import INTERRUPTED
from merge_search.search.trial.executor import LocalExecutor
from merge_search.search.trial.job import Failed, Job, Reporter, Result, failure_of
from merge_search.study_file import read_study_file
from merge_search.testing import ExecutorCase, ExecutorConformance


class TestLocalExecutor(ExecutorConformance):
    @pytest.fixture
    def case(self, demo: Path, tmp_path: Path) -> ExecutorCase:
        path = write_study(tmp_path, demo, "Learned", learner=LEARNER)
        evaluator(tmp_path, "Learned")
        return ExecutorCase(
            lambda: LocalExecutor(prepare(read_study_file(path)), device="cpu"),
            broken={"coefficients": {"maths": 1e38}, "scale": 1e38},
            fit={"per": "block", "steps": 3, "step_size": 0.01, "batch_rows": 4},
        )


class SeveralWorkers:
    """Three workers whose jobs end in another order than they began: the last one submitted first."""

    capacity = 3

    def __init__(self, plan: Any, *, device: str) -> None:
        self.inner = LocalExecutor(plan, device=device)
        self.waiting: list[tuple[int, Future[Result], Job, Reporter]] = []
        self.n_submitted = self.most_at_once = 0

    models = property(lambda self: self.inner.models)
    notes = property(lambda self: self.inner.notes)

    def set_teachers(self, teachers: Mapping[str, str]) -> None:
        self.inner.set_teachers(teachers)

    def can_measure(self, kind: str) -> bool:
        return self.inner.can_measure(kind)

    def fit_questions(self, settings: Mapping[str, Any]) -> int:
        return self.inner.fit_questions(settings)

    def submit(self, job: Job, report: Reporter = lambda report: None) -> Future[Result]:
        future = _Lazy(self)
        self.n_submitted += 1
        heapq.heappush(self.waiting, (-self.n_submitted, future, job, report))
        self.most_at_once = max(self.most_at_once, len(self.waiting))
        return future

    def run_one(self) -> None:
        _, future, job, report = heapq.heappop(self.waiting)
        try:
            future.set_result(self.inner.submit(job, report).result())
        except Exception as error:
            future.set_exception(error)

    def shutdown(self) -> None:
        self.inner.shutdown()


class _Lazy(Future[Result]):
    def __init__(self, owner: SeveralWorkers) -> None:
        super().__init__()
        self.owner = owner

    def result(self, timeout: float | None = None) -> Result:
        while not self.done():
            self.owner.run_one()
        return super().result(timeout)


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> list[SeveralWorkers]:
    made: list[SeveralWorkers] = []

    def make(plan: Any, *, device: str) -> SeveralWorkers:
        made.append(SeveralWorkers(plan, device=device))
        return made[0]

    def wait(futures: Sequence[Future[Result]], return_when: str) -> None:
        if not any(f.done() for f in futures):
            made[0].run_one()

    monkeypatch.setattr(module, "LocalExecutor", make)
    monkeypatch.setattr(module, "wait", wait)
    return made


def test_several_jobs_run_at_once_and_end_in_any_order(demo: Path, tmp_path: Path, several: list[Any]) -> None:
    path = write_study(tmp_path, demo, n_trials=12)
    evaluator(tmp_path, calls={6: ValueError("no answer")})
    study = run(read_study_file(path), Quiet())
    done = finished_records(study)
    assert len(done) == 12
    assert several[0].most_at_once == 3
    assert [r.outcome for r in done].count(Outcome.EVALUATOR_ERROR) == 1
    told = sorted(done, key=lambda r: study.trials[r.number].datetime_complete or 0)
    assert [r.number for r in told] != [r.number for r in done]
    assert study.user_attrs["validation"]


def test_ctrl_c_marks_and_charges_every_running_trial(demo: Path, tmp_path: Path, several: list[Any]) -> None:
    path = write_study(tmp_path, demo, "Counted", n_trials=12)
    evaluator(tmp_path, "Counted", calls={6: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run(read_study_file(path), Quiet())
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 's.db'}")
    running = study.get_trials(states=(TrialState.RUNNING,))
    assert len(running) > 1
    assert all(t.user_attrs[INTERRUPTED] for t in running)
    assert sorted(t.user_attrs["cost"][2] for t in running)[-1] == 3
    several.clear()
    evaluator(tmp_path, "Counted")
    again = run(read_study_file(path), Quiet())
    assert len(finished_records(again)) == 12
    asked = [r for r in finished_records(again) if r.label not in ("base", "maths")]
    assert questions_asked(again) == 3 + 20 + 10 * len(asked), "the interrupted answers, base and expert, the trials"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (EvaluationError("no answer"), Outcome.EVALUATOR_ERROR),
        (NonFiniteError("NaN"), Outcome.NON_FINITE),
        (InputError("no loss is called so"), Outcome.MERGE_ERROR),
        (MemoryError(), Outcome.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Outcome.OUT_OF_MEMORY),
    ],
)
def test_a_failure_travels_as_a_value_and_becomes_the_same_kind_of_error(error: Exception, outcome: Outcome) -> None:
    failed = failure_of(error, 7)
    assert failed == Failed(outcome, str(error), 7)
    raised = failed.to_error("while it is tested")
    if outcome is Outcome.OUT_OF_MEMORY:
        assert "out of memory while it is tested (" in str(raised)
    else:
        assert type(raised) is type(error)
        assert str(raised) == str(error)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("x"), KeyboardInterrupt()])
def test_an_error_that_says_nothing_about_the_recipe_is_no_result(error: BaseException) -> None:
    assert failure_of(error) is None
