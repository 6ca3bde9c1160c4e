"""A full disk and a lost database are a sentence; what nobody foresaw keeps its traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from command_line import here
from failing_studies import EVALUATOR, write_study
from sqlalchemy.exc import OperationalError, ProgrammingError

from merge_search import cli

VANDAL = '''
class Vandal(Norm):
    """Overwrites the study's database in its fourth call."""

    def __init__(self, options, *, shares, seed, folder):
        self.folder = folder

    def evaluate(self, split, fidelity=1.0, *, after=0.0):
        if Norm.calls == 3:
            for path in self.folder.glob("*.db*"):
                path.write_bytes(b"junk" * 3000) if "lock" not in path.name else None
        return super().evaluate(split, fidelity, after=after)
'''


def test_a_lost_database_is_a_sentence(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, "Vandal")
    (tmp_path / "mine.py").write_text(EVALUATOR + VANDAL)
    found = here("run", path, check=False)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith(
        "error: the study's database cannot be used any more: file is not a"
    )
    assert "goes on from the trials that are stored there" in found.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/a.safetensors"), "full (out/a.safetensors): No space"),
        (OSError("I/O error: No space left on device (os error 28)"), "full: I/O error: No space left"),
        (OperationalError("INSERT", {}, Exception("database or disk is full")), "full: database or disk"),
        (OperationalError("INSERT", {}, Exception("server closed")), "any more: server closed."),
    ],
    ids=["errno", "text", "full database", "lost database"],
)
def test_what_the_machine_lacks_is_a_sentence_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, said: str
) -> None:
    def fail(*_: object) -> None:
        try:
            raise error
        except type(error) as cause:
            raise RuntimeError("An exception is raised during the commit") from cause

    monkeypatch.setattr(cli, "_plan", fail)
    found = here("export", tmp_path / "study.yaml", tmp_path / "out", check=False)
    assert found.returncode == 1
    assert found.stderr.startswith("error: ")
    assert said in found.stderr
    assert "give the same command again" in found.stderr
    assert len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("a mistake"), PermissionError(13, "no"), ProgrammingError("S", {}, Exception())]
)
def test_any_other_exception_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_plan", fail)
    with pytest.raises(type(error)):
        here("validate", tmp_path / "study.yaml")
