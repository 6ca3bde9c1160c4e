"""A search space in which a trial may also choose how its coefficients are fitted by gradient.

    search:
      learner: {per: [block, tensor, row], steps: [0, 50, 100, 200], step_size: [0.03, 0.3], loss: gold}

The outer search chooses the structure (assessment, selection, splicing, density) and the learner's settings. The inner
step fits the coefficients through the merge and writes plain numbers into the recipe.

The first learned trials form a ladder: from the fewest steps to the most, and from coarse coefficients to the finest
that the fit rows are enough for. Each trial begins where the one before it ended. Few steps go further with few
numbers.

With a budget in questions there is no ladder: the longest fit that the budget pays for comes first. On a real base with
three experts a fit per row reached 0.818 after 15 000 questions (five seeds, test rows), and a ladder per tensor and
row 0.775. After 6 000 questions, too few for rows, a fit per tensor reached 0.753 and per row 0.725 (two seeds, 0.677
and 0.773). On validation rows, with two or three seeds each: 10 steps (160 rows a task) per tensor 0.837, per row 0.831
(encoders); 25 steps 0.735 and 0.750, 33 steps 0.749 and 0.753 (language models, 30 for one seed), 0.837 and 0.842
(encoders). So coefficients per row pay from about 400 rows seen.

Fit rows come from a task's own training split where it has one, else from ``splits.fit``. They are never scored
questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge_search.recipe import Recipe
from merge_search.rules import GRANULARITIES
from merge_search.search.plan import Plan
from merge_search.space import Categorical, Float, Parameter, Point, SearchSpace
from merge_search.study_file import Learner

__all__ = ["PREFIX", "SEEN_FOR_FINEST", "LearnedSpace", "with_stored_loss"]

Values = dict[str, str | int | float | bool]

PREFIX = "learner."
"""Start of the names of the parameters that belong to the learner."""
SEEN_FOR_FINEST = 400
"""Rows per task, repeats included, that a fit must see for its finest coefficients to pay (see the module's notes)."""


class LearnedSpace:
    """A space with the learner's settings as further parameters: ``learner.steps``, ``.per``, ``.step_size``,
    ``.loss``.

    `decode` gives the recipe at which the fit begins. `settings` gives the learner's settings, or None if the point
    fits nothing. A setting with a single choice is a constant and no parameter.

    Args:
        space: The space of the recipes.
        learner: The study file's section ``search.learner``.
        n_rows: The smallest number of fit rows of any task. It decides how fine the first learned trials are.
    """

    def __init__(self, space: SearchSpace, learner: Learner, *, n_rows: int) -> None:
        self.space, self.learner, self.n_rows = space, learner, n_rows
        self.notes: Sequence[str] = space.notes
        self.transforms = space.transforms
        self.parameters: Mapping[str, Parameter] = {**space.parameters, **self._learner_parameters()}

    def _learner_parameters(self) -> dict[str, Parameter]:
        parameters: dict[str, Parameter] = {}
        for name in ("steps", "per", "loss"):
            choices = tuple(getattr(self.learner, name))
            if len(choices) > 1:
                parameters[PREFIX + name] = Categorical(choices)
        low, high = self.learner.step_size
        if low < high:
            parameters[PREFIX + "step_size"] = Float(low, high, log=True)
        return parameters

    def settings(self, point: Point, *, seed: int) -> dict[str, Any] | None:
        """The `FitSettings` fields of a point; None if it asks for zero steps."""
        low, _ = self.learner.step_size
        chosen: dict[str, Any] = {
            name: point.get(PREFIX + name, getattr(self.learner, name)[0]) for name in ("steps", "per", "loss")
        }
        if not chosen["steps"]:
            return None
        step_size = float(point.get(PREFIX + "step_size", low))
        fixed = {name: getattr(self.learner, name) for name in ("batch_rows", "normalise", "pull", "average")}
        return {**chosen, "step_size": step_size, "seed": seed, **fixed}

    def decode(self, point: Point) -> Recipe:
        """The recipe at which the point's fit begins."""
        return self.space.decode({k: v for k, v in point.items() if not k.startswith(PREFIX)})

    def encode(self, recipe: Recipe) -> Values | None:
        """The point that fits nothing and decodes to `recipe`; None if every point fits."""
        inner = self.space.encode(recipe)
        if inner is None or 0 not in self.learner.steps:
            return None
        return {**inner, **self._usual(steps=0)}

    def exact_form(self, recipe: Recipe) -> Recipe | None:
        """See `SearchSpace.exact_form`."""
        return self.space.exact_form(recipe)

    def initial_points(
        self, begin: Recipe | None = None, affordable: Callable[[dict[str, Any]], int | None] = lambda settings: None
    ) -> list[Values]:
        """The first learned points, then the space's uniform recipes without a fit.

        Args:
            begin: A recipe that the space holds, where the learned trials begin. None: the space's first uniform
                recipe.
            affordable: Gives, for the learner's settings, how many such steps the budget in questions pays for. None
                means that there is no such budget.
        """
        inner = self.space.initial_points()
        first = inner[0] if inner else None
        if begin is not None:
            first = self.space.encode(begin) or first
        learned = [{**first, **values} for values in self._first_fits(first, affordable)] if first else []
        plain = [{**p, **self._usual(steps=0)} for p in inner] if 0 in self.learner.steps else []
        return [*learned, *plain]

    def _first_fits(self, first: Values, affordable: Callable[[dict[str, Any]], int | None]) -> list[Values]:
        """The learner's parameters of the first learned trials, which begin at the point `first`.

        Without a budget in questions they are a ladder: all numbers of steps, ascending, at the finest coefficients
        that the rows are enough for. The first rung is one granularity coarser.

        With a budget they all use the largest number of steps, as often as the budget pays for it. They use the finest
        coefficients if the budget feeds those, else one granularity coarser. The last fit is cut to what is left.
        """
        rungs = sorted(n for n in self.learner.steps if n)
        fine, coarse = self._granularities(n_rungs=len(rungs))
        ladder = [self._usual(steps=n, per=coarse if i == 0 else fine) for i, n in enumerate(rungs)]
        settings = self.settings({**first, **ladder[-1]}, seed=0)
        n_steps = None if settings is None else affordable(settings)
        if n_steps is None:
            return ladder
        per = fine if n_steps * self.learner.batch_rows >= SEEN_FOR_FINEST else coarse
        n_fits = min(len(rungs), max(1, -(-n_steps // rungs[-1])))
        return [self._usual(steps=rungs[-1], per=per)] * n_fits

    def _granularities(self, *, n_rungs: int) -> tuple[str, str]:
        """The finest granularity that the fit rows are enough for, and that of the ladder's first rung."""
        allowed = sorted(self.learner.per, key=lambda per: -GRANULARITIES[per].rows)
        fed = [per for per in allowed if self.n_rows >= GRANULARITIES[per].rows] or allowed[-1:]
        return fed[0], fed[1] if len(fed) > 1 and n_rungs > 1 else fed[0]

    def _usual(self, **chosen: str | int) -> Values:
        """The learner's parameters at their usual values, except for those given."""
        low, high = self.learner.step_size
        values: Values = {
            "steps": self.learner.steps[0],
            "per": self.learner.per[0],
            "loss": self.learner.loss[0],
            "step_size": (low * high) ** 0.5,
            **chosen,
        }
        return {PREFIX + k: v for k, v in values.items() if PREFIX + k in self.parameters}


def with_stored_loss(plan: Plan, stored: Mapping[str, Any] | None) -> Plan:
    """The plan of a study that goes on, with the learner's loss that it began with, unless the study file names one.

    A study that began before the loss ``auto`` existed has the default of that time, ``gold``.

    Args:
        plan: The checked study.
        stored: The study's stored identity; None if it begins now.
    """
    learner, former = plan.file.search.learner, (stored or {}).get("learner")
    if learner is None or former is None or "loss" in learner.model_fields_set:
        return plan
    learner = learner.model_copy(update={"loss": former.get("loss", ["gold"])})
    search = plan.file.search.model_copy(update={"learner": learner})
    space = plan.space
    if isinstance(space, LearnedSpace):
        space = LearnedSpace(space.space, learner, n_rows=space.n_rows)
    return replace(plan, file=plan.file.model_copy(update={"search": search}), space=space)
