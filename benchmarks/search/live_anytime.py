"""One study, many budgets: what would have been recommended after so many questions, and how good it truly is.

A study runs once, to its largest budget. For each checkpoint, the trials that had finished within that many questions
are copied into a study of their own. Questions of references, statistics and learners' fits count. The product's own
rule then recommends from these trials: finalists and best baseline meet on the validation questions, and the best there
wins. Validation questions are counted beside the budget, in a column of their own. The winner is scored on the sealed
test rows, once per distinct model.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import optuna
import yaml
from live_opponents import setup
from zoo import Zoo, search_study, test_study, write_tasks

from merge_search.evaluation import Evaluation, Evaluator, Split
from merge_search.objective import Objective
from merge_search.recipe import Recipe
from merge_search.search.plan import Plan
from merge_search.search.prepare import prepare
from merge_search.search.records import Record, finished_records, references_of, teachers_of
from merge_search.search.run import run
from merge_search.search.start.baselines import baselines
from merge_search.search.trial.worker import Worker
from merge_search.search.verdict import selection
from merge_search.search.verdict.validation import validate
from merge_search.study_file import read_study_file

__all__ = ["Bench", "Row", "Silent", "Task", "anytime_rows", "main_mean", "make_plan", "recommended", "row_of"]

NAME = "live"
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One process's work.

    Attributes:
        root: Folder of the zoos.
        scores: Folder of sealed scores, kept by hash of the weights, for all opponents.
        candidates: Checkpoints, in costs of one candidate.
        folder: Where the study's files live, so that a killed study can continue. None: a temporary folder.
    """

    root: Path
    scores: Path
    zoo: Zoo
    opponent: str
    seed: int
    candidates: tuple[int, ...]
    folder: Path | None = None

    @property
    def budgets(self) -> dict[int, int]:
        """Questions by checkpoint."""
        return {c: c * self.zoo.candidate for c in sorted(self.candidates)}


