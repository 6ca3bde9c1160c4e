"""Chat templates, thinking and generation settings: lm-eval's own answers, and problems before any weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import here
from tiny_lm import CHOICE, GENERATE, SEED, WORDS, bound, evaluator, make_model, make_tokenizer, write_tasks

from evaluators.isolation import quiet
from evaluators.lm_eval.evaluator import LmEval
from merge_search.errors import StudyFileError
from merge_search.evaluation import Split

pytestmark = pytest.mark.usefixtures("own_dataset_cache")

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}"
    "{% if enable_thinking is defined and enable_thinking %}fast {% elif enable_thinking is defined %}slow {% endif %}"
    "{{ tone }} "
)
THINK_END = "eats"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path, {"t_one": GENERATE, "t_two": {**GENERATE, "doc_to_text": "now {{query}}"}})


def chatty() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def by_lm_eval(
    folder: Path, tasks: list[str], model_args: dict[str, Any], gen_kwargs: dict[str, Any] | None = None, **how: Any
) -> dict[str, list[str]]:
    """lm-eval's own answer to every question, by task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with quiet(["lm_eval", "transformers"]), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lm = HFLM(pretrained=make_model(seed=3), tokenizer=chatty(), batch_size=16, **model_args)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = simple_evaluate(
            lm,
            tasks=tasks,
            task_manager=manager,
            fewshot_random_seed=SEED,
            bootstrap_iters=0,
            gen_kwargs=gen_kwargs,
            **how,
        )
    return {t: [r["resps"][0][0] for r in rows if r["filter"] == "first"] for t, rows in found["samples"].items()}


def answers(e: LmEval) -> dict[str, list[str]]:
    e.evaluate(Split.SEARCH)
    by_doc = {t.name: sorted(t.questions, key=lambda q: q.doc_id) for t in e.tasks}
    return {name: [q.instances[0].resps[0] for q in questions] for name, questions in by_doc.items()}


CHAT = {"apply_chat_template": True}
LONG = {"gen_kwargs": {"max_gen_toks": 12}}


@pytest.mark.parametrize(
    "options",
    [
        {**CHAT, **LONG, "enable_thinking": False},
        {**CHAT, **LONG, "enable_thinking": True, "think_end_token": THINK_END},
        {**LONG, "think_end_token": make_tokenizer().convert_tokens_to_ids(THINK_END)},
        {**LONG, "think_end_token": str(make_tokenizer().convert_tokens_to_ids(THINK_END))},
        {**CHAT, "chat_template_args": {"tone": "red"}},
        {"gen_kwargs": {"max_gen_toks": 9, "until": ["runs", "dog"]}},
        {"gen_kwargs": {"until": "runs", "do_sample": True, "temperature": 1.5}},
    ],
    ids=str,
)
def test_answers_are_lm_evals_own(folder: Path, options: dict[str, Any]) -> None:
    e = bound(folder, ["t_one", "t_two"], make_model(seed=3), tokenizer=chatty(), **options)
    ours = answers(e)
    kept = ("enable_thinking", "think_end_token", "chat_template_args")
    model_args = {k: v for k, v in options.items() if k in kept}
    how = {k: v for k, v in options.items() if k not in kept}
    if not how.get("gen_kwargs", {}).get("do_sample"):
        assert ours == by_lm_eval(folder, ["t_one", "t_two"], model_args, **how)
    plain = answers(bound(folder, ["t_one", "t_two"], make_model(seed=3), tokenizer=chatty()))
    assert ours != plain
    assert all(len(set(texts)) > 1 for texts in ours.values())


