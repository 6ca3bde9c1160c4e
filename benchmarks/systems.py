"""The research systems side by side: each a study of the product, on the same models, questions and budget.

    MERGE_SEARCH_ZOO=... python benchmarks/systems.py [--zoo lm encoder] [--seeds 0 1 2] [--only NAME ...]
                             [--candidates 12] [--jobs 2] [--minutes 60] [--adapters FOLDER] [--summary]

With ``--adapters``, the experts are the adapters that `make_adapters.py` wrote, on the zoo's language model.

Every system is the part of a study file in `systems_studies.py`. A study may ask as many search questions as so many
candidates cost. Its winner, by the product's own rule, answers sealed test rows that no search saw. The base, the
experts, and published methods at their usual settings are rows of the same table. One process measures one study, so
that its peak memory is its own. Rows are appended to ``benchmarks/results/systems.csv``, and rows that the file has are
not run again. ``--summary`` prints the table of docs/systems.md from the rows alone.

Columns: mean and worst retention on the sealed rows, with the standard error over questions; questions asked by the
search, its learners and statistics; CPU seconds of the search alone; peak resident memory of the process in MiB.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import reduce
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.append(str(Path(__file__).parent / "search"))

from live_anytime import Silent, make_plan, recommended
from live_anytime import Task as LiveTask
from machine import append, commit
from systems_studies import ON_ADAPTERS, SYSTEMS
from tables import half_interval
from zoo import ZOOS, search_study, test_study

from merge_search.evaluation import Evaluation, Split
from merge_search.objective import References
from merge_search.recipe import Recipe
from merge_search.search.plan import Plan
from merge_search.search.records import finished_records, references_of, teachers_of
from merge_search.search.run import run
from merge_search.search.start.baselines import baselines
from merge_search.search.trial.worker import Worker

OUT = Path(__file__).parent / "results" / "systems.csv"
FIELDS = [
    "zoo", "system", "seed", "candidates", "test_mean", "test_se", "retention", "retention_se", "worst", "worst_se",
    "questions", "trials", "seconds", "peak_mib", "winner", "commit",
]  # fmt: skip
Row = dict[str, Any]
RETENTIONS = ("mean_retention", "worst_retention")
OTHERS = {"average", "task_arithmetic"}
"""Labels of the baselines that every study tries. They win no row but their own."""


@dataclass(frozen=True)
class Task:
    """One process's work: one system on one zoo with one seed.

    Attributes:
        root: Folder of the zoos.
        scores: Folder of sealed scores, kept by hash of the weights, for all systems.
        adapters: Folder of the adapters that are the experts. None: the zoo's own.
    """

    root: Path
    scores: Path
    zoo: str
    system: str
    seed: int
    candidates: int
    adapters: Path | None = None


class Judge:
    """Scores a study's merges, each under a worker of its own: on its validation questions, and on the sealed rows.

    Maps and statistics are those of the study, which both workers find by its name.
    """

    def __init__(self, task: Task, live: LiveTask, part: dict[str, Any], folder: Path, plan: Plan) -> None:
        self._task, self.plan = task, plan
        self.sealed = make_plan(live, folder, "test.yaml", test_study, part)
        self._workers = {"validation": Worker(plan, device="cpu"), "test": Worker(self.sealed, device="cpu")}

    def set_teachers(self, teachers: Mapping[str, str]) -> None:
        for worker in self._workers.values():
            worker.set_teachers(teachers)

    def score(self, recipe: Recipe, where: str, *, expected: str = "") -> Evaluation:
        """Answers on ``validation`` or ``test`` (all sealed rows), asked once per distinct model.

        Raises:
            AssertionError: The weights are not those that the study scored.
        """
        worker = self._workers[where]
        digest, _ = worker.splice(recipe.model_copy(update={"models": worker.models}))
        assert expected in ("", digest), f"the weights of {recipe.fingerprint} differ from those of the search"
        kept = self._task.scores / f"{self._task.zoo}.{where}.{digest}.json"
        if kept.exists():
            return Evaluation.from_attribute(json.loads(kept.read_text()))
        splits = (Split.VALIDATION,) if where == "validation" else (Split.SEARCH, Split.VALIDATION, Split.TEST)
        parts = [worker.ask(split) for split in splits]
        found = reduce(Evaluation.joined, parts)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found.to_attribute()))
        part.rename(kept)
        return found


def measure(task: Task) -> Row:
    """Run one study and score its best own merge, by the product's rule, on the sealed rows."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="optuna")
    zoo = replace(ZOOS["lm"], adapters=task.adapters) if task.adapters else ZOOS[task.zoo]
    part = (ON_ADAPTERS if task.adapters else SYSTEMS)[task.system](zoo)
    live = LiveTask(task.root, task.scores, zoo, task.system, task.seed, (task.candidates,))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan = make_plan(live, folder, "study.yaml", search_study, part)
        began = time.process_time()  # other studies run beside this one
        study = run(plan.file, Silent())
        seconds = time.process_time() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        done = finished_records(study)
        judge = Judge(task, live, part, folder, plan)
        judge.set_teachers(teachers_of(plan.objective, references_of(study, plan.metrics, plan.context.experts)))
        if "own" in part:
            own = [r for r in done if re.split(r"\W", r.label)[0] in part["own"] and r.is_scored]  # "name(options)"
            winner = max(own, key=lambda r: plan.objective.key(r.values), default=None)
        else:
            others = OTHERS - {task.system.replace(" ", "_")}
            winner, _ = recommended(study, [r for r in done if r.label not in others], judge)
        anchors = baselines(plan.context, [])
        base, experts = judge.score(anchors["base"], "test"), {}
        for expert in plan.context.experts:
            experts[expert] = judge.score(anchors[expert], "test")
        objective = judge.sealed.objective
        references = References.from_evaluations(list(objective.metrics.values()), base, experts)
        found = base if winner is None else judge.score(winner.recipe, "test", expected=winner.weights_sha256)
        at = {name: objective.estimate(name, found, references) for name in ("mean", *RETENTIONS)}
    return {
        "zoo": task.zoo, "system": task.system, "seed": task.seed, "candidates": task.candidates,
        "test_mean": round(at["mean"].value, 4), "test_se": round(at["mean"].stderr, 4),
        "retention": round(at["mean_retention"].value, 4), "retention_se": round(at["mean_retention"].stderr, 4),
        "worst": round(at["worst_retention"].value, 4), "worst_se": round(at["worst_retention"].stderr, 4),
        "questions": sum(r.cost.questions for r in done), "trials": len(done), "seconds": round(seconds, 1),
        "peak_mib": peak, "winner": "base" if winner is None else winner.label or winner.recipe.preset or winner.name,
    }  # fmt: skip


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows that were measured, [] if none were."""
    if not file.is_file():
        return []
    with file.open(newline="") as f:
        return list(csv.DictReader(f))


def tasks(args: argparse.Namespace, scores: Path) -> Iterator[Task]:
    """Studies that the table lacks, seed after seed, so that a run that is cut short is balanced."""
    known = {(r["zoo"], r["system"], int(r["seed"]), int(r["candidates"])) for r in read_rows(args.out)}
    root = Path(os.environ["MERGE_SEARCH_ZOO"])
    for seed in args.seeds:
        for zoo in ["adapters"] if args.adapters else args.zoo:
            for name in args.only or (ON_ADAPTERS if args.adapters else SYSTEMS):
                if (zoo, name, seed, args.candidates) not in known:
                    yield Task(root, scores, zoo, name, seed, args.candidates, args.adapters)


def measure_all(args: argparse.Namespace, scores: Path) -> int:
    """Run the studies that are missing and return how many failed."""
    began, version, failures = time.perf_counter(), commit(), 0
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(measure, task): task for task in tasks(args, scores)}
        for future in as_completed(futures):
            if future.cancelled():
                continue
            try:
                row = future.result()
            except Exception:
                failures += 1
                print(f"{futures[future]} failed:\n{traceback.format_exc()}", flush=True)
                continue
            append(args.out, FIELDS, [{**row, "commit": version}])
            print(row, flush=True)
            if args.minutes and time.perf_counter() - began > 60 * args.minutes:
                for other in futures:
                    other.cancel()
    return failures


def summary(rows: list[dict[str, str]]) -> Iterator[str]:
    """Lines of a markdown table per zoo: means over seeds, ± half a 95 % interval over seeds, the best mean first."""
    by_zoo: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_zoo[row["zoo"]][row["system"]].append(row)
    for zoo, by_system in by_zoo.items():
        yield f"\n**{zoo}**\n"
        yield "| system | test mean | mean retention | worst retention | questions | CPU seconds | MiB | seeds |"
        yield "|---|---|---|---|---|---|---|---|"
        ranked = sorted(by_system.items(), key=lambda item: -mean(float(r["test_mean"]) for r in item[1]))
        for system, found in ranked:
            cells = [_spread([float(r[key]) for r in found]) for key in ("test_mean", "retention", "worst")]
            plain = [f"{mean(float(r[key]) for r in found):.0f}" for key in ("questions", "seconds", "peak_mib")]
            yield f"| {' | '.join([system, *cells, *plain, str(len(found))])} |"


def _spread(values: list[float]) -> str:
    half = half_interval(values)
    return f"{mean(values):.3f}" if half != half else f"{mean(values):.3f} ± {half:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--zoo", nargs="+", choices=list(ZOOS), default=list(ZOOS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--candidates", type=int, default=12, help="the budget, in costs of one candidate")
    parser.add_argument("--only", nargs="+", choices=[*SYSTEMS, *ON_ADAPTERS], help="systems; default: all")
    parser.add_argument("--adapters", type=Path, help="folder of adapters, which are the experts in place of the zoo's")
    parser.add_argument("--jobs", type=int, default=1, help="studies at a time, one thread each")
    parser.add_argument("--minutes", type=float, help="begin no study after that")
    parser.add_argument("--out", type=Path, default=OUT, help="the table")
    parser.add_argument("--summary", action="store_true", help="only print what the rows say")
    args = parser.parse_args()
    failures = 0
    if not args.summary:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with tempfile.TemporaryDirectory() as temporary:
            failures = measure_all(args, Path(temporary))
    print("\n".join(summary(read_rows(args.out))))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
