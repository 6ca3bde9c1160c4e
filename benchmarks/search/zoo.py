"""The two zoos as parts of study files: models, questions to search on, and the sealed test questions.

    python benchmarks/search/zoo.py OUT        (MERGE_SEARCH_ZOO names the zoo; writes the language tasks for lm-eval)

The zoo ``lm`` has three language models and lm-eval tasks. The zoo ``encoder`` has five sentence encoders with their
heads and `classification`. A search is scored on rows of ``val.jsonl`` (its search and validation shares), learners
fit on ``train.jsonl``, and the sealed test is all of ``test.jsonl``. No document is in two of these files.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["ZOOS", "Zoo", "search_study", "test_study", "write_tasks"]

MULTIPLE_CHOICE = {"doc_to_choice": "choices", "doc_to_target": "gold"}
GENERATED = {
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
    "filter_list": [{"name": "line", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
}
SEARCH_SHARES = {"search": 0.5, "validation": 0.48, "test": 0.02}
"""Shares of the val rows. The study's own test share stays unopened."""
WHOLE = {"search": 0.02, "validation": 0.02, "test": 0.96}
"""Shares of the test rows. The benchmark asks all three and joins them, so their sizes do not matter."""
EVEN = {"search": 0.4, "validation": 0.3, "test": 0.3}
"""Shares of the rows where a limit would leave smaller ones empty."""


@dataclass(frozen=True)
class Zoo:
    """A family of checkpoints.

    Attributes:
        name: ``lm`` or ``encoder``, the folder of the checkpoints. experts: Names of the experts. A task is called
        after its expert. n_blocks: Number of blocks of every model. candidate: Search questions of one candidate,
        rounded. The unit of the budget. step_sizes: Step sizes of AdamW for fine-tuning all weights. best_step_size:
        The step size that ended best on test rows. For ``lm`` it is the best of all, for ``encoder`` the best
            of those that fine-tuning chose by itself.
        limit: Number of documents per task and file, for a quick look that says nothing about quality. None: all.
        adapters: Folder with an adapter of each task, which are the experts in place of the zoo's. None: the zoo's.
    """

    name: str
    experts: tuple[str, ...]
    n_blocks: int
    candidate: int
    step_sizes: tuple[float, ...]
    best_step_size: float
    limit: int | None = None
    adapters: Path | None = None


ZOOS = {
    "lm": Zoo("lm", ("intent", "qtype", "where"), 5, 600, (2e-4, 6e-4, 2e-3), 6e-4),
    "encoder": Zoo("encoder", ("sst2", "trec6", "banking77", "agnews", "emotion"), 4, 700, (2e-5, 6e-5, 2e-4), 6e-5),
}
ENCODER_SEARCH = {"search": 0.25, "validation": 0.25, "test": 0.5}
"""Fewer of the encoders' val rows are asked, since a question costs several times as much there."""


def search_study(root: Path, zoo: Zoo, tasks: Path) -> dict[str, Any]:
    """Models, evaluators and splits of a study that searches on val rows.

    Args:
        tasks: Folder that `write_tasks` wrote (``lm`` only).
    """
    shares = SEARCH_SHARES if zoo.name == "lm" else ENCODER_SEARCH
    return _part(root, zoo, tasks, "val", shares)


def test_study(root: Path, zoo: Zoo, tasks: Path) -> dict[str, Any]:
    """Models, evaluators and splits of the same study over the test rows."""
    return _part(root, zoo, tasks, "test", WHOLE)


def _part(root: Path, zoo: Zoo, tasks: Path, rows: str, shares: dict[str, float]) -> dict[str, Any]:
    folder = root / zoo.name
    experts = {e: str((zoo.adapters or folder) / e) for e in zoo.experts}
    return {
        "models": {"base": str(folder / "base"), "experts": experts, "dtype": "float32"},
        "evaluate": [_evaluate(root, zoo, tasks, rows)],
        "splits": shares if zoo.limit is None else EVEN,
    }


def _evaluate(root: Path, zoo: Zoo, tasks: Path, rows: str) -> dict[str, Any]:
    limit = {} if zoo.limit is None else {"limit": zoo.limit}
    if zoo.name == "lm":
        return {
            "evaluator": "lm_eval", "tasks": [f"zoo_{e}" for e in zoo.experts], "include_path": str(tasks / rows),
            "batch_size": 64, "fit": "train", "fit_limit": 4000, **limit,
        }  # fmt: skip
    data = root / "data" / "text"
    return {
        "evaluator": "classification",
        "tasks": {
            e: {
                "data": str(data / e / f"{rows}.jsonl"),
                "train": str(data / e / "train.jsonl"),
                "head": str(root / "encoder" / e / "head.safetensors"),
                "labels": str(data / e / "task.json"),
            }
            for e in zoo.experts
        },
        "batch_size": 64,
        "max_length": 64,
        **limit,
    }


def write_tasks(root: Path, out: Path, names: list[str] | None = None, *, rows: str = "test") -> list[str]:
    """Write lm-eval tasks over the zoo's language data, with their training splits, and return the task names.

    Args:
        rows: The file whose rows are the questions: ``val`` or ``test``.
    """
    out.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    for folder in sorted((root / "data" / "lm").iterdir()):
        if not (folder / "task.json").exists() or (names and folder.name not in names):
            continue
        is_choice = json.loads((folder / "task.json").read_text())["kind"] == "multiple_choice"
        metric = "acc" if is_choice else "exact_match"
        files = {"train": str(folder / "train.jsonl"), "test": str(folder / f"{rows}.jsonl")}
        task = {
            "task": f"zoo_{folder.name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "training_split": "train",
            "test_split": "test",
            "output_type": "multiple_choice" if is_choice else "generate_until",
            "doc_to_text": "query",
            "target_delimiter": " ",
            "num_fewshot": 0,
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
            **(MULTIPLE_CHOICE if is_choice else GENERATED),
        }
        (out / f"zoo_{folder.name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
        written.append(f"zoo_{folder.name}")
    return written


if __name__ == "__main__":
    print("\n".join(write_tasks(Path(os.environ["MERGE_SEARCH_ZOO"]), Path(sys.argv[1]))))
