"""Losses of lm-eval's tasks: against the model's own logits, lm-eval's log-likelihoods and finite differences."""

from __future__ import annotations

import json
import logging
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from evaluators.isolation import quiet
from evaluators.lm_eval import LmEval
from merge_search.errors import EvaluationError, InputError, NonFiniteError, StudyFileError
from merge_search.evaluation import Differentiable, Split, SplitShares, question_order

WORDS = [
    "the",
    "red",
    "blue",
    "green",
    "dog",
    "cat",
    "bird",
    "fish",
    "runs",
    "sleeps",
    "eats",
    "sings",
    "fast",
    "slow",
    "today",
    "now",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<nl>"]
N, N_TRAIN, SEED = 30, 24, 7
SHARES = SplitShares(0.5, 0.25, 0.25)
WITH_FIT = SplitShares(0.6, 0.2, 0.2, fit=0.3)

BASE: dict[str, Any] = {"dataset_path": "json", "training_split": "train", "test_split": "test", "num_fewshot": 0}
CHOICE = {
    **BASE,
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}],
}
GENERATE = {
    **BASE,
    "output_type": "generate_until",
    "doc_to_text": "query",
    "doc_to_target": "word",
    "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
WORD = {
    **BASE,
    "output_type": "loglikelihood",
    "doc_to_text": "query",
    "doc_to_target": "{{' ' + word}}",
    "metric_list": [{"metric": "acc"}],
}
ROLLING = {
    **BASE,
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "query",
    "metric_list": [{"metric": "bits_per_byte"}],
}
TASKS = {"t_choice": CHOICE, "t_generate": GENERATE, "t_word": WORD, "t_rolling": ROLLING}


@pytest.fixture(scope="session", autouse=True)
def _own_dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def documents(n: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "query": " ".join(rng.choices(WORDS, k=rng.randint(3, 9))),
            "choices": [" ".join(rng.sample(WORDS, rng.randint(1, 3))) for _ in range(rng.randint(2, 4))],
            "gold": rng.randrange(2),
            "word": " ".join(rng.sample(WORDS, rng.randint(1, 3))),
        }
        for _ in range(n)
    ]


def write_tasks(folder: Path, tasks: dict[str, dict[str, Any]], train: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("test", documents(N, 0)), ("train", train or documents(N_TRAIN, 1))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = {"test": "test.jsonl", "train": "train.jsonl"}
    for name, task in tasks.items():
        text = yaml.safe_dump({"task": name, "dataset_kwargs": {"data_files": files}, **task}, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), TASKS)


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.normalizer = normalizers.Replace("\n", " <nl> ")
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos, unk, _ = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk)


