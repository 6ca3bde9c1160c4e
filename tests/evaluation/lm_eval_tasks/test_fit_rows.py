"""Which rows of lm-eval's tasks may be fitted on, and what real experts make of them."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_lm import FIT_TASKS, N_TRAIN, N, bound, docs, documents, evaluator, write_tasks

from evaluators.isolation import quiet
from merge_search.engine.statistics.prompt_gram import measure
from merge_search.engine.statistics.rows import Work, rows_of_experts
from merge_search.errors import InputError
from merge_search.evaluation import Split, SplitShares, question_order

pytestmark = pytest.mark.usefixtures("own_dataset_cache")
WITH_FIT = SplitShares(0.6, 0.2, 0.2, fit=0.3)


def test_fit_rows_are_the_training_split_and_then_nothing_is_withheld(fit_folder: Path) -> None:
    train = {d["query"] for d in documents(N_TRAIN, 1)}
    e = evaluator(fit_folder, ["t_choice"], shares=WITH_FIT)
    assert e.fit_tasks() == {"t_choice": N_TRAIN}
    assert {d["query"] for d in docs(e, "t_choice")} == train
    n = e.metrics()[0].n_questions
    assert Split.FIT not in n
    withheld = evaluator(fit_folder, ["t_choice"], shares=WITH_FIT, fit="search")
    m = withheld.metrics()[0].n_questions
    assert withheld.fit_tasks() == {"t_choice": m[Split.FIT]}
    assert m[Split.FIT] > 0
    assert m[Split.FIT] + m[Split.SEARCH] == n[Split.SEARCH]
    assert evaluator(fit_folder, ["t_choice"], fit="search").fit_tasks() == {"t_choice": 0}


def test_tasks_without_a_training_split_fit_on_a_share_of_their_questions(tmp_path: Path) -> None:
    alone = {k: v for k, v in FIT_TASKS["t_choice"].items() if k != "training_split"}
    same = {**FIT_TASKS["t_choice"], "training_split": "test"}
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
    same_question = {**asked[1], "words": "another field, which the prompt does not show"}
    without = {**documents(1, 5)[0], "gold": -1}
    write_tasks(
        tmp_path, {"t_choice": FIT_TASKS["t_choice"]}, train=[*documents(6, 1), asked[0], same_question, without]
    )
    e = evaluator(tmp_path, ["t_choice"])
    with caplog.at_level(logging.WARNING):
        assert e.fit_tasks() == {"t_choice": 6}
    assert "task 't_choice': 2 rows to fit on are also questions: left out" in caplog.text
    assert "task 't_choice': 1 rows to fit on have no right choice: left out" in caplog.text


@pytest.mark.parametrize("task", ["t_choice", "t_generate"])
def test_test_inputs_are_fitted_on_without_ever_reading_a_right_answer(
    fit_folder: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    e = bound(fit_folder, [task], shares=WITH_FIT, fit="test_inputs")
    tested = [q.doc["query"] for q in e.tasks[0].select(Split.TEST, 1.0)]
    assert [d["query"] for d in docs(e, task)] == tested
    assert e.metrics()[0].n_questions.get(Split.FIT, 0) == 0
    own = e.tasks[0].task

    def refuse(*_: object) -> None:
        raise AssertionError("a right answer was read")

    monkeypatch.setattr(own, "doc_to_target", refuse)
    rows = range(e.fit_tasks()[task])
    e.cache_teacher(task, rows)
    e.set_pseudo_labels(task, dict(zip(rows, e.predict(task, rows), strict=True)))
    assert e.losses(task) == ("pseudo", "kl", "entropy")
    for kind in e.losses(task):
        assert torch.isfinite(e.loss(task, rows, kind))
    with pytest.raises(InputError, match="whose right answers are never read: it has no gold loss, only pseudo, kl"):
        e.loss(task, rows, "gold")


def test_a_task_that_scores_a_given_text_has_no_loss_on_test_inputs(fit_folder: Path) -> None:
    e = bound(fit_folder, ["t_word"], shares=WITH_FIT, fit="test_inputs")
    assert e.losses("t_word") == ()
    assert rows_of_experts([e], ["a"], {}, n_rows=4, seed=0) == {"a": ()}


def test_fewer_fit_rows_are_the_first_of_more_in_the_order_of_questions(fit_folder: Path) -> None:
    few, many = (evaluator(fit_folder, ["t_choice"], fit_limit=n) for n in (5, 4000))
    assert few.fit_tasks() == {"t_choice": 5}
    ids = [r.id for r in many._fit["t_choice"].rows]
    assert [r.id for r in few._fit["t_choice"].rows] == ids[:5]
    assert ids == sorted(ids, key=question_order)


def test_shots_never_show_the_row_itself(tmp_path: Path) -> None:
    shots = {**FIT_TASKS["t_choice"], "num_fewshot": 5, "fewshot_split": "train"}
    write_tasks(tmp_path, {"t_shots": shots}, train=documents(7, 1))
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


def test_the_fingerprint_follows_the_rows_to_fit_on(fit_folder: Path, tmp_path: Path) -> None:
    here = evaluator(fit_folder, ["t_choice"]).fingerprint()
    assert evaluator(write_tasks(tmp_path / "a", FIT_TASKS), ["t_choice"]).fingerprint() == here
    other = write_tasks(tmp_path / "b", FIT_TASKS, train=documents(N_TRAIN, 2))
    assert evaluator(other, ["t_choice"]).fingerprint() != here
    assert evaluator(fit_folder, ["t_choice"], fit="search").fingerprint() != here
    assert evaluator(fit_folder, ["t_choice"], fit_limit=9).fingerprint() != here


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


def test_the_inputs_of_prompts_are_the_same_at_every_measurement(fit_folder: Path) -> None:
    """The first choices decide whether rows are packed, by passes that are no answers."""
    e = bound(fit_folder, ["t_choice"])
    (rows,) = rows_of_experts([e], ["a"], {}, n_rows=6, seed=0, needs_labels=False)["a"]
    model = e._losses()._live.model
    views = {name: p.detach() for name, p in model.named_parameters()}
    first, again = (measure(Work(model, views, {}, (rows,)), prompts=6) for _ in range(2))
    assert e._losses()._packs is not None  # the test ran
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
