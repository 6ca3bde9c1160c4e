"""Landscapes: smooth surfaces fitted to recorded merges, on which a study takes its sampler's time and no more.

    landscape = load("lm_blockwise")
    landscape.scores(x)                      # true accuracy per task at coordinates x of the unit cube
    observer = landscape.observer(seed=3)    # a set of questions, the same for all candidates
    observer.answers(x)                      # their 0/1 answers: noisy, correlated between candidates

A landscape is a table of real merges (`record_landscapes.py`) and, for each task, the numbers of a Gaussian process
that was fitted to it (`fit_landscapes.py`). The posterior mean of the process is the truth here. The link is probit:
accuracy p at x means that a question with standard normal difficulty z is answered where z <= Phi^-1(p). Difficulty
has a part that belongs to the question alone and a part that varies smoothly with the recipe, so that two candidates
disagree the more the farther apart they are:

    z_q(x) = sqrt(shared) d_q + sqrt(1 - shared) e_q(x),    cov(e_q(x), e_q(x')) = matern(h(x, x') / reach; smoothness)

Here h is the distance in the Gaussian process's length scales; `shared`, `reach` and `smoothness` are fitted to the
recorded pairs. e_q is drawn by random Fourier features (Rahimi and Recht 2007). Their frequencies follow Student's
distribution with twice as many degrees of freedom as the kernel's smoothness.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.special import ndtr, ndtri

from merge_search.search.samplers.unit_cube import UnitCube
from merge_search.seeding import derive_seed
from merge_search.space import Categorical, Float, Integer, Parameter

__all__ = [
    "RECORDED",
    "Baseline",
    "Fit",
    "Landscape",
    "Observer",
    "Surrogate",
    "Table",
    "correlation",
    "distances",
    "load",
    "matern",
    "names",
    "one_hot",
    "pairing",
    "probit",
]

Array = NDArray[np.float64]
Bits = NDArray[np.bool_]

RECORDED = Path(__file__).parent / "recorded"
N_FEATURES = 512
_KINDS: Mapping[str, Callable[..., Parameter]] = {
    "Float": Float,
    "Integer": Integer,
    "Categorical": lambda choices: Categorical(tuple(choices)),
}


@dataclass(frozen=True)
class Table:
    """The table that `record_landscapes.py` wrote.

    Attributes:
        about: Space, parameters, metrics, experts, labels, uniform recipes.
        points: Coordinates in the order of `UnitCube`. Shape (n, d).
        answers: Right or wrong answers. Shape (n, questions).
        task_of: Number of every question's task. Shape (questions,).
        labelled_points: Coordinates of labelled recipes; NaN where the space does not hold one. Shape (labels, d).
        labelled_answers: Answers of the labelled recipes. Shape (labels, questions).
        seconds: CPU time of each point. Shape (n,).
    """

    about: Mapping[str, Any]
    points: Array
    answers: Bits
    task_of: NDArray[np.uint8]
    labelled_points: Array
    labelled_answers: Bits
    seconds: Array

    @classmethod
    def read(cls, path: Path, n_points: int | None = None) -> Table:
        """The table, or the first `n_points` rows of a table that has grown since it was fitted."""
        with np.load(path, allow_pickle=False) as data:
            n = len(data["task_of"])
            answers, labelled = (
                np.unpackbits(data[key], axis=1, count=n).astype(bool) for key in ("answers", "labelled_answers")
            )
            about = json.loads(str(data["about"]))
            points, seconds = data["points"].astype(float)[:n_points], data["seconds"].astype(float)[:n_points]
            return cls(about, points, answers[:n_points], data["task_of"], data["labelled_points"], labelled, seconds)

    @property
    def n_questions(self) -> list[int]:
        """Number of questions of each task."""
        return [int(n) for n in np.bincount(self.task_of)]

    def shares(self, answers: Bits) -> Array:
        """Share of right answers by task. Shape (rows, tasks)."""
        return np.stack([answers[:, self.task_of == t].mean(axis=1) for t in range(len(self.n_questions))], axis=1)

    def parameters(self) -> dict[str, Parameter]:
        return {name: _KINDS[kind](*fields) for name, (kind, *fields) in self.about["parameters"].items()}


def probit(share: Array, n: int) -> Array:
    """Phi^-1 of a share of n, kept off 0 and 1 by half an answer."""
    found: Array = ndtri((share * n + 0.5) / (n + 1))
    return found


def one_hot(x: Array, n_choices: list[int]) -> Array:
    """Coordinates with each category as indicator columns of length 1 / sqrt(2): two choices lie 1 apart."""
    x = np.atleast_2d(x)
    k = x.shape[1] - len(n_choices)
    parts = [x[:, :k]]
    parts += [(x[:, [k + j]] == np.arange(n)) / np.sqrt(2) for j, n in enumerate(n_choices)]
    return np.concatenate(parts, axis=1)


def distances(a: Array, b: Array) -> Array:
    """Euclidean distances. Shapes (n, d), (m, d) -> (n, m)."""
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    found: Array = np.sqrt(np.maximum(squared, 0.0))
    return found


def correlation(kernel: str, h: Array) -> Array:
    """Correlation of a Gaussian process at scaled distance h."""
    if kernel == "rbf":
        found: Array = np.exp(-0.5 * h**2)
        return found
    return matern(h, 2.5)


def matern(h: Array, smoothness: float) -> Array:
    """Correlation at scaled distance h, for smoothness 1/2, 3/2 or 5/2."""
    s = np.sqrt(2 * smoothness) * h
    polynomial = {0.5: 1.0, 1.5: 1 + s, 2.5: 1 + s + s**2 / 3}[smoothness]
    found: Array = polynomial * np.exp(-s)
    return found


@dataclass(frozen=True)
class Fit:
    """A Gaussian process's numbers for one task (in probits), and the noise model's."""

    kernel: str
    lengthscales: list[float]
    variance: float
    noise: float
    mean: float
    shared: float = 0.5
    reach: float = 1.0
    smoothness: float = 0.5


class Surrogate:
    """One task's Gaussian process, conditioned on the table; `latent` is its posterior mean, in probits."""

    def __init__(self, fit: Fit, x: Array, z: Array) -> None:
        self.fit = fit
        self._x = x / fit.lengthscales
        gram = fit.variance * correlation(fit.kernel, distances(self._x, self._x))
        self._weights = cho_solve(cho_factor(gram + fit.noise * np.eye(len(x)), lower=True), z - fit.mean)

    def scaled(self, x: Array) -> Array:
        """Coordinates (one-hot) in length scales."""
        found: Array = x / np.asarray(self.fit.lengthscales)
        return found

    def latent(self, x: Array) -> Array:
        """Shape (n, columns) -> (n,)."""
        h = distances(self.scaled(x), self._x)
        found: Array = self.fit.mean + self.fit.variance * correlation(self.fit.kernel, h) @ self._weights
        return found


