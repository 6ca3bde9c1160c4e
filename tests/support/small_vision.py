"""A tiny ViT, three experts with heads and their images, made by the script of ``examples/vision``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

TASKS = ("shapes", "digits", "textures")
SCRIPTS = Path(__file__).parent.parent.parent / "examples"


def script(example: str) -> ModuleType:
    """``make_models.py`` of an example, as a module."""
    spec = importlib.util.spec_from_file_location(f"make_{example}", SCRIPTS / example / "make_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path) -> Path:
    """Write ``models/`` and ``data/``: two blocks, hidden size 16, trained for a second."""
    script("vision").make(folder, hidden=16, layers=2, n_train=240, n_test=150, base_steps=10, expert_steps=40, lr=3e-3)
    return folder


def options(**first: Any) -> dict[str, Any]:
    """Options of ``image_classification``; `first` are options of the task ``shapes``."""
    files = {t: {"data": f"data/{t}/test.npz", "head": f"models/{t}/head.safetensors"} for t in TASKS}
    for task in ("shapes", "digits"):
        files[task]["train"] = f"data/{task}/train.npz"
    return {"tasks": {**files, "shapes": {**files["shapes"], **first}}, "batch_size": 50}
