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
from failing_studies import LEARNER, Quiet, evaluator, write_study

from merge_search import cpu_matmul as products
from merge_search.engine.engine import MergeEngine
from merge_search.engine.learners.slopes import Parts
from merge_search.errors import EvaluationError, MergeSearchError
from merge_search.evaluation import Evaluation, Split
from merge_search.search.budget import questions_asked
from merge_search.search.prepare import prepare
from merge_search.search.records import finished_records
from merge_search.search.run import run
from merge_search.search.verdict.sealed import open_test
from merge_search.study_file import read_study_file


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
        (ValueError("a user's own mistake"), "evaluator_error"),
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


def test_a_loss_without_a_graph_ends_its_trial_and_says_so(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path, demo, "Learned", n_trials=5, learner=LEARNER)
    mine = evaluator(tmp_path, "Learned")
    monkeypatch.setattr(mine, "loss", lambda self, task, rows, kind="gold": 0.5)
    found = finished_records(run(read_study_file(path), Quiet()))
    (bad,) = [r for r in found if not r.is_scored]
    assert bad.outcome == "evaluator_error"
    assert bad.reason == "task 'norm': its loss must be a tensor with its graph through the live parameters, got float"


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


@pytest.mark.parametrize("n_trials", [1, 4])
def test_base_and_experts_count_before_their_baselines_and_not_again_with_them(
    demo: Path, tmp_path: Path, n_trials: int
) -> None:
    """Two references and, of the four baselines, the two that do not repeat them: ten questions each."""
    path = write_study(tmp_path, demo, n_trials=n_trials)
    evaluator(tmp_path)
    for _ in range(2):
        assert questions_asked(run(read_study_file(path), Quiet())) == (20 if n_trials == 1 else 40)


def test_questions_and_fits_run_on_fast_products_and_merges_do_not(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a processor where it pays, with models that are wide enough: what is written must not depend on it."""
    monkeypatch.setattr(products, "exact", lambda: True)
    monkeypatch.setattr(products, "_is_wide", lambda weights: True)
    path = write_study(tmp_path, demo, "Learned", n_trials=5, learner=LEARNER)
    mine, seen = evaluator(tmp_path, "Learned"), set()

    def noting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.add((name, torch.get_float32_matmul_precision()))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    noting(mine, "evaluate")
    noting(mine, "loss")
    noting(MergeEngine, "apply")
    noting(Parts, "merged")
    run(read_study_file(path), Quiet())
    assert seen == {("evaluate", "medium"), ("loss", "medium"), ("apply", "highest"), ("merged", "highest")}


def test_what_the_base_was_asked_before_ctrl_c_is_asked(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, "Counted", n_trials=1)
    evaluator(tmp_path, "Counted", calls={2: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run(read_study_file(path), Quiet())
    assert questions_asked(run(read_study_file(path), Quiet())) == 10 + 3 + 10


def test_a_budget_that_base_and_experts_use_up_ends_the_search_and_can_be_raised(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, questions=15)
    evaluator(tmp_path)
    text = " ".join(here("run", path).stderr.split())
    assert "At least 50 would" in text
    assert "20 of 15 questions are asked: the search ends here" in text
    path.write_text(path.read_text().replace("questions: 15", "questions: 60"))
    assert "60 of 60 questions are asked" in " ".join(here("run", path).stderr.split())


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


def test_out_of_memory_of_the_winner_on_the_test_questions_is_a_sentence_and_tried_again(
    demo: Path, tmp_path: Path
) -> None:
    path = write_study(tmp_path, demo)
    mine = evaluator(tmp_path)
    study = run(read_study_file(path), Quiet())
    mine.fails = {mine.calls + 1: MemoryError()}
    with pytest.raises(MergeSearchError, match=r"out of memory while .* is tested.*smaller batch_size"):
        open_test(prepare(read_study_file(path)))
    assert not study.user_attrs.get("test")
    open_test(prepare(read_study_file(path)))
    assert len(study.user_attrs["test"]) > 1


def test_the_test_stays_sealed_until_search_and_validation_have_ended(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, finalists=2)
    mine = evaluator(tmp_path, calls={6: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run(read_study_file(path), Quiet())
    refused = here("test", path, check=False)
    assert refused.returncode == 2
    assert "the search has not ended" in refused.stderr
    mine.fails = {}
    study = run(read_study_file(path), Quiet())
    assert "test_winner" not in study.user_attrs
    assert here("test", path).returncode == 0


def test_search_validation_and_test_ask_each_the_questions_of_their_own_split(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, finalists=2)
    mine = evaluator(tmp_path)
    study = run(read_study_file(path), Quiet())
    n_validated = len(study.user_attrs["validation"])
    assert n_validated > 2
    assert mine.splits[-n_validated:] == [Split.VALIDATION] * n_validated
    assert set(mine.splits[:-n_validated]) == {Split.SEARCH}
    del mine.splits[:]
    open_test(prepare(read_study_file(path)))
    assert set(mine.splits) == {Split.TEST}
    assert len(mine.splits) == len(study.user_attrs["test"]) > 2


def test_an_export_is_of_the_study_that_was_run_whatever_its_file_says_now(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo)
    evaluator(tmp_path)
    run(read_study_file(path), Quiet())
    here("export", path, tmp_path / "one")
    changed = yaml.safe_load(path.read_text())
    changed["objective"] = {"minimise": "norm"}
    changed["models"]["experts"] |= {"fourth": changed["models"]["experts"]["maths"]}
    path.write_text(yaml.safe_dump(changed))
    here("export", path, tmp_path / "two")
    assert (tmp_path / "one" / "recipe.json").read_text() == (tmp_path / "two" / "recipe.json").read_text()
    changed["models"]["experts"] = {"fourth": changed["models"]["experts"]["maths"]}
    path.write_text(yaml.safe_dump(changed))
    refused = here("export", path, tmp_path / "three", check=False)
    assert "every expert of the trial; maths is not there any more" in " ".join(refused.stderr.split())


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
