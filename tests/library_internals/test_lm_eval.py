"""The undocumented parts of lm-eval that `evaluators.lm_eval._compat` uses still exist and do the same."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_lm import TASKS, evaluator, make_model, make_tokenizer

from evaluators.lm_eval import _compat
from evaluators.lm_eval._compat import (
    data_of,
    decoding,
    filters_of,
    first_logits,
    has_several_answers,
    is_group,
    is_multimodal,
    log_likelihoods,
    no_progress_bars,
    prompts_are_choices,
    read_task_file,
    rendering_with,
    runs_answers_as_code,
    sampling_shots,
    set_answer_hook,
    set_batch_size,
    task_files,
    task_manager,
    thinking_until,
    tokenised,
    watching_ends,
)

pytestmark = pytest.mark.usefixtures("own_dataset_cache")
FOLDER = Path(_compat.__file__).parent


@pytest.fixture
def lm() -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=make_model(), tokenizer=make_tokenizer(), batch_size=4)


class Hook:
    def __init__(self) -> None:
        self.requests: list[Any] = []

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.requests.append((kind, request))


def test_the_signatures_are_those_that_are_called() -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._factory import TaskFactory
    from lm_eval.tasks._yaml_loader import load_yaml

    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(HFLM._loglikelihood_tokens) == ["self", "requests", "disable_tqdm", "override_bs"]
    assert names(HFLM._model_call)[:2] == ["self", "inps"]
    assert names(HFLM.tok_decode)[:2] == ["self", "tokens"]
    assert names(TaskFactory._load_full_config) == ["self", "entry", "overrides"]
    assert {"resolve_func", "recursive"} <= set(names(load_yaml))


def test_task_files_are_found_read_and_changed(tmp_path: Path, scored_folder: Path) -> None:
    (tmp_path / "g.yaml").write_text("group: t_group\ntask: [t_choice]\n")
    (tmp_path / "part.yaml").write_text("include: g.yaml\nnote: 1\n")
    assert {p.name for p in task_files(tmp_path)} == {"g.yaml", "part.yaml"}
    assert read_task_file(tmp_path / "part.yaml")["group"] == "t_group"
    assert "group" not in read_task_file(tmp_path / "part.yaml", recursive=False)
    seen: dict[str, Any] = {}

    def change(path: Path, config: dict[str, Any]) -> dict[str, Any]:
        seen[path.name] = config
        return {**config, "dataset_kwargs": {"data_files": {"test": str(scored_folder / "test.jsonl")}}}

    manager = task_manager([str(scored_folder), str(tmp_path)], defaults=False, change=change)
    assert is_group(manager.task_index["t_group"])
    assert not is_group(manager.task_index["t_choice"])
    task = manager.load(["t_choice"])["tasks"]["t_choice"]
    assert seen["t_choice.yaml"]["dataset_kwargs"]["data_files"]["test"] == "test.jsonl"
    assert list(task.dataset) == ["test"]


def test_progress_bars_are_off_inside_only() -> None:
    from lm_eval.api import task as task_module

    before = task_module.tqdm
    with no_progress_bars():
        assert task_module.tqdm(range(2)).disable
    assert task_module.tqdm is before


def test_a_tasks_filters_have_names_in_their_order(scored_folder: Path) -> None:
    task = evaluator(scored_folder, ["t_generate"]).tasks[0].task
    assert [f.name for f in filters_of(task)] == [f["name"] for f in TASKS["t_generate"]["filter_list"]]


def test_lm_eval_still_sets_the_optional_attributes_of_tasks(scored_folder: Path) -> None:
    """The names stand in lm-eval's own code; a task has them only where they apply."""
    from lm_eval.api import task as task_module

    source = inspect.getsource(task_module)
    for name in ("multiple_target", "multiple_input", "UNSAFE_CODE", "dataset"):
        assert re.search(rf"self\.{name}\b", source), name
    assert "MULTIMODAL" in source
    task = evaluator(scored_folder, ["t_choice"]).tasks[0].task
    assert list(data_of(task)) == ["test", "train"]
    flags = (has_several_answers, prompts_are_choices, runs_answers_as_code, is_multimodal)
    assert not any(flag(task) for flag in flags)


