"""What a study tries first: each entry is queued once, in its order, and none that is another one again."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from small_spaces import CONTEXT, build

from merge_search.evaluation import Cost, Evaluation, MetricInfo, Scores, Split
from merge_search.objective import Objective
from merge_search.outcome import Outcome
from merge_search.presets import preset
from merge_search.recipe import Recipe
from merge_search.search import first_trials
from merge_search.search.first_trials import FirstTrials
from merge_search.search.plan import Baseline
from merge_search.search.start.earlier_studies import EarlierPoint
from merge_search.search.start.learned_space import LearnedSpace
from merge_search.search.trial.job import Failed, Job
from merge_search.study_file import BaselineFit, Learner, Search

OBJECTIVE = Objective(["t"], [], [], [MetricInfo("t", "acc", True, {Split.SEARCH: 100})])
REFERENCES = ["base", *CONTEXT.experts]
FITTED = Baseline("adamerging", fit=BaselineFit(steps=5))


def evaluation(share: float) -> dict[str, Any]:
    values = np.array([1.0] * round(100 * share) + [0.0] * round(100 * (1 - share)))
    return Evaluation(Split.SEARCH, 1.0, {"t/acc": Scores((), values, share, 0.05)}, Cost(0.0, 1.0, 100)).to_attribute()


class Executor:
    """It measures nothing, and a fit asks ten questions a step."""

    models = CONTEXT.models

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def can_measure(self, kind: str) -> bool:
        return False

    def fit_questions(self, settings: Any) -> int:
        return 10 * int(settings["steps"])

    def submit(self, job: Job) -> Future[Any]:
        future = Future[Any]()
        future.set_result(self.answer)
        return future


def first(study: optuna.Study, *named: Baseline, space: Any = None, answer: Any = None, **search: Any) -> FirstTrials:
    """The first trials of a run on `study`, whose base answered half of its questions."""
    if "reference.base" not in study.user_attrs:
        study.set_user_attr("reference.base", {"evaluation": evaluation(0.5)})
    file = SimpleNamespace(search=Search(**search))
    plan: Any = SimpleNamespace(
        space=space or build("uniform", presets=["task_arithmetic"]), objective=OBJECTIVE, file=file, context=CONTEXT,
        baselines=list(named), fidelity=1.0,
    )  # fmt: skip
    executor: Any = Executor(answer)
    return FirstTrials(plan, study, executor, lambda text: None)


def queued(study: optuna.Study) -> list[str]:
    return [t.user_attrs["start"] for t in study.trials if "start" in t.user_attrs]


def finish(study: optuna.Study, **recipes: Recipe) -> None:
    """Every queued trial is scored; a fitted baseline ends at the recipe of its label."""
    while any(t.state == optuna.trial.TrialState.WAITING for t in study.trials):
        trial = study.ask()
        label = trial.user_attrs.get("label", "")
        recipe = recipes.get(label) or preset("average", CONTEXT.models)
        for key, value in {"outcome": "ok", "recipe": recipe.to_json(), "evaluation": evaluation(0.4)}.items():
            trial.set_user_attr(key, value)
        study.tell(trial, 0.4)


def test_baselines_come_first_and_are_queued_once() -> None:
    study = optuna.create_study(direction="maximize")
    first(study, Baseline("ties"))
    wanted = [*REFERENCES, "average", "task_arithmetic", "ties"]
    assert queued(study) == wanted
    first(study, Baseline("ties"))
    assert queued(study) == wanted
    by_label = {t.user_attrs["label"]: t for t in study.trials}
    assert "given_recipe" not in by_label["task_arithmetic"].user_attrs  # the space holds it
    assert by_label["task_arithmetic"].system_attrs["fixed_params"]
    assert Recipe.from_json(by_label["ties"].user_attrs["given_recipe"]).preset == "ties"


def test_a_baseline_that_is_named_later_is_queued_and_a_default_one_is_not() -> None:
    study = optuna.create_study(direction="maximize")
    first(study)
    finish(study)
    assert first(study).go_on()
    before = queued(study)
    first(study, Baseline("ties"))  # a default of a newer version
    assert queued(study) == before
    first(study, Baseline("ties"), baselines=["ties"])
    assert queued(study) == [*before, "ties"]


def test_a_merge_under_a_second_name_is_left_out_and_a_fit_that_begins_there_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = preset("average", CONTEXT.models)
    monkeypatch.setattr(
        first_trials, "baselines", lambda *_, **__: dict.fromkeys(("adamerging", "average", "twin"), recipe)
    )
    study = optuna.create_study(direction="maximize")
    first(study, FITTED)
    assert queued(study) == ["adamerging", "average"]
    fitted = study.trials[0].user_attrs
    assert fitted["given_fit"]["steps"] == 5
    assert Recipe.from_json(fitted["given_recipe"]) == recipe


def test_points_of_earlier_studies_are_queued_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def starts_from(file: Any, models: Any, space: Any, done: list[str], note: Any) -> Any:
        asked.append(list(done))
        yield "old.yaml", [EarlierPoint(f"old.{i}", {"coefficient": 0.1 * i}) for i in (1, 2)]

    monkeypatch.setattr(first_trials, "starts_from", starts_from)
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({"coefficient": 0.1}, user_attrs={"start": "old.1"})  # by a run that was killed
    first(study)
    assert queued(study).count("old.1") == queued(study).count("old.2") == 1
    first(study)
    assert asked == [[], ["old.yaml"]]


def test_the_first_points_wait_until_all_baselines_are_finished_and_are_queued_once() -> None:
    study = optuna.create_study(direction="maximize")
    space = build("uniform", presets=["task_arithmetic", "ties"])
    one = first(study, space=space)
    assert one.go_on()  # there are trials to run
    assert "start.0" not in queued(study)
    running = study.ask()
    finish_others(study, running)
    assert not one.go_on()  # the one that runs must end first
    study.tell(running, 0.3)
    assert one.go_on()
    points = [name for name in queued(study) if name.startswith("start.")]
    assert points == sorted(set(points))
    assert points
    n_trials = len(study.trials)
    assert first(study, space=space).go_on()
    assert len(study.trials) == n_trials


def finish_others(study: optuna.Study, running: optuna.Trial) -> None:
    finish(study)
    assert study.trials[running.number].state == optuna.trial.TrialState.RUNNING


def test_the_first_points_are_those_of_the_space_without_the_baselines() -> None:
    study = optuna.create_study(direction="maximize")
    space = build("uniform", presets=["task_arithmetic", "ties"])
    one = first(study, Baseline("ties"), space=space)
    points = one._first_points()
    assert 0 < len(points) < len(space.initial_points())
    assert not {space.decode(p).fingerprint for p in points} & one._baselines


def test_results_of_fitted_baselines_come_before_the_spaces_points_where_the_space_holds_them() -> None:
    study = optuna.create_study(direction="maximize")
    one = first(study, FITTED)
    held = preset("task_arithmetic", CONTEXT.models, coefficients=0.125, seed=CONTEXT.seed, dtype=CONTEXT.dtype)
    finish(study, adamerging=held)
    points = one._first_points()
    assert points[0]["coefficient"] == 0.125
    assert all(p["coefficient"] != 0.125 for p in points[1:])
    raced = optuna.create_study(direction="maximize")
    for trial in study.trials:
        if trial.user_attrs.get("label") == FITTED.label:
            trial.user_attrs["outcome"] = "raced"
        raced.add_trial(trial)
    assert all(p["coefficient"] != 0.125 for p in first(raced, FITTED)._first_points())


LEARNER = {"steps": [0, 4], "loss": "entropy", "batch_rows": 4}


def learned(presets: Sequence[str] = ("task_arithmetic",), **learner: Any) -> LearnedSpace:
    space = build("uniform", presets=list(presets))
    return LearnedSpace(space, Learner(**{**LEARNER, **learner}), n_rows=5000)


def test_with_a_learner_a_baseline_is_left_out_where_it_is_not_fitted_further_and_results_come_first() -> None:
    study = optuna.create_study(direction="maximize")
    space = learned(presets=["task_arithmetic", "ties"], loss="gold")
    one = first(study, FITTED, Baseline("ties"), space=space)
    held = preset("task_arithmetic", CONTEXT.models, coefficients=0.125, seed=CONTEXT.seed, dtype=CONTEXT.dtype)
    finish(study, adamerging=held)
    result, *points = one._first_points()
    assert (result["coefficient"], result["learner.steps"]) == (0.125, 0)
    plain = [p for p in points if not p["learner.steps"]]
    usual = [p for p in space.initial_points() if not p["learner.steps"]]
    assert 0 < len(plain) < len(usual)
    assert not {space.decode(p).fingerprint for p in plain} & one._baselines
    assert any(p["learner.steps"] for p in points)


@pytest.mark.parametrize(
    ("outcome", "is_average"),
    [(Outcome.NON_FINITE, True), (Outcome.MERGE_ERROR, False), (Outcome.OUT_OF_MEMORY, False)],
)
def test_fits_for_entropy_begin_at_the_average_where_the_usual_start_gives_nan_and_not_where_it_fails_otherwise(
    outcome: Outcome, is_average: bool
) -> None:
    study = optuna.create_study(direction="maximize")
    found = first(study, space=learned(), answer=Failed(outcome, "why"))._sound_start()
    assert (found is not None) == is_average
    if found is not None:
        assert set(found.coefficients.values()) == {1 / 3}


@pytest.mark.parametrize(("questions", "can"), [(209, False), (210, True), (None, True)])
def test_the_usual_start_is_scored_where_the_budget_pays_for_it_a_trial_and_one_step(
    questions: int | None, can: bool
) -> None:
    """Base, asked 100 questions; a score of 100; ten questions for one step. What is left is without a trial's 100."""
    study = optuna.create_study(direction="maximize")
    budget = {} if questions is None else {"questions": questions + 100}
    assert first(study, space=learned(), **budget)._can_afford_a_score_and_a_step() is can


