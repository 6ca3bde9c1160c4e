"""The product from the outside: run, kill, resume, refuse, export, merge, on the demo's real checkpoints."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lm_eval.tasks
import optuna
import pytest
import yaml
from command_line import alone, here
from optuna.trial import TrialState

from merge_search.objective import Objective
from merge_search.search.records import Record, finished_records, objective_of, records, references_of

TASKS = ["demo_maths", "demo_stories", "demo_spelling"]
EXPERTS = ["maths", "stories", "spelling"]
N_TRIALS = 14


def study_text(demo: Path, **changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "study": {"name": "tiny", "storage": "sqlite:///tiny.db", "seed": 1},
        "models": {
            "base": str(demo / "models" / "base"),
            "experts": {e: str(demo / "models" / e) for e in EXPERTS},
            "dtype": "float32",
        },
        "space": {
            "type": "compatibility",
            "coefficients": {"per": "expert", "bounds": [0, 1.5]},
            "presets": ["task_arithmetic", "ties", "dare"],
        },
        "evaluate": [
            {"evaluator": "lm_eval", "tasks": TASKS, "include_path": str(demo / "tasks"), "batch_size": 64, "limit": 60}
        ],
        "search": {"n_trials": N_TRIALS, "finalists": 2},
        "device": "cpu",
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    return data


def write_study(folder: Path, data: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def load(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="tiny", storage=f"sqlite:///{folder / 'tiny.db'}")


@pytest.fixture(scope="module")
def finished(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study that ran to its end, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    result = alone("run", write_study(folder, study_text(demo)))
    return folder, result.stdout + result.stderr


def test_every_lead_of_the_demo_is_real_so_the_rule_changes_no_number(
    finished: tuple[Path, str],
) -> None:
    study = load(finished[0])
    objective, experts = objective_of(study)
    metrics = list(objective.metrics.values())
    references = references_of(study, metrics, experts)
    assert objective.lead == 2.0
    assert not objective.without_lead(references)
    without_the_rule = Objective(["mean_retention"], [], [], metrics)
    for record in finished_records(study):
        assert record.values == (without_the_rule.values(record.evaluation, references)[0].value,)
    assert (
        "objective: mean_retention is made of demo_maths 0.333, demo_stories 0.333, demo_spelling 0.333" in finished[1]
    )


def test_every_trial_is_stored_with_all_that_is_known(finished: tuple[Path, str]) -> None:
    done = finished_records(load(finished[0]))
    assert len(done) == N_TRIALS
    for record in done:
        assert record.is_scored
        assert record.weights_sha256
        assert record.attributes["noise"]["value"] > 0
        assert len(record.recipe.models.hashes) == 4
        assert {
            f"{t}/acc" in record.evaluation.scores or f"{t}/exact_match" in record.evaluation.scores for t in TASKS
        } == {True}
        assert all(len(s.values) >= 2 for s in record.evaluation.scores.values())


def test_baselines_come_first_and_define_retention(finished: tuple[Path, str]) -> None:
    first = records(load(finished[0]))[:7]
    assert [r.label for r in first] == ["base", *EXPERTS, "average", "task_arithmetic", "tsv_m"]
    assert first[0].values == (0.0,)
    assert all(r.values[0] < 1 for r in first[:4])


def test_the_table_has_base_experts_baseline_and_merge(finished: tuple[Path, str]) -> None:
    text = finished[1]
    for row in ("base", "expert: maths", "expert: stories", "expert: spelling", "merge: trial"):
        assert row in text
    assert "95 % interval" in text


def test_running_again_changes_nothing(finished: tuple[Path, str]) -> None:
    before = load(finished[0]).trials
    text = here("run", finished[0] / "study.yaml")
    assert load(finished[0]).trials == before
    assert f"resuming: {N_TRIALS} of {N_TRIALS}" in text.stderr


def test_more_trials_go_on_from_the_stored_ones(finished: tuple[Path, str], demo: Path, tmp_path: Path) -> None:
    for name in ("tiny.db", "tiny.db-wal"):
        if (finished[0] / name).exists():
            (tmp_path / name).write_bytes((finished[0] / name).read_bytes())
    here("run", write_study(tmp_path, study_text(demo, search={"n_trials": N_TRIALS + 2})))
    before, after = load(finished[0]).trials, load(tmp_path).trials
    assert after[:N_TRIALS] == before[:N_TRIALS]
    assert len(finished_records(load(tmp_path))) == N_TRIALS + 2


def test_a_changed_study_is_refused_with_the_difference(finished: tuple[Path, str], demo: Path) -> None:
    path = finished[0] / "other.yaml"
    data = study_text(demo, space={"coefficients": {"per": "expert", "bounds": [0, 2]}})
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    result = here("run", path, check=False)
    assert result.returncode == 1
    assert "space.coefficients.bounds: was [0, 1.5], is now [0, 2]" in result.stderr


def test_the_exported_model_is_the_scored_model(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder = finished[0]
    out = tmp_path / "best"
    alone("export", folder / "study.yaml", out, "--trial", "6")
    record = records(load(folder))[6]
    code = f"""