def test_a_task_has_options_of_its_own(folder: Path) -> None:
    own = {**CHAT, "enable_thinking": True, "think_end_token": THINK_END, "gen_kwargs": {"max_gen_toks": 12}}
    ours = answers(
        bound(
            folder,
            ["t_one", "t_two"],
            make_model(seed=3),
            tokenizer=chatty(),
            gen_kwargs={"until": ["runs"], "max_gen_toks": 7},
            task_options={"t_two": own},
        )
    )
    assert ours["t_one"] == by_lm_eval(folder, ["t_one"], {}, {"until": ["runs"], "max_gen_toks": 7})["t_one"]
    thinking = {"enable_thinking": True, "think_end_token": THINK_END}
    theirs = by_lm_eval(folder, ["t_two"], thinking, {"until": ["runs"], "max_gen_toks": 12}, **CHAT)
    assert ours["t_two"] == theirs["t_two"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**CHAT, "enable_thinking": True}, "enable_thinking: true needs think_end_token"),
        ({"enable_thinking": False}, "enable_thinking needs apply_chat_template: true"),
        ({"chat_template_args": {"tone": "red"}}, "chat_template_args needs apply_chat_template: true"),
        ({"gen_kwargs": {"max_new_tokens": 9}}, "gen_kwargs: write max_gen_toks in place of 'max_new_tokens'"),
        ({"gen_kwargs": {"max_gen_toks": 0}}, "gen_kwargs: max_gen_toks must be a whole number of at least 1, got 0"),
        ({"gen_kwargs": {"until": 3}}, "gen_kwargs: until must be a text or a list of texts, got 3"),
        (
            {"task_options": {"t_onee": LONG}},
            "task_options: no task of this evaluator is called 't_onee'; did you mean",
        ),
        ({"task_options": {"t_one": {"limit": 3}}}, "task_options.t_one.limit"),
        ({"task_options": {"t_one": {**CHAT, "enable_thinking": True}}}, "t_one.enable_thinking: true needs think_end"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_told_at_once(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyFileError) as caught:
        evaluator(folder, ["t_one", "t_two"], **options)
    assert said in str(caught.value)


def test_a_task_without_generation_cannot_think(tmp_path: Path) -> None:
    write_tasks(tmp_path, {"t_one": GENERATE, "t_choice": CHOICE})
    thinking = {**CHAT, "enable_thinking": True, "think_end_token": THINK_END}
    with pytest.raises(StudyFileError, match=r"'t_choice' is multiple_choice.*task_options.t_choice.enable_thinking"):
        evaluator(tmp_path, ["t_one", "t_choice"], **thinking)
    e = evaluator(tmp_path, ["t_one", "t_choice"], **thinking, task_options={"t_choice": {"enable_thinking": False}})
    e.bind(make_model(), chatty(), folder="tiny")
    assert e.evaluate(Split.SEARCH).scores


def test_settings_that_change_answers_change_the_fingerprint(folder: Path) -> None:
    def fingerprint(**options: Any) -> str:
        return evaluator(folder, ["t_one"], **options).fingerprint()

    variants: list[dict[str, Any]] = [
        {}, CHAT, LONG, {"think_end_token": "eats"}, {"task_options": {"t_one": CHAT}},
        {**CHAT, "enable_thinking": False}, {**CHAT, "chat_template_args": {"tone": "red"}},
    ]  # fmt: skip
    prints = [fingerprint(**options) for options in variants]
    assert len(set(prints)) == len(prints) - 1, "an option of the only task is that of the evaluator"
    assert prints[1] == prints[4]
    assert fingerprint(task_options={"t_one": {}}) == prints[0]


def test_a_learner_is_taught_the_thoughts_too(folder: Path) -> None:
    """An answer without the thoughts would be learned as the answer to the prompt."""
    how = {"gen_kwargs": {"max_gen_toks": 12}, "fit": "train"}
    write_tasks(folder, {"t_one": {**GENERATE, "training_split": "train"}})
    with_end, without = (
        bound(folder, ["t_one"], make_model(seed=3), tokenizer=chatty(), **how, **more)
        for more in ({"think_end_token": THINK_END}, {})
    )
    rows = range(10)
    assert with_end.predict("t_one", rows) == without.predict("t_one", rows)
    assert any(THINK_END in text for text in without.predict("t_one", rows)), WORDS


def test_a_missing_template_is_told_with_the_tokenizer_alone(folder: Path, tmp_path: Path) -> None:
    plain, chat = tmp_path / "plain", tmp_path / "chat"
    make_tokenizer().save_pretrained(plain)
    chatty().save_pretrained(chat)
    e = evaluator(folder, ["t_one", "t_two"], task_options={"t_two": CHAT})
    with pytest.raises(StudyFileError) as caught:
        e.check_prompts(str(plain))
    (problem,) = caught.value.problems
    assert problem.startswith("task 't_two': its prompts cannot be rendered with the tokenizer in")
    assert "chat_template" in problem
    assert "apply_chat_template" in problem
    e.check_prompts(str(chat))
    evaluator(folder, ["t_one"]).check_prompts(str(tmp_path / "nowhere"))


def test_validate_tells_a_missing_template(demo: Path, tmp_path: Path) -> None:
    study = yaml.safe_load((demo / "study.yaml").read_text())
    models = demo / "models"
    study["models"] |= {"base": str(models / "base"), "experts": {"maths": str(models / "maths")}}
    study["evaluate"] = [
        {"evaluator": "lm_eval", "tasks": ["demo_maths"], "include_path": str(demo / "tasks"), **CHAT, "limit": 40}
    ]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    found = here("validate", tmp_path / "study.yaml", check=False)
    assert found.returncode == 2
    assert "task 'demo_maths': its prompts cannot be rendered with the tokenizer in" in found.stderr


def has_an_end(model: Any, prompt: str, n: int) -> bool:
    tokens = make_tokenizer()(prompt, return_tensors="pt").input_ids
    for _ in range(n):
        with torch.no_grad():
            new = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
        if new.item() == make_tokenizer().eos_token_id:
            return True
        tokens = torch.cat([tokens, new], dim=1)
    return False


def test_answers_that_are_cut_or_empty_are_counted(folder: Path) -> None:
    """Against the likeliest tokens, one by one: an answer was cut if none of max_gen_toks tokens ends the text."""
    e = bound(folder, ["t_one"], make_model(seed=3))
    evaluation = e.evaluate(Split.SEARCH)
    texts = [q.instances[0].resps[0] for q in e.tasks[0].questions]
    counted = evaluation.answers["t_one"]
    assert counted.n == len(texts)
    assert counted.empty == sum(not text.strip() for text in texts)
    assert 0 < counted.cut < counted.n
    prompts = [q.instances[0].args[0] for q in e.tasks[0].questions]
    assert counted.cut == sum(not has_an_end(make_model(seed=3), prompt, 4) for prompt in prompts)
    stopped = bound(folder, ["t_one"], make_model(seed=3), gen_kwargs={"until": WORDS}).evaluate(Split.SEARCH)
    assert stopped.answers["t_one"].cut == 0
    assert stopped.answers["t_one"].empty > 0.9 * counted.n
