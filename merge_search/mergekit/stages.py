"""Finds the mergekit method that a recipe is, if there is one: the way back from stages and operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_search.mergekit.values import Table
from merge_search.recipe import Group, Operator, Recipe, value_for
from merge_search.rules import SELECTIONS, SPLICES

__all__ = ["InMergekit", "operator_as_method", "stages_as_method"]

Groups = Mapping[str, Group]
_DRAWN = "masks are drawn by mergekit's own generator: the same rate and rescaling, not the same bits"
_ROUNDED = "mergekit rounds counts of kept elements down: up to one element of each tensor and expert differs"
_ANOTHER_BASE = "mergekit would take config and tokenizer from the first expert; make it the recipe's base"


@dataclass(frozen=True)
class InMergekit:
    """A recipe in mergekit's words.

    Attributes:
        method: mergekit's name.
        models: Names in the file's order, ``base`` for the base.
        names_base: The file has ``base_model``.
        weights: (model, groups) -> the model's ``weight`` by tensor; None: the file has no weights.
        t: groups -> ``t`` by tensor; None: the file has none.
        parameters: Parameters of the file.
        each: Parameters of every model.
        has_density: Models have a ``density``.
        has_lambda: The file has ``lambda``.
        has_select_topk: The file has ``select_topk``.
        spare_vectors: One-dimensional tensors keep everything, so their density is 1.
        notes: Small differences.
    """

    method: str
    models: tuple[str, ...]
    names_base: bool = True
    weights: Callable[[str, Groups], Table] | None = None
    t: Callable[[Groups], Table] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    has_density: bool = False
    has_lambda: bool = False
    has_select_topk: bool = False
    spare_vectors: bool = False
    notes: tuple[str, ...] = ()


def _coefficients(recipe: Recipe) -> Callable[[str, Groups], Table]:
    return lambda name, groups: {n: recipe.coefficient(name, g) for n, g in groups.items()}


# ---------------------------------------------------------------------------------------------- stages


def stages_as_method(recipe: Recipe, reasons: list[str]) -> InMergekit | None:
    """The method of a recipe without operator; None, with reasons, where mergekit has none."""
    before = len(reasons)
    select = recipe.select
    for is_used, reason in (
        (recipe.winsorise != 0, "winsorise: mergekit does not clip deltas"),
        (recipe.allocate.kind != "constant", "allocate: mergekit has no densities by importance; give them by group"),
        (select.exclusive, "select.exclusive: mergekit's experts are selected independently"),
        (select.gate > 0, "select.gate: mergekit has no masks shared by count"),
        (recipe.splice.unique_boost != 0, "splice.unique_boost: mergekit has none"),
    ):
        if is_used:
            reasons.append(reason)
    is_sce = (
        recipe.splice.kind == "score" and recipe.splice.score is not None and recipe.splice.score.measure == "energy"
    )
    written = _sce(recipe, reasons) if is_sce else _by_selection(recipe, reasons)
    return written if len(reasons) == before else None


def _elects(recipe: Recipe, reasons: list[str]) -> bool:
    resolve = recipe.resolve
    if resolve.kind == "none":
        return False
    if resolve.kind != "sum" or not resolve.weighted or resolve.tie != "plus":
        reasons.append(
            "resolve: mergekit elects the sign of the weighted sum, plus where it is zero (kind sum, weighted, "
            "tie plus)"
        )
    return True


def _by_selection(recipe: Recipe, reasons: list[str]) -> InMergekit:
    """task_arithmetic, ties, dare, della, breadcrumbs."""
    select, elects = recipe.select, _elects(recipe, reasons)
    divides = SPLICES[recipe.splice.kind].divides_by_coefficients
    if not (divides or recipe.splice.kind == "sum"):
        reasons.append(f"splice: mergekit has no {recipe.splice.kind!r} mixing, only sum and coefficient")
    method, each, notes = _method(recipe, elects, reasons)
    if select.kind != "all" and (select.scope == "row") != (select.kind == "rank_probability"):
        reasons.append(
            f"select.scope: mergekit ranks {'rows' if select.kind == 'rank_probability' else 'tensors'}, not by "
            f"{select.scope}"
        )
    if method and SELECTIONS[select.kind].uses_scores and recipe.assess.measure != "magnitude":
        reasons.append(f"assess: mergekit selects by magnitude, not by {recipe.assess.measure!r}")
    selects = select.kind != "all"
    rescaled = recipe.rescale.kind == "match_l1"
    if selects and recipe.rescale.kind not in ("none", "match_l1"):
        reasons.append(
            f"rescale: mergekit rescales to the old L1 norm (match_l1) or not at all, not by {recipe.rescale.kind!r}"
        )
    parameters: dict[str, Any] = {"normalize": divides}
    if selects:
        parameters["rescale"] = rescaled
    if divides and not elects:
        notes = (*notes, "an expert that left a tensor as it is counts in mergekit's denominator, in ours it does not")
        if selects:
            reasons.append(
                "splice: without a sign election mergekit divides by all weights, not by those of the survivors"
            )
    return InMergekit(
        method, tuple(recipe.models.experts), weights=_coefficients(recipe), parameters=parameters, each=each,
        has_density=selects, has_lambda=True, spare_vectors=selects and not select.vectors, notes=notes,
    )  # fmt: skip


def _method(recipe: Recipe, elects: bool, reasons: list[str]) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """(name, parameters of each model, notes)."""
    select = recipe.select
    rounded = (_ROUNDED,) if SELECTIONS[select.kind].rounds and select.rounding != "down" else ()
    if select.kind == "all":
        return ("ties" if elects else "task_arithmetic"), {}, ()
    if select.kind == "top_k":
        return ("ties", {}, rounded) if elects else ("breadcrumbs", {"gamma": 0.0}, rounded)
    if select.kind == "band":
        return ("breadcrumbs_ties" if elects else "breadcrumbs"), {"gamma": select.gamma}, rounded
    if select.kind == "bernoulli":
        return ("dare_ties" if elects else "dare_linear"), {}, (_DRAWN,)
    if select.kind == "rank_probability":
        return ("della" if elects else "della_linear"), {"epsilon": select.epsilon}, (_DRAWN,)
    reasons.append(f"select: mergekit has no selection {select.kind!r}")
    return "", {}, ()


def _sce(recipe: Recipe, reasons: list[str]) -> InMergekit:
    select, score = recipe.select, recipe.splice.score
    assert score is not None
    if recipe.resolve.kind != "sum" or recipe.resolve.weighted or recipe.resolve.tie != "plus":
        reasons.append("resolve: sce elects the sign of the sum, plus where it is zero")
    if select.kind not in ("all", "top_k") or (
        select.kind == "top_k" and (recipe.assess.measure != "variance" or not select.nonzero)
    ):
        reasons.append("select: sce keeps the top share of the non-zero variances")
    if select.kind == "top_k" and (not select.vectors or select.scope != "tensor"):
        reasons.append("select: sce selects within every tensor, vectors too")
    if float(score.options.get("floor", 0.0)) != 1e-6:
        reasons.append(
            "splice.score: mergekit weighs experts alike where energies sum to less than 1e-6; give energy the option "
            "floor: 1e-6"
        )
    if any(
        recipe.coefficient(e, Group("", None, "other")) != 1 or isinstance(recipe.coefficients.get(e), dict)
        for e in recipe.models.experts
    ):
        reasons.append("coefficients: sce has none")
    if recipe.rescale.kind != "none" or recipe.scale != 1.0:
        reasons.append("rescale, scale: sce has none")
    rounded = (_ROUNDED,) if select.kind == "top_k" and select.rounding != "down" else ()
    return InMergekit("sce", tuple(recipe.models.experts), has_select_topk=select.kind == "top_k", notes=rounded)


# ---------------------------------------------------------------------------------------------- operators


def operator_as_method(recipe: Recipe, reasons: list[str]) -> InMergekit | None:
    """The method of a recipe with an operator; None, with reasons, where mergekit has none."""
    operator = recipe.operator
    assert operator is not None
    rule = _OPERATORS.get(operator.name)
    if rule is None:
        reasons.append(f"operator: mergekit has no {operator.name!r}")
        return None
    before = len(reasons)
    if operator.name not in ("multislerp", "passthrough") and recipe.scale != 1.0:
        reasons.append(f"scale: mergekit's {operator.name} has none")
    written = rule(recipe, operator, reasons)
    return written if len(reasons) == before else None


def _plain(recipe: Recipe, reasons: list[str]) -> None:
    if any(v != 1.0 for v in recipe.coefficients.values()):
        reasons.append("coefficients: this method of mergekit has none")


def _passthrough(recipe: Recipe, operator: Operator, reasons: list[str]) -> InMergekit:
    expert = str(operator.options.get("expert", "")) or "base"
    return InMergekit("passthrough", (expert,), names_base=False)


def _slerp(recipe: Recipe, operator: Operator, reasons: list[str]) -> InMergekit:
    if operator.options.get("space", "weights") != "weights":
        reasons.append("operator: mergekit's slerp joins weights, not deltas")
    if len(recipe.models.experts) != 1:
        reasons.append(f"models: {_ANOTHER_BASE}")
    (expert, *_) = recipe.models.experts
    fixed = operator.options.get("t")

    def t(groups: Groups) -> Table:
        return {n: recipe.coefficient(expert, g) if fixed is None else float(fixed) for n, g in groups.items()}

    return InMergekit("slerp", ("base", expert), t=t)


def _nuslerp(recipe: Recipe, operator: Operator, reasons: list[str]) -> InMergekit:
    axis = operator.options.get("axis", "tensor")
    parameters = {} if axis == "tensor" else {"nuslerp_flatten": False, "nuslerp_row_wise": axis == "column"}
    experts = tuple(recipe.models.experts)
    if operator.options.get("space", "delta") == "delta":
        if len(experts) != 2:
            reasons.append("models: mergekit's nuslerp takes two experts")
        return InMergekit("nuslerp", experts, weights=_coefficients(recipe), parameters=parameters)
    if len(experts) != 1:
        reasons.append(f"models: {_ANOTHER_BASE}")

    def weights(name: str, groups: Groups) -> Table:
        share = {n: recipe.coefficient(experts[0], g) for n, g in groups.items()}
        return share if name != "base" else {n: 1 - v for n, v in share.items()}

    return InMergekit("nuslerp", ("base", *experts), names_base=False, weights=weights, parameters=parameters)


def _multislerp(recipe: Recipe, operator: Operator, reasons: list[str]) -> InMergekit:
    experts = tuple(recipe.models.experts)
    own = float(operator.options.get("base_weight", 0.0))
    if operator.options.get("space", "delta") == "weights":
        if not own:
            reasons.append(f"models: {_ANOTHER_BASE}")
        if recipe.scale != 1.0:
            reasons.append("scale: mergekit's multislerp of weights has none")

        def among(name: str, groups: Groups) -> Table:
            return dict.fromkeys(groups, own) if name == "base" else _coefficients(recipe)(name, groups)

        return InMergekit("multislerp", ("base", *experts), names_base=False, weights=among)
    if own:
        reasons.append("operator: mergekit's multislerp of deltas has no base_weight")
    if recipe.scale == 1.0:
        return InMergekit("multislerp", experts, weights=_coefficients(recipe))

    def scaled(name: str, groups: Groups) -> Table:
        """Weights that sum to the scale. mergekit multiplies by their sum where it does not divide by it."""
        total = {n: sum(recipe.coefficient(e, g) for e in experts) or 1.0 for n, g in groups.items()}
        return {n: recipe.coefficient(name, g) * (value_for(recipe.scale, g) / total[n]) for n, g in groups.items()}

    return InMergekit("multislerp", experts, weights=scaled, parameters={"normalize_weights": False})


def _karcher(recipe: Recipe, operator: Operator, reasons: list[str]) -> InMergekit:
    _plain(recipe, reasons)
    options = operator.options
    if options.get("space", "weights") != "weights":
        reasons.append("operator: mergekit's karcher joins weights, not deltas")
    if options.get("base_weight", 0.0) != 1.0:
        reasons.append(f"operator: mergekit's karcher counts all models alike (base_weight 1); {_ANOTHER_BASE}")
    words = {"steps": "max_iter", "tolerance": "tol"}
    parameters = {word: options[key] for key, word in words.items() if key in options}
    return InMergekit("karcher", ("base", *recipe.models.experts), names_base=False, parameters=parameters)


def _model_stock(recipe: Recipe, operator: Operator, reasons: list[str]) -> InMergekit:
    _plain(recipe, reasons)
    scope = operator.options.get("scope", "tensor")
    if operator.options.get("clamp", True):
        reasons.append("operator: mergekit's model_stock does not clamp the cosine (clamp: false)")
    if operator.options.get("count", "changed") != "all":
        reasons.append(
            "operator: mergekit's model_stock counts all experts, also where they left a tensor (count: all)"
        )
    if scope == "layer":
        reasons.append("operator: mergekit's model_stock works by tensor or row, not by layer")
    if len(recipe.models.experts) < 2:
        reasons.append("models: mergekit's model_stock takes two experts or more")
    parameters = {"filter_wise": True} if scope == "row" else {}
    return InMergekit("model_stock", tuple(recipe.models.experts), parameters=parameters)


def _pair(recipe: Recipe, operator: Operator, reasons: list[str]) -> InMergekit:
    _plain(recipe, reasons)
    if len(recipe.models.experts) != 1:
        reasons.append(f"models: mergekit's {operator.name} takes one expert")
    if operator.options.get("multiple", 1.5) != 1.5:
        reasons.append("operator: mergekit's arcee_fusion cuts at 1.5 times the range of the quartiles")
    parameters = {"t": operator.options.get("t", 1e-3)} if operator.name == "nearswap" else {}
    return InMergekit(operator.name, tuple(recipe.models.experts), parameters=parameters)


_OPERATORS: Mapping[str, Callable[[Recipe, Operator, list[str]], InMergekit]] = {
    "passthrough": _passthrough,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
    "nearswap": _pair,
    "arcee_fusion": _pair,
}
