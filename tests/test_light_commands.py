"""Commands that need no model load no tensor library, and a wrong path is told before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ENV
from failing_studies import Quiet, evaluator, write_study

from merge_search.search.prepare import prepare
from merge_search.search.run import run
from merge_search.search.verdict.sealed import open_test
from merge_search.study_file import read_study_file

MODELS = ("torch", "botorch", "gpytorch", "transformers", "accelerate", "peft")
DATA = ("lm_eval", "datasets", "optuna", "sqlalchemy", "numpy", "scipy", "pandas", "safetensors", "huggingface_hub")


def loaded(*commands: list[str], names: tuple[str, ...]) -> tuple[str, list[str]]:
    """What the commands print, one after the other in one process, and which of `names` are loaded at the end."""
    code = f"""
import sys
from merge_search.cli import main
for arguments in {commands!r}:
    try:
        main(arguments)
    except SystemExit as end:
        print("STATUS", end.code)
print("LOADED", *[name for name in {names!r} if name in sys.modules])
"""
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV, check=True)
    return done.stdout, done.stdout.splitlines()[-1].split()[1:]


def test_validate_loads_no_torch(demo: Path, tmp_path: Path) -> None:
    """The demo's own study file: lm-eval tasks, a learner, BoTorch as sampler."""
    path = tmp_path / "study.yaml"
    path.write_text((demo / "study.yaml").read_text().replace("../examples/demo", str(demo)))
    text, heavy = loaded(["validate", str(path)], names=MODELS)
    assert "no problem found" in text
    assert heavy == []


def test_report_loads_no_torch(demo: Path, tmp_path: Path) -> None:
    """Of a study that has run, with validation and test scores, and of one with a front."""
    path = write_study(tmp_path, demo)
    evaluator(tmp_path)
    run(read_study_file(path), Quiet())
    open_test(prepare(read_study_file(path)))
    text, heavy = loaded(["report", str(path)], names=MODELS)
    for part in ("validation questions", "test questions", "95 % interval"):
        assert part in text
    assert heavy == []


@pytest.mark.parametrize("text", [None, "study: {name: a b}\nmodels: [\n", "study: {name: a b}\n"])
def test_a_wrong_study_file_is_told_before_anything_heavy_is_imported(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "study.yaml"
    if text is not None:
        path.write_text(text)
    commands = [[name, str(path)] for name in ("run", "validate", "test", "report")]
    commands.append(["export", str(path), str(tmp_path / "out")])
    shown, heavy = loaded(*commands, names=MODELS + DATA)
    assert shown.count("STATUS 2") == len(commands)
    assert shown.count("error: study.yaml: ") == len(commands)
    assert heavy == []


def test_a_wrong_recipe_path_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    shown, heavy = loaded(["merge", str(tmp_path / "nope.json"), str(tmp_path / "out")], names=MODELS + DATA)
    assert "error: no such file: " in shown
    assert "STATUS 2" in shown
    assert heavy == []


def test_init_loads_no_torch_and_for_a_wrong_path_nothing_heavy(demo: Path, tmp_path: Path) -> None:
    command = ["init", str(tmp_path / "s.yaml"), f"--expert={demo}/models/maths", "--tasks=demo_maths"]
    command.append(f"--include-path={demo}/tasks")
    shown, heavy = loaded([*command, "--base=./nope"], [*command[:2]], names=MODELS + DATA)
    assert "base: ./nope: no such folder" in shown
    assert shown.count("STATUS 2") == 2
    assert heavy == []
    shown, heavy = loaded([*command, f"--base={demo}/models/base"], names=MODELS)
    assert "s.yaml written" in shown
    assert heavy == []