import json
from merge_search.engine.resident.live_model import LiveModel
from merge_search.evaluation import Split, SplitShares
from evaluators.lm_eval.evaluator import LmEval
live = LiveModel.load({str(out)!r}, device="cpu")
study = __import__("yaml").safe_load(open({str(folder / "study.yaml")!r}))
options = dict(study["evaluate"][0]); options.pop("evaluator")
evaluator = LmEval(options, shares=SplitShares(), seed=1)
evaluator.bind(live.model, live.tokenizer, folder={str(out)!r})
print(json.dumps([live.hash(), evaluator.evaluate(Split.SEARCH).to_attribute()["scores"]]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    digest, scores = json.loads(result.stdout.splitlines()[-1])
    assert digest == record.weights_sha256
    assert scores == record.attributes["evaluation"]["scores"]
    card = (out / "README.md").read_text()
    assert "| base |" in card
    assert record.weights_sha256 in card


def test_a_recipe_alone_gives_the_same_folder(finished: tuple[Path, str], tmp_path: Path) -> None:
    here("export", finished[0] / "study.yaml", tmp_path / "a")
    alone("merge", tmp_path / "a" / "recipe.json", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


def test_an_export_never_overwrites(finished: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = here("export", finished[0] / "study.yaml", tmp_path, check=False)
    assert result.returncode != 0
    assert "not empty" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt"]


def test_kill_9_in_mid_trial_loses_nothing_and_repeats_nothing(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, study_text(demo))
    for kill_after in (3, 8):
        process = subprocess.Popen(
            [sys.executable, "-m", "merge_search", "run", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_for(tmp_path, kill_after, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept: list[Record] = finished_records(load(tmp_path))
    here("run", path)
    study = load(tmp_path)
    done = finished_records(study)
    assert len(done) == N_TRIALS
    assert [r.number for r in done][: len(kept)] == [r.number for r in kept]
    fingerprints = [r.attributes["fingerprint"] for r in done if "same_as" not in r.attributes]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all("evaluation" in t.user_attrs for t in study.get_trials(states=(TrialState.COMPLETE,)))


def _wait_for(folder: Path, n: int, process: subprocess.Popen[bytes]) -> None:
    """Until `n` trials are finished and another is running."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            trials = load(folder).get_trials(deepcopy=False)
        except Exception:  # the database is not there yet
            trials = []
        if sum(t.state.is_finished() for t in trials) >= n and any(t.state == TrialState.RUNNING for t in trials):
            return
        time.sleep(0.02)
    raise AssertionError(f"the run ended (status {process.poll()}) before {n} trials were finished")


def test_weights_that_overflow_are_a_typed_failure_and_the_study_goes_on(demo: Path, tmp_path: Path) -> None:
    space = {"coefficients": {"per": "expert", "bounds": [0, 1e9]}, "presets": ["task_arithmetic"]}
    search = {"n_trials": 16, "sampler": "random", "baselines": [], "finalists": 1}
    data = study_text(demo, models={"dtype": "float16"}, space=space, search=search)
    data["evaluate"][0]["limit"] = 20  # half precision is slow on a CPU
    here("run", write_study(tmp_path, data))
    done = finished_records(load(tmp_path))
    assert len(done) == 16
    failed = [r for r in done if not r.is_scored]
    assert failed
    for record in failed:
        assert record.outcome == "non_finite"
        assert record.reason
        assert record.values == ()


def test_all_problems_of_a_study_come_before_any_weight(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(tmp_path / "none" / "manager.py"))  # no 6 s index
    data = study_text(
        demo,
        models={"experts": {"maths": str(tmp_path / "nowhere"), "stories": str(demo / "models" / "stories")}},
        space={"density": {"per": "expert", "bounds": [0, 1]}},
        evaluate=[{"evaluator": "lm_eval", "tasks": ["demo_math"], "include_path": str(demo / "tasks")}],
        search={"sampler": "botroch"},
    )
    result = here("run", write_study(tmp_path, data), check=False)
    assert result.returncode == 2
    for part in (
        "expert 'maths'",
        "nowhere",
        "densities must lie in (0, 1]",
        "did you mean 'demo_maths'?",
        "did you mean 'botorch'?",
    ):
        assert part in result.stderr.replace("\n", " "), result.stderr
    assert not list(tmp_path.glob("*.db"))
