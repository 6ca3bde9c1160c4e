"""Live searches on the zoo's language models: what each way of searching has found for a given cost in questions.

    MERGE_SEARCH_ZOO=... python benchmarks/search/live.py [--seeds 0 1] [--candidates 10 25 50] [--only NAME ...]

Every opponent runs through `merge-search run`: same engine, same questions, same splits, same budget in questions (the
cost of so many candidates; a gradient step on n rows counts 3 n). Its recommendation is scored once on the test split.
One row per opponent, budget and seed is appended to ``benchmarks/results/search_live.csv``.

NOTE: the step size of "learner alone" (0.1) was chosen on all test rows of this zoo, those of the test split among them:
its figure is not a clean test. "two levels" searches the step size on the search questions and is.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import yaml
from zoo import write_tasks

from merge_search.evaluation import Evaluation
from merge_search.search.records import finished_records

EXPERTS = ("intent", "qtype", "where")
PUBLISHED = ["ties", "dare", "della", "magnitude_soft", "tsv_m", "iso_c"]
BLOCKS: dict[str, Any] = {"type": "blockwise"}
MISSION: dict[str, Any] = {"type": "compatibility"}
UNIFORM: dict[str, Any] = {"type": "uniform", "presets": ["task_arithmetic", "ties", "tsv_m"]}
ROWS = {"per": "row", "steps": 100, "step_size": 0.1, "warm_start": False}
LEVELS = {"per": ["block", "tensor", "row"], "steps": [0, 100]}

OPPONENTS: dict[str, dict[str, Any]] = {
    "random": {"space": BLOCKS, "search": {"sampler": "random"}},
    "tpe": {"space": BLOCKS, "search": {"sampler": "tpe"}},
    "gp": {"space": BLOCKS, "search": {"sampler": "gp"}},
    "cmaes": {"space": BLOCKS, "search": {"sampler": "cmaes"}},
    "botorch": {"space": BLOCKS, "search": {"sampler": "botorch"}},
    "botorch, raced": {"space": BLOCKS, "search": {"sampler": "botorch", "racing": {}}},
    "botorch, mission space": {"space": MISSION, "search": {"sampler": "botorch"}},
    "presets": {"space": UNIFORM, "search": {"sampler": "random", "baselines": PUBLISHED}},
    "learner alone": {
        "space": {"type": "uniform", "presets": ["task_arithmetic"]},
        "search": {"sampler": "random", "learner": ROWS},
    },
    "two levels": {"space": UNIFORM, "search": {"sampler": "botorch", "learner": LEVELS}},
}
FIELDS = ["opponent", "seed", "candidates", "questions", "trials", "test_mean", "test_se", "base", "best_expert_mean",
          "average", "own_experts", "winner", "wall_s", "commit"]  # fmt: skip


def study(zoo: Path, tasks: Path, setup: dict[str, Any], *, seed: int, questions: int) -> dict[str, Any]:
    models = {"base": str(zoo / "lm" / "base"), "experts": {e: str(zoo / "lm" / e) for e in EXPERTS}}
    evaluator = {
        "evaluator": "lm_eval",
        "tasks": [f"zoo_{e}" for e in EXPERTS],
        "include_path": str(tasks),
        "batch_size": 64,
    }
    search = {"n_trials": 10_000, "questions": questions, "baselines": [], **setup["search"]}
    return {
        "study": {"name": "live", "seed": seed},
        "models": models,
        "space": setup["space"],
        "evaluate": [{**evaluator, "fit": "train", "fit_limit": 4000}],
        "splits": {"search": 0.3, "validation": 0.2, "test": 0.5},
        "objective": {"maximise": "mean"},
        "search": search,
        "device": "cpu",
    }


def run(zoo: Path, tasks: Path, name: str, *, seed: int, candidates: int, per_candidate: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        budget = candidates * per_candidate
        path.write_text(
            yaml.safe_dump(study(zoo, tasks, OPPONENTS[name], seed=seed, questions=budget), sort_keys=False)
        )
        began = time.perf_counter()
        for command in ("run", "test"):
            subprocess.run([sys.executable, "-m", "merge_search", command, str(path)], check=True, capture_output=True)
        found = optuna.load_study(study_name="live", storage=f"sqlite:///{folder}/live.db")
        return {
            "opponent": name, "seed": seed, "candidates": candidates, "wall_s": round(time.perf_counter() - began, 1),
            **summary(found),
        }  # fmt: skip


def summary(found: optuna.Study) -> dict[str, Any]:
    """Mean over tasks of test scores: of the winner, the base, the experts and the average."""
    by_number = {r.number: r for r in finished_records(found)}
    test = {int(k): Evaluation.from_attribute(v) for k, v in found.user_attrs["test"].items()}
    means = {n: sum(s.score for s in e.scores.values()) / len(e.scores) for n, e in test.items()}
    label = {by_number[n].label: n for n in test if by_number[n].label}
    winner = found.user_attrs["test_winner"]
    se = sum(s.stderr**2 for s in test[winner].scores.values()) ** 0.5 / len(test[winner].scores)
    own = [max(test[label[e]].scores[m].score for e in EXPERTS) for m in test[winner].scores]
    return {
        "questions": sum(r.cost.questions for r in by_number.values()),
        "trials": len(by_number),
        "test_mean": round(means[winner], 4),
        "test_se": round(se, 4),
        "base": round(means[label["base"]], 4),
        "best_expert_mean": round(max(means[label[e]] for e in EXPERTS), 4),
        "average": round(means[label["average"]], 4),
        "own_experts": round(sum(own) / len(own), 4),
        "winner": by_number[winner].label or by_number[winner].recipe.preset,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--candidates", type=int, nargs="+", default=[50])
    parser.add_argument("--only", nargs="+", default=list(OPPONENTS))
    parser.add_argument("--questions-per-candidate", type=int, default=600)
    args = parser.parse_args()
    zoo, here = Path(os.environ["MERGE_SEARCH_ZOO"]), Path(__file__).parent
    out = here.parent / "results" / "search_live.csv"
    out.parent.mkdir(exist_ok=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here
    ).stdout.strip()
    is_new = not out.exists()
    with tempfile.TemporaryDirectory() as folder, out.open("a", newline="") as file:
        write_tasks(zoo, Path(folder), list(EXPERTS))
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        for seed in args.seeds:
            for candidates in args.candidates:
                for name in args.only:
                    row = run(
                        zoo,
                        Path(folder),
                        name,
                        seed=seed,
                        candidates=candidates,
                        per_candidate=args.questions_per_candidate,
                    )
                    writer.writerow({**row, "commit": commit})
                    file.flush()
                    print(row, flush=True)


if __name__ == "__main__":
    main()
