"""Losses of lm-eval's tasks without labels: an expert's answers, and how likely it finds them and others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lm import (
    FIT_TASKS,
    N_TRAIN,
    SPECIAL,
    WORDS,
    bound,
    cache_another,
    docs,
    make_model,
    make_pieces,
    make_tokenizer,
    write_tasks,
)

from merge_search.errors import EvaluationError

pytestmark = pytest.mark.usefixtures("own_dataset_cache")


def test_answers_are_learned_in_the_tokens_that_were_generated_although_decoding_loses_the_space(
    tmp_path: Path,
) -> None:
    one_word = {
        **FIT_TASKS["t_generate"],
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 1, "do_sample": False},
    }
    model = make_model(vocab_size=len(SPECIAL) + 2 * len(WORDS))
    tokenizer = make_pieces()
    folder = write_tasks(tmp_path, {"t_generate": one_word})
    e = bound(folder, ["t_generate"], model, tokenizer=tokenizer, batch_size=N_TRAIN)
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    answers = e.predict("t_generate", range(N_TRAIN))
    handle.remove()
    assert len(calls) == 2, "the space is known without asking the model again: a probe, one token of one batch"
    e.set_pseudo_labels("t_generate", dict(enumerate(answers)))
    with_space = 0
    for row, doc in enumerate(docs(e, "t_generate")):
        ids = torch.tensor([tokenizer.encode(doc["query"], add_special_tokens=False)])
        with torch.no_grad():
            best = int(model(input_ids=ids).logits[0, -1].argmax())
        if best >= len(SPECIAL):
            (piece,) = e._losses()._pieces(e._fit["t_generate"], row, "pseudo")
            assert piece.targets[0] == best, tokenizer.convert_ids_to_tokens([*piece.targets, best])
            with_space += best < len(SPECIAL) + len(WORDS)
    assert with_space > 3


@pytest.mark.parametrize("task", FIT_TASKS)
def test_the_divergence_from_an_expert_is_zero_at_the_expert_and_not_elsewhere(fit_folder: Path, task: str) -> None:
    model = make_model()
    e = bound(fit_folder, [task], model)
    with pytest.raises(
        EvaluationError, match=f"{task!r} has no teacher's answers to compare with .*: call cache_teacher first"
    ):
        e.loss(task, [0], "kl")
    e.cache_teacher(task, range(N_TRAIN))
    assert abs(e.loss(task, range(N_TRAIN), "kl").item()) < 1e-4
    cache_another(e, model, task)
    assert e.loss(task, range(N_TRAIN), "kl").item() > 1e-2


def test_the_divergence_is_that_of_the_softmax_over_choices(fit_folder: Path) -> None:
    model = make_model()
    e = bound(fit_folder, ["t_choice"], model)
    rows = [3, 0, 3]

    def shares() -> list[torch.Tensor]:
        fit = e._fit["t_choice"]
        with torch.no_grad():
            sums, n = e._losses()._choice_sums(fit, rows)
        return [s[:k].double().log_softmax(0) for s, k in zip(sums, n.tolist(), strict=True)]

    e.cache_teacher("t_choice", rows)
    expert = shares()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    expected = [(p.exp() * (p - q)).sum().item() for p, q in zip(expert, shares(), strict=True)]
    assert min(expected) > 1e-4
    assert e.loss("t_choice", rows, "kl").item() == pytest.approx(np.mean(expected), rel=5e-3)


def test_pseudo_labels_are_what_the_model_answers(fit_folder: Path) -> None:
    model = make_model()
    e = bound(fit_folder, ["t_choice", "t_generate"], model)
    for task in ("t_choice", "t_generate"):
        labels = dict(enumerate(e.predict(task, range(N_TRAIN))))
        e.set_pseudo_labels(task, labels)
        own = e.loss(task, range(N_TRAIN), "pseudo").item()
        other = {i: f"{x} sings sings" if isinstance(x, str) else 1 - min(x, 1) for i, x in labels.items()}
        e.set_pseudo_labels(task, other)
        assert e.loss(task, range(N_TRAIN), "pseudo").item() > own
    e.set_pseudo_labels("t_choice", {i: d["gold"] for i, d in enumerate(docs(e, "t_choice"))})
    assert e.loss("t_choice", range(9), "pseudo").item() == e.loss("t_choice", range(9)).item()
    e.set_pseudo_labels("t_generate", {i: " " + d["words"] for i, d in enumerate(docs(e, "t_generate"))})
    assert e.loss("t_generate", range(9), "pseudo").item() == e.loss("t_generate", range(9)).item()


def test_generated_answers_are_greedy_and_cut_at_stop_strings(tmp_path: Path) -> None:
    settings = {"until": ["red", "</s>"], "max_gen_toks": 6, "do_sample": False}
    model = make_model()
    e = bound(
        write_tasks(tmp_path, {"t_generate": {**FIT_TASKS["t_generate"], "generation_kwargs": settings}}),
        ["t_generate"],
        model,
    )
    tokenizer = make_tokenizer()
    for row, text in enumerate(e.predict("t_generate", range(8))):
        ids = tokenizer.encode(docs(e, "t_generate")[row]["query"])
        new: list[int] = []
        with torch.no_grad():
            while len(new) < 6 and tokenizer.decode(new[-1:]) not in ("red", "</s>"):
                new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        expected = tokenizer.decode([t for t in new if t > 3]).split("red")[0]
        assert text.split() == expected.split()
