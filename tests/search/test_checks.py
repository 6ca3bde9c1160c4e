"""A search that cannot work is refused or warned of, with the number that would do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoder
import yaml

from merge_search.errors import StudyFileError
from merge_search.evaluation import AnswerEnds, Evaluation, MetricInfo, Scores, Split
from merge_search.objective import Objective, References
from merge_search.outcome import Outcome
from merge_search.search.checks import (
    MAX_DIMENSIONS,
    answer_notes,
    budget_notes,
    constraint_notes,
    question_notes,
    search_problems,
)
from merge_search.search.prepare import prepare
from merge_search.search.records import Record
from merge_search.search.samplers import check_sampler
from merge_search.space import Float, Parameter
from merge_search.study_file import Search, read_study_file

METRICS = [MetricInfo(t, "acc", True, {Split.SEARCH: 100}) for t in ("a", "b")]
ONE = Objective(["mean"], [], [], METRICS)


def test_cut_and_empty_answers_are_told_and_above_a_fifth_with_the_key_to_change() -> None:
    healthy, cut = AnswerEnds(100, 20, 0), AnswerEnds(100, 21, 3)
    assert answer_notes({"base": {}, "maths": {}}) == []
    (text,) = answer_notes({"base": {"gsm": healthy}, "maths": {"gsm": healthy}})
    assert text == "answers to gsm that hit the length limit: base 20 %, maths 20 %; empty: base 0 %, maths 0 %"
    few, many = answer_notes(
        {"base": {"gsm": healthy, "code": AnswerEnds(10, 0, 9)}, "maths": {"gsm": cut, "code": AnswerEnds(10)}}
    )
    assert "maths 21 %" in few
    assert "WARNING" in few
    assert "raise gen_kwargs.max_gen_toks (task_options.gsm)" in few
    assert "empty: base 90 %, maths 0 %" in many
    assert "gen_kwargs.until" in many
    assert "max_gen_toks" not in many


def space(n: int) -> dict[str, Parameter]:
    return {f"x{i}": Float(0, 1) for i in range(n)}


def test_a_space_must_vary_and_be_searchable() -> None:
    assert search_problems(Search(), space(1), ONE) == []
    assert "needs at least 1" in search_problems(Search(), space(0), ONE)[0]
    found = search_problems(Search(), space(100_000), ONE)
    assert f"100000 dimensions, and at most {MAX_DIMENSIONS}" in found[0]


def test_the_stop_rule_needs_one_objective() -> None:
    two = Objective(["a", "b"], [], [], METRICS)
    search = Search.model_validate({"stop": {}})
    assert search_problems(search, space(1), ONE) == []
    assert "needs one objective, found 2 (a, b)" in search_problems(search, space(1), two)[0]


def test_too_few_trials_for_the_start_are_said_with_the_number_that_would_do() -> None:
    assert budget_notes(10, 11) == []
    assert "At least 11" in budget_notes(10, 10)[0]


def scores(a: int, b: int) -> Evaluation:
    def of(n: int) -> Scores:
        v = np.array([1.0] * n + [0.0] * (100 - n))
        return Scores((), v, n / 100, 0.04)

    return Evaluation(Split.SEARCH, 1.0, {"a/acc": of(a), "b/acc": of(b)})


def notes(*constraints: str) -> list[str]:
    """Base (50, 50), experts x (90, 40) and y (40, 90), average (70, 70)."""
    objective = Objective(["mean"], [], constraints, METRICS)
    table = {"base": scores(50, 50), "x": scores(90, 40), "y": scores(40, 90), "average": scores(70, 70)}
    references = References.from_evaluations(METRICS, table["base"], {"x": table["x"], "y": table["y"]})
    records = []
    for i, (label, evaluation) in enumerate(table.items()):
        attributes: dict[str, Any] = {"evaluation": evaluation.to_attribute()}
        ok = all(v.value <= 0 for v in objective.violations(evaluation, references).values())
        records.append(Record(i, label, Outcome.OK, "", (0.5,), ok, attributes))
    return constraint_notes(records, objective, references)


def test_a_budget_in_questions_that_the_baselines_use_up_is_said_with_the_one_that_would_do() -> None:
    (found,) = question_notes(300, 6, 69, 48)
    assert "6 baselines come first, which ask 69 each, 414 together" in found
    assert "69 more and 48 for one step of its fit. At least 531 would" in found
    assert question_notes(531, 6, 69, 48) == []
    assert question_notes(None, 6, 69, 48) == []
    assert "69 more. At least 483 would" in question_notes(482, 6, 69, 0)[0]


def test_constraints_that_a_baseline_meets_are_not_mentioned() -> None:
    assert notes() == []
    assert notes("a >= base - 0.01", "b >= expert - 0.25") == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("a >= 0.95", "a >= 0.9"),
        ("a >= base + 0.45", "a >= base + 0.4"),
        ("b >= expert + 0.05", "b >= expert + 0"),
        ("b <= base - 0.2", "b <= base - 0.1"),
    ],
)
def test_a_constraint_that_no_baseline_meets_comes_with_the_number_that_would_do(text: str, number: str) -> None:
    (note,) = notes(text)
    assert "met by none of the 4 baselines" in note
    assert f"'{number}' would already hold" in note


def test_constraints_that_fail_only_together_are_said() -> None:
    (note,) = notes("a >= 0.8", "b >= 0.8")
    assert "no baseline meets all 2 constraints at once; average comes nearest" in note
    assert "a >= 0.8 by 0.1, b >= 0.8 by 0.1" in note


def drift_study(demo: Path) -> dict[str, Any]:
    """A study of drift alone."""
    drift = {
        "evaluator": "drift",
        "include_path": str(demo / "tasks"),
        "texts": "demo_maths/train.jsonl",
        "key": "query",
    }
    return {
        "study": {"name": "n"},
        "models": {"base": str(demo / "models" / "base"), "experts": {"maths": str(demo / "models" / "maths")}},
        "space": {"type": "uniform", "presets": ["task_arithmetic"]},
        "evaluate": [drift],
        "objective": {"minimise": "drift/kl"},
        "device": "cpu",
    }


def refused(folder: Path, demo: Path, **changes: Any) -> str:
    """What a study of drift alone is refused with, before any weight."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(drift_study(demo) | changes))
    with pytest.raises(StudyFileError) as caught:
        prepare(read_study_file(path))
    return str(caught.value)


