#!/usr/bin/env python3
"""Make a small recommender, an expert for each of three markets, and their logs: no downloads, fixed seeds.

The script invents a catalogue of items in genres and logs of interactions in MovieLens' format. It trains a SASRec of
about 0.03 M parameters on logs of users who stay within a genre (`models/base`) and fine-tunes that base on one market
at a time. In every market each item has a favourite next one, another in each market. So an expert learns its market
well and damages the others.

Usage: python make_models.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from merge_search.engine.architectures.sasrec import SasRec, SasRecConfig

MARKETS = ("north", "south", "east")
FAVOURITE, WITHIN_GENRE = 0.55, 0.3
"""Chances of the favourite next item and of one of the same genre. The rest is any item."""

Sequence = list[int]


def sequences(n: int, n_items: int, favourites: np.ndarray | None, seed: int) -> list[Sequence]:
    """Items of `n` users, 6 to 14 each.

    Args:
        n: The number of users.
        n_items: The size of the catalogue; genres have 20 items each.
        favourites: The favourite next item by item, numbered from 0; None: there are none.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    chance = 0.0 if favourites is None else FAVOURITE
    out = []
    for _ in range(n):
        items = [int(rng.integers(n_items))]
        for u in rng.random(int(rng.integers(5, 14))):
            last = items[-1]
            if favourites is not None and u < chance:
                items.append(int(favourites[last]))
            elif u < chance + WITHIN_GENRE or favourites is None:
                items.append(20 * (last // 20) + int(rng.integers(20)))
            else:
                items.append(int(rng.integers(n_items)))
        out.append([item + 1 for item in items])
    return out


def write_log(path: Path, users: list[Sequence]) -> None:
    """Write ``user::item::rating::time`` lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{u}::{item}::5::{t}" for u, items in enumerate(users, start=1) for t, item in enumerate(items)]
    path.write_text("\n".join(lines) + "\n")


def padded(users: list[Sequence]) -> torch.Tensor:
    """Items, 0 for padding on the right. Shape (users, longest)."""
    return nn.utils.rnn.pad_sequence([torch.tensor(items) for items in users], batch_first=True)


def fit(model: SasRec, users: list[Sequence], steps: int, lr: float, seed: int) -> None:
    """Train on every next item of all users."""
    data, draw = padded(users), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(steps):
        rows = data[torch.randint(len(data), (128,), generator=draw)]
        logits = model(input_ids=rows[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def hit_rate(model: SasRec, users: list[Sequence], k: int = 10) -> float:
    """Share of the users whose last item is among the `k` best that are not in their history."""
    hits = 0
    for items in users:
        scores = model(input_ids=torch.tensor([items[:-1]])).logits[0, -1]
        scores[[0, *(i for i in items[:-1] if i != items[-1])]] = -torch.inf
        hits += int((scores > scores[items[-1]]).sum() < k)
    return hits / len(users)


def make(
    out: Path,
    *,
    n_items: int = 200,
    hidden: int = 48,
    layers: int = 2,
    n_train: int = 4000,
    n_test: int = 900,
    base_steps: int = 400,
    expert_steps: int = 500,
    lr: float = 4e-3,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Write ``data/MARKET/{train,test}.dat`` and ``models/{base,MARKET}``.

    Returns:
        HR@10 on the test users by model and market.
    """
    torch.manual_seed(seed)
    shutil.rmtree(out / "models", ignore_errors=True)
    config = SasRecConfig(
        vocab_size=n_items + 1, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=16, dropout=0.1,
    )  # fmt: skip
    model = SasRec(config)
    fit(model, sequences(n_train, n_items, None, 100 * seed), base_steps, lr, seed)
    model.save_pretrained(out / "models" / "base")
    models, test = {"base": model}, {}
    for i, market in enumerate(MARKETS):
        favourites = np.random.default_rng(100 * seed + 10 + i).permutation(n_items)
        train, test[market] = (
            sequences(n, n_items, favourites, 100 * seed + s + i) for n, s in ((n_train, 20), (n_test, 30))
        )
        for part, users in (("train", train[:1000]), ("test", test[market])):
            write_log(out / "data" / market / f"{part}.dat", users)
        models[market] = SasRec.from_pretrained(out / "models" / "base")
        fit(models[market], train, expert_steps, lr, seed + 1 + i)
        models[market].save_pretrained(out / "models" / market)
    return {name: {m: hit_rate(model, users) for m, users in test.items()} for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    for name, scores in make(args.out, seed=args.seed).items():
        print(name, " ".join(f"{market} {score:.3f}" for market, score in scores.items()), flush=True)
    print(f"done in {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
