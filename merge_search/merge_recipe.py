"""From a recipe alone, ours or mergekit's, to a Hugging Face folder: files in, files out."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from contextlib import closing
from operator import itemgetter
from pathlib import Path

from merge_search.engine.checkpoints.writer import check_destination, export_folder
from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.coefficient_maps import FOLDER as MAPS
from merge_search.engine.resident.coefficient_maps import map_files
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.statistics.provider import DataStatistics
from merge_search.engine.statistics.store import FOLDER as STATISTICS
from merge_search.engine.statistics.store import FolderStatistics
from merge_search.engine.streaming.engine import StreamingEngine
from merge_search.errors import RecipeError
from merge_search.mergekit import read_mergekit
from merge_search.recipe import Models, Recipe
from merge_search.report.recipe_card import recipe_card
from merge_search.rules import find_rule_files, in_use, use_rule_files
from merge_search.rules.files import FOLDER as RULES

__all__ = ["merge_recipe", "write_merge"]


def merge_recipe(
    path: Path, out: Path, *, device: str = "auto", note: Callable[[str], None] = lambda text: None
) -> str:
    """Make the folder `out` from a ``recipe.json`` or a mergekit YAML file; returns the sha256 of the weights.

    Relative model paths are relative to the file. Rule files that the recipe names are looked for beside it.

    Args:
        note: Called with the path of every rule file before it is run.

    Raises:
        RecipeError: the file is no recipe, or says what cannot be expressed.
        RuleError: a rule file is missing, has other bytes than the recipe says, or cannot be used.
        WeightsError: models missing or different from those of the recipe.
        InputError: `out` is in use.
    """
    if not path.is_file():
        raise RecipeError(f"no such file: {path}")
    check_destination(out)
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
    beside = FolderStatistics(path.parent / STATISTICS)
    return write_merge(recipe, out, recipe_card(recipe), path.parent / MAPS, lambda _: beside, device=device)


def _beside(path: Path, models: Models) -> Models:
    """Models whose relative places are relative to a file."""

    def place(text: str) -> str:
        folder = (path.parent / Path(text).expanduser()).resolve()
        return str(folder) if folder.exists() else text

    experts = {name: place(text) for name, text in models.experts.items()}
    return models.model_copy(update={"base": place(models.base), "experts": experts})


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
    """Merge once and export; maps, statistics and rule files that the recipe needs travel with it.

    Returns:
        The sha256 of the weights.

    Args:
        text: Of README.md. maps: Folder where the recipe's maps are looked for. statistics: Makes the pool's.
        expected: sha256 of weights that were scored; '' if none were.
    Raises:
        WeightsError: the weights are not those; nothing is written.
    """
    pool = ModelPool(recipe.models, device=device, map_folders=[maps], streaming=not expected)
    source = pool.statistics = statistics(pool)
    # Bits that were scored are made again by the engine that made them, which may have been compiled.
    engine = MergeEngine(pool) if expected else StreamingEngine(pool)

    def others() -> dict[str, str | bytes | Path]:
        models = recipe.models.model_copy(update={"hashes": pool.hashes()})  # known once the tensors have been read
        whole = recipe.model_copy(update={"models": models})
        brought = {
            f"{RULES}/{f.name}": f.source for f in (in_use(*pair) for pair in recipe.rules.items()) if f is not None
        }
        return {"recipe.json": whole.to_json() + "\n", **map_files([maps], recipe), **source.files(), **brought}

    with closing(engine.merged(recipe)) as merged:  # its threads end, whatever happens while tensors are written
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
