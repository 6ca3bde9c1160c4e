"""Every rule of the tables keeps what `merge_search.testing` says of rules, and so do the rules of a user's file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_search.errors import MergeSearchError
from merge_search.rules import MEASURES, OPERATORS, POSTS, SELECTIONS, SPLICES, use_rule_files
from merge_search.testing import RuleCase, RuleConformance

DENSITIES = {f"e{i}": 0.5 for i in range(3)}
TABLES: dict[str, Any] = {
    "measure": MEASURES,
    "selection": SELECTIONS,
    "splice": SPLICES,
    "operator": OPERATORS,
    "post rule": POSTS,
}
ROWS = [pytest.param(t, n, id=f"{t}-{n}") for t, names in TABLES.items() for n in names if not names[n].is_outside]
USERS = Path(__file__).parent.parent / "support" / "user_rules.py"


def drawn(kind: str, expert: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """What was measured on data, of every kind: positive numbers, a Gram matrix of inputs, or a map of them."""
    draw = torch.Generator().manual_seed(sum(map(ord, kind + expert + name)))
    if kind == "gram" or (kind.startswith("prompt_gram") and len(shape) > 1):
        x = torch.randn(*shape[:-2], 64, shape[-1], generator=draw)
        return x.mT @ x / 64
    if kind.startswith("cki_map"):
        draw.manual_seed(0)  # one map of all experts
        return torch.randn((shape[-1] + 1, shape[-1]) if len(shape) == 2 else (2, 1), generator=draw)
    return torch.randn(shape, generator=draw).abs()


def case_of(table: str, name: str) -> RuleCase:
    ordered = getattr(TABLES[table][name], "ordered", False)
    more: dict[str, Any] = {"statistic": drawn, "is_ordered": ordered}
    if table == "measure" and (MEASURES[name].after_mask or MEASURES[name].per_tensor):
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
        more["has_pairs"] = OPERATORS[name].needs_factors
        return RuleCase({"operator": {"name": name, "options": options}}, n_experts=n, **more)
    return RuleCase({"post": [{"name": name}]}, **more)


@pytest.mark.parametrize(("table", "name"), ROWS)
class TestTables(RuleConformance):
    @pytest.fixture
    def case(self, table: str, name: str) -> RuleCase:
        return case_of(table, name)


USERS_OWN = [
    ("measure", "log_size"),
    ("selection", "above_mean"),
    ("selection", "lottery"),
    ("splice", "middle"),
    ("operator", "median"),
    ("operator", "halved"),
    ("post rule", "clipped"),
]


@pytest.mark.parametrize(("table", "name"), USERS_OWN)
class TestUsersOwn(RuleConformance):
    """The rules of a user's file, one of every kind."""

    @pytest.fixture
    def case(self, table: str, name: str) -> Iterator[RuleCase]:
        use_rule_files([USERS])
        yield case_of(table, name)
        use_rule_files([])


FAULTY = """
import torch
from merge_search.rules import splice

@splice("draws")
def draws(context):
    "noise from torch's generator"
    return context.deltas[0] * torch.rand(context.deltas[0].shape)

@splice("centred")
def centred(context):
    "not entry by entry"
    return context.deltas[0] - context.deltas[0].mean()

@splice("nothing")
def nothing(context):
    "zeros"
    return torch.zeros_like(context.deltas[0])

@splice("infinite")
def infinite(context):
    "a division by zero"
    return context.deltas[0] / torch.zeros_like(context.deltas[0])
"""


@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("draws", "test_the_same_recipe_gives_the_same_bits"),
        ("draws", "test_global_random_generators_are_left_alone"),
        ("centred", "test_entries_are_merged_alone_where_the_rule_says_so"),
        ("nothing", "test_the_rule_does_something"),
        ("infinite", "test_every_merged_tensor_is_finite_and_has_the_shape_and_dtype_of_the_base"),
    ],
)
def test_a_fault_of_a_rule_is_noticed(tmp_path: Path, name: str, test: str) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    use_rule_files([tmp_path / "faulty.py"])
    try:
        with pytest.raises((AssertionError, MergeSearchError)):
            getattr(RuleConformance(), test)(case_of("splice", name))
    finally:
        use_rule_files([])
