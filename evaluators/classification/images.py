"""Image classification by a vision encoder with one linear head per task: the encoders merge, the heads stay.

    evaluate:
      - evaluator: image_classification
        include_path: data/                      # folder of data, train, labels and head; default: the study file's
        tasks:
          shapes: {data: shapes/test.npz, train: shapes/train.npz, head: shapes/head.safetensors}
          digits: {data: digits/test.jsonl, head: digits/head.safetensors, pooling: cls}
        batch_size: 64
        mean: 0.5                                # one number, or one per channel; default: preprocessor_config.json,
        std: 0.5                                 # else 0.5

`evaluators.classification.image_rows` says what the files hold. Images must have the encoder's size: nothing is
resized. Metrics, heads, groups and rows to fit on are those of `classification`. The live model is any encoder
of transformers that takes ``pixel_values`` and returns ``last_hidden_state`` (ViT, DeiT, BEiT, Swin, ResNet, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators.classification.evaluator import HeadEvaluator
from evaluators.classification.image_rows import ImageOptions, read_image_tasks
from merge_search.evaluation import SplitShares
from merge_search.options import read_options

if TYPE_CHECKING:
    from evaluators.labelled.live import LiveOutputs

__all__ = ["ImageClassification"]

MIDDLE = [0.5]


class ImageClassification(HeadEvaluator):
    """Accuracy and likelihood of a vision encoder with fixed heads: an `Evaluator` that is `Teachable`.

    Args:
        options: See the module's docstring.
        shares: Shares of the splits.
        seed: Not used. Splits and orders are functions of the images.
        folder: The folder that relative paths are relative to; None: the current directory.

    Raises:
        StudyFileError: Everything that is wrong with options, files, labels, images, heads, groups and the sizes of the
            splits.
    """

    def __init__(
        self, options: Mapping[str, Any], *, shares: SplitShares, seed: int, folder: Path | None = None
    ) -> None:
        self._options = read_options(ImageOptions, options)
        super().__init__(read_image_tasks(self._options, shares, folder), batch_size=self._options.batch_size)

    def _settings(self) -> dict[str, Any]:
        return {"version": 1, "kind": "images", "mean": self._options.mean, "std": self._options.std}

    def _load(self, model: Any, tokenizer: Any, folder: str) -> LiveOutputs[Any]:
        from evaluators.classification.heads import ImageHeads, pixel_statistics

        known = pixel_statistics(folder)
        mean, std = self._options.mean or known.get("mean", MIDDLE), self._options.std or known.get("std", MIDDLE)
        return ImageHeads(model, list(self._tasks.values()), mean=mean, std=std)