def test_a_learner_is_refused_where_no_evaluator_has_a_gradient(demo: Path, tmp_path: Path) -> None:
    assert "no evaluator of this study has a differentiable loss" in refused(tmp_path, demo, search={"learner": {}})


def test_a_users_own_space_is_held_to_the_same_sizes(demo: Path, tmp_path: Path) -> None:
    source = (
        "from merge_search.space import Float\n"
        "class Mine:\n"
        "    def __init__(self, options, context):\n"
        "        self.parameters = {f'x{i}': Float(0, 1) for i in range(options['n'])}\n"
        "    def decode(self, point): ...\n"
        "    def encode(self, recipe): ...\n"
        "    def initial_points(self): return []\n"
    )
    (tmp_path / "mine.py").write_text(source)
    assert "0 dimensions" in refused(tmp_path, demo, space={"type": "mine.py:Mine", "n": 0})
    assert "5000 dimensions" in refused(tmp_path, demo, space={"type": "mine.py:Mine", "n": 5000})


def test_retention_of_costs_alone_is_refused(demo: Path, tmp_path: Path) -> None:
    assert "found only costs" in refused(tmp_path, demo, objective={"maximise": "mean_retention"})


def test_every_look_of_a_race_must_ask_something_new() -> None:
    few = [MetricInfo("a", "acc", True, {Split.SEARCH: 4}), MetricInfo("b", "acc", True, {Split.SEARCH: 40})]
    search = Search.model_validate({"racing": {"looks": [0.25, 0.5]}})
    (found,) = search_problems(search, space(1), Objective(["mean"], [], [], few))
    assert "found [2, 2], at last 4, of the 4 search questions of 'a/acc'" in found
    assert search_problems(search, space(1), ONE) == []


def test_an_expert_cannot_be_called_like_a_baseline(demo: Path, tmp_path: Path) -> None:
    """Baselines are told apart by their names: its scores would pass for those of the baseline."""
    path = tmp_path / "study.yaml"
    task = {"evaluator": "lm_eval", "tasks": ["demo_maths"], "include_path": str(demo / "tasks"), "limit": 40}
    experts = {"ties": str(demo / "models" / "maths"), "stories": str(demo / "models" / "stories")}
    data = {
        "study": {"name": "s"},
        "models": {"base": str(demo / "models" / "base"), "experts": experts},
        "evaluate": [task],
    }
    path.write_text(yaml.safe_dump({**data, "search": {"baselines": ["ties"]}}))
    with pytest.raises(StudyFileError, match="'ties' is the name of a baseline"):
        prepare(read_study_file(path))
    path.write_text(yaml.safe_dump({**data, "search": {"baselines": []}}))
    assert prepare(read_study_file(path)).context.experts == ("stories", "ties")


