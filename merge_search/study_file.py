"""The study file: a YAML text that says what to merge, how to judge and how long to search.

    study:   {name: skills, storage: sqlite:///skills.db, seed: 0}
    models:
      base: path-or-hub-id
      experts: {maths: path, stories: path}
    space:   {type: compatibility, coefficients: {per: block, bounds: [0, 1.5]}}
    evaluate:
      - {evaluator: lm_eval, tasks: [a, b], include_path: tasks/, batch_size: 32}
    splits:  {search: 0.6, validation: 0.2, test: 0.2}
    objective: {maximise: mean_retention}
    search:  {sampler: botorch, n_trials: 40}
    rules:   [my_rules.py]
    device:  auto

Relative paths (models, evaluators' files, SQLite files) are relative to the study file. All problems are reported at
once, each with its line.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from merge_search.errors import StudyFileError, sentences

__all__ = ["BaselineFit", "StudyFile", "read_study_file"]


class _Section(BaseModel):
    """A section whose keys are all known here."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Open(BaseModel):
    """A section whose other keys belong to a plug-in."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the plug-in, as a copy."""
        return copy.deepcopy(self.model_extra or {})


class Study(_Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    storage: str = ""
    seed: int = 0

    @property
    def url(self) -> str:
        """The storage URL, by default a SQLite file with the study's name."""
        return self.storage or f"sqlite:///{self.name}.db"


class ModelsSection(_Section):
    base: str
    experts: Annotated[dict[str, str], Field(min_length=1)]
    dtype: Literal["float32", "float16", "bfloat16"] | None = None

    @field_validator("experts")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name or not all(c.isalnum() or c in "_-" for c in name) or name == "base":
                raise ValueError(f"an expert's name must be letters, digits, '_' and '-' and not 'base', got {name!r}")
        return value


class Space(_Open):
    type: str = "compatibility"


class Evaluate(_Open):
    evaluator: str


class Splits(_Section):
    search: Annotated[float, Field(gt=0, lt=1)] = 0.6
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    fit: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The part of the search share on which a learner fits, for tasks without a training split of their own."""

    @model_validator(mode="after")
    def _sum(self) -> Splits:
        if abs(self.search + self.validation + self.test - 1) > 1e-9:
            raise ValueError(f"shares must sum to 1, got {self.search + self.validation + self.test:g}")
        if self.fit >= self.search:
            raise ValueError(
                f"fit is a part of search and must be smaller, got fit={self.fit:g}, search={self.search:g}"
            )
        return self


class ObjectiveSection(_Section):
    maximise: list[str] = []
    minimise: list[str] = []
    constraints: list[str] = []
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Weights of tasks in `mean` and `mean_retention`; 1 for tasks that are not named."""
    lead: Annotated[float, Field(ge=0)] = 2.0
    """Standard errors by which an expert must beat the base for a task to count in retention."""
    guard: Annotated[float, Field(ge=0)] | None = None
    """Largest loss against the base that a task without such a lead may have; None: any."""

    @field_validator("maximise", "minimise", "constraints", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def settings(self) -> dict[str, Any]:
        """The section as a study's identity has it.

        Keys whose value is what studies did before the key existed are left out, so that those keep their identity.
        """
        former: dict[str, Any] = {"weights": {}, "lead": 0.0, "guard": None}
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in former or v != former[k]}


class Racing(_Section):
    """Candidates are compared with the incumbent after shares of the questions and stopped if clearly worse."""

    looks: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = [0.25, 0.5]
    """The shares, ascending."""
    error: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Probability of stopping a candidate that is no worse than the incumbent."""

    @field_validator("looks")
    @classmethod
    def _ascending(cls, value: list[float]) -> list[float]:
        if sorted(set(value)) != value:
            raise ValueError(f"looks must ascend, got {value}")
        return value


class Learner(_Section):
    """How a trial may fit its coefficients by gradient. The search chooses among the entries of a list."""

    steps: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0, 50, 100, 200]
    """Numbers of Adam steps; 0 fits nothing. All are tried first, ascending; with a budget in questions only the
    largest."""
    per: Annotated[list[str], Field(min_length=1)] = ["block", "tensor", "row"]
    step_size: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.03, 0.3)
    """Bounds, searched on a logarithmic scale, or one fixed number. The first trials take the geometric mean."""
    batch_rows: Annotated[int, Field(ge=1)] = 16
    loss: Annotated[list[str], Field(min_length=1)] = ["auto"]
    """Losses of the evaluators (`evaluation.Differentiable`), ``auto`` (`evaluation.kind_of`), or ``block_output``."""
    normalise: bool = False
    pull: Annotated[float, Field(ge=0)] = 0.0
    average: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the steps, the last ones, whose coefficients are averaged. Small batches make the very last ones
    noisy."""
    warm_start: bool = True

    @field_validator("steps", "per", "loss", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str | int) else value

    @field_validator("step_size", mode="before")
    @classmethod
    def _as_bounds(cls, value: object) -> object:
        return (value, value) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _sensible(self) -> Learner:
        if max(self.steps) == 0:
            raise ValueError("steps must allow more than 0, or leave the learner out")
        if self.step_size[0] > self.step_size[1]:
            raise ValueError(f"step_size must be [low, high] with low <= high, got {list(self.step_size)}")
        return self


class BaselineOptions(_Section):
    """What may be set of a baseline that is not fitted."""

    coefficient: float | None = None
    """Coefficient of every expert; None: the preset's."""


class BaselineFit(_Section):
    """How the coefficients of a baseline that is fitted are found. The defaults are AdaMerging's (arXiv 2310.02575)."""

    per: str = "expert"
    loss: str = "entropy"
    start: float | None = None
    """Coefficient of every expert at which the fit begins; None: the preset's."""
    clamp: tuple[float, float] | None = (0.0, 1.0)
    """Bounds onto which coefficients are moved back after each step."""
    steps: Annotated[int, Field(ge=1)] = 500
    step_size: Annotated[float, Field(gt=0)] = 1e-3
    batch_rows: Annotated[int, Field(ge=1)] = 16
    average: Annotated[float, Field(ge=0, le=1)] = 0.0
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """Kept share of each delta; None: the preset's."""

    @model_validator(mode="after")
    def _sensible(self) -> BaselineFit:
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            raise ValueError(f"clamp must be [low, high] with low < high, got {list(self.clamp)}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The `FitSettings` fields."""
        return self.model_dump(mode="json", exclude={"start", "density"})


class Stop(_Section):
    """The search ends early if its suggestions promise less than the noise (`search.stopping` has the formula)."""

    patience: Annotated[int, Field(ge=1)] = 8
    """Number of suggestions in a row that must promise too little."""
    share: Annotated[float, Field(gt=0)] = 0.2
    """A suggestion promises too little if its expected gain is below this share of the best trial's standard error."""


class Earlier(_Section):
    """A study whose best recipes are tried first, given as a study file or as a study's name and its storage."""

    file: str = ""
    study: str = ""
    storage: str = ""
    best: Annotated[int, Field(ge=1)] = 3
    """Number of its recipes to try."""

    @property
    def place(self) -> str:
        """A text that identifies the study among others, also of the same name, and is the same on every machine."""
        return self.file or f"{self.study} in {self.storage}"

    @model_validator(mode="before")
    @classmethod
    def _as_file(cls, value: object) -> object:
        return {"file": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_way(self) -> Earlier:
        if bool(self.file) == bool(self.study and self.storage) or bool(self.study) != bool(self.storage):
            raise ValueError("name either a study file (file: old.yaml) or study: NAME with storage: URL")
        return self


class Search(_Section):
    sampler: str = "botorch"
    sampler_options: dict[str, Any] = {}
    n_trials: Annotated[int, Field(ge=1)] = 40
    """Number of trials over all runs of the study. `hours` and `questions` count over all runs, too. The first limit
    that is reached ends the search."""
    hours: Annotated[float, Field(gt=0)] | None = None
    questions: Annotated[int, Field(ge=1)] | None = None
    racing: Racing | None = None
    learner: Learner | None = None
    stop: Stop | None = None
    learn_from: list[Earlier] = []
    """Studies on the same base whose best recipes are queued after the baselines."""
    fidelity: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the search questions that every trial is asked. None: all, or with a budget in `questions` so many that
    base, experts and baselines ask at most a third of it (`budget.planned_fidelity`)."""
    finalists: Annotated[int, Field(ge=1)] = 3
    """Number of the best trials that are scored on the validation questions."""
    baselines: list[str | dict[str, dict[str, Any]]] | None = None
    """Published presets to try first, ``NAME`` or ``{NAME: {option: value}}``. None: those of the space."""


class StatisticsSection(_Section):
    """Limits of the statistics that measures and operators need from data."""

    n_rows: Annotated[int, Field(ge=1)] = 64
    """Number of fit rows per task."""
    max_gib: Annotated[float, Field(gt=0)] = 32.0
    """Disk space for the measured files. Those unused for the longest time are removed first."""


class StudyFile(_Section):
    """A parsed study file, with the `path` that it was read from."""

    study: Study
    models: ModelsSection
    space: Space = Space()
    evaluate: Annotated[list[Evaluate], Field(min_length=1)]
    splits: Splits = Splits()
    objective: ObjectiveSection = ObjectiveSection(maximise=["mean_retention"])
    search: Search = Search()
    statistics: StatisticsSection = StatisticsSection()
    rules: list[str] = []
    """Python files whose decorated functions are rules of this study (`merge_search.rules`)."""
    device: str = "auto"
    path: Annotated[Path, Field(exclude=True)] = Path("study.yaml")

    @field_validator("rules", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        return self.path.parent

    @property
    def rule_files(self) -> list[Path]:
        """Absolute paths of `rules`."""
        return [(self.folder / Path(text).expanduser()).resolve() for text in self.rules]

    def model_reference(self, text: str) -> str:
        """The absolute path of a model's folder, or the text as it is if it is a hub id."""
        folder = (self.folder / Path(text).expanduser()).resolve()
        return str(folder) if folder.exists() or text.startswith((".", "/", "~")) else text

    @property
    def storage_url(self) -> str:
        """The storage URL with a relative SQLite path made absolute."""
        return self.absolute_url(self.study.url)

    def absolute_url(self, url: str) -> str:
        """A storage URL whose relative SQLite path, relative to the study file, is made absolute."""
        prefix = "sqlite:///"
        if url.startswith(prefix) and not url.startswith(prefix + "/"):
            return prefix + str((self.folder / url.removeprefix(prefix)).resolve())
        return url


def read_study_file(path: str | Path) -> StudyFile:
    """Read a study file and check its form. `prepare` checks its models, tasks and metrics.

    Raises:
        StudyFileError: It lists every problem with its line and the nearest known key.
    """
    path = Path(path).expanduser().absolute()
    where = path.name
    if not path.is_file():
        raise StudyFileError(f"no such file: {path}", where=where)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyFileError(f"not YAML: {error}", where=where) from None
    if not isinstance(data, dict) or node is None:
        raise StudyFileError("must be a mapping with the keys study, models, evaluate, ...", where=where)
    lines = dict(_lines(node))
    problems = [f"line {line}: key {'.'.join(map(str, loc))!r} stands twice" for loc, line in _duplicates(node)]
    try:
        file = StudyFile.model_validate({**data, "path": path})
    except ValidationError as error:
        problems += sentences(error, StudyFile, at=lambda place: _with_line(place, lines))
    if problems:
        raise StudyFileError(problems, where=where)
    return file


def _lines(node: yaml.Node, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """The line of every place in the file. A mapping's key comes after its value, so its line counts."""
    yield at, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            yield from _lines(value, here)
            yield here, key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _lines(value, (*at, i))


def _duplicates(node: yaml.Node, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """Place and line of every key that stands twice in its mapping."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield (*at, key.value), key.start_mark.line + 1
            seen.add(key.value)
            yield from _duplicates(value, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _duplicates(value, (*at, i))


def _with_line(place: tuple[str | int, ...], lines: Mapping[tuple[str | int, ...], int]) -> str:
    """A place in words, with the line of the nearest place that the file has."""
    known_at = next((place[:n] for n in range(len(place), -1, -1) if place[:n] in lines), ())
    return f"line {lines.get(known_at, 1)}: {'.'.join(map(str, place)) or 'study file'}"
