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


_ALIASES = ("max_new_tokens", "max_tokens", "max_completion_tokens")
"""lm-eval's other names of ``max_gen_toks``. A task's own ``max_gen_toks`` would win over them without a word."""


class _Prompting(BaseModel):
    """How prompts are rendered and answers generated; see `LmEvalOptions`. None: not set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    apply_chat_template: bool | None = None
    enable_thinking: bool | None = None
    think_end_token: Annotated[int, Field(ge=0, strict=True)] | Annotated[str, Field(min_length=1)] | None = None
    chat_template_args: dict[str, Any] = {}
    gen_kwargs: dict[str, Any] = {}

    @field_validator("gen_kwargs")
    @classmethod
    def _known_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        if alias := next((name for name in _ALIASES if name in value), None):
            raise ValueError(f"write max_gen_toks in place of {alias!r}")
        most, until = value.get("max_gen_toks", 1), value.get("until", [])
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ValueError(f"max_gen_toks must be a whole number of at least 1, got {most!r}")
        if not isinstance(until, str) and not (isinstance(until, list) and all(isinstance(u, str) for u in until)):
            raise ValueError(f"until must be a text or a list of texts, got {until!r}")
        return value

    def problems(self) -> list[str]:
        """What cannot work, each beginning with the key."""
        if self.apply_chat_template:
            if self.enable_thinking and self.think_end_token is None:
                return ["enable_thinking: true needs think_end_token, the token that ends the thoughts (like </think>)"]
            return []
        unread = {"enable_thinking": self.enable_thinking is not None, "chat_template_args": self.chat_template_args}
        why = "needs apply_chat_template: true, since only a chat template reads it"
        return [f"{key} {why}" for key, is_set in unread.items() if is_set]

    @property
    def template_args(self) -> dict[str, Any]:
        """What the chat template is called with besides the messages, as in lm-eval."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**self.chat_template_args, **thinking}

    @property
    def thinking(self) -> dict[str, Any]:
        """What is set of the template's arguments and of `think_end`; empty if nothing is."""
        said = {"template": self.template_args, "end": self.think_end}
        return {key: value for key, value in said.items() if value not in (None, {})}

    @property
    def think_end(self) -> str | int | None:
        """The token that ends the thoughts. As in lm-eval, digits are a token's number."""
        token = self.think_end_token
        return int(token) if isinstance(token, str) and token.isdigit() else token


class _TaskOptions(_Prompting):
    """Options of a single task; see `LmEvalOptions`."""

    target: Annotated[str, Field(min_length=1)] | None = None


class LmEvalOptions(_Prompting):
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
        enable_thinking: Passed to the chat template; None: not passed. With true, tasks that generate only.
        think_end_token: The token that ends the thoughts, as text or number. Only what follows it is the answer.
        chat_template_args: Passed to the chat template, too.
        gen_kwargs: Replaces settings in the ``generation_kwargs`` of tasks that generate: ``max_gen_toks`` (most tokens
            of an answer), ``until`` (stop strings), ``do_sample``, ``temperature`` and so on.
        task_options: These five options for single tasks, by name. ``gen_kwargs`` and ``chat_template_args`` add to the
            evaluator's, the others replace them. ``target`` names the field, or is a template over the fields, of the
            text that the loss ``gold`` learns in place of the task's own target. Scores do not change.
        system_instruction: Text in front of every prompt.
        max_length: Most tokens of a prompt with its answer; None: the model's own limit.
        softmax_dtype: ``float32`` prevents ties between choices of a half-precision model.
        tree_packing: Whether to score the choices of a question in one row where that gives the same numbers.
        fit: The source of the rows to fit on. ``train``: the task's own training split. ``search``: the fit share of
            the questions. ``auto``: the training split where the task has one, else the fit share. With a training
            split the fit share is scored. ``test_inputs``: the test questions without their right answers, as in
            test-time adaptation (AdaMerging): for losses without labels only, and the sealed test is then the score of
            a model that has seen its inputs.
        fit_limit: Most rows of a task to fit on, chosen by hash.
        confirm_run_unsafe_code: Whether tasks may execute code that the model wrote.
    """

    tasks: _Words
    groups: Literal["one", "each"] = "one"
    include_path: PathList = []
    batch_size: Annotated[int, Field(ge=1, strict=True)] = 16
    num_fewshot: Annotated[int, Field(ge=0, strict=True)] | None = None
    limit: Annotated[int, Field(ge=2, strict=True)] | None = None
    metrics: dict[str, str] = {}
    apply_chat_template: bool = False
    task_options: dict[str, _TaskOptions] = {}
    system_instruction: str | None = None
    max_length: Annotated[int, Field(ge=2, strict=True)] | None = None
    softmax_dtype: Literal["float32"] | None = None
    tree_packing: bool = True
    fit: Literal["auto", "train", "search", "test_inputs"] = "auto"
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

    def for_task(self, name: str) -> LmEvalOptions:
        """The options with those of this task in their place."""
        own = self.task_options.get(name)
        if own is None:
            return self
        given = {key: getattr(own, key) for key in own.model_fields_set - {"target"}}
        for key in {"gen_kwargs", "chat_template_args"} & given.keys():
            given[key] = {**getattr(self, key), **given[key]}
        return self.model_copy(update=given)

    def target_of(self, name: str) -> str | None:
        """The text that the loss ``gold`` of this task learns; None: the task's own target."""
        own = self.task_options.get(name)
        return None if own is None else own.target

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
        problems = missing + parsed.problems()
        for task in parsed.task_options:
            problems += [f"task_options.{task}.{text}" for text in parsed.for_task(task).problems()]
        if problems:
            raise StudyFileError(problems)
        return parsed.model_copy(update={"include_path": [str(path) for path in searched]})
