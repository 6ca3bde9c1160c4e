"""Studies of the demo's models whose evaluators fail on request. Shared by several test files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from merge_search import catalogue

__all__ = ["EVALUATOR", "LEARNER", "Quiet", "evaluator", "write_study"]

EVALUATOR = '''
import numpy as np, torch
from merge_search.evaluation import Cost, Evaluation, MetricInfo, Scores, Split

class Norm:
    """Scores a model by the norm of one tensor; fails on request, by the number of the call."""

    calls = 0
    fails: dict = {}
    splits: list = []

    def __init__(self, options, *, shares, seed):
        pass

    def metrics(self):
        return [MetricInfo("norm", "small", True, {s: 10 for s in (Split.SEARCH, Split.VALIDATION, Split.TEST)})]

    def fingerprint(self):
        return "norm"

    def bind(self, model, tokenizer, *, folder):
        self.weight = next(model.parameters())

    def evaluate(self, split, fidelity=1.0, *, after=0.0):
        Norm.calls += 1
        Norm.splits.append(split)
        failure = Norm.fails.get(Norm.calls)
        if failure is not None:
            raise failure
        value = 1 / (1 + float(self.weight.norm()))
        values = np.clip(value + np.linspace(-0.01, 0.01, 10), 0, 1)
        scores = Scores((), values, float(values.mean()), 0.01)
        return Evaluation(split, fidelity, {"norm/small": scores}, Cost(questions=10))

class Counted(Norm):
    """Asks three questions, then fails if it must, then asks the other seven."""

    def __init__(self, options, *, shares, seed):
        self.n_asked = 0

    def evaluate(self, split, fidelity=1.0, *, after=0.0):
        self.n_asked += 3
        found = super().evaluate(split, fidelity, after=after)
        self.n_asked += 7
        return found

class Silent(Norm):
    """Declares a metric that it does not report."""

    def metrics(self):
        return [*super().metrics(), MetricInfo("norm", "large", True, {s: 10 for s in (Split.SEARCH, Split.TEST)})]

class Learned(Norm):
    """With a loss, the norm itself; it fails on request, by the number of the call."""

    asked: list = []
    loss_fails: dict = {}

    def fit_tasks(self):
        return {"norm": 40}

    def losses(self, task):
        return ("gold",)

    def predict(self, task, rows):
        return [0] * len(rows)

    def set_pseudo_labels(self, task, labels):
        pass

    def loss(self, task, rows, kind="gold"):
        self.asked.append(tuple(rows))
        failure = self.loss_fails.get(len(self.asked))
        if failure is not None:
            raise failure
        return self.weight.square().mean()
'''


class Quiet:
    """A listener that keeps its messages."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, **_: Any) -> None: ...
    def trial(self, *_: Any, **__: Any) -> None: ...
    def end(self) -> None: ...


LEARNER = {"steps": 5, "per": "block", "step_size": 0.01, "batch_rows": 4, "warm_start": False}


def write_study(folder: Path, demo: Path, kind: str = "Norm", **search: Any) -> Path:
    (folder / "mine.py").write_text(EVALUATOR)
    data = {
        "study": {"name": "s"},
        "models": {"base": str(demo / "models" / "base"), "experts": {"maths": str(demo / "models" / "maths")}},
        "space": {"type": "uniform", "presets": ["task_arithmetic"]},
        "evaluate": [{"evaluator": f"mine.py:{kind}"}],
        "objective": {"maximise": "norm"},
        "search": {"n_trials": 7, "sampler": "random", "baselines": [], **search},
        "device": "cpu",
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def evaluator(folder: Path, kind: str = "Norm", *, calls: Any = None, losses: Any = None) -> Any:
    """Make the study's own evaluator fail at these numbers of calls."""
    found = catalogue.load("evaluators", f"mine.py:{kind}", folder=folder)
    norm = catalogue.load("evaluators", "mine.py:Norm", folder=folder)
    norm.calls, norm.fails, norm.splits = 0, calls or {}, []
    if kind == "Learned":
        found.asked, found.loss_fails = [], losses or {}
    return found
