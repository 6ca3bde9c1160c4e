"""Ways of searching a recorded landscape: the product's samplers and its opponents, with the same questions for all.

Every function takes a `Problem` and a number of candidates and returns a `Trace`. A candidate costs the same to all of
them. All but ``mergekit_evolve_alone`` begin as the product does, with base, experts, average, task arithmetic,
published presets and, inside Optuna studies, the space's uniform recipes.

=========================  ======================================================================================
NAME[:option=value,...]    a sampler of `merge_search.search.samplers` in an in-memory study; recommends by posterior
                           mean (``botorch``) or by best observed value (the others); ``/posterior`` or ``/observed``
                           behind the name says otherwise
mergekit_evolve            CMA-ES over |weight| from 1/n and |density| (at most 1) from 1, step 1/6, unbounded, best
                           observed (mergekit's evo/genome.py); weights beyond the recorded box are cut to it
mergekit_evolve_alone      the same without the baselines, which the original does not have
df_merge                   one coefficient per expert in [0, 1], ten random points, then expected improvement of a
                           noise-free Matern-5/2 process (DF-Merge, arXiv 2504.18992, without its Fisher weights)
=========================  ======================================================================================
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import optuna
import yaml
from cmaes import CMA
from landscapes import Baseline, Landscape
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
from sklearn.gaussian_process import GaussianProcessRegressor  # type: ignore[import-untyped]
from sklearn.gaussian_process.kernels import Matern  # type: ignore[import-untyped]

from merge_search.evaluation import Evaluation, MetricInfo, Scores, Split
from merge_search.objective import Estimate, Objective, References
from merge_search.outcome import Outcome
from merge_search.search.samplers import SAMPLERS, make_sampler, suggest
from merge_search.search.samplers.recommend import recommend
from merge_search.seeding import derive_seed

Array = NDArray[np.float64]

BY_POSTERIOR = frozenset({"botorch"})
EVOLVE_SIGMA = 1 / 6
DF_RANDOM, DF_XI, DF_DRAWS = 10, 0.01, 4000


class Problem:
    """A landscape, one set of questions (so many per task), and the objective ``mean``.

    The objective has the variance that the product states.
    """

    def __init__(self, landscape: Landscape, seed: int, questions: int = 200) -> None:
        self.landscape = landscape
        self.cube, self.parameters = landscape.cube, landscape.parameters
        self.seed = seed
        self._observer = landscape.observer(seed, [questions] * len(landscape.tasks))
        infos = [
            MetricInfo(task, metric, True, {Split.SEARCH: questions})
            for task, metric in (name.split("/") for name in landscape.tasks)
        ]
        self._objective = Objective(["mean"], [], [], infos)
        scored = {b.label: self._evaluation(self._observer.answers_of(b)) for b in landscape.baselines}
        experts = {e: scored[e] for e in landscape.experts}
        found = References.from_evaluations(infos, scored["base"], experts)
        self._references = replace(found, pairing=min(max(landscape.pairing, 0.1), 1.0))

    def _evaluation(self, answers: list[NDArray[np.bool_]]) -> Evaluation:
        scores = {}
        for task, bits in zip(self.landscape.tasks, answers, strict=True):
            values = bits.astype(float)
            scores[task] = Scores((), values, float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))
        return Evaluation(Split.SEARCH, 1.0, scores)

    def measure(self, what: Array | Baseline) -> Estimate:
        """Observed mean score and the variance that a study would store, of a point or a labelled recipe."""
        answers = self._observer.answers_of(what) if isinstance(what, Baseline) else self._observer.answers(what)
        return self._objective.values(self._evaluation(answers), self._references)[0]

    def truth(self, what: Array | Baseline) -> tuple[float, float]:
        """True mean score and true retention."""
        scores = what.scores if isinstance(what, Baseline) else self.landscape.scores(what)[0]
        return float(scores.mean()), float(self.landscape.retention(scores))


@dataclass
class Trace:
    """Candidates in order, and the one that is recommended after the first n."""

    problem: Problem
    tried: list[Array | Baseline] = field(default_factory=list)
    observed: list[float] = field(default_factory=list)
    recommended: dict[int, int] = field(default_factory=dict)

    def measure(self, what: Array | Baseline) -> Estimate:
        found = self.problem.measure(what)
        self.tried.append(what)
        self.observed.append(found.value)
        return found

    def best_observed(self) -> int:
        """The best merge so far: not the base, not an expert, unless there is nothing else."""
        merges = [i for i, what in enumerate(self.tried) if not self.is_reference(what)] or list(range(len(self.tried)))
        return max(merges, key=lambda i: self.observed[i])

    def is_reference(self, what: Array | Baseline) -> bool:
        return isinstance(what, Baseline) and what.label in ("base", *self.problem.landscape.experts)


Opponent = Callable[[Problem, list[int]], Trace]


def opponent(name: str) -> Opponent:
    """An opponent by name; see the module's docstring.

    Raises:
        KeyError: There is none of that name.
    """
    if name in OTHERS:
        return OTHERS[name]
    head, _, by = name.partition("/")
    kind, _, text = head.partition(":")
    if kind not in SAMPLERS or by not in ("", "posterior", "observed"):
        raise KeyError(f"opponents are {', '.join([*SAMPLERS, *OTHERS])}, got {name!r}")
    options = {k: yaml.safe_load(v) for k, v in (pair.split("=") for pair in text.split(",") if pair)}
    by_posterior = by == "posterior" if by else kind in BY_POSTERIOR
    return lambda problem, budgets: _study(problem, budgets, kind, options, by_posterior)


def _study(problem: Problem, budgets: list[int], sampler: str, options: dict[str, Any], by_posterior: bool) -> Trace:
    """An in-memory Optuna study that begins as the product's does."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parameters, trace = problem.parameters, Trace(problem)
    study = optuna.create_study(
        direction="maximize", sampler=make_sampler(sampler, parameters=parameters, seed=problem.seed, **options)
    )
    labelled = {b.label: b for b in problem.landscape.baselines}
    _enqueue(study, problem)
    for number in range(max(budgets)):
        trial = study.ask()
        label = trial.user_attrs.get("label")
        if label is not None and labelled[label].x is None:
            what: Array | Baseline = labelled[label]
        else:
            x = problem.cube.encode(suggest(trial, parameters))
            assert x is not None
            what = labelled[label] if label else np.array(x)
        found = trace.measure(what)
        trial.set_user_attr("noise", {"value": found.variance})
        trial.set_user_attr("outcome", str(Outcome.OK))
        study.tell(trial, found.value)
        if number + 1 in budgets:
            trace.recommended[number + 1] = trace.best_observed()
            if by_posterior:
                ranking = [r.number for r in recommend(study, parameters, seed=problem.seed)]
                trace.recommended[number + 1] = next(n for n in ranking if not trace.is_reference(trace.tried[n]))
    return trace


