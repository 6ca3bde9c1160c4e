"""Measure what one candidate costs once base and experts are in memory: every element-wise preset, beside a copy.

    python benchmarks/engine.py [--out FILE.csv] [--mergekit /path/to/mergekit-yaml --work FOLDER]
    python benchmarks/engine.py --all [--threads 1] [--out FILE.csv] [--mergekit ... --work ...]
    python benchmarks/engine.py --device cuda --size 7b
    python benchmarks/engine.py --size 80m --threads 1 --presets ties della --beside /path/to/another/checkout

The program makes a synthetic Llama and three experts in memory (fixed seeds). It runs two worker processes,
one after the other: the first starts with an empty compile cache, the second with the cache that the first one filled.
Each worker makes a new engine for every preset and times its first candidate. The second worker then times warm
candidates, first with new coefficients and then with new densities. Each of them alternates with a copy, from base and
experts into one model, that moves as many bytes as the merge must. The table holds medians. A ratio is taken to the
neighbouring copy, and the median of these ratios is reported. CPU seconds are those of all threads of the worker,
which on a shared machine is the steadier measure.

``--all`` measures the whole table: every preset at 80 M parameters, then TIES, DARE-TIES and task arithmetic at 400 M,
where alone mergekit runs. With ``--mergekit`` that program merges the same weights from disk to disk, once for each of
these three presets.

``--beside CHECKOUT`` compares this checkout with another one, which may be older or newer. Both run their own
``benchmarks/engine.py --worker``, in turn, ``--rounds`` times each. Every figure is a ratio, this checkout's over the
other's, taken within each round (`beside.py`).

On a GPU the weights are made there and seconds are measured by the device's events. `roofline` is the share of the
copy's bandwidth that the merge reaches.
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

import beside
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
NAMES = [name for name, p in PRESETS.items() if "operator" not in p.settings and "post" not in p.settings]
"""Every element-wise preset."""
PASSED_ON = ("device", "size", "layers", "repeats", "threads", "cache-bytes", "dtype")
"""Options that each worker gets as they are."""
FIELDS = [
    "date", "commit", "machine", "device", "threads", "preset", "size", "parameters", "experts", "dtype", "compiled",
    "first_cold_s", "first_cold_cpu_s", "first_warm_cache_s", "first_warm_cache_cpu_s",
    "coefficients_s", "coefficients_cpu_s", "densities_s", "densities_cpu_s", "repeats",
    "copy_s", "copy_cpu_s", "copy_gb_per_s", "coefficients_to_copy", "densities_to_copy", "to_ties", "roofline",
    "mergekit_s", "mergekit_cpu_s", "mergekit_to_candidate", "mergekit_cpu_to_candidate", "torch", "python",
]  # fmt: skip
MERGEKIT = {"ties": "ties", "dare_ties": "dare_ties", "task_arithmetic": "task_arithmetic"}
"""mergekit's method, by preset."""
LARGE = ["ties", "dare_ties", "task_arithmetic"]

# ------------------------------------------------------------------------------------------------ weights


