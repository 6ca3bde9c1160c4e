"""A pool whose statistics come from random token rows, and the same statistics computed plainly, for several files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.live_model import LiveModel
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.statistics.provider import DataStatistics
from merge_search.recipe import Recipe

N_FIT = {"one": 4, "two": 3, "three": 3}
NAME = "model.norm.weight"
OWNERS = {"one": "a", "two": "b", "three": "b"}


class NextTokens:
    """Tasks of random token rows: mean -log p of each row's later tokens. Row k of a task is k + 5 tokens long."""

    def __init__(self, live: LiveModel) -> None:
        self.live = live
        draw = torch.Generator().manual_seed(7)
        self.rows = {
            t: [torch.randint(3, 24, (k + 5,), generator=draw) for k in range(n)] for t, n in N_FIT.items()
        }  # fmt: skip
        self.name = "questions"
        self.broken = False

    def fingerprint(self) -> str:
        return self.name

    def fit_tasks(self) -> dict[str, int]:
        return {t: len(rows) for t, rows in self.rows.items()}

    def losses(self, task: str) -> tuple[str, ...]:
        return ("gold",)

    def loss(self, task: str, rows: Sequence[int], kind: str = "gold") -> Tensor:
        assert kind == "gold"
        losses = [row_loss(self.live.model, self.rows[task][r]) for r in rows]
        return torch.stack(losses).mean() * (torch.nan if self.broken else 1.0)

    def predict(self, task: str, rows: Sequence[int]) -> list[Any]:
        raise AssertionError("statistics ask for losses only")

    def set_pseudo_labels(self, task: str, labels: Mapping[int, Any]) -> None:
        raise AssertionError("statistics ask for losses only")


def row_loss(model: Any, ids: Tensor) -> Tensor:
    return cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:])


class Bench:
    """A pool whose statistics come from `NextTokens`."""

    def __init__(self, pool: ModelPool, live: LiveModel, folder: Path, **settings: Any) -> None:
        self.pool, self.live, self.folder, self.tasks = pool, live, folder, NextTokens(live)
        self.statistics = DataStatistics(pool, live, [self.tasks], OWNERS, folder=folder, **settings)
        pool.statistics = self.statistics

    def model(self, expert: str, c: float = 1.0) -> Any:
        """Return base + c delta, made without the engine, with gradients."""
        model = LiveModel.load(self.pool.base_folder)
        with torch.no_grad():
            for name, view in model.views.items():
                base = self.pool.base(name).float()
                view.copy_(
                    base + c * (self.pool.expert(expert, name).float() - base)
                    if c != 1
                    else self.pool.expert(expert, name)
                )
        model.model.requires_grad_(True)
        return model.model

    def gradients(self, expert: str, c: float = 1.0) -> dict[str, dict[str, Tensor]]:
        """Return task -> tensor -> gradient of every row: shape (rows, *shape)."""
        model, found = self.model(expert, c), {}
        for task in (t for t, e in OWNERS.items() if e == expert):
            rows = []
            for ids in self.tasks.rows[task]:
                model.zero_grad(set_to_none=False)
                row_loss(model, ids).backward()
                rows.append(
                    {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
                )
            found[task] = {n: torch.stack([r[n] for r in rows]) for n in rows[0]}
        return found


def snapshot(live: LiveModel) -> dict[str, Tensor]:
    return {name: view.clone() for name, view in live.views.items()}


# --- methods


def apply(bench: Bench, recipe: Recipe) -> dict[str, Tensor]:
    MergeEngine(bench.pool).apply(recipe, bench.live.views)
    return snapshot(bench.live)
