"""Losses of lm-eval's tasks: against the model's own logits, lm-eval's log-likelihoods and finite differences."""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_lm import (
    FIT_TASKS,
    N_TRAIN,
    WORDS,
    bound,
    cache_another,
    docs,
    documents,
    evaluator,
    make_model,
    make_tokenizer,
    write_tasks,
)

from evaluators.lm_eval import losses
from merge_search.errors import EvaluationError, InputError, NonFiniteError, StudyFileError
from merge_search.evaluation import Differentiable

pytestmark = pytest.mark.usefixtures("own_dataset_cache")


def token_log_p(model: Any, context: str, answer: str) -> torch.Tensor:
    """log p of the answer's tokens by one plain forward pass. Shape (tokens,)."""
    tokenizer = make_tokenizer()
    before, after = tokenizer.encode(context) or [tokenizer.bos_token_id], tokenizer.encode(answer)
    logits = model(input_ids=torch.tensor([before + after]), use_cache=False).logits[0].float()
    log_p = torch.log_softmax(logits, -1)
    return torch.stack([log_p[len(before) + i - 1, t] for i, t in enumerate(after)])


def expected_gold(model: Any, task: str, doc: dict[str, Any]) -> float:
    context, answer = {
        "t_choice": lambda: (doc["query"], doc["few"][doc["gold"]]),
        "t_generate": lambda: (doc["query"], doc["words"] + " </s>"),
        "t_word": lambda: (doc["query"], doc["words"]),
        "t_rolling": lambda: ("", doc["query"]),
    }[task]()
    return -token_log_p(model, context, answer).mean().item()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("task", list(FIT_TASKS))
def test_the_gold_loss_is_the_mean_negative_log_likelihood_of_the_answers_tokens(
    fit_folder: Path, task: str, kind: str
) -> None:
    model = make_model(kind)
    e = bound(fit_folder, [task], model)
    rows = [3, 0, 7, 3]
    with torch.no_grad():
        expected = np.mean([expected_gold(model, task, docs(e, task)[i]) for i in rows])
        loss = e.loss(task, rows)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert isinstance(e, Differentiable)


def test_losses_over_choices_follow_lm_evals_log_likelihoods(fit_folder: Path) -> None:
    model = make_model()
    e = bound(fit_folder, ["t_choice"], model)
    rows = list(range(10))
    gold, entropy, best = [], [], []
    with torch.no_grad():
        for doc in (docs(e, "t_choice")[i] for i in rows):
            ll = torch.stack([token_log_p(model, doc["query"], c).sum() for c in doc["few"]])
            log_p = torch.log_softmax(ll, 0)
            gold.append(-log_p[doc["gold"]].item())
            entropy.append(-(log_p.exp() * log_p).sum().item() / math.log(len(ll)))
            best.append(int(ll.argmax()))
        assert e.loss("t_choice", rows, "choice").item() == pytest.approx(np.mean(gold), rel=1e-4)
        assert e.loss("t_choice", rows, "entropy").item() == pytest.approx(np.mean(entropy), rel=1e-4)
    assert e.predict("t_choice", rows) == best
    assert len(set(best)) > 1


def test_the_answers_of_a_row_are_its_choices_by_their_mean_log_likelihood(fit_folder: Path) -> None:
    """DF-Merge's p(y): softmax over choices of the log-likelihood per token."""
    model = make_model()
    e = bound(fit_folder, list(FIT_TASKS), model)
    for row in range(4):
        doc = docs(e, "t_choice")[row]
        with torch.no_grad():
            wanted = torch.stack([-token_log_p(model, doc["query"], c).mean() for c in doc["few"]])
        found = e.answers("t_choice", row)
        assert found is not None
        torch.testing.assert_close(found[0].detach(), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], torch.softmax(-wanted, 0), rtol=1e-4, atol=1e-5)
        assert found[0].requires_grad
        assert found[0][doc["gold"]].item() == pytest.approx(e.loss("t_choice", [row]).item(), rel=1e-5)
    assert e.answers("t_generate", 0) is None
    assert e.answers("t_word", 0) is None


