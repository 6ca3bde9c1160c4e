"""The classification evaluator scores a live encoder with fixed heads, exactly as a direct forward pass does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoder import (
    SCORED,
    SHARES,
    bound,
    direct_logits,
    documents,
    make_encoder,
    make_tokenizer,
    options,
    write_rows,
)
from transformers import AutoModel, AutoTokenizer

from evaluators.classification.evaluator import Classification
from merge_search.evaluation import Split, question_order, split_of


def test_metrics_are_those_of_a_direct_forward_pass(encoder_folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(encoder_folder, model)
    for split in SCORED:
        found = evaluator.evaluate(split)
        for task in ("animal", "colour"):
            rows = documents(evaluator, task, split)
            with torch.no_grad():
                logits = torch.stack([direct_logits(model, encoder_folder, task, text) for text, _ in rows])
            labels = torch.tensor([label for _, label in rows])
            p = logits.softmax(-1)[torch.arange(len(rows)), labels].double().numpy()
            acc, nll = found.scores[f"{task}/acc"], found.scores[f"{task}/nll"]
            correct = (logits.argmax(-1) == labels).double().numpy()
            np.testing.assert_array_equal(acc.values, correct)
            np.testing.assert_allclose(acc.probability, p, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(nll.values, -np.log(p), rtol=1e-4, atol=1e-5)
            assert acc.score == correct.mean()
            assert acc.stderr == pytest.approx(math.sqrt(correct.var() / (len(rows) - 1)))
            assert nll.score == pytest.approx(nll.values.mean())
    assert 0 < found.scores["animal/acc"].score < 1, "the test would not notice constant answers"


def test_live_weights_changed_in_place_change_the_scores(encoder_folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(encoder_folder, model)
    before = evaluator.evaluate(Split.SEARCH).scores["animal/nll"].values
    np.testing.assert_array_equal(before, evaluator.evaluate(Split.SEARCH).scores["animal/nll"].values)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.value.weight.mul_(-1)
    assert (before != evaluator.evaluate(Split.SEARCH).scores["animal/nll"].values).all()


def test_metric_infos_name_the_main_metric_first_and_its_chance(encoder_folder: Path) -> None:
    evaluator = bound(encoder_folder)
    infos = {m.name: m for m in evaluator.metrics()}
    assert list(infos) == ["animal/acc", "animal/nll", "colour/acc", "colour/nll"]
    assert infos["animal/acc"].chance == 1 / 2
    assert infos["colour/acc"].chance == 1 / 3
    assert not infos["animal/nll"].higher_is_better
    assert sum(infos["animal/acc"].n_questions[s] for s in SCORED) == 60
    assert infos["animal/acc"].n_questions[Split.TEST] == len(
        evaluator.evaluate(Split.TEST).scores["animal/acc"].values
    )


def test_questions_are_split_and_ordered_by_the_hash_of_the_document(encoder_folder: Path) -> None:
    evaluator = bound(encoder_folder)
    seen: set[str] = set()
    for split in SCORED:
        ids = evaluator.evaluate(split).scores["animal/acc"].ids
        assert {split_of(h, SHARES) for h in ids} == {split}
        assert [question_order(h) for h in ids] == sorted(question_order(h) for h in ids)
        seen.update(ids)
    assert len(seen) == 60


def test_a_text_with_two_labels_stays_within_one_split_and_the_others_keep_theirs(encoder_folder: Path) -> None:
    rows = [json.loads(line) for line in (encoder_folder / "animal.jsonl").read_text().splitlines()]
    twice = [{**r, "label": 1 - r["label"]} for r in rows[:20]]
    before = bound(encoder_folder, train=[])._tasks["animal"].scored
    write_rows(encoder_folder / "animal.jsonl", [*twice, *rows])
    found = bound(encoder_folder, train=[])._tasks["animal"].scored
    texts = {split: {r.text for r in found[split]} for split in SCORED}
    assert sum(map(len, found.values())) == 80
    assert sum(map(len, texts.values())) == len(set.union(*texts.values())) == 60
    alone = {r["text"] for r in rows[20:]}
    assert all([r for r in found[s] if r.text in alone] == [r for r in before[s] if r.text in alone] for s in SCORED)
    moved = [r for s in SCORED for r in found[s] if split_of(r.hash, SHARES) is not s]
    assert moved, "the test would not notice rows that are split by their label"


def test_batch_size_does_not_change_the_answers(encoder_folder: Path) -> None:
    model, tokenizer = make_encoder(), make_tokenizer()
    found = []
    for size in (1, 7, 64):
        evaluator = Classification({**options(encoder_folder), "batch_size": size}, shares=SHARES, seed=0)
        evaluator.bind(model, tokenizer, folder="")
        found.append(evaluator.evaluate(Split.SEARCH).scores["animal/nll"].values)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4, atol=1e-5)


def test_repeated_documents_count_once_and_limit_takes_the_first_in_order(encoder_folder: Path) -> None:
    once = bound(encoder_folder)
    twice = bound(encoder_folder, data=["animal.jsonl", "animal.jsonl"])
    assert twice.metrics() == once.metrics()
    assert twice.fingerprint() == once.fingerprint()
    limited = Classification({**options(encoder_folder), "limit": 30}, shares=SHARES, seed=0)
    everything = sorted((r.hash for s in SCORED for r in once._tasks["animal"].scored[s]), key=question_order)
    assert {r.hash for s in SCORED for r in limited._tasks["animal"].scored[s]} == set(everything[:30])


def test_fingerprint_changes_with_questions_heads_and_pooling_but_not_with_batch_size(encoder_folder: Path) -> None:
    def fingerprint(changed: dict[str, Any]) -> str:
        return Classification(changed, shares=SHARES, seed=0).fingerprint()

    plain = fingerprint(options(encoder_folder))
    assert fingerprint({**options(encoder_folder), "batch_size": 3}) == plain
    others = [
        {**options(encoder_folder), "limit": 40},
        {**options(encoder_folder), "max_length": 5},
        options(encoder_folder, pooling="cls"),
    ]
    found = [fingerprint(o) for o in others]
    head = load_file(encoder_folder / "animal.safetensors")
    save_file({**head, "bias": head["bias"] + 1}, encoder_folder / "animal.safetensors")
    found.append(fingerprint(options(encoder_folder)))
    assert len({plain, *found}) == 5


def test_a_training_model_is_scored_without_dropout_and_left_in_training(encoder_folder: Path) -> None:
    model = make_encoder()
    evaluator = bound(encoder_folder, model)
    calm = evaluator.evaluate(Split.SEARCH).scores["colour/nll"].values
    loss = evaluator.loss("animal", range(5)).item()
    model.train()
    np.testing.assert_array_equal(evaluator.evaluate(Split.SEARCH).scores["colour/nll"].values, calm)
    assert evaluator.loss("animal", range(5)).item() == loss
    assert all(m.training for m in model.modules())


def test_half_precision_encoders_are_pooled_in_float32(encoder_folder: Path) -> None:
    exact = bound(encoder_folder).evaluate(Split.SEARCH).scores["animal/acc"].probability
    rounded = (
        bound(encoder_folder, make_encoder().to(torch.bfloat16)).evaluate(Split.SEARCH).scores["animal/acc"].probability
    )
    assert np.abs(exact - rounded).mean() < 0.05
    assert bound(encoder_folder, make_encoder().to(torch.bfloat16)).loss("animal", [0]).dtype == torch.float32


def test_texts_longer_than_the_encoder_are_cut(encoder_folder: Path) -> None:
    rows = [{"text": " ".join(["owl"] * (20 + i)), "label": i % 2} for i in range(30)]
    write_rows(encoder_folder / "animal.jsonl", rows)
    values = bound(encoder_folder).evaluate(Split.SEARCH).scores["animal/acc"].probability
    np.testing.assert_allclose(np.minimum(values, 1 - values), min(values[0], 1 - values[0]), atol=1e-6)


# --- where it stands --------------------------------------------------------------------------------------------------


def test_building_it_imports_no_torch(encoder_folder: Path) -> None:
    code = (
        "import json, sys; from evaluators.classification.evaluator import Classification as C; "
        "from merge_search.evaluation import SplitShares; "
        "C(json.loads(sys.argv[1]), shares=SplitShares(), seed=0).metrics(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(options(encoder_folder))], check=True)


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.skipif("MERGE_SEARCH_ZOO" not in os.environ, reason="MERGE_SEARCH_ZOO is not set")
@pytest.mark.parametrize(("task", "accuracy"), [("sst2", 0.845), ("trec6", 0.944)])
def test_real_experts_reach_their_published_accuracy(task: str, accuracy: float) -> None:
    zoo = Path(os.environ["MERGE_SEARCH_ZOO"])
    entry = {"data": f"data/text/{task}/test.jsonl", "head": f"encoder/{task}/head.safetensors"}
    evaluator = Classification({"include_path": str(zoo), "tasks": {task: entry}}, shares=SHARES, seed=0)
    folder = zoo / "encoder" / task
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    evaluator.bind(model, AutoTokenizer.from_pretrained(folder), folder=str(folder))
    values = np.concatenate([evaluator.evaluate(s).scores[f"{task}/acc"].values for s in SCORED])
    assert len(values) == len((zoo / f"data/text/{task}/test.jsonl").read_text().splitlines())
    assert round(values.mean(), 3) == accuracy


# --- padding ----------------------------------------------------------------------------------------------------------


def test_rows_are_parted_where_padding_is_least(encoder_folder: Path) -> None:
    encoder = bound(encoder_folder)._bound()
    tokens = [[5] * n for n in (2, 9, 3, 2, 30, 9)]
    batches = encoder.trim_batches(tokens)
    assert [b.rows for b in batches] == [[0, 3, 2], [1, 5], [4]]
    assert [tuple(b.inputs["input_ids"].shape) for b in batches] == [(3, 3), (2, 9), (1, 30)]
    assert [b.rows for b in encoder.trim_batches([[5], [6]])] == [[0, 1]]


def test_three_parts_are_the_best_that_trying_all_finds() -> None:
    from evaluators.classification.heads import _cuts

    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = sorted(rng.integers(1, 60, size=rng.integers(1, 12)).tolist())
        n = len(lengths)

        def tokens(j: int, k: int, lengths: list[int] = lengths) -> int:
            return sum(len(part) * max(part, default=0) for part in (lengths[:j], lengths[j:k], lengths[k:]))

        assert tokens(*_cuts(lengths)) == min(tokens(j, k) for j in range(n + 1) for k in range(j, n + 1))
