"""Find settings that make a search pointless, before it costs anything. Each sentence has the number that would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import optuna
from optuna.trial import TrialState

from merge_search.evaluation import AnswerEnds, Split, window
from merge_search.objective import Constraint, Objective, References
from merge_search.search.records import Record
from merge_search.space import Parameter
from merge_search.study_file import Search

__all__ = [
    "MAX_DIMENSIONS",
    "answer_notes",
    "budget_notes",
    "constraint_notes",
    "late_baseline_notes",
    "nearest_miss",
    "question_notes",
    "search_problems",
]

MAX_DIMENSIONS = 1000
"""The most parameters of a space. Every parameter of every trial is a row of the storage, and a surrogate model of more
parameters learns nothing from the trials of a study."""

MOST_BROKEN = 0.2
"""Share of the answers of base or an expert, cut or empty, above which the user is warned."""


def search_problems(
    search: Search, parameters: Mapping[str, Parameter], objective: Objective, fidelity: float = 1.0
) -> list[str]:
    """A sentence for each reason why these settings make no search. `fidelity` is the share of the questions asked."""
    out = []
    n = len(parameters)
    if n == 0:
        out.append("space: nothing varies: it has 0 dimensions and needs at least 1")
    if n > MAX_DIMENSIONS:
        out.append(
            f"space: it has {n} dimensions, and at most {MAX_DIMENSIONS} can be searched trial by trial; write "
            "coefficients per: block or expert, and let search.learner fit the finer ones by gradient"
        )
    if search.stop is not None and len(objective.names) > 1:
        out.append(
            f"search.stop: needs one objective, found {len(objective.names)} ({', '.join(objective.names)}); make all "
            "but one of them constraints, or leave stop out"
        )
    return out + _racing_problems(search, objective, fidelity)


def _racing_problems(search: Search, objective: Objective, fidelity: float) -> list[str]:
    """A sentence for each metric that cannot be raced: a look must ask more questions than the one before."""
    if search.racing is None:
        return []
    looks, out = [*search.racing.looks, 1.0], []
    for m in objective.metrics.values():
        n = m.n_questions.get(Split.SEARCH, 0)
        asked = [window(n, look * fidelity).stop for look in looks]
        if n == 1:
            out.append(f"search.racing: {m.name!r} is one number and cannot be compared in parts; leave racing out")
        elif len(set(asked)) < len(asked):
            out.append(
                f"search.racing: every look must ask more questions than the one before, found {asked[:-1]}, at last "
                f"{asked[-1]}, of the {n} search questions of {m.name!r}; name fewer looks or ask more questions"
            )
    return out


def budget_notes(n_first: int, n_trials: int) -> list[str]:
    """A sentence if the baselines and first points leave no trial for the sampler."""
    if n_trials > n_first:
        return []
    return [
        f"n_trials is {n_trials}, and {n_first} baselines and start points come first: nothing is left for the "
        f"sampler. At least {n_first + 1} lets it begin; name fewer search.baselines for a shorter start"
    ]


def late_baseline_notes(late: Sequence[str], n_finished: int, n_trials: int) -> list[str]:
    """A sentence about the baselines, by name, that were added to the study file after the study began."""
    if not late:
        return []
    what = f"search.baselines names {', '.join(late)} only since the start of this study"
    if n_finished + len(late) <= n_trials:
        return [f"{what}: tried now, before the search goes on"]
    return [
        f"{what}, and {n_finished} of n_trials {n_trials} are finished: at least {n_finished + len(late)} lets all of "
        "them be tried"
    ]


def question_notes(budget: int | None, n_baselines: int, per_trial: int, per_step: int, *, fits: int = 0) -> list[str]:
    """A sentence if the budget in questions does not pay for a trial after the baselines.

    Args:
        budget: The budget in questions; None if there is none.
        n_baselines: Number of baselines, which come first.
        per_trial: Questions that scoring one trial asks.
        per_step: Questions of one step of the first fit; 0 without a learner.
        fits: Questions that the baselines' own fits ask.
    """
    first = n_baselines * per_trial + fits
    needs = first + per_trial + per_step
    if budget is None or budget >= needs:
        return []
    fit = f" and {per_step} for one step of its fit" if per_step else ""
    fitted = f" and {fits} for their fits" if fits else ""
    return [
        f"search.questions is {budget}, and {n_baselines} baselines come first, which ask {per_trial} each{fitted}, "
        f"{first} together: that does not pay for a trial of the search, {per_trial} more{fit}. At least {needs} would"
    ]


def answer_notes(answers: Mapping[str, Mapping[str, AnswerEnds]]) -> list[str]:
    """A sentence for each task that generates: how many answers of base and experts were cut or are empty.

    Where it is more than a fifth for one of them, the sentence says what to change.

    Args:
        answers: Base or expert -> task -> how its answers ended.
    """
    return [_about_answers(t, answers) for t in dict.fromkeys(t for by_task in answers.values() for t in by_task)]


def _about_answers(task: str, answers: Mapping[str, Mapping[str, AnswerEnds]]) -> str:
    ends = {name: by_task[task] for name, by_task in answers.items() if by_task.get(task, AnswerEnds()).n}
    cut = {name: e.cut / e.n for name, e in ends.items()}
    empty = {name: e.empty / e.n for name, e in ends.items()}
    text = f"answers to {task} that hit the length limit: {_percent(cut)}; empty: {_percent(empty)}"
    if max(cut.values(), default=0.0) > MOST_BROKEN:
        text += (
            f". WARNING: what is cut is scored as it is; raise gen_kwargs.max_gen_toks (task_options.{task}), or let "
            "the model think less (enable_thinking: false)"
        )
    if max(empty.values(), default=0.0) > MOST_BROKEN:
        text += (
            f". WARNING: empty answers score nothing; see gen_kwargs.until, think_end_token and apply_chat_template "
            f"(task_options.{task})"
        )
    return text


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())


def constraint_notes(records: Sequence[Record], objective: Objective, references: References) -> list[str]:
    """A sentence for every constraint that no scored trial meets, or one if no trial meets all of them together.

    Args:
        records: The trials, usually the baselines.
        objective: It has the constraints.
        references: Scores of base and experts.
    """
    scored = [r for r in records if r.is_scored]
    constraints = objective.constraints_on(references)
    if not scored or not constraints:
        return []
    violations = {r.number: objective.violations(r.evaluation, references) for r in scored}
    out = []
    for c in constraints:
        nearest = min(scored, key=lambda r: violations[r.number][c.text].value)
        if violations[nearest.number][c.text].value > 0:
            out.append(_unmet(c, nearest, objective, references, len(scored)))
    if not out and not any(r.feasible for r in scored):
        nearest = min(scored, key=lambda r: max(v.value for v in violations[r.number].values()))
        missed = ", ".join(f"{text} by {v.value:.3g}" for text, v in violations[nearest.number].items() if v.value > 0)
        out.append(
            f"no baseline meets all {len(constraints)} constraints at once; {nearest.name} comes nearest and "
            f"misses {missed}"
        )
    return out


def nearest_miss(study: optuna.Study) -> str:
    """A sentence about the nearest merge if no searched merge meets the constraints; '' otherwise."""
    scored = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if "label" not in t.user_attrs]
    if not scored or any(all(v <= 0 for v in t.constraints.values()) for t in scored):
        return ""
    nearest = min(scored, key=lambda t: (max(t.constraints.values()), t.number))
    missed = ", ".join(f"{text!r} by {v:.3g}" for text, v in nearest.constraints.items() if v > 0)
    return (
        f"none of {len(scored)} searched merges meets the constraints; trial {nearest.number} comes nearest and misses "
        f"{missed}. Relax what it misses, or give the search more trials"
    )


def _unmet(c: Constraint, nearest: Record, objective: Objective, references: References, n: int) -> str:
    """A sentence about the constraint `c`, which none of `n` baselines meets, with the bound that would hold."""
    estimate = objective.estimate(c.name, nearest.evaluation, references)
    anchor = objective.anchor(c, references)
    would_do = estimate.value
    if c.anchor:
        offset = would_do - anchor
        bound = f"{c.anchor} {'-' if offset < 0 else '+'} {abs(offset):.3g}"
    else:
        bound = f"{would_do:.4g}"
    target = anchor + c.offset
    return (
        f"constraint {c.text!r} (here {c.sign} {target:.4g}) is met by none of the {n} baselines: {nearest.name} comes "
        f"nearest with {estimate.value:.4g} ±{estimate.stderr:.2g}. The search goes on and may find one that does; "
        f"'{c.name} {c.sign} {bound}' would already hold"
    )
