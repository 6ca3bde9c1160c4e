"""Show the running search: the trial, the best merge so far against the best expert, and the time left.

A terminal gets one live line. Anything else gets a plain line for each trial.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from merge_search.search.records import Record

__all__ = ["Progress"]


class Progress:
    """A `Listener` that prints to a console. As a context manager it removes the live line at the end."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Bar | None = None
        self.total = self.finished = 0
        self.began = time.monotonic()
        self.finished_here = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, *, total: int, finished: int) -> None:
        self.total, self.finished, self.began, self.finished_here = total, finished, time.monotonic(), 0
        if finished:
            self.note(f"resuming: {finished} of {total} trials are finished")
        if self.console.is_terminal and finished < total:
            self.bar = Bar(
                TextColumn("trial"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[line]}"),
                console=self.console,
            )
            self.bar.start()
            self.bar.add_task("search", total=total, completed=finished, line="")

    def trial(self, record: Record, *, best: Record | None, best_expert: float | None) -> None:
        self.finished += 1
        self.finished_here += 1
        left = (time.monotonic() - self.began) / self.finished_here * max(self.total - self.finished, 0)
        line = f"best {best.values[0]:.3f} ({best.name})" if best is not None else "nothing scored yet"
        if best_expert is not None:
            line += f", best expert {best_expert:.3f}"
        line += f", {_duration(left)} left"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.finished, line=line)
        else:
            value = (
                f"{record.values[0]:.3f}"
                if record.values
                else f"{record.outcome}: {record.reason.splitlines()[0] if record.reason else ''}"
            )
            self.note(f"trial {self.finished}/{self.total} {record.label or ''} {value}; {line}".replace("  ", " "))

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
