"""Tables of a study: base, experts, best baseline and best merges on the validation or test questions; all trials."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import optuna

from merge_search.objective import Objective, References, paired_interval
from merge_search.search.records import Record, candidates, finished_records, references_of
from merge_search.search.verdict.selection import (
    Standing,
    champions,
    failures,
    front,
    outdated_test,
    references_on,
    standings,
    tested,
)

__all__ = ["Table", "front_table", "sealed_table", "summary_table", "trials_table"]


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        header: Titles of the columns; the first is ``model``.
        rows: A text for every column.
        emphasised: Numbers of the rows of the winner or, with several objectives, of the front.
        verdict: A sentence that compares the winner with the best of the others.
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
    """Base, experts, best baseline and finalists on the validation questions, with standard errors."""
    best = [r.number for r in champions(study, objective, experts)]
    table = _table(study, objective, experts, best, "validation")
    return replace(table, verdict=table.verdict + _unscored(study, "validation", experts))


def sealed_table(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> Table:
    """The trials that the sealed test was opened for, on the test questions.

    The verdict says so if another trial has become the winner since.
    """
    table = _table(study, objective, experts, tested(study), "test")
    outdated = outdated_test(study, objective, experts)
    but = f" But {outdated}." if outdated else ""
    return replace(table, verdict=table.verdict + but + _unscored(study, "test", experts))


def _unscored(study: optuna.Study, split: str, experts: tuple[str, ...]) -> str:
    """Sentences about the models that could not be scored on `split`."""
    failed = failures(study, split)
    out = "".join(f" {name} could not be scored on the {split} questions: {why}." for name, why in failed.items())
    if {"base", *experts} & failed.keys():
        out += " Retention and constraints are measured against their scores on the search questions instead."
    again = "test" if split == "test" else "run"
    return f"{out} 'merge-search {again}' tries again." if failed else ""


def _table(study: optuna.Study, objective: Objective, experts: tuple[str, ...], best: list[int], split: str) -> Table:
    rows = standings(study, objective, experts, split=split)
    counted = {task: m for task, m in objective.main.items() if not m.member_of}
    others = {task: m for task, m in counted.items() if not {task, m.name} & set(objective.names)}
    texts = [*rows[0].violations] if rows else [c.text for c in objective.constraints]
    cells = []
    for row in rows:
        values = [_with_error(v, e) for v, e in zip(row.values, row.stderrs, strict=True)]
        scores = [row.evaluation.scores[m.name] for m in others.values()]
        held = [_held(row.violations[text].value, row.violations[text].stderr) for text in texts]
        cells.append([_title(row), *values, *(_with_error(s.score, s.stderr) for s in scores), *held])
    emphasised = tuple(i for i, row in enumerate(rows) if row.record.number in best)
    if len(objective.names) > 1:
        verdict = _front_verdict(rows, objective, split)
    else:
        verdict = _verdict(rows, objective, split, references_on(study, objective, experts, split))
    leaderless = _without_lead(study, objective, experts) if rows else set()
    titles = [f"{task} (no lead)" if task in leaderless else task for task in others]
    return Table(["model", *objective.names, *titles, *texts], cells, emphasised, verdict)


def _without_lead(study: optuna.Study, objective: Objective, experts: tuple[str, ...]) -> set[str]:
    """The tasks that the study's retention leaves out because no expert's lead over the base is real."""
    if not objective.lead or not {"mean_retention", "worst_retention"} & set(objective.names):
        return set()
    references = references_of(study, list(objective.metrics.values()), experts)
    return {m.task for m in objective.without_lead(references)}


def _held(excess: float, stderr: float) -> str:
    return "holds" if excess <= 0 else f"missed by {_with_error(excess, stderr)}"


def front_table(study: optuna.Study, objective: Objective) -> Table:
    """The front of the search questions: merges that no other merge beats in every objective."""
    full = [r for r in candidates(study) if r.outcome == "ok"]
    rows = front(full, objective)
    verdict = (
        f"{len(rows)} of {len(full)} merges that meet the constraints: no other is better in everything "
        "(search questions)."
    )
    return Table(["model", *objective.names], [_trial_row(r, len(objective.names)) for r in rows], (), verdict)


def trials_table(study: optuna.Study, objective: Objective, *, n: int | None = None) -> Table:
    """The best `n` trials (all if None) by the first objective on the search questions, then failures with reasons."""
    done = finished_records(study)
    scored = sorted(
        (r for r in done if r.is_scored), key=lambda r: (not r.feasible, -objective.key(r.values), r.number)
    )
    failed = [r for r in done if not r.is_scored]
    chosen = [*scored, *failed][:n]
    cells = [[*_trial_row(r, len(objective.names)), _note(r)] for r in chosen]
    counts = f"{len(done)} trials, {len(failed)} of them failed"
    verdict = f"{counts}; values on the search questions, the best are too good by luck."
    return Table(["model", *objective.names, ""], cells, (), verdict)


def _trial_row(r: Record, n: int) -> list[str]:
    if not r.is_scored:
        return [r.name, *("-" for _ in range(n))]
    noise = r.attributes.get("noise", {})
    variances = noise.get("values", [noise.get("value", math.nan)])
    return [r.name, *(_with_error(v, math.sqrt(e)) for v, e in zip(r.values, variances, strict=True))]


def _note(r: Record) -> str:
    if not r.is_scored:
        return f"{r.outcome}: {r.reason.splitlines()[0] if r.reason else ''}"
    if r.outcome == "raced":
        return "raced"
    return "" if r.feasible else "misses a constraint"


def _front_verdict(rows: list[Standing], objective: Objective, split: str) -> str:
    """A sentence that names the merges of the front."""
    merges = [r for r in rows if r.role in ("merge", "baseline")]
    kept = objective.front([r for r in merges if r.feasible])
    if not merges:
        return f"No merge has {split} scores."
    if not kept:
        return f"No merge meets the constraints on the {split} questions."
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
    """One sentence that compares the best searched merge with the best of the others."""
    merges = [r for r in rows if r.role == "merge"]
    rivals = [r for r in rows if r.role in ("expert", "baseline")]
    if not merges or not rivals or references is None:
        return _without_a_merge(rivals, objective, split)
    merge = max(merges, key=lambda r: (-r.excess, objective.key([r.expected])))
    rival = max([r for r in rivals if r.feasible] or rivals, key=lambda r: objective.key(r.values))
    missed = "".join(f" It misses {text!r} there." for text, v in merge.violations.items() if v.value > 0)
    name, weights = _comparison(objective, references)
    if not _can_be_paired(merge, rival, weights):
        return f"Best searched merge: {_title(merge)}; best of the others: {_title(rival)}.{missed}"
    n = sum(len(merge.evaluation.scores[m].values) for m in weights)
    comparison = _paired_comparison(merge, rival, objective, name, weights)
    return f"On {n} {split} questions the best searched merge is {comparison} (same questions, paired).{missed}"


def _without_a_merge(rivals: list[Standing], objective: Objective, split: str) -> str:
    best = max(rivals, key=lambda r: objective.key(r.values), default=None)
    others = "" if best is None else f" Best of the others: {_title(best)}."
    return f"No searched merge has {split} scores.{others}"


def _can_be_paired(a: Standing, b: Standing, weights: dict[str, float]) -> bool:
    """Whether both have means of at least two questions in every metric that they are compared by."""
    scores = [r.evaluation.scores[m] for r in (a, b) for m in weights]
    return bool(weights) and all(s.is_mean and len(s.values) > 1 for s in scores)


def _paired_comparison(
    merge: Standing, rival: Standing, objective: Objective, name: str, weights: dict[str, float]
) -> str:
    """How the merge compares with its rival on the same questions, with a 95 % interval of the difference."""
    gain, low, high = paired_interval(merge.evaluation, rival.evaluation, weights)
    if low > 0:
        word = "better than"
    elif high < 0:
        word = "worse than"
    else:
        word = "not distinguishable from"
    ends = sorted((objective.key([low]), objective.key([high])))
    interval = f"95 % interval [{ends[0]:+.3f}, {ends[1]:+.3f}]"
    return f"{word} {_title(rival)}: {name} {objective.key([gain]):+.3f}, {interval}"


def _comparison(objective: Objective, references: References) -> tuple[str, dict[str, float]]:
    """The quantity that two merges are compared by, and its weights over metrics, where larger is better.

    Returns:
        The objective, if it is a weighted sum of metrics. Otherwise (`worst`) the mean of the tasks' scores. The
        weights are empty if higher is not better in all of these.
    """
    weights = objective.weights(references)
    if weights is not None:
        return objective.names[0], weights
    skills = list(objective.skills.values())
    return "mean score", {m.name: 1 / len(skills) for m in skills if all(m.higher_is_better for m in skills)}
