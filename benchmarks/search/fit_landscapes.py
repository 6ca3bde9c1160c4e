"""Fit the Gaussian processes and the noise model of recorded landscapes, and measure how good they are.

    python benchmarks/search/fit_landscapes.py [NAME ...]

The program writes ``recorded/NAME.json``: the numbers that `landscapes.load` needs, and the quality of the fit.
Quality is measured on a fifth of the points that the fit was not shown: R^2 and Spearman's rank correlation of the
mean score over tasks, for all of them and for the best quarter. The kernel is the one with the smaller error on that
best quarter, where searches end.

The correlation of candidates' answers is fitted to recorded pairs: the share of questions on which two of them
disagree, as a function of their scores and of their distance, by the bivariate normal distribution of the two
difficulties.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from landscapes import RECORDED, Fit, Landscape, Surrogate, Table, matern, one_hot, pairing, probit
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import ndtr
from scipy.stats import spearmanr
from torch import Tensor

Array = NDArray[np.float64]

KERNELS = ("matern", "rbf")
SMOOTHNESS = (0.5, 1.5, 2.5)
HELD_OUT = 0.2
N_PAIRS = 6000
SMALLEST_NOISE = 1e-4
FARTHEST = 8.0
"""Largest distance from the start of the fit, in logarithms. Beyond it a line search may try what overflows."""


def fit_process(x: Array, z: Array, kernel: str) -> Fit:
    """Maximum a posteriori lengthscales, variance, noise and mean, by L-BFGS from one start.

    The prior on lengthscales is log-normal and grows with the square root of the dimension (Hvarfner et al. 2024, arXiv
    2402.02229). Shapes: x (n, d), z (n,).
    """
    points, values = torch.tensor(x), torch.tensor(z)
    d = points.shape[1]
    middle = math.sqrt(2) + 0.5 * math.log(d)
    start = torch.tensor(
        [*[middle - 1.0] * d, math.log(z.var()), math.log(0.05 * z.var()), z.mean()], dtype=torch.double
    )
    free = start.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS([free], max_iter=150, line_search_fn="strong_wolfe")

    def bounded() -> Tensor:
        return start + FARTHEST * torch.tanh((free - start) / FARTHEST)

    def loss() -> Tensor:
        optimiser.zero_grad()
        raw = bounded()
        scaled = points / raw[:d].exp()
        squared = (scaled**2).sum(1)[:, None] + (scaled**2).sum(1)[None] - 2 * scaled @ scaled.T
        gram = raw[d].exp() * _torch_correlation(kernel, squared.clamp_min(1e-12))
        gram = gram + (raw[d + 1].exp() + SMALLEST_NOISE) * torch.eye(len(points), dtype=torch.double)
        normal = torch.distributions.MultivariateNormal(raw[d + 2].expand(len(points)), gram, validate_args=False)
        prior = ((raw[:d] - middle) ** 2).sum() / (2 * 3)
        total: Tensor = -normal.log_prob(values) + prior  # type: ignore[no-untyped-call]
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    found = bounded().detach().numpy()
    scales = [float(np.exp(v)) for v in found[:d]]
    return Fit(
        kernel, scales, math.exp(found[d]), math.exp(found[d + 1]) + SMALLEST_NOISE, float(found[d + 2]), 0.5, 1.0
    )


def _torch_correlation(kernel: str, squared: Tensor) -> Tensor:
    if kernel == "rbf":
        return (-0.5 * squared).exp()
    s = (5 * squared).sqrt()
    return (1 + s + s**2 / 3) * (-s).exp()


def held_out(x: Array, shares: Array, sizes: list[int], kernel: str) -> dict[str, float]:
    """Quality of the mean score over tasks on points that the fit was not shown."""
    hidden = np.random.default_rng(0).random(len(x)) < HELD_OUT
    predicted = np.zeros((int(hidden.sum()), len(sizes)))
    for t, n in enumerate(sizes):
        z = probit(shares[:, t], n)
        fit = fit_process(x[~hidden], z[~hidden], kernel)
        predicted[:, t] = ndtr(Surrogate(fit, x[~hidden], z[~hidden]).latent(x[hidden]))
    truth = shares[hidden]
    top = truth.mean(1) >= np.quantile(truth.mean(1), 0.75)
    out = {"held_out": float(hidden.sum())}
    out |= {f"r2_task_{t}": _r2(truth[:, t], predicted[:, t]) for t in range(len(sizes))}
    for suffix, rows in (("", np.ones(len(truth), bool)), ("_top_quarter", top)):
        a, b = truth[rows].mean(1), predicted[rows].mean(1)
        out |= {
            f"r2{suffix}": _r2(a, b),
            f"rank{suffix}": float(spearmanr(a, b).statistic),
            f"rmse{suffix}": float(np.sqrt(((a - b) ** 2).mean())),
        }
    return out


def _r2(truth: Array, predicted: Array) -> float:
    return float(1 - ((truth - predicted) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def disagreement(a: Array, b: Array, rho: Array) -> Array:
    """Probability of one right and one wrong answer, for difficulties with correlation rho and thresholds a, b.

    Phi_2(a, b; rho) = Phi(a) Phi(b)
        + integral over [0, asin rho] of exp(-(a^2 - 2ab sin t + b^2) / (2 cos^2 t)) / 2 pi
    """
    nodes, weights = np.polynomial.legendre.leggauss(24)
    end = np.arcsin(np.clip(rho, -0.9999, 0.9999))[:, None]
    t = 0.5 * end * (nodes + 1)
    inside = np.exp(-(a[:, None] ** 2 - 2 * (a * b)[:, None] * np.sin(t) + b[:, None] ** 2) / (2 * np.cos(t) ** 2))
    both = ndtr(a) * ndtr(b) + (inside @ weights) * end[:, 0] / (4 * np.pi)
    found: Array = ndtr(a) + ndtr(b) - 2 * both
    return found


def fit_pairs(fit: Fit, x: Array, answers: NDArray[np.bool_]) -> tuple[Fit, list[list[float]]]:
    """The noise model of one task, and (median distance, observed, modelled disagreement) of ten bands."""
    rng = np.random.default_rng(0)
    one, other = rng.integers(len(x), size=(2, N_PAIRS))
    one, other = one[one != other], other[one != other]
    scaled = x / np.asarray(fit.lengthscales)
    h = np.sqrt(((scaled[one] - scaled[other]) ** 2).sum(1))
    observed = (answers[one] != answers[other]).mean(1)
    z = probit(answers.mean(1), answers.shape[1])

    def modelled(raw: Array, smoothness: float) -> Array:
        shared, reach = 1 / (1 + np.exp(-raw[0])), np.exp(raw[1])
        return disagreement(z[one], z[other], shared + (1 - shared) * matern(h / reach, smoothness))

    solved = {s: least_squares(lambda raw, s=s: modelled(raw, s) - observed, np.zeros(2)) for s in SMOOTHNESS}
    smoothness = min(SMOOTHNESS, key=lambda s: solved[s].cost)
    found = solved[smoothness].x
    shown, order = modelled(found, smoothness), np.argsort(h)
    bands = [
        [float(np.median(h[i])), float(observed[i].mean()), float(shown[i].mean())] for i in np.array_split(order, 10)
    ]
    shared, reach = float(1 / (1 + np.exp(-found[0]))), float(np.exp(found[1]))
    return replace(fit, shared=shared, reach=reach, smoothness=smoothness), bands


def compare_pairing(table: Table, landscape: Landscape) -> dict[str, float]:
    """Recorded and simulated `pairing` of 40 points of the box and of the best 40."""
    rank = np.argsort(-table.shares(table.answers).mean(1))
    rows = {"best": rank[:40], "any": np.random.default_rng(1).permutation(len(rank))[:40]}
    out: dict[str, float] = {}
    observer = landscape.observer(seed=0)
    for where, chosen in rows.items():
        real = [table.answers[chosen][:, table.task_of == t] for t in range(len(landscape.tasks))]
        drawn = [observer.answers(x) for x in table.points[chosen]]
        simulated = [np.array([d[t] for d in drawn]) for t in range(len(landscape.tasks))]
        out |= {f"pairing_{where}": pairing(real), f"pairing_{where}_simulated": pairing(simulated)}
    return out


def fit_landscape(name: str, folder: Path = RECORDED) -> dict[str, Any]:
    """Fit one landscape, write its numbers and return the quality."""
    table = Table.read(folder / f"{name}.npz")
    sizes, shares = table.n_questions, table.shares(table.answers)
    x = one_hot(table.points, [len(p.choices) for p in table.parameters().values() if hasattr(p, "choices")])
    quality = {kernel: held_out(x, shares, sizes, kernel) for kernel in KERNELS}
    kernel = min(KERNELS, key=lambda k: quality[k]["rmse_top_quarter"])
    fits, bands = [], []
    for t, n in enumerate(sizes):
        fit, rows = fit_pairs(fit_process(x, probit(shares[:, t], n), kernel), x, table.answers[:, table.task_of == t])
        fits.append(fit)
        bands.append(rows)
    numbers = {
        "points": len(table.points),
        "cpu_s": round(float(table.seconds.sum())),
        "n_questions": sizes,
        "quality": quality,
        "pairing": compare_pairing(table, Landscape(table, fits)),
        "disagreement": bands,
        "fits": [asdict(f) for f in fits],
    }
    (folder / f"{name}.json").write_text(json.dumps(_rounded(numbers), indent=1) + "\n")
    return numbers


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit recorded landscapes.")
    parser.add_argument("names", nargs="*", default=sorted(p.stem for p in RECORDED.glob("*.npz")))
    for name in parser.parse_args().names:
        numbers = fit_landscape(name)
        print(name, numbers["points"], "points", numbers["cpu_s"], "s CPU", numbers["n_questions"], "questions")
        for kernel, row in numbers["quality"].items():
            print("  ", kernel, {k: round(v, 3) for k, v in row.items()})
        print("  ", {k: round(v, 3) for k, v in numbers["pairing"].items()})
        print(
            "  ",
            [(round(f["shared"], 3), round(f["reach"], 2), round(math.sqrt(f["noise"]), 3)) for f in numbers["fits"]],
        )


if __name__ == "__main__":
    main()
