"""The final table and the model card: base, experts, best baseline and best merges on the validation questions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import optuna

from merge_search.objective import Objective
from merge_search.recipe import Recipe
from merge_search.search.records import Record, finished_records
from merge_search.search.selection import Standing, paired_difference, standings, winner

__all__ = ["Table", "card", "recipe_card", "sealed_table", "summary_table"]


@dataclass(frozen=True)
class Table:
    """Text cells, header first column ``model``; `verdict` compares the winner with the best it had to beat."""

    header: list[str]
    rows: list[list[str]]
    emphasised: int | None
    verdict: str

    def to_markdown(self) -> str:
        """GitHub-flavoured table, the winner in bold, the verdict below."""
        lines = ["| " + " | ".join(self.header) + " |", "|" + "---|" * len(self.header)]
        for i, row in enumerate(self.rows):
            cells = [f"**{c}**" for c in row] if i == self.emphasised else row
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", self.verdict])


def summary_table(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> Table:
    """Validation: rows in the order base, experts, best baseline, finalists; scores with standard errors."""
    best = winner(study, objective, experts)
    number = None if best is None else best.number
    return _table(standings(study, objective, experts), objective, number, "validation")


def sealed_table(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> Table:
    """Test: the same for what the sealed test was opened for."""
    rows = standings(study, objective, experts, split="test")
    return _table(rows, objective, study.user_attrs.get("test_winner"), "test")


def _table(rows: list[Standing], objective: Objective, best: int | None, split: str) -> Table:
    header = ["model", *objective.names, *objective.main]
    cells, emphasised = [], None
    for i, row in enumerate(rows):
        if row.record.number == best:
            emphasised = i
        values = [_with_error(v, e) for v, e in zip(row.values, row.stderrs, strict=True)]
        scores = [row.evaluation.scores[m.name] for m in objective.main.values()]
        cells.append([_title(row), *values, *(_with_error(s.score, s.stderr) for s in scores)])
    return Table(header, cells, emphasised, _verdict(rows, objective, split))


def _title(row: Standing) -> str:
    match row.role:
        case "base":
            return "base"
        case "merge":
            kind = row.record.label or row.record.recipe.preset
            return f"merge: trial {row.record.number} ({kind})"
        case role:
            return f"{role}: {row.record.label}"


def _with_error(value: float, stderr: float) -> str:
    return f"{value:.3f}" + (f" ±{stderr:.3f}" if math.isfinite(stderr) and stderr > 0 else "")


def _verdict(rows: list[Standing], objective: Objective, split: str) -> str:
    """One sentence: the best searched merge against the best of the others, paired, with a 95 % interval."""
    merges = [r for r in rows if r.role == "merge"]
    rivals = [r for r in rows if r.role in ("expert", "baseline")]
    if not merges or not rivals:
        return f"No searched merge has {split} scores."
    merge = max(merges, key=lambda r: objective.key(r.values))
    rival = max(rivals, key=lambda r: objective.key(r.values))
    metrics = list(objective.main.values())
    if not all(m.higher_is_better for m in metrics):
        return f"Best searched merge: {_title(merge)}; best of the others: {_title(rival)}."
    mean, se = paired_difference(merge.evaluation, rival.evaluation, [m.name for m in metrics])
    low, high = mean - 1.96 * se, mean + 1.96 * se
    word = "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"
    n = sum(len(merge.evaluation.scores[m.name].values) for m in metrics)
    return (
        f"On {n} {split} questions the best searched merge is {word} {_title(rival)}: mean score {mean:+.3f}, "
        f"95 % interval [{low:+.3f}, {high:+.3f}] (same questions, paired)."
    )


def card(study: optuna.Study, objective: Objective, record: Record, experts: tuple[str, ...]) -> str:
    """README.md of an exported model: what it is made of, how it was chosen, what it scored."""
    recipe = record.recipe
    done = finished_records(study)
    failed = sum(not r.is_scored for r in done)
    questions = sum(r.cost.questions for r in done)
    table = summary_table(study, objective, experts)
    sources = _sources(recipe)
    validated = str(record.number) in study.user_attrs.get("validation", {})
    note = "" if validated else f"\nTrial {record.number} itself was not scored on the validation questions.\n"
    return f"""---
library_name: transformers
tags: [merge, merge-search]
---

# {study.study_name}: {record.name}

A merge of one base model and {len(experts)} experts, made by `{recipe.preset or "a custom recipe"}` and found by merge-search.

{sources}

## Scores on the validation questions

{table.to_markdown()}
{note}
Search: {len(done)} trials, {failed} of them failed, {questions} questions asked. {_sealed(study, objective, experts)}

## Reproduce

`recipe.json` holds the whole recipe: `merge-search merge recipe.json OUT` gives these weights, bit for bit.
sha256 of the weights: `{record.weights_sha256}`
"""


def _sealed(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> str:
    if "test" not in study.user_attrs:
        return "The test questions were not opened."
    table = sealed_table(study, objective, experts)
    return f"The test questions were opened once:\n\n{table.to_markdown()}"


def recipe_card(recipe: Recipe) -> str:
    """README.md of a model made from a recipe alone: no scores are known."""
    return f"""---
library_name: transformers
tags: [merge, merge-search]
---

# A merge by {recipe.preset or "a custom recipe"}

{_sources(recipe)}

`recipe.json` holds the whole recipe: `merge-search merge recipe.json OUT` gives these weights, bit for bit.
"""


def _sources(recipe: Recipe) -> str:
    return "\n".join(
        f"- {name}: `{ref}`" for name, ref in {"base": recipe.models.base, **recipe.models.experts}.items()
    )
