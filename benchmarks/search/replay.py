"""Compare ways of searching on recorded landscapes: hundreds of studies in minutes, without loading a model.

    python benchmarks/search/replay.py [--seeds 10] [--samplers botorch tpe ...] [--candidates 10 25 50 100]
                                       [--landscapes lm_blockwise ...] [--jobs 1] [--against botorch] [--out FILE.csv]
    python benchmarks/search/replay.py --show        print the table and draw the rows there are; nothing is run

Each landscape, opponent, seed and number of candidates appends one row to ``benchmarks/results/search_replay.csv``.
The row has the true mean score and true retention of the candidate that the opponent recommends then, and the score
that it had observed. Opponents with the same landscape and seed get the same questions, so differences are paired.
`--resume` finishes a run that was interrupted: rows that the file has for this commit are not run again.

`replay_opponents.py` has the opponents. ``botorch:kernel=plain,n_startup=12/observed`` is a sampler with options and
another way of recommending. The plot needs matplotlib, which the package does not depend on.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from landscapes import load, names
from replay_opponents import OTHERS, Problem, opponent
from tables import append, commit, half_interval, standard_error

from merge_search.search.samplers import SAMPLERS

OUT = Path(__file__).parent.parent / "results" / "search_replay.csv"
FIELDS = ["landscape", "opponent", "seed", "candidates", "true_mean", "true_retention", "observed", "recommended",
          "cpu_s", "commit"]  # fmt: skip
SKIPPED = ("nsga2",)
"""Samplers that run only when named, because they are made for several objectives."""

Row = dict[str, Any]
Job = tuple[str, str, int, list[int], int]
"""Arguments of `play`."""


def play(landscape: str, name: str, seed: int, budgets: list[int], questions: int = 200) -> list[Row]:
    """Run one search and return a row for every number of candidates."""
    torch.set_num_threads(1)
    problem = Problem(load(landscape), seed, questions)
    began = time.process_time()
    trace = opponent(name)(problem, budgets)
    seconds = time.process_time() - began
    rows = []
    for n in budgets:
        chosen = trace.recommended[n]
        mean, retention = problem.truth(trace.tried[chosen])
        rows.append(
            {
                "landscape": landscape, "opponent": name, "seed": seed, "candidates": n,
                "true_mean": round(mean, 5), "true_retention": round(retention, 5),
                "observed": round(trace.observed[chosen], 5),
                "recommended": getattr(trace.tried[chosen], "label", chosen), "cpu_s": round(seconds, 1),
            }
        )  # fmt: skip
    return rows


def _play(job: Job) -> list[Row]:
    return play(*job)


def run(jobs: Sequence[Job], out: Path, *, version: str, processes: int) -> None:
    """Append the rows of every job as soon as it ends."""
    for rows in _results(jobs, processes):
        append(out, FIELDS, [{**row, "commit": version} for row in rows])
        last = rows[-1]
        print(f"{last['landscape']} {last['opponent']} seed {last['seed']}: {last['true_mean']:.4f} after "
              f"{last['candidates']}, {last['cpu_s']} s", flush=True)  # fmt: skip


def _results(jobs: Sequence[Job], processes: int) -> Iterable[list[Row]]:
    if processes == 1:
        yield from map(_play, jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_play, jobs)


def read(path: Path) -> list[Row]:
    """Rows of the file. Of rows with the same landscape, opponent, seed and candidates, the last one counts."""
    with path.open(newline="") as file:
        rows = [{**r, "seed": int(r["seed"]), "candidates": int(r["candidates"])} for r in csv.DictReader(file)]
    return list({(r["landscape"], r["opponent"], r["seed"], r["candidates"]): r for r in rows}.values())


def summary(rows: Sequence[Row], against: str) -> list[Row]:
    """Mean, standard error, and `against` minus it, per opponent and number of candidates, over landscapes and seeds.

    The difference is paired by landscape and seed. Its interval is Student's at 95 %.
    """
    cells: dict[tuple[str, int], dict[tuple[str, int], tuple[float, float, float]]] = defaultdict(dict)
    for r in rows:
        numbers = float(r["true_mean"]), float(r["true_retention"]), float(r["observed"])
        cells[r["opponent"], r["candidates"]][r["landscape"], r["seed"]] = numbers
    out = []
    for (name, n), found in sorted(cells.items(), key=lambda c: (c[0][1], c[0][0])):
        values = np.array(list(found.values()))
        ours = cells.get((against, n), {})
        both = [key for key in found if key in ours]
        difference = np.array([ours[key][0] - found[key][0] for key in both])
        out.append(
            {
                "candidates": n, "opponent": name, "searches": len(values), "mean": values[:, 0].mean(),
                "se": standard_error(values[:, 0].tolist()), "retention": values[:, 1].mean(),
                "optimism": (values[:, 2] - values[:, 0]).mean(), "pairs": len(both),
                "difference": difference.mean() if len(both) else math.nan, "half": half_interval(difference.tolist()),
            }
        )  # fmt: skip
    return out


def print_summary(rows: Sequence[Row], against: str) -> None:
    print(f"\n{'n':>4} {'opponent':<36} {'searches':>8} {'true mean':>9} {'se':>6} {'retention':>9} {'optimism':>8}"
          f"   {against} minus it, 95 %")  # fmt: skip
    for r in summary(rows, against):
        print(f"{r['candidates']:>4} {r['opponent']:<36} {r['searches']:>8} {r['mean']:>9.4f} {r['se']:>6.4f} "
              f"{r['retention']:>9.3f} {r['optimism']:>8.4f}   {r['difference']:+.4f} +- {r['half']:.4f} "
              f"({r['pairs']} pairs)")  # fmt: skip


def plot(rows: Sequence[Row], path: Path, against: str) -> None:
    """Draw the true mean of the recommended merge over candidates, one panel per landscape, with standard errors."""
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: it needs matplotlib")
        return
    panels = sorted({r["landscape"] for r in rows})
    opponents = sorted({r["opponent"] for r in rows}, key=lambda o: (o != against, o))
    wide = min(4, len(panels))
    high = -(-len(panels) // wide)
    figure, axes = pyplot.subplots(
        high, wide, figsize=(4.2 * wide + 2.4, 3.6 * high), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, landscape in zip(axes.flat, panels, strict=False):
        here = [r for r in rows if r["landscape"] == landscape]
        for i, name in enumerate(opponents):
            line = [r for r in summary(here, against) if r["opponent"] == name]
            n, mean, se = (np.array([r[k] for r in line], dtype=float) for k in ("candidates", "mean", "se"))
            style = {"color": "black", "linewidth": 2.5} if name == against else {"color": f"C{i % 10}"}
            axis.plot(n, mean, marker="o", markersize=3, label=name, **style)
            axis.fill_between(n, mean - se, mean + se, alpha=0.12, linewidth=0, color=style["color"])
        axis.set(title=landscape, xlabel="candidates", xscale="log")
        axis.set_xticks(n, [str(int(v)) for v in n], minor=False)
        axis.minorticks_off()
    figure.supylabel("true mean score of the recommended")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways of searching on recorded landscapes.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    default = [s for s in SAMPLERS if s not in SKIPPED] + list(OTHERS)
    parser.add_argument("--samplers", nargs="+", default=default)
    parser.add_argument("--landscapes", nargs="+", default=names())
    parser.add_argument("--candidates", type=int, nargs="+", default=[10, 25, 50, 100])
    parser.add_argument("--questions", type=int, default=200, help="per task and candidate")
    parser.add_argument("--against", default="botorch")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    version = commit()
    if not args.show:
        with_categories = {name for name in args.landscapes if load(name).cube.categories}
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        jobs = [
            (landscape, name, seed, sorted(args.candidates), args.questions)
            for seed in seeds
            for landscape in args.landscapes
            for name in args.samplers
            if not (name in OTHERS and landscape in with_categories)
        ]
        if args.resume and args.out.exists():
            done = {(r["landscape"], r["opponent"], r["seed"]) for r in read(args.out) if r["commit"] == version}
            jobs = [job for job in jobs if job[:3] not in done]
        run(jobs, args.out, version=version, processes=args.jobs)
    rows = [r for r in read(args.out) if r["landscape"] in args.landscapes]
    print_summary(rows, args.against)
    plot(rows, args.out.with_suffix(".png"), args.against)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
