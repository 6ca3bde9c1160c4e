"""Compare our models with those that mergekit makes from the same file: every method, element by element.

    python benchmarks/parity_mergekit.py --mergekit /path/to/mergekit-yaml --zoo FOLDER [--sets lm,demo,encoder]
        [--only ties,slerp] [--out FILE.csv]

mergekit runs as a separate program. The sets of models are ``lm``, which is ``lm/{base,intent,qtype,where}`` in the zoo
(float32 Llama), ``encoder``, which is ``encoder/{base,sst2,trec6,emotion}`` (float16 BERT), and ``demo``, the example's
(bfloat16 Llama). ``--models BASE EXPERT ...`` gives others. There are three ways of computing:

    float32     checkpoints as they are, dtype float32
    cast        bfloat16 checkpoints, dtype float32, out_dtype bfloat16: both programs round once
    bfloat16    bfloat16 checkpoints, dtype bfloat16: mergekit rounds after every step, we once

Columns:

    equal           share of elements with the same bits
    close           share of elements within one bfloat16 ulp (float32: 1e-6 + 1e-5 |x|)
    own_close       in the third way, `close` of mergekit's two results ``bfloat16`` and ``cast``: the effect of its own
                    rounding
    close_at_base   `close` with the ulp of the larger of the result and the base's weight. Where a delta almost cancels
                    the weight, one rounding of the weight is many ulps of the result
    largest         the largest difference
    tied            share of elements whose score equals a selection threshold exactly. Each program keeps as many of
                    them, but not the same ones
    close_untied    `close` among the others

Methods that draw masks have the kept rate, the mean and the standard deviation of the merged delta instead.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.passes.order_statistics import dropped_count, kept_count
from merge_search.engine.resident.pool import ModelPool
from merge_search.mergekit import read_mergekit
from merge_search.recipe import Recipe

MODES = {
    "float32": {"dtype": "float32"},
    "cast": {"dtype": "float32", "out_dtype": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
}
SETS = {
    "lm": ("lm/base", "lm/intent", "lm/qtype", "lm/where"),
    "encoder": ("encoder/base", "encoder/sst2", "encoder/trec6", "encoder/emotion"),
    "demo": ("base", "maths", "stories", "spelling"),
}
DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo" / "models"
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}
WEIGHTS = (0.5, 0.3, 0.7)
FIELDS = [
    "models", "method", "case", "mode", "n", "equal", "close", "own_close", "close_at_base", "largest",
    "tied", "close_untied", "kept_theirs", "kept_ours", "mean_theirs", "mean_ours", "std_theirs", "std_ours",
    "mergekit", "merge_search", "torch",
]  # fmt: skip


def cases(base: str, experts: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and mergekit file of every comparison."""
    for part in (_linear_cases, _masked_cases, _sphere_cases, _other_cases, _random_cases):
        yield from part(base, experts)


def _file(method: str, models: list[dict[str, Any]], base: str | None = None, **parameters: Any) -> dict[str, Any]:
    """A mergekit file of one method for the whole model."""
    with_base = {"base_model": base} if base else {}
    return {"merge_method": method, **with_base, "models": models, **({"parameters": parameters} if parameters else {})}


def _plain(experts: list[str]) -> list[dict[str, Any]]:
    return [{"model": e} for e in experts]


def _weighted(experts: list[str], weights: Sequence[Any] = WEIGHTS, **more: Any) -> list[dict[str, Any]]:
    return [{"model": e, "parameters": {"weight": w, **more}} for e, w in zip(experts, weights, strict=False)]


