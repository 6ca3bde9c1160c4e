"""Problems that would keep a recipe from being merged, found before any weight is read."""

from __future__ import annotations

from merge_search.engine.contracts import Tensors
from merge_search.engine.methods.assess import options_problems
from merge_search.engine.methods.operators import operator_problems
from merge_search.engine.resident.coefficient_maps import rows_of
from merge_search.errors import RecipeError
from merge_search.recipe import Assess, Group, Recipe, groups_named
from merge_search.rules import MEASURES, OPERATORS, POSTS, SELECTIONS, SPLICES, in_use, option_problems
from merge_search.rules.measures import anchors_of
from merge_search.rules.operators import pairs_refusal

__all__ = ["problems"]

_KEYS_HELP = "a tensor, block.<n>, block.<n>.<kind>, a module kind, or *"


def problems(recipe: Recipe, tensors: Tensors) -> list[str]:
    """Every problem that can be known before work starts, [] if there is none.

    Unknown names, wrong options, missing statistics or rule files, and combinations that cannot work are problems.
    """
    out = _experts(recipe, tensors) + _keys(recipe, tensors)
    if missing := _rule_files(recipe):
        return out + missing
    out += _stages(recipe, tensors) if recipe.operator is None else _operator(recipe, tensors)
    for rule in recipe.post:
        out += operator_problems(rule, POSTS, "post", len(recipe.models.experts))
    return out + (_maps(recipe, tensors) if recipe.maps and not out else [])


# ---------------------------------------------------------------------------------------- experts, keys, files


def _experts(recipe: Recipe, tensors: Tensors) -> list[str]:
    known = tensors.models.experts
    return [
        f"models: {e!r} is not among the loaded experts ({', '.join(known)})"
        for e in recipe.models.experts
        if e not in known
    ]


def _keys(recipe: Recipe, tensors: Tensors) -> list[str]:
    """Keys of numbers per group that no tensor answers to."""
    known = {key for group in tensors.groups.values() for key in Group.keys(group)}
    out = []
    for field in ("coefficients", "densities"):
        for expert, values in getattr(recipe, field).items():
            if isinstance(values, dict):
                out += [
                    f"{field}: {expert!r}: no tensor answers to the key {k!r} ({_KEYS_HELP})"
                    for k in values
                    if k not in known
                ]
    if isinstance(recipe.scale, dict):
        out += [f"scale: no tensor answers to the key {k!r} ({_KEYS_HELP})" for k in recipe.scale if k not in known]
    return out


def _rule_files(recipe: Recipe) -> list[str]:
    """Rule files of the recipe that are not in use."""
    return [
        f"rules: the recipe was made with the rule file {name} of sha256 {digest[:12]}..., which is not in use; name "
        "that file under rules in the study file, or keep it beside the recipe"
        for name, digest in recipe.rules.items()
        if in_use(name, digest) is None
    ]


def _maps(recipe: Recipe, tensors: Tensors) -> list[str]:
    out = []
    if recipe.operator is not None and not OPERATORS[recipe.operator.name].decomposing:
        out.append(
            f"maps: operator {recipe.operator.name!r} gives no part per expert that coefficients per row could scale"
        )
    if recipe.operator is None and recipe.resolve.kind != "none" and recipe.resolve.weighted:
        out.append("maps: coefficients per row have no voice in an election; set resolve.weighted to false")
    try:
        for expert in recipe.maps:
            for name in tensors.groups:
                rows_of(tensors, recipe, expert, name)
    except RecipeError as error:
        out += error.problems
    return out


# ------------------------------------------------------------------------------------------- operators and stages


def _operator(recipe: Recipe, tensors: Tensors) -> list[str]:
    operator = recipe.operator
    assert operator is not None
    out = operator_problems(operator, OPERATORS, "operator", len(recipe.models.experts))
    if operator.name in OPERATORS and OPERATORS[operator.name].needs_factors:
        out += [
            pairs_refusal(f"operator: {operator.name!r}", expert, why)
            for expert in recipe.models.experts
            if expert in tensors.models.experts and (why := tensors.factors_problem(expert))
        ]
    if out:
        return out
    kinds = OPERATORS[operator.name].statistics_asked(operator.options)
    asked = {(kind, expert) for kind in kinds for expert in recipe.models.experts}
    return _missing(f"operator: {operator.name!r}", asked, tensors)


def _stages(recipe: Recipe, tensors: Tensors) -> list[str]:
    out = []
    for assess in _measures(recipe):
        out += options_problems(assess) or _statistics(assess, recipe, tensors)
    return out + _selection(recipe) + _scores(recipe) + _splice(recipe, tensors)


