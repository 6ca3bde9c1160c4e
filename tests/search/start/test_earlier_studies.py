"""Recipes of earlier studies: experts are known by their hashes, what does not match is said, scores never travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from merge_search.errors import StudyFileError
from merge_search.evaluation import MetricInfo, Split
from merge_search.recipe import Models, Recipe
from merge_search.search.records import store_metrics
from merge_search.search.start.earlier_studies import best_recipes, earlier_problems, renamed, starts_from
from merge_search.search.storage import open_storage
from merge_search.study_file import Search, StudyFile, read_study_file

OLD = Models(base="b", experts={"m": "m", "s": "s"}, hashes={"base": "B", "m": "M", "s": "S"})
NEW = Models(
    base="b2",
    experts={"stories": "s2", "maths": "m2", "code": "c"},
    hashes={"base": "B", "stories": "S", "maths": "M", "code": "C"},
)


def test_experts_take_the_names_that_their_hashes_have_here() -> None:
    recipe = Recipe(models=OLD, coefficients={"m": 0.3, "s": {"*": 0.5, "block.0": 0.1}}, densities={"m": 0.2})
    mine = renamed(recipe, NEW)
    assert mine.models == NEW
    assert mine.coefficients == {"code": 0.0, "maths": 0.3, "stories": {"*": 0.5, "block.0": 0.1}}
    assert mine.densities == {"maths": 0.2}


def test_what_does_not_match_is_refused_with_its_reason() -> None:
    recipe = Recipe(models=OLD)
    with pytest.raises(StudyFileError, match="another base"):
        renamed(recipe, NEW.model_copy(update={"hashes": {**NEW.hashes, "base": "X"}}))
    without = NEW.model_copy(update={"experts": {"maths": "m2"}, "hashes": {"base": "B", "maths": "M"}})
    with pytest.raises(StudyFileError, match=r"expert\(s\) s are not in this study"):
        renamed(recipe, without)
    assert renamed(Recipe(models=OLD, coefficients={"s": 0.0}), without).coefficients == {}
    with pytest.raises(StudyFileError, match="in a map"):
        renamed(Recipe(models=OLD, maps={"m": "0" * 64}), NEW)


class OneNumber:
    """A space that holds recipes of one coefficient for all three experts but the absent one."""

    def encode(self, recipe: Recipe) -> dict[str, Any] | None:
        found = {v for e, v in recipe.coefficients.items() if e != "code"}
        return {"c": found.pop()} if len(found) == 1 else None


@pytest.fixture
def file(tmp_path: Path) -> StudyFile:
    path = tmp_path / "study.yaml"
    path.write_text(
        "study: {name: new}\nmodels: {base: b, experts: {m: m}}\nevaluate: [{evaluator: x}]\n"
        "search: {learn_from: [{study: old, storage: 'sqlite:///old.db', best: 2}, "
        "{study: none, storage: 'sqlite:///old.db'}, gone.yaml]}\n"
    )
    study = optuna.create_study(
        study_name="old", storage=open_storage(f"sqlite:///{tmp_path / 'old.db'}"), direction="maximize"
    )
    store_metrics(study, [MetricInfo("t", "acc", True, {Split.SEARCH: 10})])
    objective = {"maximise": ["t"], "minimise": [], "constraints": []}
    study.set_user_attr("identity", {"objective": objective, "models": OLD.hashes})
    rows = [("average", 0.9, {"m": 0.9, "s": 0.9}), ("", 0.5, {"m": 0.1, "s": 0.1}), ("", 0.8, {"m": 0.1, "s": 0.2})]
    rows += [("", 0.7, {"m": 0.4, "s": 0.4}), ("", 0.6, {"m": 0.4, "s": 0.4}), ("", 0.55, {"m": 0.2, "s": 0.2})]
    for label, value, coefficients in rows:
        trial = study.ask()
        if label:
            trial.set_user_attr("label", label)
        trial.set_user_attr("recipe", Recipe(models=OLD, coefficients=dict(coefficients)).to_json())
        trial.set_user_attr("outcome", "ok")
        study.tell(trial, value)
    return read_study_file(path)


def test_the_best_that_the_space_holds_are_taken_and_the_rest_is_said(file: StudyFile) -> None:
    notes: list[str] = []
    found = dict(starts_from(file, NEW, OneNumber(), [], notes.append))  # type: ignore[arg-type]
    place = "old in sqlite:///old.db"
    assert [(k.source, k.point) for k in found[place]] == [
        (f"{place} trial 3", {"c": 0.4}),
        (f"{place} trial 5", {"c": 0.2}),
    ]
    text = "\n".join(notes)
    assert "2 recipe(s) of study 'old'" in text
    assert "has no study 'none'" in text
    assert "gone.yaml" in text
    assert not dict(starts_from(file, NEW, OneNumber(), [place], notes.append))  # type: ignore[arg-type]


def test_recipes_of_another_seed_and_dtype_are_taken_with_this_studys(file: StudyFile) -> None:
    class Picky(OneNumber):
        def encode(self, recipe: Recipe) -> dict[str, Any] | None:
            assert (recipe.seed, recipe.dtype) == (7, "float32")
            return super().encode(recipe)

    models = file.models.model_copy(update={"dtype": "float32"})
    new = file.model_copy(update={"study": file.study.model_copy(update={"seed": 7}), "models": models})
    found = dict(starts_from(new, NEW, Picky(), [], print))  # type: ignore[arg-type]
    assert len(found["old in sqlite:///old.db"]) == 2


def test_two_earlier_studies_of_one_name_are_two(file: StudyFile) -> None:
    entries = [{"study": "old", "storage": f"sqlite:///{path}", "best": 1} for path in ("old.db", "./old.db")]
    search = Search.model_validate({"learn_from": entries})
    both = file.model_copy(update={"search": search})
    found = dict(starts_from(both, NEW, OneNumber(), [], print))  # type: ignore[arg-type]
    assert len({k.source for points in found.values() for k in points}) == 2


def test_studies_that_are_not_there_are_told_apart_without_writing_anything(file: StudyFile) -> None:
    (file.folder / "notes.db").write_text("no database at all, but a text that is long enough for a header " * 20)
    (file.folder / "old.yaml").write_text(
        "study: {name: olt, storage: 'sqlite:///old.db'}\nmodels: {base: b, experts: {m: m}}\n"
        "evaluate: [{evaluator: x}]\n"
    )
    before = (file.folder / "old.db").read_bytes()
    entries: list[Any] = [
        {"study": "old", "storage": "sqlite:///old.db"},
        {"study": "old", "storage": "postgresql+psycopg://nobody@nowhere/db"},
        {"study": "od", "storage": "sqlite:///old.db"},
        {"study": "old", "storage": "sqlite:///gone.db"},
        {"study": "old", "storage": "sqlite:///notes.db"},
        {"study": "new", "storage": "sqlite:///new.db"},
        "gone.yaml",
        "old.yaml",
    ]
    found = earlier_problems(file.model_copy(update={"search": Search.model_validate({"learn_from": entries})}))
    wanted = {
        2: "has no study 'od'; did you mean 'old'?",
        3: f"there is no database {file.folder / 'gone.db'}",
        4: "notes.db cannot be read as the storage of a study",
        5: "'new' is this study itself",
        6: "no such file",
        7: "has no study 'olt'; did you mean 'old'?",
    }
    assert len(found) == len(wanted)
    for problem, (i, text) in zip(found, wanted.items(), strict=True):
        assert problem.startswith(f"search.learn_from.{i}: ")
        assert text in problem
    assert (file.folder / "old.db").read_bytes() == before
    assert {p.name for p in file.folder.glob("*.db")} == {"old.db", "notes.db"}


def test_baselines_do_not_travel(file: StudyFile) -> None:
    study = optuna.load_study(study_name="old", storage=f"sqlite:///{file.folder / 'old.db'}")
    assert [number for number, _ in best_recipes(study)] == [2, 3, 4, 5, 1]


@pytest.mark.parametrize(
    "entry", ["{study: a}", "{storage: b}", "{file: a, study: b}", "{file: a, study: b, storage: c}", "{}"]
)
def test_an_earlier_study_is_named_in_one_way(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        f"study: {{name: n}}\nmodels: {{base: b, experts: {{m: m}}}}\nevaluate: [{{evaluator: x}}]\n"
        f"search: {{learn_from: [{entry}]}}\n"
    )
    with pytest.raises(StudyFileError, match="name either a study file"):
        read_study_file(path)
