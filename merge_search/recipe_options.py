"""The options of a merge by one flat list of names: those of its rules, then the fields of the stages that it reads.

A preset's options in a study file are these. torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from merge_search.recipe import Recipe
from merge_search.rules import MEASURES, OPERATORS, POSTS, SELECTIONS, SPLICES, STAGES, Rule
from merge_search.rules.stages import select_fields
from merge_search.rules.table import Scalar

__all__ = ["Home", "Place", "options_of", "value_at"]

Home = tuple[str | int, ...]
"""Where a recipe has a value: keys of its mappings and indices of its lists."""

_BOOSTS = ("unique_boost", "boost_cap")
"""Fields that count only where an entry can be one expert's alone."""


class Place(NamedTuple):
    """Where an option belongs.

    Attributes:
        rule: The row that has it.
        option: Its name there.
        home: Its place in a recipe's data.
    """

    rule: Rule
    option: str
    home: Home

    @property
    def absent(self) -> Scalar | None:
        """The value where a recipe says nothing; None: no number."""
        return self.rule.options[self.option]


def options_of(recipe: Recipe, name: str = "") -> dict[str, list[Place]]:
    """The options of a merge, each with its places: a measure that both selects and weighs has two.

    A rule's option hides a field of the same name.

    Args:
        recipe: The merge.
        name: What messages call it in place of its stages; '' for these.
    """
    out: dict[str, list[Place]] = {}
    for rule, home in _rules(recipe):
        for option in rule.options:
            out.setdefault(option, []).append(Place(rule, option, (*home, "options", option)))
    for row, option, home in _fields(recipe):
        out.setdefault(option, [Place(replace(row, name=name or row.name), option, home)])
    return out


def _rules(recipe: Recipe) -> list[tuple[Rule, Home]]:
    """The rules that the merge uses, and where a recipe has them."""
    posts: list[tuple[Rule, Home]] = [(POSTS[rule.name], ("post", i)) for i, rule in enumerate(recipe.post)]
    if recipe.operator is not None:
        return [(OPERATORS[recipe.operator.name], ("operator",)), *posts]
    out: list[tuple[Rule, Home]] = [*posts, (MEASURES[recipe.assess.measure], ("assess",))]
    if recipe.splice.score is not None:
        out.append((MEASURES[recipe.splice.score.measure], ("splice", "score")))
    if recipe.allocate.kind == "importance":
        out.append((MEASURES[recipe.allocate.measure], ("allocate",)))
    return out


def _fields(recipe: Recipe) -> list[tuple[Rule, str, Home]]:
    """(row, field, place) of every field of a stage that changes the merge."""
    if recipe.operator is not None:
        return []
    selection, splice = SELECTIONS[recipe.select.kind], SPLICES[recipe.splice.kind]
    is_whole = selection.name == "all"
    out: list[tuple[Rule, str, Home]] = [(STAGES["winsorise"], k, (k,)) for k in STAGES["winsorise"].options]
    out += [(select_fields(selection), k, ("select", k)) for k in selection.reads]
    out += [] if is_whole else [(STAGES["rescale"], "rescale", ("rescale", "kind"))]
    if recipe.resolve.kind != "none":
        out += [(STAGES["resolve"], k, ("resolve", k)) for k in STAGES["resolve"].options]
    out += [(STAGES["splice"], k, ("splice", k)) for k in splice.reads if not (is_whole and k in _BOOSTS)]
    if recipe.allocate.kind == "importance":
        numbers = ("spread", "floor", "coefficient_power") if selection.uses_density else ("coefficient_power",)
        out += [(STAGES["allocate"], k, ("allocate", k)) for k in numbers]
    return out


def value_at(data: Mapping[str, Any], home: Home, absent: Scalar | None) -> Scalar | None:
    """The value at a place of a recipe's data, `absent` where an option is not written, None without such a place."""
    where: Any = data
    for key in home[:-1]:
        try:
            where = where[key]
        except (KeyError, IndexError, TypeError):
            return None
    return None if where is None else where.get(home[-1], absent)
