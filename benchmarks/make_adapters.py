"""Trains LoRA adapters on the zoo's language model, one a task: experts for systems that merge pairs.

    MERGE_SEARCH_ZOO=... python benchmarks/make_adapters.py OUT [--tasks intent qtype where] [--rank 8] [--steps 600]

Each adapter is a folder that peft and merge-search load. One takes two to three minutes on one thread. A row is its
prompt and its answer with a line break. The prompt's tokens count a tenth in the loss, as for the zoo's full
fine-tunes. A folder that is there already is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPT_WEIGHT = 0.1
TOKENS = 2048
"""Of one batch, padding included."""
Row = tuple[list[int], int]
"""Tokens of prompt and answer, and how many are the prompt's."""


def read_rows(zoo: Path, task: str, tokenizer: Any) -> list[Row]:
    """The training rows of a task as tokens."""
    rows = []
    for line in (zoo / "data" / "lm" / task / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["query"])["input_ids"]
        rows.append((tokenizer(f"{row['query']} {row['answer']}\n")["input_ids"], len(prompt)))
    return rows


def batches(rows: list[Row], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of rows of similar length: token ids padded with zeros, and the weight of each as a target."""
    draw = random.Random(seed)
    while True:
        order = sorted(rows, key=lambda r: (len(r[0]), draw.random()))
        groups: list[list[Row]] = [[]]
        for row in order:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > TOKENS:
                groups.append([])
            groups[-1].append(row)
        draw.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids, weight = torch.zeros(len(group), width, dtype=torch.long), torch.zeros(len(group), width)
            for i, (tokens, n_prompt) in enumerate(group):
                ids[i, : len(tokens)] = torch.tensor(tokens)
                weight[i, : len(tokens)] = 1.0
                weight[i, :n_prompt] = PROMPT_WEIGHT
            yield ids, weight


def train(zoo: Path, task: str, out: Path, *, rank: int, steps: int, lr: float, seed: int) -> dict[str, float]:
    """Train one adapter and write it. Returns the last loss and the seconds."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    base = zoo / "lm" / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config).train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=steps, pct_start=0.05)
    start, loss = time.perf_counter(), torch.tensor(0.0)
    for _, (ids, weight) in zip(range(steps), batches(read_rows(zoo, task, tokenizer), seed), strict=False):
        logits = adapted(input_ids=ids, attention_mask=(weight > 0).long(), use_cache=False).logits
        each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (each * weight[:, 1:]).sum() / weight[:, 1:].sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
    adapted.save_pretrained(out)
    return {"loss": float(loss.detach()), "seconds": time.perf_counter() - start}


def main() -> None:
    """Train the adapters that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["intent", "qtype", "where"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    zoo = Path(os.environ["MERGE_SEARCH_ZOO"])
    for i, task in enumerate(arguments.tasks):
        folder = arguments.out / task
        if folder.is_dir():
            print(f"{task}: {folder} is there")
            continue
        seed = arguments.seed + i  # adapters of one seed begin with the same A
        told = train(zoo, task, folder, rank=arguments.rank, steps=arguments.steps, lr=arguments.lr, seed=seed)
        print(f"{task}: loss {told['loss']:.4f} after {told['seconds']:.0f} s, written to {folder}", flush=True)


if __name__ == "__main__":
    main()
