"""Find the next point: the one with the largest expected improvement over the points tried and being tried.

Notation
    X        complete points (n, d); each quantity has its own Gaussian process, see `kernels`
    m        objectives, larger is better; constraints feasible where <= 0; crash model: +1 crashed, -1 ran
    B        the complete points with the best posterior means
    S        raw candidates: steps from B, each in a random share of the directions and of a random width, and Sobol
             points (the more, the fewer dimensions)
    a(x)     one objective     log noisy expected improvement (Ament et al. 2023, arXiv 2310.20708)
             several           log noisy expected hypervolume improvement, or a random Chebyshev scalarisation
                               (ParEGO, Knowles 2006)
    c(x)     predicted questions; the point chosen maximises a(x) - cost_power log c(x)

Running trials join the baseline as fantasies, so that several workers never get the same point.

The maximum is sought near B, by sampling and by ever smaller steps from the best samples. Uncertainty grows with the
distance from all trials. So over a whole box of many dimensions the largest expected improvement lies in a far corner,
where all merges are bad. Steps from good points in few directions are the candidates of TuRBO (Eriksson et al. 2019,
arXiv 1910.01739). A wide mixture of widths replaces its growing and shrinking box, so there is no state to restore.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective import logei as multi_objective_logei
from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
from botorch.acquisition.objective import GenericMCObjective
from botorch.models import ModelListGP
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.multi_objective.hypervolume import infer_reference_point
from botorch.utils.multi_objective.pareto import is_non_dominated
from botorch.utils.multi_objective.scalarization import get_chebyshev_scalarization
from botorch.utils.sampling import sample_simplex
from torch import Tensor

from merge_search._compat.botorch import skip_compilation
from merge_search.search.samplers.cost import log_cost
from merge_search.search.samplers.history import History, Quantity
from merge_search.search.samplers.kernels import Surrogate, fit, make_kernel
from merge_search.search.samplers.options import KernelName, MultiObjective
from merge_search.search.samplers.unit_cube import UnitCube

__all__ = ["propose", "quasi_random"]

skip_compilation()

N_RAW = 768
N_SOURCES = 5  # points of B
WIDTH = 0.2  # of the widest steps, as a share of the box; the narrowest are a tenth of it
SOBOL_DIMENSIONS = 2  # dimensions from which Sobol points become fewer than half the candidates
SAME_CHOICES = 0.7  # share of steps that leave all categories as they are
REFINEMENTS = (0.06, 0.03, 0.01)  # widths of the steps from the best samples, round by round
N_REFINED, N_PARENTS = 256, 10
N_SNAPPED = 128  # of the best candidates that are compared again once their whole numbers are rounded
N_SAMPLES = {True: 64, False: 32}  # one objective; several
MAX_HYPERVOLUME_OBJECTIVES = 3  # the partition of the dominated volume explodes beyond
CRASH_VARIANCE = 0.05
MIN_CONSTRAINT_ROWS = 3
SAME_POINT = 1e-9
N_AT_ONCE = 256  # candidates per evaluation of the acquisition: bounds its memory


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
    kernel: KernelName = "tied",
    multi_objective: MultiObjective = "auto",
    cost_power: float = 0.0,
) -> list[float]:
    """Coordinates of the most promising point that nobody has tried.

    Determinism: a function of the arguments if the caller seeds torch's global generator, from which the pruning of the
        baseline draws. Sums differ in the last bit between numbers of threads.

    Raises:
        RuntimeError: A fit or a factorisation failed.
        BotorchError: BoTorch cannot fit a model.
    """
    models = _fit_all(history, cube, kernel)
    acquisition = _acquisition(models, history, seed=seed, multi_objective=multi_objective)

    def promise(points: Tensor) -> Tensor:
        with torch.no_grad():
            parts = points.split(N_AT_ONCE)  # type: ignore[no-untyped-call]
            value = torch.cat([acquisition(part.unsqueeze(1)) for part in parts])
        return value - cost_power * log_cost(history, cube, points) if cost_power else value

    steps = _Steps(cube, seed)
    points = steps.raw(_best_points(models, history))
    values = promise(points)
    for width in REFINEMENTS if cube.numeric else ():
        nearer = steps.around(points[values.argsort(descending=True, stable=True)[:N_PARENTS]], N_REFINED, width)
        points, values = torch.cat([points, nearer]), torch.cat([values, promise(nearer)])
    ranked = points[values.argsort(descending=True, stable=True)]
    candidates = _new_ones(ranked[:N_SNAPPED], history, cube)
    if not len(candidates):  # a small space, nearly or wholly used up
        candidates = _new_ones(ranked, history, cube)
    candidates = candidates if len(candidates) else ranked[:1]
    result: list[float] = candidates[promise(candidates).argmax()].tolist()
    return cube.snap(result)


def _new_ones(points: Tensor, history: History, cube: UnitCube) -> Tensor:
    """The points snapped to the space, without those tried before, which would only get the same answers again."""
    snapped = torch.tensor([cube.snap(x) for x in points.tolist()], dtype=torch.double)
    return snapped[(torch.cdist(snapped, history.visited, p=torch.inf) > SAME_POINT).all(1)]


def _fit_all(history: History, cube: UnitCube, kernel: KernelName) -> _Models:
    objectives = [fit(quantity, make_kernel(kernel, cube)) for quantity in history.objectives]
    measured = [q for q in history.constraints.values() if len(q.values) >= MIN_CONSTRAINT_ROWS]
    limits = [fit(quantity, make_kernel(kernel, cube)) for quantity in measured]
    if len(history.failed):
        ran, crashed = len(history.points), len(history.failed)
        values = torch.cat([-torch.ones(ran, dtype=torch.double), torch.ones(crashed, dtype=torch.double)])
        points = torch.cat([history.points, history.failed])
        quantity = Quantity(points, values, torch.full_like(values, CRASH_VARIANCE))
        limits.append(fit(quantity, make_kernel(kernel, cube)))
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


def _best_points(models: _Models, history: History, n: int = N_SOURCES) -> Tensor:
    """Complete points with the best posterior means, feasible ones first. Several objectives are summed."""
    score = models.means(history.points).sum(1)
    for surrogate in models.limits:
        with torch.no_grad():
            limit = surrogate.model.posterior(history.points).mean[:, 0] - surrogate.standardise(0.0)
        score = score - 1e3 * limit.clamp_min(0)
    return history.points[score.argsort(descending=True)[:n]]


def _sobol(d: int, n: int, *, seed: int, skip: int = 0) -> Tensor:
    """Rows `skip` to `skip` + n of a scrambled Sobol sequence. Shape (n, d), in [0, 1]."""
    engine = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    points: Tensor = engine.fast_forward(skip).draw(n, dtype=torch.double)  # type: ignore[no-untyped-call]
    return points


def _with_choices(unit: Tensor, cube: UnitCube) -> Tensor:
    """Turn the category columns of points in [0, 1]^d into indices of choices."""
    n = len(cube.numeric)
    counts = torch.tensor(cube.n_choices, dtype=unit.dtype)
    unit[:, n:] = (unit[:, n:] * counts).floor().minimum(counts - 1)
    return unit


class _Steps:
    """Draws candidates near good points. All draws come from one generator."""

    def __init__(self, cube: UnitCube, seed: int) -> None:
        self._cube, self._seed = cube, seed
        self._generator = torch.Generator().manual_seed(seed)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, dtype=torch.double)

    def raw(self, best: Tensor) -> Tensor:
        """The raw candidates S. Shape (N_RAW, d)."""
        cube = self._cube
        n_sobol = int(N_RAW * min(0.5, SOBOL_DIMENSIONS / cube.n_columns))
        anywhere = _with_choices(_sobol(cube.n_columns, n_sobol, seed=self._seed), cube)
        widths = WIDTH * 10 ** -self._uniform(N_RAW - n_sobol, 1)
        return torch.cat([anywhere, self.around(best, N_RAW - n_sobol, widths)])

    def around(self, sources: Tensor, count: int, width: Tensor | float) -> Tensor:
        """Normal steps from random `sources` in a random share of the numbers, sometimes with new choices.

        Returns:
            Shape (count, d).
        """
        cube, n = self._cube, len(self._cube.numeric)
        points = sources[torch.randint(len(sources), (count,), generator=self._generator)]
        is_moved = self._uniform(count, n) < self._uniform(count, 1).clamp_min(1 / max(n, 1))
        normal = torch.randn(count, n, generator=self._generator, dtype=torch.double)
        points[:, :n] = (points[:, :n] + normal * width * is_moved).clamp(0, 1)
        if cube.n_choices:
            drawn = _with_choices(self._uniform(count, cube.n_columns), cube)[:, n:]
            is_kept = (self._uniform(count, 1) < SAME_CHOICES) | (self._uniform(count, len(cube.n_choices)) < 0.5)
            points[:, n:] = torch.where(is_kept, points[:, n:], drawn)
        return points