def _enqueue(study: optuna.Study, problem: Problem) -> None:
    seen = []
    for baseline in problem.landscape.baselines:
        point = {} if baseline.x is None else problem.cube.decode(baseline.x.tolist())
        study.enqueue_trial(point, user_attrs={"label": baseline.label})
        seen.append(point)
    for x in problem.landscape.initial:
        if (point := problem.cube.decode(x.tolist())) not in seen:
            study.enqueue_trial(point)


def _by_observed(
    problem: Problem, budgets: list[int], source: Iterator[Array], told: list[float], first: bool
) -> Trace:
    """Measure what `source` proposes, after the baselines if `first`.

    Values go to `told` before the next proposal.
    """
    trace = Trace(problem)
    queue = list(problem.landscape.baselines) if first else []
    for number in range(max(budgets)):
        if number < len(queue):
            trace.measure(queue[number])
        else:
            told.append(trace.measure(next(source)).value)
        if number + 1 in budgets:
            trace.recommended[number + 1] = trace.best_observed()
    return trace


def _coordinates(problem: Problem, numbers: dict[str, float]) -> Array:
    """Coordinates of native values, cut to the box. Other parameters are as in the first uniform recipe."""
    point = dict(problem.cube.decode(problem.landscape.initial[0].tolist()))
    for name, value in numbers.items():
        domain: Any = problem.parameters[name]
        point[name] = min(max(value, domain.low), domain.high)
    x = problem.cube.encode(point)
    assert x is not None
    return np.array(x)


def _evolution(problem: Problem, told: list[float]) -> Iterator[Array]:
    names = problem.cube.numeric
    is_density = np.array([n.startswith("density") for n in names])
    start = np.where(is_density, 1.0, 1 / len(problem.landscape.experts))
    cma = CMA(mean=start, sigma=EVOLVE_SIGMA, seed=derive_seed(problem.seed, "evolve"))
    while True:
        genes = [cma.ask() for _ in range(cma.population_size)]
        for gene in genes:
            weights = np.where(is_density, np.minimum(np.abs(gene), 1.0), np.abs(gene))
            yield _coordinates(problem, dict(zip(names, weights.tolist(), strict=True)))
        cma.tell([(gene, -value) for gene, value in zip(genes, told[-len(genes) :], strict=True)])


