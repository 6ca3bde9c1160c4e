"""Text classification by an encoder with one linear head per task: the encoders merge, the heads stay.

    evaluate:
      - evaluator: classification
        include_path: data/                      # folder of data, train, labels and head; default: the study file's
        tasks:
          sst2: {data: [sst2/val.jsonl, sst2/test.jsonl], train: sst2/train.jsonl, head: sst2/head.safetensors}
          trec6: {data: trec6/test.jsonl, head: trec6/head.safetensors, labels: trec6/task.json, pooling: mean}
          toxic: {data: toxic/test.jsonl, head: toxic/head.safetensors, group: dialect}      # with group gaps
        batch_size: 64
        max_length: 128
        limit: 500                               # most documents per task: the first in the order of questions

Rows are JSON lines with a text and a label (a class number, or a name listed under ``labels``). A head file holds
``weight`` (n_classes, hidden) and ``bias`` (n_classes,). Each task has two metrics: ``acc``, with the right label's
probability beside it, and ``nll``, the mean of -log(probability).

A task with ``group``, a field that names the group of every question, also has ``parity_gap`` and ``odds_gap``
(`evaluators.classification.gaps`; ``gaps`` leaves one out). Smaller is better. They are no main metrics, so they are no
part of means or retention; name them:

    objective: {maximise: mean_retention, minimise: toxic/parity_gap}    # or constraints: ["toxic/odds_gap <= 0.1"]

Several objectives with ParEGO are the pattern of arXiv 2310.12145: ``sampler_options: {multi_objective: parego}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluators.classification.gaps import gap_scores
from evaluators.classification.rows import HeadTask, Options, read_tasks
from evaluators.labelled.evaluator import LabelledEvaluator, mean_scores
from merge_search.errors import StudyFileError
from merge_search.evaluation import MetricInfo, Scores, SplitShares
from merge_search.options import read_options

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from evaluators.labelled.live import LiveOutputs

__all__ = ["Classification", "HeadEvaluator"]


class HeadEvaluator(LabelledEvaluator[HeadTask]):
    """Accuracy, likelihood and group gaps of an encoder with one linear head per task."""

    def metrics(self) -> list[MetricInfo]:
        """``acc`` and ``nll`` of each task, then its gaps. The chance of ``acc`` is 1 / n_classes."""
        return [info for task in self._tasks.values() for info in _metrics(task)]

    def check_model(self, config: Mapping[str, Any], what: str) -> None:
        """Compare the hidden size of the heads with a model's.

        Raises:
            StudyFileError: Heads of another hidden size.
        """
        size = config.get("hidden_size")
        odd = [t for t in self._tasks.values() if isinstance(size, int) and t.head.hidden != size]
        if odd:
            raise StudyFileError(
                [
                    f"tasks.{t.name}.head: {t.head.path} has hidden size {t.head.hidden}, and {what} has {size}: it "
                    "cannot be judged; leave it out, or give a model of that width"
                    for t in odd
                ]
            )

    def _scores(self, task: HeadTask, rows: Sequence[Any], logits: NDArray[np.float32]) -> dict[str, Scores]:
        """Per-question values from logits of shape (n, n_classes). The lowest class wins a tie."""
        labels = np.array([row.label for row in rows])
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        right = shifted[np.arange(len(rows)), labels] - np.log(np.exp(shifted).sum(axis=1))
        predicted = logits.argmax(axis=1)
        ids = tuple(row.hash for row in rows)
        scores = {
            f"{task.name}/acc": mean_scores(ids, (predicted == labels).astype(np.float64), np.exp(right)),
            f"{task.name}/nll": mean_scores(ids, -right),
        }
        groups = [row.group for row in rows]
        for gap in task.gaps:
            given = labels if gap == "odds" else None
            scores[f"{task.name}/{gap}_gap"] = gap_scores(ids, groups, predicted, task.n_outcomes, given)
        return scores


def _metrics(task: HeadTask) -> Iterator[MetricInfo]:
    n = {split: len(rows) for split, rows in task.scored.items()}
    yield MetricInfo(task.name, "acc", True, n, chance=1 / task.head.n_classes)
    yield MetricInfo(task.name, "nll", False, n)
    for gap in task.gaps:
        yield MetricInfo(task.name, f"{gap}_gap", False, n)


class Classification(HeadEvaluator):
    """Accuracy and likelihood of a text encoder with fixed heads: an `Evaluator` that is `Teachable`.

    Args:
        options: See the module's docstring.
        shares: Shares of the splits. The fit share of a task with ``train`` rows is scored with the rest of its search
            split.
        seed: Not used. Splits and orders are functions of the documents.
        folder: The folder that relative paths are relative to; None: the current directory.

    Raises:
        StudyFileError: Everything that is wrong with options, files, labels, rows, heads, groups and the sizes of the
            splits.
    """

    def __init__(
        self, options: Mapping[str, Any], *, shares: SplitShares, seed: int, folder: Path | None = None
    ) -> None:
        self._options = read_options(Options, options)
        super().__init__(read_tasks(self._options, shares, folder), batch_size=self._options.batch_size)

    def _settings(self) -> dict[str, Any]:
        return {"version": 1, "max_length": self._options.max_length}

    def _load(self, model: Any, tokenizer: Any, folder: str) -> LiveOutputs[Any]:
        from evaluators.classification.heads import TextHeads

        return TextHeads(model, tokenizer, list(self._tasks.values()), max_length=self._options.max_length)
