"""The lm-eval evaluator's scores against lm-eval itself, on a tiny random Llama and tasks written here."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_lm import (
    CHOICE,
    GENERATE,
    MEAN,
    TASKS,
    THIRDS,
    N,
    bound,
    by_lm_eval,
    documents,
    evaluator,
    make_model,
    make_tokenizer,
    write_tasks,
)

from evaluators.isolation import quiet
from merge_search.errors import EvaluationError, NonFiniteError, StudyFileError
from merge_search.evaluation import Evaluation, Split, question_order, split_of

pytestmark = pytest.mark.usefixtures("own_dataset_cache")


def assert_equal_digits(ours: Evaluation, theirs: dict[str, Any], *, varied: bool = True) -> None:
    """Scores, and the value of every question, exactly; `varied`: and not all questions alike."""
    assert ours.scores
    for name, s in ours.scores.items():
        task, label = name.split("/")
        metric, _, pipeline = label.partition(",")
        pipeline = pipeline or ("first" if task == "t_generate" else "none")
        samples = {r["doc_hash"]: r[metric] for r in theirs["samples"][task] if r["filter"] == pipeline}
        assert theirs["results"][task][f"{metric},{pipeline}"] == s.score
        if metric in ("acc", "acc_norm", "exact_match"):
            assert theirs["results"][task][f"{metric}_stderr,{pipeline}"] == s.stderr
        expected = [samples[i] for i in s.ids]
        if metric == "brier_score":
            expected = [float(((p - np.eye(4)[gold]) ** 2).sum()) for gold, p in expected]
        elif metric in ("word_perplexity", "bits_per_byte"):
            expected = [-ll / n for ll, n in expected]
        elif metric == "perplexity":
            expected = [-ll for ll in expected]
        assert s.values.tolist() == expected, name
        assert not varied or len(set(expected)) > 1, f"{name}: all questions alike prove nothing"


@pytest.mark.parametrize("seed", [0, 1])
def test_every_kind_of_task_scores_as_in_lm_eval_to_the_last_digit(scored_folder: Path, seed: int) -> None:
    model = make_model(seed=seed)
    ours = bound(scored_folder, list(TASKS), model, tree_packing=False).evaluate(Split.SEARCH)
    theirs = by_lm_eval(scored_folder, list(TASKS), model)
    assert_equal_digits(ours, theirs)
    assert set(ours.scores) == {
        *(f"{t}/{m}" for t in ("t_choice", "t_shots") for m in ("acc", "acc_norm", "brier_score")),
        "t_generate/exact_match", "t_generate/exact_match,last", "t_word/perplexity", "t_word/acc",
        "t_rolling/word_perplexity", "t_rolling/bits_per_byte",
    }  # fmt: skip
    assert ours.cost.questions == N * len(TASKS)
    assert ours.cost.evaluate_s > 0


def test_each_split_scores_as_in_lm_eval_on_its_documents_and_together_they_are_all(scored_folder: Path) -> None:
    model = make_model()
    tasks = ["t_choice", "t_generate", "t_word", "t_rolling"]
    e = bound(scored_folder, tasks, model, shares=THIRDS, tree_packing=False)
    seen: list[str] = []
    for split in (Split.SEARCH, Split.VALIDATION, Split.TEST):
        ours = e.evaluate(split)
        ids = sorted(q.doc_id for q in e.tasks[0].select(split, 1.0))
        theirs = by_lm_eval(scored_folder, tasks, model, samples=dict.fromkeys(tasks, ids))
        assert_equal_digits(ours, theirs, varied=False)
        assert all(split_of(i, THIRDS) is split for i in ours.scores["t_choice/acc"].ids)
        seen += ours.scores["t_choice/acc"].ids
    whole = bound(scored_folder, tasks, model).evaluate(Split.SEARCH).scores["t_choice/acc"].ids
    assert sorted(seen) == sorted(whole)
    assert len(whole) == N


def test_fewer_questions_are_a_prefix_of_more(scored_folder: Path) -> None:
    e = bound(scored_folder, ["t_choice", "t_shots"], shares=THIRDS)
    n = len(e.evaluate(Split.SEARCH).scores["t_choice/acc"].ids)
    previous: tuple[str, ...] = ()
    for fidelity, asked in [(1e-6, 2), (0.5, math.ceil(n / 2)), (1.0, n)]:
        for name, s in (evaluation := e.evaluate(Split.SEARCH, fidelity)).scores.items():
            assert len(s.ids) == len(s.values) == asked, name
            assert list(s.ids) == sorted(s.ids, key=question_order)
        assert evaluation.cost.questions == 2 * asked
        ids = evaluation.scores["t_shots/acc"].ids
        assert ids[: len(previous)] == previous
        previous = ids
    small, whole = e.evaluate(Split.SEARCH, 0.5), e.evaluate(Split.SEARCH)
    for name in whole.scores:
        k = len(small.scores[name].values)
        np.testing.assert_allclose(small.scores[name].values, whole.scores[name].values[:k], atol=1e-5)


def test_the_smallest_share_is_two_questions_with_a_standard_error(scored_folder: Path) -> None:
    scores = bound(scored_folder, ["t_choice", "t_shots"]).evaluate(Split.SEARCH, 1e-6).scores
    assert all(len(s.values) == 2 and math.isfinite(s.stderr) for s in scores.values())


def test_global_generators_are_left_alone_and_answers_repeat(scored_folder: Path) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    e = bound(scored_folder, list(TASKS))
    first, second = e.evaluate(Split.SEARCH), e.evaluate(Split.SEARCH)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    for name, s in first.scores.items():
        t = second.scores[name]
        assert (s.ids, s.values.tolist(), s.score) == (t.ids, t.values.tolist(), t.score)
        assert s.stderr == t.stderr


def test_a_task_that_samples_its_answers_repeats_too(tmp_path: Path) -> None:
    sampled = {
        **GENERATE,
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 4, "do_sample": True, "temperature": 2.0},
    }
    e = bound(write_tasks(tmp_path, {"t_sampled": sampled}), ["t_sampled"])
    a, b = (e.evaluate(Split.SEARCH).scores["t_sampled/exact_match"].values.tolist() for _ in range(2))
    greedy = bound(write_tasks(tmp_path / "g", {"t_sampled": GENERATE}), ["t_sampled"]).evaluate(Split.SEARCH)
    assert a == b
    assert a != greedy.scores["t_sampled/exact_match"].values.tolist()


@pytest.mark.parametrize("tree_packing", [True, False])
def test_weights_changed_in_place_are_scored_as_a_fresh_evaluator_does(scored_folder: Path, tree_packing: bool) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    e = bound(scored_folder, list(TASKS), model, tree_packing=tree_packing)
    before = e.evaluate(Split.SEARCH)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    after = e.evaluate(Split.SEARCH)
    fresh = bound(scored_folder, list(TASKS), other, tree_packing=tree_packing).evaluate(Split.SEARCH)
    for name, s in after.scores.items():
        assert s.values.tolist() == fresh.scores[name].values.tolist()
        assert s.score == fresh.scores[name].score
        assert s.values.tolist() != before.scores[name].values.tolist()


def test_packed_choices_give_lm_evals_log_likelihoods(scored_folder: Path) -> None:
    model = make_model()
    packed, alone = (
        bound(scored_folder, ["t_choice", "t_shots"], model, tree_packing=p, batch_size=8) for p in (True, False)
    )
    assert packed._live is not None
    assert packed._live.packed is not None
    a, b = packed.evaluate(Split.SEARCH).scores, alone.evaluate(Split.SEARCH).scores
    for task in ("t_choice", "t_shots"):
        assert a[f"{task}/acc"].values.tolist() == b[f"{task}/acc"].values.tolist()
        np.testing.assert_allclose(a[f"{task}/brier_score"].values, b[f"{task}/brier_score"].values, atol=1e-5)
        ours, theirs = a[f"{task}/acc"].probability, b[f"{task}/acc"].probability
        assert ours is not None
        assert theirs is not None
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        for p, q in zip(packed.tasks[0].questions, alone.tasks[0].questions, strict=True):
            for i, j in zip(p.instances, q.instances, strict=True):
                assert i.resps[0][0] == pytest.approx(j.resps[0][0], abs=1e-4)
                assert i.resps[0][1] == j.resps[0][1]


def test_packing_is_not_used_where_it_is_not_known_to_be_equal(
    scored_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = bound(scored_folder, ["t_choice"], make_model(dtype=torch.bfloat16))
    eager = make_model()
    eager.set_attn_implementation("eager")
    assert half._live is not None
    assert half._live.packed is None
    assert half.evaluate(Split.SEARCH).scores["t_choice/acc"].score >= 0
    other = bound(scored_folder, ["t_choice"], eager)
    assert other._live is not None
    assert other._live.packed is None

    from evaluators.lm_eval import packed_scorer as lm_eval_packed

    monkeypatch.setattr(lm_eval_packed, "TOLERANCE", 0.0)
    strict = bound(scored_folder, ["t_choice"])
    assert strict._live is not None
    assert strict._live.packed is None


def test_the_right_answers_probability_is_the_softmax_over_the_choices(scored_folder: Path) -> None:
    e = bound(scored_folder, ["t_choice"], tree_packing=False)
    scores = e.evaluate(Split.SEARCH).scores
    probability = scores["t_choice/acc"].probability
    assert probability is not None
    for q, p in zip(e.tasks[0].questions, probability, strict=True):
        odds = [math.exp(i.resps[0][0]) for i in q.instances]
        assert p == pytest.approx(odds[q.doc["gold"]] / sum(odds), rel=1e-6)
    assert scores["t_choice/acc_norm"].probability is None


def test_perplexities_have_errors_that_a_bootstrap_confirms(scored_folder: Path) -> None:
    scores = bound(scored_folder, ["t_word", "t_rolling"]).evaluate(Split.SEARCH).scores
    rng = np.random.default_rng(0)
    nll = scores["t_word/perplexity"].values
    draws = np.exp(rng.choice(nll, (4000, N)).mean(axis=1))
    assert scores["t_word/perplexity"].score == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    assert scores["t_word/perplexity"].stderr == pytest.approx(draws.std(), rel=0.25)
    for name in ("word_perplexity", "bits_per_byte"):
        assert 0 < scores[f"t_rolling/{name}"].stderr < scores[f"t_rolling/{name}"].score


def test_f1_and_matthews_correlation_have_a_repeatable_error(tmp_path: Path) -> None:
    rows = [{**r, "choices": r["choices"][:2], "gold": i % 2} for i, r in enumerate(documents(N, 3))]
    task = {**CHOICE, "metric_list": [{"metric": "mcc"}, {"metric": "f1"}, {"metric": "acc", **MEAN}]}
    scores = bound(write_tasks(tmp_path, {"t_two": task}, rows), ["t_two"]).evaluate(Split.SEARCH).scores
    for name in ("mcc", "f1"):
        assert scores[f"t_two/{name}"].values.tolist() == scores["t_two/acc"].values.tolist()
        assert 0.02 < scores[f"t_two/{name}"].stderr < 0.3


def test_a_chat_template_gives_lm_evals_scores(scored_folder: Path) -> None:
    template = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} {% endfor %}today "
    model, tokenizer = make_model(seed=3), make_tokenizer()
    tokenizer.chat_template = template
    e = evaluator(
        scored_folder,
        ["t_shots", "t_generate"],
        apply_chat_template=True,
        system_instruction="the red dog",
        tree_packing=False,
    )
    e.bind(model, tokenizer, folder="tiny")
    theirs = by_lm_eval(
        scored_folder,
        ["t_shots", "t_generate"],
        model,
        tokenizer,
        apply_chat_template=True,
        system_instruction="the red dog",
    )
    assert_equal_digits(e.evaluate(Split.SEARCH), theirs)
    prompt = e.tasks[0].questions[0].instances[0].args[0]
    assert prompt.startswith("<s> system the red dog")
    tokenizer.chat_template = None
    unbound = evaluator(scored_folder, ["t_shots"], apply_chat_template=True)
    with pytest.raises(
        StudyFileError, match=r"'t_shots': its prompts do not fit the model in tiny: ValueError: .*chat"
    ):
        unbound.bind(model, tokenizer, folder="tiny")


@pytest.mark.parametrize("task", ["t_choice", "t_generate", "t_rolling"])
@pytest.mark.parametrize("tree_packing", [True, False])
def test_broken_weights_are_a_failure_not_a_score(scored_folder: Path, task: str, tree_packing: bool) -> None:
    model = make_model()
    e = bound(scored_folder, [task], model, tree_packing=tree_packing)
    good = e.evaluate(Split.SEARCH)
    kept = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=f"must be finite, got NaN or infinity on {task}"):
        e.evaluate(Split.SEARCH)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.copy_(kept)
    again = e.evaluate(Split.SEARCH)
    assert all(s.values.tolist() == again.scores[name].values.tolist() for name, s in good.scores.items())


def out_of_memory_above(rows: int) -> Callable[..., None]:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Any = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if ids.shape[0] > rows:
            raise torch.OutOfMemoryError(f"{ids.shape[0]} rows")

    return hook


@pytest.mark.parametrize("tree_packing", [True, False])
def test_out_of_memory_halves_the_batch_twice_and_then_passes_through(scored_folder: Path, tree_packing: bool) -> None:
    model = make_model()
    e = bound(scored_folder, ["t_choice", "t_generate"], model, batch_size=16, tree_packing=tree_packing)
    small = bound(scored_folder, ["t_choice", "t_generate"], model, batch_size=4, tree_packing=tree_packing).evaluate(
        Split.SEARCH
    )
    hook = model.model.register_forward_pre_hook(out_of_memory_above(4), with_kwargs=True)
    halved = e.evaluate(Split.SEARCH)
    hook.remove()
    assert all(s.values.tolist() == small.scores[name].values.tolist() for name, s in halved.scores.items())
    hook = model.model.register_forward_pre_hook(out_of_memory_above(0), with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError, match="rows"):
        e.evaluate(Split.SEARCH)
    hook.remove()
    e.evaluate(Split.SEARCH)


def test_an_error_inside_the_model_names_the_task_and_its_cause(scored_folder: Path) -> None:
    model = make_model()
    e = bound(scored_folder, ["t_choice"], model)

    def hook(*_: Any) -> None:
        raise RuntimeError("the kernel is upset")

    handle = model.model.register_forward_pre_hook(hook)
    with pytest.raises(EvaluationError, match="scoring t_choice failed: RuntimeError: the kernel is upset") as caught:
        e.evaluate(Split.SEARCH)
    assert isinstance(caught.value.__cause__, RuntimeError)
    handle.remove()
    assert e.evaluate(Split.SEARCH).scores
    with pytest.raises(EvaluationError, match="validation split has no questions of t_choice"):
        e.evaluate(Split.VALIDATION)
    with pytest.raises(EvaluationError, match="0 <= after < fidelity <= 1, got fidelity=0"):
        e.evaluate(Split.SEARCH, 0)
    with pytest.raises(EvaluationError, match="bind a model"):
        evaluator(scored_folder, ["t_choice"]).evaluate(Split.SEARCH)


def test_nothing_is_printed(scored_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound(scored_folder, list(TASKS)).evaluate(Split.SEARCH)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


@pytest.mark.zoo
@pytest.mark.slow
def test_a_real_model_scores_as_lm_evals_command_line_did(zoo: Path, tmp_path: Path) -> None:
    """The figures of the zoo's MANIFEST: intent 0.760, qtype 0.620, where 0.533 for the base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = zoo / "data" / "lm"
    subprocess.run([sys.executable, zoo / "make_tasks.py", data, tmp_path, "--root", data.parent], check=True)
    e = evaluator(tmp_path, ["zoo_intent", "zoo_qtype", "zoo_where"], batch_size=64)
    with quiet(["transformers"]):
        model = AutoModelForCausalLM.from_pretrained(zoo / "lm" / "base", dtype=torch.float32)
        e.bind(model, AutoTokenizer.from_pretrained(zoo / "lm" / "base"), folder=str(zoo / "lm" / "base"))
    scores = e.evaluate(Split.SEARCH).scores
    found = {name: s.score for name, s in scores.items()}
    expected = {"zoo_intent/exact_match": 0.760, "zoo_qtype/acc": 0.620, "zoo_where/exact_match": 0.533}
    assert found == pytest.approx(expected, abs=6e-4)
