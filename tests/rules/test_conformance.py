"""Every rule of the tables keeps what `merge_search.testing` says of rules, and so do a user's own."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from merge_search.engine.methods.assess import MEASURES
from merge_search.engine.methods.operators import OPERATORS, POSTS
from merge_search.recipe import Select, Splice
from merge_search.testing import RuleCase, RuleConformance

DENSITIES = {f"e{i}": 0.5 for i in range(3)}
SELECTIONS = get_args(Select.model_fields["kind"].annotation)
SPLICES = get_args(Splice.model_fields["kind"].annotation)


def drawn(kind: str, expert: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """What was measured on data, of every kind: positive numbers, or a Gram matrix of inputs."""
    draw = torch.Generator().manual_seed(sum(map(ord, kind + expert + name)))
    if kind == "gram":
        x = torch.randn(64, shape[-1], generator=draw)
        return x.T @ x / 64
    return torch.randn(shape, generator=draw).abs()


def case_of(table: str, name: str) -> RuleCase:
    more: dict[str, Any] = {"statistic": drawn, "is_ordered": name in ORDERED}
    if table == "measure" and MEASURES[name].after_mask:
        return RuleCase({"splice": {"kind": "score", "score": {"measure": name}}}, **more)
    if table == "measure":
        return RuleCase({"assess": {"measure": name}, "select": {"kind": "top_k"}, "densities": DENSITIES}, **more)
    if table == "selection":
        select = {"kind": name, "threshold": 0.05} if name == "threshold" else {"kind": name}
        return RuleCase({"select": select, "densities": DENSITIES}, **more)
    if table == "splice":
        return RuleCase({"splice": {"kind": name}}, **more, is_element_wise=True)
    if table == "operator":
        low, high = OPERATORS[name].experts
        n = min(max(low, 3), high or 3)
        options = {"expert": "e0"} if name == "passthrough" else {}
        return RuleCase({"operator": {"name": name, "options": options}}, n_experts=n, **more)
    return RuleCase({"post": [{"name": name}]}, **more)


ORDERED: set[str] = set()
NAMES = {"measure": MEASURES, "selection": SELECTIONS, "splice": SPLICES, "operator": OPERATORS, "post rule": POSTS}


@pytest.mark.parametrize(
    ("table", "name"), [pytest.param(t, n, id=f"{t}-{n}") for t, names in NAMES.items() for n in names]
)
class TestTables(RuleConformance):
    @pytest.fixture
    def case(self, table: str, name: str) -> RuleCase:
        return case_of(table, name)
