"""Do two versions make the same models? Every tensor of many merges, by both, on this machine.

    python benchmarks/same_bits.py BEFORE_CHECKOUT [AFTER_CHECKOUT] [--sets demo,llama] [--only TEXT] [--zoo FOLDER]

Without AFTER_CHECKOUT: the one that this file lies in. Each checkout runs in a process of its own, with this
interpreter and ``PYTHONPATH``; there every case goes through ``python -m merge_search merge FILE OUT``, one after the
other. Cases are those of `tests/support/fixed_recipes.py` that need no statistics and no files of their own: presets
and their grids, rules of every stage, operators, post rules, mergekit's files. Each version makes the recipes from its
own presets; results are float32 where a recipe does not say otherwise. Sets of models:

    demo      the example's (bfloat16 Llama, 0.9 M parameters)
    llama     five layers of made-up numbers (float32)
    lm        ``lm/{base,intent,qtype,where}`` of the zoo (float32 Llama, 0.3 M parameters)
    encoder   ``encoder/{base,sst2,trec6,emotion}`` of the zoo (float16 BERT, 10 M parameters: with compiled loops)

A row a case: tensors written, how many of them and how many of the other files (config, recipe, model card) differ,
seconds. On one machine LAPACK's results are compared bit for bit, too. Exit status: 1 if anything differs, else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SUPPORT = HERE.parents[1] / "tests" / "support"
DEMO = HERE.parents[1] / "examples" / "demo" / "models"
ZOO = {"lm": ("intent", "qtype", "where"), "encoder": ("sst2", "trec6", "emotion")}
SETS = ("demo", "llama", *ZOO)
NEED_FILES = {
    "map: ", "adapter: ", "stage: fisher", "stage: gradient_product", "stage: activation_norm", "stage: apl",
    "stage: external",
}  # fmt: skip
LARGE = ("average", "ties", "dare_ties", "della", "breadcrumbs", "pcb", "cki_soft", "sce", "magnitude_hard", "cabs")
"""Presets that are merged of the encoders: one takes as long as twenty of the demo."""

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------ one version


def drive(sets: list[str], work: Path, only: str) -> None:
    """Merge all cases in this process; a line of JSON each."""
    import merge_search

    print(json.dumps({"version": str(Path(merge_search.__file__).resolve().parents[1])}), flush=True)
    for name in sets:
        for case, file in cases(name, work / name, only):
            began = time.perf_counter()
            row: Row = {"set": name, "case": case, "error": merge(file, work / "out")}
            row["seconds"] = time.perf_counter() - began
            row["tensors"], row["files"] = contents(work / "out")
            print(json.dumps(row), flush=True)
            shutil.rmtree(work / "out", ignore_errors=True)


def cases(models: str, folder: Path, only: str) -> Iterator[tuple[str, Path]]:
    """Name and file of every case, the file beside the models' folders."""
    import yaml

    sys.path.insert(0, str(SUPPORT))
    from fixed_recipes import MERGEKIT, recipes

    from merge_search.presets import PRESETS

    for name, recipe in recipes().items():
        preset = name.removeprefix("preset: ").partition(",")[0]
        needs_files = name.startswith(tuple(NEED_FILES)) or (preset in PRESETS and PRESETS[preset].needs_data)
        is_large = models == "encoder" and name not in {f"preset: {p}" for p in LARGE}
        if not needs_files and not is_large and models != "llama" and only in name:
            whole = recipe.model_copy(update={"dtype": recipe.dtype or "float32"})  # in which the last bit is seen
            (folder / "recipe.json").write_text(whole.to_json())
            yield name, folder / "recipe.json"
    for name, data in MERGEKIT.items():
        fits = models == "llama" or "slices" not in data  # which name five layers
        if fits and models != "encoder" and only in f"mergekit: {name}":
            (folder / "merge.yml").write_text(yaml.safe_dump(data))
            yield f"mergekit: {name}", folder / "merge.yml"