def _measures(recipe: Recipe) -> list[Assess]:
    """The measures whose scores the recipe uses."""
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


def _selection(recipe: Recipe) -> list[str]:
    select = recipe.select
    if problem := SELECTIONS.unknown(select.kind):
        return [f"select: {problem}"]
    row = SELECTIONS[select.kind]
    out = [f"select: {p}" for p in option_problems(row, select.options)]
    if select.scope not in row.scopes and not row.is_outside:
        out.append(f"select: {select.kind} ranks a tensor or the model, not rows; use scope 'tensor'")
    elif select.scope not in row.scopes:
        out.append(f"select: {select.kind} ranks by {' or '.join(row.scopes)}, not by {select.scope}")
    if select.scope == "row" and select.nonzero:
        out.append("select: nonzero counts a tensor or the model, not rows; use scope 'tensor'")
    if select.exclusive and not row.takes_exclusive:
        out.append(f"select: exclusive needs a selection of zeros and ones, {select.kind!r} is not")
    return out


def _scores(recipe: Recipe) -> list[str]:
    """Why the selection cannot use the measure's scores."""
    measure = MEASURES.get(recipe.assess.measure)
    if measure is None or not _uses_scores(recipe):
        return []
    if measure.after_mask:
        return [f"assess: {measure.name!r} is one number per tensor, made after selection: use it as splice.score"]
    if measure.per_tensor and recipe.select.scope != "model" and SELECTIONS[recipe.select.kind].compares:
        return [
            f"assess: {measure.name!r} is one number per tensor: within a tensor {recipe.select.kind!r} has nothing to "
            "choose by; use select.scope 'model', or the measure as allocate.measure or splice.score"
        ]
    return []


def _splice(recipe: Recipe, tensors: Tensors) -> list[str]:
    splice = recipe.splice
    if problem := SPLICES.unknown(splice.kind):
        return [f"splice: {problem}"]
    return [f"splice: {p}" for p in option_problems(SPLICES[splice.kind], splice.options)] + _only(recipe, tensors)


def _only(recipe: Recipe, tensors: Tensors) -> list[str]:
    """Keys of the tensors that a splice is limited to, to which no tensor answers."""
    score = recipe.splice.score or recipe.assess
    only = str(score.options.get("only", "")) if SPLICES[recipe.splice.kind].is_scored else ""
    named = groups_named(only, tensors.groups.values()) or ()
    known = {key for group in tensors.groups.values() for key in group.keys()}  # noqa: SIM118
    return [
        f"splice: {score.measure!r} is limited to {only!r}, and no tensor answers to the key {key!r} "
        "(join keys by '+': head, last for the last block, block.<n>, a module kind, a tensor)"
        for key in sorted(named)
        if key not in known
    ]


# ------------------------------------------------------------------------------------------------- statistics


def _statistics(assess: Assess, recipe: Recipe, tensors: Tensors) -> list[str]:
    """Why the statistics of a measure cannot be had."""
    measure = MEASURES[assess.measure]
    if not measure.needs_data or (measure.statistics and not measure.statistics_asked(assess.options)):
        return []
    return _missing(f"assess: measure {assess.measure!r}", _asked(assess, recipe, tensors), tensors)


def _asked(assess: Assess, recipe: Recipe, tensors: Tensors) -> set[tuple[str, str]]:
    """(kind, expert) of the statistics that a measure will ask for; empty where they cannot be known beforehand."""
    measure, experts = MEASURES[assess.measure], recipe.models.experts
    kinds = measure.statistics_asked(assess.options)
    if not measure.depends_on_coefficients(assess.options) or measure.is_outside:
        return {(kind, e) for kind in kinds for e in experts}
    if recipe.allocate.kind != "constant":
        return set()
    groups = tensors.groups.values()
    step = float(measure.completed(assess.options).get("anchors", 0.0))
    at = {(c, e) for e in experts for g in groups for c, _ in anchors_of(recipe.coefficient(e, g), step)}
    return {(f"{kind}@{c!r}", e) for kind in kinds for c, e in at}


def _missing(who: str, asked: set[tuple[str, str]], tensors: Tensors) -> list[str]:
    """Why statistics that `who` needs cannot be had, one sentence per reason."""
    if not asked:
        return []
    if not tensors.has_statistics:
        return [f"{who} needs statistics from data, and none were measured for these models"]
    reasons: dict[str, None] = {}
    for kind, expert in sorted(asked):
        if expert in tensors.models.experts and (why := tensors.statistic_problem(kind, expert)):
            reasons[f"{who} needs the statistic {kind!r}: {why}"] = None
    return list(reasons)
