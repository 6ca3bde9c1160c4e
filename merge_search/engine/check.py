"""What would keep a recipe from being merged, found before any weight is read."""

from __future__ import annotations

from merge_search.engine.contracts import Tensors
from merge_search.engine.methods.assess import options_problems
from merge_search.engine.methods.operators import operator_problems
from merge_search.engine.resident.coefficient_maps import rows_of
from merge_search.errors import RecipeError
from merge_search.recipe import Assess, Group, Recipe
from merge_search.rules import MEASURES, OPERATORS, POSTS, SELECTIONS, SPLICES, in_use, option_problems

__all__ = ["problems"]

_KEYS_HELP = "a tensor, block.<n>, block.<n>.<kind>, a module kind, or *"


def problems(recipe: Recipe, tensors: Tensors) -> list[str]:
    """Every problem known before work starts, [] if none: unknown names, wrong options, missing statistics, bad pairs."""
    found = _experts(recipe, tensors) + _keys(recipe, tensors)
    if missing := _rule_files(recipe):
        return found + missing
    n = len(recipe.models.experts)
    if recipe.operator is not None:
        found += operator_problems(recipe.operator, OPERATORS, "operator", n)
        kinds = OPERATORS[recipe.operator.name].statistics if recipe.operator.name in OPERATORS else ()
        asked = {(kind, expert) for kind in kinds for expert in recipe.models.experts}
        found += _missing(f"operator: {recipe.operator.name!r}", asked, tensors)
    else:
        for assess in _measures(recipe):
            found += options_problems(assess) or _statistics(assess, recipe, tensors)
        found += _stages(recipe)
    for rule in recipe.post:
        found += operator_problems(rule, POSTS, "post", n)
    return found + (_maps(recipe, tensors) if recipe.maps and not found else [])


def _maps(recipe: Recipe, tensors: Tensors) -> list[str]:
    found = []
    if recipe.operator is not None and not OPERATORS[recipe.operator.name].decomposing:
        found.append(
            f"maps: operator {recipe.operator.name!r} gives no part per expert that coefficients per row could scale"
        )
    if recipe.operator is None and recipe.resolve.kind != "none" and recipe.resolve.weighted:
        found.append("maps: coefficients per row have no voice in an election; set resolve.weighted to false")
    try:
        for expert in recipe.maps:
            for name in tensors.groups:
                rows_of(tensors, recipe, expert, name)
    except RecipeError as error:
        found += error.problems
    return found


def _measures(recipe: Recipe) -> list[Assess]:
    measures = []
    if _uses_scores(recipe):
        measures.append(recipe.assess)
    if recipe.splice.kind in SPLICES and SPLICES[recipe.splice.kind].is_scored:
        measures.append(recipe.splice.score or recipe.assess)
    if recipe.allocate.kind == "importance":
        measures.append(Assess(measure=recipe.allocate.measure, options=recipe.allocate.options))
    return measures


def _uses_scores(recipe: Recipe) -> bool:
    """Whether the selection reads scores."""
    return recipe.select.kind in SELECTIONS and SELECTIONS[recipe.select.kind].uses_scores


def _experts(recipe: Recipe, tensors: Tensors) -> list[str]:
    known = tensors.models.experts
    return [
        f"models: {e!r} is not among the loaded experts ({', '.join(known)})"
        for e in recipe.models.experts
        if e not in known
    ]


def _keys(recipe: Recipe, tensors: Tensors) -> list[str]:
    known = {key for group in tensors.groups.values() for key in Group.keys(group)}
    found = []
    for field in ("coefficients", "densities"):
        for expert, values in getattr(recipe, field).items():
            if isinstance(values, dict):
                found += [
                    f"{field}: {expert!r}: no tensor answers to the key {k!r} ({_KEYS_HELP})"
                    for k in values
                    if k not in known
                ]
    if isinstance(recipe.scale, dict):
        found += [f"scale: no tensor answers to the key {k!r} ({_KEYS_HELP})" for k in recipe.scale if k not in known]
    return found


