"""What goes wrong with classification is typed and named: weights, models, options, files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_encoder import (
    SHARES,
    bound,
    make_encoder,
    make_tokenizer,
    options,
    sentences,
    write_rows,
)

from evaluators.classification.evaluator import Classification
from merge_search.errors import EvaluationError, NonFiniteError, StudyFileError
from merge_search.evaluation import Split, SplitShares

# --- failures ---------------------------------------------------------------------------------------------------------


def test_nan_weights_are_a_non_finite_error(encoder_folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(encoder_folder, model)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[0] = math.nan
    with pytest.raises(NonFiniteError, match="for 8 of 8 questions of task 'animal'"):
        evaluator.evaluate(Split.SEARCH)
    with pytest.raises(NonFiniteError, match="task 'colour'"):
        bound(encoder_folder, model, shares=SplitShares(fit=0.3)).loss("colour", [0])


def test_a_failing_model_is_an_evaluation_error_but_out_of_memory_is_passed_on(encoder_folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(encoder_folder, model)

    def fail_with(error: Exception) -> torch.utils.hooks.RemovableHandle:
        def hook(*_: Any) -> None:
            raise error

        return model.embeddings.register_forward_hook(hook)

    handle = fail_with(RuntimeError("kernel says no"))
    with pytest.raises(EvaluationError, match=r"task 'animal', batch of shape .* RuntimeError: kernel says no"):
        evaluator.evaluate(Split.SEARCH)
    handle.remove()
    for error in (torch.OutOfMemoryError("full"), MemoryError("full")):
        handle = fail_with(error)
        with pytest.raises(type(error), match="full"):
            evaluator.evaluate(Split.SEARCH)
        handle.remove()
    assert np.isfinite(evaluator.evaluate(Split.SEARCH).scores["animal/nll"].score)


def test_what_was_asked_before_a_failure_is_counted_batch_by_batch(encoder_folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(encoder_folder, model)
    whole = evaluator.evaluate(Split.SEARCH).cost.questions
    assert evaluator.n_asked == whole
    n_animal = evaluator.metrics()[0].n_questions[Split.SEARCH]
    calls = iter(range(-(-n_animal // 8)))  # of the second task the first batch fails

    def hook(*_: Any) -> None:
        if next(calls, None) is None:
            raise RuntimeError("kernel says no")

    handle = model.embeddings.register_forward_hook(hook)
    with pytest.raises(EvaluationError, match="task 'colour'"):
        evaluator.evaluate(Split.SEARCH)
    handle.remove()
    assert evaluator.n_asked == whole + n_animal + 8


def test_scores_are_asked_of_a_bound_model_on_a_scored_split(encoder_folder: Path) -> None:
    evaluator = Classification(options(encoder_folder), shares=SHARES, seed=0)
    with pytest.raises(EvaluationError, match="call bind before"):
        evaluator.evaluate(Split.SEARCH)
    for split, fidelity in ((Split.FIT, 1.0), (Split.SEARCH, 0.0), (Split.SEARCH, 1.5)):
        with pytest.raises(EvaluationError, match=r"the fit split is not scored|0 <= after < fidelity <= 1"):
            bound(encoder_folder).evaluate(split, fidelity)


def test_a_head_of_another_hidden_size_or_a_model_without_hidden_states_is_refused_at_bind(
    encoder_folder: Path,
) -> None:
    evaluator = Classification(options(encoder_folder), shares=SHARES, seed=0)
    with pytest.raises(StudyFileError, match="has hidden size 16, but the encoder's is 8") as caught:
        evaluator.bind(make_encoder(hidden=8), make_tokenizer(), folder="")
    assert len(caught.value.problems) == 2

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_encoder()
            self.config = self.inner.config

        def forward(self, **inputs: torch.Tensor) -> Any:
            return (self.inner(**inputs).last_hidden_state,)

    with pytest.raises(StudyFileError, match="needs an encoder whose output has last_hidden_state, got Bare"):
        evaluator.bind(Bare(), make_tokenizer(), folder="")


def test_all_problems_with_options_come_at_once_with_the_nearest_key(encoder_folder: Path) -> None:
    given = options(encoder_folder, pooling="max", hed="x", labels=3)
    del given["tasks"]["colour"]["head"]
    with pytest.raises(StudyFileError) as caught:
        Classification({**given, "batchsize": 4, "limit": 0}, shares=SHARES, seed=0)
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 6
    assert "batchsize: unknown key; did you mean 'batch_size'?" in text
    assert "tasks.animal.hed: unknown key; did you mean 'head'?" in text
    assert "tasks.animal.pooling: input should be 'mean' or 'cls', got 'max'" in text
    assert "tasks.animal.labels: must be a list of names or a JSON file that has one under 'labels', got 3" in text
    assert "tasks.colour.head: is missing" in text
    assert "limit: input should be greater than or equal to 1, got 0" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "anmal.jsonl"}, r"tasks.animal.data: no file .*anmal.jsonl; did you mean 'animal.jsonl'\?"),
        ({"head": "colour.safetensors", "labels": ["a", "b"]}, "has 3 classes, but labels names 2"),
        ({"head": "animal.jsonl"}, "is not a readable safetensors file"),
        ({"labels": ["a", "a"]}, r"names must differ, got \['a'\] more than once"),
        ({"labels": "animal.jsonl"}, "tasks.animal.labels: .* is not JSON"),
        ({"text": "txet"}, "line 1: no field 'txet'; did you mean 'text'?"),
        ({"data": "colour.jsonl", "text": "sentence", "label": "answer"}, "'answer' is the name .* under labels"),
        ({"data": "broken.jsonl"}, "broken.jsonl, line 2: is not JSON"),
        ({"data": "wrong.jsonl"}, "wrong.jsonl, line 3: 'label' must be a class from 0 to 1, got True"),
        ({"data": "few.jsonl"}, "the test split needs at least 2 documents for an error bar, got [01] of 3"),
        ({"train": "animal.jsonl"}, "all questions of its 60 rows also stand in data"),
    ],
)
def test_wrong_files_are_refused_before_any_weight_is_loaded(
    encoder_folder: Path, change: dict[str, Any], message: str
) -> None:
    good = sentences(60, 2, seed=1)
    write_rows(encoder_folder / "few.jsonl", good[:3])
    (encoder_folder / "broken.jsonl").write_text('{"text": "owl", "label": 0}\n{"text": \n')
    write_rows(encoder_folder / "wrong.jsonl", [*good[:2], {"text": "owl", "label": True}, {"text": "owl", "label": 2}])
    with pytest.raises(StudyFileError, match=message):
        Classification(options(encoder_folder, **change), shares=SHARES, seed=0)


@pytest.mark.parametrize(
    "tensors",
    [{"weight": torch.ones(2, 16), "bias": torch.ones(3)}, {"weight": torch.ones(1, 16)}, {"w": torch.ones(2, 16)}],
)
def test_misshapen_heads_are_refused(encoder_folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, encoder_folder / "animal.safetensors")
    with pytest.raises(StudyFileError, match=r"tasks.animal.head: .*animal.safetensors"):
        Classification(options(encoder_folder), shares=SHARES, seed=0)


def test_a_file_of_the_wrong_format_does_not_flood_the_message(encoder_folder: Path) -> None:
    with pytest.raises(StudyFileError) as caught:
        Classification(options(encoder_folder, label="lable"), shares=SHARES, seed=0)
    assert len(caught.value.problems) == 12
    assert caught.value.problems[5].endswith("55 more lines are wrong")
