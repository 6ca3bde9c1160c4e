"""The search's second level: a trial may fit its coefficients by gradient before it is scored.

The outer loop chooses the structure (assessment, selection, splicing, density) and how the learner is run; the inner
step fits the coefficients through the merge and writes plain numbers into the recipe. With ``warm_start`` it begins at
the coefficients of the best finished trial of the same structure, where that is better than what the point says.

    search:
      learner: {per: [block, tensor, row], steps: [0, 50, 100, 200], step_size: [0.03, 0.3], loss: gold}

The first learned trials are a ladder: from the fewest steps to the most, from coarse coefficients to the finest that
the rows are enough for, each begun where the one before ended. Where another structure's baseline is clearly better than
the space's first, it stands on that (`better_start`): with few steps the structure matters (from TSV-M's parts five
encoders went to 0.84 with the questions that took plain deltas to 0.82). Few steps go further with few numbers.

With a budget in questions there is nothing to feel for: the longest fit that it pays for comes first. On a real base with
three experts a fit per row reached 0.818 after 15 000 questions (five seeds, test rows), a ladder per tensor and row 0.775;
after 6 000, too few for rows, one per tensor 0.753 and per row 0.725 (two seeds, 0.677 and 0.773). On validation rows, two or
three seeds each: 10 steps (160 rows a task) per tensor 0.837, per row 0.831 (encoders); 25 steps 0.735 and 0.750, 33 steps 0.749
and 0.753 (language, 30 for one seed), 0.837 and 0.842 (encoders). So rows pay from about 400 on.

Fit rows come from a task's own training split where it has one, else from ``splits.fit``: never from scored questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna

from merge_search.engine.execute.parts import linearity_problems
from merge_search.objective import Objective
from merge_search.outcome import Outcome
from merge_search.recipe import Recipe
from merge_search.search.records import Record
from merge_search.search.verdict.selection import candidates, paired_difference
from merge_search.space import Categorical, Float, Parameter, Point, SearchSpace
from merge_search.study_file import Learner

__all__ = ["LearnedSpace", "better_start", "structure_of", "warm_start"]

PREFIX = "learner."
ROWS_FOR = {"row": 1000, "tensor": 400, "block_kind": 300, "block": 200, "expert": 0}
"""Rows per task from which a fineness paid on real models; finer with fewer overfits."""
FINEST_FIRST = tuple(ROWS_FOR)
SEEN_FOR_FINEST = 400
"""Rows per task, repeats included, that a fit must see for its finest coefficients to pay (see the module's notes)."""
CLEARLY = 2.0
"""Standard errors by which another structure than the usual must be better for the ladder to begin there."""


class LearnedSpace:
    """A space and, beside it, how the learner is run: ``learner.steps``, ``.per``, ``.step_size``, ``.loss``.

    `decode` gives the start of the fit; `settings` the learner's, or None where the point fits nothing. Choices of one
    value are constants, not parameters.

    Args:
        n_rows: Fewest fit rows of any task: how fine the first learned trials should be.
    """

    def __init__(self, space: SearchSpace, learner: Learner, *, n_rows: int) -> None:
        self.space, self.learner, self.n_rows = space, learner, n_rows
        self.notes: Sequence[str] = space.notes
        self.parameters: Mapping[str, Parameter] = {**space.parameters, **self._own()}

    def _own(self) -> dict[str, Parameter]:
        own: dict[str, Parameter] = {}
        for name in ("steps", "per", "loss"):
            choices = tuple(getattr(self.learner, name))
            if len(choices) > 1:
                own[PREFIX + name] = Categorical(choices)
        low, high = self.learner.step_size
        if low < high:
            own[PREFIX + "step_size"] = Float(low, high, log=True)
        return own

    def settings(self, point: Point, *, seed: int) -> dict[str, Any] | None:
        """`FitSettings` fields of a point; None for zero steps."""
        low, _ = self.learner.step_size
        chosen: dict[str, Any] = {
            name: point.get(PREFIX + name, getattr(self.learner, name)[0]) for name in ("steps", "per", "loss")
        }
        if not chosen["steps"]:
            return None
        step_size = float(point.get(PREFIX + "step_size", low))
        fixed = {name: getattr(self.learner, name) for name in ("batch_rows", "normalise", "pull", "average")}
        return {**chosen, "step_size": step_size, "seed": seed, **fixed}

    def _inner(self, point: Point) -> dict[str, Any]:
        return {k: v for k, v in point.items() if not k.startswith(PREFIX)}

    def decode(self, point: Point) -> Recipe:
        return self.space.decode(self._inner(point))

    def encode(self, recipe: Recipe) -> dict[str, str | int | float | bool] | None:
        """The point that fits nothing and decodes to `recipe`; None where every point fits."""
        inner = self.space.encode(recipe)
        if inner is None or 0 not in self.learner.steps:
            return None
        return {**inner, **self._usual(steps=0)}

    def initial_points(
        self, begin: Recipe | None = None, affordable: Callable[[dict[str, Any]], int | None] = lambda settings: None
    ) -> list[dict[str, str | int | float | bool]]:
        """Learned points, then the space's uniform recipes as they are.

        Without a budget in questions a ladder: all numbers of steps, ascending, at the finest coefficients that the rows
        are enough for; its first rung is one fineness coarser. With one, the largest number of steps as often as it pays
        for that, the last one cut to what is left: at the finest coefficients if that feeds them, else one coarser. What
        is left to try is the sampler's choice.

        Args:
            begin: A recipe that the space holds, where the ladder begins; None: at its first uniform recipe.
            affordable: Learner's settings -> how many such steps the budget in questions pays for; None: there is none.
        """
        inner = self.space.initial_points()
        first = inner[0] if inner else None
        if begin is not None:
            first = self.space.encode(begin) or first
        rungs = sorted(n for n in self.learner.steps if n)
        allowed = [per for per in FINEST_FIRST if per in self.learner.per]
        fed = [per for per in allowed if self.n_rows >= ROWS_FOR[per]] or allowed[-1:]
        coarse = fed[1] if len(fed) > 1 and len(rungs) > 1 else fed[0]
        ladder = [self._usual(steps=n, per=coarse if i == 0 else fed[0]) for i, n in enumerate(rungs)]
        if first and (settings := self.settings({**first, **ladder[-1]}, seed=0)):
            paid = affordable(settings)
            if paid is not None:
                per = fed[0] if paid * self.learner.batch_rows >= SEEN_FOR_FINEST else coarse
                n_fits = min(len(rungs), max(1, -(-paid // rungs[-1])))
                ladder = [self._usual(steps=rungs[-1], per=per)] * n_fits
        plain = [{**p, **self._usual(steps=0)} for p in inner] if 0 in self.learner.steps else []
        return [*({**first, **rung} for rung in ladder if first), *plain]

    def _usual(self, **chosen: str | int) -> dict[str, str | int | float | bool]:
        low, high = self.learner.step_size
        values: dict[str, str | int | float | bool] = {
            "steps": self.learner.steps[0], "per": self.learner.per[0], "loss": self.learner.loss[0],
            "step_size": (low * high) ** 0.5, **chosen,
        }  # fmt: skip
        return {PREFIX + k: v for k, v in values.items() if PREFIX + k in self.parameters}


def better_start(study: optuna.Study, objective: Objective, space: LearnedSpace) -> Recipe | None:
    """The best merge so far if its structure is clearly better than the space's first; None: begin at that as usual.

    Clearly: in the mean of the tasks' metrics (those where higher is better, if there are any) by `CLEARLY` standard errors on the same questions.
    Given enough questions, plain deltas are learned a little further than TSV-M's parts of them, so they are not left for
    a difference that may be chance. Only merges count that the space holds and a learner can fit.
    """
    inner = space.space
    full = [r for r in candidates(study) if r.outcome is Outcome.OK and not linearity_problems(r.recipe)]
    points = {r.number: inner.encode(r.recipe) for r in full}
    forms = {number: structure_of(inner.decode(point)) for number, point in points.items() if point is not None}
    known = sorted((r for r in full if r.number in forms), key=lambda r: -objective.key(r.values))
    first = next((structure_of(inner.decode(p)) for p in inner.initial_points()), None)
    usual = next((r for r in known if forms[r.number] == first), None)
    if usual is None or usual is known[0]:
        return known[0].recipe if known and usual is None else None
    skills = [m for m in objective.skills.values() if m.higher_is_better] or list(objective.skills.values())
    if not skills:
        return None
    weights = {m.name: (1 if m.higher_is_better else -1) / len(skills) for m in skills}
    difference, error = paired_difference(known[0].evaluation, usual.evaluation, weights)
    return known[0].recipe if difference > CLEARLY * error else None


def structure_of(recipe: Recipe) -> str:
    """Text that is equal for recipes that differ in coefficients and densities only."""
    blank: dict[str, Any] = {"coefficients": {}, "scale": 1.0, "maps": {}, "densities": {}, "preset": ""}
    return recipe.model_copy(update=blank).to_json()


def warm_start(recipe: Recipe, study: optuna.Study, objective: Objective) -> tuple[Recipe, Record | None]:
    """`recipe` with the coefficients of the best finished trial of its structure, and that trial.

    The recipe as it is, and None, where no such trial is better than the average of the experts.
    """
    done = candidates(study)
    average = next((r.values for r in done if r.label == "average"), None)
    same = structure_of(recipe)
    alike = [r for r in done if structure_of(r.recipe) == same]
    best = max(alike, key=lambda r: objective.key(r.values), default=None)
    if best is None or (average is not None and objective.key(best.values) <= objective.key(average)):
        return recipe, None
    theirs = best.recipe
    changes = {"coefficients": theirs.coefficients, "scale": theirs.scale, "maps": theirs.maps}
    return recipe.model_copy(update=changes), best
