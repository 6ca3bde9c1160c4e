"""Tests that a plug-in inherits: what an evaluator, a space, a rule, a statistic, a transform or an executor
promises.

Each test is one promise. A test file of your own derives a class and says in one fixture, `case`, what is tested:

    import pytest
    from merge_search.testing import SearchSpaceCase, SearchSpaceConformance, example_context

    class TestOneKnob(SearchSpaceConformance):
        @pytest.fixture
        def case(self):
            context = example_context()
            return SearchSpaceCase(lambda: OneKnob({"high": 2.0}, context), context)

pytest finds the inherited tests. Each test's name is a sentence and its docstring is the promise. The package's own
evaluators, spaces, rules and statistics pass the same tests. Importing this package imports neither pytest nor torch.
"""

from __future__ import annotations

from merge_search.testing.evaluator import EvaluatorCase, EvaluatorConformance
from merge_search.testing.executor import ExecutorCase, ExecutorConformance
from merge_search.testing.rule import RuleCase, RuleConformance
from merge_search.testing.space import SearchSpaceCase, SearchSpaceConformance, example_context
from merge_search.testing.statistic import StatisticCase, StatisticConformance
from merge_search.testing.transform import TransformCase, TransformConformance

__all__ = [
    "EvaluatorCase",
    "EvaluatorConformance",
    "ExecutorCase",
    "ExecutorConformance",
    "RuleCase",
    "RuleConformance",
    "SearchSpaceCase",
    "SearchSpaceConformance",
    "StatisticCase",
    "StatisticConformance",
    "TransformCase",
    "TransformConformance",
    "example_context",
]
