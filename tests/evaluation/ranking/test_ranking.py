"""Ranking of the next item: metrics by hand, candidates, files, refusals, and a study of recommenders."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import small_recommender
import torch
import yaml
from command_line import here

from evaluators.ranking.evaluator import Ranking
from merge_search.errors import NonFiniteError, StudyFileError
from merge_search.evaluation import Split, SplitShares
from merge_search.search.records import finished_records

SHARES = SplitShares()
SCORED = (Split.SEARCH, Split.VALIDATION, Split.TEST)


class Fixed(torch.nn.Module):
    """Gives every item the same score after any history: its weight."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(torch.tensor(scores))
        self.config = SimpleNamespace(vocab_size=len(scores))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.scores.expand(*input_ids.shape, -1))


def write(path: Path, sequences: list[list[int]]) -> None:
    path.write_text("\n".join(json.dumps({"items": s}) for s in sequences))


def judge(folder: Path, model: Any = None, **options: Any) -> Ranking:
    given = {"tasks": {"shop": {"data": "shop.jsonl"}}, **options}
    evaluator = Ranking(given, shares=SHARES, seed=0, folder=folder)
    if model is not None:
        evaluator.bind(model, None, folder="")
    return evaluator


def all_values(evaluator: Ranking, metric: str) -> dict[tuple[int, ...], float]:
    """Value of each question by its sequence, over all splits."""
    out = {}
    for split in SCORED:
        rows = evaluator._tasks["shop"].scored[split]
        values = evaluator.evaluate(split).scores[f"shop/{metric}"].values
        out |= {(*r.history, r.target): v for r, v in zip(rows, values, strict=True)}
    return out


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """All ordered pairs and some triples of items 1 to 6."""
    pairs = [[a, b] for a in range(1, 7) for b in range(1, 7) if a != b]
    write(tmp_path / "shop.jsonl", [*pairs, [1, 2, 3], [3, 2, 1], [6, 5, 1]])
    return tmp_path