@pytest.mark.parametrize(
    ("sampler", "options", "problem"),
    [
        ("botorch", {"n_startups": 3}, "search.sampler_options.n_startups: unknown key; did you mean 'n_startup'?"),
        ("botorch", {"kernel": "flat"}, "search.sampler_options.kernel: input should be 'tied' or 'plain', got 'flat'"),
        ("tpe", {"n_startup": 3}, "search.sampler_options.n_startup: unknown key; did you mean 'n_startup_trials'?"),
        ("tpe", {"n_startup_trials": "ten"}, "n_startup_trials: input should be a valid integer, got 'ten'"),
        ("tpe", {"gamma": 3}, "search.sampler_options.gamma: unknown key"),  # Optuna's takes a function there
        ("gp", {"deterministic": True}, "did you mean 'deterministic_objective'?"),
        ("cmaes", {"popsize": 1.5}, "search.sampler_options.popsize: input should be a valid integer, got 1.5"),
        ("nsga2", {"mutation_probe": 0.1}, "did you mean 'mutation_prob'?"),
        ("nsga2", {"population_size": 1}, "population_size"),  # what Optuna's class itself refuses
        ("random", {"n": 1}, "search.sampler_options.n: unknown key"),
        ("tpe", {"seed": 1}, "search.sampler_options: seed must be left out"),
    ],
)
def test_wrong_options_of_a_sampler_are_refused_before_any_weight(
    demo: Path, tmp_path: Path, sampler: str, options: dict[str, Any], problem: str
) -> None:
    assert problem in refused(tmp_path, demo, search={"sampler": sampler, "sampler_options": options})


def test_a_sampler_of_one_objective_is_refused_for_two(demo: Path, tmp_path: Path) -> None:
    (drift,) = drift_study(demo)["evaluate"]
    two = {"evaluate": [drift, {**drift, "evaluator": "latency"}], "objective": {"minimise": ["drift", "latency"]}}
    assert "sampler 'cmaes' needs one objective" in refused(tmp_path, demo, **two, search={"sampler": "cmaes"})


def test_options_that_can_be_said_are_taken() -> None:
    for name, options in {
        "botorch": {"n_startup": 8, "kernel": "plain", "multi_objective": "parego", "cost_power": 1},
        "tpe": {"n_startup_trials": 5, "group": False},
        "gp": {"deterministic_objective": True},
        "cmaes": {"n_startup_trials": 2},
        "nsga2": {"population_size": 8, "mutation_prob": 0.1},
        "random": {},
    }.items():
        check_sampler(name, options)


def test_validate_looks_for_earlier_studies_and_a_study_that_goes_on_does_not(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**drift_study(demo), "search": {"learn_from": ["gone.yaml"]}}))
    prepare(read_study_file(path))
    with pytest.raises(StudyFileError, match=r"search\.learn_from\.0: .*no such file: .*gone\.yaml"):
        prepare(read_study_file(path), is_new=True)


def test_files_of_evaluators_are_relative_to_the_study_file(
    demo: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = encoder_folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    texts = {"texts": "animal.jsonl", "key": "text"}
    tasks = {**tiny_encoder.options(encoder_folder)}
    del tasks["include_path"]
    data = drift_study(demo) | {
        "evaluate": [
            {"evaluator": "drift", **texts},
            {"evaluator": "latency", **texts, "texts": str(encoder_folder / "animal.jsonl")},
            {"evaluator": "classification", **tasks},
        ],
    }
    path = encoder_folder / "study.yaml"
    path.write_text(yaml.safe_dump(data))
    plan = prepare(read_study_file(path))
    n = {m.name: sum(m.n_questions.values()) for m in plan.metrics}
    assert n["drift/kl"] == n["latency/seconds"] == 60
    assert n["colour/acc"] > 0
    data["evaluate"][0]["texts"] = "animl.jsonl"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(StudyFileError, match=f"no file animl.jsonl in {encoder_folder};"):
        prepare(read_study_file(path))


def test_task_files_of_lm_eval_are_relative_to_the_study_file(
    demo: Path, scored_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scored_folder, tmp_path / "mine" / "tasks")
    path = tmp_path / "mine" / "study.yaml"
    entry = {"evaluator": "lm_eval", "tasks": ["tasks/t_choice.yaml"]}
    path.write_text(yaml.safe_dump({**drift_study(demo), "evaluate": [entry], "objective": {"maximise": "t_choice"}}))
    assert prepare(read_study_file(path)).metrics[0].task == "t_choice"
