"""Small models and judges for the examples of docs/systems.md: a kit is a study file without what an example says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

__all__ = ["KITS"]

Study = dict[str, Any]
Kit = Callable[[Path, Path, pytest.TempPathFactory], Study]


def _study(models: Study, evaluate: list[Study]) -> Study:
    return {
        "study": {"name": "example", "seed": 0},
        "models": models,
        "evaluate": evaluate,
        "search": {"finalists": 1},
        "statistics": {"n_rows": 8},
        "device": "cpu",
    }


def language(folder: Path, demo: Path, temporary: pytest.TempPathFactory) -> Study:
    """The demo's language models."""
    experts = {e: str(demo / "models" / e) for e in ("maths", "stories")}
    tasks = {"evaluator": "lm_eval", "tasks": ["demo_maths", "demo_stories"], "include_path": str(demo / "tasks")}
    return _study(
        {"base": str(demo / "models" / "base"), "experts": experts, "dtype": "float32"},
        [{**tasks, "batch_size": 32, "limit": 24, "fit_limit": 24}],
    )


def prompts(folder: Path, demo: Path, temporary: pytest.TempPathFactory) -> Study:
    """The demo's language models, and texts: ``maths.jsonl``, ``stories.jsonl``, ``neutral.txt``."""
    for name in ("maths", "stories"):
        rows = (demo / "tasks" / f"demo_{name}" / "train.jsonl").read_text().splitlines()[:30]
        texts = [" ".join(str(value) for value in json.loads(row).values()) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "neutral.txt").write_text("\n".join(f"line {i} of a neutral text" for i in range(20)))
    return language(folder, demo, temporary)


def groups(folder: Path, demo: Path, temporary: pytest.TempPathFactory) -> Study:
    """Two tiny text encoders; ``toxic.jsonl`` with groups under ``dialect``, and ``toxic.safetensors``."""
    import tiny_encoder
    import torch

    tiny_encoder.write_two_tasks(folder)
    (folder / "animal.safetensors").rename(folder / "toxic.safetensors")
    rows = tiny_encoder.sentences(150, 2, seed=5)
    tiny_encoder.write_rows(
        folder / "toxic.jsonl", [{**row, "dialect": ["north", "south"][i % 3 == 0]} for i, row in enumerate(rows)]
    )
    for seed, name in enumerate(("base", "one", "two")):
        model, draw = tiny_encoder.make_encoder(), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * (seed > 0) * torch.randn(p.shape, generator=draw))
        model.save_pretrained(folder / name)
        tiny_encoder.make_tokenizer().save_pretrained(folder / name)
    return _study({"base": "base", "experts": {"one": "one", "two": "two"}}, [])


def vision(folder: Path, demo: Path, temporary: pytest.TempPathFactory) -> Study:
    """A tiny ViT and three experts with heads, in ``models/`` and ``data/`` as examples/vision has them."""
    import small_vision

    small_vision.write(folder)
    experts = {task: f"models/{task}" for task in small_vision.TASKS}
    judge = {"evaluator": "image_classification", **small_vision.options()}
    return _study({"base": "models/base", "experts": experts}, [judge])


def recommender(folder: Path, demo: Path, temporary: pytest.TempPathFactory) -> Study:
    """A tiny SASRec and an expert for each market, in ``models/`` and ``data/`` as examples/recommender has them."""
    import small_recommender

    small_recommender.write(folder)
    experts = {market: f"models/{market}" for market in small_recommender.MARKETS}
    judge = {"evaluator": "ranking", **small_recommender.options()}
    return _study({"base": "models/base", "experts": experts}, [judge])


def adapters(folder: Path, demo: Path, temporary: pytest.TempPathFactory) -> Study:
    """The demo's experts as LoRA adapters of rank 8."""
    from tiny_adapters import extract_adapter

    study, made, models = language(folder, demo, temporary), temporary.mktemp("adapters"), demo / "models"
    experts = {e: str(extract_adapter(models / "base", models / e, made / e, rank=8)) for e in ("maths", "stories")}
    return {**study, "models": {**study["models"], "experts": experts}}


def shapes(folder: Path, demo: Path, temporary: pytest.TempPathFactory) -> Study:
    """A tiny Llama of two blocks, a fine-tune of it, a wider one and an adapter."""
    from tiny_families import add_adapter, nudged, save, scrambled, write_family
    from tiny_lm import make_model

    write_family(folder, experts=("same",))
    save(scrambled(nudged(make_model(), 7), 3, n_more=2), folder / "wide")
    judge = {"evaluator": f"{Path(__file__).parent / 'token_judge.py'}:TokenJudge"}
    experts = {"same": "same", "wide": "wide", "lora": add_adapter(folder / "lora", str(folder / "base"))}
    return {**_study({"base": "base", "experts": experts}, [judge]), "objective": {"maximise": "rows"}}


KITS: dict[str, Kit] = {kit.__name__: kit for kit in (language, adapters, shapes, prompts, groups, vision, recommender)}
"""Kits by the name that the page gives them."""