def pairing(answers: list[Bits]) -> float:
    """Share of a score's variance that is left in a difference of two scores.

    It is mean var(y_i - y_j) / 2 over mean var(y_i), of all pairs.

    Args:
        answers: Answers by task. Shape (candidates, questions) each.
    """
    between, alone = [], []
    for rows in (a.astype(float) for a in answers):
        i, j = np.triu_indices(len(rows), 1)
        alone.append(rows.var(axis=1).mean())
        between.append(((rows[i] - rows[j]).var(axis=1) / 2).mean())
    return float(np.mean(between) / np.mean(alone))


@dataclass(frozen=True)
class Baseline:
    """A labelled recipe: its coordinates, or None where the space does not hold it, and its true score by task."""

    label: str
    x: Array | None
    scores: Array


class Landscape:
    """True scores on a space's unit cube; see the module's docstring.

    Attributes:
        parameters: Parameters of the space.
        cube: Its unit cube.
        tasks: Metric names.
        baselines: Base, experts, average, task arithmetic, published presets, in the product's order.
        initial: Coordinates of the space's uniform recipes.
        n_questions: Number of recorded questions of each task.
        pairing: `pairing` of base and experts, by which a study scales its stated variances.
    """

    def __init__(self, table: Table, fits: list[Fit]) -> None:
        self.name: str = table.about["name"]
        self.parameters = table.parameters()
        self.cube = UnitCube(self.parameters)
        self.tasks: list[str] = table.about["metrics"]
        self.experts: list[str] = table.about["experts"]
        self.initial = [np.array(x) for x in table.about["initial"]]
        self.n_questions = table.n_questions
        columns, shares = one_hot(table.points, self.cube.n_choices), table.shares(table.answers)
        self.surrogates = [
            Surrogate(fit, columns, probit(shares[:, t], self.n_questions[t])) for t, fit in enumerate(fits)
        ]
        labelled = zip(table.about["labels"], table.labelled_points, table.shares(table.labelled_answers), strict=True)
        self.baselines = [
            Baseline(label, None, s) if np.isnan(x).any() else Baseline(label, x, self.scores(x)[0])
            for label, x, s in labelled
        ]
        of = {b.label: b.scores for b in self.baselines}
        self.base, self.best_expert = of["base"], np.max([of[e] for e in self.experts], axis=0)
        rows = [table.about["labels"].index(label) for label in ("base", *self.experts)]
        answers = table.labelled_answers[rows]
        self.pairing = pairing([answers[:, table.task_of == t] for t in range(len(self.tasks))])

    def latent(self, x: Array) -> Array:
        """Shape (n, d) or (d,) -> (n, tasks), in probits."""
        columns = one_hot(x, self.cube.n_choices)
        return np.stack([s.latent(columns) for s in self.surrogates], axis=1)

    def scores(self, x: Array) -> Array:
        """True accuracy. Shape (n, d) or (d,) -> (n, tasks)."""
        found: Array = ndtr(self.latent(x))
        return found

    def retention(self, scores: Array) -> Array:
        """Mean over tasks of (score - base) / (best expert - base). Shape (n, tasks) -> (n,)."""
        found: Array = ((scores - self.base) / (self.best_expert - self.base)).mean(axis=-1)
        return found

    def observer(self, seed: int, n_questions: list[int] | None = None) -> Observer:
        """A study's questions: as many per task as were recorded, unless `n_questions` says otherwise."""
        return Observer(self, seed, n_questions or self.n_questions)