def mergekit_evolve(problem: Problem, budgets: list[int], *, baselines: bool = True) -> Trace:
    """See the module's docstring. Categories stay at the first uniform recipe's."""
    told: list[float] = []
    return _by_observed(problem, budgets, _evolution(problem, told), told, baselines)


def mergekit_evolve_alone(problem: Problem, budgets: list[int]) -> Trace:
    return mergekit_evolve(problem, budgets, baselines=False)


def _df_points(problem: Problem, told: list[float]) -> Iterator[Array]:
    experts = problem.landscape.experts
    expert_of = {n: n.split(".")[1] for n in problem.cube.numeric if n.startswith("coefficient.")}
    rng = np.random.default_rng(derive_seed(problem.seed, "df_merge"))
    asked: list[Array] = []
    while True:
        at = rng.random(len(experts)) if len(asked) < DF_RANDOM else _improvement(asked, told, rng)
        asked.append(at)
        level = dict(zip(experts, at.tolist(), strict=True))
        yield _coordinates(problem, {name: level[e] for name, e in expert_of.items()})


def _improvement(asked: list[Array], told: list[float], rng: np.random.Generator) -> Array:
    """The point of the unit cube with the largest expected improvement, of many draws and of draws around the best."""
    seed = int(rng.integers(2**31))
    process = GaussianProcessRegressor(
        Matern(nu=2.5), alpha=1e-6, normalize_y=True, n_restarts_optimizer=2, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(np.array(asked), np.array(told))
    draws = rng.random((DF_DRAWS, len(asked[0])))
    for scale in (0.05, 0.01):
        best = draws[np.argmax(_gain(process, draws, max(told)))]
        draws = np.clip(best + scale * rng.standard_normal((DF_DRAWS // 4, len(best))), 0, 1)
        draws[0] = best
    found: Array = draws[np.argmax(_gain(process, draws, max(told)))]
    return found


def _gain(process: GaussianProcessRegressor, x: Array, best: float) -> Array:
    mean, sd = process.predict(x, return_std=True)
    above = mean - best - DF_XI
    z = above / np.maximum(sd, 1e-12)
    found: Array = above * norm.cdf(z) + sd * norm.pdf(z)
    return found


def df_merge(problem: Problem, budgets: list[int]) -> Trace:
    """See the module's docstring."""
    told: list[float] = []
    return _by_observed(problem, budgets, _df_points(problem, told), told, True)


def ends(landscape: Landscape, *, seed: int, n: int) -> list[Array]:
    """Points where `n` searches of a landscape end: opponents by turns, and CMA-ES on the true scores themselves."""
    found: list[Array] = []
    for i in range(n):
        if i % 4 == 3:
            found.append(maximum(landscape, seed=seed + i)[0])
            continue
        name = ("cmaes", "mergekit_evolve_alone", "df_merge")[i % 4]
        trace = opponent(name)(Problem(landscape, derive_seed(seed, i)), [60])
        what = trace.tried[trace.recommended[60]]
        found += [] if isinstance(what, Baseline) else [what]
    return found


def maximum(landscape: Landscape, *, seed: int, evaluations: int = 3000) -> tuple[Array, float]:
    """A maximum of the true mean score, by CMA-ES from a random uniform recipe. Categories are drawn at random."""
    rng = np.random.default_rng(derive_seed(seed, "maximum"))
    k = len(landscape.cube.numeric)
    start = np.array(landscape.initial[int(rng.integers(len(landscape.initial)))])
    start[k:] = [rng.integers(c) for c in landscape.cube.n_choices]
    cma = CMA(mean=start[:k], sigma=0.2, bounds=np.tile([0.0, 1.0], (k, 1)), seed=int(rng.integers(2**31)))
    best, at = -np.inf, start
    for _ in range(evaluations // cma.population_size):
        asked = np.array([cma.ask() for _ in range(cma.population_size)])
        rows = np.concatenate([asked, np.tile(start[k:], (len(asked), 1))], axis=1)
        values = landscape.scores(rows).mean(axis=1)
        cma.tell([(a, -float(v)) for a, v in zip(asked, values, strict=True)])
        if values.max() > best:
            best, at = float(values.max()), rows[int(values.argmax())]
    return at, best


OTHERS: dict[str, Opponent] = {
    "mergekit_evolve": mergekit_evolve,
    "mergekit_evolve_alone": mergekit_evolve_alone,
    "df_merge": df_merge,
}
