"""How finely a per-group quantity varies: the keys of a `PerGroup` value, in the order of the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from merge_search.recipe import Group
from merge_search.space import SpaceContext

__all__ = ["Per", "Range", "keys_for", "parameter_name", "representative"]

Per = Literal["expert", "block", "kind", "block_kind"]


class Range(BaseModel):
    """``{per: block, bounds: [0, 1.5]}``: one parameter per expert and group, all with the same bounds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per: Per = "expert"
    bounds: Annotated[tuple[float, float], Field()] = (0.0, 1.5)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds must be [low, high] with low < high, got {list(self.bounds)}")
        return self


def keys_for(per: Per, context: SpaceContext) -> list[str]:
    """Keys of a `PerGroup` value, most of them specific, ``*`` last for the tensors that no other key names.

    ``*`` is left out where nothing would fall under it, so that every parameter moves some tensor.
    """
    match per:
        case "expert":
            return ["*"]
        case "block":
            keys = [f"block.{i}" for i in range(context.n_blocks)]
        case "kind":
            keys = sorted({g.kind for g in context.groups}, key=[g.kind for g in context.groups].index)
        case "block_kind":
            pairs = sorted({(g.block, g.kind) for g in context.groups if g.block is not None and g.kind != "norm"})
            keys = [f"block.{b}.{k}" for b, k in pairs]
    covered = all(any(k in keys for k in g.keys()) for g in context.groups)  # noqa: SIM118
    return keys if covered else [*keys, "*"]


def parameter_name(what: str, expert: str, key: str, keys: list[str]) -> str:
    """``coefficient.maths.block.3``; the ``*`` of several keys is called ``rest``; a lone one has no suffix."""
    if key != "*":
        return f"{what}.{expert}.{key}"
    return f"{what}.{expert}" if len(keys) == 1 else f"{what}.{expert}.rest"


def representative(key: str, keys: list[str], context: SpaceContext) -> Group | None:
    """Some tensor whose value `key` decides, or None."""
    for group in context.groups:
        deciding = next((k for k in group.keys() if k in keys), None)  # noqa: SIM118
        if deciding == key:
            return group
    return None
