"""A tiny SASRec, an expert for each of three markets and their logs, made by the script of ``examples/recommender``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_vision import script

MARKETS = ("north", "south", "east")


def write(folder: Path) -> Path:
    """Write ``models/`` and ``data/``: 40 items, two blocks, hidden size 16, trained for a second."""
    script("recommender").make(
        folder, n_items=40, hidden=16, layers=2, n_train=300, n_test=120, base_steps=20, expert_steps=60, lr=1e-2
    )
    return folder


def load(folder: Path, name: str = "base") -> Any:
    from merge_search.engine.architectures.sasrec import SasRec

    return SasRec.from_pretrained(folder / "models" / name).eval()


def options(**north: Any) -> dict[str, Any]:
    """Options of ``ranking``; `north` are options of the first task."""
    tasks = {m: {"data": f"data/{m}/test.dat"} for m in MARKETS}
    tasks["north"] |= {"train": "data/north/train.dat", **north}
    return {"tasks": tasks, "k": [5, 2], "batch_size": 32}
