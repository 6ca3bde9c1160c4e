"""What is counted in a merge: parameters, and the share of them that is not the base's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml

from evaluators.costs.size import Size
from merge_search.engine.engine import MergeEngine
from merge_search.errors import EvaluationError, StudyFileError
from merge_search.evaluation import Evaluation, MetricInfo, Split, SplitShares
from merge_search.objective import Objective, References, variance_of
from merge_search.recipe import Recipe
from merge_search.search.checks import search_problems
from merge_search.search.records import finished_records
from merge_search.search.run import run
from merge_search.space import Float
from merge_search.study_file import Search, read_study_file


def bound(model: Any, **options: Any) -> Size:
    size = Size(options, shares=SplitShares(), seed=0)
    size.bind(model, None, folder="")
    return size


def score(size: Size, name: str) -> float:
    return size.evaluate(Split.SEARCH).scores[f"size/{name}"].score


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_changed_is_the_share_of_entries_that_are_not_the_bases(make_models: Any, dtype: str) -> None:
    _, live = make_models(dtype=dtype)
    parameters = list(live.model.parameters())
    n = sum(p.numel() for p in parameters)
    size = bound(live.model)
    assert score(size, "changed") == 0
    assert score(size, "parameters") == n
    with torch.no_grad():
        parameters[0][:2, :5] += 1
        parameters[-1][:3] *= 1.0  # written, and as before
    assert score(size, "changed") == 10 / n
    assert score(size, "parameters") == n


def test_tied_parameters_count_once(make_models: Any) -> None:
    _, free = make_models()
    _, tied = make_models(tie_word_embeddings=True)
    assert score(bound(free.model), "parameters") - score(bound(tied.model), "parameters") == 24 * 16


def test_lower_densities_change_less(make_models: Any) -> None:
    """Each expert alone at its density: the share that differs is that density, but for what the experts left alone."""
    pool, live = make_models()
    size, engine = bound(live.model), MergeEngine(pool)
    found = []
    for density in (0.1, 0.5, 1.0):
        select = {"kind": "top_k"}
        recipe = Recipe(models=pool.models, select=select, densities={"a": density}, coefficients={"a": 1.0, "b": 0.0})
        engine.apply(recipe, live.views)
        found.append(score(size, "changed"))
    assert found == pytest.approx([0.1, 0.5, 1.0], abs=0.02)


def test_what_is_counted_has_no_noise_and_is_an_objective_or_a_constraint(make_models: Any) -> None:
    _, live = make_models()
    size = bound(live.model)
    evaluation = size.evaluate(Split.SEARCH)
    again = Evaluation.from_attribute(evaluation.to_attribute())
    assert all(variance_of(s) == 0 for s in again.scores.values())
    references = References.from_evaluations(size.metrics(), evaluation, {"a": evaluation})
    objective = Objective([], ["size"], ["size/changed <= base + 0.3"], size.metrics())
    (value,) = objective.values(again, references)
    assert (value.value, value.variance) == (0, 0)
    assert objective.violations(again, references)["size/changed <= base + 0.3"].value == pytest.approx(-0.3)
    assert not objective.skills


def test_what_cannot_be_counted_is_refused(make_models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudyFileError, match="limit: unknown key"):
        Size({"limit": 3}, shares=SplitShares(), seed=0)
    with pytest.raises(EvaluationError, match="bind a model"):
        Size({}, shares=SplitShares(), seed=0).evaluate(Split.SEARCH)
    metrics = [MetricInfo("t", "acc", True, {Split.SEARCH: 40}), *Size({}, shares=SplitShares(), seed=0).metrics()]
    search = Search.model_validate({"racing": {}})
    first, *_ = search_problems(search, {"x": Float(0, 1)}, Objective(["t"], [], [], metrics))
    assert first == "search.racing: 'size/changed' is one number and cannot be compared in parts; leave racing out"
    _, live = make_models()
    monkeypatch.setattr("evaluators.costs.size.free_host_bytes", lambda: 1000)
    with pytest.raises(StudyFileError, match="a copy of the base takes"):
        bound(live.model)


class Silent:
    def note(self, text: str) -> None: ...
    def begin(self, **_: Any) -> None: ...
    def trial(self, *_: Any, **__: Any) -> None: ...
    def end(self) -> None: ...


def test_a_study_trades_it_for_drift(demo: Path, tmp_path: Path) -> None:
    drift = {
        "evaluator": "drift",
        "include_path": str(demo / "tasks"),
        "texts": "demo_maths/train.jsonl",
        "key": "query",
    }
    data = {
        "study": {"name": "s"},
        "models": {"base": str(demo / "models" / "base"), "experts": {"maths": str(demo / "models" / "maths")}},
        "space": {"type": "uniform", "presets": ["ties"]},
        "evaluate": [{**drift, "limit": 30}, {"evaluator": "size"}],
        "objective": {"minimise": ["drift/kl", "size/changed"], "constraints": ["size/changed <= 0.9"]},
        "search": {"n_trials": 5, "baselines": [], "finalists": 1},
        "device": "cpu",
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(data))
    study: optuna.Study = run(read_study_file(path), Silent())
    done = {r.name: r for r in finished_records(study)}
    assert done["base"].values[1] == 0
    assert done["base"].feasible
    assert 0.9 < done["maths"].values[1] <= 1
    assert not done["maths"].feasible
    assert all(r.attributes["noise"]["values"][1] == 0 for r in done.values())
