"""Built-in classes and a user's own come through one door, which checks them and completes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_encoder
import yaml
from small_spaces import CONTEXT, GENOME

from merge_search import catalogue
from merge_search.errors import InputError, StudyFileError
from merge_search.evaluation import Evaluator, SplitShares, Teachable
from merge_search.search.prepare import prepare
from merge_search.space import SearchSpace
from merge_search.study_file import read_study_file

EVALUATOR = """
from merge_search.evaluation import Counting, Teachable


class Plain:
    def __init__(self, options, *, shares, seed):
        if options.get("fail"):
            raise KeyError("nothing of that name")
        self.options = options

    def metrics(self): ...
    def fingerprint(self): ...
    def bind(self, model, tokenizer, *, folder): ...
    def evaluate(self, split, fidelity=1.0, *, after=0.0): ...


class WithFolder(Plain):
    def __init__(self, options, *, shares, seed, folder):
        super().__init__(options, shares=shares, seed=seed)
        self.folder = folder


class Slots:
    __slots__ = ()
    def __init__(self, options, *, shares, seed): ...
    metrics = fingerprint = bind = evaluate = None


class Taught(Plain):
    def fit_tasks(self): ...
    def losses(self, task): ...
    def predict(self, task, rows): ...
    def set_pseudo_labels(self, task, labels): ...
    def loss(self, task, rows, kind="gold"): ...
    def remember(self, task, rows): return "remembered"
    def questions_to_remember(self, task): return 3


class Inherits(Teachable, Counting):
    n_asked = 4
    __init__ = Plain.__init__
    metrics, fingerprint, bind, evaluate = Plain.metrics, Plain.fingerprint, Plain.bind, Plain.evaluate
    remember, questions_to_remember = Taught.remember, Taught.questions_to_remember


class Half:
    def metrics(self): ...
    def bind(self, model, tokenizer, *, folder): ...


def build(options, *, shares, seed):
    return Plain(options, shares=shares, seed=seed)
"""

SPACE = """
from merge_search.space import Float, SearchSpace


class Plain:
    def __init__(self, options, context):
        self.parameters = {"strength": Float(0.0, 1.0)}
        self.options = options

    def decode(self, point): ...
    def encode(self, recipe): ...
    def initial_points(self): return []


class Inherits(SearchSpace):
    def __init__(self, options, context, *, folder):
        self.parameters = {"strength": Float(0.0, 1.0)}
        self.options, self.folder = options, folder

    def decode(self, point): ...
    def encode(self, recipe): ...
    def initial_points(self): return []


class Unfinished(Plain):
    def __init__(self, options, context): ...
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(EVALUATOR)
    (tmp_path / "own.py").write_text(SPACE)
    return tmp_path


def evaluator(folder: Path, kind: str, **options: Any) -> Any:
    name = kind if ".py" in kind or kind in catalogue.names("evaluators") else f"mine.py:{kind}"
    return catalogue.build_evaluator(name, options, shares=SplitShares(), seed=0, folder=folder)


def space(folder: Path, kind: str, **options: Any) -> Any:
    return catalogue.build_space(f"own.py:{kind}", options, CONTEXT, folder=folder)


@pytest.mark.parametrize("kind", ["search_spaces", "evaluators"])
def test_every_row_of_a_catalogue_names_a_class(kind: str) -> None:
    table = catalogue.names(kind)
    assert table
    for name in table:
        assert isinstance(catalogue.load(kind, name), type), name


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(InputError, match=r"no search space is called 'compatability'; did you mean 'compatibility'\?"):
        catalogue.load("search_spaces", "compatability")


def test_a_users_own_file_is_loaded_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(EVALUATOR)
    assert catalogue.load("evaluators", "mine.py:Plain", folder=tmp_path).__name__ == "Plain"
    with pytest.raises(InputError, match="has no class 'Yours'"):
        catalogue.load("evaluators", "mine.py:Yours", folder=tmp_path)
    with pytest.raises(InputError, match="no file"):
        catalogue.load("evaluators", "none.py:Plain", folder=tmp_path)


@pytest.mark.parametrize("kind", ["Plain", "WithFolder", "build"])
def test_a_class_that_does_not_inherit_gets_the_defaults_and_absolute_paths(folder: Path, kind: str) -> None:
    built = evaluator(folder, kind, include_path="data", limit=3)
    assert built.n_asked == 0
    assert built.options == {"include_path": [str(folder / "data")], "limit": 3}
    several = evaluator(folder, kind, include_path=["data", "/elsewhere"])
    assert several.options["include_path"] == [str(folder / "data"), "/elsewhere"]
    assert evaluator(folder, kind, include_path=[1]).options == {"include_path": [1]}
    assert getattr(built, "folder", folder) == folder


