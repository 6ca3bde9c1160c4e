"""The parts of benchmarks/search that decide its table: budgets, differences, the grid of presets, the drawing."""

from __future__ import annotations

import importlib
import itertools
import math
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from merge_search.outcome import Outcome
from merge_search.presets import PRESETS
from merge_search.recipe import Group, Models
from merge_search.search.records import Record
from merge_search.space import SpaceContext

FOLDER = Path(__file__).parents[2] / "benchmarks" / "search"
OWN = {path.stem for path in FOLDER.glob("*.py")}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Modules of the benchmark by name, gone again afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in OWN & sys.modules.keys():
        del sys.modules[name]


def record(number: int, questions: int) -> Record:
    return Record(number, "", Outcome.OK, "", (0.5,), True, {"cost": [0.0, 0.0, questions]})


def test_a_trial_counts_at_a_checkpoint_only_if_its_last_question_does(load: object) -> None:
    anytime: ModuleType = load("live_anytime")  # type: ignore[operator]
    done = [record(0, 600), record(1, 29_400), record(2, 600)]
    assert [r.number for r in anytime.within(done, 30_000)] == [0, 1]
    assert [r.number for r in anytime.within(done, 29_999)] == [0]
    assert [r.number for r in anytime.within(done, 599)] == []


def test_differences_are_paired_over_common_seeds(load: object) -> None:
    summary: ModuleType = load("live_summary")  # type: ignore[operator]
    centre, half, n = summary.difference({0: 0.8, 1: 0.9, 5: 0.1}, {0: 0.7, 1: 0.7, 6: 0.9})
    assert (round(centre, 6), n) == (0.15, 2)
    assert half == pytest.approx(0.05 * 12.7062, abs=1e-4)  # standard error 0.05, Student's 97.5 % point of 1 degree
    assert math.isnan(summary.difference({0: 0.8}, {0: 0.7})[1])
    assert summary.difference({0: 0.8}, {1: 0.7})[2] == 0


def test_a_mean_over_problems_gives_every_problem_the_same_weight(load: object) -> None:
    tables: ModuleType = load("tables")  # type: ignore[operator]
    centre, half = tables.mean_over_problems([[0.1, 0.3], [0.6, 0.8]])
    assert centre == pytest.approx(0.45)  # both of standard error 0.1: 0.0707 together, with 2 degrees of freedom
    assert half == pytest.approx(4.302653 * 0.0707107, rel=1e-5)
    assert tables.mean_over_problems([[0.0] * 9 + [1.0], [0.5, 0.5]])[0] == pytest.approx(0.3)
    assert tables.mean_over_problems([[0.2, 0.2], [0.4, 0.4]]) == pytest.approx((0.3, 0.0))
    assert math.isnan(tables.mean_over_problems([[0.1], [0.6, 0.8]])[1])


def test_the_grid_tries_every_preset_once_before_any_twice(load: object) -> None:
    spaces: ModuleType = load("live_spaces")  # type: ignore[operator]
    models = Models(base="base", experts={"a": "a", "b": "b"})
    context = SpaceContext(models, (Group(tensor="layers.0.w", block=0, kind="mlp"),))
    names = ["task_arithmetic", "ties", "tsv_m"]
    grid = spaces.PresetGrid({"presets": names}, context)
    points = grid.initial_points()
    assert len(points) == sum(len(PRESETS[n].grid) for n in names)
    assert [grid.decode(p).preset for p in points[:3]] == names
    assert all(grid.encode(grid.decode(p)) == p for p in points)


def test_the_drawing_has_a_line_and_a_name_for_every_opponent(load: object, tmp_path: Path) -> None:
    summary: ModuleType = load("live_summary")  # type: ignore[operator]
    rows = [
        {
            "zoo": "lm", "opponent": name, "seed": str(seed), "candidates": str(c), "questions": str(600 * c),
            "test_mean": str(0.6 + 0.01 * c / 25 + 0.01 * seed), "cpu_s": "1",
            "references": "base=0.6 own_experts=0.85",
        }
        for name in ("two levels", "a < b")
        for seed in (0, 1)
        for c in (10, 25)
    ]  # fmt: skip
    (path,) = summary.draw(rows, tmp_path)
    root = ET.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = ["".join(t.itertext()) for t in root.iter(f"{space}text")]
    assert len(list(root.iter(f"{space}polygon"))) == 2
    assert any(t.startswith("a < b ") for t in texts)
    assert {"6,000", "15,000"} <= set(texts)


def test_names_in_the_drawing_never_lie_on_each_other(load: object, tmp_path: Path) -> None:
    """Fourteen lines that end within a hundredth, one of them early, and a level among them."""
    plot: ModuleType = load("live_plot")  # type: ignore[operator]
    curves = [
        plot.Curve(f"c{i}", [(600.0, 0.6), (6000.0, 0.7 + i / 1400)], [(0.6, 0.6), (0.7, 0.8)]) for i in range(13)
    ]
    curves.append(plot.Curve("early", [(600.0, 0.65)], [(0.6, 0.7)]))
    plot.draw_curves(tmp_path / "x.svg", "title", curves, {"average": 0.705})
    texts = list(ET.parse(tmp_path / "x.svg").getroot().iter("{http://www.w3.org/2000/svg}text"))
    places = [(float(t.attrib["x"]), float(t.attrib["y"])) for t in texts]
    names = sorted(y for x, y in places if x > plot.WIDTH - plot.RIGHT)
    assert len(names) == len(curves) + 1
    assert all(b - a >= 12 for a, b in itertools.pairwise(names))  # the font's size
    assert all(plot.TOP <= y <= plot.HEIGHT - plot.BOTTOM + 12 for y in names)
