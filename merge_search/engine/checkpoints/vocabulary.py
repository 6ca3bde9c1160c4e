"""Vocabularies: which row of an expert's embedding matches which row of the base's. Torch-free.

Rows are matched by token, never by index. An expert may differ from the base in *added* tokens only (chat markers,
padding). Rows of tokens that both have are merged. Rows of tokens that only the expert has are left out. Rows of tokens
that only the base has stay the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_search.engine.checkpoints.headers import CheckpointInfo, read_json
from merge_search.errors import WeightsError
from merge_search.recipe import Group

__all__ = ["RowMap", "Vocabulary", "compare", "is_vocabulary_tensor", "read_vocabulary", "row_map"]

N_SHOWN = 3


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of a tokenizer.

    Attributes:
        ids: Id by token, added tokens included.
        added: The tokens that the tokenizer lists as added.
    """

    ids: Mapping[str, int]
    added: frozenset[str]


@dataclass(frozen=True)
class RowMap:
    """Rows of two tensors that belong to the same tokens.

    Attributes:
        base: Rows of the base's tensor.
        expert: The expert's row for each of them.
        n_extra: Number of tokens that only the expert has. Their rows are left out.
    """

    base: tuple[int, ...]
    expert: tuple[int, ...]
    n_extra: int


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Return the vocabulary of a folder's tokenizer files; None where there is none that can be read without its code.

    Raises:
        WeightsError: A tokenizer file is damaged.
    """
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder / "tokenizer.json")
    added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    if (folder / "vocab.json").is_file():
        ids = read_json(folder / "vocab.json")
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text("utf-8").split("\n")
        ids = {token.rstrip("\r"): i for i, token in enumerate(lines) if token or i < len(lines) - 1}
    else:
        return None
    if not all(isinstance(i, int) for i in ids.values()):
        return None
    return Vocabulary({**ids, **added}, frozenset(added))


def _from_tokenizer_json(file: Path) -> Vocabulary:
    data = read_json(file)
    try:
        vocab: Any = (data.get("model") or {}).get("vocab") or {}
        if isinstance(vocab, list):  # Unigram: [token, score] in the order of ids
            vocab = {entry[0]: i for i, entry in enumerate(vocab)}
        added = {entry["content"]: int(entry["id"]) for entry in data.get("added_tokens") or []}
        return Vocabulary({**vocab, **added}, frozenset(added))
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise WeightsError(f"{file}: must hold model.vocab and added_tokens, but reading them gave {error!r}") from None


def compare(base: Vocabulary, expert: Vocabulary) -> str:
    """Return why two vocabularies cannot be merged; '' if they are equal or differ in added tokens only."""
    added_in_both = base.added & expert.added
    changed = [t for t, i in base.ids.items() if expert.ids.get(t, i) != i and t not in added_in_both]
    if changed:
        changed.sort(key=base.ids.__getitem__)
        shown = ", ".join(
            f"{t!r} ({base.ids[t]} in the base, {expert.ids[t]} in the expert)" for t in changed[:N_SHOWN]
        )
        return f"{len(changed)} tokens have other ids: {shown}"
    lost = [t for t in base.ids if t not in expert.ids and t not in base.added]
    new = [t for t in expert.ids if t not in base.ids and t not in expert.added]
    parts = []
    if lost:
        parts.append(f"{len(lost)} tokens of the base are not in the expert: {', '.join(map(repr, lost[:N_SHOWN]))}")
    if new:
        parts.append(f"{len(new)} tokens of the expert are not in the base: {', '.join(map(repr, new[:N_SHOWN]))}")
    return "; ".join(parts)


def is_vocabulary_tensor(info: CheckpointInfo, group: Group) -> bool:
    """Whether the first dimension of a tensor counts tokens: an embedding or head with `vocab_size` rows."""
    if group.kind not in ("embedding", "head") or "position" in group.tensor or "token_type" in group.tensor:
        return False
    text = info.config.get("text_config")
    size = info.config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    shape = info.tensors[group.tensor].shape
    return size is not None and len(shape) > 0 and shape[0] == size


def row_map(base: Vocabulary, expert: Vocabulary, n_base: int, n_expert: int) -> RowMap | None:
    """Return the rows to merge of tensors with `n_base` and `n_expert` rows; None if all rows match one to one."""
    if base.ids == expert.ids and n_base == n_expert:
        return None
    shared = [(i, expert.ids[t]) for t, i in base.ids.items() if t in expert.ids]
    pairs = sorted((i, j) for i, j in shared if i < n_base and j < n_expert)
    n_extra = sum(t not in base.ids for t in expert.ids)
    return RowMap(tuple(i for i, _ in pairs), tuple(j for _, j in pairs), n_extra)
