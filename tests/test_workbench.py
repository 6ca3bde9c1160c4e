"""Whatever goes wrong inside one trial ends that trial with a typed outcome; the study goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml
from command_line import here

from merge_search import catalogue
from merge_search.errors import EvaluationError, MergeSearchError
from merge_search.evaluation import Evaluation
from merge_search.search.prepare import prepare
from merge_search.search.records import finished_records, questions_asked
from merge_search.search.run import run
from merge_search.search.sealed import open_test
from merge_search.study_file import read_study_file

EVALUATOR = '''
import numpy as np, torch
from merge_search.evaluation import Cost, Evaluation, MetricInfo, Scores, Split

class Norm:
    """Scores a model by the norm of one tensor; fails on request, by the number of the call."""

    calls = 0
    fails: dict = {}

    def __init__(self, options, *, shares, seed):
        pass

    def metrics(self):
        return [MetricInfo("norm", "small", True, {s: 10 for s in (Split.SEARCH, Split.VALIDATION, Split.TEST)})]

    def fingerprint(self):
        return "norm"

    def bind(self, model, tokenizer, *, folder):
        self.weight = next(model.parameters())

    def evaluate(self, split, fidelity=1.0, *, after=0.0):
        Norm.calls += 1
        failure = Norm.fails.get(Norm.calls)
        if failure is not None:
            raise failure
        value = 1 / (1 + float(self.weight.norm()))
        values = np.clip(value + np.linspace(-0.01, 0.01, 10), 0, 1)
        return Evaluation(split, fidelity, {"norm/small": Scores((), values, float(values.mean()), 0.01)}, Cost(questions=10))

class Counted(Norm):
    """Asks three questions, then fails if it must, then asks the other seven."""

    def __init__(self, options, *, shares, seed):
        self.n_asked = 0

    def evaluate(self, split, fidelity=1.0, *, after=0.0):
        self.n_asked += 3
        found = super().evaluate(split, fidelity, after=after)
        self.n_asked += 7
        return found

class Silent(Norm):
    """Declares a metric that it does not report."""

    def metrics(self):
        return [*super().metrics(), MetricInfo("norm", "large", True, {s: 10 for s in (Split.SEARCH, Split.TEST)})]

class Learned(Norm):
    """With a loss, the norm itself; it fails on request, by the number of the call."""

    asked: list = []
    loss_fails: dict = {}

    def fit_tasks(self):
        return {"norm": 40}

    def losses(self, task):
        return ("gold",)

    def predict(self, task, rows):
        return [0] * len(rows)

    def set_pseudo_labels(self, task, labels):
        pass

    def loss(self, task, rows, kind="gold"):
        self.asked.append(tuple(rows))
        failure = self.loss_fails.get(len(self.asked))
        if failure is not None:
            raise failure
        return self.weight.square().mean()
'''


class Quiet:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, **_: Any) -> None: ...
    def trial(self, *_: Any, **__: Any) -> None: ...
    def end(self) -> None: ...


LEARNER = {"steps": 5, "per": "block", "step_size": 0.01, "batch_rows": 4, "warm_start": False}


def write_study(folder: Path, demo: Path, kind: str = "Norm", **search: Any) -> Path:
    (folder / "mine.py").write_text(EVALUATOR)
    data = {
        "study": {"name": "s"},
        "models": {"base": str(demo / "models" / "base"), "experts": {"maths": str(demo / "models" / "maths")}},
        "space": {"type": "uniform", "presets": ["task_arithmetic"]},
        "evaluate": [{"evaluator": f"mine.py:{kind}"}],
        "objective": {"maximise": "norm"},
        "search": {"n_trials": 7, "sampler": "random", "baselines": [], **search},
        "device": "cpu",
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def evaluator(folder: Path, kind: str = "Norm", *, calls: Any = None, losses: Any = None) -> Any:
    """The study's own, made to fail at these numbers of calls."""
    found = catalogue.load("evaluators", f"mine.py:{kind}", folder=folder)
    norm = catalogue.load("evaluators", "mine.py:Norm", folder=folder)
    norm.calls, norm.fails = 0, calls or {}
    if kind == "Learned":
        found.asked, found.loss_fails = [], losses or {}
    return found


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (ValueError("a user's own mistake"), "evaluator_error"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
    ],
)
def test_a_failure_is_typed_and_the_study_goes_on(demo: Path, tmp_path: Path, failure: Exception, outcome: str) -> None:
    path = write_study(tmp_path, demo)
    evaluator(tmp_path, calls={4: failure})
    study = run(read_study_file(path), Quiet())
    done = finished_records(study)
    assert len(done) == 7
    (bad,) = [r for r in done if not r.is_scored]
    assert bad.outcome == outcome
    assert str(failure) in bad.reason
    assert study.user_attrs["validation"]


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out_of_memory"),
        (EvaluationError("no answer"), "evaluator_error"),
    ],
)
def test_a_fit_that_fails_is_charged_what_it_asked_until_then(
    demo: Path, tmp_path: Path, failure: Exception, outcome: str
) -> None:
    path = write_study(tmp_path, demo, "Learned", n_trials=6, learner=LEARNER)
    mine = evaluator(tmp_path, "Learned", losses={3: failure})
    study = run(read_study_file(path), Quiet())
    (bad,) = [r for r in finished_records(study) if not r.is_scored]
    assert bad.outcome == outcome
    rows = [len(rows) for rows in mine.asked]
    assert rows[:3] == [4, 4, 4]
    assert bad.cost.questions == 3 * (4 + 4 + 4)
    scored = [r for r in finished_records(study) if r.is_scored]
    assert questions_asked(study) == 3 * sum(rows) + 10 * len(scored), "and nothing that follows is charged for it"


