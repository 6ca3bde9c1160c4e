"""A study over rules from outside, from the command line: searched, exported, merged again, refused where it must."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from command_line import here

from merge_search.errors import StudyFileError
from merge_search.rules import use_rule_files
from merge_search.search.prepare import prepare
from merge_search.search.records import finished_records
from merge_search.study_file import read_study_file

RULES = Path(__file__).parent.parent / "support" / "user_rules.py"
EXPERTS = ["maths", "stories", "spelling"]
FAILING = '''
@measure("broken")
def broken(context):
    """NaN on one tensor, another shape on the others"""
    bad = float("nan") if context.group.block == 0 else 1.0
    return [t[:1, :1] * bad if t.ndim > 1 and bad != bad else t[:3].abs() for t in context.deltas]
'''
PRESETS = ["log_ties", "lucky_middle", "above", "half"]
METHODS = ["log_size/top_k/sum", "lottery/sum", "log_size/above_mean/middle", "log_size/all/score"]


@pytest.fixture(autouse=True)
def no_rules_left() -> Iterator[None]:
    yield
    use_rule_files([])


def write_study(folder: Path, demo: Path, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tasks = {"evaluator": "lm_eval", "tasks": ["demo_stories"], "include_path": str(demo / "tasks")}
    data: dict[str, Any] = {
        "study": {"name": "own", "seed": 1},
        "models": {
            "base": str(demo / "models" / "base"),
            "experts": {e: str(demo / "models" / e) for e in EXPERTS},
            "dtype": "float32",
        },
        "space": {
            "type": "compatibility",
            "assess": ["log_size", {"measure": "log_size", "options": {"eps": 0.01}}],
            "select": ["all", "top_k", "above_mean", "lottery"],
            "splice": ["sum", "score", "middle"],
            "coefficients": {"per": "expert"},
        },
        "evaluate": [{**tasks, "batch_size": 64, "limit": 40}],
        "search": {"sampler": "random", "n_trials": 12, "baselines": PRESETS, "finalists": 1},
        "rules": ["rules/user_rules.py"],
        "device": "cpu",
    }
    for key, value in sections.items():
        data[key] = {**data[key], **value} if isinstance(data.get(key), dict) else value
    (folder / "rules").mkdir(exist_ok=True)
    (folder / "rules" / "user_rules.py").write_bytes(RULES.read_bytes())
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def load(path: Path) -> optuna.Study:
    return optuna.load_study(study_name="own", storage=f"sqlite:///{path.with_suffix('.db')}")


@pytest.fixture(scope="module")
def finished(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_study(tmp_path_factory.mktemp("rules"), demo)
    here("run", path)
    return path


def test_rules_from_outside_are_choices_of_a_space(demo: Path, tmp_path: Path) -> None:
    plan = prepare(read_study_file(write_study(tmp_path, demo)))
    choices = plan.space.parameters["method"].choices  # type: ignore[union-attr]
    assert set(METHODS) < set(choices)
    assert "log_size(eps=0.01)/above_mean/middle" in choices
    assert plan.identity({})["rules"] == {"user_rules.py": plan.rules[0].sha256}


def test_a_study_without_rules_has_the_identity_that_it_always_had(demo: Path, tmp_path: Path) -> None:
    plan = prepare(
        read_study_file(
            write_study(
                tmp_path,
                demo,
                rules=[],
                space={"assess": ["magnitude"], "select": ["all"], "splice": ["sum"]},
                search={"baselines": []},
            )
        )
    )
    assert "rules" not in plan.identity({})


def test_every_trial_is_scored_and_recipes_name_the_file_where_they_need_it(finished: Path) -> None:
    done = finished_records(load(finished))
    assert len(done) == 12
    assert [r.outcome for r in done if not r.is_scored] == []
    named = {r.name: bool(r.recipe.rules) for r in done}
    assert all(named[name] for name in PRESETS)
    assert not named["average"]
    assert any(has for name, has in named.items() if name.startswith("trial"))


@pytest.mark.parametrize("name", [*PRESETS, "trial 11"])
def test_a_trial_is_exported_and_merged_again_bit_for_bit(name: str, finished: Path, tmp_path: Path) -> None:
    done = finished_records(load(finished))
    number = next(r.number for r in done if r.name == name)
    here("export", finished, tmp_path / "a", "--trial", str(number))
    assert (tmp_path / "a" / "rules" / "user_rules.py").read_bytes() == RULES.read_bytes()
    merged = here("merge", tmp_path / "a" / "recipe.json", tmp_path / "b")
    assert f"runs the rule file {tmp_path / 'a' / 'rules' / 'user_rules.py'}" in merged.stderr
    first, second = (tmp_path / name / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert done[number].weights_sha256 in merged.stdout.replace("\n", "")


def test_a_report_needs_no_rule_file(finished: Path) -> None:
    hidden = finished.parent / "rules" / "user_rules.py"
    text = hidden.read_bytes()
    hidden.unlink()
    try:
        assert "log_ties" in here("report", finished).stdout
    finally:
        hidden.write_bytes(text)


def test_a_changed_rule_file_is_another_study(finished: Path) -> None:
    file = finished.parent / "rules" / "user_rules.py"
    text = file.read_bytes()
    file.write_bytes(text + b"\n# another thought\n")
    try:
        refused = here("run", finished, check=False)
    finally:
        file.write_bytes(text)
    assert refused.returncode == 1
    assert "rules.user_rules.py: was " in refused.stderr


def test_a_rule_that_fails_ends_its_trials_with_a_reason_and_not_the_study(demo: Path, tmp_path: Path) -> None:
    path = write_study(
        tmp_path, demo, space={"assess": ["broken"], "select": ["top_k", "bernoulli"], "splice": ["sum"]},
        search={"n_trials": 14, "baselines": []},
    )  # fmt: skip
    file = tmp_path / "rules" / "user_rules.py"
    file.write_text(RULES.read_text() + FAILING)
    line = file.read_text().splitlines().index('@measure("broken")') + 1
    here("run", path)
    done = finished_records(load(path))
    assert len(done) == 14
    failed = [r for r in done if not r.is_scored]
    assert failed
    assert all(json.loads(r.attributes["recipe"])["assess"] == {"measure": "broken"} for r in failed)
    assert {r.outcome for r in failed} == {"merge_error"}
    for record in failed:
        assert record.reason.startswith(f"{file}:{line}: what measure 'broken' returns for tensor ")
        assert "must have the tensor's shape" in record.reason


def with_fit_rows(demo: Path, preset: str) -> dict[str, Any]:
    """Sections of a study whose rules may be measured on six rows of each of two tasks."""
    tasks = {"evaluator": "lm_eval", "tasks": ["demo_maths", "demo_stories"], "include_path": str(demo / "tasks")}
    return {
        "space": {"assess": ["magnitude"], "select": ["all"], "splice": ["sum"]},
        "evaluate": [{**tasks, "batch_size": 64, "limit": 40, "fit_limit": 6}],
        "splits": {"search": 0.6, "fit": 0.3},
        "search": {"n_trials": 7, "baselines": [preset]},
    }


def test_a_statistic_of_the_file_is_measured_once_and_goes_with_the_exported_recipe(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path / "study", demo, **with_fit_rows(demo, "signal_ties"))
    here("run", path)
    (number,) = (r.number for r in finished_records(load(path)) if r.name == "signal_ties" and r.is_scored)
    assert len(list((path.parent / "own.statistics").glob("*.safetensors"))) == len(EXPERTS)
    here("export", path, tmp_path / "a", "--trial", str(number))
    assert {p.name for p in (tmp_path / "a" / "statistics").iterdir()} == {"signal@power=1.0"}
    merged = here("merge", tmp_path / "a" / "recipe.json", tmp_path / "b")
    assert f"runs the rule file {tmp_path / 'a' / 'rules' / 'user_rules.py'}" in merged.stderr
    first, second = (tmp_path / name / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_a_statistic_that_fails_ends_its_trial_with_a_reason_and_not_the_study(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, **with_fit_rows(demo, "signal_ties"))
    file = tmp_path / "rules" / "user_rules.py"
    file.write_text(RULES.read_text().replace("gradient.abs() ** power", "gradient.nothing"))
    line = (
        file.read_text().splitlines().index("    return mean_of_gradients(work, lambda gradient: gradient.nothing)") + 1
    )
    here("run", path)
    (failed,) = (r for r in finished_records(load(path)) if not r.is_scored)
    assert (failed.name, failed.outcome) == ("signal_ties", "merge_error")
    assert failed.reason.startswith(f"{file}:{line}: statistic 'signal' failed: AttributeError")


def test_a_learner_shares_coefficients_by_a_granularity_of_the_file(demo: Path, tmp_path: Path) -> None:
    sections = with_fit_rows(demo, "half")
    learner = {"per": ["thirds"], "steps": [2], "batch_rows": 2}
    path = write_study(tmp_path, demo, **{**sections, "search": {"n_trials": 8, "baselines": [], "learner": learner}})
    here("run", path)
    fitted = [r for r in finished_records(load(path)) if "learner" in r.attributes]
    assert fitted
    assert fitted[0].is_scored
    coefficients = fitted[0].recipe.coefficients["maths"]
    assert isinstance(coefficients, dict)
    assert len({value for name, value in coefficients.items() if name != "*"}) == 3
    learner["per"] = ["third"]
    wrong = write_study(tmp_path / "wrong", demo, **{**sections, "search": {"learner": learner, "baselines": []}})
    refused = here("validate", wrong, check=False)
    assert "search.learner.per: unknown granularity 'third'; did you mean 'thirds'?" in refused.stderr
    wrong.write_text(wrong.read_text().replace("- third\n", "- thirds\n    loss: block_output\n"))
    refused = here("validate", wrong, check=False)
    assert "search.learner.per: block outputs are fitted block after block" in refused.stderr


@pytest.mark.parametrize(
    ("sections", "messages"),
    [
        ({"rules": ["gone.py"]}, ["rules: no rule file ", "gone.py"]),
        ({"rules": [1]}, ["rules.0: input should be a valid string, got 1"]),
        ({"rules": []}, ["space.assess.0: no assessment is called 'log_size'", "no preset is called 'log_ties'"]),
        (
            {"space": {"assess": [{"measure": "log_size", "options": {"epz": 1}}]}},
            ["space.assess.0: 'log_size' has no option 'epz'; did you mean 'eps'?"],
        ),
        ({"space": {"select": ["above_men"]}}, ["no select kind is called 'above_men'; did you mean 'above_mean'?"]),
        ({"space": {"select": [{"kind": "lottery", "scope": "model"}]}}, ["lottery ranks by tensor, not by model"]),
        (
            {"space": {"splice": [{"kind": "middle", "options": {"x": 1}}]}},
            ["space.splice.0: 'middle' has no option 'x'"],
        ),
    ],
)
def test_all_problems_are_said_at_once(
    sections: dict[str, Any], messages: list[str], demo: Path, tmp_path: Path
) -> None:
    with pytest.raises(StudyFileError) as refused:
        prepare(read_study_file(write_study(tmp_path, demo, **sections)))
    for message in messages:
        assert message in str(refused.value)


def test_a_malformed_preset_is_a_sentence(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo)
    data = yaml.safe_load(path.read_text())
    data["space"] = {"type": "compatibility", "presets": [{"tsv_m": 0.5}]}
    del data["search"]["baselines"]
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(StudyFileError, match=r"space.presets.0: "):
        prepare(read_study_file(path))
