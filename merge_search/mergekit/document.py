"""The shape of a mergekit file: keys, models and slices. Methods come later.

Problems are collected in a list, so that a file's author sees all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from merge_search.errors import RecipeError, nearest

__all__ = ["DTYPES", "Document", "Slice", "Source", "read_document"]

DTYPES = ("float32", "float16", "bfloat16")
_TOP = {
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
}  # fmt: skip
_REFUSED = {
    "modules": "several modules in one file are not supported; write one file per module",
    "chat_template": "the base's chat template is kept; remove the key",
}


@dataclass(frozen=True)
class Source:
    """One model of a slice and its parameters."""

    model: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Slice:
    """Layers start to end - 1 of the merged model; an ``end`` of None stands for all layers."""

    sources: tuple[Source, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    start: int = 0
    end: int | None = None
    where: str = ""


@dataclass(frozen=True)
class Document:
    """A mergekit file. Its models are absolute paths of folders that exist, or hub ids.

    `layers` has the sources' layer of every layer of the merged model, where layers are repeated, left out or moved; ()
    where they are not.

    Invariant: there is at least one slice, and each has at least one source. A file with ``models:`` has one slice,
    whose ``end`` is None.
    """

    method: str
    slices: tuple[Slice, ...]
    parameters: Mapping[str, Any]
    base: str | None
    dtype: str | None
    layers: tuple[int, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """All models in the order in which they appear."""
        return tuple(dict.fromkeys(s.model for part in self.slices for s in part.sources))


def read_document(text: str, folder: Path | None, problems: list[str], *, where: str) -> Document | None:
    """Parse a file's text; None where its problems leave nothing to read.

    Args:
        text: The text.
        folder: The file's folder. Relative model paths are looked up there first, then in the working directory.
        problems: Filled in.
        where: What to call the file in messages.

    Raises:
        RecipeError: the text is not one YAML mapping.
    """
    try:
        documents = [d for d in yaml.safe_load_all(text) if d is not None]
    except yaml.YAMLError as error:
        raise RecipeError(f"not YAML: {error}", where=where) from None
    if len(documents) != 1 or not isinstance(documents[0], Mapping):
        raise RecipeError("must be one YAML mapping of mergekit's keys (merge_method, models, ...)", where=where)
    data = dict(documents[0])
    place = _Places(folder)
    for key in data:
        if key in _REFUSED:
            problems.append(f"{key}: {_REFUSED[key]}")
        elif key not in _TOP:
            problems.append(f"{key}: unknown key{nearest(str(key), _TOP)}")
    method = data.get("merge_method")
    if not isinstance(method, str):
        problems.append("merge_method: must name a method")
    base = place(data.get("base_model"), "base_model", problems) if data.get("base_model") is not None else None
    slices = _slices(data, place, problems)
    dtype = _dtype(data, problems)
    parameters = _parameters(data.get("parameters"), "parameters", problems)
    if not isinstance(method, str) or not slices:
        return None
    slices, layers = _stacked(slices)
    document = Document(method, slices, parameters, base, dtype, layers)
    _tokenizer(data, document, place, problems)
    return document


class _Places:
    """Turns model references into folders or hub ids."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __call__(self, reference: Any, where: str, problems: list[str]) -> str | None:
        """The model's place, or None with a problem."""
        if isinstance(reference, Mapping):
            reference = self._from_mapping(reference, where, problems)
            if reference is None:
                return None
        if not isinstance(reference, str) or not reference:
            problems.append(f"{where}: must name a model, got {reference!r}")
            return None
        found = self.local(reference)
        if found is not None:
            return found
        if "+" in reference:
            problems.append(
                f"{where}: 'model+adapter' is not supported, got {reference!r}; give the adapter's own folder"
            )
            return None
        if "@" in reference:
            problems.append(f"{where}: revisions are not supported, got {reference!r}; download it and give the folder")
            return None
        return reference

    def _from_mapping(self, reference: Mapping[str, Any], where: str, problems: list[str]) -> Any:
        inner = reference.get("model", reference)
        extra = [k for k in reference if k not in ("model", "path") and reference[k] is not None]
        if isinstance(inner, Mapping):
            extra += [k for k in inner if k != "path" and inner[k] is not None]
            inner = inner.get("path")
        if extra:
            problems.append(f"{where}.{extra[0]}: not supported; give the model's folder or hub id alone")
            return None
        return inner

    def local(self, reference: str) -> str | None:
        """Absolute path of an existing folder; None if there is none."""
        for parent in ([self.folder] if self.folder is not None else []) + [Path()]:
            path = parent / Path(reference).expanduser()
            if path.is_dir():
                return str(path.resolve())
        return None


def _parameters(value: Any, where: str, problems: list[str]) -> Mapping[str, Any]:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return value
    problems.append(f"{where}: must be a mapping of parameters, got {value!r}")
    return {}


