"""Predict the questions of a candidate, so that improvement can be counted per question.

A trial that fits its coefficients by gradient asks many times the questions of one that does not, in proportion to its
steps. The prediction is cost(x) = questions to score + questions per step * steps(x), a least-squares line through the
finished trials.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.search.samplers.history import History
from merge_search.search.samplers.kernels import FIT_STEPS
from merge_search.search.samplers.unit_cube import UnitCube
from merge_search.space import Categorical

__all__ = ["log_cost"]


def log_cost(history: History, cube: UnitCube, points: Tensor) -> Tensor:
    """Logarithm of the predicted questions of each point, up to a constant. Shape (n, d) -> (n,), float64.

    Zero if all candidates cost alike, since nothing is fitted or no trial has stored its questions. A number of steps
    that no trial used lies on the line. If all trials used one number of steps, all numbers cost the same.
    """
    known = history.questions > 0  # repeated recipes ask nothing, and imported trials have no record
    if FIT_STEPS not in cube.categories or not known.any():
        return torch.zeros(len(points), dtype=torch.double)
    parameter = cube.parameters[FIT_STEPS]
    assert isinstance(parameter, Categorical)
    choices = torch.tensor([float(c) for c in parameter.choices], dtype=torch.double)
    column = len(cube.numeric) + cube.categories.index(FIT_STEPS)
    asked, steps = history.questions[known], choices[history.points[known, column].round().long()]
    centred = steps - steps.mean()
    spread = (centred**2).sum()
    slope = ((centred * asked).sum() / spread).clamp_min(0) if spread > 0 else spread
    wanted = choices[points[:, column].round().long()]
    return (asked.mean() + slope * (wanted - steps.mean())).clamp_min(asked.min()).log()
