"""The first study file: a commented text from a few answers, checked as far as that needs no weights. Torch-free."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merge_search.errors import InputError, WeightsError

__all__ = ["Answers", "begin", "expert_of", "hours_of", "occupied"]

TEMPLATE = """\
# What to merge, how to judge it and how long to search. docs/study-file.md has every key.
# Relative paths are relative to this file. The results are kept beside it, in NAME.db.
study: {{name: {name}, seed: 0}}
models:
  base: {base}
  experts:
{experts}
  # dtype: float32                      # without it that of the files; a CPU is often faster in float32
space:                                  # what may vary; merge-search list shows all presets
  type: compatibility
  presets: [task_arithmetic, ties, tsv_m, regmean_parts]
  coefficients: {{per: block, bounds: [0, 1.5]}}   # per expert: fewer numbers, for a short search
  density: {{per: expert, bounds: [0.05, 1]}}      # share of each expert's changes that is kept
evaluate:
  - evaluator: lm_eval
    tasks: {tasks}
{include_path}    batch_size: 16                      # larger is faster, as far as memory goes
    # apply_chat_template: true         # for chat models
    # confirm_run_unsafe_code: true     # for tasks that run what the model wrote (humaneval, mbpp)
    # limit: 500                        # at most so many questions of a task, for a first try
splits:                                 # search: compares candidates; validation: chooses the winner;
  search: 0.6                           # test: stays sealed until merge-search test
  validation: 0.2
  test: 0.2
  fit: 0.1                              # part of search for the learner, in tasks without a training split
objective:
  maximise: mean_retention              # 0: the base, 1: each expert's gain kept; or mean, worst, TASK/METRIC
  # constraints: [{constraint}]
search:                                 # the first limit that is reached ends the search; all count over all runs
{budget}
  racing: {{looks: [0.25, 0.5]}}          # stops candidates that are clearly worse than the best
  learner: {{per: [block, tensor, row]}}  # some trials fit coefficients by gradient: stronger, but takes more memory
device: {device}
"""
N_TRIALS = 40
NO_LIMIT = 1000
"""Trials where another limit is meant to end the search."""
UNITS = {"d": 24.0, "h": 1.0, "m": 1 / 60}


@dataclass(frozen=True)
class Answers:
    """What a study file is written from. Relative paths are relative to the current directory.

    Attributes:
        base: Folder or hub id.
        experts: Each ``PATH``, ``ID``, ``NAME=PATH`` or ``NAME=ID``.
        tasks: Names of lm-eval's tasks, groups or tags.
        include_path: Folders with task files.
        time: A budget like ``2h``, ``90m`` or ``1h30m``; empty: none.
        questions: A budget in questions; None: none. Without any budget the search has 40 trials.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
    """

    base: str
    experts: Sequence[str]
    tasks: Sequence[str]
    include_path: Sequence[str] = ()
    time: str = ""
    questions: int | None = None
    device: str = "auto"


def begin(path: Path, answers: Answers, *, force: bool = False) -> list[str]:
    """Write a study file.

    Args:
        path: The file.
        answers: What it says.
        force: Whether an existing file is replaced.

    Returns:
        A sentence for each check that could not be made.

    Raises:
        InputError: Every problem with the answers, models and names of tasks, or the file cannot be written. Nothing is
            written then.
    Cost: reads headers, configs and tokenizers of folders and of cached hub ids, and lm-eval's list of tasks. It
        downloads nothing.
    """
    problems = occupied(path, force=force)
    experts: dict[str, str] = {}
    for text in answers.experts:
        try:
            name, model = expert_of(text)
            if name in experts:
                problems.append(f"--expert {text}: another expert is called {name!r}, too; give NAME=PATH")
            experts[name] = model
        except InputError as error:
            problems += error.problems
    if not answers.experts:
        problems.append("--expert: at least one expert is needed")
    budget = f"  n_trials: {N_TRIALS:<26}# and/or hours: 3, questions: 100000"
    if answers.time and answers.questions is not None:
        problems.append("--time and --questions: give one of them; the study file can hold both")
    elif answers.time:
        try:
            budget = f"  hours: {hours_of(answers.time):.6g}\n  n_trials: {NO_LIMIT}"
        except InputError as error:
            problems += error.problems
    elif answers.questions is not None:
        if answers.questions < 1:
            problems.append(f"--questions: must be at least 1, got {answers.questions}")
        budget = f"  questions: {answers.questions}\n  n_trials: {NO_LIMIT}"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", answers.device):
        problems.append(f"--device: must be auto, cpu, cuda or cuda:NUMBER, got {answers.device!r}")
    found, notes = _check_models(answers.base, experts)
    problems += found or _check_tasks(answers)  # the list of tasks takes seconds, and a wrong path is told at once
    if problems:
        raise InputError(problems)
    folder = path.expanduser().parent.resolve()
    searched = [_from(folder, p) for p in answers.include_path]
    text = TEMPLATE.format(
        name=_yaml(re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-") or "study"),
        base=_yaml(_from(folder, answers.base)),
        experts="\n".join(f"    {_yaml(name)}: {_yaml(_from(folder, model))}" for name, model in experts.items()),
        tasks=_yaml(list(answers.tasks)),
        include_path=f"    include_path: {_yaml(searched)}\n" if searched else "",
        constraint=_yaml(f"{answers.tasks[0]} >= base - 0.01"),
        budget=budget,
        device=answers.device,
    )
    try:
        with path.expanduser().open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return notes


def occupied(path: Path, *, force: bool) -> list[str]:
    """A sentence for each reason why the file cannot be written."""
    file = path.expanduser()
    if file.is_dir():
        return [f"{path}: is a folder; give the name of a file"]
    if not file.parent.is_dir():
        return [f"{path}: there is no folder {file.parent}; make it first"]
    if file.exists() and not force:
        return [f"{path}: exists and is not overwritten; give another name, or --force"]
    return []


def expert_of(text: str) -> tuple[str, str]:
    """The name and the model of ``[NAME=]PATH_OR_ID``. Without a name it is the last part of the path or id.

    >>> expert_of("maths=models/a"), expert_of("org/Qwen2.5-Math")
    (('maths', 'models/a'), ('Qwen2-5-Math', 'org/Qwen2.5-Math'))

    Raises:
        InputError: The name or the model is missing, or the name cannot be one.
    """
    name, sign, model = text.partition("=")
    if not sign or "/" in name or Path(text).expanduser().exists():
        name, model = re.sub(r"[^A-Za-z0-9_-]", "-", os.path.basename(os.path.abspath(text))), text
    if not model.strip():
        raise InputError(f"--expert {text!r}: must be a path or hub id, or NAME=PATH")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "base":
        raise InputError(f"--expert {text}: a name must be letters, digits, '_' and '-' and not 'base', got {name!r}")
    from merge_search.presets import PRESETS

    if name in PRESETS or name == "average":
        raise InputError(f"--expert {text}: {name!r} is the name of a baseline; give it another: NAME={model}")
    return name, model


def hours_of(text: str) -> float:
    """The hours of a text like ``2h``, ``90m``, ``1h30m`` or ``1d``.

    >>> hours_of("1h30m"), hours_of("90m")
    (1.5, 1.5)

    Raises:
        InputError: It is no such text.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhm])", text)
    hours = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(map("".join, parts)) != text or not hours > 0:
        raise InputError(f"--time: must be a time like 2h, 90m or 1h30m, got {text!r}")
    return hours