def _linear_cases(base: str, experts: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    gradients = [[w, 1 - w, w] for w in WEIGHTS]
    yield "linear", _file("linear", _weighted(experts))
    yield "linear, gradients", _file("linear", _weighted(experts, gradients))
    yield "task_arithmetic", _file("task_arithmetic", _weighted(experts), base, **{"lambda": 0.8})


def _masked_cases(base: str, experts: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    opposed = _weighted(experts, (0.5, -0.3, 0.7), density=0.37)
    yield "ties", _file("ties", _weighted(experts, density=0.37), base)
    yield "ties, not normalised", _file("ties", _weighted(experts, density=0.5), base, normalize=False)
    yield "ties, a negative weight", _file("ties", opposed, base)
    yield "breadcrumbs", _file("breadcrumbs", _weighted(experts, density=0.85, gamma=0.01), base)
    yield "breadcrumbs_ties", _file("breadcrumbs_ties", _weighted(experts, density=0.5, gamma=0.03), base)


def _sphere_cases(base: str, experts: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    by_place = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.2]},
        {"value": 0.4},
    ]
    pair = _weighted(experts)[:2]
    yield "slerp", _file("slerp", _plain(experts)[:1], base, t=by_place)
    yield "nuslerp", _file("nuslerp", pair, base)
    yield "nuslerp, no base", _file("nuslerp", pair)
    yield "nuslerp, row-wise", _file("nuslerp", pair, base, nuslerp_flatten=False, nuslerp_row_wise=True)
    yield "multislerp", _file("multislerp", _weighted(experts), base)
    yield "multislerp, no base", _file("multislerp", _weighted(experts))
    yield "karcher", _file("karcher", _plain(experts))


