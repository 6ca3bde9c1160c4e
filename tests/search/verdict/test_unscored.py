"""What cannot be scored after the search leaves the rest its table; baselines named late are tried."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import here
from failing_studies import Quiet, evaluator, write_study

from merge_search.search.prepare import prepare
from merge_search.search.records import finished_records
from merge_search.search.run import run
from merge_search.search.verdict.selection import standings, winner
from merge_search.study_file import read_study_file


@pytest.mark.parametrize("failure", [ValueError("no answer"), MemoryError()])
def test_a_rival_that_always_fails_does_not_keep_the_winner_from_its_proof(
    demo: Path, tmp_path: Path, failure: Exception
) -> None:
    """Second is the base, which comes first in the table."""
    path = write_study(tmp_path, demo)
    mine = evaluator(tmp_path)
    study = run(read_study_file(path), Quiet())
    for _ in range(2):
        mine.fails = {mine.calls + (1 if "test" in study.user_attrs else 2): failure}
        found = here("test", path)
        text = " ".join(found.stdout.split())
        why = "no answer" if isinstance(failure, ValueError) else "out of memory while base is tested"
        assert "base could not be scored on the test questions: " in text
        assert why in text
        assert "merge: trial" in text or "baseline: " in text
        assert "expert: maths" in text
        assert str(study.user_attrs["test_winner"]) in study.user_attrs["test"]
    again = " ".join(here("test", path).stdout.split())
    assert "could not be scored" not in again
    assert " base 0.0" in again
    assert here("test", path).stdout.split() == again.split()


def test_an_expert_without_validation_scores_leaves_the_others_their_table_and_is_tried_again(
    demo: Path, tmp_path: Path
) -> None:
    path = write_study(tmp_path, demo)
    mine = evaluator(tmp_path)
    plan = prepare(read_study_file(path))
    study = run(read_study_file(path), Quiet())
    n_scored = len(study.user_attrs["validation"])
    first = next(
        i
        for i, n in enumerate(study.user_attrs["validation"])
        if study.trials[int(n)].user_attrs.get("label") == "maths"
    )
    study.set_user_attr("validation", {})
    mine.fails = {mine.calls + first + 1: ValueError("no answer")}
    text = " ".join(here("run", path).stdout.split())
    assert (
        "maths could not be scored on the validation questions: evaluator Norm failed: ValueError: no answer." in text
    )
    assert "scores on the search questions instead" in text
    rows = standings(study, plan.objective, plan.context.experts)
    assert len(rows) == n_scored - 1
    assert {r.role for r in rows} >= {"base", "baseline", "merge"}
    best = max((r for r in rows if r.role in ("baseline", "merge")), key=lambda r: r.expected)
    chosen = winner(study, plan.objective, plan.context.experts)
    assert chosen is not None
    assert chosen.number == best.record.number
    assert "could not be scored" not in here("run", path).stdout
    assert len(study.user_attrs["validation"]) == n_scored


def test_a_baseline_named_after_the_start_is_tried_before_the_search_goes_on(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, n_trials=10)
    evaluator(tmp_path)
    study = run(read_study_file(path), Quiet())
    before = [(t.params, t.user_attrs.get("label")) for t in study.trials]
    path.write_text(path.read_text().replace("baselines: []", "baselines: [ties, dare]"))
    full = Quiet()
    assert len(finished_records(run(read_study_file(path), full))) == 10
    late = [t.user_attrs["label"] for t in study.trials[10:]]
    assert late == ["ties", "dare"]
    assert any(
        "search.baselines names ties, dare only since the start of this study, and 10 of n_trials 10 are finished: "
        "at least 12" in n
        for n in full.notes
    )
    path.write_text(path.read_text().replace("n_trials: 10", "n_trials: 13"))
    quiet = Quiet()
    done = finished_records(run(read_study_file(path), quiet))
    assert [r.label for r in done[10:]] == ["ties", "dare", ""]
    assert all(r.is_scored for r in done[10:])
    assert sum("ties, dare only since the start of this study: tried now" in n for n in quiet.notes) == 1
    assert [(t.params, t.user_attrs.get("label")) for t in study.trials[:10]] == before
    again = Quiet()
    assert len(run(read_study_file(path), again).trials) == 13
    assert not any("only since" in n for n in again.notes)
