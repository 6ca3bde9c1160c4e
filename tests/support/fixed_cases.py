"""What merges of `fixed_models` by `fixed_recipes` give: hashes, or a few numbers where libraries round."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from command_line import here
from fixed_models import ALL_EXPERTS, GPT2, LLAMA, LONG, VARIED, write_models
from fixed_recipes import MERGEKIT, depends_on_the_machine, recipes
from safetensors.torch import load_file
from torch import Tensor

from merge_search.recipe import Models, Recipe


@functools.cache
def search_engine(root: Path, *, compiled: bool) -> Any:
    """The engine that a search merges with, over the models in `root`: ``engine.merged(recipe)`` -> (name, tensor), ...

    The one place here that reaches into the package: no command compiles loops for models as small as these.
    """
    from merge_search.engine.engine import MergeEngine
    from merge_search.engine.resident.pool import ModelPool
    from merge_search.engine.statistics.store import FolderStatistics

    experts = {e: str(root / e) for e in ALL_EXPERTS if (root / e).is_dir()}
    pool = ModelPool(Models(base=str(root / "base"), experts=experts), device="cpu", map_folders=[root / "maps"])
    pool.statistics = FolderStatistics(root / "statistics")
    return MergeEngine(pool, compile=compiled)


@dataclass(frozen=True)
class FixedSet:
    """Models of one dtype, and what is merged of them: recipes, or mergekit files, by name."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    cases: Mapping[str, Recipe | dict[str, Any]]

    def write(self, root: Path) -> Path:
        """The models' folders in `root`."""
        return write_models(root, self.shapes, self.dtype)


def _sets() -> dict[str, FixedSet]:
    named = recipes()
    exact = {n: r for n, r in named.items() if not depends_on_the_machine(r) and ", grid " not in n}
    rules = ("operator: arcee_fusion", "operator: model_stock by row", "operator: nuslerp by row", "operator: tsv_m")
    by_row = {n: named[n] for n in (*rules, "preset: ties", "stage: top_k of a row")}
    some = {n: named[f"preset: {n}"] for n in ("task_arithmetic", "ties", "dare", "pcb", "sce", "cki_soft", "cabs")}
    return {
        "varied float32": FixedSet(VARIED, "float32", named),
        "varied bfloat16": FixedSet(VARIED, "bfloat16", exact),
        "long bfloat16": FixedSet(LONG, "bfloat16", some),
        "gpt2 float32": FixedSet(GPT2, "float32", by_row),
        "llama float32": FixedSet(LLAMA, "float32", MERGEKIT),
    }


SETS = _sets()
"""Models and what is merged of them, by name."""
Result = str | dict[str, list[float]]


def result(models: FixedSet, name: str, root: Path) -> Result:
    """What ``merge-search merge`` makes of a case: the hash of the weights, or what is near enough on any machine."""
    case, out = models.cases[name], root / "out"
    file = root / ("merge.yml" if isinstance(case, dict) else "recipe.json")
    file.write_text(yaml.safe_dump(case) if isinstance(case, dict) else case.to_json())
    said = here("merge", file, out, "--device", "cpu").stdout
    try:
        tensors = load_file(out / "model.safetensors")
        found = digest(tensors)
        assert found in said, "the command must name the hash of the weights that it wrote"
        return sampled(tensors, root) if depends_on_the_machine(case) else found
    finally:
        shutil.rmtree(out)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 by the rule of the command line: name, dtype and shape, then the bytes, tensor by tensor."""
    words = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    sha = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        sha.update(f"{name}|{words[t.dtype]}|{','.join(map(str, t.shape))}".encode())
        sha.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def sampled(tensors: Mapping[str, Tensor], root: Path, n: int = 24) -> dict[str, list[float]]:
    """Of every tensor the length of what was added to the base, then `n` evenly spaced entries of it."""
    bases, found = load_file(root / "base" / "model.safetensors"), {}
    for name in sorted(tensors):
        delta = (tensors[name].double() - bases[name].double()).reshape(-1)
        at = torch.arange(n) * len(delta) // n if len(delta) > n else torch.arange(len(delta))
        found[name] = [float(f"{x:.5g}") for x in (float(delta.norm()), *delta[at].tolist())]
    return found
