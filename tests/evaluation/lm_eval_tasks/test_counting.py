"""What lm-eval's evaluator has asked, also where a call of it fails on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_lm import TASKS, N, bound

from merge_search.errors import EvaluationError
from merge_search.evaluation import Split

pytestmark = pytest.mark.usefixtures("own_dataset_cache")


def dies_at_call(number: int, call: Callable[..., Any]) -> Callable[..., Any]:
    left = iter(range(number - 1))

    def counted(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise RuntimeError("the third batch is too much")
        return call(*arguments, **named)

    return counted


@pytest.mark.parametrize(
    ("task", "packed", "method", "n_asked"),
    [
        ("t_choice", True, "packed._run", 2 * 8),
        ("t_choice", False, "lm._model_call", 2 * 8 // 4),
        ("t_rolling", True, "lm._model_call", 2 * 8),
        ("t_generate", True, "lm._model_generate", 2 * 8),
    ],
)
def test_what_was_answered_before_a_failure_is_counted_batch_by_batch(
    scored_folder: Path, monkeypatch: pytest.MonkeyPatch, task: str, packed: bool, method: str, n_asked: int
) -> None:
    e = bound(scored_folder, [task], batch_size=8, tree_packing=packed)
    owner, name = method.split(".")
    with monkeypatch.context() as patch:
        found = getattr(e._live, owner)
        patch.setattr(found, name, dies_at_call(3, getattr(found, name)))
        with pytest.raises(EvaluationError, match="the third batch"):
            e.evaluate(Split.SEARCH)
    assert e.n_asked == n_asked
    assert e.evaluate(Split.SEARCH).cost.questions == N
    assert e.n_asked == n_asked + N


def test_all_that_a_call_asks_is_counted_once(scored_folder: Path) -> None:
    e = bound(scored_folder, list(TASKS))
    assert e.evaluate(Split.SEARCH, 0.5).cost.questions == e.n_asked == len(TASKS) * N // 2
