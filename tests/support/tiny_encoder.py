"""A tiny random encoder, its tokenizer and two classification tasks with fixed heads. Shared by several test files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from evaluators.classification.evaluator import Classification
from merge_search.evaluation import Split, SplitShares

WORDS = ("red", "green", "blue", "seven", "eight", "nine", "cat", "dog", "owl", "runs", "sleeps", "sings")
SCORED = (Split.SEARCH, Split.VALIDATION, Split.TEST)
SHARES = SplitShares()


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")


def make_encoder(hidden: int = 16) -> BertModel:
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=16,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        initializer_range=0.5,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def sentences(n: int, n_classes: int, *, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    texts: set[str] = set()
    while len(texts) < n:
        texts.add(" ".join(rng.choice(WORDS, size=rng.integers(2, 9))))
    return [{"text": text, "label": int(rng.integers(n_classes))} for text in sorted(texts)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_two_tasks(folder: Path) -> Path:
    """Write two tasks: `animal` (2 classes, with train rows) and `colour` (3 classes, labels by name)."""
    generator = torch.Generator().manual_seed(3)
    for name, n_classes in (("animal", 2), ("colour", 3)):
        weight = torch.randn(n_classes, 16, generator=generator)
        save_file(
            {"weight": weight, "bias": torch.randn(n_classes, generator=generator)}, folder / f"{name}.safetensors"
        )
    write_rows(folder / "animal.jsonl", sentences(60, 2, seed=1))
    write_rows(folder / "animal_train.jsonl", sentences(20, 2, seed=2))
    names = ["red", "green", "blue"]
    rows = [{"sentence": r["text"], "answer": names[r["label"]]} for r in sentences(50, 3, seed=3)]
    write_rows(folder / "colour.jsonl", rows)
    (folder / "colour.json").write_text(json.dumps({"labels": names}))
    return folder


def options(folder: Path, **animal: Any) -> dict[str, Any]:
    return {
        "include_path": [str(folder)],
        "batch_size": 8,
        "tasks": {
            "animal": {"data": "animal.jsonl", "train": "animal_train.jsonl", "head": "animal.safetensors", **animal},
            "colour": {
                "data": ["colour.jsonl"],
                "head": "colour.safetensors",
                "text": "sentence",
                "label": "answer",
                "labels": "colour.json",
                "pooling": "cls",
            },
        },
    }


def bound(folder: Path, model: BertModel | None = None, shares: SplitShares = SHARES, **animal: Any) -> Classification:
    evaluator = Classification(options(folder, **animal), shares=shares, seed=0)
    evaluator.bind(make_encoder() if model is None else model, make_tokenizer(), folder="")
    return evaluator


def direct_logits(model: BertModel, folder: Path, task: str, text: str) -> torch.Tensor:
    """Return the logits of one text without padding, with pooling and head written out. Shape (n_classes,)."""
    ids = [2, *(4 + WORDS.index(w) for w in text.split()), 3]
    hidden = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).last_hidden_state[0]
    pooled = hidden.mean(0) if task == "animal" else hidden[0]
    head = load_file(folder / f"{task}.safetensors")
    return head["weight"] @ pooled + head["bias"]


def documents(evaluator: Classification, task: str, split: Split) -> list[tuple[str, int]]:
    return [(row.text, row.label) for row in evaluator._tasks[task].scored[split]]
