"""Task files, options, metrics and fingerprints of the lm-eval evaluator."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_lm import (
    CHOICE,
    GENERATE,
    SEED,
    TASKS,
    THIRDS,
    WHOLE,
    N,
    bound,
    documents,
    evaluator,
    make_model,
    make_tokenizer,
    write_tasks,
)

from evaluators.lm_eval import questions as lm_eval_questions
from evaluators.lm_eval.evaluator import LmEval
from evaluators.lm_eval.questions import Question
from merge_search.errors import EvaluationError, StudyFileError
from merge_search.evaluation import Split, split_of

pytestmark = pytest.mark.usefixtures("own_dataset_cache")


def test_metrics_name_the_main_one_first_with_its_direction_and_chance(scored_folder: Path) -> None:
    infos = evaluator(
        scored_folder,
        ["t_choice", "t_word", "t_generate"],
        metrics={"t_word": "acc", "t_generate": "exact_match,last"},
        shares=THIRDS,
    ).metrics()
    assert [m.name for m in infos] == [
        "t_choice/acc", "t_choice/acc_norm", "t_choice/brier_score", "t_word/acc", "t_word/perplexity",
        "t_generate/exact_match,last", "t_generate/exact_match",
    ]  # fmt: skip
    by_name = {m.name: m for m in infos}
    assert by_name["t_choice/acc"].chance == 0.25
    assert by_name["t_choice/brier_score"].chance is None
    assert not by_name["t_choice/brier_score"].higher_is_better
    assert not by_name["t_word/perplexity"].higher_is_better
    assert by_name["t_word/acc"].higher_is_better
    assert sum(by_name["t_word/acc"].n_questions.values()) == N
    assert (
        evaluator(scored_folder, ["t_generate"], metrics={"t_generate": "exact_match,first"}).metrics()[0].metric
        == "exact_match"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["t_choise"]}, r"no task, tag or group called 't_choise'; did you mean 't_choice'\?"),
        ({"metrics": {"t_choice": "f2"}}, "metrics.t_choice: .* no metric 'f2'; known: acc, acc_norm, brier_score"),
        ({"metrics": {"t_chose": "acc"}}, r"no task of this evaluator is called 't_chose'; did you mean 't_choice'\?"),
        ({"batch_siz": 4}, r"batch_siz: unknown key; did you mean 'batch_size'\?"),
        ({"batch_size": "auto"}, "batch_size: must be a number, got 'auto'"),
        ({"batch_size": 0}, "batch_size: input should be greater than or equal to 1, got 0"),
        ({"tasks": []}, "tasks: list should have at least 1 item"),
        ({"include_path": "/no/such/folder"}, "include_path: no folder /no/such/folder"),
        ({"limit": 4}, r"task 't_choice': the validation split needs at least 2 questions, got \d of 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_said_before_a_model_is_loaded(
    scored_folder: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(scored_folder / "none" / "manager.py"))  # no 6 s index
    with pytest.raises(StudyFileError, match=message):
        evaluator(scored_folder, **{"tasks": ["t_choice"], "shares": THIRDS, **options})


def test_all_problems_are_reported_at_once(scored_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyFileError) as caught:
        evaluator(scored_folder, ["t_choice"], batch_size="auto", limit="many", colour=1)
    assert len(caught.value.problems) == 3
    few = write_tasks(
        tmp_path, {"t_a": CHOICE, "t_b": {**CHOICE, "doc_to_text": "{{ nothing.at.all }}"}}, documents(3, 0)
    )
    with pytest.raises(StudyFileError) as caught:
        evaluator(few, ["t_a", "t_b"], shares=THIRDS)
    assert any("'t_a'" in p and "needs at least 2" in p for p in caught.value.problems)
    assert any("'t_b'" in p for p in caught.value.problems)


def test_broken_task_files_are_not_skipped_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(tmp_path / "none" / "manager.py"))
    write_tasks(tmp_path, {"t_choice": CHOICE})
    (tmp_path / "t_broken.yaml").write_text("task: t_broken\nmetric_list: [")
    (tmp_path / "fragment.yaml").write_text("num_fewshot: 0\n")
    with pytest.raises(StudyFileError, match=r"task file .*t_broken.yaml cannot be read"):
        evaluator(tmp_path, ["t_choice", "t_broken"])
    with pytest.raises(StudyFileError, match=r"t_broken.yaml' cannot be loaded"):
        evaluator(tmp_path, ["t_broken.yaml"])
    with caplog.at_level(logging.WARNING, "evaluators"):
        evaluator(tmp_path, ["t_choice"])
    assert "t_broken.yaml" in caplog.text
    assert "fragment.yaml" not in caplog.text


def test_data_files_are_found_beside_the_task_file_from_any_directory(
    scored_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "common").mkdir()
    for name in ("test.jsonl", "train.jsonl"):
        (tmp_path / "common" / name).write_text((scored_folder / name).read_text())
    (tmp_path / "common" / "_base.yaml").write_text(
        yaml.safe_dump({**CHOICE, "dataset_kwargs": {"data_files": {"test": ["te*.jsonl"]}}})
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text("task: t_included\ninclude: ../common/_base.yaml\n")
    (tmp_path / "sub" / "b.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "t_one_file",
                **CHOICE,
                "test_split": "train",
                "dataset_kwargs": {"data_files": "../common/test.jsonl"},
            }
        )
    )
    (tmp_path / "sub" / "c.yaml").write_text(
        yaml.safe_dump({"task": "t_none", **CHOICE, "dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}})
    )
    expected = evaluator(scored_folder, ["t_choice"]).tasks[0].questions
    e = evaluator(tmp_path, ["t_included", "t_one_file"])
    assert [[q.id for q in t.questions] for t in e.tasks] == [[q.id for q in expected]] * 2
    with pytest.raises(StudyFileError, match=r"'t_none' cannot be loaded: FileNotFoundError.*gone.jsonl"):
        evaluator(tmp_path, ["t_none"])


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_data_file_is_named(tmp_path: Path, content: str) -> None:
    write_tasks(tmp_path, {"t_choice": CHOICE})
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(StudyFileError, match=r"'t_choice' cannot be loaded: \S*test.jsonl has no rows"):
        evaluator(tmp_path, ["t_choice"])


@pytest.mark.parametrize(
    ("value", "message"),
    [(1, "include_path: input should be a valid list, got 1"), ([1], "include_path.0: input should")],
)
def test_an_include_path_that_is_no_path_is_a_sentence(value: Any, message: str) -> None:
    with pytest.raises(StudyFileError, match=message):
        LmEval({"tasks": ["t_choice"], "include_path": value}, shares=WHOLE, seed=SEED)


def test_relative_folders_of_task_files_are_relative_to_the_study_file(scored_folder: Path) -> None:
    options = {"tasks": ["t_choice"], "include_path": scored_folder.name}
    e = LmEval(options, shares=WHOLE, seed=SEED, folder=scored_folder.parent)
    assert e.fingerprint() == evaluator(scored_folder, ["t_choice"]).fingerprint()


def test_building_it_imports_no_torch(scored_folder: Path) -> None:
    """Metrics, fingerprint, fit rows and kinds of loss are known without torch or transformers."""
    code = (
        "import sys; from evaluators.lm_eval.evaluator import LmEval; from merge_search.evaluation import SplitShares; "
        f"e = LmEval({{'tasks': ['t_all'], 'include_path': {str(scored_folder)!r}}}, shares=SplitShares(), seed=0); "
        "e.metrics(); e.fingerprint(); [e.losses(t) for t in e.fit_tasks()]; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tags_groups_and_paths_are_expanded_to_tasks(
    scored_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks(tmp_path, {"t_choice": CHOICE, "t_word": TASKS["t_word"]})
    (tmp_path / "g.yaml").write_text("group: t_group\ntask: [t_word, {group: t_inner, task: [t_choice]}]\n")
    assert [t.name for t in evaluator(tmp_path, ["t_group", "t_word"]).tasks] == ["t_word", "t_choice"]
    assert {t.name for t in evaluator(scored_folder, ["t_all"]).tasks} == set(TASKS)
    monkeypatch.chdir(scored_folder)
    by_path = [str(scored_folder / "t_word.yaml"), "t_choice.yaml"]
    e = LmEval({"tasks": by_path}, shares=WHOLE, seed=SEED)
    assert [t.name for t in e.tasks] == ["t_word", "t_choice"]


def test_a_limit_takes_the_first_documents_of_the_hash_order(scored_folder: Path) -> None:
    whole = evaluator(scored_folder, ["t_shots"]).tasks[0].questions
    some = evaluator(scored_folder, ["t_shots"], limit=10).tasks[0].questions
    assert [q.id for q in some] == [q.id for q in whole][:10]
    assert [q.doc_id for q in some] != list(range(10))
    assert [i.args for q in some for i in q.instances] == [i.args for q in whole[:10] for i in q.instances]


def test_the_option_num_fewshot_yields_to_a_task_that_says_zero(
    scored_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    silent = {k: v for k, v in TASKS["t_shots"].items() if k != "num_fewshot"}
    write_tasks(tmp_path, {"t_zero": {**TASKS["t_shots"], "num_fewshot": 0}, "t_silent": silent})
    with caplog.at_level(logging.WARNING, "evaluators"):
        e = evaluator(tmp_path, ["t_zero", "t_silent"], num_fewshot=2)
    lengths = [len(t.questions[0].instances[0].args[0].split()) for t in e.tasks]
    assert lengths[1] > lengths[0]
    assert "'t_zero' says num_fewshot: 0" in caplog.text
    theirs = evaluator(scored_folder, ["t_shots"])
    assert len(theirs.tasks[0].questions[0].instances[0].args[0].split()) > lengths[1]


def test_the_fingerprint_follows_questions_prompts_and_metrics_not_places(scored_folder: Path, tmp_path: Path) -> None:
    def fingerprint(task: dict[str, Any], rows: list[dict[str, Any]] | None = None, **options: Any) -> str:
        place = write_tasks(tmp_path / str(len(list(tmp_path.iterdir()))), {"t_choice": task}, rows)
        return evaluator(place, ["t_choice"], **options).fingerprint()

    same = evaluator(scored_folder, ["t_choice"]).fingerprint()
    assert fingerprint(CHOICE) == same
    assert fingerprint(CHOICE, batch_size=4, tree_packing=False) == same
    changed = [
        fingerprint(CHOICE, documents(N, 9)),
        fingerprint({**CHOICE, "doc_to_text": "{{query}} now"}),
        fingerprint({**CHOICE, "target_delimiter": "  "}),
        fingerprint({**CHOICE, "metric_list": CHOICE["metric_list"][:1]}),
        fingerprint(CHOICE, metrics={"t_choice": "acc_norm"}),
        fingerprint(CHOICE, limit=10),
        fingerprint(CHOICE, system_instruction="sings fast"),
        fingerprint(CHOICE, apply_chat_template=True),
        fingerprint(CHOICE, shares=THIRDS),
        fingerprint(TASKS["t_shots"]),
    ]
    assert len({same, *changed}) == 1 + len(changed)
    e = evaluator(scored_folder, ["t_choice"], apply_chat_template=True)
    before = e.fingerprint()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}now "
    e.bind(make_model(), tokenizer, folder="tiny")
    assert e.fingerprint() == before


def test_answers_longer_than_the_model_are_refused_and_cut_prompts_are_told(
    scored_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StudyFileError, match="max_gen_toks=4 of its generation_kwargs must be less than max_length=3"):
        bound(scored_folder, ["t_generate"], max_length=3)
    with caplog.at_level(logging.WARNING, "evaluators"):
        bound(scored_folder, ["t_shots"], max_length=20).evaluate(Split.SEARCH)
    assert "'t_shots': 160 of 160 prompts are longer than the model's max_length=20" in caplog.text


def test_a_tasks_own_function_that_fails_is_an_evaluation_error(tmp_path: Path) -> None:
    write_tasks(tmp_path, {"t_own": {**GENERATE, "process_results": "PLACEHOLDER"}})
    path = tmp_path / "t_own.yaml"
    path.write_text(path.read_text().replace("PLACEHOLDER", "!function own.judge"))
    (tmp_path / "own.py").write_text("def judge(doc, results):\n    raise KeyError('gone')\n")
    with pytest.raises(EvaluationError, match="task 't_own': the answers cannot be judged: KeyError: 'gone'"):
        bound(tmp_path, ["t_own"]).evaluate(Split.SEARCH)
    (tmp_path / "own.py").write_text("def judge(doc, results):\n    return {'other': len(results[0])}\n")
    os.utime(tmp_path / "own.py", ns=(1, 1))
    with pytest.raises(StudyFileError, match="task 't_own' reports no metric"):
        bound(tmp_path, ["t_own"])


def test_the_tokenizer_handed_in_is_not_changed(scored_folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    evaluator(scored_folder, ["t_choice"]).bind(make_model(), tokenizer, folder="tiny")
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("task", ["t_choice", "t_word", "t_generate", "t_rolling", "t_shots"])
def test_documents_that_ask_the_same_stay_within_one_split_and_the_others_keep_theirs(
    tmp_path: Path, task: str
) -> None:
    """Ten questions are given again, with another right answer and their choices in another order."""
    rows = [{**r, "note": 0} for r in documents(N, 0)]
    again = [{**r, "choices": r["choices"][::-1], "word": "so", "note": 1} for r in rows[:10]]
    whole = {q.doc["query"]: q.split for q in _questions(tmp_path / "a", task, rows)}
    found = _questions(tmp_path / "b", task, [*again, *rows])
    by_query: dict[str, set[Split]] = {}
    for q in found:
        by_query.setdefault(q.doc["query"], set()).add(q.split)
    assert len(found) == N + 10
    assert all(len(splits) == 1 for splits in by_query.values())
    assert all(by_query[r["query"]] == {whole[r["query"]]} for r in rows[10:])
    assert any(q.split is not split_of(q.id, THIRDS) for q in found), "the test would not notice the documents' hashes"


def test_questions_with_a_shared_prompt_and_other_choices_keep_their_splits_and_fingerprint(tmp_path: Path) -> None:
    rows = documents(N, 0)
    other = [{**r, "query": rows[0]["query"]} for r in rows]
    found = _questions(tmp_path / "a", "t_choice", other)
    assert all(q.split is split_of(q.id, THIRDS) for q in found)
    assert len({q.split for q in found}) == 3


def test_a_study_whose_documents_move_has_another_fingerprint_and_any_other_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**r, "note": 0} for r in documents(N, 0)]
    again = [{**r, "note": 1} for r in rows[:10]]
    folders = [write_tasks(tmp_path / str(i), {"t_choice": CHOICE}, r) for i, r in enumerate([rows, [*again, *rows]])]
    now = [evaluator(f, ["t_choice"], shares=THIRDS).fingerprint() for f in folders]
    monkeypatch.setattr(lm_eval_questions, "_asking_the_same", lambda *_: [])
    by_document = [evaluator(f, ["t_choice"], shares=THIRDS).fingerprint() for f in folders]
    assert now[0] == by_document[0]
    assert now[1] != by_document[1]


def _questions(folder: Path, task: str, rows: list[dict[str, Any]]) -> list[Question]:
    return evaluator(write_tasks(folder, {task: TASKS[task]}, rows), [task], shares=THIRDS).tasks[0].questions
