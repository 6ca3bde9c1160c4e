"""Find and load lm-eval's tasks without a model, and report what is wrong with them.

lm-eval 0.4.13 silently skips a broken task file, reads relative data files from the current directory and needs six
seconds to index its own tasks. This module reports broken files, finds data files also beside the task file, and builds
the index only when a task is not found in the user's own folders.
"""

from __future__ import annotations

import copy
import glob
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import yaml

from evaluators.isolation import quiet
from evaluators.lm_eval._compat import (
    is_group,
    is_multimodal,
    is_tag,
    no_progress_bars,
    read_task_file,
    runs_answers_as_code,
    task_files,
    task_manager,
)
from evaluators.lm_eval.options import LmEvalOptions
from merge_search.errors import nearest

__all__ = ["Loaded", "load_tasks", "quiet_lm_eval", "reason", "unknown_tasks"]

log = logging.getLogger(__name__)

_LARGE = 2**20
"""Bytes. A file of this size holds rows, so it need not be read to know that it is not empty."""


def reason(error: BaseException) -> str:
    """An exception of another library's code in one line: its type and the start of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


@dataclass(frozen=True)
class Loaded:
    """A group or tag as lm-eval loaded it.

    Attributes:
        name: Its name.
        children: Names of tasks, and groups in it.
        aggregates: The entries of its ``aggregate_metric_list``; None for a tag, and for a group without the list.
    """

    name: str
    children: tuple[str | Loaded, ...]
    aggregates: tuple[Any, ...] | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks in it, through all levels, in lm-eval's order."""
        out: list[str] = []
        for child in self.children:
            out += [child] if isinstance(child, str) else child.tasks
        return out


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keep lm-eval, transformers and datasets from writing to the terminal."""
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with no_progress_bars(), quiet(["lm_eval", "transformers", "datasets", "accelerate"]):
            yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def load_tasks(
    options: LmEvalOptions, folder: Path | None = None
) -> tuple[dict[str, Any], list[str | Loaded], list[str]]:
    """Load tasks with their documents.

    A task named twice, by itself or through groups and tags, is loaded once.

    Args:
        options: The evaluator's options.
        folder: The folder in which task files named by a path are looked for before ``include_path``; None: the current
            directory.

    Returns:
        Tasks by name, in the order of the options; what the options name, tasks by name and groups and tags with what
        is in them; and every problem.
    """
    data_files: list[Any] = []
    manager = _manager(options.include_path, data_files, defaults=False)
    folders = [str(folder or ""), *options.include_path]
    specs = [_path(name, folders) if name not in manager.task_index else name for name in options.tasks]
    broken = list(_broken_files(options.include_path))
    is_local = [_is_known(manager.task_index, spec) for spec in specs]
    if not all(is_local) and broken:
        return {}, [], broken
    for problem in broken:
        log.warning("%s", problem)
    if not all(is_local):
        manager = _manager(options.include_path, data_files, defaults=True)
    tasks: dict[str, Any] = {}
    named: list[str | Loaded] = []
    problems: list[str] = []
    for spec in specs:
        data_files.clear()
        if spec not in manager.task_index and not Path(spec).is_file():
            problems.append(_unknown(spec, manager.task_index))
            continue
        try:
            found = manager.load([spec])
        except Exception as error:  # whatever a task file, its Python code or its data set raises
            empty = [path for files in data_files for path in _local_files(files) if _is_empty(path)]
            why = f"{', '.join(map(str, empty))} has no rows" if empty else reason(error)
            problems.append(f"tasks: {spec!r} cannot be loaded: {why}")
            continue
        loaded = found["tasks"]
        if not loaded:
            problems.append(f"tasks: {spec!r} holds no task")
            continue
        named += _named(manager.task_index, spec, found)
        tasks |= {name: task for name, task in loaded.items() if name not in tasks}
    for name, task in list(tasks.items()):
        if unsupported := list(_unsupported(name, task, options)):
            problems += unsupported
            del tasks[name]
        else:
            _set_shots(name, task, options.num_fewshot)
            if task.OUTPUT_TYPE == "generate_until" and (settings := options.for_task(name).gen_kwargs):
                task.set_config("generation_kwargs", copy.deepcopy(settings), update=True)
    return tasks, named, problems


def unknown_tasks(options: LmEvalOptions, folder: Path | None = None) -> list[str]:
    """A sentence for each task that `load_tasks` would not find, or for each broken task file. No data set is read.

    Args:
        options: The evaluator's options.
        folder: As for `load_tasks`.
    """
    folders = [str(folder or ""), *options.include_path]
    for defaults in (False, True):
        index = _manager(options.include_path, [], defaults=defaults).task_index
        specs = [_path(name, folders) if name not in index else name for name in options.tasks]
        unknown = [_unknown(spec, index) for spec in specs if spec not in index and not Path(spec).is_file()]
        if not unknown or (broken := list(_broken_files(options.include_path))):
            return broken if unknown else []
    return unknown


def _unknown(spec: str, index: Mapping[str, Any]) -> str:
    return f"tasks: lm-eval has no task, tag or group called {spec!r}{nearest(spec, index)}"


def _named(index: Mapping[str, Any], spec: str, found: Mapping[str, Any]) -> list[str | Loaded]:
    """What the option `spec` names: tasks, a group or a tag."""
    if found["groups"]:
        return [_tree(next(iter(found["groups"].values())))]  # lm-eval lists the group itself before those in it
    if spec in index and is_tag(index[spec]):
        return [Loaded(spec, tuple(found["tasks"]))]
    return list(found["tasks"])


def _tree(group: Any) -> Loaded:
    children = tuple(child.task_name if hasattr(child, "task_name") else _tree(child) for child in group)
    return Loaded(group.name, children, tuple(group.aggregate_metric_list or ()) or None)


def _manager(folders: Sequence[str], data_files: list[Any], *, defaults: bool) -> Any:
    """lm-eval's task manager, which also finds data files beside the task file.

    Args:
        folders: Folders of task files.
        data_files: Every ``data_files`` entry of a task that the manager loads is appended to this list.
        defaults: Whether to index lm-eval's own tasks, too.
    """

    def change(path: Path, config: dict[str, Any]) -> dict[str, Any]:
        if isinstance(config.get("dataset_kwargs"), dict):
            config["dataset_kwargs"] = _absolute_data(config["dataset_kwargs"], _folders_of(path))
            data_files.append(config["dataset_kwargs"].get("data_files"))
        return config

    return task_manager(folders, defaults=defaults, change=change)


def _path(name: str, folders: Sequence[str]) -> str:
    """The absolute path of a task file; any other name as it is."""
    if not name.endswith((".yaml", ".yml")):
        return name
    for folder in folders:
        path = (Path(folder) / Path(name).expanduser()).resolve()
        if path.is_file():
            return str(path)
    return name


def _is_known(index: Mapping[str, Any], spec: str) -> bool:
    """Whether `spec` and everything that it refers to can be loaded from this index."""
    entry = index.get(spec)
    if entry is not None:
        return not is_group(entry) or _members_known(index, entry.cfg or {})
    if not Path(spec).is_file():
        return False
    try:
        return _members_known(index, read_task_file(spec))
    except (yaml.YAMLError, OSError, ValueError):
        return True  # loading it will report what is wrong


def _members_known(index: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    members = config.get("task")
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            known = _is_known(index, member)
        elif "group" in member:
            known = _is_known(index, member["group"]) if member["group"] in index else _members_known(index, member)
        else:
            known = "dataset_path" in member or _is_known(index, member.get("task", ""))
        if not known:
            return False
    return True


def _broken_files(folders: Sequence[str]) -> Iterator[str]:
    """One sentence per task file that cannot be read. Fragments to be included by others are fine."""
    for folder in folders:
        for path in task_files(Path(folder)):
            try:
                read_task_file(path)
            except (yaml.YAMLError, OSError, UnicodeDecodeError, ValueError) as error:
                if "Expected YAML dict" not in str(error):
                    yield f"include_path: task file {path} cannot be read: {reason(error)}"


def _folders_of(path: Path) -> list[Path]:
    """The folder of a task file, then the folders of the files that it includes."""
    config = read_task_file(path, recursive=False)
    included = config.get("include", [])
    parts = included if isinstance(included, list) else [included]
    return [path.parent, *(p for part in parts for p in _folders_of((path.parent / part).resolve()))]


def _absolute_data(arguments: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """`dataset_kwargs` with absolute paths for local files that are found beside the task file only."""
    out = dict(arguments)
    if isinstance(out.get("data_dir"), str):
        out["data_dir"] = _absolute(out["data_dir"], folders)
    elif "data_files" in out:
        out["data_files"] = _absolute_files(out["data_files"], folders)
    return out


def _local_files(value: Any) -> Iterator[Path]:
    """The files on this machine that a ``data_files`` entry names."""
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _local_files(item)
    elif isinstance(value, str) and "://" not in value:
        yield from (path for path in map(Path, sorted(glob.glob(value, recursive=True))) if path.is_file())


def _is_empty(path: Path) -> bool:
    """Whether a file holds nothing but white space."""
    return path.stat().st_size < _LARGE and not path.read_bytes().strip()


def _absolute_files(value: Any, folders: Sequence[Path]) -> Any:
    if isinstance(value, Mapping):
        return {key: _absolute_files(v, folders) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_absolute_files(v, folders) for v in value]
    return _absolute(value, folders) if isinstance(value, str) else value


def _absolute(text: str, folders: Sequence[Path]) -> str:
    """The absolute path or pattern. As in lm-eval, the current directory comes first."""
    if "://" in text or Path(text).is_absolute() or glob.glob(text, recursive=True):
        return text
    return next((str(f / text) for f in folders if glob.glob(str(f / text), recursive=True)), text)


def _unsupported(name: str, task: Any, options: LmEvalOptions) -> Iterator[str]:
    """One sentence per reason why a loaded task cannot be scored."""
    if runs_answers_as_code(task) and not options.confirm_run_unsafe_code:
        yield (
            f"tasks: {name!r} executes code that the model wrote; set confirm_run_unsafe_code: true if this machine "
            "may run it"
        )
    if options.for_task(name).enable_thinking and task.OUTPUT_TYPE != "generate_until":
        yield (
            f"tasks: {name!r} is {task.OUTPUT_TYPE}, where a model cannot think before it answers; set "
            f"task_options.{name}.enable_thinking: false"
        )
    if is_multimodal(task):
        yield f"tasks: {name!r} needs images or sound; only text tasks can be scored"


def _set_shots(name: str, task: Any, num_fewshot: int | None) -> None:
    """Set the number of shots by lm-eval's rule: the option wins unless the task sets 0. Without both it is 0."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own == 0 != num_fewshot:
        log.warning("task %r says num_fewshot: 0 itself, which the option num_fewshot does not override", name)
    elif num_fewshot is not None or own is None:
        task.set_config("num_fewshot", num_fewshot or 0)
    splits = [task.get_config(f"{kind}_split") for kind in ("fewshot", "training", "validation")]
    if task.get_config("num_fewshot") and not any(splits) and not task.get_config("fewshot_config"):
        log.warning("task %r draws its shots from the questions themselves; give it a fewshot_split", name)
