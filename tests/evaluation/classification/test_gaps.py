"""Group gaps of classifiers: their values, errors, pairing, and a search that trades accuracy for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml
from command_line import here
from tiny_encoder import SHARES, bound, make_encoder, make_tokenizer, options, sentences, write_rows

from evaluators.classification.evaluator import Classification
from evaluators.classification.gaps import gap_scores
from merge_search.errors import StudyFileError
from merge_search.evaluation import Evaluation, Scores, Split, SplitShares
from merge_search.objective import Objective, References, paired_difference, variance_of
from merge_search.search.records import finished_records, objective_of
from merge_search.search.trial.racing import comparable_weights

#                 group a            group b
GROUPS = [*"aaaaa", *"bbbb"]
LABELS = np.array([1, 1, 0, 0, 0, 1, 1, 0, 0])
PREDICTED = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0])
IDS = tuple("123456789")


def gap(predicted: Any = PREDICTED, groups: Any = GROUPS, labels: Any = None, n_classes: int = 2) -> Scores:
    return gap_scores(tuple(map(str, range(len(groups)))), groups, np.asarray(predicted), n_classes, labels)


def test_parity_is_the_difference_of_shares_of_a_predicted_class() -> None:
    assert gap().score == pytest.approx(3 / 5 - 1 / 4)
    assert gap(PREDICTED[::-1], GROUPS[::-1]).score == gap().score
    assert gap(1 - PREDICTED).score == pytest.approx(3 / 5 - 1 / 4), "the classes' names do not matter"


def test_odds_is_the_larger_of_the_differences_of_true_and_false_positive_rates() -> None:
    true, false = 2 / 2 - 1 / 2, 1 / 3 - 0 / 2
    assert gap(labels=LABELS).score == pytest.approx(max(true, false))
    assert gap(LABELS, labels=LABELS).score == 0.0, "right answers have no odds gap whatever the groups' shares"


def test_of_many_classes_and_groups_the_largest_difference_counts() -> None:
    predicted, groups = [0, 1, 2, 2, 0, 0, 2, 2, 1, 1, 2, 2], [*"aaaa", *"bbbb", *"cccc"]
    # shares of class 0: 1/4, 2/4, 0; of class 1: 1/4, 0, 2/4; of class 2: all 2/4
    assert gap(predicted, groups, n_classes=3).score == 0.5
    assert gap([2, 2, 2, 2, 2, 2, 2, 0], [*"aaaa", *"bbbb"], n_classes=3).score == 0.25


def test_the_error_is_that_of_a_difference_of_two_shares_and_certain_rates_claim_no_certainty() -> None:
    smoothed = [(3.5 / 6, 5), (1.5 / 5, 4)]
    assert gap().stderr ** 2 == pytest.approx(sum(p * (1 - p) / n for p, n in smoothed))
    assert gap(np.zeros(9, int)).stderr > 0.1
    assert variance_of(gap(np.zeros(9, int))) == gap(np.zeros(9, int)).stderr ** 2


def test_the_values_average_to_the_gap_and_spread_like_its_sampling_error() -> None:
    rng = np.random.default_rng(0)
    groups = np.where(rng.random(900) < 0.3, "a", "b")
    p = np.where(groups == "a", 0.7, 0.4)
    found = [gap((rng.random(900) < p).astype(int), groups) for _ in range(400)]
    spread = np.std([s.score for s in found])
    assert all(s.values.mean() == pytest.approx(s.score, abs=1e-9) and s.is_mean for s in found)
    assert np.mean([s.stderr for s in found]) == pytest.approx(spread, rel=0.1)
    assert np.mean([s.values.std() / 30 for s in found]) == pytest.approx(spread, rel=0.1)


def test_pairing_two_merges_that_mostly_agree_gives_the_error_of_their_difference() -> None:
    rng = np.random.default_rng(1)
    groups = np.where(rng.random(800) < 0.5, "a", "b")
    differences, errors = [], []
    for _ in range(300):
        one = (rng.random(800) < np.where(groups == "a", 0.8, 0.3)).astype(int)
        two = np.where((rng.random(800) < 0.1) & (groups == "a"), 0, one)
        a, b = (Evaluation(Split.SEARCH, 1.0, {"t/parity_gap": gap(p, groups)}) for p in (one, two))
        difference, error = paired_difference(a, b, {"t/parity_gap": 1.0})
        differences.append(difference)
        errors.append(error)
    assert np.mean(differences) == pytest.approx(0.08, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.15)
    assert np.mean(errors) < 0.5 * gap(one, groups).stderr, "unpaired, the error would be far larger"


def test_groups_that_were_not_asked_leave_the_gap_unknown() -> None:
    assert (gap([1, 0], [*"aa"]).score, gap([1, 0], [*"aa"]).stderr) == (0.0, 0.5)
    alone = gap([1, 0, 1], [*"aab"], labels=np.array([0, 0, 1]))
    assert (alone.score, alone.stderr) == (0.0, 0.5), "no label has questions of both groups"


def test_gaps_are_stored_and_are_never_joined() -> None:
    evaluation = Evaluation(Split.SEARCH, 1.0, {"t/parity_gap": gap()})
    again = Evaluation.from_attribute(json.loads(json.dumps(evaluation.to_attribute()))).scores["t/parity_gap"]
    assert (again.score, again.stderr, again.is_linearised) == (gap().score, gap().stderr, True)
    assert again.is_mean
    assert not again.is_joinable
    infos = _infos(["t/parity_gap"])
    objective = Objective([], ["t/parity_gap"], [], infos)
    references = References({"t/parity_gap": 0.1}, {"t/parity_gap": 0.1}, {"t/parity_gap": "e"}, 1.0)
    assert comparable_weights(objective, references, [evaluation]) is None, "racing joins parts"


def _infos(names: list[str]) -> list[Any]:
    from merge_search.evaluation import MetricInfo

    return [MetricInfo(*name.split("/"), False, {Split.SEARCH: 9}) for name in names]


# --- as metrics of a task ---------------------------------------------------------------------------------------------


def grouped(folder: Path, n: int = 120, **animal: Any) -> dict[str, Any]:
    rows = [{**row, "dialect": ["north", "south"][i % 3 == 0]} for i, row in enumerate(sentences(n, 2, seed=5))]
    write_rows(folder / "animal.jsonl", rows)
    write_rows(folder / "animal_train.jsonl", [{**r, "dialect": "south"} for r in sentences(20, 2, seed=2)])
    return options(folder, group="dialect", **animal)


def test_a_group_column_adds_two_metrics_that_no_mean_contains(encoder_folder: Path) -> None:
    plain = bound(encoder_folder).metrics()
    evaluator = Classification(grouped(encoder_folder), shares=SHARES, seed=0)
    infos = evaluator.metrics()
    assert [m.name for m in infos if m.task == "animal"] == [
        f"animal/{m}" for m in ("acc", "nll", "parity_gap", "odds_gap")
    ]
    assert [m.name for m in infos if m.task == "colour"] == [m.name for m in plain if m.task == "colour"]
    objective = Objective(["mean"], ["animal/parity_gap"], ["animal/odds_gap <= base + 0.1"], infos)
    assert {m.name for m in objective.skills.values()} == {"animal/acc", "colour/acc"}
    assert objective.notes == []
    evaluator.bind(make_encoder(), make_tokenizer(), folder="")
    found = evaluator.evaluate(Split.SEARCH).scores
    rows = evaluator._tasks["animal"].scored[Split.SEARCH]
    correct = found["animal/acc"].values.astype(int)
    labels = np.array([r.label for r in rows])
    predicted = np.where(correct == 1, labels, 1 - labels)
    share = {g: predicted[[r.group == g for r in rows]].mean() for g in ("north", "south")}
    assert found["animal/parity_gap"].score == pytest.approx(abs(share["north"] - share["south"]))
    assert found["animal/parity_gap"].score > 0


def test_one_gap_can_be_left_out_and_groups_change_the_fingerprint(encoder_folder: Path) -> None:
    given = grouped(encoder_folder)
    without = options(encoder_folder)
    alone = grouped(encoder_folder, gaps=["parity"])
    evaluators = [Classification(o, shares=SHARES, seed=0) for o in (given, without, alone)]
    assert len({e.fingerprint() for e in evaluators}) == 3
    assert [m.metric for m in evaluators[2].metrics()[:4]] == ["acc", "nll", "parity_gap", "acc"]


def test_groups_with_too_few_questions_and_rows_without_one_are_refused(encoder_folder: Path) -> None:
    with pytest.raises(StudyFileError, match=r"tasks.animal.group: every split needs at least 2 .*gaps: \[parity\]"):
        Classification(grouped(encoder_folder, n=24), shares=SplitShares(0.4, 0.3, 0.3), seed=0)
    with pytest.raises(StudyFileError, match="no field 'dialct'; did you mean 'dialect'"):
        Classification(grouped(encoder_folder) | options(encoder_folder, group="dialct"), shares=SHARES, seed=0)
    rows = [{**r, "dialect": "north"} for r in sentences(60, 2, seed=5)]
    write_rows(encoder_folder / "animal.jsonl", rows)
    with pytest.raises(StudyFileError, match=r"needs at least two groups under 'dialect', found \['north'\]"):
        Classification(options(encoder_folder, group="dialect", train=[]), shares=SHARES, seed=0)
    write_rows(encoder_folder / "animal.jsonl", [{**r, "dialect": 1.5} for r in rows])
    with pytest.raises(StudyFileError, match=r"'dialect' must be a text, a whole number or true or false, got 1\.5"):
        Classification(options(encoder_folder, group="dialect", train=[]), shares=SHARES, seed=0)


def test_a_search_trades_accuracy_for_a_gap_with_parego(encoder_folder: Path) -> None:
    base = make_encoder()
    base.save_pretrained(encoder_folder / "base")
    make_tokenizer().save_pretrained(encoder_folder / "base")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        expert = make_encoder()
        with torch.no_grad():
            for p in expert.parameters():
                p.add_(0.1 * torch.randn_like(p))
        expert.save_pretrained(encoder_folder / name)
    evaluate = {"evaluator": "classification", **grouped(encoder_folder)}
    study = {
        "study": {"name": "fair", "storage": "sqlite:///fair.db"},
        "models": {"base": "base", "experts": {"one": "one", "two": "two"}},
        "space": {"type": "uniform", "presets": ["task_arithmetic"]},
        "evaluate": [evaluate],
        "objective": {
            "maximise": "animal/acc",
            "minimise": "animal/parity_gap",
            "constraints": ["animal/odds_gap <= 0.9"],
        },
        "search": {
            "n_trials": 9,
            "finalists": 1,
            "baselines": [],
            "sampler_options": {"n_startup": 1, "multi_objective": "parego"},
        },
        "device": "cpu",
    }
    (encoder_folder / "study.yaml").write_text(yaml.safe_dump(study))
    text = here("run", encoder_folder / "study.yaml").stdout
    stored = optuna.load_study(study_name="fair", storage=f"sqlite:///{encoder_folder / 'fair.db'}")
    done = finished_records(stored)
    objective, _ = objective_of(stored)
    assert objective.directions == ["maximize", "minimize"]
    assert len(done) == 9
    assert all(0 <= r.values[1] <= 1 and r.attributes["noise"]["values"][1] > 0 for r in done if r.is_scored)
    assert "animal/parity_gap" in text