def make_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, dict[str, Any]] = {
        "llama": {"num_key_value_heads": 2, "intermediate_size": 48},
        "gemma2": {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "final_logit_softcapping": 1.5},
        "gpt2": {},
    }
    config = AutoConfig.for_model(
        kind, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, initializer_range=0.4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **{"vocab_size": len(SPECIAL + WORDS), **sizes[kind], **settings},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def evaluator(folder: Path, tasks: list[str], *, shares: SplitShares = SHARES, **options: Any) -> LmEval:
    return LmEval({"tasks": tasks, "include_path": str(folder), **options}, shares=shares, seed=SEED)


def bound(folder: Path, tasks: list[str] | None = None, model: Any = None, **options: Any) -> LmEval:
    e = evaluator(folder, tasks or list(TASKS), **options)
    with quiet(["transformers"]):
        e.bind(model if model is not None else make_model(), make_tokenizer(), folder="tiny")
    return e


def docs(e: LmEval, task: str) -> list[Any]:
    return [row.doc for row in e._fit[task].rows]


def token_log_p(model: Any, context: str, answer: str) -> torch.Tensor:
    """log p of the answer's tokens by one plain forward pass. Shape (tokens,)."""
    tokenizer = make_tokenizer()
    before, after = tokenizer.encode(context) or [tokenizer.bos_token_id], tokenizer.encode(answer)
    logits = model(input_ids=torch.tensor([before + after]), use_cache=False).logits[0].float()
    log_p = torch.log_softmax(logits, -1)
    return torch.stack([log_p[len(before) + i - 1, t] for i, t in enumerate(after)])


def expected_gold(model: Any, task: str, doc: dict[str, Any]) -> float:
    context, answer = {
        "t_choice": lambda: (doc["query"], doc["choices"][doc["gold"]]),
        "t_generate": lambda: (doc["query"], doc["word"] + " </s>"),
        "t_word": lambda: (doc["query"], doc["word"]),
        "t_rolling": lambda: ("", doc["query"]),
    }[task]()
    return -token_log_p(model, context, answer).mean().item()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("task", list(TASKS))
def test_the_gold_loss_is_the_mean_negative_log_likelihood_of_the_answers_tokens(
    folder: Path, task: str, kind: str
) -> None:
    model = make_model(kind)
    e = bound(folder, [task], model)
    rows = [3, 0, 7, 3]
    with torch.no_grad():
        expected = np.mean([expected_gold(model, task, docs(e, task)[i]) for i in rows])
        loss = e.loss(task, rows)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert isinstance(e, Differentiable)


def test_losses_over_choices_follow_lm_evals_log_likelihoods(folder: Path) -> None:
    model = make_model()
    e = bound(folder, ["t_choice"], model)
    rows = list(range(10))
    gold, entropy, best = [], [], []
    with torch.no_grad():
        for doc in (docs(e, "t_choice")[i] for i in rows):
            ll = torch.stack([token_log_p(model, doc["query"], c).sum() for c in doc["choices"]])
            log_p = torch.log_softmax(ll, 0)
            gold.append(-log_p[doc["gold"]].item())
            entropy.append(-(log_p.exp() * log_p).sum().item() / math.log(len(ll)))
            best.append(int(ll.argmax()))
        assert e.loss("t_choice", rows, "choice").item() == pytest.approx(np.mean(gold), rel=1e-4)
        assert e.loss("t_choice", rows, "entropy").item() == pytest.approx(np.mean(entropy), rel=1e-4)
    assert e.predict("t_choice", rows) == best
    assert len(set(best)) > 1


def remember_another(e: LmEval, model: Any, task: str) -> None:
    """Let a model of other weights be the expert."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * p.std() * torch.randn(p.shape, generator=draw).to(p.dtype))
        e.remember(task)
        for name, p in model.named_parameters():
            p.copy_(kept[name])


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        *((t, kind) for t in TASKS for kind in ("gold", "kl")),
        *(("t_choice", kind) for kind in ("entropy", "choice", "pseudo")),
    ],
)
def test_gradients_are_the_slopes_of_the_loss(folder: Path, task: str, kind: str) -> None:
    model = make_model(dtype=torch.float64)
    e = bound(folder, [task], model)
    if kind == "pseudo":
        e.set_pseudo_labels(task, [1] * N_TRAIN)
    if kind == "kl":
        remember_another(e, model, task)
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


def test_only_parameters_that_need_gradients_get_them_and_dropout_is_off(folder: Path) -> None:
    model = make_model(attention_dropout=0.5)
    e = bound(folder, ["t_generate"], model)
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
    assert bound(folder, ["t_word"], make_model(dtype=torch.bfloat16)).loss("t_word", [0]).dtype == torch.float32


def test_a_rows_loss_does_not_depend_on_the_rows_beside_it(folder: Path) -> None:
    e = bound(folder)
    with torch.no_grad():
        for task in TASKS:
            alone = np.mean([e.loss(task, [i]).item() for i in range(9)])
            assert e.loss(task, range(9)).item() == pytest.approx(alone, rel=1e-5)
            assert e.loss(task, range(9)).item() == e.loss(task, np.arange(9)).item()


def test_weights_changed_in_place_change_the_loss_and_global_generators_stay(folder: Path) -> None:
    model = make_model()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    e = bound(folder, ["t_choice", "t_generate"], model)
    before = e.loss("t_choice", range(5)).item()
    e.predict("t_generate", range(5))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    after = e.loss("t_choice", range(5)).item()
    assert after != before
    assert after == bound(folder, ["t_choice"], model).loss("t_choice", range(5)).item()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_give_the_losses_and_gradients_of_plain_ones(folder: Path, dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    packed, plain = (bound(folder, None, model, tree_packing=p) for p in (True, False))
    sizes: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for task, kind in [*((t, "gold") for t in TASKS), ("t_choice", "choice"), ("t_choice", "entropy")]:
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
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from evaluators import lm_eval_loss

    model = make_model("gpt2")
    expected = bound(folder, ["t_word"], model, tree_packing=False).loss("t_word", range(N_TRAIN)).item()
    assert bound(folder, ["t_word"], model).loss("t_word", range(N_TRAIN)).item() == expected
    monkeypatch.setattr(lm_eval_loss, "obstacle", lambda _: None)
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **k: original(**k))  # a model that knows better
    with caplog.at_level(logging.WARNING):
        assert bound(folder, ["t_word"], model).loss("t_word", range(N_TRAIN)).item() == expected
    assert "rows are not packed: log-likelihoods differ" in caplog.text


def test_choices_of_one_token_cost_one_sequence(tmp_path: Path) -> None:
    rows = [{**d, "choices": WORDS[:4]} for d in documents(N_TRAIN, 1)]
    model = make_model()
    e = bound(write_tasks(tmp_path, {"t_choice": CHOICE}, rows), ["t_choice"], model, tree_packing=False)
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    e.loss("t_choice", [0, 1, 2], "choice")
    handle.remove()
    assert seen == [(3, max(len(docs(e, "t_choice")[i]["query"].split()) for i in range(3)))]


def make_pieces() -> Any:
    """A tokenizer like SentencePiece's: a space belongs to the word behind it, and decoding drops the first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [(p, 0.0) for p in SPECIAL] + [("▁" + w, -1.0) for w in WORDS] + [(w, -1.5) for w in WORDS]
    words = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    pad, bos, eos, unk, _ = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk)


