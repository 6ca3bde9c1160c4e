"""The model card of a merge that a study found."""

from __future__ import annotations

import optuna

from merge_search.objective import Objective
from merge_search.report.recipe_card import front_matter, how_to_load, recipe_sources, reproduce
from merge_search.report.table import sealed_table, summary_table
from merge_search.search.budget import questions_asked
from merge_search.search.records import Record, finished_records

__all__ = ["card"]


def card(study: optuna.Study, objective: Objective, record: Record, experts: tuple[str, ...], adapter: str = "") -> str:
    """README.md of an exported trial: what it is made of, how it was chosen and what it scored.

    Args:
        adapter: What a LoRA adapter made of it is; '' for whole weights.
    """
    recipe = record.recipe
    done = finished_records(study)
    failed = sum(not r.is_scored for r in done)
    table = summary_table(study, objective, experts)
    validated = str(record.number) in study.user_attrs.get("validation", {})
    note = "" if validated else f"\nTrial {record.number} itself was not scored on the validation questions.\n"
    made_by = recipe.preset or "a custom recipe"
    sealed = _sealed(study, objective, record, experts)
    return f"""{front_matter(recipe, adapter)}

# {study.study_name}: {record.name}

A merge of one base model and {len(experts)} experts, made by `{made_by}` and found by merge-search.

{recipe_sources(recipe)}

## Scores on the validation questions

{table.to_markdown()}
{note}
Search: {len(done)} trials, {failed} of them failed, {questions_asked(study)} questions asked. {sealed}

## Reproduce

{reproduce(adapter)}
sha256 of the {"whole " if adapter else ""}weights: `{record.weights_sha256}`
{how_to_load(recipe)}"""


def _sealed(study: optuna.Study, objective: Objective, record: Record, experts: tuple[str, ...]) -> str:
    """The test scores, if the test questions were opened."""
    if "test" not in study.user_attrs:
        return "The test questions were not opened."
    table = sealed_table(study, objective, experts)
    missing = str(record.number) not in study.user_attrs["test"]
    note = f" Trial {record.number} itself was not scored on them." if missing else ""
    return f"The test questions were opened once.{note}\n\n{table.to_markdown()}"
