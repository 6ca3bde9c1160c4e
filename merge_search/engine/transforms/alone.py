"""One model as it is: how the base and experts of other shapes are judged beside merges. Nothing is merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merge_search.engine.transforms.sources import Source, Sources
from merge_search.rules.transforms import Preview, Transformed

__all__ = ["alone", "preview"]


def preview(sources: Sources, *, model: str) -> Preview:
    """The model's own config and tensors."""
    source = _named(sources).get(model)
    if source is None:
        return Preview((f"transform: alone.model must be one of {', '.join(_named(sources))}, got {model!r}",))
    return Preview(config=source.config, names=tuple(source.groups))


def alone(sources: Sources, out: Path, *, model: str) -> Transformed:
    """The model's own folder. An adapter is written as the whole model that it makes."""
    source = _named(sources)[model]
    if source.is_dense:
        return Transformed(source.folder)
    from merge_search.engine.checkpoints.writer import write_model  # loads torch, and the check does not

    tensors = ((name, source.tensor(name)) for name in source.headers)
    write_model(
        out / "base", like=source.settings_folder, config=source.config, headers=source.headers, tensors=tensors
    )
    return Transformed(out / "base")


def _named(sources: Sources) -> Mapping[str, Source]:
    return {source.name: source for source in sources}
