"""Measure two checkouts of this repository beside each other in one run, and compare them as ratios.

A figure from another day, another machine or a busier minute says little about a change of a few per cent. So each
round measures both checkouts, one directly after the other. The order swaps from round to round, and only the ratio of
a round's two figures is reported.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import machine

__all__ = ["FIELDS", "HERE", "Ratio", "add_options", "checkouts", "environment", "ratios", "report", "rounds"]

HERE = Path(__file__).resolve().parents[1]
FIELDS = [
    "date", "commit", "beside", "machine", "what", "figure", "this", "other", "ratio", "lowest", "highest", "rounds",
    "torch", "python",
]  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--beside`` and ``--rounds`` to a benchmark's command line."""
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="compare with another checkout, as ratios")
    parser.add_argument("--rounds", type=int, default=5, help="with --beside: how often both checkouts are measured")


def checkouts(other: Path) -> dict[str, Path]:
    """The two checkouts by name: ``this`` and ``other``.

    Raises:
        SystemExit: The other folder is no checkout of this repository.
    """
    other = other.resolve()
    if not (other / "merge_search" / "__init__.py").is_file():
        raise SystemExit(f"--beside {other}: needs a checkout of this repository, found no merge_search/ in it")
    return {"this": HERE, "other": other}


def rounds(names: Sequence[str], n: int) -> Iterator[list[str]]:
    """The order of the checkouts in each of `n` rounds. It is reversed in every second round."""
    for number in range(n):
        yield list(names) if number % 2 == 0 else list(reversed(names))


def environment(checkout: Path) -> dict[str, str]:
    """Environment variables under which Python imports this checkout's packages, whichever version is installed."""
    return {**os.environ, "PYTHONPATH": str(checkout)}


class Ratio:
    """One figure of both checkouts, by round, and their ratio (this checkout's figure over the other's).

    Args:
        this: This checkout's figure in each round.
        other: The other checkout's figure in the same rounds.
    """

    def __init__(self, this: Sequence[float], other: Sequence[float]) -> None:
        self.this, self.other = statistics.median(this), statistics.median(other)
        self.rounds = sorted(a / b for a, b in zip(this, other, strict=True))
        self.median = statistics.median(self.rounds)

    def __str__(self) -> str:
        return (
            f"{self.median:.3f} ({self.rounds[0]:.3f} to {self.rounds[-1]:.3f} in {len(self.rounds)} rounds), "
            f"{self.this:.4g} beside {self.other:.4g}"
        )


def ratios(measured: Mapping[str, Sequence[Mapping[tuple[str, str], float]]]) -> dict[tuple[str, str], Ratio]:
    """The ratio of every figure, over the rounds in which both checkouts have it.

    Args:
        measured: For each checkout, every round's figures by (what was measured, name of the figure).
    """
    pairs = list(zip(measured["this"], measured["other"], strict=True))
    keys = dict.fromkeys(key for this, other in pairs for key in this if key in other)
    both = {key: [(this[key], other[key]) for this, other in pairs if key in this and key in other] for key in keys}
    return {key: Ratio(*zip(*values, strict=True)) for key, values in both.items()}


def report(compared: Mapping[tuple[str, str], Ratio], other: Path, out: Path | None) -> None:
    """Print every ratio. With `out`, append a row for each to that CSV file."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=other, capture_output=True, text=True
    ).stdout.strip()
    about = {**machine.place(), "beside": commit}
    for (what, figure), ratio in compared.items():
        print(f"{what}, {figure}: {ratio}", flush=True)
    if out is not None:
        rows = [
            {
                **about, "what": what, "figure": figure, "this": f"{r.this:.4g}", "other": f"{r.other:.4g}",
                "ratio": f"{r.median:.4f}", "lowest": f"{r.rounds[0]:.4f}", "highest": f"{r.rounds[-1]:.4f}",
                "rounds": len(r.rounds),
            }
            for (what, figure), r in compared.items()
        ]  # fmt: skip
        machine.append(out, FIELDS, rows)
