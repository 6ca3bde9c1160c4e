"""Layers repeated, left out or moved: mergekit's ``passthrough`` with ``slices`` of one model.

    new layer i = old layer layers[i],  for base and experts alike

SOLAR's depth up-scaling (arXiv 2312.15166) is ``0 1 ... 23 8 9 ... 31`` of a model with 32 layers. The repeated layers
are copies that the merge treats as layers of their own: each has its own coefficient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_search.engine.checkpoints.headers import TensorHeader
from merge_search.engine.transforms.layers import (
    config_problems,
    read_layers,
    restacked_config,
    restacked_names,
    stack_of,
)
from merge_search.engine.transforms.sources import Source, Sources
from merge_search.rules.transforms import Preview, Transformed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["preview", "stack"]


def preview(sources: Sources, *, layers: str) -> Preview:
    """The base with other layers. Refused: several stacks, configs that cannot follow, layers out of range."""
    found = stack_of(sources.base.info)
    if found is None:
        return Preview(("stack: the base must have one stack of layers, numbered from 0",))
    wanted, problems = read_layers(layers, found[1], what="stack.layers") if layers else ([*range(found[1])], [])
    problems += [f"stack: base: {p}" for p in config_problems(sources.base.config, found[1])]
    if problems:
        return Preview(tuple(problems))
    chosen = [layer for layer in wanted if layer is not None]
    names = [new for new, old in restacked_names(sources.base.headers, chosen) if old in sources.base.groups]
    return Preview(config=restacked_config(sources.base.config, chosen), names=tuple(names))


def stack(sources: Sources, out: Path, *, layers: str) -> Transformed:
    """Base and experts with other layers.

    Args:
        sources: Base and experts of one shape.
        out: Where they are written.
        layers: The old layer of every new one, such as ``0 1 1 2``; '' for all of them once.
    """
    found = stack_of(sources.base.info)
    assert found is not None
    wanted, _ = read_layers(layers, found[1], what="stack.layers") if layers else ([*range(found[1])], [])
    chosen = [layer for layer in wanted if layer is not None]
    return Transformed(
        _restacked(sources.base, out / "base", chosen),
        {name: _restacked(expert, out / "experts" / name, chosen) for name, expert in sources.experts.items()},
    )


def _restacked(source: Source, out: Path, layers: Sequence[int]) -> Path:
    from merge_search.engine.checkpoints.writer import write_model  # loads torch, and the check does not

    pairs = list(restacked_names(source.headers, layers))
    headers: dict[str, TensorHeader] = {new: replace(source.headers[old], name=new) for new, old in pairs}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for new, old in sorted(pairs, key=lambda pair: pair[1]):  # a layer that is repeated is read once
            yield new, source.tensor(old)

    config = restacked_config(source.config, layers)
    write_model(out, like=source.settings_folder, config=config, headers=headers, tensors=tensors())
    return out