def test_metrics_follow_from_the_rank_among_items_that_are_not_in_the_history(shop: Path) -> None:
    evaluator = judge(shop, Fixed([9.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), k=[2, 1])  # item 1 is the best
    names = [m.metric for m in evaluator.metrics()]
    assert names == ["ndcg@2", "hr@2", "ndcg@1", "hr@1", "auc"]
    found = {metric: all_values(evaluator, metric) for metric in names}
    # after item 1, item 2 is the best of five candidates; after 6, it is the second of 1 to 5
    assert {m: found[m][1, 2] for m in names} == {"ndcg@2": 1, "hr@2": 1, "ndcg@1": 1, "hr@1": 1, "auc": 1}
    second = {"ndcg@2": 1 / math.log2(3), "hr@2": 1, "ndcg@1": 0, "hr@1": 0, "auc": 3 / 4}
    assert {m: found[m][6, 2] for m in names} == pytest.approx(second)
    last = {"ndcg@2": 0, "hr@2": 0, "ndcg@1": 0, "hr@1": 0, "auc": 0}
    assert {m: found[m][1, 6] for m in names} == last
    assert found["auc"][1, 2, 3] == 1.0, "items 1 and 2 are in the history"


def test_items_with_equal_scores_share_their_ranks(shop: Path) -> None:
    evaluator = judge(shop, Fixed([0.0] * 7), k=[3, 2])
    assert set(all_values(evaluator, "auc").values()) == {0.5}
    values = all_values(evaluator, "hr@3")
    assert values[1, 2] == 1.0, "the middle of five is rank 3"
    found = all_values(evaluator, "hr@2")
    assert {found[p] for p in values if len(p) == 2} == {0.0}


def test_drawn_candidates_are_the_same_for_all_models_and_never_of_the_history(shop: Path) -> None:
    one, two = (judge(shop, Fixed(scores), negatives=2) for scores in ([0.0] * 7, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    all_values(one, "auc"), all_values(two, "auc")
    assert one._candidates.keys() == two._candidates.keys()
    for key, places in one._candidates.items():
        assert places.tolist() == two._candidates[key].tolist()
        row = next(r for rows in one._tasks["shop"].scored.values() for r in rows if r.hash == key[1])
        items = {one._tasks["shop"].items[i] for i in places}
        assert len(items) == 2
        assert not items & {*row.history, row.target}
    assert len({tuple(p) for p in one._candidates.values()}) > 3
    everything = judge(shop, Fixed([0.0] * 7), negatives=100)
    all_values(everything, "auc")
    assert {len(p) for p in everything._candidates.values()} == {4, 3}, "there are no more than the others"


def test_the_model_sees_the_end_of_the_history_and_answers_at_its_end(recommender_folder: Path) -> None:
    model = small_recommender.load(recommender_folder, "north")
    for max_length in (50, 3):
        given = {**small_recommender.options(), "max_length": max_length}
        evaluator = Ranking(given, shares=SHARES, seed=0, folder=recommender_folder)
        evaluator.bind(model, None, folder="")
        task = evaluator._tasks["north"]
        found = evaluator.evaluate(Split.TEST).scores["north/auc"].values
        for row, value in zip(task.scored[Split.TEST], found, strict=True):
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([row.history[-max_length:]])).logits[0, -1]
            others = [i for i in task.items if i not in row.history and i != row.target]
            by_hand = np.mean([float(scores[row.target] > scores[i]) for i in others])
            assert value == pytest.approx(by_hand, abs=1.5 / len(others))
            if max_length == 50:
                assert value == pytest.approx(by_hand, abs=1e-9)


def test_an_expert_is_better_on_its_own_market_than_the_others(recommender_folder: Path) -> None:
    evaluator = Ranking(small_recommender.options(), shares=SHARES, seed=0, folder=recommender_folder)
    auc = {}
    for name in ("base", *small_recommender.MARKETS):
        evaluator.bind(small_recommender.load(recommender_folder, name), None, folder="")
        auc[name] = {m: evaluator.evaluate(Split.SEARCH).scores[f"{m}/auc"].score for m in small_recommender.MARKETS}
    for market in small_recommender.MARKETS:
        assert auc[market][market] > max(auc[other][market] for other in auc if other != market)


def test_movielens_logs_are_sequences_by_user_in_order_of_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users = [rng.permutation(9)[: rng.integers(2, 6)] + 1 for _ in range(40)]
    events = [(u, int(item), t) for u, items in enumerate(users) for t, item in enumerate(items)]
    mixed = [events[i] for i in rng.permutation(len(events))]
    write(tmp_path / "shop.jsonl", [[int(i) for i in items] for items in users])
    (tmp_path / "log.dat").write_text("".join(f"{u}::{i}::{5}::{t}\n" for u, i, t in mixed))
    table = "".join(f"{u},{i},3.5,{t}\n" for u, i, t in mixed)
    (tmp_path / "log.csv").write_text("userId,movieId,rating,timestamp\n" + table)
    found = []
    for name in ("shop.jsonl", "log.dat", "log.csv"):
        evaluator = judge(tmp_path, tasks={"shop": {"data": name}})
        found.append({(*r.history, r.target) for rows in evaluator._tasks["shop"].scored.values() for r in rows})
    assert found[0] == {tuple(map(int, items)) for items in users}
    assert found[0] == found[1] == found[2]


def test_listed_items_are_candidates_too_and_must_contain_every_answer(shop: Path) -> None:
    (shop / "catalogue.json").write_text(json.dumps([1, 2, 3, 4, 5, 6, 9]))
    evaluator = judge(shop, tasks={"shop": {"data": "shop.jsonl", "items": "catalogue.json"}})
    assert evaluator._tasks["shop"].items == (1, 2, 3, 4, 5, 6, 9)
    assert evaluator.fingerprint() != judge(shop).fingerprint()
    (shop / "catalogue.json").write_text(json.dumps([1, 2, 3]))
    with pytest.raises(
        StudyFileError, match=r"tasks.shop.items: sequences end in 3 items that are not listed, the .* 4"
    ):
        judge(shop, tasks={"shop": {"data": "shop.jsonl", "items": "catalogue.json"}})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"items": [1]}', "line 1: needs at least two items, a history and the next one"),
        ("a.jsonl", '{"items": [1, 0]}', r"items must be whole numbers from 1 on, got \[1, 0\]"),
        ("a.jsonl", '{"item": [1, 2]}', "no field 'items'; did you mean 'item'"),
        ("a.dat", "1::2::3", "line 1: must have a user, an item"),
        ("a.dat", "1::x::3::4", "line 1: must have a user, an item"),
        ("a.csv", "userId,movieID,timestamp\n", "no column 'movieId'; did you mean 'movieID'"),
        ("a.txt", "1 2 3", "must be a .jsonl file of sequences or a .dat or .csv log"),
    ],
)
def test_wrong_files_are_refused_before_any_weight_is_loaded(shop: Path, name: str, text: str, message: str) -> None:
    (shop / name).write_text(text)
    with pytest.raises(StudyFileError, match=message) as caught:
        judge(shop, tasks={"one": {"data": name}, "two": {"data": "gone.jsonl"}})
    assert "tasks.two.data: no file" in str(caught.value), "all problems come at once"


