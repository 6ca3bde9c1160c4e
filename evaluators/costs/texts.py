"""Plain texts from files, split and ordered like questions: what costs (drift, latency) are measured on."""

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
SCORED = (Split.SEARCH, Split.VALIDATION, Split.TEST)
"""Splits that texts go to; the fit share of the search split is asked with the rest of it."""


class TextOptions(BaseModel):
    """What every evaluator on plain texts understands."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    texts: Annotated[PathList, Field(min_length=1)]
    """Files: one text a line, or JSON lines (``.jsonl``) with the text under `key`."""
    key: str = "text"
    include_path: PathList = []
    """Folders that `texts` are relative to; none: the study file's."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Texts, the first in the order of questions."""
    max_length: Annotated[int, Field(ge=2)] = 128
    """Tokens; longer texts are cut."""


def split_texts(options: TextOptions, shares: SplitShares, folder: Path | None = None) -> dict[Split, list[str]]:
    """The different texts of all files by split, each in the order of questions.

    Args:
        folder: In place of an ``include_path`` that is not given; None: the current directory.

    Raises:
        StudyFileError: a file is missing, a row has no text, or a split has fewer than two texts.
    """
    texts = sorted(dict.fromkeys(_read(options, folder)), key=lambda t: question_order(text_hash(t)))[: options.limit]
    found: dict[Split, list[str]] = {split: [] for split in SCORED}
    for text in texts:
        split = split_of(text_hash(text), shares)
        found[Split.SEARCH if split is Split.FIT else split].append(text)
    few = [f"{split} {len(group)}" for split, group in found.items() if len(group) < FEWEST]
    if few:
        raise StudyFileError(
            f"texts: every split needs at least {FEWEST} texts, found {', '.join(few)} of {len(texts)} different ones; "
            "give more texts or raise limit"
        )
    return found


def fewest_texts(found: Mapping[Split, list[str]]) -> int:
    """The smallest ``limit`` at which `split_texts`, that found these, still has enough texts in every split."""
    order = sorted((question_order(text_hash(text)), split) for split, group in found.items() for text in group)
    return max([i for i, (_, s) in enumerate(order, start=1) if s == split][FEWEST - 1] for split in found)


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(options: TextOptions, folder: Path | None) -> Iterator[str]:
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
        # NOTE: a text within JSON may hold characters at which splitlines() parts lines, such as U+2028.
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
    try:
        text = json.loads(line)[key] if line.strip() else ""
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if isinstance(text, str):
        return text
    problems.append(f"{where}: must be a JSON object with a text under the key {key!r}")
    return ""
