"""Measure one merge from files to files, time and memory: the same mergekit file, by both programs.

    python benchmarks/cold_merge.py --work FOLDER --mergekit /path/to/mergekit-yaml [--method ties] [--out FILE.csv]
    python benchmarks/cold_merge.py --work FOLDER --beside /path/to/another/checkout [--method ties] [--out FILE.csv]

The program writes a synthetic Llama to the folder once, about 820 MB a model (bfloat16, random weights). Its experts
differ by small normal deltas in every tensor. The two programs run in turn, `--repeats` times, each run in a new
process. The inputs are in the page cache unless ``--drop-cache`` is given. Wall time, CPU time (user + system) and
peak resident memory are the operating system's for that process, and mapped file pages count as resident. Every run is
a row. The first run of merge-search on a machine compiles its loops and keeps them, which takes two seconds of CPU
time or less.

``--beside CHECKOUT`` compares this checkout with another one, which may be older or newer, in place of mergekit. Both
merge the same file in turn, ``--rounds`` times, and every figure is a ratio (`beside.py`). One merge of each comes
first and does not count, since it may have to compile.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import beside
import machine
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

EXPERTS = ("one", "two", "three")
SHAPE = {"hidden_size": 1024, "intermediate_size": 3328, "num_hidden_layers": 24, "vocab_size": 32000}
METHODS: dict[str, dict[str, Any]] = {
    "ties": {"weight": 0.4, "density": 0.3},
    "dare_ties": {"weight": 0.4, "density": 0.3},
    "task_arithmetic": {"weight": 0.4},
    "linear": {"weight": 0.4},
}
FIELDS = [
    "date", "commit", "machine", "cores", "method", "parameters", "experts", "dtype", "cache", "program", "repeat",
    "wall_s", "cpu_s", "peak_rss_mib", "wall_ratio", "cpu_ratio", "rss_ratio", "version", "torch", "python",
]  # fmt: skip


class Cost(NamedTuple):
    """What one process took: seconds of wall time, CPU seconds, and peak resident memory in MiB."""

    wall: float
    cpu: float
    rss: float


# ------------------------------------------------------------------------------------------------ models


def config(layers: int) -> dict[str, Any]:
    """The models' ``config.json``."""
    heads = SHAPE["hidden_size"] // 64
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor."""
    h, f, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    yield "model.embed_tokens.weight", (v, h)
    for i in range(layers):
        block = f"model.layers.{i}."
        for name in "qkvo":
            yield f"{block}self_attn.{name}_proj.weight", (h, h)
        yield f"{block}mlp.gate_proj.weight", (f, h)
        yield f"{block}mlp.up_proj.weight", (f, h)
        yield f"{block}mlp.down_proj.weight", (h, f)
        yield f"{block}input_layernorm.weight", (h,)
        yield f"{block}post_attention_layernorm.weight", (h,)
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (v, h)


def make_models(work: Path, layers: int) -> None:
    """Write base and experts, unless they are there."""
    size = 2 * sum(torch.Size(shape).numel() for _, shape in shapes(layers))
    for number, name in enumerate(("base", *EXPERTS)):
        folder = work / name
        if (folder / "config.json").is_file():
            if json.loads((folder / "config.json").read_text()) != config(layers):
                sys.exit(f"{folder}: holds another model; give an empty --work folder")
            continue
        if shutil.disk_usage(work).free < 3 * size:
            sys.exit(
                f"{work}: needs about {6 * size / 2**30:.1f} GiB for models and results; free some or give another"
            )
        folder.mkdir(exist_ok=True)
        save_file(_weights(layers, number), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config(layers), indent=2))


def _weights(layers: int, number: int) -> dict[str, Tensor]:
    """Weights of the base (number 0) or of an expert, whose deltas are a tenth as large as the weights."""
    shared, of_expert = torch.Generator().manual_seed(0), torch.Generator().manual_seed(number)
    result = {}
    for name, shape in shapes(layers):
        weight = torch.randn(shape, generator=shared) * 0.02 + (1.0 if len(shape) == 1 else 0.0)
        if number:
            weight = weight + torch.randn(shape, generator=of_expert) * 0.002
        result[name] = weight.bfloat16()
    return result


def write_file(work: Path, method: str) -> Path:
    """Write the mergekit file of a method."""
    models = [{"model": str(work / e), "parameters": METHODS[method]} for e in EXPERTS]
    document = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        document["base_model"] = str(work / "base")
    file = work / f"{method}.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


# ------------------------------------------------------------------------------------------------ measuring


def measure(command: list[str], cores: int, checkout: Path | None = None) -> Cost:
    """Run a program to its end. Only its own time and memory count, whatever ran before.

    Args:
        command: The program and its arguments.
        cores: The number of threads it may use.
        checkout: The checkout whose packages it imports. Default: those that are installed.
    """
    variables = os.environ if checkout is None else beside.environment(checkout)
    environment = {**variables, "OMP_NUM_THREADS": str(cores), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n{errors.decode()[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def prepare_cache(work: Path, *, drop: bool) -> None:
    """Read the inputs into the system's page cache, or drop them from it."""
    for file in sorted(work.glob("*/model*.safetensors")):
        with file.open("rb") as f:
            if drop:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while f.read(1 << 24):
                    pass


