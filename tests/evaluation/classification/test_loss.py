"""The classification evaluator's differentiable loss: rows to fit on, gradients, labels, divergence."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_encoder import (
    SCORED,
    bound,
    direct_logits,
    documents,
    make_encoder,
    make_tokenizer,
    options,
    sentences,
    write_rows,
)

from evaluators.classification.evaluator import Classification
from merge_search.errors import EvaluationError, InputError
from merge_search.evaluation import Split, SplitShares

# --- the differentiable loss ------------------------------------------------------------------------------------------


def fit_rows(evaluator: Classification, task: str) -> list[tuple[str, int]]:
    return [(row.text, row.label) for row in evaluator._tasks[task].fit]


def test_rows_to_fit_on_are_the_train_file_or_the_fit_share_and_are_never_scored(encoder_folder: Path) -> None:
    evaluator = bound(encoder_folder, shares=SplitShares(fit=0.2))
    scored = {t: {d for s in SCORED for d in documents(evaluator, t, s)} for t in ("animal", "colour")}
    assert len(scored["animal"]) == 60, "a task with train rows keeps all its questions"
    n_fit = evaluator.fit_tasks()
    assert n_fit["animal"] == 20
    assert n_fit["colour"] == 50 - len(scored["colour"]) > 0
    for task in scored:
        assert not {t for t, _ in fit_rows(evaluator, task)} & {t for t, _ in scored[task]}
    assert bound(encoder_folder).fit_tasks()["colour"] == 0


def test_train_rows_that_are_also_questions_are_left_out(
    encoder_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = sentences(20, 2, seed=2) + sentences(60, 2, seed=1)[:5]
    write_rows(encoder_folder / "animal_train.jsonl", rows)
    assert bound(encoder_folder).fit_tasks()["animal"] == 20
    assert "5 of 25 rows to fit on are also questions" in caplog.text


def test_test_texts_are_fitted_on_without_their_labels(encoder_folder: Path) -> None:
    chosen = {**options(encoder_folder), "fit": "test_inputs"}
    evaluator = Classification(chosen, shares=SplitShares(fit=0.2), seed=0)
    evaluator.bind(make_encoder(), make_tokenizer(), folder="")
    for task in ("animal", "colour"):
        tested = [text for text, _ in documents(evaluator, task, Split.TEST)]
        assert fit_rows(evaluator, task) == [(text, -1) for text in tested]
        assert evaluator.losses(task) == ("pseudo", "kl", "entropy")
        assert 0 < evaluator.loss(task, range(len(tested)), "entropy").item() < 1
        with pytest.raises(InputError, match="whose labels are never read: it has no gold loss, only pseudo"):
            evaluator.loss(task, [0])
    whole = bound(encoder_folder, shares=SplitShares())
    assert [documents(evaluator, "colour", s) for s in SCORED] == [documents(whole, "colour", s) for s in SCORED]


def test_the_answers_of_a_row_are_its_classes(encoder_folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(encoder_folder, model, shares=SplitShares(fit=0.2))
    for task in ("animal", "colour"):
        text, label = fit_rows(evaluator, task)[2]
        log_p = direct_logits(model, encoder_folder, task, text).detach().log_softmax(-1)
        losses, p = evaluator.answers(task, 2)
        torch.testing.assert_close(losses.detach(), -log_p, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p, log_p.exp(), rtol=1e-4, atol=1e-5)
        assert losses[label].item() == pytest.approx(evaluator.loss(task, [2]).item(), rel=1e-5)


def test_losses_are_those_of_a_direct_forward_pass(encoder_folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(encoder_folder, model, shares=SplitShares(fit=0.2))
    for task, n_classes in (("animal", 2), ("colour", 3)):
        rows = [4, 0, 3, 3]
        chosen = [fit_rows(evaluator, task)[i] for i in rows]
        with torch.no_grad():
            log_p = torch.stack([direct_logits(model, encoder_folder, task, t) for t, _ in chosen]).log_softmax(-1)
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
def test_gradients_reach_the_live_parameters_and_agree_with_finite_differences(encoder_folder: Path, kind: str) -> None:
    model = make_encoder().double()
    evaluator = bound(encoder_folder, model)
    evaluator.set_pseudo_labels("animal", dict(enumerate(evaluator.predict("animal", range(20)))))
    evaluator.evaluate(Split.SEARCH)  # scoring in between leaves nothing behind that a graph could not hold
    parameter = model.encoder.layer[0].intermediate.dense.weight
    with torch.no_grad():
        parameter.mul_(-1)
        evaluator.cache_teacher("animal", range(20))
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


def test_pseudo_labels_are_those_of_the_weights_that_were_live(encoder_folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(encoder_folder, model)
    with pytest.raises(EvaluationError, match="no pseudo labels"):
        evaluator.loss("animal", [0], "pseudo")
    evaluator.set_pseudo_labels("animal", dict(enumerate(evaluator.predict("animal", range(20)))))
    expert = evaluator.loss("animal", range(20), "pseudo").item()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(-1)
    assert evaluator.loss("animal", range(20), "pseudo").item() > expert


def test_the_divergence_from_what_was_remembered_is_zero_until_the_weights_change(encoder_folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(encoder_folder, model)
    with pytest.raises(EvaluationError, match="'animal' has no teacher's answers to compare with for 1 of 1 rows"):
        evaluator.loss("animal", [0], "kl")
    evaluator.cache_teacher("animal", range(3, 20))
    evaluator.cache_teacher("animal", [2, 0, 1])
    assert evaluator.teacher_questions("animal") == 1
    texts = [t for t, _ in fit_rows(evaluator, "animal")]
    with torch.no_grad():
        expert = (
            torch.stack([direct_logits(model, encoder_folder, "animal", t) for t in texts]).double().log_softmax(-1)
        )
        assert abs(evaluator.loss("animal", range(20), "kl").item()) < 1e-5
        model.encoder.layer[0].intermediate.dense.weight.mul_(-1)
        live = torch.stack([direct_logits(model, encoder_folder, "animal", t) for t in texts]).double().log_softmax(-1)
    expected = (expert.exp() * (expert - live)).sum(1)
    for rows in ([4, 0, 3, 3], range(20)):
        found = evaluator.loss("animal", rows, "kl").item()
        assert found == pytest.approx(expected[list(rows)].mean().item(), rel=0.02, abs=1e-6)


def test_wrong_requests_to_the_loss_are_named(encoder_folder: Path) -> None:
    evaluator = bound(encoder_folder)
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