def _statistics(assess: Assess, recipe: Recipe, tensors: Tensors) -> list[str]:
    measure = MEASURES[assess.measure]
    if not measure.needs_data or (measure.statistics and not measure.statistics_asked(assess.options)):
        return []
    return _missing(f"assess: measure {assess.measure!r}", _asked(assess, recipe, tensors), tensors)


def _asked(assess: Assess, recipe: Recipe, tensors: Tensors) -> set[tuple[str, str]]:
    """(kind, expert) of the statistics that a measure will ask for; none where that is not known beforehand."""
    measure, experts = MEASURES[assess.measure], recipe.models.experts
    kinds = measure.statistics_asked(assess.options)
    if not measure.depends_on_coefficients(assess.options) or measure.is_outside:
        return {(kind, e) for kind in kinds for e in experts}
    if recipe.allocate.kind != "constant":
        return set()
    groups = tensors.groups.values()
    return {(f"{kind}@{recipe.coefficient(e, g)!r}", e) for kind in kinds for e in experts for g in groups}


def _missing(who: str, asked: set[tuple[str, str]], tensors: Tensors) -> list[str]:
    """Why statistics that `who` needs cannot be had, a sentence for each reason."""
    if not asked:
        return []
    if not tensors.has_statistics:
        return [f"{who} needs statistics from data, and none were measured for these models"]
    reasons: dict[str, None] = {}
    for kind, expert in sorted(asked):
        if expert in tensors.models.experts and (why := tensors.statistic_problem(kind, expert)):
            reasons[f"{who} needs the statistic {kind!r}: {why}"] = None
    return list(reasons)


def _stages(recipe: Recipe) -> list[str]:
    select, splice = recipe.select, recipe.splice
    found = [f"{at}: {p}" for at, table, name in (("select", SELECTIONS, select.kind), ("splice", SPLICES, splice.kind))
             if (p := table.unknown(name))]  # fmt: skip
    if splice.kind in SPLICES:
        found += [f"splice: {p}" for p in option_problems(SPLICES[splice.kind], splice.options)]
    if select.kind not in SELECTIONS:
        return found
    row = SELECTIONS[select.kind]
    found += [f"select: {p}" for p in option_problems(row, select.options)]
    if select.scope not in row.scopes and not row.is_outside:
        found.append(f"select: {select.kind} ranks a tensor or the model, not rows; use scope 'tensor'")
    elif select.scope not in row.scopes:
        found.append(f"select: {select.kind} ranks by {' or '.join(row.scopes)}, not by {select.scope}")
    if select.scope == "row" and select.nonzero:
        found.append("select: nonzero counts a tensor or the model, not rows; use scope 'tensor'")
    if select.exclusive and not row.takes_exclusive:
        found.append(f"select: exclusive needs a selection of zeros and ones, {select.kind!r} is not")
    return found + _score_problems(recipe)


def _score_problems(recipe: Recipe) -> list[str]:
    """Why the selection cannot use the measure's scores."""
    measure = MEASURES.get(recipe.assess.measure)
    if measure is None or not _uses_scores(recipe):
        return []
    if measure.after_mask:
        return [f"assess: {measure.name!r} is one number per tensor, made after selection: use it as splice.score"]
    if measure.per_tensor and recipe.select.scope != "model" and SELECTIONS[recipe.select.kind].compares:
        return [
            f"assess: {measure.name!r} is one number per tensor: within a tensor {recipe.select.kind!r} has nothing to choose "
            "by; use select.scope 'model', or the measure as allocate.measure or splice.score"
        ]
    return []


def _rule_files(recipe: Recipe) -> list[str]:
    """Rule files of the recipe that are not in use."""
    return [
        f"rules: the recipe was made with the rule file {name} of sha256 {digest[:12]}..., which is not in use; name that "
        "file under rules in the study file, or keep it beside the recipe"
        for name, digest in recipe.rules.items()
        if in_use(name, digest) is None
    ]
