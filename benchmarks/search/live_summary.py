"""Summary of the rows of `live`: means over seeds, paired differences, shares of the own experts, a drawing."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from live_opponents import TWO_LEVELS
from live_plot import Curve, draw_curves
from tables import half_interval, mean_over_problems, standard_error

__all__ = ["difference", "draw", "print_summary", "read_rows", "spread"]

Row = Mapping[str, str]
Cells = Mapping[str, Mapping[int, Mapping[int, float]]]
"""Test mean by opponent, candidates and seed."""


def read_rows(path: Path) -> list[Row]:
    """The rows of the table; empty where there is none yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cells(rows: Sequence[Row], zoo: str) -> Cells:
    found: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in rows:
        if r["zoo"] == zoo:
            found[r["opponent"]][int(r["candidates"])][int(r["seed"])] = float(r["test_mean"])
    return found


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds (NaN for one seed)."""
    return mean(values), standard_error(values)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, int]:
    """Mean of ours minus theirs over common seeds, half the width of its 95 % interval (Student), number of seeds.

    It is NaN where there is nothing to compare, or only one seed.
    """
    found = gaps(ours, theirs)
    if not found:
        return math.nan, math.nan, 0
    return mean(found), half_interval(found), len(found)


def gaps(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Ours minus theirs, one value per common seed."""
    return [ours[s] - theirs[s] for s in sorted(ours.keys() & theirs.keys())]


def print_summary(rows: Sequence[Row]) -> None:
    """One block per zoo and checkpoint, the best first."""
    for zoo in dict.fromkeys(r["zoo"] for r in rows):
        table, known = cells(rows, zoo), _references(rows, zoo)
        print(f"\n{zoo}: test mean of {', '.join(f'{k} {v:.3f}' for k, v in known.items())}")
        print(
            "± is the standard error over seeds; intervals are paired over seeds, 95 %; "
            "the test rows are the same for all"
        )
        for candidates in sorted({int(r["candidates"]) for r in rows if r["zoo"] == zoo}):
            asked = [int(r["questions"]) for r in rows if r["zoo"] == zoo and int(r["candidates"]) == candidates]
            print(f"\n  cost of {candidates} candidates (at most {max(asked)} questions asked)")
            print(
                f"  {'opponent':26} {'test mean':>15} {'of own experts':>15} {f'{TWO_LEVELS} minus it':>28} "
                f"{'seeds':>5} {'CPU s':>7}"
            )
            _print_block(rows, zoo, candidates, table, known["own_experts"])
    _print_over_problems(rows)


def _print_over_problems(rows: Sequence[Row]) -> None:
    """Print the mean over zoos of the paired differences, for opponents that ran on every zoo."""
    tables = [cells(rows, zoo) for zoo in dict.fromkeys(r["zoo"] for r in rows)]
    if len(tables) < 2:
        return
    print(f"\n{TWO_LEVELS} minus the opponent, mean over the zoos [95 %: seeds vary, problems do not] (seeds of each)")
    for name in tables[0]:
        shown = []
        for candidates in sorted({int(r["candidates"]) for r in rows}):
            found = [gaps(t[TWO_LEVELS].get(candidates, {}), t.get(name, {}).get(candidates, {})) for t in tables]
            if name == TWO_LEVELS or not all(found):
                continue
            centre, half = mean_over_problems(found)
            interval = "" if math.isnan(half) else f" [{centre - half:+.3f}, {centre + half:+.3f}]"
            shown.append(f"{candidates}: {centre:+.3f}{interval} ({', '.join(str(len(f)) for f in found)})")
        if shown:
            print(f"  {name:26} {'   '.join(shown)}")


def _print_block(rows: Sequence[Row], zoo: str, candidates: int, table: Cells, own: float) -> None:
    here = {name: by[candidates] for name, by in table.items() if candidates in by}
    for name, by_seed in sorted(here.items(), key=lambda item: -mean(item[1].values())):
        centre, se = spread(list(by_seed.values()))
        gap, half, n = difference(here.get(TWO_LEVELS, {}), by_seed)
        shown = (
            ""
            if name == TWO_LEVELS or not n
            else f"{gap:+.3f}" + (f" [{gap - half:+.3f}, {gap + half:+.3f}]" if n > 1 else "")
        )
        key = (zoo, name, candidates)
        cpu = [float(r["cpu_s"]) for r in rows if (r["zoo"], r["opponent"], int(r["candidates"])) == key]
        value = f"{centre:.3f}" + (f" ± {se:.3f}" if n > 1 or not math.isnan(se) else "")
        print(f"  {name:26} {value:>15} {centre / own:>14.1%} {shown:>29} {len(by_seed):>5} {mean(cpu):>7.0f}")


def _references(rows: Sequence[Row], zoo: str) -> dict[str, float]:
    text = next(r["references"] for r in reversed(rows) if r["zoo"] == zoo)
    return {key: float(value) for key, value in (part.split("=") for part in text.split())}


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw one SVG per zoo: questions asked (log) against the test mean, in a band from the worst seed to the best."""
    written = []
    for zoo in dict.fromkeys(r["zoo"] for r in rows):
        asked: dict[tuple[str, int], list[int]] = defaultdict(list)
        for r in rows:
            if r["zoo"] == zoo:
                asked[r["opponent"], int(r["candidates"])].append(int(r["questions"]))
        budgets = _budgets(rows, zoo)
        curves = []
        for name, by in cells(rows, zoo).items():
            at = sorted(by)
            values = [list(by[c].values()) for c in at]
            points = [(budgets[c], mean(v)) for c, v in zip(at, values, strict=True)]
            curves.append(Curve(name, points, [(min(v), max(v)) for v in values]))
        levels = {name.replace("_", " "): value for name, value in _references(rows, zoo).items()}
        path = out / f"search_live_{zoo}.svg"
        title = f"{zoo} zoo: sealed test after a budget of questions"
        subtitle = (
            "mean score of the tasks on rows that no search saw; line: mean over seeds; band: worst seed to best seed"
        )
        draw_curves(path, title, curves, levels, subtitle=subtitle, emphasis=TWO_LEVELS)
        written.append(path)
    return written


def _budgets(rows: Sequence[Row], zoo: str) -> dict[int, int]:
    """Number of questions allowed at each checkpoint."""
    from zoo import ZOOS

    return {int(r["candidates"]): int(r["candidates"]) * ZOOS[zoo].candidate for r in rows if r["zoo"] == zoo}
