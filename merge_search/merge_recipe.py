"""Makes a Hugging Face folder from a recipe, or from a mergekit file, without a study."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from contextlib import ExitStack, closing
from operator import itemgetter
from pathlib import Path

from merge_search.engine.checkpoints.checkpoint import Checkpoint, tied_aliases
from merge_search.engine.checkpoints.compatibility import check_models, without_factors
from merge_search.engine.checkpoints.hashing import hash_once
from merge_search.engine.checkpoints.headers import read_checkpoint, resolve_model
from merge_search.engine.checkpoints.writer import check_destination, export_folder
from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.coefficient_maps import FOLDER as MAPS
from merge_search.engine.resident.coefficient_maps import map_files
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.statistics.provider import DataStatistics
from merge_search.engine.statistics.store import FOLDER as STATISTICS
from merge_search.engine.statistics.store import FolderStatistics
from merge_search.engine.streaming.engine import StreamingEngine
from merge_search.engine.transforms.store import transformed_for_once
from merge_search.errors import RecipeError
from merge_search.mergekit import read_mergekit
from merge_search.recipe import Models, Recipe
from merge_search.report.recipe_card import recipe_card
from merge_search.rules import OPERATORS, find_rule_files, in_use, use_rule_files
from merge_search.rules.files import FOLDER as RULES
from merge_search.rules.operators import pairs_refusal

__all__ = ["brought", "merge_recipe", "read_recipe", "write_merge"]


def merge_recipe(
    path: Path, out: Path, *, device: str = "auto", note: Callable[[str], None] = lambda text: None
) -> str:
    """Make the folder `out` from a ``recipe.json`` or a mergekit YAML file.

    Relative model paths are relative to the file. Rule files that the recipe names are looked for beside it.

    Args:
        path: The recipe, or the mergekit file.
        out: A new or empty folder.
        device: The device that merges; ``auto`` takes a GPU where there is one.
        note: Called with a sentence for every rule file before it is run.

    Returns:
        The sha256 of the weights.

    Raises:
        RecipeError: the file is no recipe, or a mergekit file that a recipe cannot express.
        RuleError: a rule file is missing, has other bytes than the recipe says, or cannot be used.
        WeightsError: a model is missing or differs from the recipe's.
        InputError: `out` is in use.
    """
    check_destination(out)
    recipe = read_recipe(path, note=note)
    beside = FolderStatistics(path.parent / STATISTICS)
    return write_merge(recipe, out, recipe_card(recipe), path.parent / MAPS, lambda _: beside, device=device)


def read_recipe(path: Path, *, note: Callable[[str], None] = lambda text: None) -> Recipe:
    """Read a ``recipe.json`` or a mergekit YAML file, and put the rule files beside it in use.

    Args:
        path: The recipe, or the mergekit file.
        note: As in `merge_recipe`.

    Raises:
        RecipeError: the file is no recipe, or a mergekit file that a recipe cannot express.
        RuleError: a rule file is missing, has other bytes than the recipe says, or cannot be used.
    """
    if not path.is_file():
        raise RecipeError(f"no such file: {path}")
    if path.suffix in (".yaml", ".yml"):
        use_rule_files([])
        recipe = read_mergekit(path)
    else:
        recipe = Recipe.from_json(path.read_text(encoding="utf-8"), where=path.name)
        recipe = recipe.model_copy(update={"models": _beside(path, recipe.models)})
        files = find_rule_files(path.parent, recipe.rules)
        for file in files:
            note(f"runs the rule file {file}, which the recipe names")
        use_rule_files(files)
    return recipe


def _beside(path: Path, models: Models) -> Models:
    """`models` with places that are relative to a file made absolute."""

    def place(text: str) -> str:
        folder = (path.parent / Path(text).expanduser()).resolve()
        return str(folder) if folder.exists() else text

    experts = {name: place(text) for name, text in models.experts.items()}
    return models.model_copy(update={"base": place(models.base), "experts": experts})


def _require_pairs(recipe: Recipe) -> None:
    """Raise `RecipeError` if the recipe merges LoRA pairs that an expert does not have. Reads headers alone."""
    name = "" if recipe.operator is None else recipe.operator.name
    models = recipe.models
    if recipe.transform is not None or name not in OPERATORS or not OPERATORS[name].needs_factors:
        return
    if not check_models(models.base, models.experts) and (reasons := without_factors(models.base, models.experts)):
        raise RecipeError([pairs_refusal(f"operator: {name!r}", e, why) for e, why in reasons.items()])


def write_merge(
    recipe: Recipe,
    out: Path,
    text: str,
    maps: Path,
    statistics: Callable[[ModelPool], DataStatistics | FolderStatistics],
    *,
    device: str,
    expected: str = "",
) -> str:
    """Merge once and export. Maps, statistics and rule files that the recipe needs are copied beside it.

    Args:
        recipe: What to merge; its rule files are in use.
        out: A new or empty folder.
        text: Text of README.md.
        maps: The folder with the recipe's maps.
        statistics: Makes the source of statistics for a pool.
        device: The device that merges.
        expected: sha256 of the weights that were scored; '' if none were.

    Returns:
        The sha256 of the weights.

    Raises:
        WeightsError: the weights are not the expected ones; nothing is written.
        RecipeError: the operator merges LoRA pairs, and an expert has none. No weight was read.
    """
    _require_pairs(recipe)
    with ExitStack() as stack:
        models = recipe.models
        if recipe.transform is not None:
            made = stack.enter_context(transformed_for_once(recipe, out.parent))
            if not made.experts:
                return _export_alone(recipe, made.base, out, text, expected)
            models = Models(base=str(made.base), experts={e: str(path) for e, path in made.experts.items()})
        pool = ModelPool(models, device=device, map_folders=[maps], streaming=not expected)
        source = pool.statistics = statistics(pool)
        # The engine that made the scored bits makes them again: it may have been compiled.
        engine = MergeEngine(pool) if expected else StreamingEngine(pool)

        def others() -> dict[str, str | bytes | Path]:
            hashes = pool.hashes() if recipe.transform is None else _hashes(recipe.models)
            return {**brought(recipe, hashes), **map_files([maps], recipe), **source.files()}

        merged = stack.enter_context(closing(engine.merged(recipe)))  # ends the engine's threads if writing fails
        return export_folder(
            out,
            base_folder=pool.base_folder,
            tensors=heapq.merge(merged, pool.copied(), key=itemgetter(0)),
            recipe=recipe,
            card=text,
            extra=others,
            left_out=pool.aliases,
            expected=expected,
        )


def _export_alone(recipe: Recipe, folder: Path, out: Path, text: str, expected: str) -> str:
    """Export what a transform made, where nothing is merged any further."""
    made = Checkpoint(folder)
    aliases = tied_aliases(made)
    return export_folder(
        out,
        base_folder=folder,
        tensors=((name, made.tensor(name)) for name in sorted(made.info.tensors) if name not in aliases),
        recipe=recipe,
        card=text,
        extra=lambda: brought(recipe, _hashes(recipe.models)),
        left_out=aliases,
        expected=expected,
    )


def brought(recipe: Recipe, hashes: dict[str, str]) -> dict[str, str | bytes | Path]:
    """The recipe with the hashes of its models, known now that the tensors were read, and its rule files."""
    whole = recipe.model_copy(update={"models": recipe.models.model_copy(update={"hashes": hashes})})
    rules = [in_use(name, digest) for name, digest in recipe.rules.items()]
    sources = {f"{RULES}/{file.name}": file.source for file in rules if file is not None}
    return {"recipe.json": whole.to_json() + "\n", **sources}


def _hashes(models: Models) -> dict[str, str]:
    places = {"base": models.base, **models.experts}
    return {name: hash_once(read_checkpoint(resolve_model(place))) for name, place in places.items()}
