"""Plain texts from files, split and ordered like questions. Drift and latency are measured on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from merge_search.errors import StudyFileError
from merge_search.evaluation import Split, SplitShares, question_order, split_of
from merge_search.options import PathList, folders

__all__ = ["SCORED", "TextOptions", "fewest_texts", "split_texts", "text_hash"]

FEWEST = 2
"""Fewest texts in a split, so that a mean has an error bar."""
SCORED = (Split.SEARCH, Split.VALIDATION, Split.TEST)
"""The splits of texts. The fit share of the search split is scored with the rest of it."""


class TextOptions(BaseModel):
    """Options that all evaluators on plain texts have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    texts: Annotated[PathList, Field(min_length=1)]
    """Files with one text a line, or JSON-lines files (``.jsonl``) with the text under `key`."""
    key: str = "text"
    """The key of the text in a JSON-lines file."""
    include_path: PathList = []
    """Folders of `texts`; none: the folder of the study file."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Most texts: the first in the order of questions."""
    max_length: Annotated[int, Field(ge=2)] = 128
    """Most tokens of a text. Longer texts are cut."""


def split_texts(options: TextOptions, shares: SplitShares, folder: Path | None = None) -> dict[Split, list[str]]:
    """The different texts of all files by split, each split in the order of questions.

    Args:
        options: The evaluator's options.
        shares: Shares of the splits.
        folder: The folder that relative paths are relative to; None: the current directory.

    Raises:
        StudyFileError: A file is missing, a row has no text, or a split has fewer than two texts.
    """
    texts = sorted(dict.fromkeys(_read(options, folder)), key=lambda t: question_order(text_hash(t)))[: options.limit]
    by_split: dict[Split, list[str]] = {split: [] for split in SCORED}
    for text in texts:
        split = split_of(text_hash(text), shares)
        by_split[Split.SEARCH if split is Split.FIT else split].append(text)
    few = [f"{split} {len(group)}" for split, group in by_split.items() if len(group) < FEWEST]
    if few:
        raise StudyFileError(
            f"texts: every split needs at least {FEWEST} texts, found {', '.join(few)} of {len(texts)} different ones; "
            "give more texts or raise limit"
        )
    return by_split


def fewest_texts(by_split: Mapping[Split, list[str]]) -> int:
    """The smallest ``limit`` that leaves enough texts in every split.

    Args:
        by_split: All texts, as `split_texts` returns them.
    """
    order = sorted((question_order(text_hash(text)), split) for split, group in by_split.items() for text in group)
    return max([i for i, (_, s) in enumerate(order, start=1) if s == split][FEWEST - 1] for split in by_split)


def text_hash(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _read(options: TextOptions, folder: Path | None) -> Iterator[str]:
    """The texts of all files, in their order. Raises `StudyFileError` at the end if anything is wrong."""
    problems: list[str] = []
    looked_in = folders(options.include_path, folder)
    for name in options.texts:
        places = [f / Path(name).expanduser() for f in looked_in]
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            problems.append(
                f"texts: no file {name} in {', '.join(map(str, looked_in))}; include_path says where they lie"
            )
            continue
        try:
            whole = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            problems.append(f"texts: {name} must be UTF-8: {error}")
            continue
        # NOTE: A text within JSON may contain characters at which splitlines() would cut it, such as U+2028.
        lines = whole.split("\n") if path.suffix == ".jsonl" else whole.splitlines()
        for number, line in enumerate(lines, start=1):
            text = (
                line
                if path.suffix != ".jsonl"
                else _field(line, options.key, f"texts: {name}, line {number}", problems)
            )
            if text.strip():
                yield text.strip()
    if problems:
        raise StudyFileError(problems)


def _field(line: str, key: str, where: str, problems: list[str]) -> str:
    """The text under `key` of a JSON line. What is wrong is added to `problems`."""
    try:
        text = json.loads(line)[key] if line.strip() else ""
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if isinstance(text, str):
        return text
    problems.append(f"{where}: must be a JSON object with a text under the key {key!r}")
    return ""
