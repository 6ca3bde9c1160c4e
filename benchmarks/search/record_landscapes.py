"""Record landscapes: real merges of the zoo's models at chosen points of a search space, answer by answer.

    MERGE_SEARCH_ZOO=... python benchmarks/search/record_landscapes.py NAME
                             [--points 500] [--ends ROUNDS] [--out FOLDER]

`NAME` is one of `SPACES`. Every point goes through the product's own engine and evaluators in one process: the recipe
is spliced into one live model, which answers the first half of the search questions. No sampler and no storage take
part. The table is saved every `SAVE_EVERY` points, and a killed run continues where it stopped. `fit_landscapes.py`
comes next.

`proposals` chooses the points. First come published and uniform recipes. A third are scrambled Sobol points of the box
and of a smaller box around a uniform recipe, a third are steps of CMA-ES from three starts, and a third are steps
around the best points so far and between good ones. `--ends` then adds, in rounds, the points where searches of the
fitted landscape end, so that the landscape is known best where searches end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from cmaes import CMA
from numpy.typing import NDArray
from scipy.stats import qmc
from zoo import ZOOS, search_study, write_tasks

from merge_search.evaluation import Split
from merge_search.recipe import Recipe
from merge_search.search.plan import Plan
from merge_search.search.prepare import prepare
from merge_search.search.samplers.unit_cube import UnitCube
from merge_search.search.start.baselines import baselines
from merge_search.search.trial.worker import Worker
from merge_search.seeding import derive_seed
from merge_search.study_file import read_study_file

Array = NDArray[np.float64]

RECORDED = Path(__file__).parent / "recorded"
SAVE_EVERY = 20
ENDS = 24
BATCH_SIZE = 128
FIDELITY = 0.5
"""More points with fewer questions each tell more about a smooth landscape than the reverse."""
PUBLISHED = ["ties", "dare", "della", "tsv_m"]
STARTS = ((0.6, 0.12), (1 / 3, 0.15), (1.0, 0.12))
"""Uniform strength and step size of CMA-ES, in units of the box."""

SPACES: Mapping[str, dict[str, Any]] = {
    "lm_blockwise": {"zoo": "lm", "space": {"type": "blockwise"}},
    "lm_ties": {"zoo": "lm", "space": {"type": "blockwise", "preset": "ties", "density": {"per": "block"}}},
    "lm_ties_fine": {
        "zoo": "lm",
        "space": {"type": "blockwise", "preset": "ties", "density": {"per": "block_kind"}},
    },
    "lm_kind": {"zoo": "lm", "space": {"type": "module_kind"}},
    "lm_mission": {"zoo": "lm", "space": {"type": "compatibility"}},
    "lm_mission_wide": {"zoo": "lm", "space": {"type": "compatibility", "density": {"per": "block"}}},
    "encoder_blockwise": {"zoo": "encoder", "space": {"type": "blockwise"}},
}


def study(name: str, root: Path, tasks: Path) -> dict[str, Any]:
    """The study file whose merges are recorded. It reads rows of the val files and none of a test file."""
    parts = search_study(root, ZOOS[SPACES[name]["zoo"]], tasks)
    return {
        **parts,
        "evaluate": [{**entry, "batch_size": BATCH_SIZE} for entry in parts["evaluate"]],
        "study": {"name": name, "seed": 0},
        "space": SPACES[name]["space"],
        "objective": {"maximise": "mean"},
        "search": {"n_trials": 1, "baselines": PUBLISHED},
        "device": "cpu",
    }


@dataclass
class Table:
    """The points recorded so far: coordinates (n, d) and answers (n, questions), 0 or 1."""

    points: list[list[float]] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    answers: list[NDArray[np.bool_]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Table:
        if not path.exists():
            return cls()
        with np.load(path, allow_pickle=False) as data:
            answers = np.unpackbits(data["answers"], axis=1, count=len(data["task_of"])).astype(bool)
            return cls(data["points"].tolist(), data["phases"].tolist(), list(answers), data["seconds"].tolist())

    def add(self, recorder: Recorder, phase: str, x: Array) -> None:
        """Merge at coordinates `x` and keep the answers."""
        began = time.process_time()
        self.answers.append(recorder.answers(recorder.plan.space.decode(recorder.cube.decode(x.tolist()))))
        self.seconds.append(time.process_time() - began)
        self.points.append(x.tolist())
        self.phases.append(phase)

    def save(self, path: Path, header: Mapping[str, Any]) -> None:
        """Replace `path` at once: it is never half written."""
        part = path.with_suffix(".part.npz")
        np.savez_compressed(
            part,
            points=np.array(self.points),
            phases=np.array(self.phases),
            answers=np.packbits(np.array(self.answers), axis=1),
            seconds=np.array(self.seconds, dtype=np.float32),
            **header,
        )
        os.replace(part, path)


def proposals(
    cube: UnitCube, start: list[list[float]], uniform: Any, n: int
) -> Generator[tuple[str, Array], float, None]:
    """The next point to merge at, given the mean score of the point before. It depends on the scores alone."""
    tried: list[tuple[float, Array]] = []
    rng = np.random.default_rng(derive_seed(0, "record"))
    for x in start:
        point = np.array(x)
        tried.append(((yield "start", point), point))
    third = (n - len(start)) // 3
    yield from _spread(cube, uniform(0.5), third, tried)
    for strength, sigma in STARTS:
        yield from _evolve(cube, uniform(strength), sigma, third // len(STARTS), tried)
    while True:
        best = [x for _, x in sorted(tried, key=lambda t: -t[0])[: 3 * cube.n_columns]]
        one, other = (best[int(i)] for i in rng.integers(len(best) // (5, 1)[len(tried) % 2], size=2))
        scale = 10 ** rng.uniform(-2, -0.7)
        mixed = one + rng.uniform(-0.3, 1.0) * (other - one) * (len(tried) % 3 > 0)
        moved = _redraw(cube, np.clip(mixed + scale * rng.standard_normal(len(one)), 0, 1), rng, chance=0.1, base=one)
        tried.append(((yield "near the best", moved), moved))


def _spread(
    cube: UnitCube, centre: list[float], n: int, tried: list[tuple[float, Array]]
) -> Generator[tuple[str, Array], float, None]:
    """Sobol points of the whole box, and of boxes half and a quarter as wide around a uniform recipe."""
    d = cube.n_columns
    sobol = qmc.Sobol(d, seed=derive_seed(0, "sobol")).random(1 << max(1, math.ceil(math.log2(n))))[:n]
    for i, u in enumerate(sobol):
        width = (1.0, 0.5, 0.25)[i % 3]
        x = u.copy()
        k = len(cube.numeric)
        low = np.clip(np.array(centre[:k]) - width / 2, 0, 1 - width)
        x[:k] = low + width * u[:k]
        for j, choices in enumerate(cube.n_choices):
            x[k + j] = min(int(u[k + j] * choices), choices - 1)
        tried.append(((yield ("box", "half box", "quarter box")[i % 3], x), x))


def _evolve(
    cube: UnitCube, start: list[float], sigma: float, n: int, tried: list[tuple[float, Array]]
) -> Generator[tuple[str, Array], float, None]:
    """Steps of CMA-ES over the numbers. Categories are drawn at random."""
    rng = np.random.default_rng(derive_seed(0, "evolve", *map(str, start)))
    k = len(cube.numeric)
    seed = derive_seed(0, "cma", *map(str, start))
    cma = CMA(mean=np.array(start[:k]), sigma=sigma, bounds=np.tile([0.0, 1.0], (k, 1)), seed=seed)
    asked = 0
    while asked < n:
        told = []
        for _ in range(cma.population_size):
            numbers = cma.ask()
            x = _redraw(cube, np.concatenate([numbers, start[k:]]), rng, chance=0.5)
            value = yield "evolution", x
            tried.append((value, x))
            told.append((numbers, -value))
            asked += 1
        cma.tell(told)


def _redraw(cube: UnitCube, x: Array, rng: np.random.Generator, *, chance: float, base: Array | None = None) -> Array:
    """`x` with categories of `base` (else its own), each redrawn by chance."""
    k = len(cube.numeric)
    for j, choices in enumerate(cube.n_choices):
        kept = x[k + j] if base is None else base[k + j]
        x[k + j] = rng.integers(choices) if rng.random() < chance else kept
    return x


class Recorder:
    """Merges, asks questions and keeps the answers. `header` describes the columns."""

    def __init__(self, plan: Plan, fidelity: float) -> None:
        self.fidelity = fidelity
        self.plan, self.bench, self.cube = plan, Worker(plan, device="cpu"), UnitCube(plan.space.parameters)
        self.metrics = [
            next(m.name for m in plan.metrics if m.task == t) for t in dict.fromkeys(m.task for m in plan.metrics)
        ]

    def answers(self, recipe: Recipe) -> NDArray[np.bool_]:
        """Of every question, task after task."""
        recipe = recipe.model_copy(update={"models": self.bench.models})
        self.bench.splice(recipe)
        scores = self.bench.ask(Split.SEARCH, self.fidelity).scores
        self.sizes = [len(scores[m].values) for m in self.metrics]
        return np.concatenate([scores[m].values for m in self.metrics]) > 0.5

    def header(self, name: str) -> dict[str, Any]:
        """Labelled recipes and their answers, the task of every question, the space and its parameters."""
        context, space = self.plan.context, self.plan.space
        labelled = baselines(context, self.plan.baselines)
        answers = np.array([self.answers(r) for r in labelled.values()])
        points = [space.encode(r) for r in labelled.values()]
        rows = [None if p is None else self.cube.encode(p) for p in points]
        empty = [math.nan] * self.cube.n_columns
        about = {
            "name": name,
            "space": SPACES[name]["space"],
            "metrics": self.metrics,
            "experts": list(context.experts),
            "labels": list(labelled),
            "columns": [*self.cube.numeric, *self.cube.categories],
            "parameters": {k: [type(p).__name__, *_fields(p)] for k, p in space.parameters.items()},
            "initial": [self.cube.encode(p) for p in space.initial_points()],
        }
        return {
            "about": np.array(json.dumps(about)),
            "labelled_answers": np.packbits(answers, axis=1),
            "labelled_points": np.array([empty if r is None else r for r in rows]),
            "task_of": np.repeat(np.arange(len(self.sizes)), self.sizes).astype(np.uint8),
        }

    def uniform(self, strength: float) -> list[float]:
        """Coordinates of a uniform recipe: the nearest initial point with all coefficients at `strength`."""
        point = dict(self.plan.space.initial_points()[0])
        point |= {k: strength for k in point if k.startswith("coefficient")}
        x = self.cube.encode(point)
        assert x is not None
        return x


def _fields(parameter: Any) -> list[Any]:
    return [getattr(parameter, name) for name in parameter.__dataclass_fields__]


@contextmanager
def recorder_of(name: str) -> Iterator[Recorder]:
    """The recorder of a space's study, with its task files in a temporary folder."""
    zoo = Path(os.environ["MERGE_SEARCH_ZOO"])
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(zoo, Path(folder) / "val", rows="val")
        file = Path(folder) / "study.yaml"
        file.write_text(yaml.safe_dump(study(name, zoo, Path(folder)), sort_keys=False))
        yield Recorder(prepare(read_study_file(file)), FIDELITY)