def merge(file: Path, out: Path) -> str:
    """``python -m merge_search merge FILE OUT`` in this process; what it says where it fails, else ''."""
    said = io.StringIO()
    sys.argv = ["merge-search", "merge", str(file), str(out), "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            runpy.run_module("merge_search", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return said.getvalue() if end.code else ""
    return ""


def contents(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """sha256 of every tensor, with its dtype and shape, and of every other file in an exported folder."""
    tensors: dict[str, str] = {}
    files: dict[str, str] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        if file.suffix != ".safetensors":
            files[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
            continue
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, t in header.items():
            begin, end = (start + at for at in t["data_offsets"])
            digest = hashlib.sha256(data[begin:end]).hexdigest()
            tensors[name] = f"{t['dtype']} {t['shape']} {digest}"
    return tensors, files


# ------------------------------------------------------------------------------------------------ both


def write_models(name: str, folder: Path, zoo: str) -> None:
    """``base``, ``a``, ``b`` and ``c`` in `folder`: links, or made-up numbers."""
    if name == "llama":
        sys.path.insert(0, str(SUPPORT))
        from fixed_models import LLAMA
        from fixed_models import write_models as write

        write(folder, LLAMA, "float32")
        return
    source = DEMO if name == "demo" else Path(zoo) / name
    experts = ("maths", "stories", "spelling") if name == "demo" else ZOO[name]
    folder.mkdir()
    for link, model in zip(("base", "a", "b", "c"), ("base", *experts), strict=True):
        (folder / link).symlink_to(source / model)


def results(checkout: Path, sets: list[str], work: Path, only: str) -> dict[tuple[str, str], Row]:
    """What a checkout's version made of every case."""
    command = [sys.executable, str(HERE), "--drive", str(work), "--sets", ",".join(sets), "--only", only]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    found: dict[tuple[str, str], Row] = {}
    with subprocess.Popen(command, env=environment, cwd=work, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            row = json.loads(line)
            if "version" in row:
                if Path(row["version"]) != checkout:
                    raise SystemExit(
                        f"{checkout} must be a checkout of merge-search; merge_search came from {row['version']}"
                    )
            else:
                found[row["set"], row["case"]] = row
    if process.returncode:
        raise SystemExit(f"the version in {checkout} did not reach the end (status {process.returncode})")
    return found


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names whose hashes are not the same in both."""
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def show(before: Mapping[tuple[str, str], Row], after: Mapping[tuple[str, str], Row]) -> int:
    """Print the table; how many cases differ."""
    print(f"{'models':8} {'case':44} {'tensors':>7} {'differ':>6} {'files':>5} {'before s':>8} {'after s':>8}")
    n_different = 0
    for key in dict.fromkeys([*before, *after]):
        one, two = before.get(key), after.get(key)
        if one is None or two is None:
            print(f"{key[0]:8} {key[1]:44} only one of the two versions has it")
            n_different += 1
            continue
        tensors, files = (differences(one[kind], two[kind]) for kind in ("tensors", "files"))
        n_different += bool(tensors or files or one["error"] != two["error"])
        numbers = f"{len(one['tensors']):7} {len(tensors):6} {len(files):5} {one['seconds']:8.2f} {two['seconds']:8.2f}"
        print(f"{key[0]:8} {key[1]:44} {numbers}")
        if named := [*tensors[:3], *files]:
            print(f"{'':8} differ: {', '.join(named)}")
        for version, row in (("before", one), ("after", two)):
            if row["error"]:
                print(f"{'':8} refused {version}: {row['error'].strip().splitlines()[-1]}")
    return n_different


def main() -> None:
    """Both versions, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="a checkout")
    parser.add_argument("after", type=Path, nargs="?", default=HERE.parents[1], help="another; this one if not given")
    parser.add_argument("--sets", default="demo,llama", help=f"of {', '.join(SETS)}")
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    parser.add_argument("--zoo", default=os.environ.get("MERGE_SEARCH_ZOO", ""), help="a folder of checkpoints")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sets = arguments.sets.split(",")
    if unknown := set(sets) - set(SETS):
        parser.error(f"there is no set {', '.join(sorted(unknown))}")
    if arguments.drive:
        drive(sets, arguments.drive, arguments.only)
        return
    if arguments.before is None:
        parser.error("name the checkout to compare with")
    if set(sets) & ZOO.keys() and not arguments.zoo:
        parser.error("--zoo must name the folder of the zoo")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        for name in sets:
            write_models(name, work / name, arguments.zoo)
        before = results(arguments.before.resolve(), sets, work, arguments.only)
        after = results(arguments.after.resolve(), sets, work, arguments.only)
    n_different = show(before, after)
    print(f"\n{len(before)} merges, {n_different} of them differ")
    sys.exit(1 if n_different or not before else 0)


if __name__ == "__main__":
    main()
