"""Transforms: rules that make other models from a recipe's models before the merge.

A transform is a function

    function(sources, out, *, option=default, ...) -> Transformed

that reads the base and the experts (`engine.transforms.sources.Sources`) and writes ordinary Hugging Face folders below
`out`. Everything later (tensors, engine, statistics, live model, hash, export) works on these as on any models. A
result without experts is not merged any further: the written base is the merge.

Beside it stands a check, which reads headers and configs alone:

    check(sources, *, option=default, ...) -> Preview
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from merge_search.rules.option_table import TRANSFORM_OPTIONS
from merge_search.rules.table import Rule, RuleTable

__all__ = ["TRANSFORMS", "Preview", "TransformInfo", "Transformed"]


@dataclass(frozen=True)
class Transformed:
    """What a transform made.

    Attributes:
        base: Folder of the base: below `out`, or the folder of a source.
        experts: Folder by expert, in the order of the recipe. Empty: the base is the result.
    """

    base: Path
    experts: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Preview:
    """What a transform would make, from headers and configs alone.

    Attributes:
        problems: Why it cannot; a sentence each.
        config: config.json of the base that it would write; None: that of the base.
        names: Names of the tensors of that base that are merged; None: those of the base.
    """

    problems: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    names: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TransformInfo(Rule):
    """A transform.

    Attributes:
        paper: Where it was published.
        result: ``known``: transformers can load what it writes. ``own``: a class of this package loads it.
        aligns: It takes experts whose tensors do not have the base's names and shapes.
        merges: Its result has experts, which the rest of the recipe merges. Without, the written base is the merge.
        check: "module:function" of the check of a built-in transform; '' for none.
        checker: The check of one from outside.
        version: Changed when it writes other weights for the same options, so that stored results are not used.
    """

    paper: str = "-"
    result: Literal["known", "own"] = "known"
    aligns: bool = False
    merges: bool = True
    check: str = ""
    checker: Callable[..., Preview] | None = field(default=None, compare=False, repr=False)
    version: int = 1


_ROOM = "merge_search.engine.transforms"

TRANSFORMS: RuleTable[TransformInfo] = RuleTable(
    "transform",
    (
        TransformInfo(
            name="stack", summary="layers repeated, left out or moved", paper="2312.15166", options={"layers": ""},
            about=TRANSFORM_OPTIONS["stack"], target=f"{_ROOM}.stack:stack", check=f"{_ROOM}.stack:preview",
        ),
        TransformInfo(
            name="mal", summary="experts of other widths and depths, aligned by assignment problems", aligns=True,
            paper="2503.21657", options={"blocks": "", "passes": 2, "same_shape": False},
            about=TRANSFORM_OPTIONS["mal"], target=f"{_ROOM}.mal:mal", check=f"{_ROOM}.mal:preview",
        ),
        TransformInfo(
            name="alone", summary="one model as it is: the base, or the expert that `model` names", merges=False,
            aligns=True, options={"model": "base"}, about=TRANSFORM_OPTIONS["alone"],
            target=f"{_ROOM}.alone:alone", check=f"{_ROOM}.alone:preview",
        ),
        TransformInfo(
            name="smile", summary="a sparse mixture of low-rank experts, with a router that needs no data",
            paper="2408.10174", result="own", merges=False,
            options={
                "rank": 32, "gate_rank": 4, "top_k": 1, "modules": "all", "rest": "base", "shared": "base",
                "route": "deltas", "temperature": 1.0,
            },
            choices={
                "modules": ("all", "attention", "mlp"), "rest": ("base", "average"), "shared": ("base", "average"),
                "route": ("deltas", "weights"),
            },
            about=TRANSFORM_OPTIONS["smile"], target=f"{_ROOM}.smile:smile", check=f"{_ROOM}.smile:preview",
        ),
    ),
)  # fmt: skip
