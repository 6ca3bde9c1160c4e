"""The Gaussian process behind the sampler: kernels over the unit cube, and the fit.

Notation
    x        coordinates, n numeric columns in [0, 1] and one column per category (index of the choice)
    y, v     measured value and the known variance of its noise, y = f(x) + N(0, v)
    k_num    prior covariance over numbers   plain       s k_rbf(x, x')
                                             structured  s1 k_rbf(Lx, Lx') + s2 k_rbf(Cx, Cx') + s3 k_rbf(Rx, Rx')
    k_cat    over categories                 exp(-mean_j [c_j != c'_j] / l_j)
    k        over both                       k_num (1 + s k_cat) + t k_cat
    L, C, R  of every family of per-block coefficients: its mean over depth; mean and the first cosines over
             depth; what the cosines cannot follow. Numeric parameters without a depth enter L and C as they are.

The structure says that the level of an expert matters most, a smooth trend over depth less, single blocks least.
Length scales carry the dimension-scaled prior of Hvarfner et al. 2024 (arXiv 2402.02229).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.kernels import CategoricalKernel
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior as rbf
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from torch import Tensor

from merge_search.search.samplers.history import Quantity
from merge_search.search.samplers.unit_cube import UnitCube

__all__ = ["KernelName", "Surrogate", "depth_families", "fit", "make_kernel", "resolve_kernel"]

KernelName = Literal["auto", "plain", "structured"]
N_COSINES = 3  # trends over depth with up to three half-waves
START_MIXED = 0.3  # variance of a difference between choices, against what they share
MIN_FAMILY = 3  # blocks from which a depth trend can be told from single blocks
MIN_NOISE = 1e-6  # of standardised values; GPyTorch's floor in float64
FIT_ITERATIONS = 60  # 2000 cost 50 % more and found nothing better
_DEPTH = re.compile(r"^(?P<family>.+)\.(?:block|knot)\.(?P<depth>\d+)(?:\.(?P<kind>.+))?$")


class OnFeatures(Kernel):  # type: ignore[misc]  # GPyTorch is untyped
    """Any kernel on linear features x @ A. `features`: shape (d, p), fixed."""

    has_lengthscale = False

    def __init__(self, base: Kernel, features: Tensor) -> None:
        super().__init__(active_dims=tuple(range(len(features))))
        self.base = base
        self.register_buffer("features", features)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **kwargs: object) -> Tensor:
        result: Tensor = self.base.forward(x1 @ self.features, x2 @ self.features, diag=diag, **kwargs)
        return result


class Mixed(Kernel):  # type: ignore[misc]
    """k_num (1 + s k_cat) + t k_cat: what all choices share, how they differ in shape, how they differ in level.

    NOTE: with the bare product k_num k_cat a choice that did badly at a few bad points is never tried at good ones.
    """

    has_lengthscale = False

    def __init__(self, numeric: Kernel, categorical: Kernel) -> None:
        super().__init__()
        self.numeric, self.categorical = numeric, categorical
        prior = LogNormalPrior(math.log(START_MIXED), 1.0)
        for name in ("shape", "level"):
            self.register_parameter(f"raw_{name}", torch.nn.Parameter(torch.tensor(0.0, dtype=torch.double)))
            self.register_constraint(f"raw_{name}", _floor(1e-4, START_MIXED))
            self.register_prior(f"{name}_prior", prior, lambda m, n=name: m.scale(n), None)

    def scale(self, name: str) -> Tensor:
        """s or t, positive."""
        result: Tensor = getattr(self, f"raw_{name}_constraint").transform(getattr(self, f"raw_{name}"))
        return result

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **kwargs: object) -> Tensor:
        numeric, categorical = (
            k(x1, x2, diag=True) if diag else k(x1, x2).to_dense() for k in (self.numeric, self.categorical)
        )
        result: Tensor = numeric * (1 + self.scale("shape") * categorical) + self.scale("level") * categorical
        return result


def depth_families(names: Sequence[str]) -> list[list[int]]:
    """Columns that differ in the block only (``coefficient.maths.block.3``), in order of depth; small families left out."""
    families: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for column, name in enumerate(names):
        if match := _DEPTH.match(name):
            key = (match["family"], match["kind"] or "")
            families.setdefault(key, []).append((int(match["depth"]), column))
    return [[column for _, column in sorted(f)] for f in families.values() if len(f) >= MIN_FAMILY]


def resolve_kernel(name: KernelName, cube: UnitCube) -> KernelName:
    """``auto`` is ``structured`` where the space has a family of at least `MIN_FAMILY` blocks."""
    if name == "plain" or not depth_families(cube.numeric):
        return "plain"
    return "structured"


def make_kernel(name: KernelName, cube: UnitCube) -> Kernel:
    """Prior covariance over the columns of `cube`."""
    n, k = len(cube.numeric), len(cube.categories)
    columns = range(n, n + k)
    if n == 0:
        return _scaled(_categorical(columns), 1.0)
    structured = resolve_kernel(name, cube) == "structured"
    numeric = _structured(n, depth_families(cube.numeric)) if structured else _plain(n)
    return Mixed(numeric, _categorical(columns)) if k else numeric


def _floor(low: float, start: float) -> GreaterThan:
    return GreaterThan(low, transform=None, initial_value=start)


def _scaled(kernel: Kernel, scale: float) -> Kernel:
    prior = LogNormalPrior(math.log(scale), 1.0)
    return ScaleKernel(kernel, outputscale_prior=prior, outputscale_constraint=_floor(1e-4, scale))


def _categorical(columns: Sequence[int]) -> Kernel:
    return CategoricalKernel(
        ard_num_dims=len(columns),
        active_dims=tuple(columns),
        lengthscale_prior=LogNormalPrior(0.0, 1.0),
        lengthscale_constraint=_floor(0.01, 1.0),
    )


def _plain(n: int) -> Kernel:
    return _scaled(rbf(ard_num_dims=n, active_dims=tuple(range(n))), 1.0)


def _structured(n: int, families: list[list[int]]) -> Kernel:
    level, curve, rest = _depth_features(n, families)
    kernel = _scaled(OnFeatures(rbf(ard_num_dims=level.shape[1]), level), 1.0)
    kernel = kernel + _scaled(OnFeatures(rbf(ard_num_dims=curve.shape[1]), curve), 0.3)
    if rest.abs().max() > 1e-9:
        n_grouped = sum(map(len, families))
        isotropic = RBFKernel(
            lengthscale_prior=LogNormalPrior(2**0.5 + 0.5 * math.log(n_grouped), 3**0.5),
            lengthscale_constraint=_floor(0.025, 1.0),
        )
        kernel = kernel + _scaled(OnFeatures(isotropic, rest), 0.1)
    return kernel


def _depth_features(n: int, families: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices L (n, families + others), C (n, more) and R (n, n)."""
    zero = torch.zeros(n, 1, dtype=torch.double)
    levels, trends, rest = [], [], torch.zeros(n, n, dtype=torch.double)
    for columns in families:
        n_blocks = len(columns)
        depth = (torch.arange(n_blocks, dtype=torch.double) + 0.5) / n_blocks
        waves = range(min(N_COSINES, n_blocks - 1) + 1)
        basis = torch.stack([torch.cos(math.pi * k * depth) for k in waves], 1)
        orthogonal = torch.linalg.qr(basis)[0]
        levels.append(zero.clone().index_fill_(0, torch.tensor(columns), 1 / n_blocks))
        trend = torch.zeros(n, len(waves) - 1, dtype=torch.double)
        trend[columns] = basis[:, 1:] * 2 / n_blocks
        trends.append(trend)
        rest[torch.tensor(columns)[:, None], torch.tensor(columns)] = (
            torch.eye(n_blocks, dtype=torch.double) - orthogonal @ orthogonal.T
        )
    grouped = {column for columns in families for column in columns}
    others = [column for column in range(n) if column not in grouped]
    level = torch.cat([*levels, torch.eye(n, dtype=torch.double)[:, others]], 1)
    return level, torch.cat([level, *trends], 1), rest


