"""Every rule that a recipe may name, in tables: measures, selections, splices, operators, post
rules, transforms, statistics, granularities of fits. torch-free.

A row says what the rest of the code asks about a rule. The engine has the formulas of the built-in ones; a rule from
outside is one decorated function and is the same thing (`decorators`). Rule files are run where a study file or a
recipe names them (`files`).

    >>> from merge_search.rules import SELECTIONS
    >>> SELECTIONS["bernoulli"].is_random, SELECTIONS["bernoulli"].uses_scores
    (True, False)
"""

from collections.abc import Mapping
from typing import Any

from merge_search.rules.decorators import granularity, measure, operator, post, selection, splice, statistic, transform
from merge_search.rules.files import RuleFile, find_rule_files, in_use, use_rule_files
from merge_search.rules.granularities import GRANULARITIES, GranularityInfo
from merge_search.rules.measures import MEASURES, Measure, measure_problems
from merge_search.rules.operators import OPERATORS, POSTS, OperatorInfo, operator_problems
from merge_search.rules.stages import SELECTIONS, SPLICES, STAGES, Selection, Splicing
from merge_search.rules.statistics import STATISTICS, StatisticInfo, statistic_named
from merge_search.rules.table import OptionInfo, Origin, Rule, RuleTable, option_problems
from merge_search.rules.transforms import TRANSFORMS, Preview, Transformed, TransformInfo

TABLES: Mapping[str, RuleTable[Any]] = {
    "measures: assess, splice.score, allocate": MEASURES,
    "selections: select": SELECTIONS,
    "splices: splice": SPLICES,
    "operators: operator": OPERATORS,
    "post rules: post": POSTS,
    "transforms: transform": TRANSFORMS,
    "statistics: read by measures and operators": STATISTICS,
    "granularities: learner.per": GRANULARITIES,
    "stages: options of every preset that reads them": STAGES,
}
"""Every table, by its title in lists."""

__all__ = [
    "GRANULARITIES",
    "MEASURES",
    "OPERATORS",
    "POSTS",
    "SELECTIONS",
    "SPLICES",
    "STAGES",
    "STATISTICS",
    "TABLES",
    "TRANSFORMS",
    "GranularityInfo",
    "Measure",
    "OperatorInfo",
    "OptionInfo",
    "Origin",
    "Preview",
    "Rule",
    "RuleFile",
    "RuleTable",
    "Selection",
    "Splicing",
    "StatisticInfo",
    "TransformInfo",
    "Transformed",
    "find_rule_files",
    "granularity",
    "in_use",
    "measure",
    "measure_problems",
    "operator",
    "operator_problems",
    "option_problems",
    "post",
    "selection",
    "splice",
    "statistic",
    "statistic_named",
    "transform",
    "use_rule_files",
]