def test_a_space_that_does_not_inherit_gets_the_defaults_and_an_absolute_file(folder: Path) -> None:
    built = space(folder, "Plain", file="genome.yaml")
    assert isinstance(built, SearchSpace)
    assert built.notes == ()
    assert built.exact_form(None) is None
    assert built.options == {"file": str(folder / "genome.yaml")}


def test_a_class_that_inherits_resolves_its_own_paths(folder: Path) -> None:
    built = space(folder, "Inherits", file="genome.yaml")
    assert (built.options, built.folder, built.notes) == ({"file": "genome.yaml"}, folder, ())


@pytest.mark.parametrize("kind", ["Taught", "Inherits"])
def test_an_evaluator_may_keep_the_earlier_names_of_its_teachers_methods(folder: Path, kind: str) -> None:
    built = evaluator(folder, kind)
    assert isinstance(built, Teachable)
    assert built.cache_teacher("task", [0]) == "remembered"
    assert built.teacher_questions("task") == 3


def test_what_a_class_lacks_is_named_with_its_file(folder: Path) -> None:
    with pytest.raises(
        InputError, match=rf"Half in {folder}/mine.py lacks evaluate, fingerprint; .*Evaluator says what"
    ):
        catalogue.load("evaluators", "mine.py:Half", folder=folder)
    with pytest.raises(InputError, match=rf"Unfinished in {folder}/own.py lacks parameters; .*SearchSpace says what"):
        space(folder, "Unfinished")
    with pytest.raises(
        InputError, match=r"Slots must have the attribute 'n_asked': inherit from .*Evaluator or add it"
    ):
        evaluator(folder, "Slots")


def test_a_users_file_or_constructor_that_fails_is_a_sentence_with_the_line(folder: Path) -> None:
    with pytest.raises(InputError, match=r"mine.py:Plain' cannot be built: KeyError: .*mine.py, line 8\)"):
        evaluator(folder, "Plain", fail=True)
    (folder / "broken.py").write_text("import math\nmath.no_such_function()\n")
    with pytest.raises(InputError, match=r"broken.py cannot be run: AttributeError: .*broken.py, line 2\)"):
        catalogue.load("evaluators", "broken.py:Mine", folder=folder)
    (folder / "wrong.py").write_text("class Mine(:\n")
    with pytest.raises(InputError, match=r"wrong.py cannot be run: SyntaxError: .*wrong.py, line 1\)"):
        catalogue.load("evaluators", "wrong.py:Mine", folder=folder)


@pytest.mark.parametrize("kind", ["search_spaces", "evaluators"])
def test_every_built_in_class_inherits_the_contract_and_takes_a_folder(kind: str) -> None:
    import inspect

    contract = {"search_spaces": SearchSpace, "evaluators": Evaluator}[kind]
    for name in catalogue.names(kind):
        found = catalogue.load(kind, name)
        assert contract in found.__mro__, name
        assert "folder" in inspect.signature(found).parameters, name


def test_built_in_plug_ins_resolve_paths_against_the_study_files_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    tiny_encoder.write_two_tasks(tmp_path / "data")
    options = {**tiny_encoder.options(tmp_path / "data"), "include_path": "data"}
    assert len(evaluator(tmp_path, "classification", **options).metrics()) == 4
    genome = {"genome": {**GENOME, "merge_method": "task_arithmetic"}}
    (tmp_path / "data" / "evolve.yaml").write_text(yaml.safe_dump(genome))
    options = {"file": "data/evolve.yaml"}
    assert catalogue.build_space("mergekit_genome", options, CONTEXT, folder=tmp_path).parameters
    (tmp_path / "a.txt").write_text("\n".join(f"a text of number {i}" for i in range(40)))
    assert evaluator(tmp_path, "drift", texts="a.txt").metrics()
    assert evaluator(tmp_path, "latency", texts="../a.txt", include_path="data").metrics()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1, "evaluate.0: include_path: input should be a valid list, got 1"),
        ([1], "evaluate.0: include_path.0: input should be a valid string, got 1"),
    ],
)
@pytest.mark.parametrize("name", ["classification", "drift", "latency"])
def test_a_path_that_is_no_path_is_a_sentence(demo: Path, tmp_path: Path, name: str, value: Any, message: str) -> None:
    data = {
        "study": {"name": "s"},
        "models": {"base": str(demo / "models" / "base"), "experts": {"maths": str(demo / "models" / "maths")}},
        "evaluate": [{"evaluator": name, "texts": "a.txt", "include_path": value}],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(StudyFileError) as caught:
        prepare(read_study_file(tmp_path / "study.yaml"))
    assert message in caught.value.problems
