"""A study that version 0.1.0 stored is read, resumed and delivered as if nothing had happened.

`data/study_0_1_0` is what that version left behind when it was killed in the middle of a trial (`record_study.py`).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import optuna
import pytest
from command_line import alone, here
from optuna.trial import FrozenTrial, TrialState

FIXTURE = Path(__file__).parent / "data" / "study_0_1_0"
NAME = "model.safetensors"
N_TRIALS = 17


@pytest.fixture
def study(demo: Path, tmp_path: Path) -> Path:
    """The study file of a copy, the demo's models and tasks beside it."""
    folder = tmp_path / "study"
    shutil.copytree(FIXTURE, folder)
    (folder / "demo").symlink_to(demo, target_is_directory=True)
    return folder / "study.yaml"


def trials(study: Path) -> list[FrozenTrial]:
    return optuna.load_study(study_name="kept", storage=f"sqlite:///{study.parent / 'kept.sqlite'}").get_trials()


def learned(study: Path) -> FrozenTrial:
    """The last trial that fitted coefficients by output row."""
    return [t for t in trials(study) if "learner" in t.user_attrs][-1]


INTERVAL = re.compile(r"\[([-+]\d\.\d+), ([-+]\d\.\d+)\]")


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_the_study_was_killed_in_a_trial_with_most_of_its_budget_spent(study: Path) -> None:
    states = [t.state for t in trials(study)]
    assert states.count(TrialState.RUNNING) == 1
    assert sum(s.is_finished() for s in states) == N_TRIALS - 2
    assert set(learned(study).user_attrs["learner"]) >= {"per", "steps", "losses"}
    assert len(list((study.parent / "kept.maps").iterdir())) >= 3


def test_its_report_is_what_it_was_but_for_a_wider_interval(study: Path) -> None:
    """0.1.0 took the normal distribution for Student's."""
    then, now = (FIXTURE / "report.txt").read_text(), alone("report", study, "--trials", "0").stdout
    assert lines(INTERVAL.sub("[]", now)) == lines(INTERVAL.sub("[]", then))
    ((low, high),), ((low_then, high_then),) = INTERVAL.findall(now), INTERVAL.findall(then)
    assert float(low) < float(low_then)
    assert float(high) > float(high_then)


@pytest.mark.slow
def test_a_run_takes_up_the_lost_trial_leaves_the_others_alone_and_goes_on_to_the_end(study: Path) -> None:
    before = trials(study)
    lost = next(t for t in before if t.state == TrialState.RUNNING)
    result = here("run", study)
    after, said = trials(study), " ".join(result.stderr.split())  # lines are as wide as the terminal
    assert f"resuming: {N_TRIALS - 2} of {N_TRIALS} trials are finished" in said
    assert f"trial {lost.number} of a killed run is closed, and its point queued again" in said
    assert [t for t in after if t.number < lost.number] == [t for t in before if t.number < lost.number]
    closed, again, *rest = after[lost.number :]
    assert (closed.state, closed.user_attrs["outcome"], closed.params) == (TrialState.FAIL, "lost", lost.params)
    assert again.user_attrs["retry_of"] == lost.number
    assert again.params == lost.params
    assert lost.params["learner.steps"] == again.user_attrs["learner"]["steps"]
    assert len(rest) == 1
    assert not {"start", "retry_of", "label"} & rest[0].user_attrs.keys()
    for trial in (again, *rest):
        assert trial.state == TrialState.COMPLETE
        assert trial.user_attrs.keys() >= {"recipe", "evaluation", "noise", "weights_sha256", "cost", "outcome"}
    assert "95 % interval" in " ".join(result.stdout.split())


def test_the_winner_is_exported_with_the_weights_that_were_scored_and_its_card(study: Path, tmp_path: Path) -> None:
    """The export itself compares the hash with the stored one."""
    said = here("export", study, tmp_path / "best").stdout
    assert any(t.user_attrs.get("weights_sha256", "none") in said for t in trials(study))
    now, then = (tmp_path / "best" / "README.md").read_text(), (FIXTURE / "card.md").read_text()
    assert lines(INTERVAL.sub("[]", now)) == lines(INTERVAL.sub("[]", then))


def test_a_merge_that_is_worse_than_the_base_is_exported_only_by_number(study: Path, tmp_path: Path) -> None:
    """The base gets the best trial's answers on the validation questions, and all others get the worst trial's."""
    stored = optuna.load_study(study_name="kept", storage=f"sqlite:///{study.parent / 'kept.sqlite'}")
    scored = {t.number: t for t in stored.get_trials() if t.user_attrs.get("outcome") == "ok"}
    base = next(t for t in scored.values() if t.user_attrs.get("label") == "base")
    best = max(scored.values(), key=lambda t: t.value or 0.0)
    worst = min(scored.values(), key=lambda t: t.value or 0.0)
    answers = {n: (best if t is base else worst).user_attrs["evaluation"] for n, t in scored.items()}
    stored.set_user_attr("validation", {str(n): found for n, found in answers.items()})
    stored.set_user_attr("search_posterior", {})
    refused = here("export", study, tmp_path / "best", check=False)
    said = " ".join(refused.stderr.split())
    assert "every merge is expected to be worse than the base" in said
    assert not (tmp_path / "best").exists()
    number = said.rpartition("--trial ")[2].split()[0]
    here("export", study, tmp_path / "best", "--trial", number)
    assert (tmp_path / "best" / NAME).is_file()


def test_a_learned_trial_and_its_recipe_alone_give_the_weights_that_were_scored(study: Path, tmp_path: Path) -> None:
    trial = learned(study)
    wanted = trial.user_attrs["weights_sha256"]
    assert wanted in here("export", study, tmp_path / "a", "--trial", str(trial.number)).stdout
    shutil.copytree(study.parent / "kept.maps", study.parent / "maps")
    assert wanted in here("merge", study.parent / "learned.json", tmp_path / "b", "--device", "cpu").stdout
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()
    recipes = [json.loads((tmp_path / out / "recipe.json").read_text()) for out in "ab"]
    recipes[0]["models"]["hashes"] = recipes[1]["models"]["hashes"]
    assert recipes[0] == recipes[1]


def test_a_trial_is_said_to_mergekit_as_before(study: Path, tmp_path: Path) -> None:
    plain = next(t for t in trials(study) if t.user_attrs.get("label") == "task_arithmetic")
    here("export", study, tmp_path / "merge.yml", "--mergekit", "--trial", str(plain.number))
    assert (tmp_path / "merge.yml").read_text() == (FIXTURE / "merge.yml").read_text()
