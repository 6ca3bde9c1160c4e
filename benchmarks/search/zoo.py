"""lm-eval tasks over the zoo's data with their training splits: what a study with a learner needs.

    python benchmarks/search/zoo.py OUT        (MERGE_SEARCH_ZOO names the zoo)

Writes ``OUT/zoo_<task>.yaml``: scored on test.jsonl, training split train.jsonl, absolute paths.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import yaml

MULTIPLE_CHOICE = {"doc_to_choice": "choices", "doc_to_target": "gold"}
GENERATED = {
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
    "filter_list": [{"name": "line", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
}


def write_tasks(zoo: Path, out: Path, names: list[str] | None = None) -> list[str]:
    """Task names written for the zoo's language-model data."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for folder in sorted((zoo / "data" / "lm").iterdir()):
        if not (folder / "task.json").exists() or (names and folder.name not in names):
            continue
        is_choice = json.loads((folder / "task.json").read_text())["kind"] == "multiple_choice"
        metric = "acc" if is_choice else "exact_match"
        task = {
            "task": f"zoo_{folder.name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in ("train", "test")}},
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
        written.append(task["task"])
    return written


if __name__ == "__main__":
    print("\n".join(write_tasks(Path(os.environ["MERGE_SEARCH_ZOO"]), Path(sys.argv[1]))))
