"""The undocumented parts of lm-eval 0.4.13 that this package uses. Importing this file loads no torch.

`tests/library_internals/test_lm_eval.py` fails when lm-eval moves or changes one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lm_eval.api import task as task_module
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

__all__ = [
    "AnswerHook",
    "data_of",
    "decoding",
    "filters_of",
    "first_logits",
    "has_several_answers",
    "is_group",
    "is_multimodal",
    "is_tag",
    "log_likelihoods",
    "no_progress_bars",
    "prompts_are_choices",
    "read_task_file",
    "rendering_with",
    "report_answer",
    "runs_answers_as_code",
    "sampling_shots",
    "set_answer_hook",
    "set_batch_size",
    "task_files",
    "task_manager",
    "thinking_until",
    "tokenised",
    "watching_ends",
]


class AnswerHook(Protocol):
    """A listener that lm-eval's model calls with every request as soon as its batch is answered; by default a cache."""

    def add_partial(self, kind: str, request: Any, answer: Any) -> None: ...


# --- Task files ---


def task_files(folder: Path) -> Iterator[Path]:
    """The task files in a folder, in lm-eval's order."""
    yield from TaskIndex._iter_yaml_files(folder)


def read_task_file(path: str | Path, *, recursive: bool = True) -> dict[str, Any]:
    """The content of a task file, its Python functions unresolved; with `recursive`, with what it includes."""
    content: dict[str, Any] = load_yaml(path, resolve_func=False, recursive=recursive)
    return content


def is_group(entry: Any) -> bool:
    """Whether an entry of a task index is a group of tasks."""
    return bool(entry.kind is Kind.GROUP)


def is_tag(entry: Any) -> bool:
    """Whether an entry of a task index is a tag, the common name of several tasks."""
    return bool(entry.kind is Kind.TAG)