def _check_models(base: str, experts: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Problems of the models that are here, and a note on each that is not."""
    from merge_search.engine.checkpoints.compatibility import check_models
    from merge_search.engine.checkpoints.headers import HUB_ID

    problems, notes, here = [], [], {}
    for name, model in {"": base, **experts}.items():
        what = f"expert {name!r}" if name else "base"
        folder = Path(model).expanduser()
        if folder.exists():
            here[name] = str(folder)
        elif not HUB_ID.fullmatch(model):
            problems.append(f"models: {what}: {model}: no such folder; correct the path, or give a hub id (org/name)")
        elif cached := _cached(model):
            here[name] = cached
        else:
            notes.append(
                f"{what}: {model} is no folder here and not in the hub's cache, so it is taken as a hub id and was "
                "not checked; merge-search validate downloads and checks it"
            )
    if "" in here:
        problems += [f"models: {p}" for p in check_models(here.pop(""), here)]
    elif here and not problems:
        notes.append("the experts were not compared with the base, since the base is not here")
    return problems, notes


def _cached(model: str) -> str | None:
    """The folder of a hub id whose weights are all in the hub's cache. Nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from merge_search.engine.checkpoints.headers import read_checkpoint

    try:
        folder: str = snapshot_download(model, local_files_only=True)
        read_checkpoint(Path(folder))
    except (LocalEntryNotFoundError, HFValidationError, WeightsError):
        return None
    return folder


def _check_tasks(answers: Answers) -> list[str]:
    from merge_search import catalogue

    options: dict[str, Any] = {"tasks": list(answers.tasks), "include_path": list(answers.include_path)}
    try:
        unknown: list[str] = catalogue.load("evaluators", "lm_eval").unknown_tasks(options)
    except InputError as error:
        unknown = error.problems
    return [f"evaluate: {p}" for p in unknown]


def _from(folder: Path, model: str) -> str:
    """A path relative to the current directory as one relative to `folder`; any other text as it is."""
    if os.path.isabs(model) or not Path(model).exists():
        return model
    return os.path.relpath(model, folder)


def _yaml(value: str | list[str]) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
