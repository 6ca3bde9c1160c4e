"""Live searches on real checkpoints: the quality of the recommended merge for the same number of asked questions.

    MERGE_SEARCH_ZOO=... python benchmarks/search/live.py [--zoo lm encoder] [--seeds 0 1] [--only NAME ...]
                             [--candidates 10 25 50 100] [--jobs 2] [--minutes 75] [--summary]

Every opponent runs through the product itself, with the same engine, questions, splits and budget in questions. The
budget is the cost of so many candidates, and a gradient step on n rows counts 3 n. There is one study per zoo,
opponent and seed, or one per checkpoint where a learner divides its budget. The recommendation at each checkpoint is
scored on rows that no search ever saw (`live_anytime`, `zoo`). Rows are appended to
``benchmarks/results/search_live.csv``, and rows that the file has are not run again. ``--summary`` prints means over
seeds and paired differences, and draws ``benchmarks/results/search_live.*`` from the rows alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from live_anytime import Row, Task, anytime_rows
from live_opponents import IMPORTANT, OPPONENTS, learns
from live_summary import draw, print_summary, read_rows
from tables import append, commit
from zoo import ZOOS, Zoo

OUT = Path(__file__).parent.parent / "results" / "search_live.csv"
FIELDS = ["zoo", "opponent", "seed", "candidates", "questions", "validation", "trials", "test_mean", "test_se",
          "references", "winner", "wall_s", "cpu_s", "commit"]  # fmt: skip


def rows_of(task: Task) -> list[Row]:
    """All rows of one study, measured in a process of its own."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="optuna")
    if OPPONENTS[task.opponent] is None:
        from live_finetune import finetuned_rows

        return finetuned_rows(task)
    return anytime_rows(task)


def limited(zoo: Zoo, limit: int | None) -> Zoo:
    """The zoo with the first `limit` documents of every file, and with a candidate that costs less in proportion."""
    if limit is None:
        return zoo
    return replace(zoo, limit=limit, candidate=2 * limit * len(zoo.experts) // 5)


def tasks(args: argparse.Namespace, scores: Path) -> Iterator[tuple[Task, set[int]]]:
    """Studies to run and the checkpoints they lack, seed after seed, so that a run that is cut short is balanced."""
    known = {(r["zoo"], r["opponent"], int(r["seed"]), int(r["candidates"])) for r in read_rows(args.out)}
    root = Path(os.environ["MERGE_SEARCH_ZOO"])
    for seed in args.seeds:
        for zoo in args.zoo:
            names = chosen(args.only) or (list(OPPONENTS) if zoo == "lm" else IMPORTANT)
            for name in names:
                missing = {c for c in args.candidates if (zoo, name, seed, c) not in known}
                for budgets in studies(name, ZOOS[zoo], args.candidates, missing):
                    folder = args.keep and args.keep / f"{zoo}.{name.replace(' ', '_')}.{seed}.{max(budgets)}"
                    task = Task(root, scores, limited(ZOOS[zoo], args.limit), name, seed, budgets, folder)
                    yield task, missing & set(budgets)


def studies(name: str, zoo: Zoo, candidates: list[int], missing: set[int]) -> list[tuple[int, ...]]:
    """Checkpoints of each study: all of them, or one where a learner divides the budget that it is given."""
    if not missing:
        return []
    return [(c,) for c in sorted(missing)] if learns(name, zoo) else [tuple(candidates)]


def chosen(only: list[str] | None) -> list[str]:
    """Opponents by name. The word ``important`` stands for several."""
    names = [n for word in only or [] for n in (IMPORTANT if word == "important" else [word])]
    return list(dict.fromkeys(names))


def measure(args: argparse.Namespace, scores: Path) -> int:
    """Run the studies that are missing and return how many failed."""
    began, version, failures = time.perf_counter(), commit(), 0
    wanted = dict(tasks(args, scores))
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(rows_of, task): task for task in wanted}
        for future in as_completed(futures):
            task = futures[future]
            if future.cancelled():
                continue
            try:
                rows = future.result()
            except Exception:
                failures += 1
                print(f"{task.zoo.name} {task.opponent} seed {task.seed} failed:\n{traceback.format_exc()}", flush=True)
                continue
            for row in rows:
                if row["candidates"] in wanted[task]:
                    append(args.out, FIELDS, [{**row, "commit": version}])
                    print({k: v for k, v in row.items() if k != "references"}, flush=True)
            if args.minutes and time.perf_counter() - began > 60 * args.minutes:
                for other in futures:
                    other.cancel()
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--zoo", nargs="+", choices=list(ZOOS), default=["lm"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--candidates", type=int, nargs="+", default=[10, 25, 50, 100])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["important", *OPPONENTS],
        help="opponents; default: all for lm, the important ones else",
    )
    parser.add_argument("--jobs", type=int, default=1, help="studies at a time, one thread each")
    parser.add_argument("--minutes", type=float, help="begin no study after that")
    parser.add_argument(
        "--keep",
        type=Path,
        help="keep studies and sealed scores here, for one commit: a killed study goes on, no model is scored twice",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the table")
    parser.add_argument("--limit", type=int, help="documents per task: a quick look at the harness; give --out too")
    parser.add_argument("--summary", action="store_true", help="only print and draw what the rows say")
    args = parser.parse_args()
    if args.limit is not None and args.out == OUT:
        parser.error("--limit needs --out: its rows do not belong among the others")
    failures = 0
    if not args.summary:
        args.out.parent.mkdir(exist_ok=True)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with tempfile.TemporaryDirectory() as temporary:
            scores = args.keep / "scores" if args.keep else Path(temporary)
            scores.mkdir(parents=True, exist_ok=True)
            failures = measure(args, scores)
    rows = read_rows(args.out)
    print_summary(rows)
    for path in draw(rows, args.out.parent):
        print(f"wrote {path}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