def make(shape: Mapping[str, int], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> MemoryTensors:
    """Make base and experts in memory. On a CPU they are the weights of `cold_merge`, on a GPU weights like them."""
    cold_merge.SHAPE.update(shape)
    base: dict[str, Tensor] = {}
    experts: dict[str, dict[str, Tensor]] = {e: {} for e in EXPERTS}
    shared = torch.Generator(device).manual_seed(0)
    of_expert = [torch.Generator(device).manual_seed(i + 1) for i in range(len(EXPERTS))]
    for name, size in cold_merge.shapes(shape["num_hidden_layers"]):
        weight = torch.randn(size, generator=shared, device=device) * 0.02 + (1.0 if len(size) == 1 else 0.0)
        base[name] = weight.to(dtype)
        for e, generator in zip(EXPERTS, of_expert, strict=True):
            experts[e][name] = (weight + torch.randn(size, generator=generator, device=device) * 0.002).to(dtype)
    return MemoryTensors(base, experts, statistics=_Squares(experts))


class _Squares(Mapping[tuple[str, str, str], Tensor]):
    """Stand-in for statistics measured on data: the expert's squared weights, computed on first use."""

    def __init__(self, experts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.experts = experts
        self.squares: dict[tuple[str, str], Tensor] = {}

    def __getitem__(self, key: tuple[str, str, str]) -> Tensor:
        kind, expert, name = key
        if kind.startswith("map:"):
            raise KeyError(key)
        if (expert, name) not in self.squares:
            self.squares[expert, name] = self.experts[expert][name].float().square()
        return self.squares[expert, name]

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        return (("any", e, name) for e, tensors in self.experts.items() for name in tensors)

    def __len__(self) -> int:
        return sum(1 for _ in self)


# ------------------------------------------------------------------------------------------------ one worker


def _cpu() -> float:
    """CPU seconds of this process and of the compilers that it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Clock:
    """Measure (seconds, CPU seconds) of a call. On a GPU the seconds are those between two events."""

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
    """A copy that moves as many bytes as a merge: it reads (1 + experts) models and writes one."""

    def __init__(self, tensors: MemoryTensors, views: Mapping[str, Tensor], clock: Clock) -> None:
        sources = [{n: tensors.base(n) for n in views}]
        sources += [{n: tensors.expert(e, n) for n in views} for e in EXPERTS]
        total = sum(t.numel() for t in views.values())
        due = total * (len(sources) + 1) / 2  # each copied element counts twice: it is read and written
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
    """Recipes whose coefficients (or densities, by `kind`) differ from each other in every group."""
    for i in range(1000):
        if kind == "coefficients":
            yield preset(name, tensors.models, coefficients=0.3 + 0.01 * i)
        else:
            yield preset(name, tensors.models, densities=0.31 + 0.013 * (i % 40))


def worker(options: argparse.Namespace) -> None:
    """Measure every preset and print one line of JSON for each."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device, clock = torch.device(options.device), Clock(torch.device(options.device))
    dtype = getattr(torch, options.dtype or "bfloat16")
    tensors = make(SIZES[options.size] | {"num_hidden_layers": options.layers}, device, dtype)
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
                copied, recipe = copy(), next(recipes)
                engine.forget()
                row[kind].append((*clock(partial(engine.apply, recipe, views)), *copied))
        row["bytes"] = copy.bytes if copy else 0
        row["parameters"] = sum(v.numel() for v in views.values())
        print(json.dumps(row), flush=True)


# ------------------------------------------------------------------------------------------------ the table


def run_worker(
    options: argparse.Namespace, cache: str, *, warm: bool, checkout: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Start one worker and yield its rows.

    Args:
        options: The command line.
        cache: Folder of the compile cache.
        warm: Whether the worker times warm candidates too.
        checkout: The checkout whose worker runs, on its own code. Default: this one, on the code that is installed.
    """
    given = {name: getattr(options, name.replace("-", "_")) for name in PASSED_ON}
    program = __file__ if checkout is None else str(checkout / "benchmarks" / "engine.py")
    command = [sys.executable, program, "--worker", "--presets", *options.presets]
    command += [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    command += ["--warm"] * warm + ["--no-compile"] * (not options.compile)
    environment = {
        **(os.environ if checkout is None else beside.environment(checkout)), "TORCHINDUCTOR_CACHE_DIR": cache,
    }  # fmt: skip
    if options.march:
        environment[TARGET_VARIABLE] = options.march
    process = subprocess.Popen(command, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)
    if process.wait():
        sys.exit(f"the worker failed: {' '.join(command)}")


def mergekit(options: argparse.Namespace) -> dict[str, cold_merge.Cost]:
    """What mergekit's merge costs from disk to disk, by preset."""
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


def summary(
    row: dict[str, Any], cold: tuple[float, float], ties: list[float], mergekit_cost: cold_merge.Cost | None
) -> dict[str, Any]:
    """One line of the table.

    Args:
        row: What the second worker measured.
        cold: Cost of the first candidate with an empty compile cache.
        ties: The ratio of TIES to a copy, once TIES has been measured. This function adds it.
        mergekit_cost: What mergekit's merge costs, where it ran.
    """
    median, result = statistics.median, {"preset": row["preset"], "compiled": row["compiled"]}
    unit = 0 if row["cuda"] else 1  # ratios compare device seconds on a GPU and CPU seconds on a CPU
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
    if mergekit_cost:
        slowest, slowest_cpu = (
            max(result[f"coefficients_{u}"], result.get(f"densities_{u}", 0)) for u in ("s", "cpu_s")
        )
        result |= {"mergekit_s": mergekit_cost.wall, "mergekit_cpu_s": mergekit_cost.cpu}
        result |= {
            "mergekit_to_candidate": mergekit_cost.wall / slowest,
            "mergekit_cpu_to_candidate": mergekit_cost.cpu / slowest_cpu,
        }
    return result


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every preset with both workers, print the table and return its rows."""
    options.layers = options.layers or SIZES[options.size]["num_hidden_layers"]
    mergekit_costs = mergekit(options)
    options.method, options.drop_cache, options.cores = "", False, os.cpu_count()
    known = cold_merge.describe(options)
    known |= {"dtype": options.dtype or "bfloat16", "size": options.size}
    known |= {"device": options.device, "threads": options.threads or torch.get_num_threads()}
    rows: list[dict[str, Any]] = []
    ties: list[float] = []
    with tempfile.TemporaryDirectory() as cache:
        cold = {r["preset"]: r["first"] for r in run_worker(options, cache, warm=False)}
        for row in run_worker(options, cache, warm=True):
            row["cuda"] = options.device != "cpu"
            line = summary(row, cold[row["preset"]], ties, mergekit_costs.get(row["preset"]))
            line = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}
            print({k: v for k, v in line.items() if k != "compiled"}, flush=True)
            rows.append({k: v for k, v in {**known, "parameters": row["parameters"], **line}.items() if k in FIELDS})
            if options.out:
                machine.append(options.out, FIELDS, rows[-1:])
    return rows


# ------------------------------------------------------------------------------------------------ two checkouts


def figures(row: dict[str, Any], *, is_first_round: bool) -> dict[tuple[str, str], float]:
    """What is compared of one preset: CPU seconds of a candidate, alone and as a multiple of the neighbouring copy.

    The first candidate of the first round compiles, so it is left out.
    """
    unit, name = (0 if row["cuda"] else 1), row["preset"]
    result = {} if is_first_round else {(name, "first candidate, CPU s"): row["first"][1]}
    for kind in ("coefficients", "densities"):
        if kind in row:
            result[name, f"new {kind}, s" if row["cuda"] else f"new {kind}, CPU s"] = statistics.median(
                r[unit] for r in row[kind]
            )
            result[name, f"new {kind}, to a copy"] = statistics.median(r[unit] / r[2 + unit] for r in row[kind])
    return result


def measure_beside(options: argparse.Namespace) -> None:
    """Measure this checkout and another one in turn and report the ratios."""
    folders = beside.checkouts(options.beside)
    measured: dict[str, list[dict[tuple[str, str], float]]] = {name: [] for name in folders}
    with tempfile.TemporaryDirectory() as caches:
        for number, order in enumerate(beside.rounds(list(folders), options.rounds)):
            for name in order:
                found: dict[tuple[str, str], float] = {}
                for row in run_worker(options, f"{caches}/{name}", warm=True, checkout=folders[name]):
                    row["cuda"] = options.device != "cpu"
                    found |= figures(row, is_first_round=number == 0)
                measured[name].append(found)
            print(f"round {number + 1} of {options.rounds} measured", flush=True)
    beside.report(beside.ratios(measured), options.beside, options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SIZES, default="0.4b")
    parser.add_argument("--layers", type=int, default=0, help="another depth, for a quick look")
    parser.add_argument("--presets", nargs="+", choices=NAMES, default=NAMES, metavar="PRESET")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--cache-bytes", type=int, help="for what the engine stores per element; default: its own")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="of the weights; default: bfloat16")
    parser.add_argument("--march", help="compile loops for this processor, such as x86-64-v3; default: this machine's")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--mergekit", help="the program; with --work")
    parser.add_argument("--work", type=Path, help="folder for models on disk, about six times their size")
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    parser.add_argument("--all", action="store_true", help="every preset at 80 M parameters, three of them at 400 M")
    beside.add_options(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if bool(options.mergekit) != bool(options.work):
        parser.error("--mergekit and --work go together")
    options.presets = sorted(options.presets, key=lambda n: n != "ties")  # TIES first: the others are compared with it
    options.layers = options.layers or SIZES[options.size]["num_hidden_layers"]
    if options.worker:
        worker(options)
    elif options.beside:
        measure_beside(options)
    elif options.all:
        large = argparse.Namespace(**{**vars(options), "size": "0.4b", "layers": 0, "presets": LARGE})
        measure(argparse.Namespace(**{**vars(options), "size": "80m", "layers": 0, "mergekit": None}))
        measure(large)
    else:
        measure(options)


if __name__ == "__main__":
    main()
