"""What does one candidate cost once base and experts are in memory? Every element-wise preset, beside a copy.

    python benchmarks/engine.py [--out FILE.csv] [--mergekit /path/to/mergekit-yaml --work FOLDER]
    python benchmarks/engine.py --all [--threads 1] [--out FILE.csv] [--mergekit ... --work ...]
    python benchmarks/engine.py --device cuda --size 7b

A synthetic Llama and three experts (bfloat16 or ``--dtype``, fixed seeds) are made in memory. Two worker processes run one after the
other: the first finds an empty compile cache, the second the first one's. Each gives every preset a new engine and times
its first candidate; the second worker then times warm candidates, new coefficients and new densities, in turn with a copy
that moves as many bytes as the merge must (base and experts read, result written). Medians and, of ratios to the
neighbouring copy, medians of ratios. CPU seconds are those of all threads of the worker: on a shared machine they are the
steadier measure. ``--all`` is the whole table: every preset at 80 M parameters, then TIES, DARE-TIES and task arithmetic at
400 M, where alone mergekit runs. With --mergekit the same weights are merged from disk to disk by that program (TIES and DARE-TIES), once.

On a GPU weights are made there, seconds are the device's events, and `roofline` is the share of the copy's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import cold_merge
import machine
import torch
from torch import Tensor

from merge_search.engine.codegen.compiler import TARGET_VARIABLE
from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.presets import PRESETS, preset

EXPERTS = cold_merge.EXPERTS
SIZES: dict[str, dict[str, int]] = {
    "80m": {**cold_merge.SHAPE, "num_hidden_layers": 1},
    "0.4b": cold_merge.SHAPE,
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
}
NAMES = [
    name for name, p in PRESETS.items() if "operator" not in p.settings and "post" not in p.settings
]  # element-wise, all of them
PASSED_ON = ("device", "size", "layers", "repeats", "threads", "cache-bytes", "dtype")  # to the workers
FIELDS = [
    "date", "commit", "machine", "device", "threads", "preset", "size", "parameters", "experts", "dtype", "compiled",
    "first_cold_s", "first_cold_cpu_s", "first_warm_cache_s", "first_warm_cache_cpu_s",
    "coefficients_s", "coefficients_cpu_s", "densities_s", "densities_cpu_s", "repeats",
    "copy_s", "copy_cpu_s", "copy_gb_per_s", "coefficients_to_copy", "densities_to_copy", "to_ties", "roofline",
    "mergekit_s", "mergekit_cpu_s", "mergekit_to_candidate", "mergekit_cpu_to_candidate", "torch", "python",
]  # fmt: skip
MERGEKIT = {"ties": "ties", "dare_ties": "dare_ties", "task_arithmetic": "task_arithmetic"}  # preset -> method
LARGE = ["ties", "dare_ties", "task_arithmetic"]

# ------------------------------------------------------------------------------------------------ weights


def make(shape: Mapping[str, int], device: torch.device, dtype: torch.dtype) -> MemoryTensors:
    """The weights of `cold_merge` on a CPU; like them on a GPU."""
    cold_merge.SHAPE.update(shape)
    base: dict[str, Tensor] = {}
    experts: dict[str, dict[str, Tensor]] = {e: {} for e in EXPERTS}
    plain = torch.Generator(device).manual_seed(0)
    own = [torch.Generator(device).manual_seed(i + 1) for i in range(len(EXPERTS))]
    for name, size in cold_merge.shapes(shape["num_hidden_layers"]):
        weight = torch.randn(size, generator=plain, device=device) * 0.02 + (1.0 if len(size) == 1 else 0.0)
        base[name] = weight.to(dtype)
        for e, generator in zip(EXPERTS, own, strict=True):
            experts[e][name] = (weight + torch.randn(size, generator=generator, device=device) * 0.002).to(dtype)
    return MemoryTensors(base, experts, statistics=_Squares(experts))


class _Squares(Mapping[tuple[str, str, str], Tensor]):
    """Stands for statistics measured on data: squared weights of the expert, made when first asked for."""

    def __init__(self, experts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.experts = experts
        self.made: dict[tuple[str, str], Tensor] = {}

    def __getitem__(self, key: tuple[str, str, str]) -> Tensor:
        kind, expert, name = key
        if kind.startswith("map:"):
            raise KeyError(key)
        if (expert, name) not in self.made:
            self.made[expert, name] = self.experts[expert][name].float().square()
        return self.made[expert, name]

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        return (("any", e, name) for e, tensors in self.experts.items() for name in tensors)

    def __len__(self) -> int:
        return sum(1 for _ in self)


# ------------------------------------------------------------------------------------------------ one worker


def _cpu() -> float:
    """CPU seconds of this process and of the compilers it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Clock:
    """(seconds, CPU seconds) of a call; on a GPU the first are those between two events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        cpu = _cpu()
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000, _cpu() - cpu
        wall = time.perf_counter()
        call()
        return time.perf_counter() - wall, _cpu() - cpu


class Copy:
    """Copies that read and write as many bytes as a merge: (1 + experts) reads and one write of a model."""

    def __init__(self, tensors: MemoryTensors, views: Mapping[str, Tensor], clock: Clock) -> None:
        sources = [{n: tensors.base(n) for n in views}]
        sources += [{n: tensors.expert(e, n) for n in views} for e in EXPERTS]
        total = sum(t.numel() for t in views.values())
        due = total * (len(sources) + 1) / 2  # every element copied is read and written
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for source in sources:
            for name, out in views.items():
                flat = source[name].reshape(-1)[: max(0, round(due))]
                due -= flat.numel()
                if flat.numel():
                    self.pairs.append((out.view(-1)[: flat.numel()], flat))
        self.bytes = 2 * sum(a.numel() * a.element_size() for a, _ in self.pairs)
        self.clock = clock
        unit = 0 if clock.device.type == "cuda" else 1
        parts = [
            (a, b) for x, y in self.pairs for a, b in zip(torch.split(x, 2**18), torch.split(y, 2**18), strict=True)
        ]
        forms = [self.pairs, parts]
        costs = [min(self.clock(partial(self._run, form))[unit] for _ in range(3)) for form in forms]
        self.pairs = forms[costs.index(min(costs))]

    @staticmethod
    def _run(pairs: list[tuple[Tensor, Tensor]]) -> None:
        for out, source in pairs:
            out.copy_(source)

    def __call__(self) -> tuple[float, float]:
        return self.clock(partial(self._run, self.pairs))


def candidates(name: str, tensors: MemoryTensors, kind: str) -> Iterator[Any]:
    """Recipes that differ in every group in what `kind` says."""
    for i in range(1000):
        if kind == "coefficients":
            yield preset(name, tensors.models, coefficients=0.3 + 0.01 * i)
        else:
            yield preset(name, tensors.models, densities=0.31 + 0.013 * (i % 40))


def worker(options: argparse.Namespace) -> None:
    """Measure; one JSON line a preset on stdout."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device, clock = torch.device(options.device), Clock(torch.device(options.device))
    tensors = make(SIZES[options.size] | {"num_hidden_layers": options.layers}, device, getattr(torch, options.dtype))
    views = {name: torch.empty_like(tensors.base(name)) for name in tensors.groups}
    for view in views.values():
        view.zero_()
    copy = Copy(tensors, views, clock) if options.warm else None
    for name in options.presets:
        torch._dynamo.reset()
        engine = MergeEngine(tensors, compile="auto" if options.compile else False, cache_bytes=options.cache_bytes)
        first = clock(partial(engine.apply, preset(name, tensors.models), views))
        row: dict[str, Any] = {"preset": name, "first": first, "compiled": engine.is_compiled}
        for kind in ("coefficients", "densities"):
            if copy is None or (kind == "densities" and PRESETS[name].density is None):
                continue
            recipes = candidates(name, tensors, kind)
            engine.apply(next(recipes), views)
            row[kind] = []
            for _ in range(options.repeats):
                beside, recipe = copy(), next(recipes)
                engine.forget()
                row[kind].append((*clock(partial(engine.apply, recipe, views)), *beside))
        row["bytes"] = copy.bytes if copy else 0
        row["parameters"] = sum(v.numel() for v in views.values())
        print(json.dumps(row), flush=True)


