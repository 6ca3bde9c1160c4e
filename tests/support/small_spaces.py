"""The tensors of a small model, for search spaces. Shared by several test files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, settings

from merge_search import catalogue
from merge_search.space import SpaceContext
from merge_search.testing import example_context


def make_context(
    n_blocks: int = 6, experts: tuple[str, ...] = ("maths", "code", "stories"), *, outside: bool = True
) -> SpaceContext:
    whole = example_context(n_blocks, experts)
    return whole if outside else replace(whole, groups=tuple(g for g in whole.groups if g.block is not None))


CONTEXT = make_context()


def build(kind: str, context: SpaceContext = CONTEXT, **options: Any) -> Any:
    return catalogue.load("search_spaces", kind)(options, context)


GENOME = {"models": ["maths", "models/code", "stories"], "base_model": "models/base"}
FILTERS = ["self_attn", "mlp"]


quick = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
