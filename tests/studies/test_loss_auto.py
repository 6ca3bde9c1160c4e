"""What a learner learns where a task's gold text is no right answer, on real experts and tasks judged by Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from checked_tasks import write_checked_tasks
from command_line import here

from evaluators.lm_eval.evaluator import LmEval
from merge_search.errors import StudyFileError
from merge_search.evaluation import SplitShares
from merge_search.search.prepare import prepare
from merge_search.search.records import Record, finished_records
from merge_search.search.start.learned_space import LearnedSpace, with_stored_loss
from merge_search.study_file import read_study_file

STEPS, BATCH = 4, 8
LEARNER = {"per": "block", "steps": [STEPS], "step_size": 0.1, "batch_rows": BATCH}


def write_study(folder: Path, zoo: Path, tasks: list[str], learner: dict[str, Any] = LEARNER, **options: Any) -> Path:
    tasks_folder = write_checked_tasks(folder / "tasks", zoo)
    data = {
        "study": {"name": "learned", "seed": 1},
        "models": {
            "base": str(zoo / "lm" / "base"),
            "experts": {e: str(zoo / "lm" / e) for e in ("intent", "where")},
            "dtype": "float32",
        },
        "space": {"type": "uniform", "presets": ["task_arithmetic"]},
        "evaluate": [{"evaluator": "lm_eval", "tasks": tasks, "include_path": str(tasks_folder), **options}],
        "search": {"baselines": [], "finalists": 2, "sampler": "random", "n_trials": 7, "learner": learner},
        "device": "cpu",
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def learned(path: Path) -> list[Record]:
    study = optuna.load_study(study_name="learned", storage=f"sqlite:///{path.parent / 'learned.db'}")
    return [r for r in finished_records(study) if "learner" in r.attributes]


def build(folder: Path, **options: Any) -> LmEval:
    return LmEval({"include_path": str(folder), **options}, shares=SplitShares(1.0, 0.0, 0.0), seed=0)


def test_gold_is_offered_only_where_the_tasks_own_metric_scores_it_right(zoo: Path, tmp_path: Path) -> None:
    e = build(write_checked_tasks(tmp_path, zoo), tasks=["intent_plain", "intent_follows", "where_passes"])
    assert "gold" in e.losses("intent_plain")
    assert e.why_not_gold("intent_plain") is None
    for task, text in (("intent_follows", "'0'"), ("where_passes", "assert answer")):
        assert "gold" not in e.losses(task)
        why = e.why_not_gold(task) or ""
        assert text in why
        assert "no full marks to 16 of 16 texts" in why
    assert [e.auto_loss(t) for t in e.fit_tasks()] == ["gold", "correct", "correct"]


@pytest.mark.parametrize("target", ["answer", "{{answer}}"])
def test_a_target_of_ones_own_brings_gold_back_and_leaves_the_questions_alone(
    zoo: Path, tmp_path: Path, target: str
) -> None:
    folder = write_checked_tasks(tmp_path, zoo)
    plain = build(folder, tasks="where_passes")
    e = build(folder, tasks="where_passes", task_options={"where_passes": {"target": target}})
    assert "gold" in e.losses("where_passes")
    assert e.auto_loss("where_passes") == "gold"
    assert e.tasks[0].digest == plain.tasks[0].digest
    assert e.fingerprint() != plain.fingerprint()  # the learner learns something else


def test_a_target_that_no_document_has_is_named(zoo: Path, tmp_path: Path) -> None:
    folder = write_checked_tasks(tmp_path, zoo)
    e = build(folder, tasks="where_passes", task_options={"where_passes": {"target": "code"}})
    assert "'code' is no field of the document, which has query, answer" in (e.why_not_gold("where_passes") or "")


def test_validate_refuses_gold_and_says_what_auto_takes(zoo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, zoo, ["intent_follows", "where_passes"])
    shown = here("validate", path).stdout
    assert "task 'intent_follows' is learned from its best expert (loss correct)" in shown
    path = write_study(tmp_path, zoo, ["intent_follows", "where_passes"], {**LEARNER, "loss": "gold"})
    with pytest.raises(StudyFileError) as caught:
        prepare(read_study_file(path), is_new=True)
    assert len(caught.value.problems) == 2
    assert "gives no full marks to 16 of 16 texts, like '0'" in caught.value.problems[0]
    refused = here("run", path, check=False)
    assert refused.returncode != 0
    assert "has no loss 'gold'" in " ".join(refused.stderr.split())
    prepare(read_study_file(path))  # a study that began before goes on


def test_auto_learns_the_teachers_right_answers_and_counts_what_they_cost(zoo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, zoo, ["intent_follows", "where_passes"])
    here("run", path)
    first, second = learned(path)[:2]
    losses = first.attributes["learner"]["losses"].values()
    assert sum(end for _, end in losses) < sum(begin for begin, _ in losses)
    n_scored = {id(r): sum(len(s.values) for s in r.evaluation.scores.values()) for r in (first, second)}
    fitted = 3 * BATCH * 2 * STEPS  # forward, and a backward that counts as two; rows, tasks, steps
    assert first.cost.questions - n_scored[id(first)] == fitted + 2 * BATCH * STEPS  # a teacher's answer per row
    assert fitted <= second.cost.questions - n_scored[id(second)] <= fitted + 2 * BATCH * STEPS


def test_where_no_answer_is_right_auto_is_kl_and_correct_fails_with_the_reason(zoo: Path, tmp_path: Path) -> None:
    rows = BATCH * STEPS
    for loss in ("auto", "correct"):
        folder = tmp_path / loss
        folder.mkdir()
        here("run", write_study(folder, zoo, ["where_passes", "intent_never"], {**LEARNER, "loss": loss}), check=False)
    first = learned(tmp_path / "auto" / "study.yaml")[0]
    n_scored = sum(len(s.values) for s in first.evaluation.scores.values())
    # Two tasks are fitted and their teachers generate; one teacher is asked twice a row for its distribution.
    assert first.cost.questions - n_scored == 3 * BATCH * 2 * STEPS + 2 * rows + 2 * rows
    study = optuna.load_study(study_name="learned", storage=f"sqlite:///{tmp_path / 'correct' / 'learned.db'}")
    failed = [str(t.user_attrs) for t in study.trials if "too few for the loss correct" in str(t.user_attrs)]
    assert failed
    assert "the teacher of 'intent_never'" in failed[0]


def test_auto_is_gold_to_the_bit_where_gold_is_right_and_short(zoo: Path, tmp_path: Path) -> None:
    ends = []
    for loss in ("gold", "auto"):
        folder = tmp_path / loss
        folder.mkdir()
        here("run", path := write_study(folder, zoo, ["intent_plain"], {**LEARNER, "loss": loss}))
        ends.append([(r.attributes["weights_sha256"], r.attributes["learner"]["losses"]) for r in learned(path)])
    assert ends[0]
    assert ends[0] == ends[1]


def test_a_stored_study_keeps_the_loss_that_it_began_with(zoo: Path, tmp_path: Path) -> None:
    plan = prepare(read_study_file(write_study(tmp_path, zoo, ["intent_plain"])))
    old = {"learner": {**plan.identity({})["learner"], "loss": ["gold"]}}
    for stored, expected in ((None, ["auto"]), (old, ["gold"])):
        kept = with_stored_loss(plan, stored)
        assert isinstance(kept.space, LearnedSpace)
        assert kept.space.learner.loss == kept.identity({})["learner"]["loss"] == expected
    named = prepare(read_study_file(write_study(tmp_path, zoo, ["intent_plain"], {**LEARNER, "loss": "kl"})))
    assert with_stored_loss(named, old).file.search.learner == named.file.search.learner