# ------------------------------------------------------------------------------------------------ the table


def run_worker(options: argparse.Namespace, cache: str, *, warm: bool) -> Iterator[dict[str, Any]]:
    given = {name: getattr(options, name.replace("-", "_")) for name in PASSED_ON}
    command = [sys.executable, __file__, "--worker", "--presets", *options.presets]
    command += [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    command += ["--warm"] * warm + ["--no-compile"] * (not options.compile)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    if options.march:
        environment[TARGET_VARIABLE] = options.march
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)
    if process.wait():
        sys.exit("the worker failed")


def mergekit(options: argparse.Namespace) -> dict[str, cold_merge.Cost]:
    """Seconds of mergekit from disk to disk, by preset."""
    if not options.mergekit:
        return {}
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    cold_merge.SHAPE.update(SIZES[options.size])
    cold_merge.make_models(work, options.layers)
    costs = {}
    for name, method in MERGEKIT.items():
        if name in options.presets:
            cold_merge.prepare_cache(work, drop=False)
            with tempfile.TemporaryDirectory(dir=work) as out:
                command = [options.mergekit, str(cold_merge.write_file(work, method)), out, "--lazy-unpickle"]
                costs[name] = cold_merge.measure(command, options.threads or torch.get_num_threads())
            print(f"mergekit {method}: {costs[name].wall:.1f} s, CPU {costs[name].cpu:.1f} s", flush=True)
    return costs


