"""Size of the causal effect of a part of an expert on its loss: one number for all tensors of the part.

The option ``form`` is ``gradient`` (first order), ``activation`` or ``ablation`` (exact), and ``partition`` is the
part: ``model``, ``block``, ``block_kind`` or ``tensor``. The statistic ``effect`` has the formulas. The option
``average`` says what is averaged over the rows:

    loss    |mean change|: the change of the mean loss. The gradient form is then |< delta, mean gradient >|
    rows    mean |change|: rows that gain and rows that lose do not cancel

Source: APL, arXiv 2408.09485. `rows` is our reading of its exact form: UNVERIFIED.
"""

from __future__ import annotations

from torch import Tensor

from merge_search.engine.methods.assess import AssessContext
from merge_search.rules import MEASURES

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return one number per expert: 0-d, float32, not negative.

    Raises:
        RecipeError: The statistic ``effect`` was not measured.
    """
    (kind,) = MEASURES["causal_effect"].statistics_asked(context.options)
    column = 0 if context.options["average"] == "loss" else 1
    return [context.statistic(kind, expert)[column].abs() for expert in context.experts]
