"""Options of the evaluator `lm_eval` in a study file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from merge_search.errors import StudyFileError
from merge_search.options import PathList, absolute, read_options

__all__ = ["LmEvalOptions"]

_Words = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class LmEvalOptions(BaseModel):
    """An entry ``evaluator: lm_eval``.

    Attributes:
        tasks: Names of tasks, groups or tags, or paths of task files.
        groups: ``one``: a group or tag counts as one task, by lm-eval's aggregation (see `groups`). ``each``: it stands
            for its tasks, which count one by one.
        include_path: Folders searched for task files before lm-eval's own.
        batch_size: Rows of one forward pass. It must be a number, because it changes float32 results by about 1e-5.
        num_fewshot: Number of shots. A task that sets 0 itself keeps it, as in lm-eval.
        limit: Most documents of a task in all splits together, chosen by hash.
        metrics: The main metric of a task or group by its name: ``metric`` or ``metric,filter``.
        apply_chat_template: Whether prompts are rendered with the tokenizer's chat template.
        system_instruction: Text in front of every prompt.
        max_length: Most tokens of a prompt with its answer; None: the model's own limit.
        softmax_dtype: ``float32`` prevents ties between choices of a half-precision model.
        tree_packing: Whether to score the choices of a question in one row where that gives the same numbers.
        fit: The source of the rows to fit on. ``train``: the task's own training split. ``search``: the fit share of
            the questions. ``auto``: the training split where the task has one, else the fit share. With a training
            split the fit share is scored.
        fit_limit: Most rows of a task to fit on, chosen by hash.
        confirm_run_unsafe_code: Whether tasks may execute code that the model wrote.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: _Words
    groups: Literal["one", "each"] = "one"
    include_path: PathList = []
    batch_size: Annotated[int, Field(ge=1, strict=True)] = 16
    num_fewshot: Annotated[int, Field(ge=0, strict=True)] | None = None
    limit: Annotated[int, Field(ge=2, strict=True)] | None = None
    metrics: dict[str, str] = {}
    apply_chat_template: bool = False
    system_instruction: str | None = None
    max_length: Annotated[int, Field(ge=2, strict=True)] | None = None
    softmax_dtype: Literal["float32"] | None = None
    tree_packing: bool = True
    fit: Literal["auto", "train", "search"] = "auto"
    fit_limit: Annotated[int, Field(ge=1, strict=True)] = 4000
    confirm_run_unsafe_code: bool = False

    @field_validator("tasks", mode="before")
    @classmethod
    def _one_task(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _no_auto(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith("auto"):
            raise ValueError(f"must be a number, got {value!r}: lm-eval would measure it anew for every candidate")
        return value

    @classmethod
    def parse(cls, options: Mapping[str, Any], folder: Path | None = None) -> LmEvalOptions:
        """Check `options` and make the folders of ``include_path`` absolute.

        Args:
            options: As they stand in the study file.
            folder: The folder that relative paths are relative to; None: the current directory.

        Raises:
            StudyFileError: Every problem, with the nearest known option for each unknown one.
        """
        parsed = read_options(cls, options)
        searched = [absolute(path, folder) for path in parsed.include_path]
        missing = [f"include_path: no folder {path}" for path in searched if not path.is_dir()]
        if missing:
            raise StudyFileError(missing)
        return parsed.model_copy(update={"include_path": [str(path) for path in searched]})
