"""`merge-search init` writes a study file that is read, validated and run, and tells what is wrong before it writes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import ENV, alone, here

from merge_search.begin import Answers, begin, expert_of, hours_of
from merge_search.errors import InputError
from merge_search.study_file import read_study_file


def flags(demo: Path) -> list[str]:
    models = [f"--base={demo}/models/base", f"--expert={demo}/models/maths", f"--expert=tales={demo}/models/stories"]
    return [*models, "--tasks=demo_maths, demo_stories", f"--include-path={demo}/tasks"]


def test_the_file_is_read_and_validated(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "skills.yaml"
    done = here("init", path, *flags(demo), "--time=90m", "--device=cpu")
    assert f"merge-search run {path}" in done.stdout
    file = read_study_file(path)
    assert (file.study.name, file.search.hours, file.device) == ("skills", 1.5, "cpu")
    assert list(file.models.experts) == ["maths", "tales"]
    assert file.search.learner is not None
    assert "no problem found" in here("validate", path).stdout


@pytest.mark.parametrize("name", ["2024", "on", "a b", "_x", "é"])
def test_the_name_of_the_file_makes_a_name_of_the_study(demo: Path, tmp_path: Path, name: str) -> None:
    here("init", tmp_path / f"{name}.yaml", *flags(demo))
    assert read_study_file(tmp_path / f"{name}.yaml").study.name


@pytest.mark.parametrize(("budget", "limits"), [([], (40, None)), (["--questions=5000"], (1000, 5000))])
def test_budgets(demo: Path, tmp_path: Path, budget: list[str], limits: tuple[int, int | None]) -> None:
    here("init", tmp_path / "s.yaml", *flags(demo), *budget)
    search = read_study_file(tmp_path / "s.yaml").search
    assert (search.n_trials, search.questions) == limits


def test_what_is_commented_out_may_be_used(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    here("init", path, *flags(demo))
    text = re.sub(r"^( *)# (?=\w+: )", r"\1", path.read_text(), flags=re.MULTILINE)
    assert {"dtype", "confirm_run_unsafe_code", "limit", "constraints"} <= set(
        re.findall(r"^ +(\w+):", text, re.MULTILINE)
    )
    path.write_text(text.replace("apply_chat_template: true", "apply_chat_template: false"))  # the demo has no template
    assert "no problem found" in here("validate", path).stdout


def test_relative_paths_are_those_of_the_file(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "studies").mkdir()
    monkeypatch.chdir(demo)
    experts = ["models/maths", "models/stories"]
    path = Path(os.path.relpath(tmp_path / "studies" / "s.yaml"))
    begin(path, Answers("models/base", experts, ["demo_maths"], ["tasks"]))
    monkeypatch.chdir(tmp_path)
    file = read_study_file("studies/s.yaml")
    assert file.model_reference(file.models.base) == str(demo / "models" / "base")
    assert "no problem found" in here("validate", "studies/s.yaml").stdout


def test_a_file_is_overwritten_only_with_force(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("mine\n")
    done = here("init", path, *flags(demo), check=False)
    assert done.returncode == 2
    assert "exists and is not overwritten; give another name, or --force" in done.stderr
    assert path.read_text() == "mine\n"
    here("init", path, *flags(demo), "--force")
    assert read_study_file(path).study.name == "s"


def test_without_a_terminal_all_missing_options_are_told_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "merge_search", "init", str(tmp_path / "s.yaml")],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=ENV,
    )  # fmt: skip
    assert done.returncode == 2
    assert "missing: --base PATH_OR_ID, --expert [NAME=]PATH_OR_ID, --tasks A,B;" in done.stderr
    assert not (tmp_path / "s.yaml").exists()


def test_on_a_terminal_the_missing_answers_are_asked(demo: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    terminal, other = pty.openpty()
    line = [sys.executable, "-m", "merge_search", "init", str(tmp_path / "s.yaml"), f"--include-path={demo}/tasks"]
    answers = [f"{demo}/models/base", f"{demo}/models/maths", f"tales={demo}/models/stories", "", "demo_maths", "2h"]
    with subprocess.Popen(line, stdin=other, stdout=other, stderr=other, env=ENV) as process:
        os.close(other)
        os.write(terminal, "".join(f"{a}\n" for a in answers).encode())
        shown = b""
        try:
            while part := os.read(terminal, 4096):
                shown += part
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(terminal)
    assert process.returncode == 0, shown.decode()
    file = read_study_file(tmp_path / "s.yaml")
    assert (list(file.models.experts), file.search.hours) == (["maths", "tales"], 2.0)


def test_every_problem_is_told_and_nothing_is_written(demo: Path, tmp_path: Path) -> None:
    answers = Answers("./nope", [f"{demo}/models/maths", "ties=x", "a="], ["t"], time="soon", device="gpu")
    with pytest.raises(InputError) as caught:
        begin(tmp_path / "s.yaml", answers)
    told = [
        "'ties' is the name of a baseline",
        "--expert 'a='",
        "--time: must be",
        "--device: must be",
        "./nope: no such",
    ]
    assert len(caught.value.problems) == len(told)
    for text in told:
        assert text in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_architecture_and_a_wrong_task_are_told(
    demo: Path, llama_folders: Path, tmp_path: Path
) -> None:
    base, tasks = f"{demo}/models/base", [f"{demo}/tasks"]
    with pytest.raises(InputError, match=r"must have the base's shape|is missing|are missing|are too many"):
        begin(tmp_path / "s.yaml", Answers(base, [f"{llama_folders}/a"], ["demo_maths"], tasks))
    with pytest.raises(InputError, match="called 'demo_mths'; did you mean 'demo_maths'"):
        begin(tmp_path / "s.yaml", Answers(base, [f"{demo}/models/maths"], ["demo_mths"], tasks))
    assert list(tmp_path.iterdir()) == []


def test_a_hub_id_that_is_not_cached_is_a_note(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    notes = begin(path, Answers("org/no-model", [f"{demo}/models/maths"], ["demo_maths"], [f"{demo}/tasks"]))
    assert any("org/no-model" in text and "was not checked" in text for text in notes)
    assert any("not compared with the base" in text for text in notes)
    assert read_study_file(path).models.base == "org/no-model"


def test_a_hub_id_in_the_cache_is_checked(demo: Path, tmp_path: Path, llama_folders: Path) -> None:
    cached = tmp_path / "hub" / "models--org--base"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(llama_folders / "base", cached / "snapshots" / ("0" * 40))
    line = [sys.executable, "-m", "merge_search", "init", str(tmp_path / "s.yaml"), "--base=org/base", *flags(demo)[1:]]
    env = {**ENV, "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(line, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert re.search(r"models: expert 'maths' .*must have", done.stderr)
    shutil.copytree(demo / "models" / "base", cached / "snapshots" / ("0" * 40), dirs_exist_ok=True)
    done = subprocess.run(line, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "Note" not in done.stdout


@pytest.mark.parametrize("text", ["2", "h", "2x", "0h", "1h 30m", "-1h", ""])
def test_a_time_has_units(text: str) -> None:
    with pytest.raises(InputError, match="must be a time like 2h"):
        hours_of(text)


def test_experts_get_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert expert_of("lr=1") == ("lr-1", "lr=1")
    assert expert_of("models/maths/") == ("maths", "models/maths/")
    with pytest.raises(InputError, match="not 'base'"):
        expert_of("base=models/maths")


@pytest.mark.zoo
@pytest.mark.slow
def test_a_few_trials_of_the_written_file(zoo: Path, own_dataset_cache: None, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    subprocess.run(
        [sys.executable, zoo / "make_tasks.py", zoo / "data" / "lm", tasks, "--root", zoo / "data"], check=True
    )
    path = tmp_path / "s.yaml"
    models = [f"--base={zoo}/lm/base", f"--expert={zoo}/lm/intent", f"--expert={zoo}/lm/where"]
    here("init", path, *models, "--tasks=zoo_intent,zoo_where", f"--include-path={tasks}", "--device=cpu")
    data = yaml.safe_load(path.read_text())
    data["evaluate"][0]["limit"] = 300
    data["search"] |= {"n_trials": 3, "baselines": []}
    path.write_text(yaml.safe_dump(data))
    done = alone("run", path)
    assert "mean_retention" in done.stdout
