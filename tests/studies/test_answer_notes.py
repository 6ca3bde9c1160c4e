"""A run tells how base and experts answer before it searches."""

from __future__ import annotations

from pathlib import Path

from failing_studies import EVALUATOR, Quiet, write_study

from merge_search.search.run import run
from merge_search.study_file import read_study_file

CUT = '''
from dataclasses import replace
from merge_search.evaluation import AnswerEnds

class Cut(Norm):
    """Nearly all of its answers are cut."""

    def evaluate(self, split, fidelity=1.0, *, after=0.0):
        return replace(super().evaluate(split, fidelity, after=after), answers={"small": AnswerEnds(10, 9, 0)})
'''


class Order(Quiet):
    """Keeps the beginning of the search among the notes."""

    def begin(self, **_: object) -> None:
        self.notes.append("the search begins")


def test_cut_answers_are_told_before_the_search_and_again_when_it_goes_on(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, "Cut", n_trials=3)
    (tmp_path / "mine.py").write_text(EVALUATOR + CUT)
    for _ in range(2):
        listener = Order()
        study = run(read_study_file(path), listener)
        (told,) = [text for text in listener.notes if text.startswith("answers to small")]
        assert "hit the length limit: base 90 %, maths 90 %" in told
        assert "WARNING" in told
        assert listener.notes.index(told) < listener.notes.index("the search begins")
    assert study.trials[2].user_attrs["evaluation"]["answers"] == {"small": [10, 9, 0]}