@dataclass(frozen=True)
class Surrogate:
    """A fitted process of the standardised quantity (y - mean) / scale."""

    model: SingleTaskGP
    mean: float
    scale: float

    def standardise(self, value: float) -> float:
        return (value - self.mean) / self.scale

    def posterior(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (n,) and covariance (n, n) of the noise-free quantity, in its own units."""
        with torch.no_grad():
            joint = self.model.posterior(points).distribution
            return self.mean + self.scale * joint.mean, self.scale**2 * joint.covariance_matrix


def fit(quantity: Quantity, kernel: Kernel) -> Surrogate:
    """Maximum a posteriori fit with known noise; noise is inferred where no variance is known.

    Works from one measurement on; equal values get the noise (or 1) as their scale.

    Determinism: no random numbers unless the optimiser must retry, which draws from torch's global generator.
    Raises:
        botorch.exceptions.errors.ModelFittingError: no attempt converged.
    """
    y, v = quantity.values, quantity.variances
    mean = float(y.mean())
    spread = float(y.std()) if len(y) > 1 else 0.0
    if spread <= 1e-12 * (1 + abs(mean)):
        spread = math.sqrt(float(v.quantile(0.5))) if v is not None else 0.0
    scale = spread if spread > 0 else 1.0
    noise = None if v is None else (v / scale**2).clamp_min(MIN_NOISE).unsqueeze(1)
    standardised = ((y - mean) / scale).unsqueeze(1)
    model = SingleTaskGP(quantity.points, standardised, noise, covar_module=kernel, outcome_transform=None)
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": FIT_ITERATIONS}})
    return Surrogate(model, mean, scale)
