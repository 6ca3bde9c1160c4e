"""Writes a `Recipe` as a mergekit YAML file, where mergekit can express it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import yaml

from merge_search.errors import RecipeError
from merge_search.mergekit.filters import as_value
from merge_search.mergekit.methods import CANCEL, cancel
from merge_search.mergekit.stages import InMergekit, operator_as_method, stages_as_method
from merge_search.mergekit.values import Table
from merge_search.recipe import Group, Recipe, value_for
from merge_search.rules import SPLICES

__all__ = ["to_mergekit"]


def to_mergekit(
    recipe: Recipe, groups: Mapping[str, Group], *, vectors: Collection[str] | None = None, dtype: str | None = None
) -> str:
    """The text of a mergekit file that makes the recipe's model.

    mergekit then computes in ``dtype: float32``, as this project does, and rounds once. Numbers by group become filters
    on tensor names, which express any value exactly. Comments at the top name small differences: random masks, and
    counts that mergekit rounds down.

    Args:
        recipe: Its models are written as they stand: give hub ids or paths that the reader has.
        groups: Group of every merged tensor, as `engine.layout.layout` or the pool gives them.
        vectors: Names of the one-dimensional tensors. A recipe that does not select within them needs them, because
            mergekit does.
        dtype: The base's dtype, for a recipe that keeps it; not written if unknown.

    Raises:
        RecipeError: with every reason why mergekit cannot express it.
    """
    brought = dict.fromkeys(row.name for row in recipe.known_rules() if row.is_outside)
    reasons = [f"{name}: mergekit has no rule from outside" for name in brought]
    if brought:
        raise RecipeError(reasons, where="mergekit cannot express this recipe")
    written = stages_as_method(recipe, reasons) if recipe.operator is None else operator_as_method(recipe, reasons)
    if recipe.post:
        reasons.append(f"post: mergekit has no rule {recipe.post[0].name!r} on combined deltas")
    if recipe.transform is not None:
        reasons.append(f"transform: {recipe.transform.name!r} makes other models before the merge; export the folder")
    if recipe.maps:
        reasons.append("maps: mergekit has no coefficients by row")
    if written is not None and written.spare_vectors and vectors is None:
        reasons.append("select.vectors: mergekit selects within vectors too; name them so that they get density 1")
    data = _file(recipe, written, groups, vectors or (), reasons) if written is not None else {}
    if reasons or written is None:
        raise RecipeError(reasons, where="mergekit cannot express this recipe")
    chosen = recipe.dtype or dtype
    if chosen is not None:
        data |= {"dtype": "float32", "out_dtype": chosen}
    head = "".join(f"# {note}\n" for note in written.notes)
    return head + yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _file(
    recipe: Recipe, written: InMergekit, groups: Mapping[str, Group], vectors: Collection[str], reasons: list[str]
) -> dict[str, Any]:
    models = []
    for name in written.models:
        place = recipe.models.base if name == "base" else recipe.models.experts[name]
        parameters: dict[str, Any] = {}
        if written.weights is not None:
            parameters["weight"] = _value(written.weights(name, groups), groups, reasons)
        if written.has_density and name != "base":
            table = {
                n: 1.0 if written.spare_vectors and n in vectors else recipe.density(name, g) for n, g in groups.items()
            }
            parameters["density"] = _value(table, groups, reasons)
        models.append({"model": place, **({"parameters": {**parameters, **written.each}} if parameters else {})})
    settings = dict(written.parameters)
    if written.t is not None:
        settings["t"] = _value(written.t(groups), groups, reasons)
    if written.has_lambda:
        scale = _value({n: value_for(recipe.scale, g) for n, g in groups.items()}, groups, reasons)
        settings |= {} if scale == 1.0 else {"lambda": scale}
    if recipe.resolve.kind != "none" and SPLICES[recipe.splice.kind].divides_by_coefficients:
        rows = {tuple(recipe.coefficient(e, g) for e in recipe.models.experts) for g in groups.values()}
        reasons += [f"coefficients: {CANCEL}"] if any(map(cancel, rows)) else []
    if written.has_select_topk:
        settings["select_topk"] = _value(_shared_densities(recipe, groups, reasons), groups, reasons)
    return {
        "merge_method": written.method,
        **({"base_model": recipe.models.base} if written.names_base else {}),
        "models": models,
        **({"parameters": settings} if settings else {}),
    }


def _value(table: Table, groups: Mapping[str, Group], reasons: list[str]) -> Any:
    value = as_value(table, groups)
    if value is None:
        reasons.append("numbers by tensor: filters on names cannot tell these tensors apart")
    return value


def _shared_densities(recipe: Recipe, groups: Mapping[str, Group], reasons: list[str]) -> Table:
    """Densities of methods that select once for all experts."""
    tables = [{n: recipe.density(e, g) for n, g in groups.items()} for e in recipe.models.experts]
    if any(t != tables[0] for t in tables):
        reasons.append("densities: sce has one for all experts")
    return tables[0]
