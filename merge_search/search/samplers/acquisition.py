"""The next point: the one that is expected to improve most, over what was tried and is being tried.

Notation
    X        complete points (n, d); each quantity has its own Gaussian process, see `kernels`
    m        objectives, larger is better; constraints feasible where <= 0; crash model: +1 crashed, -1 ran
    S        raw candidates: half Sobol points, half steps from the best complete points
    a(x)     one objective     log noisy expected improvement (Ament et al. 2023, arXiv 2310.20708)
             several           log noisy expected hypervolume improvement, or a random Chebyshev scalarisation
                               (ParEGO, Knowles 2006)

Running trials join the baseline as fantasies, so that several workers never get the same point. Category
columns have no gradient: the search starts from every choice and leaves it where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective import logei as multi_objective_logei
from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
from botorch.acquisition.objective import GenericMCObjective
from botorch.generation.gen import gen_candidates_scipy
from botorch.models import ModelListGP
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.multi_objective.hypervolume import infer_reference_point
from botorch.utils.multi_objective.pareto import is_non_dominated
from botorch.utils.multi_objective.scalarization import get_chebyshev_scalarization
from botorch.utils.sampling import sample_simplex
from torch import Tensor

from merge_search.search.samplers.history import History, Quantity
from merge_search.search.samplers.kernels import KernelName, Surrogate, fit, make_kernel
from merge_search.search.samplers.unit_cube import UnitCube

__all__ = ["MultiObjective", "propose", "quasi_random"]

# NOTE: otherwise the first use compiles C++ for minutes, for the same values at the same speed.
multi_objective_logei._load_attempted = True

MultiObjective = Literal["auto", "hypervolume", "parego"]
N_RAW = 256
N_RESTARTS = 4
N_SAMPLES = {True: 64, False: 32}  # one objective; several
ASCENT_ITERATIONS = 20  # 40 cost half as much again for 0.01 in log improvement
MAX_HYPERVOLUME_OBJECTIVES = 3  # the partition of the dominated volume explodes beyond
CRASH_VARIANCE = 0.05
MIN_CONSTRAINT_ROWS = 3
SAME_POINT = 1e-9


@dataclass(frozen=True)
class _Models:
    objectives: list[Surrogate]
    limits: list[Surrogate]  # constraints, and the crash model; feasible where <= 0

    @property
    def joint(self) -> Any:
        models = [s.model for s in (*self.objectives, *self.limits)]
        return models[0] if len(models) == 1 else ModelListGP(*models)

    def means(self, points: Tensor) -> Tensor:
        """Posterior means of the standardised objectives. Shape (n, m)."""
        with torch.no_grad():
            return torch.cat([s.model.posterior(points).mean for s in self.objectives], 1)

    def constraints(self) -> list[Callable[[Tensor], Tensor]]:
        """On joint samples (..., outputs): negative is feasible."""
        first = len(self.objectives)
        thresholds = [s.standardise(0.0) for s in self.limits]

        def limit(output: int, threshold: float) -> Callable[[Tensor], Tensor]:
            return lambda z: z[..., output] - threshold

        return [limit(first + i, threshold) for i, threshold in enumerate(thresholds)]


def quasi_random(cube: UnitCube, *, seed: int, index: int) -> list[float]:
    """Point `index` of the scrambled Sobol sequence of `seed`, snapped to the space."""
    row: list[float] = _with_choices(_sobol(cube.n_columns, 1, seed=seed, skip=index), cube)[0].tolist()
    return cube.snap(row)


def propose(
    history: History,
    cube: UnitCube,
    *,
    seed: int,
    kernel: KernelName = "auto",
    multi_objective: MultiObjective = "auto",
) -> list[float]:
    """Coordinates of the most promising point that nobody has tried.

    Determinism: a function of the arguments if torch's global generator is seeded by the caller (pruning of
    the baseline draws from it). Sums differ in the last bit between numbers of threads.
    Raises:
        RuntimeError, botorch errors: a fit or a factorisation failed.
    """
    models = _fit_all(history, cube, kernel)
    acquisition = _acquisition(models, history, seed=seed, multi_objective=multi_objective)
    raw = _raw_candidates(_best_points(models, history), cube, seed=seed)
    with torch.no_grad():
        ranking = acquisition(raw.unsqueeze(1)).argsort(descending=True)
    candidates = raw[ranking]
    if cube.numeric:
        candidates = torch.cat([_ascend(acquisition, candidates, cube), candidates])
    candidates = torch.tensor([cube.snap(x) for x in candidates[:N_RAW].tolist()], dtype=torch.double)
    new = (torch.cdist(candidates, history.visited, p=torch.inf) > SAME_POINT).all(1)
    if new.any():  # the evaluator would only give the same answers again
        candidates = candidates[new]
    with torch.no_grad():
        values = acquisition(candidates.unsqueeze(1))
    result: list[float] = candidates[values.argmax()].tolist()
    return result


def _fit_all(history: History, cube: UnitCube, kernel: KernelName) -> _Models:
    objectives = [fit(quantity, make_kernel(kernel, cube)) for quantity in history.objectives]
    measured = [q for q in history.constraints.values() if len(q.values) >= MIN_CONSTRAINT_ROWS]
    limits = [fit(quantity, make_kernel("plain", cube)) for quantity in measured]
    if len(history.failed):
        ran, crashed = len(history.points), len(history.failed)
        values = torch.cat([-torch.ones(ran, dtype=torch.double), torch.ones(crashed, dtype=torch.double)])
        points = torch.cat([history.points, history.failed])
        quantity = Quantity(points, values, torch.full_like(values, CRASH_VARIANCE))
        limits.append(fit(quantity, make_kernel("plain", cube)))
    return _Models(objectives, limits)


def _acquisition(
    models: _Models, history: History, *, seed: int, multi_objective: MultiObjective
) -> AcquisitionFunction:
    m = len(models.objectives)
    options: dict[str, Any] = {
        "model": models.joint,
        "X_baseline": history.points,
        "sampler": SobolQMCNormalSampler(torch.Size([N_SAMPLES[m == 1]]), seed=seed),
        "prune_baseline": True,
        "constraints": models.constraints() or None,
        "X_pending": history.pending if len(history.pending) else None,
    }
    if m == 1:
        first = GenericMCObjective(lambda z, X=None: z[..., 0])
        return qLogNoisyExpectedImprovement(objective=first if models.limits else None, **options)
    means = models.means(history.points)
    if multi_objective == "parego" or (multi_objective == "auto" and m > MAX_HYPERVOLUME_OBJECTIVES):
        weights = sample_simplex(m, seed=seed, dtype=torch.double).squeeze(0)
        scalarise = get_chebyshev_scalarization(weights, Y=means)
        return qLogNoisyExpectedImprovement(
            objective=GenericMCObjective(lambda z, X=None: scalarise(z[..., :m])), **options
        )
    return multi_objective_logei.qLogNoisyExpectedHypervolumeImprovement(
        ref_point=infer_reference_point(means[is_non_dominated(means)]).tolist(),
        objective=IdentityMCMultiOutputObjective(outcomes=list(range(m))) if models.limits else None,
        **options,
    )


def _best_points(models: _Models, history: History, n: int = 5) -> Tensor:
    """Complete points with the best posterior means, feasible ones first; several objectives are summed."""
    score = models.means(history.points).sum(1)
    for surrogate in models.limits:
        with torch.no_grad():
            limit = surrogate.model.posterior(history.points).mean[:, 0] - surrogate.standardise(0.0)
        score = score - 1e3 * limit.clamp_min(0)
    return history.points[score.argsort(descending=True)[:n]]


def _sobol(d: int, n: int, *, seed: int, skip: int = 0) -> Tensor:
    """Rows `skip` to `skip` + n of a scrambled sequence. Shape (n, d), in [0, 1]."""
    engine = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    points: Tensor = engine.fast_forward(skip).draw(n, dtype=torch.double)  # type: ignore[no-untyped-call]
    return points


def _with_choices(unit: Tensor, cube: UnitCube) -> Tensor:
    """Turn the category columns of points of [0, 1]^d into indices of choices."""
    n = len(cube.numeric)
    counts = torch.tensor(cube.n_choices, dtype=unit.dtype)
    unit[:, n:] = (unit[:, n:] * counts).floor().minimum(counts - 1)
    return unit


def _raw_candidates(best: Tensor, cube: UnitCube, *, seed: int) -> Tensor:
    """S: Sobol points; half of them replaced by sparse steps of widths 0.5 to 0.005 from the best points."""
    n, half = len(cube.numeric), N_RAW // 2
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.double)

    raw = _with_choices(_sobol(cube.n_columns, N_RAW, seed=seed), cube)
    source = best[torch.randint(len(best), (half,), generator=generator)]
    width = 0.5 * 10 ** (-2 * uniform(half, 1))
    moved = uniform(half, n) < uniform(half, 1).clamp_min(0.1)
    step = torch.randn(half, n, generator=generator, dtype=torch.double) * width * moved
    raw[:half, :n] = (source[:, :n] + step).clamp(0, 1)
    raw[:half, n:] = torch.where(uniform(half, 1) < 0.7, source[:, n:], raw[:half, n:])
    return raw


def _ascend(acquisition: AcquisitionFunction, ranked: Tensor, cube: UnitCube) -> Tensor:
    """Climb from the best raw candidates, and from the best one of every choice of every category."""
    n = len(cube.numeric)
    starts = list(range(min(N_RESTARTS, len(ranked))))
    for j, k in enumerate(cube.n_choices):
        for choice in range(k):
            starts += (ranked[:, n + j] == choice).nonzero()[:1, 0].tolist()
    lower = torch.zeros(cube.n_columns, dtype=torch.double)
    upper = torch.cat([torch.ones(n, dtype=torch.double), torch.tensor(cube.n_choices, dtype=torch.double) - 1])
    points, _ = gen_candidates_scipy(
        ranked[starts].unsqueeze(1), acquisition, lower, upper, options={"maxiter": ASCENT_ITERATIONS}
    )
    result: Tensor = points.detach()[:, 0]
    return result