def test_the_entropy_of_a_generated_answer_is_that_of_each_token_of_the_models_own_answer(fit_folder: Path) -> None:
    """Mean over rows of the mean over tokens of -sum p log p / log(vocabulary), along the greedy answer."""
    model = make_model()
    e = bound(fit_folder, ["t_generate"], model)
    assert e.losses("t_generate") == ("pseudo", "kl", "entropy", "correct")  # it scores the first word of its target
    assert e.generated_questions("t_generate", "entropy") == 1
    assert e.generated_questions("t_generate", "gold") == 0
    rows, tokenizer, wanted = range(6), make_tokenizer(), []
    with torch.no_grad():
        for row, answer in zip(rows, e.predict("t_generate", rows), strict=True):
            context = tokenizer(docs(e, "t_generate")[row]["query"])["input_ids"]
            own = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            log_p = model(torch.tensor([context + own])).logits[0].log_softmax(-1)[len(context) - 1 : -1]
            wanted.append(-(log_p.exp() * log_p).sum(-1).mean().item() / math.log(log_p.shape[-1]))
        assert len(set(e.predict("t_generate", rows))) > 1
        assert e.loss("t_generate", rows, "entropy").item() == pytest.approx(np.mean(wanted), rel=1e-5)


def test_no_more_tokens_of_an_own_answer_are_generated_than_its_entropy_reads(
    fit_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = bound(fit_folder, ["t_generate"])
    whole = e.loss("t_generate", range(6), "entropy").item()
    asked = []
    generate = e._live.generate  # type: ignore[union-attr]
    monkeypatch.setattr(e._live, "generate", lambda requests: asked.extend(requests) or generate(requests))
    monkeypatch.setattr(losses, "MOST_OWN_TOKENS", 1)
    assert e.loss("t_generate", range(6), "entropy").item() != pytest.approx(whole, rel=1e-3)
    assert [request.args[1]["max_gen_toks"] for request in asked] == [1] * 6


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        *((t, kind) for t in FIT_TASKS for kind in ("gold", "kl")),
        *(("t_choice", kind) for kind in ("entropy", "choice", "pseudo")),
        ("t_generate", "entropy"),
    ],
)
def test_gradients_are_the_slopes_of_the_loss(fit_folder: Path, task: str, kind: str) -> None:
    model = make_model(dtype=torch.float64)
    e = bound(fit_folder, [task], model)
    if kind == "pseudo":
        e.set_pseudo_labels(task, dict.fromkeys(range(N_TRAIN), 1))
    if kind == "kl":
        cache_another(e, model, task)
    rows = range(12)
    e.loss(task, rows, kind).backward()
    step = 1e-2
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        weight = model.get_parameter(name)
        at = np.unravel_index(int(weight.grad.abs().argmax()), tuple(weight.shape))
        losses = []
        with torch.no_grad():
            for shift in (step, -2 * step, step):
                weight[at] += shift
                losses.append(e.loss(task, rows, kind).item())
        slope = (losses[0] - losses[1]) / (2 * step)
        assert abs(slope) > 1e-4
        assert weight.grad[at].item() == pytest.approx(slope, rel=0.02), name


def test_only_parameters_that_need_gradients_get_them_and_dropout_is_off(fit_folder: Path) -> None:
    model = make_model(attention_dropout=0.5)
    e = bound(fit_folder, ["t_generate"], model)
    loss = e.loss("t_generate", range(8)).item()
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = model.lm_head.weight.requires_grad_(True)
    again = e.loss("t_generate", range(8))
    again.backward()
    assert again.item() == loss
    assert head.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters() if p is not head)
    assert bound(fit_folder, ["t_word"], make_model(dtype=torch.bfloat16)).loss("t_word", [0]).dtype == torch.float32


def test_a_rows_loss_does_not_depend_on_the_rows_beside_it(fit_folder: Path) -> None:
    e = bound(fit_folder, list(FIT_TASKS))
    with torch.no_grad():
        for task in FIT_TASKS:
            alone = np.mean([e.loss(task, [i]).item() for i in range(9)])
            assert e.loss(task, range(9)).item() == pytest.approx(alone, rel=1e-5)
            assert e.loss(task, range(9)).item() == e.loss(task, np.arange(9)).item()


