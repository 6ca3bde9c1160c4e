"""The sampler's Gaussian process: kernels over the unit cube, and the fit.

Notation
    x        coordinates, n numeric columns in [0, 1] and one column per category (index of the choice)
    y, v     measured value and the known variance of its noise, y = f(x) + N(0, v)
    k_num    prior covariance over numbers   s exp(-sum_j (x_j - x'_j)^2 / 2 l_g(j)^2)
    g(j)     which numbers share a length scale: ``tied``   one per kind (coefficient, density, learner.step_size)
                                                 ``plain``  one per number
    k_cat    over categories                 exp(-mean_j [c_j != c'_j] / l_j)
    k        over both                       a k_num (1 + s k_cat) + t k_cat
    a        1 if both trials fit their coefficients by gradient or neither does, else 0: the result of a fit predicts
             nothing about its starting point without a fit

Fifty noisy trials cannot determine eighteen length scales. On recorded and synthetic merges, one length scale for all
coefficients predicts better than one for each. It also predicts better than components that follow an expert's level or
its trend over depth, which the search then over-exploits. Length scales have the dimension-scaled prior of Hvarfner et
al. 2024 (arXiv 2402.02229).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.kernels import CategoricalKernel
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from torch import Tensor

from merge_search.search.samplers.history import Quantity
from merge_search.search.samplers.options import KernelName
from merge_search.search.samplers.unit_cube import UnitCube
from merge_search.space import Categorical

__all__ = ["FIT_STEPS", "Surrogate", "fit", "make_kernel", "shared_scales"]

FIT_STEPS = "learner.steps"
"""Category of learned spaces: number of gradient steps that fit a trial's coefficients. 0 leaves them as they are."""
START_MIXED = 0.3  # variance of a difference between choices, against what they share
MIN_NOISE = 1e-6  # of standardised values; GPyTorch's floor in float64
FIT_ITERATIONS = 60  # 2000 cost 50 % more and found nothing better


class TiedRBF(Kernel):  # type: ignore[misc]  # GPyTorch is untyped
    """Squared exponential over the first columns.

    Args:
        groups: Number of every column's length scale, from 0.
    """

    has_lengthscale = False

    def __init__(self, groups: Sequence[int]) -> None:
        super().__init__(active_dims=tuple(range(len(groups))))
        self.register_buffer("groups", torch.tensor(groups))
        prior = LogNormalPrior(math.sqrt(2) + 0.5 * math.log(len(groups)), math.sqrt(3))
        start = torch.full((max(groups) + 1,), float(prior.mode), dtype=torch.double)
        self.register_parameter("raw_scales", torch.nn.Parameter(start))
        self.register_constraint("raw_scales", _floor(0.025, float(prior.mode)))
        self.register_prior("scales_prior", prior, lambda m: m.scales, None)

    @property
    def scales(self) -> Tensor:
        """Length scales. Shape (groups,)."""
        result: Tensor = self.raw_scales_constraint.transform(self.raw_scales)
        return result

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **kwargs: object) -> Tensor:
        scale = self.scales[self.groups]
        squared: Tensor = self.covar_dist(x1 / scale, x2 / scale, square_dist=True, diag=diag)
        return squared.div(-2).exp()


class Mixed(Kernel):  # type: ignore[misc]
    """a k_num (1 + s k_cat) + t k_cat: a part that all choices share, and their differences in shape and in level.

    NOTE: with the plain product k_num k_cat a choice that did badly at a few bad points is never tried at good ones.

    Args:
        numeric: Kernel over the numeric columns.
        categorical: Kernel over the category columns.
        switch: Column of `FIT_STEPS` and the index of its choice of no steps. None: the space has no such category.
    """

    has_lengthscale = False

    def __init__(self, numeric: Kernel, categorical: Kernel, switch: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.numeric, self.categorical, self.switch = numeric, categorical, switch
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
        if self.switch is not None and not diag:
            column, plain = self.switch
            is_plain = [x[..., column].round() == plain for x in (x1, x2)]
            numeric = numeric * (is_plain[0].unsqueeze(-1) == is_plain[1].unsqueeze(-2))
        result: Tensor = numeric * (1 + self.scale("shape") * categorical) + self.scale("level") * categorical
        return result


def shared_scales(names: Sequence[str], kernel: KernelName = "tied") -> list[int]:
    """Number of every column's length scale. For ``tied`` each kind of number has one.

    >>> shared_scales(["coefficient.maths.block.3", "coefficient.code.block.3", "density.maths"])
    [0, 0, 1]
    """
    if kernel == "plain":
        return list(range(len(names)))
    kinds = [name if name.startswith("learner.") else name.partition(".")[0] for name in names]
    order = list(dict.fromkeys(kinds))
    return [order.index(kind) for kind in kinds]


def make_kernel(name: KernelName, cube: UnitCube) -> Kernel:
    """Prior covariance over the columns of `cube`."""
    n, k = len(cube.numeric), len(cube.categories)
    columns = range(n, n + k)
    if n == 0:
        return _scaled(_categorical(columns), 1.0)
    numeric = _scaled(TiedRBF(shared_scales(cube.numeric, name)), 1.0)
    return Mixed(numeric, _categorical(columns), _switch(cube)) if k else numeric


def _switch(cube: UnitCube) -> tuple[int, int] | None:
    """Column of `FIT_STEPS` and the index of its choice of no steps."""
    if FIT_STEPS not in cube.categories:
        return None
    parameter = cube.parameters[FIT_STEPS]
    assert isinstance(parameter, Categorical)
    column = len(cube.numeric) + cube.categories.index(FIT_STEPS)
    return (column, parameter.choices.index(0)) if 0 in parameter.choices else None


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
    """Maximum a posteriori fit with known noise. The noise is inferred if no variance is known.

    One measurement is enough. Equal values are scaled by their noise, or by 1.

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
