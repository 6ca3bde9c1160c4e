"""Studies of artificial objectives for samplers. Shared by several test files."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import optuna
from optuna.trial import TrialState

from merge_search.outcome import Outcome
from merge_search.search.samplers import make_sampler, suggest
from merge_search.search.samplers.unit_cube import UnitCube
from merge_search.space import Categorical, Float, Integer, Parameter

optuna.logging.set_verbosity(optuna.logging.WARNING)

MIXED: dict[str, Parameter] = {
    "preset": Categorical(("ties", "dare", "mean")),
    "coefficient.maths": Float(0.0, 1.5),
    "coefficient.code": Float(0.0, 1.5),
    "density.maths": Float(0.01, 1.0, log=True),
    "rank": Integer(1, 6),
    "steps": Integer(8, 64, log=True),
    "rescale": Categorical((True, False)),
    "fixed": Float(2.0, 2.0),
}


def smooth(point: Mapping[str, object]) -> float:
    """Concave in the numbers, with its best value at coefficient.maths = 1, coefficient.code = 0.4, preset = dare."""
    x, y, z = (float(point[k]) for k in ("coefficient.maths", "coefficient.code", "density.maths"))  # type: ignore[arg-type]
    bonus = {"ties": 0.0, "dare": 0.1, "mean": -0.1}[str(point["preset"])]
    return 0.6 + bonus - 0.2 * (x - 1.0) ** 2 - 0.2 * (y - 0.4) ** 2 - 0.02 * math.log10(z / 0.3) ** 2


def tell(study: optuna.Study, trial: optuna.Trial, values: list[float], limit: float | None = None) -> None:
    noise: dict[str, object] = {"value": 4e-4} if len(values) == 1 else {"values": [4e-4] * len(values)}
    if limit is not None:
        noise["constraint:size"] = 1e-4
        trial.set_constraint("size", limit)
    trial.set_user_attr("noise", noise)
    study.tell(trial, values)


def random_point(parameters: Mapping[str, Parameter], rng: np.random.Generator) -> dict[str, object]:
    cube = UnitCube(parameters)
    unit = [*rng.random(len(cube.numeric)), *[float(rng.integers(k)) for k in cube.n_choices]]
    return {
        **{n: p.low for n, p in parameters.items() if isinstance(p, Float) and p.low == p.high},
        **cube.decode(unit),
    }


def fill(
    study: optuna.Study,
    parameters: Mapping[str, Parameter] = MIXED,
    *,
    n: int = 14,
    constrained: bool = False,
    score=smooth,
) -> None:
    """Add a baseline outside the space, and `n` complete, two crashed, one lost and two running trials."""
    rng = np.random.default_rng(0)
    m = len(study.directions)

    def ask() -> tuple[optuna.Trial, dict[str, object]]:
        study.enqueue_trial(random_point(parameters, rng))
        trial = study.ask()
        return trial, suggest(trial, parameters)

    baseline = study.ask()
    tell(study, baseline, [0.9] * m, -1.0 if constrained else None)
    for _ in range(n):
        trial, point = ask()
        value = score(point) + 0.02 * rng.standard_normal()
        tell(study, trial, [value, -(value**2), 0.1 * value][:m], rng.standard_normal() if constrained else None)
    for outcome in (Outcome.OUT_OF_MEMORY, Outcome.NON_FINITE, Outcome.LOST):
        trial, _ = ask()
        trial.set_user_attr("outcome", str(outcome))
        study.tell(trial, state=TrialState.FAIL)
    ask()
    ask()


def new_study(
    name: str, *, parameters: Mapping[str, Parameter] = MIXED, m: int = 1, seed: int = 3, **options
) -> optuna.Study:
    sampler = make_sampler(name, parameters=parameters, seed=seed, n_objectives=m, **options)
    return optuna.create_study(sampler=sampler, directions=["maximize"] * m)
