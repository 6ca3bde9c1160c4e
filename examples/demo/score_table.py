#!/usr/bin/env python3
"""Score the demo's checkpoints and the simplest merges with lm-eval, and print a markdown table.

The last row (`--fit STEPS`) shows how much there is to win: one coefficient per expert and block
(embedding and final norm are a group of their own), fitted by gradient on rows of the train splits.

Usage: python score_table.py [--limit 800] [--fit 100]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from make_models import collate, encode_row
from transformers import AutoModelForCausalLM, AutoTokenizer

Tensors = dict[str, torch.Tensor]
METRICS = ("acc,none", "exact_match,line")


def load(folder: Path) -> Tensors:
    """A checkpoint's tensors in float32 (the tied output layer is left out)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def block_of(name: str) -> int:
    """Index of a tensor's coefficient: 0 for what lies outside the blocks, 1 + block inside them."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) + 1 if "layers" in parts else 0


def combine(base: Tensors, taus: list[Tensors], coefficients: torch.Tensor) -> Tensors:
    """base + sum over experts of coefficient[expert, block] * task vector."""
    return {
        name: value + sum(coefficients[i, block_of(name)] * tau[name] for i, tau in enumerate(taus))
        for name, value in base.items()
    }


class Scorer:
    """lm-eval on one model whose tensors are exchanged in place."""

    def __init__(self, folder: Path, tasks: list[str], limit: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder / "models/base", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "models/base")
        self.lm = HFLM(pretrained=self.model, tokenizer=tokenizer, batch_size=64, device="cpu")
        self.manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        self.tasks, self.limit = tasks, limit

    def __call__(self, tensors: Tensors) -> list[float]:
        """One score per task."""
        self.model.load_state_dict(tensors, strict=False)
        out: Any = lm_eval.simple_evaluate(
            model=self.lm, tasks=self.tasks, task_manager=self.manager, limit=self.limit,
            bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
        return [next(out["results"][t][m] for m in METRICS if m in out["results"][t]) for t in self.tasks]


def fit(folder: Path, names: list[str], base: Tensors, taus: list[Tensors], steps: int) -> torch.Tensor:
    """Per-block coefficients by Adam on the answers of 1,000 train rows per task."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/base")
    model = AutoModelForCausalLM.from_pretrained(folder / "models/base", dtype=torch.float32).eval()
    train = []
    for name in names:
        with open(folder / f"tasks/demo_{name}/train.jsonl") as lines:
            train.append([encode_row(tokenizer, json.loads(line)) for line in lines][:1000])
    groups = max(map(block_of, base)) + 1
    coefficients = torch.full((len(taus), groups), 1 / len(taus), requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=0.03)
    for _ in range(steps):
        merged, loss = combine(base, taus, coefficients), torch.tensor(0.0)
        for rows in train:
            tokens, labels = collate(rng.sample(rows, 32), tokenizer.pad_token_id)
            call = {"input_ids": tokens, "use_cache": False}
            logits = torch.func.functional_call(model, merged, kwargs=call).logits[:, :-1]
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return coefficients.detach()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--limit", type=int, default=800, help="test rows per task")
    parser.add_argument("--fit", type=int, default=100, help="Adam steps of the last row; 0: leave it out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    folder = args.folder.resolve()
    os.chdir(folder / "tasks")  # lm-eval reads relative data_files from the current directory

    names = sorted(p.name for p in (folder / "models").iterdir() if p.name != "base")
    base = load(folder / "models/base")
    experts = {name: load(folder / "models" / name) for name in names}
    taus = [{key: value[key] - base[key] for key in base} for value in experts.values()]
    scorer = Scorer(folder, [f"demo_{name}" for name in names], args.limit)
    shape = (len(taus), max(map(block_of, base)) + 1)
    print("| model | " + " | ".join(names) + " | mean |\n|---|" + "---|" * (len(names) + 1))

    def show(label: str, tensors: Tensors) -> list[float]:
        scores = scorer(tensors)
        cells = [f"{score:.3f}" for score in [*scores, sum(scores) / len(scores)]]
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
        return scores

    show("base", base)
    own = [show(f"expert {name}", tensors)[i] for i, (name, tensors) in enumerate(experts.items())]
    cells = [f"{score:.3f}" for score in [*own, sum(own) / len(own)]]
    print("| *own expert on each task* | " + " | ".join(cells) + " |")
    show("plain average of the experts", combine(base, taus, torch.full(shape, 1 / len(taus))))
    for scale in (0.3, 0.4, 0.5, 0.6, 0.8, 1.0):
        show(f"task arithmetic, lambda {scale}", combine(base, taus, torch.full(shape, scale)))
    if args.fit:
        best = fit(folder, names, base, taus, args.fit)
        show(f"one coefficient per expert and block, {args.fit} gradient steps", combine(base, taus, best))


if __name__ == "__main__":
    main()
