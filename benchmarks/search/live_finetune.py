"""The alternative to merging that an honest user would try: fine-tune all weights from the average, on the same rows.

Training is plain AdamW with a constant step size and the evaluators' own loss, on the same fit rows and batches as the
learner. Every step size takes `PROBE` steps from the average and is scored on the search questions. The best of them
continues and is scored every `EVERY` steps. All of it counts: a row in a step counts three times (one forward pass, one
backward pass), and every scored question once. As in a search, the best few by search score meet the average on the
validation questions, and the best there wins.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from live_anytime import Bench, Row, Silent, Task, main_mean, make_plan, row_of
from live_opponents import FINE_TUNING_TOLD
from torch import Tensor
from zoo import search_study

from merge_search.cpu_matmul import fast_products
from merge_search.engine.learners.fit import QUESTIONS_PER_ROW, TaskLoss, task_losses
from merge_search.evaluation import Split
from merge_search.presets import preset
from merge_search.seeding import derive_seed
from merge_search.study_file import Learner

__all__ = ["finetuned_rows"]

PROBE, EVERY, FINALISTS = 15, 20, 3


@dataclass(frozen=True)
class Snapshot:
    """Weights after some steps, with their search score.

    Attributes:
        asked: Number of questions asked so far, including those that scored it.
        weights: Weights by parameter name.
    """

    name: str
    asked: int
    score: float
    weights: dict[str, Tensor]
    seconds: tuple[float, float]


class _Tuner:
    """Steps on the live model, and the count of questions that they asked."""

    def __init__(self, bench: Bench, task: Task) -> None:
        self.bench, self.seed, self.batch = bench, task.seed, Learner().batch_rows
        self.clock, self.asked = Silent(), 0
        self.model: torch.nn.Module = bench.work.live.model
        self.losses = task_losses(bench.work.evaluators, "gold")
        bench.work.recover()
        bench.work.splice(preset("average", bench.work.models, seed=task.seed, dtype=bench.plan.context.dtype))
        self.start = self.weights()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(weights[name])

    def snapshot(self, name: str) -> Snapshot:
        found = self.bench.work.ask(Split.SEARCH)
        self.asked += found.cost.questions
        score = main_mean(found, self.bench.plan.objective)[0]
        return Snapshot(name, self.asked, score, self.weights(), self.clock.now())

    def train(self, step_size: float) -> Iterator[Snapshot]:
        """Train from the average. Yields a snapshot after `PROBE` steps, then one every `EVERY` steps, without end."""
        self.restore(self.start)
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=step_size)
        step = 0
        while True:
            for _ in range(EVERY if step else PROBE):
                self._step(optimiser, step)
                step += 1
            weights = self.weights()
            yield self.snapshot(f"{step} steps of {step_size:g}")
            self.restore(weights)  # others may have trained in between

    def _step(self, optimiser: torch.optim.Optimizer, step: int) -> None:
        optimiser.zero_grad(set_to_none=True)
        for name, task in self.losses.items():
            rows = self._rows(name, task, step)
            with fast_products(self.bench.work.views):
                torch.autograd.backward(task.loss(rows) / len(self.losses))
            self.asked += QUESTIONS_PER_ROW * len(rows)
        optimiser.step()

    def _rows(self, name: str, task: TaskLoss, step: int) -> list[int]:
        """A batch from a random order of the rows, which is shuffled anew every epoch."""
        per_epoch = max(1, task.n_rows // self.batch)
        order = list(range(task.n_rows))
        random.Random(derive_seed(self.seed, "finetune", name, step // per_epoch)).shuffle(order)
        at = step % per_epoch * self.batch
        return order[at : at + self.batch]


def snapshots(tuner: _Tuner, step_sizes: tuple[float, ...], budget: int) -> list[Snapshot]:
    """All snapshots until the budget is spent. The last one may lie beyond it."""
    found = [tuner.snapshot("average")]
    runs: list[tuple[float, Iterator[Snapshot]]] = []
    for size in step_sizes:
        if tuner.asked < budget:
            run = tuner.train(size)
            found.append(next(run))
            runs.append((found[-1].score, run))
    best = max(runs, key=lambda r: r[0])[1]
    while tuner.asked < budget:
        found.append(next(best))
    return found


def finetuned_rows(task: Task) -> list[Row]:
    """One row per checkpoint."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bench = Bench(task, make_plan(task, folder, "study.yaml", search_study, {"space": {"type": "uniform"}}), folder)
        references = bench.references()
        tuner = _Tuner(bench, task)
        for p in tuner.model.parameters():
            p.requires_grad_(True)
        is_told = task.opponent == FINE_TUNING_TOLD
        sizes = (task.zoo.best_step_size,) if is_told else task.zoo.step_sizes
        found = snapshots(tuner, sizes, max(task.budgets.values()))
        rows = []
        for candidates, budget in task.budgets.items():
            done = [s for s in found if s.asked <= budget]
            winner, validation, digest = _validated(tuner, done)
            evaluation = bench.score_live(digest, "test")
            more: dict[str, Any] = {"validation": validation, "trials": len(done), "references": references}
            wall, cpu = done[-1].seconds
            rows.append(
                row_of(
                    task, candidates, evaluation, bench.plan.objective, questions=done[-1].asked, winner=winner.name,
                    wall_s=round(wall, 1), cpu_s=round(cpu, 1), **more,
                )
            )  # fmt: skip
        return rows


def _validated(tuner: _Tuner, done: list[Snapshot]) -> tuple[Snapshot, int, str]:
    """The best snapshot on validation, the number of questions that this took, and the hash of its weights.

    The average and the best few by search score take part. The live model holds the winner afterwards.
    """
    chosen = [done[0], *sorted(done[1:], key=lambda s: -s.score)[:FINALISTS]]
    asked, scored = 0, []
    for snapshot in chosen:
        tuner.restore(snapshot.weights)
        evaluation = tuner.bench.score_live(tuner.bench.work.live.hash(), "validation")
        asked += evaluation.cost.questions
        scored.append((main_mean(evaluation, tuner.bench.plan.objective)[0], snapshot))
    winner = max(scored, key=lambda s: s[0])[1]
    tuner.restore(winner.weights)
    return winner, asked, tuner.bench.work.live.hash()