def test_answers_are_learned_in_the_tokens_that_were_generated_although_decoding_loses_the_space(
    tmp_path: Path,
) -> None:
    one_word = {**GENERATE, "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 1, "do_sample": False}}
    model = make_model(vocab_size=len(SPECIAL) + 2 * len(WORDS))
    e = evaluator(write_tasks(tmp_path, {"t_generate": one_word}), ["t_generate"])
    tokenizer = make_pieces()
    with quiet(["transformers"]):
        e.bind(model, tokenizer, folder="tiny")
    answers = e.predict("t_generate", range(N_TRAIN))
    e.set_pseudo_labels("t_generate", answers)
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


@pytest.mark.parametrize("task", TASKS)
def test_the_divergence_from_an_expert_is_zero_at_the_expert_and_not_elsewhere(folder: Path, task: str) -> None:
    model = make_model()
    e = bound(folder, [task], model)
    with pytest.raises(EvaluationError, match=f"{task!r} has no expert's answers to compare with: call remember first"):
        e.loss(task, [0], "kl")
    assert e.remember(task) == N_TRAIN * (2 if task == "t_generate" else 1)
    assert abs(e.loss(task, range(N_TRAIN), "kl").item()) < 1e-4
    remember_another(e, model, task)
    assert e.loss(task, range(N_TRAIN), "kl").item() > 1e-2


def test_the_divergence_is_that_of_the_softmax_over_choices(folder: Path) -> None:
    model = make_model()
    e = bound(folder, ["t_choice"], model)
    rows = [3, 0, 5]

    def shares() -> list[torch.Tensor]:
        fit = e._fit["t_choice"]
        with torch.no_grad():
            sums, n = e._losses()._choice_sums(fit, rows)
        return [s[:k].double().log_softmax(0) for s, k in zip(sums, n.tolist(), strict=True)]

    e.remember("t_choice")
    expert = shares()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    expected = [(p.exp() * (p - q)).sum().item() for p, q in zip(expert, shares(), strict=True)]
    assert min(expected) > 1e-4
    assert e.loss("t_choice", rows, "kl").item() == pytest.approx(np.mean(expected), rel=5e-3)


def test_pseudo_labels_are_what_the_model_answers(folder: Path) -> None:
    model = make_model()
    e = bound(folder, ["t_choice", "t_generate"], model)
    for task in ("t_choice", "t_generate"):
        labels = e.predict(task, range(N_TRAIN))
        e.set_pseudo_labels(task, labels)
        own = e.loss(task, range(N_TRAIN), "pseudo").item()
        other = [f"{x} sings sings" if isinstance(x, str) else 1 - min(x, 1) for x in labels]
        e.set_pseudo_labels(task, other)
        assert e.loss(task, range(N_TRAIN), "pseudo").item() > own
    e.set_pseudo_labels("t_choice", [d["gold"] for d in docs(e, "t_choice")])
    assert e.loss("t_choice", range(9), "pseudo").item() == e.loss("t_choice", range(9)).item()
    e.set_pseudo_labels("t_generate", [" " + d["word"] for d in docs(e, "t_generate")])
    assert e.loss("t_generate", range(9), "pseudo").item() == e.loss("t_generate", range(9)).item()


def test_generated_answers_are_greedy_and_cut_at_stop_strings(tmp_path: Path) -> None:
    settings = {"until": ["red", "</s>"], "max_gen_toks": 6, "do_sample": False}
    model = make_model()
    e = bound(write_tasks(tmp_path, {"t_generate": {**GENERATE, "generation_kwargs": settings}}), ["t_generate"], model)
    tokenizer = make_tokenizer()
    for row, text in enumerate(e.predict("t_generate", range(8))):
        ids = tokenizer.encode(docs(e, "t_generate")[row]["query"])
        new: list[int] = []
        with torch.no_grad():
            while len(new) < 6 and tokenizer.decode(new[-1:]) not in ("red", "</s>"):
                new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        expected = tokenizer.decode([t for t in new if t > 3]).split("red")[0]
        assert text.split() == expected.split()


@pytest.mark.parametrize(
    ("until", "end"), [(["\n"], "<nl>"), ("\n", "<nl>"), (["Question:", "\n\n"], "<nl> <nl>"), (["Question:"], "</s>")]
)
def test_a_generated_answer_ends_with_its_line_break_or_the_end_of_text(
    tmp_path: Path, until: str | list[str], end: str
) -> None:
    task = {**GENERATE, "generation_kwargs": {"until": until, "max_gen_toks": 4}}
    model = make_model()
    e = bound(write_tasks(tmp_path, {"t_generate": task}), ["t_generate"], model)
    doc = docs(e, "t_generate")[0]
    with torch.no_grad():
        expected = -token_log_p(model, doc["query"], f"{doc['word']} {end}").mean().item()
        assert e.loss("t_generate", [0]).item() == pytest.approx(expected, rel=1e-5)


def test_what_is_longer_than_the_model_takes_loses_its_beginning_as_in_lm_eval(folder: Path) -> None:
    model = make_model()
    e = bound(folder, ["t_word"], model, max_length=5)
    doc = max(docs(e, "t_word"), key=lambda d: len(d["query"].split()))
    row = docs(e, "t_word").index(doc)
    kept = (doc["query"] + " " + doc["word"]).split()[-6:]
    n = len(doc["word"].split())
    with torch.no_grad():
        expected = -token_log_p(model, " ".join(kept[:-n]), " ".join(kept[-n:])).mean().item()
        assert e.loss("t_word", [row]).item() == pytest.approx(expected, rel=1e-5)


def test_fit_rows_are_the_training_split_and_then_nothing_is_withheld(folder: Path) -> None:
    train = {d["query"] for d in documents(N_TRAIN, 1)}
    e = evaluator(folder, ["t_choice"], shares=WITH_FIT)
    assert e.fit_tasks() == {"t_choice": N_TRAIN}
    assert {d["query"] for d in docs(e, "t_choice")} == train
    n = e.metrics()[0].n_questions
    assert Split.FIT not in n
    withheld = evaluator(folder, ["t_choice"], shares=WITH_FIT, fit="search")
    m = withheld.metrics()[0].n_questions
    assert withheld.fit_tasks() == {"t_choice": m[Split.FIT]}
    assert m[Split.FIT] > 0
    assert m[Split.FIT] + m[Split.SEARCH] == n[Split.SEARCH]
    assert evaluator(folder, ["t_choice"], fit="search").fit_tasks() == {"t_choice": 0}


def test_tasks_without_a_training_split_fit_on_a_share_of_their_questions(tmp_path: Path) -> None:
    alone = {k: v for k, v in CHOICE.items() if k != "training_split"}
    same = {**CHOICE, "training_split": "test"}
    write_tasks(tmp_path, {"t_alone": alone, "t_same": same})
    for task in ("t_alone", "t_same"):
        e = bound(tmp_path, [task], shares=WITH_FIT)
        n = e.fit_tasks()[task]
        assert n > 0
        assert e.loss(task, range(n)).item() > 0
        fitted = {d["query"] for d in docs(e, task)}
        for split in (Split.SEARCH, Split.VALIDATION, Split.TEST):
            assert not fitted & {q.doc["query"] for q in e.tasks[0].select(split, 1.0)}
        assert evaluator(tmp_path, [task], shares=WITH_FIT, fit="train").fit_tasks() == {task: 0}


def test_rows_that_are_also_questions_or_have_no_right_choice_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = documents(N, 0)
    same_question = {**asked[1], "word": "another field, which the prompt does not show"}
    without = {**documents(1, 5)[0], "gold": -1}
    write_tasks(tmp_path, {"t_choice": CHOICE}, [*documents(6, 1), asked[0], same_question, without])
    e = evaluator(tmp_path, ["t_choice"])
    with caplog.at_level(logging.WARNING):
        assert e.fit_tasks() == {"t_choice": 6}
    assert "task 't_choice': 2 rows to fit on are also questions: left out" in caplog.text
    assert "task 't_choice': 1 rows to fit on have no right choice: left out" in caplog.text


def test_fewer_fit_rows_are_the_first_of_more_in_the_order_of_questions(folder: Path) -> None:
    few, many = (evaluator(folder, ["t_choice"], fit_limit=n) for n in (5, 4000))
    assert few.fit_tasks() == {"t_choice": 5}
    ids = [r.id for r in many._fit["t_choice"].rows]
    assert [r.id for r in few._fit["t_choice"].rows] == ids[:5]
    assert ids == sorted(ids, key=question_order)


def test_shots_never_show_the_row_itself(tmp_path: Path) -> None:
    shots = {**CHOICE, "num_fewshot": 5, "fewshot_split": "train"}
    write_tasks(tmp_path, {"t_shots": shots}, documents(7, 1))
    e = bound(tmp_path, ["t_shots"])
    asked = [i.args for q in e.tasks[0].questions for i in q.instances]
    before = e.evaluate(Split.SEARCH).scores["t_shots/acc"].values.tolist()
    assert e._loss is not None
    prompts = set()
    for row, doc in enumerate(docs(e, "t_shots")):
        *shown, last = e._loss._rendered(e._fit["t_shots"], row)[0].args[0].split("\n\n")
        assert last == doc["query"]
        assert len(shown) == 5
        assert not any(s.startswith(doc["query"] + " ") for s in shown)
        prompts.add(tuple(shown))
    assert len(prompts) == 7
    assert e.loss("t_shots", range(7)).item() == bound(tmp_path, ["t_shots"]).loss("t_shots", range(7)).item()
    assert [i.args for q in e.tasks[0].questions for i in q.instances] == asked
    assert e.evaluate(Split.SEARCH).scores["t_shots/acc"].values.tolist() == before


def test_the_fingerprint_follows_the_rows_to_fit_on(folder: Path, tmp_path: Path) -> None:
    here = evaluator(folder, ["t_choice"]).fingerprint()
    assert evaluator(write_tasks(tmp_path / "a", TASKS), ["t_choice"]).fingerprint() == here
    other = write_tasks(tmp_path / "b", TASKS, documents(N_TRAIN, 2))
    assert evaluator(other, ["t_choice"]).fingerprint() != here
    assert evaluator(folder, ["t_choice"], fit="search").fingerprint() != here
    assert evaluator(folder, ["t_choice"], fit_limit=9).fingerprint() != here


def test_what_cannot_be_asked_is_said(folder: Path) -> None:
    with pytest.raises(EvaluationError, match="call bind before asking for losses"):
        evaluator(folder, ["t_choice"]).loss("t_choice", [0])
    e = bound(folder)
    with pytest.raises(EvaluationError, match="no task is called 't_choise'; did you mean 't_choice'"):
        e.loss("t_choise", [0])
    with pytest.raises(EvaluationError, match=f"has {N_TRAIN} rows to fit on .* asked for 0 to {N_TRAIN}"):
        e.loss("t_choice", [0, N_TRAIN])
    with pytest.raises(EvaluationError, match="asked for none"):
        e.predict("t_choice", [])
    with pytest.raises(InputError, match="no loss is called 'glod'; did you mean 'gold'"):
        e.loss("t_choice", [0], "glod")
    with pytest.raises(InputError, match="entropy loss needs the choices of a multiple_choice task, 't_generate' is"):
        e.loss("t_generate", [0], "entropy")
    with pytest.raises(InputError, match="predict: task 't_word' is loglikelihood, which scores a given text"):
        e.predict("t_word", [0])
    with pytest.raises(EvaluationError, match="'t_choice' has no pseudo labels"):
        e.loss("t_choice", [0], "pseudo")
    with pytest.raises(EvaluationError, match=f"needs {N_TRAIN} pseudo labels, got 1"):
        e.set_pseudo_labels("t_choice", [0])
    with pytest.raises(EvaluationError, match=r"must be choices from 0 to \d, got 9"):
        e.set_pseudo_labels("t_choice", [9] * N_TRAIN)
    with pytest.raises(EvaluationError, match="must be texts, got 3"):
        e.set_pseudo_labels("t_generate", [3] * N_TRAIN)
    with pytest.raises(StudyFileError, match="fit_limit"):
        evaluator(folder, ["t_choice"], fit_limit=0)


def test_broken_weights_and_broken_training_rows_are_typed(folder: Path, tmp_path: Path) -> None:
    model = make_model()
    e = bound(folder, ["t_choice"], model)
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    for kind in ("gold", "entropy"):
        with pytest.raises(NonFiniteError, match=f"the {kind} loss of task 't_choice' must be finite, got nan"):
            e.loss("t_choice", [0], kind)
    with pytest.raises(NonFiniteError):
        e.predict("t_choice", [0])
    rows = [{k: v for k, v in d.items() if k != "gold"} for d in documents(4, 1)]
    own = {**CHOICE, "doc_to_text": "!function own.text"}
    path = write_tasks(tmp_path, {"t_own": own}, rows) / "t_own.yaml"
    path.write_text(path.read_text().replace("'!function own.text'", "!function own.text"))
    (tmp_path / "own.py").write_text("def text(doc):\n    assert doc['gold'] is not None\n    return doc['query']\n")
    broken = evaluator(tmp_path, ["t_own"])
    with pytest.raises(StudyFileError, match=r"its training_split\) cannot be read: AssertionError; set fit: search"):
        broken.fit_tasks()


def test_an_expert_knows_its_own_training_rows_far_better_than_the_base(demo: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    experts = {"demo_maths": "maths", "demo_stories": "stories", "demo_spelling": "spelling"}
    e = evaluator(demo / "tasks", list(experts), limit=60)
    losses = {}
    for name in ("base", *experts.values()):
        with quiet(["transformers"]), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(demo / "models" / name, dtype=torch.float32)
            e.bind(model, AutoTokenizer.from_pretrained(demo / "models" / name), folder=name)
            losses[name] = {task: e.loss(task, range(48)).item() for task in experts}
    for task, own in experts.items():
        assert losses[own][task] < 0.5 * losses["base"][task]
        assert losses[own][task] == min(found[task] for found in losses.values())


@pytest.mark.zoo
@pytest.mark.slow
def test_a_real_expert_knows_training_rows_beside_the_tasks_far_better_than_the_base(zoo: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data, names = zoo / "data" / "lm", ["intent", "qtype", "where"]
    subprocess.run([sys.executable, zoo / "make_tasks.py", data, tmp_path, "--root", data.parent], check=True)
    for name in names:
        path = tmp_path / f"zoo_{name}.yaml"
        task = yaml.safe_load(path.read_text())
        task["training_split"] = "train"
        task["dataset_kwargs"]["data_files"]["train"] = str(data / name / "train.jsonl")
        path.write_text(yaml.safe_dump(task))
    e = evaluator(tmp_path, [f"zoo_{name}" for name in names], fit_limit=300)
    assert set(e.fit_tasks().values()) == {300}
    losses: dict[str, dict[str, float]] = {}
    for model_name in ("base", *names):
        with quiet(["transformers"]), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(zoo / "lm" / model_name, dtype=torch.float32)
            e.bind(model, AutoTokenizer.from_pretrained(zoo / "lm" / model_name), folder=model_name)
            losses[model_name] = {name: e.loss(f"zoo_{name}", range(300)).item() for name in names}
    for name in names:
        assert losses[name][name] < 0.6 * losses["base"][name]
        assert losses[name][name] == min(found[name] for found in losses.values())
