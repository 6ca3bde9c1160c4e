"""The model card of a merge that no study scored."""

from __future__ import annotations

from merge_search.recipe import Recipe
from merge_search.rules import TRANSFORMS

__all__ = ["front_matter", "how_to_load", "recipe_card", "recipe_sources", "reproduce"]


def recipe_card(recipe: Recipe, adapter: str = "") -> str:
    """README.md of a model made from a recipe alone, whose scores are not known.

    Args:
        recipe: The recipe.
        adapter: What a LoRA adapter made of it is; '' for whole weights.
    """
    return f"""{front_matter(recipe, adapter)}

# A merge by {recipe.preset or "a custom recipe"}

{recipe_sources(recipe)}

{reproduce(adapter)}
{how_to_load(recipe)}"""


def front_matter(recipe: Recipe, adapter: str = "") -> str:
    """The head of README.md, which the hub reads."""
    library = f"base_model: {recipe.models.base}\nlibrary_name: peft" if adapter else "library_name: transformers"
    return f"---\n{library}\ntags: [merge, merge-search{', lora' if adapter else ''}]\n---"


def reproduce(adapter: str = "") -> str:
    """What `recipe.json` gives again."""
    if adapter:
        return (
            f"{adapter}\n\n`recipe.json` holds the whole recipe: `merge-search merge recipe.json OUT --adapter` gives "
            "this adapter again, and without `--adapter` the whole weights."
        )
    return (
        "`recipe.json` holds the whole recipe: `merge-search merge recipe.json OUT` gives these weights, bit for bit."
    )


def recipe_sources(recipe: Recipe) -> str:
    """Base and experts, one a line, and the transform that made other models of them."""
    lines = [f"- {name}: `{ref}`" for name, ref in {"base": recipe.models.base, **recipe.models.experts}.items()]
    if recipe.transform is not None:
        options = ", ".join(f"{k}={v}" for k, v in recipe.transform.options.items())
        lines.append(f"\nMerged after the transform `{recipe.transform.name}`{f' ({options})' if options else ''}.")
    return "\n".join(lines)


def how_to_load(recipe: Recipe) -> str:
    """What a model of the package's own architecture needs beside transformers; '' for the others."""
    if recipe.transform is None or TRANSFORMS[recipe.transform.name].result == "known":
        return ""
    return """
## Load

The architecture is merge-search's own. After `import merge_search.models`, transformers' Auto classes load this folder.
"""
