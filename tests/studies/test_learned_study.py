"""The second level from the outside: learned trials are ordinary trials, kept by their recipes and maps alone."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import optuna
import pytest
import yaml
from command_line import here
from optuna.trial import TrialState
from small_spaces import CONTEXT, build

from merge_search.evaluation import Cost, Evaluation, MetricInfo, Scores, Split
from merge_search.objective import Objective
from merge_search.presets import preset
from merge_search.recipe import Models, Recipe
from merge_search.search.budget import Budget, questions_asked
from merge_search.search.first_trials import FirstTrials
from merge_search.search.records import Record, finished_records
from merge_search.search.start.learned_space import LearnedSpace
from merge_search.search.start.warm_start import better_start, structure_of
from merge_search.search.storage import reclaim_lost_trials
from merge_search.search.trial.job import Job, Scored
from merge_search.space import Categorical, Float, SearchSpace
from merge_search.study_file import Learner, Search

EXPERTS = ["maths", "stories", "spelling"]


def write_study(folder: Path, demo: Path, **search: Any) -> Path:
    data = {
        "study": {"name": "learned", "seed": 1},
        "models": {
            "base": str(demo / "models" / "base"),
            "experts": {e: str(demo / "models" / e) for e in EXPERTS},
            "dtype": "float32",
        },
        "space": {"type": "uniform", "presets": ["task_arithmetic"]},
        "evaluate": [
            {"evaluator": "lm_eval", "tasks": [f"demo_{e}" for e in EXPERTS], "include_path": str(demo / "tasks"),
             "batch_size": 64, "limit": 60, "fit_limit": 64}
        ],
        "search": {"baselines": [], "finalists": 2, "sampler": "random", **search},
        "device": "cpu",
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def learned(path: Path) -> list[Record]:
    study = optuna.load_study(study_name="learned", storage=f"sqlite:///{path.parent / 'learned.db'}")
    return [r for r in finished_records(study) if "learner" in r.attributes]


@pytest.fixture(scope="module")
def finished(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    learner = {"per": "row", "steps": [0, 4, 6], "step_size": 0.1, "batch_rows": 8}
    path = write_study(tmp_path_factory.mktemp("learned"), demo, n_trials=9, learner=learner)
    here("run", path)
    return path


def test_a_learned_trial_stores_a_map_and_what_it_cost_and_the_next_goes_on_from_it(finished: Path) -> None:
    first, second = learned(finished)[:2]
    for record, steps in ((first, 4), (second, 6)):
        assert record.attributes["learner"]["per"] == "row"
        assert set(record.recipe.maps) == set(EXPERTS)
        asked = 3 * 8 * len(EXPERTS) * steps  # forward, and a backward that counts as two; rows, tasks, steps
        assert record.cost.questions == asked + sum(len(s.values) for s in record.evaluation.scores.values())
    losses = second.attributes["learner"]["losses"]
    assert sum(b for _, b in losses.values()) < sum(a for a, _ in first.attributes["learner"]["losses"].values())
    assert first.attributes["learner"]["seed"] != second.attributes["learner"]["seed"]


@pytest.mark.parametrize("loss", ["gold", "kl"])
def test_a_fit_takes_the_steps_that_the_budget_still_pays_for(demo: Path, tmp_path: Path, loss: str) -> None:
    learner = {"per": "block", "steps": [0, 200], "step_size": 0.1, "batch_rows": 8, "loss": loss}
    path = write_study(tmp_path, demo, n_trials=30, finalists=1, learner=learner, questions=2000)
    here("run", path)
    (only,) = learned(path)
    assert all(isinstance(c, dict) for c in only.recipe.coefficients.values())
    study = optuna.load_study(study_name="learned", storage=f"sqlite:///{path.parent / 'learned.db'}")
    per_step = (3 if loss == "gold" else 3 + 2) * 8 * len(EXPERTS)  # an expert answers in two questions at most
    assert 0 < only.attributes["learner"]["steps"] < 200
    assert only.attributes["cut_short"]
    before = sum(r.cost.questions for r in finished_records(study) if r.number <= only.number)
    assert 2000 - per_step < before <= 2000


def test_kill_9_in_a_long_fit_is_charged_what_it_asked_until_shortly_before(demo: Path, tmp_path: Path) -> None:
    learner = {"per": "block", "steps": 1_000_000, "step_size": 0.01, "batch_rows": 8}
    path = write_study(tmp_path, demo, n_trials=20, learner=learner)
    process = subprocess.Popen([sys.executable, "-m", "merge_search", "run", str(path)], stderr=subprocess.DEVNULL)
    try:
        asked = _asked_in_a_fit(path, process)
    finally:
        process.kill()
        process.wait()
    study = optuna.load_study(study_name="learned", storage=f"sqlite:///{tmp_path / 'learned.db'}")
    scored = sum(r.cost.questions for r in finished_records(study))
    assert asked % (3 * 8 * len(EXPERTS)) == 0
    assert questions_asked(study) >= scored + asked
    assert len(reclaim_lost_trials(study)) == 1
    assert questions_asked(study) >= scored + asked


def _asked_in_a_fit(path: Path, process: subprocess.Popen[bytes]) -> int:
    """Until a trial that still runs was charged; by how much."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            study = optuna.load_study(study_name="learned", storage=f"sqlite:///{path.parent / 'learned.db'}")
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        except Exception:  # the database is not there yet
            running = []
        for trial in running:
            if "cost" in trial.user_attrs and "evaluation" not in trial.user_attrs:
                return int(trial.user_attrs["cost"][2])
        time.sleep(0.1)
    raise AssertionError(f"no fit was charged while it ran (status {process.poll()})")