def _other_cases(base: str, experts: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    plain, (first, second, *_) = _plain(experts), experts
    yield "model_stock", _file("model_stock", plain, base)
    yield "model_stock, filter-wise", _file("model_stock", plain, base, filter_wise=True)
    yield "sce", _file("sce", plain, base, select_topk=0.3)
    yield "nearswap", _file("nearswap", plain[:1], base, t=0.001)
    yield "arcee_fusion", _file("arcee_fusion", plain[:1], base)
    halves = (first, [0, 2]), (second, [2, _n_layers(base)])
    slices = [{"sources": [{"model": m, "layer_range": r}]} for m, r in halves]
    yield "passthrough", {"merge_method": "passthrough", "slices": slices}


def _random_cases(base: str, experts: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for method in sorted(RANDOM):
        yield method, _file(method, _weighted(experts, density=0.4), base)


def _n_layers(folder: str) -> int:
    config = json.loads((Path(folder) / "config.json").read_text())
    return int(config["num_hidden_layers"])


def theirs(program: str, documents: dict[str, dict[str, Any]], work: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """mergekit's merged tensors of every file, by case. One process makes them all."""
    file, out = work / "all.yml", work / "out"
    named = {f"case{i}": case for i, case in enumerate(documents)}
    file.write_text(yaml.safe_dump_all([{"name": n, **documents[case]} for n, case in named.items()]))
    options = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card", "--intermediate-dir", str(out)]
    command = [str(Path(program).with_name("mergekit-multi")), str(file), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"mergekit failed: {done.stderr[-800:]}")
    for name, case in named.items():
        merged: dict[str, Tensor] = {}
        for shard in sorted((out / name).glob("*.safetensors")):
            merged.update(load_file(shard))
        shutil.rmtree(out / name)
        yield case, merged


def ours(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Our merged tensors, the base's, and where a score equals a selection threshold."""
    recipe = read_mergekit(file)
    pool = ModelPool(recipe.models, device="cpu")
    merged = {name: t.clone() for name, t in MergeEngine(pool).merged(recipe)}
    return (
        merged,
        {name: pool.base(name) for name in merged},
        {name: at_threshold(recipe, pool, name) for name in merged},
    )


def at_threshold(recipe: Recipe, pool: ModelPool, name: str) -> Tensor:
    """Elements whose score, for some expert, is the last one kept and also the first one dropped."""
    base = pool.base(name).float()
    deltas = [pool.expert(e, name).float() - base for e in recipe.models.experts]
    found = torch.zeros(base.shape, dtype=torch.bool)
    if recipe.select.kind not in ("top_k", "band"):
        return found
    by_variance = recipe.assess.measure == "variance"
    scores = [torch.stack(deltas).var(0, unbiased=False)] if by_variance else [d.abs() for d in deltas]
    for expert, score in zip(recipe.models.experts, scores, strict=False):
        ordered = score.reshape(-1).sort(descending=True).values
        n = int((ordered > 0).sum()) if recipe.select.nonzero else ordered.numel()
        kept = kept_count(recipe.density(expert, pool.groups[name]), n, recipe.select.rounding)
        dropped = dropped_count(recipe.select, n, kept) if recipe.select.kind == "band" else 0
        for count in {dropped, dropped + kept} - {0, ordered.numel()}:
            value = ordered[count - 1]
            if ordered[count] >= value * (1 - 1e-6):
                found |= (score - value).abs() <= 1e-6 * value
    return found


def compare(
    a: dict[str, Tensor], b: dict[str, Tensor], base: dict[str, Tensor], ties: dict[str, Tensor]
) -> dict[str, float]:
    """`equal`, `close`, `close_at_base` and `largest` of theirs (a) and ours (b), and moments of the merged deltas."""
    n = equal = close = at_base = tied = untied = 0
    largest = 0.0
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for name, y in b.items():
        x = a[name]
        if x.shape != y.shape:
            raise RuntimeError(f"{name}: {tuple(x.shape)} from mergekit, {tuple(y.shape)} from us")
        x = x.to(y.dtype)  # mergekit's arcee_fusion writes float32 whatever dtype says
        origin = base[name].double()
        wide_x, wide_y = x.double(), y.double()
        gap = (wide_x - wide_y).abs()
        size = torch.maximum(wide_x.abs(), wide_y.abs())
        n += x.numel()
        equal += int((x == y).sum())
        near = gap <= _tolerance(size, x.dtype)
        close += int(near.sum())
        tied += int(ties[name].sum())
        untied += int((near & ~ties[name]).sum())
        at_base += int((gap <= _tolerance(torch.maximum(size, origin.abs()), x.dtype)).sum())
        largest = max(largest, float(gap.max()))
        for row, wide in enumerate((wide_x, wide_y)):
            delta = wide - origin
            sums[row] += torch.stack([(delta.abs() > 1e-9).sum().double(), delta.sum(), delta.square().sum()])
    kept, mean, square = (sums / n).unbind(1)
    std = (square - mean**2).clamp_min(0).sqrt()
    return {
        "n": n, "equal": equal / n, "close": close / n, "close_at_base": at_base / n, "largest": largest,
        "tied": tied / n, "close_untied": untied / max(1, n - tied),
        "kept_theirs": float(kept[0]), "kept_ours": float(kept[1]),
        "mean_theirs": float(mean[0]), "mean_ours": float(mean[1]),
        "std_theirs": float(std[0]), "std_ours": float(std[1]),
    }  # fmt: skip


def _tolerance(size: Tensor, dtype: torch.dtype) -> Tensor:
    """One ulp of numbers of this size in bfloat16, and about a hundred ulps in float32."""
    if dtype == torch.bfloat16:
        return torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 8)
    return 1e-6 + 1e-5 * size


def copied(folder: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Copy a checkpoint, with its floats in `dtype`. None: the files' own."""
    out.mkdir(parents=True)
    for file in folder.glob("*.json"):
        shutil.copyfile(file, out / file.name)
    tensors = load_file(folder / "model.safetensors")
    if dtype is not None:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    config = json.loads((out / "config.json").read_text())
    if dtype is not None:
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if config["model_type"] == "bert":
        # mergekit 0.1.5 fails on its own table of BERT (a TypeError), and takes an unknown model for a language model.
        config["architectures"] = ["Encoder"]
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def version(program: str) -> str:
    """mergekit's version, from its own environment."""
    code = "import importlib.metadata as m; print(m.version('mergekit'))"
    python = Path(program).resolve().parent / "python"
    asked = subprocess.run(
        [str(python if python.exists() else sys.executable), "-c", code], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml") or "", help="the program mergekit-yaml")
    parser.add_argument("--zoo", default=os.environ.get("MERGE_SEARCH_ZOO", ""))
    parser.add_argument("--sets", default="lm,demo,encoder", help="sets of models, joined by commas")
    parser.add_argument("--models", nargs="+", help="base and three experts, in place of the sets")
    parser.add_argument("--only", default="", help="methods, joined by commas")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "parity_mergekit.csv"))
    asked = parser.parse_args()
    if not asked.mergekit or not (asked.zoo or asked.models):
        parser.error("give --mergekit and --zoo (or --models)")
    folders = {"given": asked.models} if asked.models else {n: _folders(n, asked.zoo) for n in asked.sets.split(",")}
    about = {
        "mergekit": version(asked.mergekit), "merge_search": importlib.metadata.version("merge-search"),
        "torch": torch.__version__,
    }  # fmt: skip
    only = set(filter(None, asked.only.split(",")))
    rows = kept_rows(Path(asked.out), set(folders), only, asked.modes)
    for name, models in folders.items():
        for row in measure(models, asked.mergekit, only, asked.modes.split(",")):
            rows.append({"models": name, **row, **about})
            _write(Path(asked.out), rows)
            print(
                f"{name:8s} {row['mode']:9s} {row['case']:26s} equal {row['equal']:.5f} close {row['close']:.6f} "
                f"own {row.get('own_close', math.nan):.6f} untied {row['close_untied']:.6f} "
                f"largest {row['largest']:.3g}",
                flush=True,
            )


def kept_rows(out: Path, models: set[str], only: set[str], modes: str) -> list[dict[str, Any]]:
    """Rows of earlier runs that this one does not repeat."""
    if not out.is_file():
        return []
    with out.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if "models" in row]
    again = [
        r["models"] in models and r["mode"] in modes.split(",") and (not only or r["method"] in only) for r in rows
    ]
    return [row for row, is_replaced in zip(rows, again, strict=True) if not is_replaced]


def _folders(name: str, zoo: str) -> list[str]:
    parent = DEMO if name == "demo" else Path(zoo)
    return [str(parent / m) for m in SETS[name]]


def measure(models: list[str], program: str, only: set[str], modes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a row for every case and way of computing."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        whole = [str(copied(Path(m), work / "own" / Path(m).name)) for m in models]
        halved = [str(copied(Path(m), work / "bf16" / Path(m).name, torch.bfloat16)) for m in models]
        once: dict[str, dict[str, Tensor]] = {}
        for mode in modes:
            base, *experts = whole if mode == "float32" else halved
            found = {c: {**d, **MODES[mode]} for c, d in cases(base, experts) if not only or d["merge_method"] in only}
            for case, made in theirs(program, found, work):
                file = work / "merge.yml"
                file.write_text(yaml.safe_dump(found[case]))
                mine, origin, ties = ours(file)
                row: dict[str, Any] = compare(made, mine, origin, ties)
                if mode == "cast":
                    once[case] = made
                if mode == "bfloat16" and case in once:
                    row["own_close"] = compare(made, once.pop(case), origin, ties)["close"]
                yield {"method": found[case]["merge_method"], "case": case, "mode": mode, **row}


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for row in rows:
            is_random = row["method"] in RANDOM
            skip = (
                {"equal", "close", "own_close", "close_at_base", "largest", "tied", "close_untied"}
                if is_random
                else {f for f in FIELDS if f.endswith(("_theirs", "_ours"))}
            )
            writer.writerow(
                {
                    k: "" if k in skip or k not in row else f"{v:.6g}" if isinstance(v, float) else v
                    for k, v in ((f, row.get(f)) for f in FIELDS)
                }
            )


if __name__ == "__main__":
    main()