def _slices(data: Mapping[str, Any], place: _Places, problems: list[str]) -> tuple[Slice, ...]:
    if (data.get("models") is None) == (data.get("slices") is None):
        problems.append("models, slices: give one of the two")
        return ()
    if data.get("models") is not None:
        sources = _sources(data["models"], "models", {"model", "parameters"}, place, problems)
        return (Slice(tuple(s for s, _ in sources), where="models"),) if sources else ()
    if not isinstance(data["slices"], list):
        problems.append("slices: must be a list of slices")
        return ()
    found = []
    for i, entry in enumerate(data["slices"]):
        where = f"slices[{i}]"
        if not isinstance(entry, Mapping):
            problems.append(f"{where}: must be a mapping with sources")
            continue
        problems += [
            f"{where}.{k}: unknown key{nearest(str(k), {'sources', 'parameters'})}"
            for k in entry
            if k not in ("sources", "parameters")
        ]
        sources = _sources(
            entry.get("sources"), f"{where}.sources", {"model", "layer_range", "parameters"}, place, problems
        )
        ranges = [_range(r, s.where, problems) for s, r in sources]
        if not sources or None in ranges:
            continue
        if len(set(ranges)) > 1:
            got = ", ".join(str(list(r)) for r in ranges if r)
            problems.append(
                f"{where}.sources: layer_range must be the same for all sources, got {got}; layers of different depth "
                "cannot be merged"
            )
            continue
        assert ranges[0] is not None
        settings = _parameters(entry.get("parameters"), f"{where}.parameters", problems)
        found.append(Slice(tuple(s for s, _ in sources), settings, *ranges[0], where=where))
    return tuple(found)


def _stacked(slices: tuple[Slice, ...]) -> tuple[tuple[Slice, ...], tuple[int, ...]]:
    """Slices in the layers of the merged model, and the sources' layers of these; () where both are the same."""
    layers: list[int] = []
    found = []
    for part in slices:
        if part.end is None:
            return slices, ()
        found.append(replace(part, start=len(layers), end=len(layers) + part.end - part.start))
        layers += range(part.start, part.end)
    return tuple(found), () if layers == [*range(len(layers))] else tuple(layers)


def _sources(value: Any, where: str, keys: set[str], place: _Places, problems: list[str]) -> list[tuple[Source, Any]]:
    if not isinstance(value, list) or not value:
        problems.append(f"{where}: must be a list of models")
        return []
    found: list[tuple[Source, Any]] = []
    for i, entry in enumerate(value):
        here = f"{where}[{i}]"
        if not isinstance(entry, Mapping):
            problems.append(f"{here}: must be a mapping with the key model, got {entry!r}")
            continue
        problems += [f"{here}.{k}: unknown key{nearest(str(k), keys)}" for k in entry if k not in keys]
        model = place(entry.get("model"), f"{here}.model", problems)
        parameters = _parameters(entry.get("parameters"), f"{here}.parameters", problems)
        if model is None:
            continue
        if any(s.model == model for s, _ in found):
            problems.append(f"{here}.model: {entry['model']} is listed twice")
            continue
        found.append((Source(model, parameters, here), entry.get("layer_range")))
    return found


def _range(value: Any, where: str, problems: list[str]) -> tuple[int, int] | None:
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
        and 0 <= value[0] < value[1]
    ):
        return value[0], value[1]
    problems.append(f"{where}.layer_range: must be [first, past the last] layer, got {value!r}")
    return None


def _dtype(data: Mapping[str, Any], problems: list[str]) -> str | None:
    for key in ("dtype", "out_dtype"):
        if data.get(key) is not None and data[key] not in DTYPES:
            problems.append(f"{key}: must be one of {', '.join(DTYPES)}, got {data[key]!r}")
    chosen = data.get("out_dtype") or data.get("dtype")
    return chosen if chosen in DTYPES else None


def _tokenizer(data: Mapping[str, Any], document: Document, place: _Places, problems: list[str]) -> None:
    """The merged model keeps the base's tokenizer (the first model's where there is no base)."""
    asked = {"tokenizer_source": data.get("tokenizer_source")}
    tokenizer = data.get("tokenizer")
    if isinstance(tokenizer, Mapping):
        asked["tokenizer.source"] = tokenizer.get("source")
        problems += [
            f"tokenizer.{k}: not supported; the base's tokenizer is kept as it is" for k in tokenizer if k != "source"
        ]
    elif tokenizer is not None:
        problems.append(f"tokenizer: must be a mapping with the key source, got {tokenizer!r}")
    kept = document.base or document.models[0]
    for key, value in asked.items():
        if value is None or value == "base":
            continue
        if not isinstance(value, str) or (place.local(value) or value) != kept:
            problems.append(f"{key}: only the base's tokenizer can be kept ('base'), got {value!r}")
