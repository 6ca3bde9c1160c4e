"""DF-Merge from a study file: Fisher information at anchors once, exact for the finalists, the same after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from merge_search.search.records import Record, finished_records
from merge_search.search.run import run
from merge_search.study_file import read_study_file

EXPERTS = ("maths", "stories")
ROWS = 3 * (4 + 4)  # a forward and a backward pass of four rows of each expert's task


class Listener:
    """Presses Ctrl-C after so many trials."""

    def __init__(self, stop_after: int = 10_000) -> None:
        self.left, self.notes = stop_after, list[str]()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, **_: int) -> None: ...

    def end(self) -> None: ...

    def trial(self, record: Record, **_: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def write_study(folder: Path, demo: Path, space: dict[str, Any], **search: Any) -> Path:
    study = {
        "study": {"name": "df", "seed": 3},
        "models": {
            "base": str(demo / "models" / "base"),
            "experts": {e: str(demo / "models" / e) for e in EXPERTS},
            "dtype": "float32",
        },
        "space": {"type": "df_merge", **space},
        "evaluate": [
            {"evaluator": "lm_eval", "tasks": [f"demo_{e}" for e in EXPERTS], "include_path": str(demo / "tasks"),
             "batch_size": 64, "limit": 24, "fit_limit": 4}
        ],
        "search": {"n_trials": 13, "finalists": 2, "baselines": [], "sampler_options": {"n_startup": 8}, **search},
        "statistics": {"n_rows": 30}, "device": "cpu",
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder / "study.yaml"


def searched(study: optuna.Study) -> list[Record]:
    return [r for r in finished_records(study) if not r.label]


def test_a_candidate_asks_for_its_scoring_alone_and_the_finalists_are_merged_exactly(
    demo: Path, tmp_path: Path
) -> None:
    path = write_study(tmp_path, demo, {"anchors": 0.5})
    study = run(read_study_file(path), Listener())
    done = searched(study)
    *interpolated, one, two = done
    scoring = sum(len(s.values) for s in one.evaluation.scores.values())
    measured = [r.cost.questions - scoring for r in interpolated]
    assert len(interpolated) == 13 - 2 - len(EXPERTS) - 1  # average and task arithmetic, base and experts
    assert sum(measured) <= 3 * ROWS  # at 0, 0.5 and 1, once
    assert measured[3:] == [0] * len(measured[3:])
    for exact in (one, two):
        of = next(r for r in interpolated if exact.attributes["start"] == f"exact.{r.number}")
        assert dict(exact.recipe.coefficients) == dict(of.recipe.coefficients)
        assert "anchors" not in exact.recipe.splice.score.options  # type: ignore[union-attr]
        assert exact.cost.questions - scoring == ROWS
        assert exact.weights_sha256 != of.weights_sha256
    again = run(read_study_file(path), Listener())
    assert [r.number for r in searched(again)] == [r.number for r in done]


def test_a_stopped_study_goes_on_with_the_same_candidates_and_exact_forms(demo: Path, tmp_path: Path) -> None:
    space = {"anchors": 0.5, "answers": "all"}
    whole = run(read_study_file(write_study(tmp_path / "whole", demo, space)), Listener())
    path = write_study(tmp_path / "parts", demo, space)
    for after in (7, 7):
        with pytest.raises(KeyboardInterrupt):
            run(read_study_file(path), Listener(after))
    parts = run(read_study_file(path), Listener())
    assert [(r.number, r.recipe, r.values) for r in searched(parts)] == [
        (r.number, r.recipe, r.values) for r in searched(whole)
    ]


def test_a_budget_that_is_used_up_leaves_the_finalists_as_they_are_and_says_so(demo: Path, tmp_path: Path) -> None:
    listener = Listener()
    study = run(read_study_file(write_study(tmp_path, demo, {"anchors": 0.5}, questions=330)), listener)
    assert not any(str(r.attributes["start"]).startswith("exact.") for r in searched(study))
    assert any(text.startswith("the finalists are not merged exactly: ") for text in listener.notes)
