"""Whatever goes wrong inside one trial ends that trial with a typed outcome; the study goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from merge_search.search.records import finished_records
from merge_search.search.run import run
from merge_search.study_file import read_study_file

EVALUATOR = '''
import numpy as np, torch
from merge_search.evaluation import Cost, Evaluation, MetricInfo, Scores, Split

class Norm:
    """Scores a model by the norm of one tensor; fails on request, by the number of the call."""

    calls = 0
    fails: dict = {}

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
        failure = Norm.fails.get(Norm.calls)
        if failure is not None:
            raise failure
        value = 1 / (1 + float(self.weight.norm()))
        values = np.clip(value + np.linspace(-0.01, 0.01, 10), 0, 1)
        return Evaluation(split, fidelity, {"norm/small": Scores((), values, float(values.mean()), 0.01)}, Cost(questions=10))
'''


class Quiet:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, **_: Any) -> None: ...
    def trial(self, *_: Any, **__: Any) -> None: ...
    def end(self) -> None: ...


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (ValueError("a user's own mistake"), "evaluator_error"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
    ],
)
def test_a_failure_is_typed_and_the_study_goes_on(demo: Path, tmp_path: Path, failure: Exception, outcome: str) -> None:
    (tmp_path / "mine.py").write_text(EVALUATOR)
    models = {"base": str(demo / "models" / "base"), "experts": {"maths": str(demo / "models" / "maths")}}
    data = {
        "study": {"name": "s"},
        "models": models,
        "space": {"type": "uniform", "presets": ["task_arithmetic"]},
        "evaluate": [{"evaluator": "mine.py:Norm"}],
        "objective": {"maximise": "norm"},
        "search": {"n_trials": 7, "sampler": "random", "baselines": []},
        "device": "cpu",
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    from merge_search import catalogue

    norm = catalogue.load("evaluators", "mine.py:Norm", folder=tmp_path)
    norm.calls, norm.fails = 0, {4: failure}
    study = run(read_study_file(path), Quiet())
    done = finished_records(study)
    assert len(done) == 7
    (bad,) = [r for r in done if not r.is_scored]
    assert bad.outcome == outcome
    assert str(failure) in bad.reason
    assert study.user_attrs["validation"]
