"""The classification evaluator scores a live encoder with fixed heads, exactly as a direct forward pass does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from evaluators.classification import Classification
from merge_search.errors import EvaluationError, InputError, NonFiniteError, StudyFileError
from merge_search.evaluation import Split, SplitShares, question_order, split_of

WORDS = ("red", "green", "blue", "seven", "eight", "nine", "cat", "dog", "owl", "runs", "sleeps", "sings")
SCORED = (Split.SEARCH, Split.VALIDATION, Split.TEST)
SHARES = SplitShares()


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")


def make_encoder(hidden: int = 16) -> BertModel:
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=16,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        initializer_range=0.5,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def sentences(n: int, n_classes: int, *, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    texts: set[str] = set()
    while len(texts) < n:
        texts.add(" ".join(rng.choice(WORDS, size=rng.integers(2, 9))))
    return [{"text": text, "label": int(rng.integers(n_classes))} for text in sorted(texts)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks, `animal` (2 classes, with train rows) and `colour` (3 classes, labels by name)."""
    generator = torch.Generator().manual_seed(3)
    for name, n_classes in (("animal", 2), ("colour", 3)):
        weight = torch.randn(n_classes, 16, generator=generator)
        save_file(
            {"weight": weight, "bias": torch.randn(n_classes, generator=generator)}, tmp_path / f"{name}.safetensors"
        )
    write_rows(tmp_path / "animal.jsonl", sentences(60, 2, seed=1))
    write_rows(tmp_path / "animal_train.jsonl", sentences(20, 2, seed=2))
    names = ["red", "green", "blue"]
    rows = [{"sentence": r["text"], "answer": names[r["label"]]} for r in sentences(50, 3, seed=3)]
    write_rows(tmp_path / "colour.jsonl", rows)
    (tmp_path / "colour.json").write_text(json.dumps({"labels": names}))
    return tmp_path


def options(folder: Path, **animal: Any) -> dict[str, Any]:
    return {
        "include_path": [str(folder)],
        "batch_size": 8,
        "tasks": {
            "animal": {"data": "animal.jsonl", "train": "animal_train.jsonl", "head": "animal.safetensors", **animal},
            "colour": {
                "data": ["colour.jsonl"],
                "head": "colour.safetensors",
                "text": "sentence",
                "label": "answer",
                "labels": "colour.json",
                "pooling": "cls",
            },
        },
    }


def bound(folder: Path, model: BertModel | None = None, shares: SplitShares = SHARES, **animal: Any) -> Classification:
    evaluator = Classification(options(folder, **animal), shares=shares, seed=0)
    evaluator.bind(make_encoder() if model is None else model, make_tokenizer(), folder="")
    return evaluator


def direct_logits(model: BertModel, folder: Path, task: str, text: str) -> torch.Tensor:
    """One text, no padding, pooling and head written out. Shape (n_classes,)."""
    ids = [2, *(4 + WORDS.index(w) for w in text.split()), 3]
    hidden = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).last_hidden_state[0]
    pooled = hidden.mean(0) if task == "animal" else hidden[0]
    head = load_file(folder / f"{task}.safetensors")
    return head["weight"] @ pooled + head["bias"]


def documents(evaluator: Classification, task: str, split: Split) -> list[tuple[str, int]]:
    return [(row.text, row.label) for row in evaluator._tasks[task].scored[split]]