def test_a_recipe_where_a_fitted_baseline_begins_is_still_one_of_the_first_points() -> None:
    study = optuna.create_study(direction="maximize")
    point = build("uniform", presets=["task_arithmetic"]).initial_points()[0]
    one = first(study, Baseline("adamerging", fit=BaselineFit(steps=5, start=point["coefficient"])))
    (fitted,) = [t for t in study.trials if t.user_attrs.get("label") == FITTED.label]
    begins = Recipe.from_json(fitted.user_attrs["given_recipe"])
    assert begins.fingerprint == one.plan.space.decode(point).fingerprint
    assert point in one._first_points()


@pytest.mark.parametrize(("questions", "steps"), [(1000, 80), (209, 0), (210, 1)])
def test_the_budget_says_how_many_steps_it_pays_for_however_few_a_fit_takes(questions: int, steps: int) -> None:
    """Without the base's 100 questions and the 100 of the trial's own scores, at ten questions a step."""
    study = optuna.create_study(direction="maximize")
    settings = {"steps": 4}
    assert first(study, space=learned(), questions=questions)._affordable(settings) == steps
    assert first(study, space=learned())._affordable(settings) is None


def test_a_note_says_that_the_first_trials_leave_nothing_for_the_search() -> None:
    study = optuna.create_study(direction="maximize")
    one = first(study)
    n_first = len(queued(study)) + len(one._first_points())
    assert one.notes(n_first + 5) == []
    (text,) = one.notes(n_first)
    assert f"{n_first} baselines and start points come first: nothing is left for the sampler" in text