def task_manager(
    folders: Sequence[str], *, defaults: bool, change: Callable[[Path, dict[str, Any]], dict[str, Any]]
) -> Any:
    """lm-eval's task manager with a changed reading of task files.

    Args:
        folders: Folders with task files.
        defaults: Whether lm-eval's own tasks are indexed, too.
        change: Called with the path and the whole content of each task file before the task is made. Returns the
            content to use.
    """
    manager = TaskManager(include_path=list(folders) or None, include_defaults=defaults)
    factory = manager._factory
    original = factory._load_full_config

    def load_full_config(entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = original(entry, overrides)
        return config if entry.yaml_path is None else change(Path(entry.yaml_path), config)

    factory._load_full_config = load_full_config
    return manager


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """lm-eval shows no progress bar while it makes requests."""
    bar = task_module.tqdm
    task_module.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        task_module.tqdm = bar


# --- Tasks ---


def filters_of(task: Any) -> list[Any]:
    """The filter pipelines of a task, the one of the main metric first. Each has a `name` and the method `apply`."""
    return list(task._filters)


def data_of(task: Any) -> Any:
    """The task's data by the name of the split; empty if the task loads none."""
    return getattr(task, "dataset", None) or {}


def has_several_answers(task: Any) -> bool:
    """Whether a multiple-choice document may have several right choices."""
    return bool(getattr(task, "multiple_target", 0))


def prompts_are_choices(task: Any) -> bool:
    """Whether the choices of a document are its prompts and the answer is one text."""
    return bool(getattr(task, "multiple_input", 0))


def runs_answers_as_code(task: Any) -> bool:
    """Whether judging an answer executes it."""
    return bool(getattr(task, "UNSAFE_CODE", False))


def is_multimodal(task: Any) -> bool:
    """Whether the task needs images or sound."""
    return bool(getattr(task, "MULTIMODAL", False))


@contextmanager
def sampling_shots(task: Any, draw: Callable[[Callable[..., list[Any]], int, int], list[Any]]) -> Iterator[None]:
    """Let `draw` choose the shots of a task.

    Args:
        task: A task; one without shots is left alone.
        draw: Called with lm-eval's own sampling function, the number of shots wanted and the number of documents there
            are.
    """
    sampler = getattr(task, "sampler", None)
    if sampler is None:
        yield
        return
    original = sampler.sample

    def sample(n: int, **_: Any) -> list[Any]:
        return draw(original, n, len(sampler.df))

    sampler.sample = sample
    try:
        yield
    finally:
        del sampler.sample


# --- The Hugging Face model (`HFLM`) ---


def tokenised(lm: Any, requests: Sequence[Any]) -> list[Any]:
    """Requests with ``args`` (context, continuation) as lm-eval tokenises them.

    Returns:
        One (texts, context tokens, continuation tokens) per request.
    """
    grabbed: list[Any] = []

    def grab(encoded: list[Any], **_: Any) -> list[Any]:
        grabbed.extend(encoded)
        return []

    lm._loglikelihood_tokens = grab  # in place of running the model
    try:
        if requests:
            lm.loglikelihood(requests, disable_tqdm=True)
    finally:
        del lm._loglikelihood_tokens
    return grabbed


def log_likelihoods(lm: Any, requests: Sequence[Any], *, batch_size: int | None = None) -> list[tuple[float, bool]]:
    """The summed log-likelihood of each tokenised continuation, and whether greedy decoding gives it.

    Args:
        lm: lm-eval's model.
        requests: As `tokenised` returns them.
        batch_size: Rows of one forward pass; None: the model's own setting.
    """
    override = {} if batch_size is None else {"override_bs": batch_size}
    answers: list[tuple[float, bool]] = lm._loglikelihood_tokens(requests, disable_tqdm=True, **override)
    return answers


def first_logits(lm: Any, tokens: Any) -> Any:
    """The model's logits for a batch of tokens, in lm-eval's way of calling the model."""
    return lm._model_call(tokens)


def set_answer_hook(lm: Any, hook: AnswerHook) -> None:
    """Put `hook` in the place of lm-eval's cache."""
    lm.cache_hook = hook


def report_answer(lm: Any, request: Any, answer: Any) -> None:
    """Tell the hook of an answer that did not come from lm-eval's own path, as that path would have."""
    lm.cache_hook.add_partial("loglikelihood", request, answer)


def set_batch_size(lm: Any, size: int) -> None:
    """Change the number of rows of one forward pass."""
    lm.batch_size_per_gpu = size


@contextmanager
def decoding(lm: Any, decode: Callable[..., str]) -> Iterator[None]:
    """Let `decode` turn generated tokens into text. `type(lm).tok_decode` stays lm-eval's own."""
    lm.tok_decode = decode
    try:
        yield
    finally:
        del lm.tok_decode


@contextmanager
def rendering_with(lm: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Let the chat template be called with these arguments."""
    before = lm.chat_template_args
    lm.chat_template_args = dict(arguments)
    try:
        yield
    finally:
        lm.chat_template_args = before


@contextmanager
def thinking_until(lm: Any, end: str | int | None) -> Iterator[None]:
    """Cut answers after the last occurrence of a token, given as text or number; None: keep them whole."""
    before = lm.think_end_token
    lm.think_end_token = end
    try:
        yield
    finally:
        lm.think_end_token = before


@contextmanager
def watching_ends(lm: Any, report: Callable[[bool], None]) -> Iterator[None]:
    """Report of every generated answer, batch by batch, whether it was cut: it has all its tokens and no ending."""
    original, is_own = lm._model_generate, "_model_generate" in vars(lm)

    def generate(context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        tokens = original(context=context, max_length=max_length, stop=stop, **settings)
        ends = set(_as_list(lm.model.generation_config.eos_token_id))
        for answer in tokens[:, context.shape[1] :].tolist():
            has_all = len(answer) >= max_length - context.shape[1]
            text = lm.tokenizer.decode(answer) if has_all else ""
            report(has_all and not ends & set(answer) and not any(s and s in text for s in stop))
        return tokens

    lm._model_generate = generate
    try:
        yield
    finally:
        if is_own:  # somebody else replaced the method of this object
            lm._model_generate = original
        else:
            del lm._model_generate


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
