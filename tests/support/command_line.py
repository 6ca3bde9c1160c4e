"""The commands of merge-search, run in their own process or, without importing everything again, in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

__all__ = ["ENV", "alone", "here"]

Done = subprocess.CompletedProcess[str]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def alone(*arguments: str | Path, check: bool = True) -> Done:
    """Run a command in its own process, as a user starts it."""
    line = [sys.executable, "-m", "merge_search", *map(str, arguments)]
    return _checked(subprocess.run(line, capture_output=True, text=True, env=ENV), check=check)


def here(*arguments: str | Path, check: bool = True) -> Done:
    """Run a command in this process. Arguments, exit status and texts are the same."""
    import optuna

    from merge_search import cli

    out, err, verbosity = io.StringIO(), io.StringIO(), optuna.logging.get_verbosity()
    line = list(map(str, arguments))
    with (
        mock.patch.dict(os.environ, {"COLUMNS": ENV["COLUMNS"]}),
        # A console keeps the width that its module found when it was imported.
        mock.patch.object(cli.out, "_width", int(ENV["COLUMNS"])),
        mock.patch.object(cli.err, "_width", int(ENV["COLUMNS"])),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main(line)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            optuna.logging.set_verbosity(verbosity)
    return _checked(Done(line, status, out.getvalue(), err.getvalue()), check=check)


def _checked(done: Done, *, check: bool) -> Done:
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