def test_weights_changed_in_place_change_the_loss_and_global_generators_stay(fit_folder: Path) -> None:
    model = make_model()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    e = bound(fit_folder, ["t_choice", "t_generate"], model)
    before = e.loss("t_choice", range(5)).item()
    e.predict("t_generate", range(5))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    after = e.loss("t_choice", range(5)).item()
    assert after != before
    assert after == bound(fit_folder, ["t_choice"], model).loss("t_choice", range(5)).item()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_give_the_losses_and_gradients_of_plain_ones(fit_folder: Path, dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    packed, plain = (bound(fit_folder, list(FIT_TASKS), model, tree_packing=p) for p in (True, False))
    sizes: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for task, kind in [*((t, "gold") for t in FIT_TASKS), ("t_choice", "choice"), ("t_choice", "entropy")]:
        packed.loss(task, range(N_TRAIN), kind)  # compares itself once
        found = []
        for e in (packed, plain):
            sizes.clear()
            model.zero_grad()
            loss = e.loss(task, [*range(N_TRAIN), 0], kind)
            loss.backward()
            grad = model.model.layers[0].self_attn.q_proj.weight.grad.float().clone()
            found.append((loss.item(), grad, *sizes))
        (a, grad_a, size_a), (b, grad_b, size_b) = found
        assert size_b > 1.2 * size_a, "nothing was packed"
        exact = dtype == torch.float32
        assert a == pytest.approx(b, rel=1e-5 if exact else 0.02)
        assert (grad_a - grad_b).norm() < (1e-4 if exact else 0.1) * grad_b.norm()
    handle.remove()


def test_rows_are_not_packed_where_that_gives_other_numbers(
    fit_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from evaluators.lm_eval import losses as lm_eval_loss

    model = make_model("gpt2")
    expected = bound(fit_folder, ["t_word"], model, tree_packing=False).loss("t_word", range(N_TRAIN)).item()
    assert bound(fit_folder, ["t_word"], model).loss("t_word", range(N_TRAIN)).item() == expected
    monkeypatch.setattr(lm_eval_loss, "obstacle", lambda _: None)
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **k: original(**k))  # a model that knows better
    with caplog.at_level(logging.WARNING):
        assert bound(fit_folder, ["t_word"], model).loss("t_word", range(N_TRAIN)).item() == expected
    assert "rows are not packed: log-likelihoods differ" in caplog.text


def test_choices_of_one_token_cost_one_sequence(tmp_path: Path) -> None:
    rows = [{**d, "few": WORDS[:4]} for d in documents(N_TRAIN, 1)]
    model = make_model()
    e = bound(
        write_tasks(tmp_path, {"t_choice": FIT_TASKS["t_choice"]}, train=rows), ["t_choice"], model, tree_packing=False
    )
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    e.loss("t_choice", [0, 1, 2], "choice")
    handle.remove()
    assert seen == [(3, max(len(docs(e, "t_choice")[i]["query"].split()) for i in range(3)))]


@pytest.mark.parametrize(
    ("until", "end"), [(["\n"], "<nl>"), ("\n", "<nl>"), (["Question:", "\n\n"], "<nl> <nl>"), (["Question:"], "</s>")]
)
def test_a_generated_answer_ends_with_its_line_break_or_the_end_of_text(
    tmp_path: Path, until: str | list[str], end: str
) -> None:
    task = {**FIT_TASKS["t_generate"], "generation_kwargs": {"until": until, "max_gen_toks": 4}}
    model = make_model()
    e = bound(write_tasks(tmp_path, {"t_generate": task}), ["t_generate"], model)
    doc = docs(e, "t_generate")[0]
    with torch.no_grad():
        expected = -token_log_p(model, doc["query"], f"{doc['words']} {end}").mean().item()
        assert e.loss("t_generate", [0]).item() == pytest.approx(expected, rel=1e-5)


def test_what_is_longer_than_the_model_takes_loses_its_beginning_as_in_lm_eval(fit_folder: Path) -> None:
    model = make_model()
    e = bound(fit_folder, ["t_word"], model, max_length=5)
    doc = max(docs(e, "t_word"), key=lambda d: len(d["query"].split()))
    row = docs(e, "t_word").index(doc)
    kept = (doc["query"] + " " + doc["words"]).split()[-6:]
    n = len(doc["words"].split())
    with torch.no_grad():
        expected = -token_log_p(model, " ".join(kept[:-n]), " ".join(kept[-n:])).mean().item()
        assert e.loss("t_word", [row]).item() == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_asked_is_said(fit_folder: Path) -> None:
    with pytest.raises(EvaluationError, match="call bind before asking for losses"):
        evaluator(fit_folder, ["t_choice"]).loss("t_choice", [0])
    e = bound(fit_folder, list(FIT_TASKS))
    with pytest.raises(EvaluationError, match="no task is called 't_choise'; did you mean 't_choice'"):
        e.loss("t_choise", [0])
    with pytest.raises(EvaluationError, match=f"has {N_TRAIN} rows to fit on .* asked for 0 to {N_TRAIN}"):
        e.loss("t_choice", [0, N_TRAIN])
    with pytest.raises(EvaluationError, match="asked for none"):
        e.predict("t_choice", [])
    with pytest.raises(InputError, match="no loss is called 'glod'; did you mean 'gold'"):
        e.loss("t_choice", [0], "glod")
    with pytest.raises(InputError, match="choice loss needs the choices of a multiple_choice task, 't_generate' is"):
        e.loss("t_generate", [0], "choice")
    with pytest.raises(InputError, match="entropy: task 't_word' is loglikelihood, which scores a given text"):
        e.loss("t_word", [0], "entropy")
    with pytest.raises(InputError, match="predict: task 't_word' is loglikelihood, which scores a given text"):
        e.predict("t_word", [0])
    e.set_pseudo_labels("t_choice", {0: 1})
    with pytest.raises(EvaluationError, match=r"'t_choice' has no pseudo labels for 2 of 3 rows \(row 4\)"):
        e.loss("t_choice", [0, 4, 2], "pseudo")
    with pytest.raises(EvaluationError, match=f"asked for 0 to {N_TRAIN}"):
        e.set_pseudo_labels("t_choice", {0: 1, N_TRAIN: 1})
    with pytest.raises(EvaluationError, match=r"must be choices from 0 to \d, got 9"):
        e.set_pseudo_labels("t_choice", {0: 1, 3: 9})
    with pytest.raises(EvaluationError, match="must be texts, got 3"):
        e.set_pseudo_labels("t_generate", {0: 3})
    with pytest.raises(StudyFileError, match="fit_limit"):
        evaluator(fit_folder, ["t_choice"], fit_limit=0)


def test_broken_weights_and_broken_training_rows_are_typed(fit_folder: Path, tmp_path: Path) -> None:
    model = make_model()
    e = bound(fit_folder, ["t_choice"], model)
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    for kind in ("gold", "entropy"):
        with pytest.raises(NonFiniteError, match=f"the {kind} loss of task 't_choice' must be finite, got nan"):
            e.loss("t_choice", [0], kind)
    with pytest.raises(NonFiniteError):
        e.predict("t_choice", [0])
    rows = [{k: v for k, v in d.items() if k != "gold"} for d in documents(4, 1)]
    own = {**FIT_TASKS["t_choice"], "doc_to_text": "!function own.text"}
    path = write_tasks(tmp_path, {"t_own": own}, train=rows) / "t_own.yaml"
    path.write_text(path.read_text().replace("'!function own.text'", "!function own.text"))
    (tmp_path / "own.py").write_text("def text(doc):\n    assert doc['gold'] is not None\n    return doc['query']\n")
    broken = evaluator(tmp_path, ["t_own"])
    with pytest.raises(StudyFileError, match=r"its training_split\) cannot be read: AssertionError; set fit: search"):
        broken.fit_tasks()
