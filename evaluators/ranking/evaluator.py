"""Recommendation of the next item: HR@K, NDCG@K and AUC of a model that scores items after a sequence of them.

    evaluate:
      - evaluator: ranking
        include_path: data/
        tasks:
          books: {data: books/test.jsonl, train: books/train.jsonl}
          films: {data: ml-1m/ratings.dat}         # MovieLens; each user's last item is the right answer
        k: [10, 5]
        negatives: 100                             # left out: all items of the task

With r the rank of the right item among the candidates, r = 1 + #(better) + #(equal) / 2, and m wrong candidates,

    HR@K = 1(r <= K)        NDCG@K = 1(r <= K) / log2(r + 1)        AUC = 1 - (r - 1) / m

for one right item a question; a metric is the mean over questions. The main metric is NDCG@K of the first `k`.
Candidates are the task's items without those in the history. With `negatives` the wrong ones are drawn, for each
question the same for all models; such numbers are higher than, and need not order models as, those among all items
(Krichene and Rendle 2020).

The live model may be the package's SASRec (`merge_search.engine.architectures.sasrec`) or any causal language model of
transformers over item numbers. A learner's loss is the cross-entropy of the right item among all of the task's items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluators.labelled.evaluator import LabelledEvaluator, mean_scores
from evaluators.ranking.rows import Options, RankingTask, SequenceRow, read_tasks
from merge_search.evaluation import MetricInfo, Scores, SplitShares
from merge_search.options import read_options

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from evaluators.labelled.live import LiveOutputs

__all__ = ["Ranking"]


class Ranking(LabelledEvaluator[RankingTask]):
    """Hit rate, NDCG and AUC of a recommender: an `Evaluator` that is `Teachable`.

    Args:
        options: See the module's docstring.
        shares: Shares of the splits.
        seed: Not used. Splits, orders and drawn candidates are functions of the sequences.
        folder: The folder that relative paths are relative to; None: the current directory.

    Raises:
        StudyFileError: Everything that is wrong with options, files, sequences, items and the sizes of the splits.
    """

    def __init__(
        self, options: Mapping[str, Any], *, shares: SplitShares, seed: int, folder: Path | None = None
    ) -> None:
        self._options = read_options(Options, options)
        super().__init__(read_tasks(self._options, shares, folder), batch_size=self._options.batch_size)
        self._candidates: dict[tuple[str, str], NDArray[np.int64]] = {}

    def metrics(self) -> list[MetricInfo]:
        """``ndcg@K``, ``hr@K`` for each K, and ``auc`` of each task."""
        out = []
        for name, task in self._tasks.items():
            n = {split: len(rows) for split, rows in task.scored.items()}
            ks = dict.fromkeys(self._options.k)
            labels = [*(f"{m}@{k}" for k in ks for m in ("ndcg", "hr")), "auc"]
            out += [MetricInfo(name, label, True, n, chance=0.5 if label == "auc" else None) for label in labels]
        return out

    def _settings(self) -> dict[str, Any]:
        keys = {"k", "negatives", "max_length"}
        return {"version": 1, "kind": "ranking", **self._options.model_dump(include=keys)}

    def _load(self, model: Any, tokenizer: Any, folder: str) -> LiveOutputs[Any]:
        from evaluators.ranking.items import ItemScores

        self._candidates = {}
        return ItemScores(model, list(self._tasks.values()), max_length=self._options.max_length)

    def _scores(self, task: RankingTask, rows: Sequence[SequenceRow], logits: NDArray[np.float32]) -> dict[str, Scores]:
        ids = tuple(row.hash for row in rows)
        pairs = [_rank(line, row.label, self._wrong(task, row)) for row, line in zip(rows, logits, strict=True)]
        rank, n_wrong = np.array(pairs).T
        values = {"auc": 1 - (rank - 1) / n_wrong}
        for k in self._options.k:
            values[f"hr@{k}"] = (rank <= k).astype(np.float64)
            values[f"ndcg@{k}"] = values[f"hr@{k}"] / np.log2(rank + 1)
        return {f"{task.name}/{label}": mean_scores(ids, v) for label, v in values.items()}

    def _wrong(self, task: RankingTask, row: SequenceRow) -> NDArray[np.int64]:
        """Places, among the task's items, of the wrong candidates of a question."""
        key = (task.name, row.hash)
        if key not in self._candidates:
            out = {*row.history, row.target}
            places = np.array([i for i, item in enumerate(task.items) if item not in out], dtype=np.int64)
            n = self._options.negatives
            if n is not None and n < len(places):
                places = np.sort(np.random.default_rng(int(row.hash[:16], 16)).choice(places, n, replace=False))
            self._candidates[key] = places
        return self._candidates[key]


def _rank(scores: NDArray[np.float32], right: int, wrong: NDArray[np.int64]) -> tuple[float, int]:
    """The rank of the right item from 1 on, ties counted half, and the number of wrong ones (1 if there are none)."""
    others = scores[wrong]
    better, equal = (others > scores[right]).sum(), (others == scores[right]).sum()
    return 1.0 + float(better) + float(equal) / 2, max(1, len(wrong))
