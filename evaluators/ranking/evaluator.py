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
        self._places = {name: {item: i for i, item in enumerate(task.items)} for name, task in self._tasks.items()}
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

        return ItemScores(model, list(self._tasks.values()), max_length=self._options.max_length)

    def _scores(self, task: RankingTask, rows: Sequence[SequenceRow], logits: NDArray[np.float32]) -> dict[str, Scores]:
        ids = tuple(row.hash for row in rows)
        pairs = [self._rank(task, row, scores) for row, scores in zip(rows, logits, strict=True)]
        rank, n_wrong = np.array(pairs).T
        values = {"auc": 1 - (rank - 1) / n_wrong}
        for k in self._options.k:
            values[f"hr@{k}"] = (rank <= k).astype(np.float64)
            values[f"ndcg@{k}"] = values[f"hr@{k}"] / np.log2(rank + 1)
        return {f"{task.name}/{label}": mean_scores(ids, v) for label, v in values.items()}

    def _rank(self, task: RankingTask, row: SequenceRow, scores: NDArray[np.float32]) -> tuple[float, int]:
        """The rank of the right item from 1 on, ties counted half, and the number of wrong ones (1 if none is)."""
        right = scores[row.label]
        if self._options.negatives is None:
            heard = scores[self._in_history(task, row)]
            better = (scores > right).sum() - (heard > right).sum()
            equal = (scores == right).sum() - 1 - (heard == right).sum()
            n_wrong = len(scores) - 1 - len(heard)
        else:
            wrong = scores[self._drawn(task, row)]
            better, equal, n_wrong = (wrong > right).sum(), (wrong == right).sum(), len(wrong)
        return 1.0 + float(better) + float(equal) / 2, max(1, n_wrong)

    def _in_history(self, task: RankingTask, row: SequenceRow) -> list[int]:
        """Places, among the task's items, of those in the history. The right item is none of them."""
        places = self._places[task.name]
        return [places[item] for item in {*row.history} - {row.target} if item in places]

    def _drawn(self, task: RankingTask, row: SequenceRow) -> NDArray[np.int64]:
        """Places, among the task's items, of the wrong candidates that are drawn for a question."""
        key = (task.name, row.hash)
        if key not in self._candidates:
            left = np.ones(len(task.items), dtype=bool)
            left[[*self._in_history(task, row), row.label]] = False
            places = np.flatnonzero(left)
            n = min(self._options.negatives or 0, len(places))
            draw = np.random.default_rng(int(row.hash[:16], 16))
            self._candidates[key] = np.sort(draw.choice(places, n, replace=False))
        return self._candidates[key]
