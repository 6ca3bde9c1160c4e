"""Makes a LoRA adapter of a merge of LoRA adapters: exactly where that is a sum of pairs, else the nearest one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path

import torch

from merge_search.engine.checkpoints.adapter import saved_whole
from merge_search.engine.checkpoints.adapter_writer import export_adapter
from merge_search.engine.checkpoints.compatibility import check_models, without_factors
from merge_search.engine.checkpoints.headers import read_checkpoint, resolve_model
from merge_search.engine.checkpoints.writer import check_destination
from merge_search.engine.contracts import Factors
from merge_search.engine.engine import MergeEngine
from merge_search.engine.execute.pairs import nearest, nearest_of, pair_problems
from merge_search.engine.resident.coefficient_maps import FOLDER as MAPS
from merge_search.engine.resident.coefficient_maps import map_files
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.statistics.provider import DataStatistics
from merge_search.engine.statistics.store import FOLDER as STATISTICS
from merge_search.engine.statistics.store import FolderStatistics
from merge_search.errors import RecipeError, WeightsError
from merge_search.merge_recipe import brought, read_recipe
from merge_search.recipe import Recipe
from merge_search.report.recipe_card import recipe_card

__all__ = ["AdapterReport", "merge_recipe_to_adapter", "write_adapter"]


@dataclass(frozen=True)
class AdapterReport:
    """What was written.

    Attributes:
        rank: The largest rank of a pair.
        n_tensors: Tensors that the adapter changes.
        error: Frobenius norm of what was left out, relative to that of the whole change; 0 where nothing was.
        worst: The same of the tensor with the largest share, and its name.
    """

    rank: int
    n_tensors: int
    error: float
    worst: tuple[float, str]

    def __str__(self) -> str:
        what = f"A LoRA adapter of rank {self.rank} on {self.n_tensors} tensors"
        if not self.error:
            return f"{what}: the merge itself, but for rounding."
        share, name = self.worst
        return (
            f"{what}: the nearest one to the merge. Its changes differ from the merge's by {self.error:.2%} (relative "
            f"Frobenius norm), at most by {share:.2%} ({name})."
        )


def write_adapter(
    recipe: Recipe,
    out: Path,
    card: Callable[[str], str],
    maps: Path,
    statistics: Callable[[ModelPool], DataStatistics | FolderStatistics],
    *,
    device: str,
    rank: int | None = None,
) -> AdapterReport:
    """Merge LoRA adapters and write the result as one that peft loads on the same base.

    Args:
        recipe: What to merge; its rule files are in use.
        out: A new or empty folder.
        card: README.md, from a sentence on the adapter.
        maps: The folder with the recipe's maps.
        statistics: Makes the source of statistics for a pool.
        device: The device that merges.
        rank: Largest rank of a pair. None: whatever the merge takes, which must be a sum of pairs.

    Raises:
        RecipeError: An expert is no adapter of pairs, or saves tensors whole, or the merge is no sum of pairs and no
            rank was given. No weight was read.
        WeightsError: The models do not fit together, or the merge changes nothing.
        InputError: `out` is in use.
    """
    check_destination(out)
    if problems := _problems(recipe, rank):
        raise RecipeError(problems, where="adapter")
    pool = ModelPool(recipe.models, device=device, map_folders=[maps])
    source = pool.statistics = statistics(pool)
    engine = MergeEngine(pool)
    pairs: dict[str, Factors] = {}
    embeddings, errors = [], dict[str, tuple[float, float]]()
    with torch.no_grad():
        for name, found, left_out, total in _pairs(engine, pool, recipe, rank):
            target = pool.adapted_module(name)
            assert target is not None
            pairs[target[0]], errors[name] = found, (left_out, total)
            if target[1]:
                embeddings.append(target[0])
    if not pairs:
        raise WeightsError("the merge is the base itself; there is no adapter to write")
    shares = {name: sqrt(left_out / total) if total else 0.0 for name, (left_out, total) in errors.items()}
    worst = max(shares, key=lambda name: shares[name])
    left_out, total = (sum(column) for column in zip(*errors.values(), strict=True))
    error = sqrt(left_out / total) if total else 0.0
    report = AdapterReport(max(f.rank for f in pairs.values()), len(pairs), error, (shares[worst], worst))
    files: dict[str, str | bytes | Path] = {"README.md": card(str(report))}
    files.update({**brought(recipe, pool.hashes()), **map_files([maps], recipe), **source.files()})
    export_adapter(
        out, base=recipe.models.base, pairs=pairs, embeddings=embeddings, configs=pool.adapter_configs, files=files
    )
    return report


def merge_recipe_to_adapter(
    path: Path,
    out: Path,
    *,
    rank: int | None = None,
    device: str = "auto",
    note: Callable[[str], None] = lambda text: None,
) -> AdapterReport:
    """As `merge_recipe.merge_recipe`, with a LoRA adapter as its result; `rank` and errors as in `write_adapter`."""
    check_destination(out)
    recipe, beside = read_recipe(path, note=note), FolderStatistics(path.parent / STATISTICS)
    text, maps = partial(recipe_card, recipe), path.parent / MAPS
    return write_adapter(recipe, out, text, maps, lambda _: beside, device=device, rank=rank)


def _problems(recipe: Recipe, rank: int | None) -> list[str]:
    """Why the merge cannot be an adapter, from headers alone."""
    if rank is not None and rank < 1:
        return [f"the rank must be at least 1, got {rank}"]
    if recipe.transform is not None:
        return [f"transform {recipe.transform.name!r} changes the base, and an adapter is for the base as it is"]
    models = recipe.models
    if unfit := check_models(models.base, models.experts):
        raise WeightsError("these models cannot be merged:\n" + "\n".join(f"  - {p}" for p in unfit))
    reasons = without_factors(models.base, models.experts)
    out = [
        f"every expert must be a LoRA adapter, but expert {expert!r} has no pairs: {why}; write whole weights instead"
        for expert, why in reasons.items()
    ]
    base = read_checkpoint(resolve_model(models.base))
    for expert, place in models.experts.items():
        if expert not in reasons and (names := saved_whole(base, read_checkpoint(resolve_model(place)))):
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            out.append(f"expert {expert!r} saves tensors whole ({shown}), which no pair of factors can be")
    if rank is None and not out:
        out = [
            f"{why}, so that the merge is no sum of pairs; --rank R writes the nearest adapter of that rank, and tells "
            "how near it is"
            for why in pair_problems(recipe)
        ]
    return out


def _pairs(
    engine: MergeEngine, pool: ModelPool, recipe: Recipe, rank: int | None
) -> Iterator[tuple[str, Factors, float, float]]:
    """(name, pair, square of what was left out, square of the whole) of every tensor that the merge changes."""
    if pair_problems(recipe):
        assert rank is not None
        for name, merged in engine.merged(recipe.model_copy(update={"dtype": "float32"})):
            delta = merged - pool.base(name).float()
            if pool.adapted_module(name) is not None and bool(delta.any()):
                yield name, *nearest_of(delta, rank, transpose=_is_transposed(pool, name))
        return
    if problems := engine.check(recipe):
        raise RecipeError(problems)
    for name in pool.groups:
        found = engine.pair(recipe, name)
        if found is not None:
            yield name, *nearest(found, rank or found.rank)


def _is_transposed(pool: ModelPool, name: str) -> bool:
    pairs = [pool.factors(expert, name) for expert in pool.models.experts]
    return any(f.transpose for f in pairs if f is not None)
