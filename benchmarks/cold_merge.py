"""How long does one merge take from files to files, and how much memory? The same mergekit file, by both programs.

    python benchmarks/cold_merge.py --work FOLDER --mergekit /path/to/mergekit-yaml [--method ties] [--out FILE.csv]

A synthetic Llama (bfloat16, random weights; experts differ by small normal deltas in every tensor) is written to the
folder once, about 820 MB a model. Each program runs as a new process, one after the other, `--repeats` times in turn;
the inputs are in the page cache, and with ``--drop-cache`` they are not. Wall time, CPU time (user + system) and peak
resident memory are the operating system's for that process; mapped file pages count as resident. No run is left out:
merge-search's first on a machine compiles its loops, two seconds of processor time or less, and keeps them.
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
    wall: float
    cpu: float
    rss: float


# ------------------------------------------------------------------------------------------------ models


def config(layers: int) -> dict[str, Any]:
    heads = SHAPE["hidden_size"] // 64
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
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
    """Base and experts, unless they are there."""
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
    """Of the base (number 0) or of an expert: deltas a tenth as large as the weights."""
    plain, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(number)
    result = {}
    for name, shape in shapes(layers):
        weight = torch.randn(shape, generator=plain) * 0.02 + (1.0 if len(shape) == 1 else 0.0)
        if number:
            weight = weight + torch.randn(shape, generator=own) * 0.002
        result[name] = weight.bfloat16()
    return result


def write_file(work: Path, method: str) -> Path:
    models = [{"model": str(work / e), "parameters": METHODS[method]} for e in EXPERTS]
    document = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        document["base_model"] = str(work / "base")
    file = work / f"{method}.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


# ------------------------------------------------------------------------------------------------ measuring


def measure(command: list[str], cores: int) -> Cost:
    """Run a program to its end; only its own time and memory count, whatever ran before."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n{complaint.decode()[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def prepare_cache(work: Path, *, drop: bool) -> None:
    """Inputs into the page cache of the system, or out of it."""
    for file in sorted(work.glob("*/model*.safetensors")):
        with file.open("rb") as f:
            if drop:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while f.read(1 << 24):
                    pass


def commands(options: argparse.Namespace, file: Path, out: Path) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "merge_search", "merge", str(file), str(out)]
    chosen = {"merge-search": ours}
    if options.mergekit:
        chosen = {"mergekit": [options.mergekit, str(file), str(out), "--lazy-unpickle"], **chosen}
    return chosen


def describe(options: argparse.Namespace) -> dict[str, object]:
    return {
        **machine.place(), "cores": options.cores, "method": options.method, "experts": len(EXPERTS), "dtype": "bfloat16",
        "parameters": sum(torch.Size(shape).numel() for _, shape in shapes(options.layers)),
        "cache": "dropped" if options.drop_cache else "warm",
    }  # fmt: skip


def compare(options: argparse.Namespace) -> list[dict[str, object]]:
    file, common, rows = write_file(options.work, options.method), describe(options), []
    for repeat in range(options.repeats):
        theirs: Cost | None = None
        for program, command in commands(options, file, options.work / "out").items():
            shutil.rmtree(options.work / "out", ignore_errors=True)
            prepare_cache(options.work, drop=options.drop_cache)
            cost = measure(command, options.cores)
            row = {**common, "program": program, "repeat": repeat, "wall_s": round(cost.wall, 2),
                   "cpu_s": round(cost.cpu, 2), "peak_rss_mib": round(cost.rss), "version": version(program, command)}  # fmt: skip
            if program == "mergekit":
                theirs = cost
            elif theirs is not None:
                row.update(wall_ratio=round(theirs.wall / cost.wall, 2), cpu_ratio=round(theirs.cpu / cost.cpu, 2),
                           rss_ratio=round(cost.rss / theirs.rss, 3))  # fmt: skip
            rows.append(row)
            print({k: row[k] for k in FIELDS if k in row and k not in common}, flush=True)
    shutil.rmtree(options.work / "out", ignore_errors=True)
    return rows


def version(program: str, command: list[str]) -> str:
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
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    # In a process of its own: what this one ever held counts as the peak memory of the programs that it starts.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker:
        maker.submit(make_models, options.work, options.layers).result()
    rows = compare(options)
    if options.out:
        machine.append(options.out, FIELDS, rows)


if __name__ == "__main__":
    main()