def test_metrics_are_those_of_a_direct_forward_pass(folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(folder, model)
    for split in SCORED:
        found = evaluator.evaluate(split)
        for task in ("animal", "colour"):
            rows = documents(evaluator, task, split)
            with torch.no_grad():
                logits = torch.stack([direct_logits(model, folder, task, text) for text, _ in rows])
            labels = torch.tensor([label for _, label in rows])
            p = logits.softmax(-1)[torch.arange(len(rows)), labels].double().numpy()
            acc, nll = found.scores[f"{task}/acc"], found.scores[f"{task}/nll"]
            correct = (logits.argmax(-1) == labels).double().numpy()
            np.testing.assert_array_equal(acc.values, correct)
            np.testing.assert_allclose(acc.probability, p, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(nll.values, -np.log(p), rtol=1e-4, atol=1e-5)
            assert acc.score == correct.mean()
            assert acc.stderr == pytest.approx(math.sqrt(correct.var() / (len(rows) - 1)))
            assert nll.score == pytest.approx(nll.values.mean())
    assert 0 < found.scores["animal/acc"].score < 1, "the test would not notice constant answers"


def test_live_weights_changed_in_place_change_the_scores(folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(folder, model)
    before = evaluator.evaluate(Split.SEARCH).scores["animal/nll"].values
    np.testing.assert_array_equal(before, evaluator.evaluate(Split.SEARCH).scores["animal/nll"].values)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.value.weight.mul_(-1)
    assert (before != evaluator.evaluate(Split.SEARCH).scores["animal/nll"].values).all()


def test_metric_infos_name_the_main_metric_first_and_its_chance(folder: Path) -> None:
    evaluator = bound(folder)
    infos = {m.name: m for m in evaluator.metrics()}
    assert list(infos) == ["animal/acc", "animal/nll", "colour/acc", "colour/nll"]
    assert infos["animal/acc"].chance == 1 / 2
    assert infos["colour/acc"].chance == 1 / 3
    assert not infos["animal/nll"].higher_is_better
    assert sum(infos["animal/acc"].n_questions[s] for s in SCORED) == 60
    assert infos["animal/acc"].n_questions[Split.TEST] == len(
        evaluator.evaluate(Split.TEST).scores["animal/acc"].values
    )


def test_questions_are_split_and_ordered_by_the_hash_of_the_document(folder: Path) -> None:
    evaluator = bound(folder)
    seen: set[str] = set()
    for split in SCORED:
        ids = evaluator.evaluate(split).scores["animal/acc"].ids
        assert {split_of(h, SHARES) for h in ids} == {split}
        assert [question_order(h) for h in ids] == sorted(question_order(h) for h in ids)
        seen.update(ids)
    assert len(seen) == 60


@pytest.mark.parametrize("fidelity", [0.01, 0.3, 0.5, 1.0])
def test_questions_of_a_smaller_fidelity_are_the_first_of_a_larger_one(folder: Path, fidelity: float) -> None:
    evaluator = bound(folder)
    full, part = evaluator.evaluate(Split.SEARCH), evaluator.evaluate(Split.SEARCH, fidelity)
    for name, scores in part.scores.items():
        n = max(2, math.ceil(fidelity * len(full.scores[name].ids)))
        assert scores.ids == full.scores[name].ids[:n]
        np.testing.assert_allclose(scores.values, full.scores[name].values[:n], rtol=1e-4, atol=1e-5)
    assert part.cost.questions == sum(len(part.scores[f"{t}/acc"].ids) for t in ("animal", "colour"))


def test_batch_size_does_not_change_the_answers(folder: Path) -> None:
    model, tokenizer = make_encoder(), make_tokenizer()
    found = []
    for size in (1, 7, 64):
        evaluator = Classification({**options(folder), "batch_size": size}, shares=SHARES, seed=0)
        evaluator.bind(model, tokenizer, folder="")
        found.append(evaluator.evaluate(Split.SEARCH).scores["animal/nll"].values)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4, atol=1e-5)


def test_repeated_documents_count_once_and_limit_takes_the_first_in_order(folder: Path) -> None:
    once = bound(folder)
    twice = bound(folder, data=["animal.jsonl", "animal.jsonl"])
    assert twice.metrics() == once.metrics()
    assert twice.fingerprint() == once.fingerprint()
    limited = Classification({**options(folder), "limit": 30}, shares=SHARES, seed=0)
    everything = sorted((r.hash for s in SCORED for r in once._tasks["animal"].scored[s]), key=question_order)
    assert {r.hash for s in SCORED for r in limited._tasks["animal"].scored[s]} == set(everything[:30])


def test_fingerprint_changes_with_questions_heads_and_pooling_but_not_with_batch_size(folder: Path) -> None:
    def fingerprint(changed: dict[str, Any]) -> str:
        return Classification(changed, shares=SHARES, seed=0).fingerprint()

    plain = fingerprint(options(folder))
    assert fingerprint({**options(folder), "batch_size": 3}) == plain
    others = [{**options(folder), "limit": 40}, {**options(folder), "max_length": 5}, options(folder, pooling="cls")]
    found = [fingerprint(o) for o in others]
    head = load_file(folder / "animal.safetensors")
    save_file({**head, "bias": head["bias"] + 1}, folder / "animal.safetensors")
    found.append(fingerprint(options(folder)))
    assert len({plain, *found}) == 5


def test_a_training_model_is_scored_without_dropout_and_left_in_training(folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(folder, model)
    calm = evaluator.evaluate(Split.SEARCH).scores["colour/nll"].values
    loss = evaluator.loss("animal", range(5)).item()
    model.train()
    np.testing.assert_array_equal(evaluator.evaluate(Split.SEARCH).scores["colour/nll"].values, calm)
    assert evaluator.loss("animal", range(5)).item() == loss
    assert all(m.training for m in model.modules())


def test_global_random_generators_are_left_alone(folder: Path) -> None:
    model = make_encoder()
    torch.manual_seed(5)
    before, before_numpy = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    evaluator = bound(folder, model)
    evaluator.evaluate(Split.SEARCH)
    evaluator.loss("animal", [0, 1]).backward()
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], before_numpy)


def test_half_precision_encoders_are_pooled_in_float32(folder: Path) -> None:
    exact = bound(folder).evaluate(Split.SEARCH).scores["animal/acc"].probability
    rounded = bound(folder, make_encoder().to(torch.bfloat16)).evaluate(Split.SEARCH).scores["animal/acc"].probability
    assert np.abs(exact - rounded).mean() < 0.05
    assert bound(folder, make_encoder().to(torch.bfloat16)).loss("animal", [0]).dtype == torch.float32


def test_texts_longer_than_the_encoder_are_cut(folder: Path) -> None:
    rows = [{"text": " ".join(["owl"] * (20 + i)), "label": i % 2} for i in range(30)]
    write_rows(folder / "animal.jsonl", rows)
    values = bound(folder).evaluate(Split.SEARCH).scores["animal/acc"].probability
    np.testing.assert_allclose(np.minimum(values, 1 - values), min(values[0], 1 - values[0]), atol=1e-6)


# --- failures ---------------------------------------------------------------------------------------------------------


def test_nan_weights_are_a_non_finite_error(folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(folder, model)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[0] = math.nan
    with pytest.raises(NonFiniteError, match="for 8 of 8 questions of task 'animal'"):
        evaluator.evaluate(Split.SEARCH)
    with pytest.raises(NonFiniteError, match="task 'colour'"):
        bound(folder, model, shares=SplitShares(fit=0.3)).loss("colour", [0])


def test_a_failing_model_is_an_evaluation_error_but_out_of_memory_is_passed_on(folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(folder, model)

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


def test_scores_are_asked_of_a_bound_model_on_a_scored_split(folder: Path) -> None:
    evaluator = Classification(options(folder), shares=SHARES, seed=0)
    with pytest.raises(EvaluationError, match="call bind before"):
        evaluator.evaluate(Split.SEARCH)
    for split, fidelity in ((Split.FIT, 1.0), (Split.SEARCH, 0.0), (Split.SEARCH, 1.5)):
        with pytest.raises(EvaluationError, match=r"the fit split is not scored|0 <= after < fidelity <= 1"):
            bound(folder).evaluate(split, fidelity)


def test_a_head_of_another_hidden_size_or_a_model_without_hidden_states_is_refused_at_bind(folder: Path) -> None:
    evaluator = Classification(options(folder), shares=SHARES, seed=0)
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


def test_all_problems_with_options_come_at_once_with_the_nearest_key(folder: Path) -> None:
    given = options(folder, pooling="max", hed="x", labels=3)
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
        ({"train": "animal.jsonl"}, "all texts of its 60 rows also stand in data"),
    ],
)
def test_wrong_files_are_refused_before_any_weight_is_loaded(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    good = sentences(60, 2, seed=1)
    write_rows(folder / "few.jsonl", good[:3])
    (folder / "broken.jsonl").write_text('{"text": "owl", "label": 0}\n{"text": \n')
    write_rows(folder / "wrong.jsonl", [*good[:2], {"text": "owl", "label": True}, {"text": "owl", "label": 2}])
    with pytest.raises(StudyFileError, match=message):
        Classification(options(folder, **change), shares=SHARES, seed=0)


@pytest.mark.parametrize(
    "tensors",
    [{"weight": torch.ones(2, 16), "bias": torch.ones(3)}, {"weight": torch.ones(1, 16)}, {"w": torch.ones(2, 16)}],
)
def test_misshapen_heads_are_refused(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "animal.safetensors")
    with pytest.raises(StudyFileError, match=r"tasks.animal.head: .*animal.safetensors"):
        Classification(options(folder), shares=SHARES, seed=0)


def test_a_file_of_the_wrong_format_does_not_flood_the_message(folder: Path) -> None:
    with pytest.raises(StudyFileError) as caught:
        Classification(options(folder, label="lable"), shares=SHARES, seed=0)
    assert len(caught.value.problems) == 12
    assert caught.value.problems[5].endswith("55 more lines are wrong")


# --- the differentiable loss ------------------------------------------------------------------------------------------


def fit_rows(evaluator: Classification, task: str) -> list[tuple[str, int]]:
    return [(row.text, row.label) for row in evaluator._tasks[task].fit]


def test_rows_to_fit_on_are_the_train_file_or_the_fit_share_and_are_never_scored(folder: Path) -> None:
    evaluator = bound(folder, shares=SplitShares(fit=0.2))
    scored = {t: {d for s in SCORED for d in documents(evaluator, t, s)} for t in ("animal", "colour")}
    assert len(scored["animal"]) == 60, "a task with train rows keeps all its questions"
    n_fit = evaluator.fit_tasks()
    assert n_fit["animal"] == 20
    assert n_fit["colour"] == 50 - len(scored["colour"]) > 0
    for task in scored:
        assert not {t for t, _ in fit_rows(evaluator, task)} & {t for t, _ in scored[task]}
    assert bound(folder).fit_tasks()["colour"] == 0


def test_train_rows_that_are_also_questions_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = sentences(20, 2, seed=2) + sentences(60, 2, seed=1)[:5]
    write_rows(folder / "animal_train.jsonl", rows)
    assert bound(folder).fit_tasks()["animal"] == 20
    assert "5 of 25 rows to fit on are also questions" in caplog.text


def test_losses_are_those_of_a_direct_forward_pass(folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(folder, model, shares=SplitShares(fit=0.2))
    for task, n_classes in (("animal", 2), ("colour", 3)):
        rows = [4, 0, 3, 3]
        chosen = [fit_rows(evaluator, task)[i] for i in rows]
        with torch.no_grad():
            log_p = torch.stack([direct_logits(model, folder, task, t) for t, _ in chosen]).log_softmax(-1)
        gold = -sum(log_p[i, label].item() for i, (_, label) in enumerate(chosen)) / 4
        entropy = -(log_p.exp() * log_p).sum().item() / 4 / math.log(n_classes)
        assert evaluator.loss(task, rows).item() == pytest.approx(gold, rel=1e-4)
        assert evaluator.loss(task, rows, "entropy").item() == pytest.approx(entropy, rel=1e-4)
        assert evaluator.predict(task, rows) == log_p.argmax(-1).tolist()
        labels = dict.fromkeys(rows, n_classes - 1)
        evaluator.set_pseudo_labels(task, labels)
        pseudo = -log_p[:, n_classes - 1].mean().item()
        assert evaluator.loss(task, rows, "pseudo").item() == pytest.approx(pseudo, rel=1e-4)


@pytest.mark.parametrize("kind", ["gold", "pseudo", "kl", "entropy"])
def test_gradients_reach_the_live_parameters_and_agree_with_finite_differences(folder: Path, kind: str) -> None:
    model = make_encoder().double()
    evaluator = bound(folder, model)
    evaluator.set_pseudo_labels("animal", dict(enumerate(evaluator.predict("animal", range(20)))))
    evaluator.evaluate(Split.SEARCH)  # scoring in between leaves nothing behind that a graph could not hold
    parameter = model.encoder.layer[0].intermediate.dense.weight
    with torch.no_grad():
        parameter.mul_(-1)
        evaluator.remember("animal", range(20))
        parameter.mul_(-1)
    evaluator.loss("animal", range(12), kind).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "key.bias" not in n)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction /= direction.norm()
    expected, step = (parameter.grad * direction).sum().item(), 1e-2
    with torch.no_grad():
        losses = []
        for sign in (1, -2):
            parameter += sign * step * direction
            losses.append(evaluator.loss("animal", range(12), kind).item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected, rel=1e-3, abs=2e-5)


def test_pseudo_labels_are_those_of_the_weights_that_were_live(folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(folder, model)
    with pytest.raises(EvaluationError, match="no pseudo labels"):
        evaluator.loss("animal", [0], "pseudo")
    evaluator.set_pseudo_labels("animal", dict(enumerate(evaluator.predict("animal", range(20)))))
    expert = evaluator.loss("animal", range(20), "pseudo").item()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(-1)
    assert evaluator.loss("animal", range(20), "pseudo").item() > expert


def test_the_divergence_from_what_was_remembered_is_zero_until_the_weights_change(folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(folder, model)
    with pytest.raises(EvaluationError, match="'animal' has no expert's answers to compare with for 1 of 1 rows"):
        evaluator.loss("animal", [0], "kl")
    evaluator.remember("animal", range(3, 20))
    evaluator.remember("animal", [2, 0, 1])
    assert evaluator.questions_to_remember("animal") == 1
    texts = [t for t, _ in fit_rows(evaluator, "animal")]
    with torch.no_grad():
        expert = torch.stack([direct_logits(model, folder, "animal", t) for t in texts]).double().log_softmax(-1)
        assert abs(evaluator.loss("animal", range(20), "kl").item()) < 1e-5
        model.encoder.layer[0].intermediate.dense.weight.mul_(-1)
        live = torch.stack([direct_logits(model, folder, "animal", t) for t in texts]).double().log_softmax(-1)
    expected = (expert.exp() * (expert - live)).sum(1)
    for rows in ([4, 0, 3, 3], range(20)):
        found = evaluator.loss("animal", rows, "kl").item()
        assert found == pytest.approx(expected[list(rows)].mean().item(), rel=0.02, abs=1e-6)


def test_wrong_requests_to_the_loss_are_named(folder: Path) -> None:
    evaluator = bound(folder)
    with pytest.raises(EvaluationError, match="no task is called 'anmal'"):
        evaluator.loss("anmal", [0])
    with pytest.raises(EvaluationError, match=r"has 20 rows to fit on .* asked for 3 to 20"):
        evaluator.loss("animal", [3, 20])
    with pytest.raises(EvaluationError, match="asked for -1 to 0"):
        evaluator.predict("animal", [0, -1])
    with pytest.raises(EvaluationError, match="has 0 rows to fit on"):
        evaluator.loss("colour", [0])
    with pytest.raises(InputError, match="no loss is called 'glod'; did you mean 'gold'"):
        evaluator.loss("animal", [0], "glod")
    with pytest.raises(EvaluationError, match="must be classes from 0 to 1, got 2 for row 4"):
        evaluator.set_pseudo_labels("animal", {3: 0, 4: 2})
    evaluator.set_pseudo_labels("animal", {3: 0, 5: 1})
    with pytest.raises(EvaluationError, match=r"'animal' has no pseudo labels for 1 of 3 rows \(row 4\)"):
        evaluator.loss("animal", [3, 4, 5], "pseudo")


# --- where it stands --------------------------------------------------------------------------------------------------


def test_building_it_imports_no_torch(folder: Path) -> None:
    code = (
        "import json, sys; from evaluators.classification import Classification as C; "
        "from merge_search.evaluation import SplitShares; "
        "C(json.loads(sys.argv[1]), shares=SplitShares(), seed=0).metrics(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(options(folder))], check=True)


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.skipif("MERGE_SEARCH_ZOO" not in os.environ, reason="MERGE_SEARCH_ZOO is not set")
@pytest.mark.parametrize(("task", "accuracy"), [("sst2", 0.845), ("trec6", 0.944)])
def test_real_experts_reach_their_published_accuracy(task: str, accuracy: float) -> None:
    zoo = Path(os.environ["MERGE_SEARCH_ZOO"])
    entry = {"data": f"data/text/{task}/test.jsonl", "head": f"encoder/{task}/head.safetensors"}
    evaluator = Classification({"include_path": str(zoo), "tasks": {task: entry}}, shares=SHARES, seed=0)
    folder = zoo / "encoder" / task
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    evaluator.bind(model, AutoTokenizer.from_pretrained(folder), folder=str(folder))
    values = np.concatenate([evaluator.evaluate(s).scores[f"{task}/acc"].values for s in SCORED])
    assert len(values) == len((zoo / f"data/text/{task}/test.jsonl").read_text().splitlines())
    assert round(values.mean(), 3) == accuracy


# --- padding ----------------------------------------------------------------------------------------------------------


def test_rows_are_parted_where_padding_is_least(folder: Path) -> None:
    encoder = bound(folder)._bound()
    tokens = [[5] * n for n in (2, 9, 3, 2, 30, 9)]
    batches = encoder.trim_batches(tokens)
    assert [b.rows for b in batches] == [[0, 3, 2], [1, 5], [4]]
    assert [tuple(b.input_ids.shape) for b in batches] == [(3, 3), (2, 9), (1, 30)]
    assert [b.rows for b in encoder.trim_batches([[5], [6]])] == [[0, 1]]


def test_three_parts_are_the_best_that_trying_all_finds() -> None:
    from evaluators.encoder_heads import _cuts

    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = sorted(rng.integers(1, 60, size=rng.integers(1, 12)).tolist())
        n = len(lengths)

        def tokens(j: int, k: int, lengths: list[int] = lengths) -> int:
            return sum(len(part) * max(part, default=0) for part in (lengths[:j], lengths[j:k], lengths[k:]))

        assert tokens(*_cuts(lengths)) == min(tokens(j, k) for j in range(n + 1) for k in range(j, n + 1))