def test_the_shots_of_a_task_are_drawn_by_the_given_function(scored_folder: Path) -> None:
    task = evaluator(scored_folder, ["t_shots"]).tasks[0].task
    task.set_fewshot_seed(1)
    drawn: list[Any] = []

    def draw(original: Any, n: int, n_documents: int) -> list[Any]:
        drawn.append((n, n_documents))
        return original(n=n)[::-1]

    doc = next(iter(task.test_docs()))
    with sampling_shots(task, draw):
        task.fewshot_context(doc, num_fewshot=3)
    assert drawn
    assert drawn[0][1] == 24
    assert "sample" not in vars(task.sampler)


def test_requests_are_tokenised_without_running_the_model_and_scored_with_it(lm: Any) -> None:
    hook = Hook()
    set_answer_hook(lm, hook)
    requests = [SimpleNamespace(args=("the red", " dog")), SimpleNamespace(args=("the", " cat runs"))]
    encoded = tokenised(lm, requests)
    assert [(texts, len(context), len(target)) for texts, context, target in encoded] == [
        (("the red", " dog"), 2, 1),
        (("the", " cat runs"), 1, 2),
    ]
    assert hook.requests == []
    answers = log_likelihoods(lm, encoded)
    assert [kind for kind, _ in hook.requests] == ["loglikelihood"] * 2
    assert log_likelihoods(lm, encoded, batch_size=1) == [pytest.approx(a, abs=1e-4) for a in answers]
    assert all(isinstance(best, bool) and total < 0 for total, best in answers)


def test_logits_have_one_row_per_token(lm: Any) -> None:
    import torch

    assert first_logits(lm, torch.tensor([[5, 6, 7]])).shape == (1, 3, 21)


def test_the_batch_size_can_be_set(lm: Any) -> None:
    set_batch_size(lm, 2)
    assert lm.batch_size == 2


def test_generated_tokens_are_decoded_by_the_given_function(lm: Any) -> None:
    request = SimpleNamespace(args=("the red", {"until": ["</s>"], "max_gen_toks": 2, "do_sample": False}))
    with decoding(lm, lambda tokens, **_: "decoded" if isinstance(tokens, list) else "<end>"):
        assert lm.generate_until([request], disable_tqdm=True) == ["decoded"]
    assert "tok_decode" not in vars(lm)
    assert lm.generate_until([request], disable_tqdm=True) != ["decoded"]


def test_a_chat_template_gets_its_arguments_inside_only(lm: Any) -> None:
    lm.tokenizer.chat_template = "{{ messages[0]['content'] }} {{ tone }}"
    before, chat = lm.chat_template_args, [{"role": "user", "content": "red"}]
    with rendering_with(lm, {"tone": "fast"}):
        assert lm.apply_chat_template(chat) == "red fast"
    assert lm.chat_template_args == before


def generation(n: int, **settings: Any) -> Any:
    return SimpleNamespace(args=("the red dog", {"until": [], "do_sample": False, "max_gen_toks": n, **settings}))


def test_thoughts_are_cut_off_inside_only(lm: Any) -> None:
    (whole,) = lm.generate_until([generation(8)], disable_tqdm=True)
    word = whole.split()[1]
    with thinking_until(lm, word):
        assert lm.generate_until([generation(8)], disable_tqdm=True) == [whole.split(word)[-1].lstrip()]
    assert lm.generate_until([generation(8)], disable_tqdm=True) == [whole]


def test_an_answer_with_all_its_tokens_and_no_ending_is_reported_as_cut(lm: Any) -> None:
    reports: list[bool] = []
    with watching_ends(lm, reports.append):
        (whole,) = lm.generate_until([generation(8)], disable_tqdm=True)
        lm.generate_until([generation(8, until=[whole.split()[-1]])], disable_tqdm=True)
        lm.model.generation_config.eos_token_id = list(range(len(lm.tokenizer)))
        lm.generate_until([generation(8)], disable_tqdm=True)
    assert reports == [True, False, False]
    assert len(whole.split()) > 1


def test_no_other_file_uses_a_private_part_of_lm_eval() -> None:
    """No import of a module of lm-eval with a leading underscore, and none of its private attributes."""
    private = {"_loglikelihood_tokens", "_model_call", "_factory", "_load_full_config", "_filters", "_iter_yaml_files"}
    for path in FOLDER.glob("*.py"):
        if path.name == "_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in private, f"{path.name}, line {node.lineno}: {node.attr}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lm_eval."):
                assert "._" not in (node.module or ""), f"{path.name}, line {node.lineno}: {node.module}"