class Observer:
    """Answers of candidates to one set of questions.

    They are a function of the landscape, the seed and the point (or label) asked for.
    """

    def __init__(self, landscape: Landscape, seed: int, n_questions: list[int]) -> None:
        self._landscape, self._seed = landscape, seed
        self._tasks = []
        for t, (surrogate, n) in enumerate(zip(landscape.surrogates, n_questions, strict=True)):
            rng = np.random.default_rng(derive_seed(seed, "questions", landscape.name, t))
            d = len(surrogate.fit.lengthscales)
            freedom = 2 * surrogate.fit.smoothness
            student = rng.standard_normal((N_FEATURES, d)) / np.sqrt(rng.chisquare(freedom, (N_FEATURES, 1)) / freedom)
            self._tasks.append(
                _Task(
                    surrogate,
                    easiness=rng.standard_normal(n),
                    weights=rng.standard_normal((n, N_FEATURES)),
                    frequencies=student / surrogate.fit.reach,
                    phases=rng.uniform(0, 2 * np.pi, N_FEATURES),
                )
            )

    def answers(self, x: Array) -> list[Bits]:
        """Answers by task of the candidate at coordinates x. Shape (questions,) each."""
        columns = one_hot(x, self._landscape.cube.n_choices)
        return [task.answers(columns) for task in self._tasks]

    def answers_of(self, baseline: Baseline) -> list[Bits]:
        """Answers by task of a labelled recipe.

        A recipe outside the space shares with candidates only what all of them share.
        """
        if baseline.x is not None:
            return self.answers(baseline.x)
        rng = np.random.default_rng(derive_seed(self._seed, "outside", zlib.crc32(baseline.label.encode())))
        return [task.answers_apart(p, rng) for task, p in zip(self._tasks, baseline.scores, strict=True)]


@dataclass(frozen=True)
class _Task:
    surrogate: Surrogate
    easiness: Array
    weights: Array
    frequencies: Array
    phases: Array

    def answers(self, columns: Array) -> Bits:
        waves = np.cos(self.frequencies @ self.surrogate.scaled(columns)[0] + self.phases)
        varying = self.weights @ (waves / np.linalg.norm(waves))
        found: Bits = self._difficulty(varying) <= self.surrogate.latent(columns)[0]
        return found

    def answers_apart(self, share: float, rng: np.random.Generator) -> Bits:
        found: Bits = self._difficulty(rng.standard_normal(len(self.easiness))) <= ndtri(np.clip(share, 1e-6, 1 - 1e-6))
        return found

    def _difficulty(self, varying: Array) -> Array:
        shared = self.surrogate.fit.shared
        found: Array = np.sqrt(shared) * self.easiness + np.sqrt(1 - shared) * varying
        return found


def names(folder: Path = RECORDED) -> list[str]:
    """Landscapes that are recorded and fitted."""
    return sorted(p.stem for p in folder.glob("*.json") if p.with_suffix(".npz").exists())


def load(name: str, folder: Path = RECORDED) -> Landscape:
    """A landscape by name: its table, and the numbers fitted to it.

    Raises:
        FileNotFoundError: It is not recorded, or not fitted.
    """
    numbers = json.loads((folder / f"{name}.json").read_text())
    table = Table.read(folder / f"{name}.npz", numbers["points"])
    return Landscape(table, [Fit(**f) for f in numbers["fits"]])
