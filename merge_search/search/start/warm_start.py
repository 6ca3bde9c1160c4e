"""Where the first fits of a study begin, and where later ones go on from.

A learned trial goes on from the coefficients of the best finished trial of the same structure (``warm_start``). The
first learned trials begin at the space's first recipe, or at the best baseline of another structure if that is better
by a standard error (`better_start`): with few steps the structure matters. Beginning at TSV-M's parts, five encoders
reached 0.84 with the questions that took plain deltas to 0.82. After 17 steps three language models reached 0.771 of
the validation rows from RegMean's parts at coefficient 1.5, and 0.741 from plain deltas.

The space's first recipe has strength 0.7, which breaks some models: on the demo's search questions its mean retention
is -0.8. A fit for entropy polishes what is broken: there it ends at -0.013, and from the mean of the experts at 0.047.
So fits for entropy begin at that mean where the first recipe scores clearly below the base. Labels lead out of a broken
model. Over three seeds of the demo, searches with labels whose fits began at the mean kept 0.018 ± 0.010 less on
validation questions (`mean_retention`, standard error over seeds).
"""

from __future__ import annotations

import json
from typing import Any

import optuna

from merge_search.engine.execute.parts import linearity_problems
from merge_search.evaluation import Evaluation
from merge_search.objective import Objective, paired_difference
from merge_search.outcome import Outcome
from merge_search.recipe import Recipe
from merge_search.search.records import Record, candidates
from merge_search.search.start.learned_space import LearnedSpace
from merge_search.space import SearchSpace

__all__ = ["average_of", "better_start", "is_better", "structure_of", "warm_start"]

PROBABLY = 1.0
"""Standard errors by which another structure must beat the space's first one for the first fits to begin there."""
CLEARLY = 2.0
"""Standard errors by which the base must beat the space's first recipe for them to begin at the average."""


def better_start(study: optuna.Study, objective: Objective, space: LearnedSpace) -> Recipe | None:
    """The best merge so far, if the first fits should begin there; None if they begin at the space's first recipe.

    Only merges count that the space holds and that a learner can fit. Given enough questions, plain deltas are learned
    a little further than TSV-M's parts of them, so a difference that is likely chance does not move the start.
    """
    ranked = _fittable(study, objective, space.space)
    if not ranked:
        return None
    best, _ = ranked[0]
    first = _first_structure(space.space)
    usual = next((record for record, structure in ranked if structure == first), None)
    if usual is None:  # the space's first structure has no score to compare with
        return best.recipe
    if usual is best:
        return None
    return best.recipe if is_better(best.evaluation, usual.evaluation, objective, errors=PROBABLY) else None


def _fittable(study: optuna.Study, objective: Objective, space: SearchSpace) -> list[tuple[Record, str]]:
    """Fully scored merges that `space` holds and a learner can fit, best first, with their structures in the space."""
    fittable = []
    for record in candidates(study):
        if record.outcome is not Outcome.OK or linearity_problems(record.recipe):
            continue
        point = space.encode(record.recipe)
        if point is not None:
            fittable.append((record, structure_of(space.decode(point))))
    return sorted(fittable, key=lambda pair: -objective.key(pair[0].values))


def _first_structure(space: SearchSpace) -> str | None:
    """Structure of the space's first uniform recipe; None if it names none."""
    points = space.initial_points()
    return structure_of(space.decode(points[0])) if points else None


def is_better(a: Evaluation, b: Evaluation, objective: Objective, *, errors: float = CLEARLY) -> bool:
    """Whether `a` beats `b` by so many standard errors in the mean of the tasks' metrics, on the same questions.

    Only metrics where higher is better are averaged, if there are any. Without a metric of a task nothing is clear.
    """
    skills = [m for m in objective.skills.values() if m.higher_is_better] or list(objective.skills.values())
    if not skills:
        return False
    weights = {m.name: (1 if m.higher_is_better else -1) / len(skills) for m in skills}
    difference, error = paired_difference(a, b, weights)
    return difference > errors * error


def average_of(recipe: Recipe) -> Recipe:
    """The recipe with the coefficient 1 / number of experts everywhere."""
    experts = recipe.models.experts
    return recipe.model_copy(update={"coefficients": dict.fromkeys(experts, 1 / len(experts)), "maps": {}})


def structure_of(recipe: Recipe) -> str:
    """A text that is equal for recipes that differ only in coefficients and densities."""
    blank: dict[str, Any] = {"coefficients": {}, "scale": 1.0, "maps": {}, "densities": {}, "preset": ""}
    return recipe.model_copy(update=blank).to_json()


def _without_numbers(data: Any) -> Any:
    """The data without numbers, and without mappings that hold nothing else."""
    if isinstance(data, dict):
        kept = {
            k: _without_numbers(v) for k, v in data.items() if isinstance(v, bool) or not isinstance(v, int | float)
        }
        return {k: v for k, v in kept.items() if v != {}}
    return [_without_numbers(v) for v in data] if isinstance(data, list) else data


def warm_start(recipe: Recipe, study: optuna.Study, objective: Objective) -> tuple[Recipe, Record | None]:
    """`recipe` with the coefficients of the best finished trial of its structure, and that trial.

    Without such a trial those count that differ from `recipe` only in numbers of its options as well: where these are
    searched, few trials have the same ones.

    Returns:
        `recipe` as it is, and None, if no such trial is better than the average of the experts.
    """
    done = candidates(study)
    average = next((r.values for r in done if r.label == "average"), None)
    structure = structure_of(recipe)
    alike = [r for r in done if structure_of(r.recipe) == structure]
    if not alike:
        kind = _without_numbers(json.loads(structure))
        alike = [r for r in done if _without_numbers(json.loads(structure_of(r.recipe))) == kind]
    best = max(alike, key=lambda r: objective.key(r.values), default=None)
    if best is None or (average is not None and objective.key(best.values) <= objective.key(average)):
        return recipe, None
    changes = {"coefficients": best.recipe.coefficients, "scale": best.recipe.scale, "maps": best.recipe.maps}
    return recipe.model_copy(update=changes), best
