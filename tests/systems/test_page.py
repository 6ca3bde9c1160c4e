"""Every example of docs/systems.md is run as it stands there, on small models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from command_line import here
from system_kits import KITS

from merge_search.search.prepare import prepare
from merge_search.search.records import finished_records
from merge_search.search.storage import load_study
from merge_search.study_file import read_study_file

PAGE = Path(__file__).parents[2] / "docs" / "systems.md"
BLOCK = re.compile(r"^<!-- models: (?P<kit>\w+) -->\n+```yaml\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)


class Example(NamedTuple):
    """One block of the page: the system that it runs, the small models for it, and lines of a study file."""

    system: str
    kit: str
    text: str


def examples() -> list[Example]:
    page = PAGE.read_text(encoding="utf-8")
    found = []
    for block in BLOCK.finditer(page):
        system = [h["title"] for h in HEADING.finditer(page) if h.start() < block.start()][-1]
        found.append(Example(system, block["kit"], block["text"]))
    return found


def test_every_example_of_the_page_is_found() -> None:
    assert len(examples()) == PAGE.read_text(encoding="utf-8").count("```yaml") > 0


@pytest.mark.parametrize("example", examples(), ids=lambda e: f"{e.system.split(' ')[0]}-{e.kit}")
def test_an_example_of_the_page_finds_and_exports_a_merge(
    example: Example, demo: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    make: Callable[..., dict[str, Any]] = KITS[example.kit]
    study = make(tmp_path, demo, tmp_path_factory)
    written = yaml.safe_load(example.text)
    for key, value in written.items():
        study[key] = {**study.get(key, {}), **value} if isinstance(value, dict) and key != "space" else value
    study["search"] = {**study["search"], "baselines": written.get("search", {}).get("baselines", [])}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    plan = prepare(read_study_file(path))
    n_first = 2 + len(plan.context.experts) + 1 + len(plan.baselines)
    study["search"]["n_trials"] = n_first + 3
    path.write_text(yaml.safe_dump(study, sort_keys=False))

    here("run", path)

    records = finished_records(load_study(read_study_file(path)))
    own = [r for r in records if not r.label]
    assert len(own) >= 2
    assert all(r.is_scored for r in own), [r.reason for r in records]
    here("export", path, tmp_path / "best", "--trial", str(own[-1].number))
    assert (tmp_path / "best" / "recipe.json").is_file()