def merge_search(file: Path, out: Path) -> list[str]:
    """The command by which merge-search merges the file."""
    return [sys.executable, "-m", "merge_search", "merge", str(file), str(out)]


def commands(options: argparse.Namespace, file: Path, out: Path) -> dict[str, list[str]]:
    """The programs' commands, by name, in the order in which they run."""
    chosen = {"merge-search": merge_search(file, out)}
    if options.mergekit:
        chosen = {"mergekit": [options.mergekit, str(file), str(out), "--lazy-unpickle"], **chosen}
    return chosen


def describe(options: argparse.Namespace) -> dict[str, object]:
    """What all rows of a run have in common."""
    return {
        **machine.place(), "cores": options.cores, "method": options.method, "experts": len(EXPERTS),
        "dtype": "bfloat16", "parameters": sum(torch.Size(shape).numel() for _, shape in shapes(options.layers)),
        "cache": "dropped" if options.drop_cache else "warm",
    }  # fmt: skip


def compare(options: argparse.Namespace) -> list[dict[str, object]]:
    """Measure both programs in turn and return the rows."""
    file, common, rows = write_file(options.work, options.method), describe(options), []
    for repeat in range(options.repeats):
        mergekit: Cost | None = None
        for program, command in commands(options, file, options.work / "out").items():
            shutil.rmtree(options.work / "out", ignore_errors=True)
            prepare_cache(options.work, drop=options.drop_cache)
            cost = measure(command, options.cores)
            row = {
                **common, "program": program, "repeat": repeat, "wall_s": round(cost.wall, 2),
                "cpu_s": round(cost.cpu, 2), "peak_rss_mib": round(cost.rss), "version": version(program, command),
            }  # fmt: skip
            if program == "mergekit":
                mergekit = cost
            elif mergekit is not None:
                row["wall_ratio"] = round(mergekit.wall / cost.wall, 2)
                row["cpu_ratio"] = round(mergekit.cpu / cost.cpu, 2)
                row["rss_ratio"] = round(cost.rss / mergekit.rss, 3)
            rows.append(row)
            print({k: row[k] for k in FIELDS if k in row and k not in common}, flush=True)
    shutil.rmtree(options.work / "out", ignore_errors=True)
    return rows


def compare_checkouts(options: argparse.Namespace) -> None:
    """Measure this checkout and another one in turn and report the ratios."""
    folders, out = beside.checkouts(options.beside), options.work / "out"
    command = merge_search(write_file(options.work, options.method), out)

    def merge(name: str) -> dict[tuple[str, str], float]:
        shutil.rmtree(out, ignore_errors=True)
        prepare_cache(options.work, drop=options.drop_cache)
        cost = measure(command, options.cores, folders[name])
        print(f"{name}: {cost.wall:.2f} s, CPU {cost.cpu:.2f} s, {cost.rss:.0f} MiB", flush=True)
        figures = {"wall s": cost.wall, "CPU s": cost.cpu, "peak MiB": cost.rss}
        return {(options.method, figure): value for figure, value in figures.items()}

    for name in folders:
        merge(name)
    measured: dict[str, list[dict[tuple[str, str], float]]] = {name: [] for name in folders}
    for order in beside.rounds(list(folders), options.rounds):
        for name in order:
            measured[name].append(merge(name))
    shutil.rmtree(out, ignore_errors=True)
    beside.report(beside.ratios(measured), options.beside, options.out)


def version(program: str, command: list[str]) -> str:
    """The program's version."""
    if program == "merge-search":
        return importlib.metadata.version("merge-search")
    python = Path(command[0]).with_name("python")
    ask = "import importlib.metadata as m; print(m.version('mergekit'))"
    return subprocess.run([str(python), "-c", ask], capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--mergekit", help="the program; without it only merge-search is measured")
    parser.add_argument("--method", choices=METHODS, default="ties")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--cores", type=int, default=2, help="threads for either program")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--drop-cache", action="store_true", help="inputs come from the disk")
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    beside.add_options(parser)
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    # The models are made in a process of its own, because the most memory that this process ever held counts in the
    # peak memory of the programs that it starts.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker:
        maker.submit(make_models, options.work, options.layers).result()
    if options.beside:
        compare_checkouts(options)
        return
    rows = compare(options)
    if options.out:
        machine.append(options.out, FIELDS, rows)


if __name__ == "__main__":
    main()