def summary(row: dict[str, Any], cold: tuple[float, float], ties: list[float], theirs: cold_merge.Cost | None) -> dict[str, Any]:  # fmt: skip
    """One line of the table; `ties`: CPU-to-copy ratio of TIES, if it ran before."""
    median, result = statistics.median, {"preset": row["preset"], "compiled": row["compiled"]}
    unit = 0 if row["cuda"] else 1  # ratios: device seconds on a GPU, CPU seconds on a CPU
    result |= {"first_cold_s": cold[0], "first_cold_cpu_s": cold[1]}
    result |= {"first_warm_cache_s": row["first"][0], "first_warm_cache_cpu_s": row["first"][1]}
    for kind in ("coefficients", "densities"):
        if kind in row:
            result |= {f"{kind}_s": median(r[0] for r in row[kind]), f"{kind}_cpu_s": median(r[1] for r in row[kind])}
            result[f"{kind}_to_copy"] = median(r[unit] / r[2 + unit] for r in row[kind])
    runs = row["coefficients"]
    result |= {"copy_s": median(r[2] for r in runs), "copy_cpu_s": median(r[3] for r in runs), "repeats": len(runs)}
    result["copy_gb_per_s"] = row["bytes"] / result["copy_s"] / 1e9
    if row["cuda"]:
        result["roofline"] = 1 / result["coefficients_to_copy"]
    if row["preset"] == "ties":
        ties.append(result["coefficients_to_copy"])
    if ties:
        result["to_ties"] = max(result["coefficients_to_copy"], result.get("densities_to_copy", 0)) / ties[0]
    if theirs:
        slowest, slowest_cpu = (
            max(result[f"coefficients_{u}"], result.get(f"densities_{u}", 0)) for u in ("s", "cpu_s")
        )
        result |= {"mergekit_s": theirs.wall, "mergekit_cpu_s": theirs.cpu}
        result |= {
            "mergekit_to_candidate": theirs.wall / slowest,
            "mergekit_cpu_to_candidate": theirs.cpu / slowest_cpu,
        }
    return result


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    options.layers = options.layers or SIZES[options.size]["num_hidden_layers"]
    theirs = mergekit(options)
    options.method, options.drop_cache, options.cores = "", False, os.cpu_count()
    known = cold_merge.describe(options)
    known |= {
        "dtype": options.dtype,
        "size": options.size,
        "device": options.device,
        "threads": options.threads or torch.get_num_threads(),
    }
    rows: list[dict[str, Any]] = []
    ties: list[float] = []
    with tempfile.TemporaryDirectory() as cache:
        cold = {r["preset"]: r["first"] for r in run_worker(options, cache, warm=False)}
        for row in run_worker(options, cache, warm=True):
            row["cuda"] = options.device != "cpu"
            found = summary(row, cold[row["preset"]], ties, theirs.get(row["preset"]))
            found = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}
            print({k: v for k, v in found.items() if k != "compiled"}, flush=True)
            rows.append({k: v for k, v in {**known, "parameters": row["parameters"], **found}.items() if k in FIELDS})
            if options.out:
                machine.append(options.out, FIELDS, rows[-1:])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SIZES, default="0.4b")
    parser.add_argument("--layers", type=int, default=0, help="another depth, for a quick look")
    parser.add_argument("--presets", nargs="+", choices=NAMES, default=NAMES, metavar="PRESET")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--cache-bytes", type=int, help="for what the engine stores per element; default: its own")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the weights"
    )
    parser.add_argument("--march", help="compile loops for this processor, such as x86-64-v3; default: this machine's")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--mergekit", help="the program; with --work")
    parser.add_argument("--work", type=Path, help="folder for models on disk, about six times their size")
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    parser.add_argument("--all", action="store_true", help="every preset at 80 M parameters, three of them at 400 M")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if bool(options.mergekit) != bool(options.work):
        parser.error("--mergekit and --work go together")
    options.presets = sorted(options.presets, key=lambda n: n != "ties")  # the others are compared with it
    options.layers = options.layers or SIZES[options.size]["num_hidden_layers"]
    if options.worker:
        worker(options)
    elif options.all:
        large = argparse.Namespace(**{**vars(options), "size": "0.4b", "layers": 0, "presets": LARGE})
        measure(argparse.Namespace(**{**vars(options), "size": "80m", "layers": 0, "mergekit": None}))
        measure(large)
    else:
        measure(options)


if __name__ == "__main__":
    main()
