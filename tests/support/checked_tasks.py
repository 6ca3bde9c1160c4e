"""lm-eval tasks over the zoo's language data whose own Python judges an answer, shaped like IFEval and like MBPP."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["write_checked_tasks"]

_CHECKS = '''
def follows(doc, results):
    """IFEval's shape: every instruction of the document is checked on the answer; there is no right text."""
    answer = results[0]
    checks = {"n_words": lambda n: len(answer.split()) == n, "begins": answer.startswith, "ends": answer.endswith}
    return {"strict": all(checks[name](value) for name, value in doc["instructions"].items())}


def never(doc, results):
    return {"strict": False}


def passes(doc, results):
    """MBPP's shape: the answer is run and then the document's test."""
    try:
        scope = {}
        exec("answer = " + repr(results[0]) + "\\n" + doc["test"], scope)
    except AssertionError:
        return {"passed": 0.0}
    return {"passed": 1.0}
'''

_TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}_train.jsonl, test: {data}_test.jsonl}}}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: query
target_delimiter: " "
num_fewshot: 0
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
filter_list: [{{name: line, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
"""
_METRIC = "metric_list: [{{metric: {}, aggregation: mean, higher_is_better: true}}]\n"
_SHAPES = {
    "plain": "doc_to_target: answer\n" + _METRIC.format("exact_match"),
    "follows": "doc_to_target: 0\nprocess_results: !function checks.follows\n" + _METRIC.format("strict"),
    "never": "doc_to_target: 0\nprocess_results: !function checks.never\n" + _METRIC.format("strict"),
    "passes": "doc_to_target: test\nprocess_results: !function checks.passes\n" + _METRIC.format("passed"),
}


def write_checked_tasks(folder: Path, zoo: Path, *, n_train: int = 48, n_test: int = 60) -> Path:
    """Write ``intent_plain``, ``intent_follows``, ``intent_never``, ``where_passes`` and their data.

    No answer to ``intent_never`` is right.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checks.py").write_text(_CHECKS)
    for data in ("intent", "where"):
        for split, n in (("train", n_train), ("test", n_test)):
            lines = (zoo / "data" / "lm" / data / f"{split}.jsonl").read_text().splitlines()[:n]
            rows = [{k: row[k] for k in ("query", "answer")} for row in map(json.loads, lines)]
            for row in rows:
                words = row["answer"].split()
                row["instructions"] = {"n_words": len(words), "begins": words[0], "ends": words[-1]}
                row["test"] = f"assert answer == {row['answer']!r}"
            (folder / f"{data}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("intent_plain", "intent_follows", "intent_never", "where_passes"):
        data, shape = name.split("_")
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, data=data) + _SHAPES[shape])
    return folder