def test_models_that_cannot_rank_these_items_are_refused_at_bind(shop: Path) -> None:
    with pytest.raises(StudyFileError, match=r"tasks.shop: its items go up to 6, but the model knows items 1 to 5"):
        judge(shop, Fixed([0.0] * 6))

    class Encoder(Fixed):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(last_hidden_state=torch.zeros(1, 1, 4))

    with pytest.raises(
        StudyFileError, match=r"ranking needs a model whose output has logits over items .* got Encoder"
    ):
        judge(shop, Encoder([0.0] * 7))
    with pytest.raises(NonFiniteError, match="task 'shop'"):
        judge(shop, Fixed([math.nan] * 7)).evaluate(Split.SEARCH)


def test_building_it_imports_no_torch(shop: Path) -> None:
    code = (
        "import pathlib, sys; from evaluators.ranking.evaluator import Ranking as R; "
        "from merge_search.evaluation import SplitShares; "
        "R({'tasks': {'shop': {'data': 'shop.jsonl'}}}, shares=SplitShares(), seed=0, "
        "folder=pathlib.Path(sys.argv[1])).metrics(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(shop)], check=True)


def test_a_study_merges_recommenders_fits_coefficients_and_exports(recommender_folder: Path, tmp_path: Path) -> None:
    data = {
        "study": {"name": "shops", "storage": "sqlite:///shops.db"},
        "models": {
            "base": str(recommender_folder / "models/base"),
            "experts": {m: str(recommender_folder / "models" / m) for m in small_recommender.MARKETS},
        },
        "space": {"type": "uniform", "presets": ["task_arithmetic", "ties"]},
        "evaluate": [{"evaluator": "ranking", "include_path": str(recommender_folder), **small_recommender.options()}],
        "splits": {"search": 0.6, "validation": 0.2, "test": 0.2, "fit": 0.2},
        "objective": {"maximise": "mean", "constraints": ["north/auc >= 0.1"]},
        "search": {
            "n_trials": 9,
            "finalists": 1,
            "baselines": ["ties"],
            "sampler": "random",
            "learner": {"steps": [4], "per": "block", "batch_rows": 8, "loss": "kl"},
        },
        "device": "cpu",
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    here("run", path)
    study = optuna.load_study(study_name="shops", storage=f"sqlite:///{tmp_path / 'shops.db'}")
    done = finished_records(study)
    assert [r.label for r in done[:7]] == ["base", *small_recommender.MARKETS, "average", "task_arithmetic", "ties"]
    assert all(r.is_scored for r in done)
    assert any("learner" in r.attributes for r in done[7:])
    here("export", path, tmp_path / "merged", "--trial", str(done[-1].number))
    evaluator = Ranking(
        small_recommender.options(), shares=SplitShares(0.6, 0.2, 0.2, fit=0.2), seed=0, folder=recommender_folder
    )
    from merge_search.engine.architectures.sasrec import SasRec

    evaluator.bind(SasRec.from_pretrained(tmp_path / "merged").eval(), None, folder="")
    for name, scores in evaluator.evaluate(Split.SEARCH).scores.items():
        assert scores.score == pytest.approx(done[-1].evaluation.scores[name].score, rel=1e-3), name