@dataclass
class Silent:
    """A listener that records when each trial ended, in wall and CPU seconds since the start."""

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)
    ends: dict[int, tuple[float, float]] = field(default_factory=dict)

    def now(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.cpu

    def note(self, text: str) -> None: ...

    def begin(self, *, total: int, finished: int) -> None: ...

    def trial(self, record: Record, *, best: Record | None, best_expert: float | None) -> None:
        self.ends[record.number] = self.now()

    def end(self) -> None: ...


class Bench:
    """A study's workbench and the sealed test rows, asked through the same live model.

    Args:
        folder: With the study file, its maps and statistics.
    """

    def __init__(self, task: Task, plan: Plan, folder: Path) -> None:
        self.task, self.plan = task, plan
        self.work = Worker(plan, device="cpu")
        self._folder = folder
        self._test: list[Evaluator] | None = None

    def score(self, recipe: Recipe, where: str, *, expected: str = "") -> Evaluation:
        """A recipe's answers on ``validation`` or ``test``, from the kept scores if these weights were scored before.

        Raises:
            AssertionError: the weights are not those that the study scored.
        """
        digest, _ = self.work.splice(recipe.model_copy(update={"models": self.work.models}))
        assert expected in ("", digest), f"weights of {recipe.fingerprint} differ from those of the search"
        return self.score_live(digest, where)

    def score_live(self, digest: str, where: str) -> Evaluation:
        """The same for the live model as it is now."""
        kept = self._kept(digest, where)
        if kept.exists():
            return Evaluation.from_attribute(json.loads(kept.read_text()))
        found = self.work.ask(Split.VALIDATION) if where == "validation" else self._ask_test()
        self._keep(kept, found.to_attribute())
        return found

    def _kept(self, digest: str, where: str) -> Path:
        return self.task.scores / f"{self.task.zoo.name}.{where}.{digest}.json"

    def _keep(self, kept: Path, found: object) -> None:
        part = kept.with_suffix(f".{self.task.opponent.replace(' ', '_')}.{self.task.seed}")
        part.write_text(json.dumps(found))
        part.rename(kept)

    def keep_validated(self, study: optuna.Study) -> None:
        """What the study itself asked on validation is not asked again."""
        weights = {str(r.number): r.weights_sha256 for r in finished_records(study) if r.is_scored}
        for number, found in study.user_attrs.get("validation", {}).items():
            if number in weights and not (kept := self._kept(weights[number], "validation")).exists():
                self._keep(kept, found)

    def _ask_test(self) -> Evaluation:
        """All rows of the test files: the three shares of the test evaluators, joined."""
        if self._test is None:
            self._test = make_plan(
                self.task, self._folder, "test.yaml", test_study, {"space": {"type": "uniform"}}
            ).evaluators
            for evaluator in self._test:
                evaluator.bind(self.work.live.model, self.work.live.tokenizer, folder=str(self.work.pool.base_folder))
        (evaluator,) = self._test
        a, b, c = (evaluator.evaluate(s) for s in (Split.SEARCH, Split.VALIDATION, Split.TEST))
        return a.joined(b).joined(c)

    def score_winner(self, winner: Record | None) -> Evaluation:
        """On test; before any merge is scored, of the average: what one takes without asking."""
        if winner is not None:
            return self.score(winner.recipe, "test", expected=winner.weights_sha256)
        return self.score(baselines(self.plan.context, [])["average"], "test")

    def references(self) -> str:
        """Test means of base and average, and of each task's best expert."""
        scored = {n: self.score(r, "test") for n, r in baselines(self.plan.context, []).items()}
        names = [m.name for m in self.plan.objective.main.values()]
        own = [max(scored[e].scores[m].score for e in self.task.zoo.experts) for m in names]
        parts = {n: main_mean(scored[n], self.plan.objective)[0] for n in ("base", "average")}
        return " ".join(f"{n}={v:.4f}" for n, v in {**parts, "own_experts": sum(own) / len(own)}.items())


def main_mean(evaluation: Evaluation, objective: Objective) -> tuple[float, float]:
    """Mean of the tasks' main metrics, and its standard error over questions."""
    scores = [evaluation.scores[m.name] for m in objective.main.values()]
    return sum(s.score for s in scores) / len(scores), math.hypot(*(s.stderr for s in scores)) / len(scores)


def make_plan(
    task: Task, folder: Path, name: str, study: Callable[[Path, Zoo, Path], dict[str, Any]], part: dict[str, Any]
) -> Plan:
    """Write a study file into `folder` and prepare it."""
    for rows in ("val", "test"):
        if task.zoo.name == "lm" and not (folder / rows).exists():
            write_tasks(task.root, folder / rows, list(task.zoo.experts), rows=rows)
    search = {"n_trials": 10_000, "questions": max(task.budgets.values()), **part.get("search", {})}
    content = {
        "study": {"name": NAME, "seed": task.seed},
        **study(task.root, task.zoo, folder),
        "space": part["space"],
        "objective": {"maximise": "mean"},
        "search": search,
        "device": "cpu",
    }
    (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return prepare(read_study_file(folder / name))


def row_of(task: Task, candidates: int, evaluation: Evaluation, objective: Objective, **more: Any) -> Row:
    """A row of the table."""
    mean, se = main_mean(evaluation, objective)
    key = {"zoo": task.zoo.name, "opponent": task.opponent, "seed": task.seed, "candidates": candidates}
    return {**key, "test_mean": round(mean, 4), "test_se": round(se, 4), **more}


def anytime_rows(task: Task) -> list[Row]:
    """Run the study to the largest budget; one row per checkpoint."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = task.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        plan = make_plan(task, folder, "study.yaml", search_study, setup(task.opponent, task.zoo))
        clock = Silent()
        study = run(plan.file, clock)
        bench = Bench(task, plan, folder)
        known = references_of(study, plan.metrics, plan.context.experts)
        bench.work.set_teachers(teachers_of(plan.objective, known))
        bench.keep_validated(study)
        references = bench.references()
        rows = []
        for candidates, budget in task.budgets.items():
            done = within(finished_records(study), budget)
            winner, n_validated = recommended(study, done, bench)
            found = bench.score_winner(winner)
            wall, cpu = clock.ends.get(done[-1].number, (math.nan, math.nan)) if done else (0.0, 0.0)
            rows.append(
                row_of(
                    task, candidates, found, plan.objective, questions=sum(r.cost.questions for r in done),
                    validation=n_validated, trials=len(done), references=references, winner=_named(winner),
                    wall_s=round(wall, 1), cpu_s=round(cpu, 1),
                )
            )  # fmt: skip
        return rows


def within(done: Sequence[Record], budget: int) -> list[Record]:
    """The trials, in order, that had finished before more than `budget` questions were asked."""
    asked, out = 0, []
    for record in done:
        asked += record.cost.questions
        if asked > budget:
            break
        out.append(record)
    return out


class Judge(Protocol):
    """Scores merges of a study on its validation questions."""

    @property
    def plan(self) -> Plan: ...
    def score(self, recipe: Recipe, where: str, *, expected: str = "") -> Evaluation: ...


def recommended(study: optuna.Study, done: Sequence[Record], bench: Judge) -> tuple[Record | None, int]:
    """The product's own winner among these trials alone, and the number of validation questions that it took.

    The winner is None where no merge has been scored yet.
    """
    plan = bench.plan
    then = optuna.create_study(directions=list(plan.objective.directions))
    for name, value in study.user_attrs.items():
        if name not in ("validation", "test", "test_winner"):
            then.set_user_attr(name, value)
    numbers = {r.number for r in done}
    then.add_trials([t for t in study.get_trials(deepcopy=False) if t.number in numbers])
    weights = {r.recipe.fingerprint: r.weights_sha256 for r in done if r.is_scored}
    asked = 0

    def score(recipe: Recipe) -> Evaluation:
        nonlocal asked
        found = bench.score(recipe, "validation", expected=weights[recipe.fingerprint])
        asked += found.cost.questions
        return found

    validate(then, plan, score, note=lambda text: None)
    return selection.winner(then, plan.objective, plan.context.experts), asked


def _named(record: Record | None) -> str:
    if record is None:
        return "average, unasked"
    learner = record.attributes.get("learner")
    name = record.label or record.recipe.preset or "merge"
    return name if learner is None else f"{name}, learned per {learner['per']}"
