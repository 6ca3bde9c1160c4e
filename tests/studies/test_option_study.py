"""Studies that search options of methods: every sampler, a resumed run, a learner, an export, mergekit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from command_line import here
from failing_studies import LEARNER
from failing_studies import write_study as write_plain
from optuna.trial import TrialState

from merge_search.recipe import Recipe
from merge_search.search.prepare import prepare
from merge_search.search.records import finished_records
from merge_search.study_file import read_study_file

PRESETS: list[Any] = [
    {"tsv_m": {"rank_share": {"bounds": [0.2, 1]}}},
    {"ties": {"winsorise": "search", "post": [{"svc": {"alpha": [0.05, 0.1]}}]}},
    "task_arithmetic",
]


def write_study(folder: Path, demo: Path, kind: str = "Norm", presets: Any = PRESETS, **search: Any) -> Path:
    path = write_plain(folder, demo, kind, **search)
    data = yaml.safe_load(path.read_text())
    data["models"]["experts"]["stories"] = str(demo / "models" / "stories")
    data["space"] = {"type": "uniform", "presets": presets}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def load(path: Path) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=f"sqlite:///{path.parent / 's.db'}")


def searched(path: Path) -> list[dict[str, Any]]:
    """The points of the trials that are of the space."""
    return [t.params for t in load(path).get_trials(states=(TrialState.COMPLETE,)) if t.params]


@pytest.fixture(scope="module")
def finished(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that ran to its end, and was resumed with more trials."""
    path = write_study(tmp_path_factory.mktemp("options"), demo, n_trials=14, sampler="tpe")
    data = yaml.safe_load(path.read_text())
    data["search"].pop("baselines")
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    here("run", path)
    first = searched(path)
    path.write_text(path.read_text().replace("n_trials: 14", "n_trials: 20"))
    assert "resuming: 14 of 20" in here("run", path).stderr
    points = searched(path)
    assert points[: len(first)] == first
    assert len(points) == len(first) + 6
    return path


def test_every_trial_is_the_merge_that_its_point_says(finished: Path) -> None:
    space = prepare(read_study_file(finished)).space
    trials = load(finished).get_trials(states=(TrialState.COMPLETE,))
    for record, trial in zip(finished_records(load(finished)), trials, strict=True):
        assert record.is_scored
        if trial.params:
            recipe = space.decode(trial.params).model_copy(update={"models": record.recipe.models})
            assert recipe.fingerprint == record.recipe.fingerprint
            assert 0.2 <= trial.params["tsv_m.rank_share"] <= 1
    assert len({p["tsv_m.rank_share"] for p in searched(finished)}) > 2
    queued = {str(p) for p in space.initial_points()}
    suggested = [p for p in searched(finished)[-2:] if str(p) not in queued]
    assert suggested  # by the sampler


def test_the_presets_with_options_are_baselines_at_their_published_values(finished: Path) -> None:
    labels = [r.label for r in finished_records(load(finished))[:7]]
    assert labels[:5] == ["base", "maths", "stories", "average", "task_arithmetic"]
    assert labels[5:] == ["tsv_m", "ties"]


def test_an_export_is_the_merge_of_its_options(finished: Path, tmp_path: Path) -> None:
    trial = next(t for t in load(finished).get_trials() if t.params.get("preset") == "tsv_m" and t.number > 8)
    here("export", finished, tmp_path / "out", "--trial", str(trial.number))
    recipe = Recipe.from_json((tmp_path / "out" / "recipe.json").read_text())
    share = trial.params["tsv_m.rank_share"]
    assert recipe.operator is not None
    assert recipe.operator.options == ({} if share == 1.0 else {"rank_share": share})
    again = here("merge", tmp_path / "out" / "recipe.json", tmp_path / "again").stdout
    assert trial.user_attrs["weights_sha256"] in again


def test_what_mergekit_has_is_still_exported_to_it_and_the_rest_is_refused(finished: Path, tmp_path: Path) -> None:
    trials = load(finished).get_trials()
    plain = next(t for t in trials if t.params.get("preset") == "task_arithmetic")
    here("export", finished, tmp_path / "plain.yaml", "--mergekit", "--trial", str(plain.number))
    assert yaml.safe_load((tmp_path / "plain.yaml").read_text())["merge_method"]
    tsv = next(t for t in trials if t.params.get("preset") == "tsv_m")
    refused = here("export", finished, tmp_path / "t.yaml", "--mergekit", "--trial", str(tsv.number), check=False)
    assert "tsv_m" in refused.stderr
    assert not (tmp_path / "t.yaml").exists()


def test_a_learner_fits_beside_searched_options(demo: Path, tmp_path: Path) -> None:
    presets = [{"tsv_m": {"rank_share": [0.25, 1.0]}}, "task_arithmetic"]
    path = write_study(
        tmp_path, demo, "Learned", presets, n_trials=12, learner={**LEARNER, "steps": [0, 2], "batch_rows": 4}
    )
    here("run", path)
    records = finished_records(load(path))
    assert all(r.is_scored for r in records)
    fitted = [r.recipe for r in records if r.recipe.maps or "learner" in json.dumps(r.attributes)]
    assert fitted
    assert {"tsv_m.rank_share", "learner.steps"} <= searched(path)[0].keys()


def test_wrong_options_are_told_by_validate_all_at_once(demo: Path, tmp_path: Path) -> None:
    path = write_study(
        tmp_path, demo, presets=[{"tsv_m": {"rank_shar": 1}}, {"wudi": {"steps": [5], "lr": {"bounds": [1, 0]}}}]
    )
    text = here("validate", path, check=False).stderr
    assert "space.presets.0: 'tsv_m' has no option 'rank_shar'; did you mean 'rank_share'?" in text
    assert "space.presets.1: option 'steps' of 'wudi': a list needs two or more values" in text
    assert "space.presets.1: option 'lr' of 'wudi': bounds must have low < high, got [1, 0]" in text
