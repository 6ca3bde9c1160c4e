"""The outer loop from the outside, on real checkpoints: several objectives, a stop rule, a warm start, PostgreSQL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
import yaml
from command_line import ENV, alone, here
from optuna.trial import TrialState

from merge_search.search.records import finished_records, records
from merge_search.search.storage import open_storage

EXPERTS = ["maths", "stories", "spelling"]
SWAPPED = {"search": 0.2, "validation": 0.2, "test": 0.6}  # what was searched on would be tested on


def write_study(folder: Path, demo: Path, name: str = "loop", **sections: Any) -> Path:
    tasks = {"evaluator": "lm_eval", "tasks": [f"demo_{e}" for e in EXPERTS], "include_path": str(demo / "tasks")}
    data: dict[str, Any] = {
        "study": {"name": name, "seed": 1},
        "models": {
            "base": str(demo / "models" / "base"),
            "experts": {e: str(demo / "models" / e) for e in EXPERTS},
            "dtype": "float32",
        },
        "space": {"type": "uniform", "presets": ["task_arithmetic"]},
        "evaluate": [{**tasks, "batch_size": 64, "limit": 40}],
        "search": {"baselines": [], "finalists": 2},
        "device": "cpu",
    }
    for key, value in sections.items():
        data[key] = {**data[key], **value} if isinstance(data.get(key), dict) else value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def load(path: Path) -> optuna.Study:
    return optuna.load_study(study_name=path.stem, storage=f"sqlite:///{path.with_suffix('.db')}")


@pytest.fixture(scope="module")
def two(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study of score against drift, with a constraint that no baseline meets, and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    lm_eval = yaml.safe_load(write_study(folder, demo).read_text())["evaluate"][0]
    texts = {"texts": [f"demo_{e}/train.jsonl" for e in EXPERTS], "key": "query", "limit": 30}
    drift = {"evaluator": "drift", "include_path": str(demo / "tasks"), "max_length": 16, **texts}
    path = write_study(
        folder,
        demo,
        evaluate=[lm_eval, drift],
        objective={"maximise": "mean", "minimise": "drift/kl", "constraints": ["demo_maths >= 0.999", "drift <= 50"]},
        search={"n_trials": 9, "sampler": "random", "baselines": [], "finalists": 2},
    )
    result = here("run", path)
    return path, result.stdout + result.stderr


def test_drift_is_none_for_the_base_and_grows_with_the_merge(two: tuple[Path, str]) -> None:
    by_label = {r.label: r.values[1] for r in finished_records(load(two[0])) if r.label}
    assert by_label["base"] == pytest.approx(0, abs=1e-4)
    assert all(by_label[e] > 0.01 for e in EXPERTS)


def test_a_constraint_that_no_baseline_meets_is_said_once_with_the_number_that_would_do(two: tuple[Path, str]) -> None:
    _, text = two
    assert text.count("is met by none of the") == 1
    assert "'demo_maths >= 0." in text
    assert "drift <= 50' (" not in text
    assert "searched merges meets the constraints; trial" in text


def test_constraints_and_both_noises_reach_the_sampler(two: tuple[Path, str]) -> None:
    for trial in load(two[0]).get_trials(states=(TrialState.COMPLETE,)):
        assert set(trial.constraints) == {"demo_maths >= 0.999", "drift <= 50"}
        assert len(trial.user_attrs["noise"]["values"]) == 2
        assert {f"constraint:{c}" for c in trial.constraints} < trial.user_attrs["noise"].keys()


def test_the_right_answers_probability_is_kept_per_question(two: tuple[Path, str]) -> None:
    for record in finished_records(load(two[0])):
        found = record.evaluation.scores["demo_stories/acc"]
        assert found.probability is not None
        assert found.probability.shape == found.values.shape


def test_report_lists_trials_and_front_without_torch(two: tuple[Path, str]) -> None:
    path, _ = two
    text = here("report", path, "--trials", "5").stdout
    assert "front (search questions)" in text
    assert "9 trials, 0 of them failed" in text
    code = (
        f"import sys; from merge_search.cli import main\ntry: main(['report', {str(path)!r}])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_the_stop_rule_ends_a_search_and_resuming_does_not_begin_it_again(demo: Path, tmp_path: Path) -> None:
    stop = {"patience": 2, "share": 50}
    path = write_study(tmp_path, demo, search={"n_trials": 60, "sampler": "random", "stop": stop})
    text = here("run", path).stderr
    assert "the search stops: none of the last 2 suggestions" in text
    done = len(finished_records(load(path)))
    assert done < 60
    again = here("run", path)
    assert "the search stops" in again.stderr
    assert len(finished_records(load(path))) == done
    assert "95 % interval" in again.stdout


def test_an_earlier_studys_best_are_tried_after_the_baselines_and_scored_afresh(demo: Path, tmp_path: Path) -> None:
    objective = {"maximise": ["mean", "demo_spelling"]}
    path = write_study(tmp_path, demo, name="old", objective=objective, search={"n_trials": 9, "sampler": "random"})
    here("run", path)
    _test_opens_the_front(path)
    old = [r for r in finished_records(load(path)) if not r.label]
    best = max(old, key=lambda r: (r.values[0], -r.number))
    names = {"a": "maths", "b": "spelling", "c": "stories"}  # the engine adds experts in the order of their names
    models = {"experts": {new: str(demo / "models" / was) for new, was in names.items()}}
    search = {"n_trials": 7, "learn_from": [{"file": "old.yaml", "best": 1}, "gone.yaml"]}
    data = yaml.safe_load(write_study(tmp_path, demo, name="new", search=search).read_text())
    data["models"] |= models
    new = tmp_path / "new.yaml"
    new.write_text(yaml.safe_dump(data, sort_keys=False))
    text = here("run", new).stderr
    assert "1 recipe(s) of study 'old' are tried first" in text
    assert "gone.yaml" in text
    found = next(r for r in records(load(new)) if r.attributes.get("start") == f"old.yaml trial {best.number}")
    assert found.number == 6
    assert found.weights_sha256 == best.weights_sha256
    assert found.cost.questions > 0


def _test_opens_the_front(path: Path) -> None:
    """With several objectives the test is sealed for the whole front, and an export asks for a number."""
    changed = path.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "splits": SWAPPED}))
    refused = here("test", changed, check=False)
    assert refused.returncode == 1
    assert "splits.test: was 0.2, is now 0.6" in refused.stderr
    assert "test_winner" not in load(path).user_attrs
    text = here("test", path).stdout
    opened = load(path).user_attrs["test_winner"]
    assert isinstance(opened, list)
    assert set(map(str, opened)) <= load(path).user_attrs["test"].keys()
    assert "beats in everything on the test questions" in text
    if len(opened) > 1:
        result = here("export", path, path.parent / "out", check=False)
        assert result.returncode == 2
        assert "choose one with --trial" in result.stderr


def _wait_for(storage: optuna.storages.RDBStorage, n: int, process: subprocess.Popen[bytes]) -> None:
    """Until `n` trials are finished and another is running."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            trials = optuna.load_study(study_name="loop", storage=storage).get_trials(deepcopy=False)
        except KeyError:  # not begun
            trials = []
        if sum(t.state.is_finished() for t in trials) >= n and any(t.state == TrialState.RUNNING for t in trials):
            return
        time.sleep(0.02)
    raise AssertionError(f"the run ended (status {process.poll()}) before {n} trials were finished")