def asked_by_the_learner(record: Record) -> int:
    return record.cost.questions - sum(len(s.values) for s in record.evaluation.scores.values())


def test_trials_learn_from_the_experts_alone_and_ask_them_for_the_rows_they_draw(demo: Path, tmp_path: Path) -> None:
    learner = {"per": "block", "steps": 4, "step_size": 0.1, "batch_rows": 8, "loss": "kl", "warm_start": False}
    here("run", write_study(tmp_path, demo, n_trials=8, finalists=1, learner=learner))
    path = write_study(tmp_path, demo, n_trials=9, finalists=1, learner=learner)
    first, second, *rest = learned(path)
    here("run", path)
    resumed = learned(path)[-1]
    assert resumed.number > max(r.number for r in (second, *rest))
    steps = 3 * 8 * len(EXPERTS) * 4
    labels = 4 * 8 * (2 + 1 + 2)  # two questions for an answer that is generated, one for a chosen one
    assert asked_by_the_learner(first) == steps + labels
    assert steps < asked_by_the_learner(second) < steps + labels  # some rows were answered for the first
    assert asked_by_the_learner(resumed) == steps + labels  # a new run knows none
    losses = first.attributes["learner"]["losses"]
    assert sum(b for _, b in losses.values()) < sum(a for a, _ in losses.values())


def test_block_outputs_are_learned_from_the_experts_alone_which_answer_once(demo: Path, tmp_path: Path) -> None:
    learner = {"per": "block", "steps": 4, "step_size": 0.1, "batch_rows": 8, "loss": "block_output"}
    path = write_study(tmp_path, demo, n_trials=8, finalists=1, learner={**learner, "warm_start": False})
    here("run", path)
    first, second = (asked_by_the_learner(r) for r in learned(path)[:2])
    rows = 64 * len(EXPERTS)  # all that are held go through the blocks
    assert second == 3 * 8 * len(EXPERTS) * 4 + 4 * rows
    assert first == second + rows


