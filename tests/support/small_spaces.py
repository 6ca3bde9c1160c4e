"""The tensors of a small model, for search spaces. Shared by several test files."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

from merge_search import catalogue
from merge_search.recipe import Group, Models
from merge_search.space import SpaceContext


def make_context(
    n_blocks: int = 6, experts: tuple[str, ...] = ("maths", "code", "stories"), *, outside: bool = True
) -> SpaceContext:
    groups = []
    for i in range(n_blocks):
        groups += [
            Group(f"model.layers.{i}.input_layernorm.weight", i, "norm"),
            Group(f"model.layers.{i}.self_attn.q_proj.weight", i, "attention"),
            Group(f"model.layers.{i}.self_attn.o_proj.weight", i, "attention"),
            Group(f"model.layers.{i}.mlp.up_proj.weight", i, "mlp"),
        ]
    if outside:
        groups += [
            Group("model.embed_tokens.weight", None, "embedding"),
            Group("model.norm.weight", None, "norm"),
            Group("lm_head.weight", None, "head"),
        ]
    models = Models(base="models/base", experts={e: f"models/{e}" for e in experts})
    return SpaceContext(models, tuple(groups), seed=5, dtype="bfloat16")


CONTEXT = make_context()


def build(kind: str, context: SpaceContext = CONTEXT, **options: Any) -> Any:
    return catalogue.load("search_spaces", kind)(options, context)


GENOME = {"models": ["maths", "models/code", "stories"], "base_model": "models/base"}
FILTERS = ["self_attn", "mlp"]


quick = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