@pytest.fixture
def postgresql() -> Callable[[str], str]:
    """URL of a database of one's own on the server that MERGE_SEARCH_POSTGRESQL names."""
    server = os.environ.get("MERGE_SEARCH_POSTGRESQL")
    if not server:
        pytest.skip("MERGE_SEARCH_POSTGRESQL is not set")

    def make(name: str) -> str:
        engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
            connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return str(sqlalchemy.engine.make_url(server).set(database=name).render_as_string(hide_password=False))

    return make


def test_on_postgresql_kill_9_loses_nothing_and_a_second_driver_is_refused(
    demo: Path, tmp_path: Path, postgresql: Callable[[str], str]
) -> None:
    url = postgresql("merge_search_loop_test")
    path = write_study(tmp_path, demo, study={"storage": url}, search={"n_trials": 12, "sampler": "random"})
    line = [sys.executable, "-m", "merge_search", "run", str(path)]
    storage = open_storage(url)
    for n in (2, 7):
        first = subprocess.Popen(line, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _wait_for(storage, n, first)
        if n == 2:
            first.send_signal(signal.SIGSTOP)  # holds its lock, and cannot finish meanwhile
            second = alone("run", path, check=False)
            assert second.returncode == 1
            assert "is being run by another process" in second.stderr
        first.send_signal(signal.SIGKILL)
        first.wait()
    kept = [r.number for r in finished_records(optuna.load_study(study_name="loop", storage=storage))]
    text = alone("run", path).stderr
    assert "of a killed run is closed, and its point queued again" in text
    done = finished_records(optuna.load_study(study_name="loop", storage=storage))
    assert len(done) == 12
    assert [r.number for r in done][: len(kept)] == kept
    fingerprints = [r.attributes["fingerprint"] for r in done if "same_as" not in r.attributes]
    assert len(set(fingerprints)) == len(fingerprints)
    storage.remove_session()
    storage.engine.dispose()