def test_an_exported_map_travels_with_its_recipe(finished: Path, tmp_path: Path) -> None:
    row = learned(finished)[0]
    here("export", finished, tmp_path / "a", "--trial", str(row.number))
    assert len(list((tmp_path / "a" / "maps").iterdir())) == len(set(row.recipe.maps.values()))
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    here("merge", tmp_path / "elsewhere" / "recipe.json", tmp_path / "b")
    name = "model.safetensors"
    assert (tmp_path / "elsewhere" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_map_cannot_be_said_in_mergekits_language(finished: Path, tmp_path: Path) -> None:
    row = learned(finished)[0]
    result = here("export", finished, tmp_path / "merge.yml", "--mergekit", "--trial", str(row.number), check=False)
    assert result.returncode == 2
    assert "mergekit has no coefficients by row" in result.stderr
    assert not (tmp_path / "merge.yml").exists()


def test_a_recipe_that_needs_data_travels_with_its_statistics(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, n_trials=7, baselines=["fisher"])
    here("run", path)
    study = optuna.load_study(study_name="learned", storage=f"sqlite:///{tmp_path / 'learned.db'}")
    fisher = next(r for r in finished_records(study) if r.label == "fisher")
    assert fisher.is_scored
    here("export", path, tmp_path / "a", "--trial", str(fisher.number))
    (tmp_path / "learned.statistics").rename(tmp_path / "gone")
    here("merge", tmp_path / "a" / "recipe.json", tmp_path / "b")
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_budget_in_questions_ends_the_search(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, n_trials=100, questions=700, racing={"looks": [0.3, 0.6], "error": 0.2})
    result = here("run", path)
    study = optuna.load_study(study_name="learned", storage=f"sqlite:///{tmp_path / 'learned.db'}")
    done = finished_records(study)
    asked = [r.cost.questions for r in done]
    assert sum(asked[:-1]) < 700 <= sum(asked)
    assert "700 questions are asked" in result.stderr
    raced = [r for r in done if r.outcome == "raced"]
    assert raced, "bad candidates of a wide space must be stopped early"
    assert all(r.attributes["fidelity"] < 1 and r.cost.questions < asked[0] for r in raced)


def test_a_budget_that_pays_for_no_fit_is_said_before_any_trial_with_the_one_that_would_do(
    demo: Path, tmp_path: Path
) -> None:
    search = {"n_trials": 30, "finalists": 1, "learner": {"steps": [0, 200], "per": "block", "batch_rows": 8}}
    text = here("run", write_study(tmp_path, demo, **search, questions=500)).stderr
    note = text[text.index("search.questions is 500") : text.index("trial 1/30")]
    enough = int(note.partition("At least ")[2].split()[0])
    (tmp_path / "learned.db").unlink()
    path = write_study(tmp_path, demo, **search, questions=enough)
    assert "search.questions is" not in here("run", path).stderr
    assert [r.attributes["learner"]["steps"] for r in learned(path)] == [1]


def test_a_loss_that_a_task_lacks_is_refused_with_those_it_has(demo: Path, tmp_path: Path) -> None:
    result = here("validate", write_study(tmp_path, demo, learner={"loss": ["gold", "choice"]}), check=False)
    assert result.returncode != 0
    assert "task 'demo_maths' has no loss 'choice'; it has gold, pseudo, kl, entropy" in result.stderr
    assert "demo_stories" not in result.stderr


DOUBLED = """
from evaluators.lm_eval.evaluator import LmEval

class Doubled(LmEval):
    def losses(self, task):
        return (*super().losses(task), "doubled")

    def loss(self, task, rows, kind="gold"):
        return 2 * super().loss(task, rows) if kind == "doubled" else super().loss(task, rows, kind)
"""


def test_a_learner_fits_to_any_loss_that_an_evaluator_from_a_file_has(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(DOUBLED)
    first = {}
    for loss in ("gold", "doubled"):
        (tmp_path / loss).mkdir()
        learner = {"per": "expert", "steps": [0, 1], "batch_rows": 8, "loss": loss}
        path = write_study(tmp_path / loss, demo, n_trials=7, learner=learner)
        path.write_text(path.read_text().replace("evaluator: lm_eval", f"evaluator: {tmp_path / 'judge.py'}:Doubled"))
        here("run", path)
        first[loss] = [a for a, _ in learned(path)[0].attributes["learner"]["losses"].values()]
    assert first["doubled"] == pytest.approx([2 * a for a in first["gold"]], rel=1e-5)


def test_a_learner_without_rows_is_refused_with_the_number_that_would_do(demo: Path, tmp_path: Path) -> None:
    learner = {"steps": 5, "batch_rows": 100}
    result = here("run", write_study(tmp_path, demo, learner=learner), check=False)
    assert result.returncode == 2
    assert "at least one batch of 100 rows to fit on, found 64; batch_rows: 64 would do" in result.stderr
    learner["batch_rows"] = 64
    here("validate", write_study(tmp_path, demo, learner=learner))


def test_tasks_that_share_no_questions_with_a_learner_are_told_the_share_that_would_do(
    demo: Path, tmp_path: Path
) -> None:
    path = write_study(tmp_path, demo, learner={"steps": 5, "batch_rows": 12})
    data = yaml.safe_load(path.read_text())
    data["evaluate"][0] |= {"fit": "search", "limit": 120}
    path.write_text(yaml.safe_dump(data))
    text = here("validate", path, check=False).stderr
    assert "found 0; splits.fit: 0.15 would give it about 18; or give it a training split" in text
    data["splits"] = {"fit": 0.15}
    path.write_text(yaml.safe_dump(data))
    here("validate", path)


class Line(SearchSpace):
    """A space of one coefficient."""

    parameters = {"c": Float(0.0, 1.0)}  # noqa: RUF012
    models = Models(base="b", experts={"x": "x"})

    def decode(self, point: Any) -> Recipe:
        return Recipe(models=self.models, coefficients={"x": point["c"]})

    def encode(self, recipe: Recipe) -> dict[str, Any]:
        return {"c": recipe.coefficients["x"]}

    def initial_points(self) -> list[dict[str, Any]]:
        return [{"c": 0.5}]


def test_a_learned_space_adds_only_what_varies() -> None:
    space = LearnedSpace(Line(), Learner(steps=[0, 30], per=["block"], step_size=(0.01, 0.1)), n_rows=500)
    assert space.parameters == {
        "c": Float(0.0, 1.0), "learner.steps": Categorical((0, 30)), "learner.step_size": Float(0.01, 0.1, log=True)
    }  # fmt: skip
    point = {"c": 0.25, "learner.steps": 30, "learner.step_size": 0.05}
    settings = space.settings(point, seed=3)
    assert settings is not None
    assert (settings["steps"], settings["per"], settings["step_size"], settings["seed"]) == (30, "block", 0.05, 3)
    assert space.settings({**point, "learner.steps": 0}, seed=3) is None
    assert space.encode(space.decode(point)) == {
        "c": 0.25,
        "learner.steps": 0,
        "learner.step_size": pytest.approx(0.0316, rel=1e-3),
    }


@pytest.mark.parametrize(
    ("n_rows", "per"),
    [(5000, ["tensor", "row", "row"]), (500, ["block", "tensor", "tensor"]), (50, ["block", "block", "block"])],
)
def test_the_first_learned_trials_climb_to_the_finest_that_the_rows_allow(n_rows: int, per: list[str]) -> None:
    space = LearnedSpace(Line(), Learner(steps=[100, 0, 25, 50]), n_rows=n_rows)
    *ladder, plain = space.initial_points()
    assert [p["learner.per"] for p in ladder] == per
    assert [p["learner.steps"] for p in ladder] == [25, 50, 100]
    assert plain["learner.steps"] == 0


@pytest.mark.parametrize(
    ("paid", "fits"),
    [
        (0, [("tensor", 100)]), (24, [("tensor", 100)]), (25, [("row", 100)]), (100, [("row", 100)]),
        (101, [("row", 100)] * 2), (5000, [("row", 100)] * 3),
    ],
)  # fmt: skip
def test_with_a_budget_in_questions_the_longest_fit_comes_first_as_fine_as_it_is_fed(
    paid: int, fits: list[tuple[str, int]]
) -> None:
    space = LearnedSpace(Line(), Learner(steps=[0, 25, 50, 100], batch_rows=16), n_rows=5000)
    *ladder, plain = space.initial_points(affordable=lambda settings: paid)
    assert [(p["learner.per"], p["learner.steps"]) for p in ladder] == fits
    assert plain["learner.steps"] == 0


def test_the_ladder_begins_at_the_recipe_it_is_given() -> None:
    space = LearnedSpace(Line(), Learner(steps=[0, 5, 9]), n_rows=5000)
    begin = Recipe(models=Line.models, coefficients={"x": 0.125})
    *ladder, plain = space.initial_points(begin)
    assert [p["c"] for p in ladder] == [0.125, 0.125]
    assert plain["c"] == 0.5


OBJECTIVE = Objective(["t"], [], [], [MetricInfo("t", "acc", True, {Split.SEARCH: 100})])


def merges(**answers: list[int]) -> optuna.Study:
    """A study of scored baselines: preset -> right or wrong, by question."""
    study = optuna.create_study(direction="maximize")
    for name, right in answers.items():
        trial, values = study.ask(), np.array(right, dtype=float)
        scores = {"t/acc": Scores((), values, float(values.mean()), float(values.std() / 10))}
        recipe = preset(name, CONTEXT.models, seed=CONTEXT.seed, dtype=CONTEXT.dtype)
        for key, value in {
            "label": name, "evaluation": Evaluation(Split.SEARCH, 1.0, scores).to_attribute(), "outcome": "ok",
            "recipe": recipe.to_json(), "noise": {"value": 0.002},
        }.items():  # fmt: skip
            trial.set_user_attr(key, value)
        study.tell(trial, float(values.mean()))
    return study


@pytest.mark.parametrize(
    ("tsv_m", "begins_at"),
    [
        ([1] * 80 + [0] * 20, "tsv_m"),
        ([0] + [1] * 64 + [0] * 35, "tsv_m"),
        ([0] * 2 + [1] * 62 + [0] * 36, ""),
        ([1] * 50 + [0] * 50, ""),
    ],
)
def test_the_ladder_begins_at_plain_deltas_unless_another_structure_is_probably_better(
    tsv_m: list[int], begins_at: str
) -> None:
    """On 100 paired questions with the average, 5 wins and a loss are 1.7 standard errors, 4 wins and 2 losses 0.8."""
    space = LearnedSpace(build("uniform", presets=["task_arithmetic", "tsv_m"]), Learner(), n_rows=5000)
    average, task_arithmetic = [1] * 60 + [0] * 40, [1] * 55 + [0] * 45
    study = merges(
        average=average, task_arithmetic=task_arithmetic, tsv_m=tsv_m, sce=[1] * 100
    )  # sce: not in the space
    found = better_start(study, OBJECTIVE, space)
    assert ("" if found is None else found.preset) == begins_at


def test_a_structure_that_was_raced_or_is_better_in_nothing_that_is_asked_changes_no_start() -> None:
    space = LearnedSpace(build("uniform", presets=["task_arithmetic", "tsv_m"]), Learner(), n_rows=5000)
    study = merges(average=[1] * 20 + [0] * 80, tsv_m=[1] * 90 + [0] * 10)
    assert better_start(study, OBJECTIVE, space) is not None
    least = Objective([], ["t"], [], [MetricInfo("t", "acc", False, {Split.SEARCH: 100})])
    assert better_start(study, least, space) is None
    raced = merges(average=[1] * 20 + [0] * 80)
    trial = merges(tsv_m=[1] * 9 + [0]).trials[0]  # asked ten questions, then stopped
    trial.user_attrs["outcome"] = "raced"
    raced.add_trial(trial)
    assert better_start(raced, OBJECTIVE, space) is None


def test_without_a_scored_merge_the_ladder_begins_at_the_spaces_first_recipe() -> None:
    space = LearnedSpace(build("uniform", presets=["task_arithmetic", "tsv_m"]), Learner(), n_rows=5000)
    assert better_start(optuna.create_study(), OBJECTIVE, space) is None


class Scorer:
    """An executor whose every merge gives the same answers."""

    models = CONTEXT.models

    def __init__(self, right: list[int]) -> None:
        self.right, self.jobs = np.array(right, dtype=float), list[Job]()

    def submit(self, job: Job) -> Future[Scored]:
        self.jobs.append(job)
        future = Future[Scored]()
        scores = {"t/acc": Scores((), self.right, float(self.right.mean()), 0.05)}
        future.set_result(Scored(Evaluation(Split.SEARCH, 1.0, scores, Cost(0.0, 1.0, 100)), "sha"))
        return future


def queue_of(study: optuna.Study, start: list[int] | None = None, **learner: Any) -> FirstTrials:
    """The queue of a study's first trials, its baselines scored; `start`: the answers of the space's first recipe."""
    space = LearnedSpace(build("uniform", presets=["task_arithmetic", "tsv_m"]), Learner(**learner), n_rows=5000)
    first = object.__new__(FirstTrials)
    file = SimpleNamespace(search=Search())
    first.plan = SimpleNamespace(space=space, objective=OBJECTIVE, file=file, fidelity=1.0)  # type: ignore[assignment]
    first.executor = Scorer(start or [1] * 50 + [0] * 50)  # type: ignore[assignment]
    first.study, first.budget, first._baselines, first._fits = study, Budget(Search(), study), set(), {}
    base = [1] * 50 + [0] * 50
    study.set_user_attr("reference.base", {"evaluation": merges(average=base).trials[0].user_attrs["evaluation"]})
    return first


@pytest.mark.parametrize(
    ("start", "begins_at"), [([1] * 30 + [0] * 70, 1 / 3), ([1] * 48 + [0] * 52, 0.7), ([1] * 90 + [0] * 10, 0.7)]
)
def test_the_first_fits_begin_at_the_average_where_the_usual_strength_is_clearly_worse_than_the_base(
    start: list[int], begins_at: float
) -> None:
    """0.30 on 100 paired questions is 20 wins and no loss behind the base's 0.50: 5 standard errors; 0.48 is 1.4."""
    study = merges(average=[1] * 60 + [0] * 40, task_arithmetic=[1] * 55 + [0] * 45)
    first = queue_of(study, start, loss="entropy")
    first.go_on()
    n_experts = len(CONTEXT.experts)
    ladder = [p for p in first_points(study).values() if p["learner.steps"]]
    plain = [p for p in first_points(study).values() if not p["learner.steps"]]
    assert n_experts == 3
    assert ladder[0]["coefficient"] == pytest.approx(begins_at)
    assert plain[0]["coefficient"] == 0.7
    (job,) = first.executor.jobs  # type: ignore[attr-defined]
    assert Recipe.from_json(job.recipe).coefficients == dict.fromkeys(CONTEXT.experts, 0.7)
    assert questions_asked(study) == 100


def test_the_usual_strength_is_not_scored_where_the_first_fits_go_on_from_a_better_trial() -> None:
    better = merges(average=[1] * 60 + [0] * 40, task_arithmetic=[1] * 65 + [0] * 35)
    first = queue_of(better, loss="entropy")
    first.go_on()
    assert first.executor.jobs == []  # type: ignore[attr-defined]
    cold = queue_of(
        merges(average=[1] * 60 + [0] * 40, task_arithmetic=[1] * 65 + [0] * 35), warm_start=False, loss="entropy"
    )
    cold.go_on()
    assert len(cold.executor.jobs) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("loss", ["gold", "kl"])
def test_fits_to_labels_and_teachers_begin_at_the_usual_strength_without_a_question(loss: str) -> None:
    study = merges(average=[1] * 60 + [0] * 40, task_arithmetic=[1] * 55 + [0] * 45)
    first = queue_of(study, [1] * 30 + [0] * 70, loss=loss)
    first.go_on()
    assert first.executor.jobs == []  # type: ignore[attr-defined]
    assert {p["coefficient"] for p in first_points(study).values() if p["learner.steps"]} == {0.7}


def first_points(study: optuna.Study) -> dict[str, Any]:
    queued = [t for t in study.get_trials() if "start" in t.user_attrs]
    return {t.user_attrs["start"]: t.system_attrs["fixed_params"] for t in queued}


@pytest.mark.parametrize("n_queued", [0, 1, 2])
def test_a_kill_while_the_ladder_is_queued_does_not_move_the_start_of_the_rest(n_queued: int) -> None:
    scores = {"average": [1] * 60 + [0] * 40, "tsv_m": [1] * 50 + [0] * 50}
    whole, killed = merges(**scores), merges(**scores)
    queue_of(whole).go_on()
    left = [killed.enqueue_trial] * n_queued
    with pytest.raises(KeyboardInterrupt), mock.patch.object(killed, "enqueue_trial", side_effect=_then_die(left)):
        queue_of(killed).go_on()
    assert len(first_points(killed)) == n_queued
    for _ in range(n_queued):
        killed.tell(killed.ask(), 0.6)
    killed.add_trial(merges(tsv_m=[1] * 90 + [0] * 10).trials[0])  # what a rung may find
    queue_of(killed).go_on()
    assert first_points(killed) == first_points(whole)
    queue_of(killed).go_on()
    assert len(killed.trials) == len(whole.trials) + 1


def _then_die(calls: list[Any]) -> Any:
    def call(*arguments: Any, **named: Any) -> None:
        if not calls:
            raise KeyboardInterrupt
        calls.pop()(*arguments, **named)

    return call


def test_one_number_of_steps_is_spent_on_the_finest() -> None:
    space = LearnedSpace(Line(), Learner(steps=30), n_rows=5000)  # type: ignore[arg-type]
    assert [p["learner.per"] for p in space.initial_points()] == ["row"]


def test_where_every_trial_learns_a_plain_recipe_has_no_point() -> None:
    space = LearnedSpace(Line(), Learner(steps=30), n_rows=500)  # type: ignore[arg-type]
    assert space.encode(space.decode({"c": 0.5})) is None


def test_structure_ignores_numbers_and_sees_rules() -> None:
    one = Recipe(models=Line.models, coefficients={"x": 0.1}, densities={"x": 0.5}, select={"kind": "top_k"})  # type: ignore[arg-type]
    two = one.model_copy(update={"coefficients": {"x": 0.9}, "densities": {"x": 0.2}, "scale": 2.0})
    assert structure_of(one) == structure_of(two)
    assert structure_of(one) != structure_of(two.model_copy(update={"seed": 5}))
