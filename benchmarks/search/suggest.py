"""CPU seconds of one suggestion, by size of the space, number of trials and kind of study, on one thread.

    python benchmarks/search/suggest.py [--samplers botorch cmaes ...] [--repeats 3]

Each case appends one row to ``benchmarks/results/search_suggest.csv``: median and largest of `repeats` suggestions in a
study of noisy trials at random points. ``mission`` is a mixed space with a category of six presets, coefficients and
densities.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import torch
from tables import append, commit

from merge_search.search.samplers import SAMPLERS, make_sampler, suggest
from merge_search.search.samplers.unit_cube import UnitCube
from merge_search.space import Categorical, Float, Parameter

OUT = Path(__file__).parent.parent / "results" / "search_suggest.csv"
FIELDS = ["sampler", "case", "columns", "trials", "cpu_s", "cpu_s_max", "commit"]
PRESETS = ("task_arithmetic", "ties", "dare", "della", "magnitude_soft", "magnitude_hard")
NOISE = 0.015


def blocks(n: int) -> dict[str, Parameter]:
    return {f"coefficient.expert{i % 3}.block.{i // 3}": Float(0, 1.5) for i in range(n)}


def mission() -> dict[str, Parameter]:
    densities: dict[str, Parameter] = {f"density.expert{i}": Float(0.05, 1, log=True) for i in range(3)}
    return {"preset": Categorical(PRESETS), **blocks(36), **densities}


def cases() -> Iterator[tuple[str, dict[str, Parameter], int, int, int, int]]:
    """Name, space, number of trials, objectives, constraints and running trials of every case."""
    for n in (12, 18, 40):
        for trials in (20, 50, 100, 200):
            yield "plain", blocks(n), trials, 1, 0, 0
    for name, space in (("plain", blocks(40)), ("mission", mission())):
        yield f"{name}, 4 running", space, 100, 1, 0, 4
        yield f"{name}, 1 constraint", space, 100, 1, 1, 0
        yield f"{name}, 2 objectives", space, 100, 2, 0, 0
        yield f"{name}, 5 objectives", space, 100, 5, 0, 0
    yield "mission", mission(), 100, 1, 0, 0


def filled(
    sampler: str, space: dict[str, Parameter], trials: int, m: int, constraints: int, running: int
) -> optuna.Study:
    made = make_sampler(sampler, parameters=space, seed=0, n_objectives=m)
    study = optuna.create_study(sampler=made, directions=["maximize"] * m)
    cube, rng = UnitCube(space), np.random.default_rng(0)
    for i in range(trials + running):
        x = [*rng.random(len(cube.numeric)), *(float(rng.integers(k)) for k in cube.n_choices)]
        study.enqueue_trial(cube.decode(x))
        trial = study.ask()
        suggest(trial, space)
        if i >= trials:
            continue
        numbers = np.array(x[: len(cube.numeric)])
        values = [
            0.7 - float(((numbers - 0.3 - 0.1 * j) ** 2).mean()) + NOISE * rng.standard_normal() for j in range(m)
        ]
        noise = {"value": NOISE**2, "values": [NOISE**2] * m, "constraint:size": NOISE**2}
        trial.set_user_attr("noise", noise)
        if constraints:
            trial.set_constraint("size", float(numbers.mean()) - 0.5)
        study.tell(trial, values)
    return study


def measured(sampler: str, space: dict[str, Parameter], shape: tuple[int, int, int, int], repeats: int) -> list[float]:
    """CPU seconds of each of `repeats` suggestions. Each of them leaves one more running trial."""
    study = filled(sampler, space, *shape)
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        suggest(study.ask(), space)
        seconds.append(time.process_time() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samplers", nargs="+", default=["botorch"], choices=sorted(SAMPLERS))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    version = commit()
    measured(args.samplers[0], blocks(3), (8, 1, 0, 0), 1)  # imports
    for sampler in args.samplers:
        for case, space, trials, m, constraints, running in cases():
            if m > 1 and sampler == "cmaes":
                continue
            seconds = measured(sampler, space, (trials, m, constraints, running), args.repeats)
            row = {
                "sampler": sampler, "case": case, "columns": UnitCube(space).n_columns, "trials": trials,
                "cpu_s": round(statistics.median(seconds), 2), "cpu_s_max": round(max(seconds), 2), "commit": version,
            }  # fmt: skip
            append(OUT, FIELDS, [row])
            print(row, flush=True)


if __name__ == "__main__":
    main()
