"""Every statistic keeps what `merge_search.testing` says of statistics, and so does one of a user's file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_search.errors import MergeSearchError
from merge_search.rules import STATISTICS, use_rule_files
from merge_search.testing import StatisticCase, StatisticConformance

USERS = Path(__file__).parents[2] / "support" / "user_rules.py"
OPTIONS = ["effect@form=activation,partition=tensor", "effect@form=ablation", "cki_map@epochs=2,step_size=0.1"]


@pytest.mark.parametrize("kind", [*(n for n, row in STATISTICS.items() if not row.is_outside), *OPTIONS])
class TestTables(StatisticConformance):
    @pytest.fixture
    def case(self, kind: str) -> StatisticCase:
        return StatisticCase(kind)


@pytest.mark.parametrize("kind", ["signal", "signal@power=3.0"])
class TestUsersOwn(StatisticConformance):
    @pytest.fixture
    def case(self, kind: str) -> Iterator[StatisticCase]:
        use_rule_files([USERS])
        yield StatisticCase(kind)
        use_rule_files([])


FAULTY = """
import torch
from merge_search.rules import statistic

def of_losses(work):
    return {name: sum(weight * loss for weight, loss in work.each()) for name in work.views}

@statistic("draws")
def draws(work):
    "noise from torch's generator"
    return {name: loss + torch.rand(()) for name, loss in of_losses(work).items()}

@statistic("infinite")
def infinite(work):
    "a division by zero"
    return {name: loss / 0 for name, loss in of_losses(work).items()}

@statistic("nothing")
def nothing(work):
    "zeros"
    return {name: 0 * loss for name, loss in of_losses(work).items()}

@statistic("too_cheap", questions=0)
def too_cheap(work):
    "a forward pass that is not charged for"
    return of_losses(work)

@statistic("constant")
def constant(work):
    "the same for every expert"
    of_losses(work)
    return {name: torch.ones(()) for name in work.views}

@statistic("writes", reads="pair")
def writes(work):
    "into the expert"
    for name in work.views:
        work.models.expert(work.expert, name).mul_(2)
    return of_losses(work)

@statistic("trains")
def trains(work):
    "leaves the model in training mode"
    work.model.train()
    return of_losses(work)

@statistic("keeps")
def keeps(work):
    "leaves gradients"
    with torch.enable_grad():
        work.model.requires_grad_(True)
        for weight, loss in work.each():
            loss.backward()
    found = {name: p.grad.clone() for name, p in work.model.named_parameters()}
    work.model.requires_grad_(False)
    return found
"""


@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("draws", "test_the_same_weights_and_rows_give_the_same_bits"),
        ("draws", "test_global_random_generators_are_left_alone"),
        ("infinite", "test_it_measures_finite_numbers_of_merged_tensors"),
        ("nothing", "test_it_measures_finite_numbers_of_merged_tensors"),
        ("too_cheap", "test_its_questions_are_counted"),
        ("constant", "test_it_depends_on_the_weights"),
        ("writes", "test_base_and_experts_are_left_alone"),
        ("trains", "test_the_live_model_keeps_no_trace"),
        ("keeps", "test_the_live_model_keeps_no_trace"),
    ],
)
def test_a_fault_of_a_statistic_is_noticed(tmp_path: Path, name: str, test: str) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    use_rule_files([tmp_path / "faulty.py"])
    try:
        with pytest.raises((AssertionError, MergeSearchError)):
            getattr(StatisticConformance(), test)(StatisticCase(name))
    finally:
        use_rule_files([])
