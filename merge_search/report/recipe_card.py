"""The model card of a merge that no study scored."""

from __future__ import annotations

from merge_search.recipe import Recipe

__all__ = ["recipe_card", "recipe_sources"]


def recipe_card(recipe: Recipe) -> str:
    """README.md of a model made from a recipe alone, whose scores are not known."""
    return f"""---
library_name: transformers
tags: [merge, merge-search]
---

# A merge by {recipe.preset or "a custom recipe"}

{recipe_sources(recipe)}

`recipe.json` holds the whole recipe: `merge-search merge recipe.json OUT` gives these weights, bit for bit.
"""


def recipe_sources(recipe: Recipe) -> str:
    """Base and experts, one a line, and the transform that made other models of them."""
    lines = [f"- {name}: `{ref}`" for name, ref in {"base": recipe.models.base, **recipe.models.experts}.items()]
    if recipe.transform is not None:
        options = ", ".join(f"{k}={v}" for k, v in recipe.transform.options.items())
        lines.append(f"\nMerged after the transform `{recipe.transform.name}`{f' ({options})' if options else ''}.")
    return "\n".join(lines)
