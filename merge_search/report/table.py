"""Tables and the model card: base, experts, best baseline and best merges on the validation questions; all trials."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import optuna

from merge_search.objective import Objective, References
from merge_search.report.model_card import recipe_sources
from merge_search.search.records import Record, finished_records, questions_asked
from merge_search.search.verdict.selection import (
    Standing,
    candidates,
    champions,
    failures,
    front,
    outdated_test,
    paired_difference,
    references_on,
    standings,
    tested,
)

__all__ = ["Table", "card", "front_table", "sealed_table", "summary_table", "trials_table"]


@dataclass(frozen=True)
class Table:
    """Text cells, header first column ``model``; `verdict` compares the winner with the best it had to beat.

    Attributes:
        emphasised: Numbers of the rows of the winner or, with several objectives, of the front.
    """

    header: list[str]
    rows: list[list[str]]
    emphasised: tuple[int, ...]
    verdict: str

    def to_markdown(self) -> str:
        """GitHub-flavoured table, the winner in bold, the verdict below."""
        lines = ["| " + " | ".join(self.header) + " |", "|" + "---|" * len(self.header)]
        for i, row in enumerate(self.rows):
            cells = [f"**{c}**" for c in row] if i in self.emphasised else row
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", self.verdict])


def summary_table(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> Table:
    """Validation: rows in the order base, experts, best baseline, finalists; scores with standard errors."""
    best = [r.number for r in champions(study, objective, experts)]
    table = _table(study, objective, experts, best, "validation")
    return replace(table, verdict=table.verdict + _unscored(study, "validation", experts))


def sealed_table(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> Table:
    """Test: the same for what the sealed test was opened for; the verdict says so where that is no more the winner."""
    table = _table(study, objective, experts, tested(study), "test")
    outdated = outdated_test(study, objective, experts)
    but = f" But {outdated}." if outdated else ""
    return replace(table, verdict=table.verdict + but + _unscored(study, "test", experts))


def _unscored(study: optuna.Study, split: str, experts: tuple[str, ...]) -> str:
    """Sentences on what should stand in the table of `split` and does not."""
    failed = failures(study, split)
    out = "".join(f" {name} could not be scored on the {split} questions: {why}." for name, why in failed.items())
    if {"base", *experts} & failed.keys():
        out += " What is measured against base and experts is measured against their scores on the search questions instead."
    again = "test" if split == "test" else "run"
    return f"{out} 'merge-search {again}' tries again." if failed else ""


def _table(study: optuna.Study, objective: Objective, experts: tuple[str, ...], best: list[int], split: str) -> Table:
    rows = standings(study, objective, experts, split=split)
    own = {task: m for task, m in objective.main.items() if not {task, m.name} & set(objective.names)}
    texts = [c.text for c in objective.constraints]
    cells = []
    for row in rows:
        values = [_with_error(v, e) for v, e in zip(row.values, row.stderrs, strict=True)]
        scores = [row.evaluation.scores[m.name] for m in own.values()]
        held = [_held(row.violations[text].value, row.violations[text].stderr) for text in texts]
        cells.append([_title(row), *values, *(_with_error(s.score, s.stderr) for s in scores), *held])
    emphasised = tuple(i for i, row in enumerate(rows) if row.record.number in best)
    if len(objective.names) > 1:
        verdict = _front_verdict(rows, objective, split)
    else:
        verdict = _verdict(rows, objective, split, references_on(study, objective, experts, split))
    return Table(["model", *objective.names, *own, *texts], cells, emphasised, verdict)


def _held(excess: float, stderr: float) -> str:
    return "holds" if excess <= 0 else f"missed by {_with_error(excess, stderr)}"


def front_table(study: optuna.Study, objective: Objective) -> Table:
    """The merges that no other merge beats in everything on the search questions; with one objective, the best."""
    full = [r for r in candidates(study) if r.outcome == "ok"]
    rows = front(full, objective)
    verdict = f"{len(rows)} of {len(full)} merges that meet the constraints: no other is better in everything (search questions)."
    return Table(["model", *objective.names], [_trial_row(r, len(objective.names)) for r in rows], (), verdict)


def trials_table(study: optuna.Study, objective: Objective, *, n: int | None = None) -> Table:
    """The best `n` trials (all if None) by the first objective on the search questions; failures last, with their reasons."""
    done = finished_records(study)
    scored = sorted(
        (r for r in done if r.is_scored), key=lambda r: (not r.feasible, -objective.key(r.values), r.number)
    )
    failed = [r for r in done if not r.is_scored]
    chosen = [*scored, *failed][:n]
    cells = [[*_trial_row(r, len(objective.names)), _note(r)] for r in chosen]
    verdict = f"{len(done)} trials, {len(failed)} of them failed; values on the search questions, the best are too good by luck."
    return Table(["model", *objective.names, ""], cells, (), verdict)


def _trial_row(r: Record, n: int) -> list[str]:
    if not r.is_scored:
        return [_searched(r), *("-" for _ in range(n))]
    noise = r.attributes.get("noise", {})
    variances = noise.get("values", [noise.get("value", math.nan)])
    return [_searched(r), *(_with_error(v, math.sqrt(e)) for v, e in zip(r.values, variances, strict=True))]


def _searched(r: Record) -> str:
    return r.label or f"trial {r.number}"


def _note(r: Record) -> str:
    if not r.is_scored:
        return f"{r.outcome}: {r.reason.splitlines()[0] if r.reason else ''}"
    return "raced" if r.outcome == "raced" else "" if r.feasible else "misses a constraint"


def _front_verdict(rows: list[Standing], objective: Objective, split: str) -> str:
    """Which merges are left when those that another one beats in everything are taken away."""
    merges = [r for r in rows if r.role in ("merge", "baseline")]
    kept = objective.front([r for r in merges if r.feasible])
    if not kept:
        return (
            f"No merge meets the constraints on the {split} questions." if merges else f"No merge has {split} scores."
        )
    return (
        f"{len(kept)} merge(s) that no other beats in everything on the {split} questions: "
        f"{', '.join(map(_title, kept))}. Choose one by its trial's number."
    )


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


def _verdict(rows: list[Standing], objective: Objective, split: str, references: References | None) -> str:
    """One sentence: the best searched merge against the best of the others, paired, with a 95 % interval."""
    merges = [r for r in rows if r.role == "merge"]
    rivals = [r for r in rows if r.role in ("expert", "baseline")]
    if not merges or not rivals or references is None:
        others = max(rivals, key=lambda r: objective.key(r.values), default=None)
        best = f" Best of the others: {_title(others)}." if others else ""
        return f"No searched merge has {split} scores.{best}"
    merge = max(merges, key=lambda r: (-r.excess, objective.key([r.expected])))
    rival = max([r for r in rivals if r.feasible] or rivals, key=lambda r: objective.key(r.values))
    missed = "".join(f" It misses {text!r} there." for text, v in merge.violations.items() if v.value > 0)
    name, weights = _comparison(objective, references)
    scores = [r.evaluation.scores[m] for r in (merge, rival) for m in weights]
    if not weights or not all(s.is_mean and len(s.values) > 1 for s in scores):
        return f"Best searched merge: {_title(merge)}; best of the others: {_title(rival)}.{missed}"
    gain, se = paired_difference(merge.evaluation, rival.evaluation, weights)
    low, high = gain - 1.96 * se, gain + 1.96 * se
    word = "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"
    ends = sorted((objective.key([low]), objective.key([high])))
    n = sum(len(merge.evaluation.scores[m].values) for m in weights)
    return (
        f"On {n} {split} questions the best searched merge is {word} {_title(rival)}: {name} {objective.key([gain]):+.3f}, "
        f"95 % interval [{ends[0]:+.3f}, {ends[1]:+.3f}] (same questions, paired).{missed}"
    )


def _comparison(objective: Objective, references: References) -> tuple[str, dict[str, float]]:
    """What two merges are compared by, and its weights, larger better: the objective where it is a weighted sum of metrics.

    Else (`worst`) the mean of the tasks' scores, where higher is better in all; else no weights.
    """
    weights = objective.weights(references)
    if weights is not None:
        return objective.names[0], weights
    skills = list(objective.skills.values())
    return "mean score", {m.name: 1 / len(skills) for m in skills if all(m.higher_is_better for m in skills)}


def card(study: optuna.Study, objective: Objective, record: Record, experts: tuple[str, ...]) -> str:
    """README.md of an exported model: what it is made of, how it was chosen, what it scored."""
    recipe = record.recipe
    done = finished_records(study)
    failed = sum(not r.is_scored for r in done)
    table = summary_table(study, objective, experts)
    sources = recipe_sources(recipe)
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
Search: {len(done)} trials, {failed} of them failed, {questions_asked(study)} questions asked. {_sealed(study, objective, record, experts)}

## Reproduce

`recipe.json` holds the whole recipe: `merge-search merge recipe.json OUT` gives these weights, bit for bit.
sha256 of the weights: `{record.weights_sha256}`
"""


def _sealed(study: optuna.Study, objective: Objective, record: Record, experts: tuple[str, ...]) -> str:
    if "test" not in study.user_attrs:
        return "The test questions were not opened."
    table = sealed_table(study, objective, experts)
    missing = str(record.number) not in study.user_attrs["test"]
    note = f" Trial {record.number} itself was not scored on them." if missing else ""
    return f"The test questions were opened once.{note}\n\n{table.to_markdown()}"
