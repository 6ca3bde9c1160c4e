#!/usr/bin/env python3
"""Write data/bits.json: what the merges of `fixed_cases` are, for `test_same_bits.py`.

    python tests/compatibility/record_bits.py

The committed file was written by version 0.1.0 (commit efa8786). To write it anew says that merges may change: give the
reason in CHANGELOG.md, and the version here. A case that was added can be recorded alone: cases that are in the file
already are kept unless ``--all`` is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))

from fixed_cases import SETS, result  # noqa: E402

import merge_search  # noqa: E402

FILE = HERE / "data" / "bits.json"


def main() -> None:
    """Merge every case that is not in the file, by the command line, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--all", action="store_true", help="record every case anew")
    parser.add_argument("--out", type=Path, default=FILE, help="another file than data/bits.json")
    arguments = parser.parse_args()
    known: dict[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() and not arguments.all else {}
    data: dict[str, Any] = {"version": known.get("version", merge_search.__version__)}
    with tempfile.TemporaryDirectory() as folder:
        for name, models in SETS.items():
            root = models.write(Path(folder) / name.replace(" ", "_"))
            before = known.get(name, {})
            data[name] = {case: before[case] if case in before else result(models, case, root) for case in models.cases}
            print(f"{name}: {len(data[name])} cases, {len(data[name].keys() - before.keys())} recorded now")
    lines = ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in data.items())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("{\n" + lines + "\n}\n")


def _lines(value: Any) -> str:
    """A case a line."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(value.items())) + "\n}"


if __name__ == "__main__":
    main()
