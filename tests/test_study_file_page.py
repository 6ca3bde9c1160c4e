"""docs/study-file.md names every key of the study file with its default, and its examples can be read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from evaluators import self_param
from evaluators.classification import image_rows as labelled_images
from evaluators.classification import rows as labelled_text
from evaluators.costs import drift, latency, size
from evaluators.lm_eval import options as lm_eval_options
from evaluators.ranking import rows as sequences
from merge_search import study_file
from merge_search.study_file import StudyFile, read_study_file

PAGE = (Path(__file__).parent.parent / "docs" / "study-file.md").read_text(encoding="utf-8")
SECTIONS: dict[str, type[BaseModel]] = {
    "The whole file": StudyFile,
    "study": study_file.Study,
    "models": study_file.ModelsSection,
    "space": study_file.Space,
    "evaluate": study_file.Evaluate,
    "splits": study_file.Splits,
    "objective": study_file.ObjectiveSection,
    "search": study_file.Search,
    "search.racing": study_file.Racing,
    "search.learner": study_file.Learner,
    "search.baselines": study_file.BaselineFit,
    "search.baselines.NAME": study_file.BaselineOptions,
    "search.stop": study_file.Stop,
    "search.learn_from": study_file.Earlier,
    "statistics": study_file.StatisticsSection,
}
EVALUATORS: dict[str, list[type[BaseModel]]] = {
    "lm_eval": [lm_eval_options.LmEvalOptions],
    "classification": [labelled_text.Options, labelled_text.TaskOptions],
    "image_classification": [labelled_images.ImageOptions, labelled_images.ImageTaskOptions],
    "drift": [drift.Options],
    "latency": [latency.Options],
    "ranking": [sequences.Options, sequences.TaskOptions],
    "self_param": [self_param.Options],
    "size": [size.Options],
}


def section(title: str) -> str:
    found = re.search(rf"^##+ {re.escape(title)}$(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"the page has no section {title!r}"
    return found[1]


def shown(field: FieldInfo) -> str:
    default: Any = field.get_default(call_default_factory=True)
    if field.is_required():
        return "required"
    if isinstance(default, BaseModel):
        return "see below"
    if default is None or default == "":
        return "none"
    value = list(default) if isinstance(default, tuple) else default
    text = yaml.safe_dump(value, default_flow_style=True)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_stands_on_the_page_with_its_default(title: str) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section(title), re.MULTILINE))
    fields = SECTIONS[title].model_fields
    wanted = {key: shown(field) for key, field in fields.items() if key != "path"}
    found = {key: default for key, default in rows.items() if title != "evaluate" or key not in EVALUATORS}
    assert found == wanted


def test_no_section_of_the_study_file_is_forgotten() -> None:
    models = {m for m in vars(study_file).values() if isinstance(m, type) and issubclass(m, BaseModel)}
    assert {m for m in models if m.model_fields} == set(SECTIONS.values())


@pytest.mark.parametrize("name", EVALUATORS)
def test_every_key_of_an_evaluator_stands_on_the_page(name: str) -> None:
    row = next(line for line in section("evaluate").splitlines() if line.startswith(f"| `{name}` |"))
    keys = {key for model in EVALUATORS[name] for key in model.model_fields}
    assert keys <= set(re.findall(r"`(\w+)`", row))


def test_the_examples_are_read(tmp_path: Path) -> None:
    *_, whole, several = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "study.yaml"
    path.write_text(whole)
    file = read_study_file(path)
    assert file.search.learner is not None
    assert [e.file or e.study for e in file.search.learn_from] == ["last_month.yaml", "maths_only"]
    path.write_text(yaml.safe_dump({**yaml.safe_load(whole), **yaml.safe_load(several)}))
    assert read_study_file(path).objective.minimise == ["drift"]