def record(name: str, *, points: int, out: Path) -> None:
    """Fill `out`/NAME.npz up to so many points. Points recorded before are replayed, not asked again.

    Raises:
        ValueError: The table was begun for another number of points.
    """
    path = out / f"{name}.npz"
    table = Table.load(path)
    with recorder_of(name) as recorder:
        header = recorder.header(name)
        first = [x for x in np.array(header["labelled_points"]).tolist() if not math.isnan(x[0])]
        first += json.loads(str(header["about"]))["initial"]
        first += [recorder.uniform(s) for s in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.3)]
        source = proposals(recorder.cube, first, recorder.uniform, points)
        phase, x = next(source)
        for i in range(points):
            if i == len(table.points):
                table.add(recorder, phase, x)
            if not np.allclose(table.points[i], x):
                raise ValueError(
                    f"{path}: point {i} was recorded elsewhere; record as many points as it was begun with"
                )
            if (i + 1) % SAVE_EVERY == 0 or i + 1 == points:
                table.save(path, header)
            value = _mean(table.answers[i], header["task_of"])
            if (i + 1) % 50 == 0:
                print(f"{name} {i + 1} {phase} {value:.3f} {np.mean(table.seconds):.2f} s", flush=True)
            phase, x = source.send(value)


def record_ends(name: str, *, rounds: int, out: Path) -> None:
    """Add the points where searches of the fitted landscape end, `ENDS` a round, and fit again after each round.

    A smooth surface is least to be trusted where it was searched for its maximum.
    """
    from fit_landscapes import fit_landscape
    from landscapes import load
    from replay_opponents import ends

    path = out / f"{name}.npz"
    with np.load(path, allow_pickle=False) as data:
        header = {k: data[k] for k in ("about", "labelled_answers", "labelled_points", "task_of")}
    with recorder_of(name) as recorder:
        for round_ in range(rounds):
            table = Table.load(path)
            fit_landscape(name, out)
            landscape = load(name, out)
            expected, found = [], []
            for x in ends(landscape, seed=1000 + round_, n=ENDS):
                table.add(recorder, "end of a search", x)
                expected.append(float(landscape.scores(x).mean()))
                found.append(_mean(table.answers[-1], header["task_of"]))
            table.save(path, header)
            gap = np.subtract(found, expected)
            print(f"{name} round {round_}: expected {np.mean(expected):.4f}, found {np.mean(found):.4f}, "
                  f"root mean square {np.sqrt((gap**2).mean()):.4f}", flush=True)  # fmt: skip
        fit_landscape(name, out)


def _mean(answers: NDArray[np.bool_], task_of: NDArray[np.uint8]) -> float:
    """Mean over tasks of the share of right answers."""
    return float(np.mean([answers[task_of == t].mean() for t in np.unique(task_of)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=list(SPACES))
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument(
        "--ends", type=int, default=0, metavar="ROUNDS", help="add ends of searches to a finished table"
    )
    parser.add_argument("--out", type=Path, default=RECORDED)
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    if args.ends:
        record_ends(args.name, rounds=args.ends, out=args.out)
    else:
        record(args.name, points=args.points, out=args.out)


if __name__ == "__main__":
    main()
