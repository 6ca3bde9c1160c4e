"""The stop rule: its formula, what it reads, and that it ends a flat search and not a rising one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from merge_search.search.records import finished_records
from merge_search.search.samplers import make_sampler, suggest
from merge_search.search.stopping import GAIN_ATTRIBUTE, expected_gain, expected_improvement, reason_to_stop
from merge_search.search.storage import open_storage
from merge_search.space import Float, Parameter
from merge_search.study_file import Stop

SPACE: dict[str, Parameter] = {"x": Float(0, 1), "y": Float(0, 1)}


def test_expected_improvement_by_hand() -> None:
    assert expected_improvement(0.0, 1.0) == pytest.approx(1 / math.sqrt(2 * math.pi))
    assert expected_improvement(2.0, 0.0) == 2.0
    assert expected_improvement(-2.0, 0.0) == 0.0
    assert expected_improvement(-8.0, 1.0) < 1e-14


def finished(folder: Path, values: list[tuple[float, float, float]], variance: float = 1e-4) -> optuna.Study:
    """A study of trials (x, y, value)."""
    study = optuna.create_study(storage=open_storage(f"sqlite:///{folder / 's.db'}"), direction="maximize")
    for x, y, value in values:
        study.enqueue_trial({"x": x, "y": y})
        trial = study.ask()
        suggest(trial, SPACE)
        trial.set_user_attr("noise", {"value": variance})
        trial.set_user_attr("outcome", "ok")
        study.tell(trial, value)
    return study


def hill(x: float, y: float) -> float:
    return 0.7 - (x - 0.3) ** 2 - (y - 0.6) ** 2


GRID = [(x / 3, y / 3) for x in range(4) for y in range(4)]


def test_the_gain_is_small_beside_the_best_and_larger_where_nothing_is_known(tmp_path: Path) -> None:
    study = finished(tmp_path, [(x, y, hill(x, y)) for x, y in GRID])
    known = expected_gain(study, SPACE, {"x": 1 / 3, "y": 2 / 3}, number=99, seed=0)
    worse = expected_gain(study, SPACE, {"x": 1.0, "y": 0.0}, number=99, seed=0)
    better = expected_gain(study, SPACE, {"x": 0.3, "y": 0.6}, number=99, seed=0)
    assert known is not None
    assert worse is not None
    assert better is not None
    assert known.se == pytest.approx(0.01)
    assert worse.gain < 1e-6
    assert better.gain > 3 * max(known.gain, worse.gain)


def test_a_trials_own_result_does_not_enter_what_was_expected_of_it(tmp_path: Path) -> None:
    rows = [(x, y, hill(x, y)) for x, y in GRID]
    (tmp_path / "longer").mkdir()
    longer = finished(tmp_path / "longer", [*rows, (0.3, 0.6, 5.0)])
    before = expected_gain(finished(tmp_path, rows), SPACE, {"x": 0.3, "y": 0.6}, number=len(rows), seed=0)
    assert expected_gain(longer, SPACE, {"x": 0.3, "y": 0.6}, number=len(rows), seed=0) == before


def test_too_few_trials_promise_nothing_known(tmp_path: Path) -> None:
    study = finished(tmp_path, [(x, y, hill(x, y)) for x, y in GRID[:5]])
    assert expected_gain(study, SPACE, {"x": 0.5, "y": 0.5}, number=99, seed=0) is None


def test_infeasible_trials_are_no_incumbent(tmp_path: Path) -> None:
    study = finished(tmp_path, [(x, y, hill(x, y)) for x, y in GRID])
    other = optuna.create_study(storage=open_storage(f"sqlite:///{tmp_path / 't.db'}"), direction="maximize")
    for x, y in GRID:
        other.enqueue_trial({"x": x, "y": y})
        trial = other.ask()
        suggest(trial, SPACE)
        trial.set_user_attr("noise", {"value": 1e-4, "constraint:c": 1e-4})
        trial.set_user_attr("outcome", "ok")
        trial.set_constraint("c", x - 0.1)  # only x = 0 will do
        other.tell(trial, hill(x, y))
    free = expected_gain(study, SPACE, {"x": 0.1, "y": 0.6}, number=99, seed=0)
    bound = expected_gain(other, SPACE, {"x": 0.1, "y": 0.6}, number=99, seed=0)
    assert free is not None
    assert bound is not None
    assert bound.gain > free.gain


def with_gains(folder: Path, gains: list[float]) -> list[Any]:
    study = optuna.create_study(storage=open_storage(f"sqlite:///{folder / 'g.db'}"), direction="maximize")
    for g in gains:
        trial = study.ask()
        trial.set_user_attr(GAIN_ATTRIBUTE, [g, 0.02])
        trial.set_user_attr("outcome", "ok")
        study.tell(trial, 0.5)
    return finished_records(study)


def test_it_stops_when_enough_in_a_row_promise_too_little(tmp_path: Path) -> None:
    records = with_gains(tmp_path, [0.1, 0.001, 0.0015, 0.0019])
    assert not reason_to_stop(records, Stop(patience=4, share=0.1))
    assert not reason_to_stop(records, Stop(patience=3, share=0.05))
    assert not reason_to_stop([], Stop())
    assert not reason_to_stop(records[:3], Stop(patience=4, share=10))
    text = reason_to_stop(records, Stop(patience=3, share=0.1))
    assert "last 3 suggestions" in text
    assert "0.0019" in text


def test_a_flat_search_ends_early_whatever_the_sampler(tmp_path: Path) -> None:
    """Chance suggests; the values are equal, so nothing is left to gain."""
    stop = Stop(patience=4, share=0.2)
    study = finished(tmp_path, [(x, y, 0.5) for x, y in GRID[:9]], variance=4e-4)
    study.sampler = make_sampler("random", parameters=SPACE, seed=0)
    for _ in range(40):
        if reason_to_stop(finished_records(study), stop):
            break
        trial = study.ask()
        point = suggest(trial, SPACE)
        gain = expected_gain(study, SPACE, point, number=trial.number, seed=trial.number)
        assert gain is not None
        trial.set_user_attr(GAIN_ATTRIBUTE, list(gain))
        trial.set_user_attr("noise", {"value": 4e-4})
        trial.set_user_attr("outcome", "ok")
        study.tell(trial, 0.5)
    assert len(study.trials) < 45
    assert reason_to_stop(finished_records(study), stop)
