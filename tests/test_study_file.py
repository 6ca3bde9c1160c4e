"""A study file is refused with every problem, its line, and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_search.errors import StudyFileError
from merge_search.study_file import read_study_file

GOOD = """\
study: {name: skills, storage: sqlite:///skills.db, seed: 3}
models:
  base: models/base
  experts: {maths: models/maths, stories: org/stories}
space: {type: compatibility, coefficients: {per: block, bounds: [0, 1.5]}}
evaluate:
  - {evaluator: lm_eval, tasks: [a, b], include_path: tasks/, batch_size: 32}
objective: {maximise: mean_retention}
search: {sampler: botorch, n_trials: 40}
device: auto
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def test_the_documented_shape_is_read(tmp_path: Path) -> None:
    file = read_study_file(write(tmp_path, GOOD))
    assert file.search.n_trials == 40
    assert file.objective.maximise == ["mean_retention"]
    assert file.space.options == {"coefficients": {"per": "block", "bounds": [0, 1.5]}}
    assert file.evaluate[0].options["tasks"] == ["a", "b"]


def test_relative_paths_are_relative_to_the_study_file(tmp_path: Path) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    file = read_study_file(write(tmp_path, GOOD))
    assert file.model_reference("models/base") == str(tmp_path / "models" / "base")
    assert file.model_reference("org/stories") == "org/stories"
    assert file.storage_url == f"sqlite:///{tmp_path / 'skills.db'}"


def test_all_problems_come_in_one_message_with_lines_and_nearest_keys(tmp_path: Path) -> None:
    text = GOOD.replace("n_trials: 40", "n_trails: 40, finalists: 0").replace(
        "study: {name: skills", "study: {name: 'a b'"
    )
    with pytest.raises(StudyFileError) as caught:
        read_study_file(write(tmp_path, text))
    assert len(caught.value.problems) == 3
    assert "line 9: search.n_trails: unknown key; did you mean 'n_trials'?" in caught.value.problems
    assert any(
        p.startswith("line 9: search.finalists: input should be greater than or equal to 1, got 0")
        for p in caught.value.problems
    )
    assert any(p.startswith("line 1: study.name") for p in caught.value.problems)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("{learner: {step: 3}}", "search.learner.step: unknown key; did you mean 'steps'"),
        ("{racing: {look: 1}}", "search.racing.look: unknown key; did you mean 'looks'"),
        ("{stop: {patence: 1}}", "search.stop.patence: unknown key; did you mean 'patience'"),
        ("{learn_from: [{fil: x}]}", "search.learn_from.0.fil: unknown key; did you mean 'file'"),
    ],
)
def test_keys_of_inner_sections_get_the_nearest_known_one(tmp_path: Path, search: str, message: str) -> None:
    text = GOOD.replace("{sampler: botorch, n_trials: 40}", search)
    with pytest.raises(StudyFileError) as caught:
        read_study_file(write(tmp_path, text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must be a mapping"),
        ("a: [", "not YAML"),
        (GOOD + "device: cpu\n", "line 11: key 'device' stands twice"),
        (GOOD.replace("  base: models/base\n", ""), "line 2: models.base: is missing"),
        (GOOD.replace("{maths: models/maths, stories: org/stories}", "{}"), "at least 1 item"),
        (GOOD + "splits: {search: 0.5, validation: 0.2, test: 0.2}\n", "shares must sum to 1, got 0.9"),
        (GOOD.replace("maths:", "base:"), "not 'base'"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StudyFileError, match=message):
        read_study_file(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyFileError, match=r"no such file: .*nowhere\.yaml"):
        read_study_file(tmp_path / "nowhere.yaml")