@pytest.mark.parametrize("failure", [ValueError("a user's own mistake"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_call_that_fails_is_charged_what_its_evaluator_says_it_asked(
    demo: Path, tmp_path: Path, failure: Exception
) -> None:
    path = write_study(tmp_path, demo, "Counted")
    evaluator(tmp_path, "Counted", calls={4: failure})
    study = run(read_study_file(path), Quiet())
    (bad,) = [r for r in finished_records(study) if not r.is_scored]
    assert bad.cost.questions == 3
    assert questions_asked(study) == 3 + 10 * sum(r.is_scored for r in finished_records(study))


def test_an_evaluator_that_does_not_report_what_it_declares_is_a_sentence(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, "Silent")
    evaluator(tmp_path, "Silent")
    with pytest.raises(MergeSearchError, match="found no norm/large on the search split among norm/small"):
        run(read_study_file(path), Quiet())


SPACE = """
from merge_search.catalogue import load

class Own(load("search_spaces", "uniform")):
    def decode(self, point):
        if point["coefficient"] > 1.2:
            raise KeyError("a user's own mistake")
        return super().decode(point)
"""


def test_what_a_users_own_space_throws_ends_the_trial_and_not_the_study(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, n_trials=14)
    evaluator(tmp_path)
    (tmp_path / "own.py").write_text(SPACE)
    path.write_text(path.read_text().replace("type: uniform", "type: own.py:Own"))
    done = finished_records(run(read_study_file(path), Quiet()))
    bad = [r for r in done if not r.is_scored]
    assert len(done) == 14
    assert 0 < len(bad) < 11
    assert all(r.outcome == "merge_error" and "space Own failed to decode a point: KeyError" in r.reason for r in bad)


def test_where_nothing_was_merged_nothing_is_offered_for_export(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, n_trials=1)
    evaluator(tmp_path)
    text = here("run", path).stdout
    assert "Nothing to export: study 's' has no scored merge yet" in text
    assert "Write it" not in text


def test_a_race_that_fails_at_its_second_look_is_charged_for_the_first(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, racing={"looks": [0.5], "error": 0.01})
    evaluator(tmp_path, calls={n: ValueError("no") for n in range(6, 30, 2)})
    done = finished_records(run(read_study_file(path), Quiet()))
    bad = [r for r in done if r.outcome == "evaluator_error"]
    assert bad
    assert all(r.cost.questions == 10 for r in bad)


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_on_base_or_experts_is_a_sentence(demo: Path, tmp_path: Path, failure: Exception) -> None:
    path = write_study(tmp_path, demo)
    evaluator(tmp_path, calls={2: failure})
    with pytest.raises(MergeSearchError, match=r"'maths' itself cannot be scored.*out of memory.*smaller batch_size"):
        run(read_study_file(path), Quiet())


def test_out_of_memory_on_the_test_questions_is_a_sentence_and_loses_nothing(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo)
    mine = evaluator(tmp_path)
    study = run(read_study_file(path), Quiet())
    mine.fails = {mine.calls + 2: MemoryError()}
    with pytest.raises(MergeSearchError, match=r"out of memory while .* is tested.*smaller batch_size"):
        open_test(prepare(read_study_file(path)))
    assert len(study.user_attrs["test"]) == 1
    open_test(prepare(read_study_file(path)))
    assert len(study.user_attrs["test"]) > 1


def test_a_study_that_goes_on_after_its_test_says_that_the_proof_is_of_another_trial(
    demo: Path, tmp_path: Path
) -> None:
    path = write_study(tmp_path, demo, n_trials=9, finalists=2)
    evaluator(tmp_path)
    study = run(read_study_file(path), Quiet())
    tested, *others = [r.number for r in finished_records(study) if not r.label]
    study.set_user_attr("test_winner", tested)  # killed when it had opened the test and scored nothing
    study.set_user_attr("validation", {**study.user_attrs["validation"], str(others[0]): _all_right(study)})
    study.set_user_attr("search_posterior", {})
    for _ in range(2):
        refused = here("test", path, check=False)
        assert refused.returncode == 2
        assert (
            f"were opened for trial {tested}; the study went on, and its winner is now trial {others[0]}"
            in refused.stderr
        )
        assert str(tested) in study.user_attrs["test"], "what was opened is finished"
        assert str(others[0]) not in study.user_attrs["test"]
    assert "An honest one cannot be measured" in " ".join(here("report", path).stdout.split())
    again = " ".join(here("run", path).stdout.split())
    assert f"Note: the sealed test questions were opened for trial {tested};" in again
    here("export", path, tmp_path / "out")
    assert "An honest one cannot be measured" in (tmp_path / "out" / "README.md").read_text()


def _all_right(study: optuna.Study) -> Any:
    found = Evaluation.from_attribute(study.user_attrs["validation"]["0"])
    scores = {name: replace(s, values=np.ones(10), score=1.0) for name, s in found.scores.items()}
    return replace(found, scores=scores).to_attribute()


def test_a_trial_that_is_tried_again_draws_the_same_rows(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, "Learned", n_trials=5, learner=LEARNER)
    mine = evaluator(tmp_path, "Learned", losses={3: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run(read_study_file(path), Quiet())
    study = run(read_study_file(path), Quiet())
    done = finished_records(study)
    again = next(r for r in done if "learner" in r.attributes)
    assert again.attributes["retry_of"] < again.number
    assert mine.asked[:3] == mine.asked[3:6]
    scored = 10 * sum(r.is_scored for r in done)
    assert questions_asked(study) == 3 * sum(map(len, mine.asked)) + scored, "what was asked before Ctrl-C is asked"
