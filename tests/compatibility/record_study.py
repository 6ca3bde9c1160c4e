#!/usr/bin/env python3
"""Make the stored study of data/study_0_1_0 from nothing, for `test_study_of_0_1_0.py`.

    python tests/compatibility/record_study.py OUT

The committed folder was made by version 0.1.0 (commit efa8786): it stays as it is, since later versions must read
what that one wrote. A later version's study is a folder of its own beside it. It takes two minutes on one core.

    study.yaml          copied from the committed folder
    kept.sqlite         15 trials that ended, and one that was running when its process was killed
    kept.maps/          coefficients by output row of the trials that learned
    learned.json        recipe of the last of these, its models named relative to the file
    merge.yml           the baseline task_arithmetic in mergekit's language
    report.txt          what ``merge-search report`` says
    card.md             README.md of the exported winner
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import optuna
import yaml
from optuna.trial import TrialState

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = Path(__file__).resolve().parent / "data" / "study_0_1_0"
NAME, FILE = "kept", "kept.sqlite"
ELSEWHERE = "/home/someone/study"
"""Stored in place of the folder in which the study ran."""
ENDED = 15
"""Trials after which the study was validated; one more is killed."""


def main() -> None:
    """Run, run on, kill, and keep what lies there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve() / "study"
        folder.mkdir()
        shutil.copytree(ROOT / "examples" / "demo", folder / "demo")
        text = (COMMITTED / "study.yaml").read_text()
        _write(folder, text, ENDED)
        _command("run", "study.yaml", folder=folder)
        (folder / "study.yaml").write_text(text)
        _killed_run(folder)
        _keep(folder, arguments.out)


def _write(folder: Path, text: str, n_trials: int) -> None:
    data = yaml.safe_load(text)
    data["search"]["n_trials"] = n_trials
    (folder / "study.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


def _command(*words: str, folder: Path) -> str:
    line = [sys.executable, "-m", "merge_search", *words]
    return subprocess.run(line, cwd=folder, env=_environment(), check=True, stdout=subprocess.PIPE, text=True).stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}


def _study(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=NAME, storage=f"sqlite:///{folder / FILE}")


def _killed_run(folder: Path) -> None:
    """Kill the run when the sampler's next trial has its point and its recipe."""
    line = [sys.executable, "-m", "merge_search", "run", "study.yaml"]
    process = subprocess.Popen(line, cwd=folder, env=_environment())
    try:
        while process.poll() is None:
            running = _study(folder).get_trials(states=(TrialState.RUNNING,))
            if running and "recipe" in running[0].user_attrs:
                return
            time.sleep(0.01)
        raise SystemExit("the run ended before it could be killed")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _keep(folder: Path, out: Path) -> None:
    trials = _study(folder).get_trials()
    assert sum(t.state == TrialState.RUNNING for t in trials) == 1
    learned = [t for t in trials if "learner" in t.user_attrs][-1]
    recipe = learned.user_attrs["recipe"].replace(f"{folder}/", "")
    report = _command("report", "study.yaml", "--trials", "0", folder=folder)
    plain = next(t for t in trials if t.user_attrs.get("label") == "task_arithmetic")
    _command("export", "study.yaml", "merge.yml", "--mergekit", "--trial", str(plain.number), folder=folder)
    _command("export", "study.yaml", "best", folder=folder)
    out.mkdir(parents=True)
    for name in ("study.yaml", "merge.yml"):
        shutil.copy(folder / name, out / name)
    with closing(sqlite3.connect(folder / FILE)) as connection:
        connection.execute("VACUUM INTO ?", (str(out / FILE),))  # with what its log still holds
    with closing(sqlite3.connect(out / FILE)) as connection:
        change = "UPDATE trial_user_attributes SET value_json = replace(value_json, ?, ?)"
        connection.execute(change, (str(folder), ELSEWHERE))
        connection.commit()
        connection.execute("VACUUM")
    shutil.copytree(folder / f"{NAME}.maps", out / f"{NAME}.maps")
    (out / "learned.json").write_text(recipe + "\n")
    (out / "report.txt").write_text(report)
    (out / "card.md").write_text((folder / "best" / "README.md").read_text().replace(str(folder), ELSEWHERE))


if __name__ == "__main__":
    main()
