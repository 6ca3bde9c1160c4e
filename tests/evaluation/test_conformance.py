"""Every evaluator of the catalogue keeps what `merge_search.testing` says of evaluators, and so does a user's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small_recommender
import small_vision
import tiny_encoder
import tiny_lm
import transformers
import yaml

from merge_search import catalogue
from merge_search.evaluation import Evaluator, SplitShares
from merge_search.testing import EvaluatorCase, EvaluatorConformance

SHARES = SplitShares(0.5, 0.25, 0.25, fit=0.1)


def built(name: str, folder: Path, **options: Any) -> Evaluator:
    return catalogue.build_evaluator(name, options, shares=SHARES, seed=3, folder=folder)


def test_every_evaluator_of_the_catalogue_is_tested_here() -> None:
    assert set(catalogue.names("evaluators")) == {
        "classification",
        "drift",
        "image_classification",
        "latency",
        "lm_eval",
        "ranking",
        "self_param",
        "size",
    }


class TestClassification(EvaluatorConformance):
    """One task with groups and one without."""

    @pytest.fixture
    def case(self, encoder_folder: Path) -> EvaluatorCase:
        for name, n in (("animal", 150), ("animal_train", 20)):
            rows = [{**r, "group": "ab"[i % 2]} for i, r in enumerate(tiny_encoder.sentences(n, 2, seed=n))]
            tiny_encoder.write_rows(encoder_folder / f"{name}.jsonl", rows)
        options = tiny_encoder.options(encoder_folder, group="group")

        def build(**changes: Any) -> Evaluator:
            return built("classification", encoder_folder, **{**options, "include_path": ".", **changes})

        def fit_ids(evaluator: Any, task: str) -> Sequence[str]:
            return [row.hash for row in evaluator._tasks[task].fit]

        return EvaluatorCase(
            build,
            tiny_encoder.make_encoder(),
            tiny_encoder.make_tokenizer(),
            changed=[lambda: build(limit=100), lambda: build(max_length=5)],
            wrong=[lambda: build(tasks={}), lambda: build(include_path="nowhere"), lambda: build(limt=3)],
            fit_ids=fit_ids,
        )


class TestImageClassification(EvaluatorConformance):
    @pytest.fixture
    def case(self, vision_folder: Path) -> EvaluatorCase:
        def build(**changes: Any) -> Evaluator:
            return built("image_classification", vision_folder, **{**small_vision.options(), **changes})

        def fit_ids(evaluator: Any, task: str) -> Sequence[str]:
            return [row.hash for row in evaluator._tasks[task].fit]

        return EvaluatorCase(
            build,
            transformers.ViTModel.from_pretrained(vision_folder / "models/base", add_pooling_layer=False).eval(),
            changed=[lambda: build(limit=100), lambda: build(mean=0.4), lambda: build(std=0.4)],
            wrong=[lambda: build(tasks={}), lambda: build(include_path="nowhere"), lambda: build(std=0)],
            fit_ids=fit_ids,
        )


class TestRanking(EvaluatorConformance):
    @pytest.fixture
    def case(self, recommender_folder: Path) -> EvaluatorCase:
        def build(**changes: Any) -> Evaluator:
            return built("ranking", recommender_folder, **{**small_recommender.options(), **changes})

        def fit_ids(evaluator: Any, task: str) -> Sequence[str]:
            return [row.hash for row in evaluator._tasks[task].fit]

        return EvaluatorCase(
            build,
            small_recommender.load(recommender_folder),
            changed=[
                lambda: build(limit=60),
                lambda: build(k=[3]),
                lambda: build(negatives=5),
                lambda: build(max_length=3),
            ],
            wrong=[lambda: build(tasks={}), lambda: build(include_path="nowhere"), lambda: build(k=0)],
            fit_ids=fit_ids,
        )


@pytest.mark.usefixtures("own_dataset_cache")
class TestLmEval(EvaluatorConformance):
    @pytest.fixture
    def case(self, fit_folder: Path) -> EvaluatorCase:
        def build(**changes: Any) -> Evaluator:
            options = {"tasks": list(tiny_lm.FIT_TASKS), "include_path": fit_folder.name, **changes}
            return built("lm_eval", fit_folder.parent, **options)

        def fit_ids(evaluator: Any, task: str) -> Sequence[str]:
            return [row.id for row in evaluator._fit[task].rows]

        return EvaluatorCase(
            build,
            tiny_lm.make_model(),
            tiny_lm.make_tokenizer(),
            folder="tiny",
            changed=[
                lambda: build(limit=30),
                lambda: build(system_instruction="sings fast"),
                lambda: build(tasks="t_word"),
            ],
            wrong=[lambda: build(tasks=[]), lambda: build(include_path="nowhere"), lambda: build(batch_size="auto")],
            fit_ids=fit_ids,
        )


@pytest.mark.usefixtures("own_dataset_cache")
class TestLmEvalGroup(EvaluatorConformance):
    """A group of two tasks that weigh the same, whatever their number of questions."""

    @pytest.fixture
    def case(self, tmp_path: Path) -> EvaluatorCase:
        rows = tiny_lm.documents(150, 0)
        tiny_lm.write_tasks(tmp_path, {"t_long": tiny_lm.CHOICE}, test=rows)
        tiny_lm.write_tasks(
            tmp_path, {"t_short": {**tiny_lm.CHOICE, "test_split": "train"}}, test=rows, train=rows[:90]
        )
        metric = {"metric": "acc", "weight_by_size": False}
        for name, changes in (("g_means", {}), ("g_sized", {"weight_by_size": True})):
            group = {"group": name, "task": ["t_long", "t_short"], "aggregate_metric_list": [{**metric, **changes}]}
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(group))

        def build(**changes: Any) -> Evaluator:
            return built("lm_eval", tmp_path.parent, tasks="g_means", include_path=tmp_path.name, **changes)

        def build_other(**options: Any) -> Evaluator:
            return built("lm_eval", tmp_path.parent, include_path=tmp_path.name, **options)

        return EvaluatorCase(
            build,
            tiny_lm.make_model(),
            tiny_lm.make_tokenizer(),
            folder="tiny",
            changed=[lambda: build(groups="each"), lambda: build_other(tasks="g_sized")],
            wrong=[lambda: build(groups="some"), lambda: build(metrics={"g_means": "acc_norm"})],
            fit_ids=lambda evaluator, task: [row.id for row in evaluator._fit[task].rows],
        )


class Tokens:
    """One token per character, of 24."""

    def __call__(self, text: str, *, truncation: bool, max_length: int, return_tensors: str = "") -> Any:
        import torch

        ids = [3 + ord(c) % 21 for c in text][:max_length]
        return type("Encoded", (), {"input_ids": torch.tensor([ids])}) if return_tensors else {"input_ids": ids}


class CostConformance(EvaluatorConformance):
    """Costs of a tiny language model, on texts in the study file's folder."""

    name = ""
    options: dict[str, Any] = {}  # noqa: RUF012
    changes: list[dict[str, Any]] = []  # noqa: RUF012
    facts: dict[str, Any] = {}  # noqa: RUF012

    @pytest.fixture
    def case(self, make_models: Any, tmp_path: Path) -> EvaluatorCase:
        _, live = make_models()
        texts = [f"text {i} of the tests, and so on" for i in range(24)]
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))

        def build(**changes: Any) -> Evaluator:
            return built(self.name, tmp_path, **{**self.options, **changes})

        return EvaluatorCase(
            build,
            live.model,
            Tokens(),
            changed=[lambda c=c: build(**c) for c in self.changes],
            wrong=[lambda: build(limt=3), lambda: build(texts=["gone.txt"]), lambda: build(texts={"a": "gone.txt"})],
            **self.facts,
        )


class TestDrift(CostConformance):
    name = "drift"
    options = {"texts": "a.jsonl", "max_length": 10, "positions": 3}  # noqa: RUF012
    changes = [{"positions": 2}, {"limit": 20}, {"max_length": 9}]  # noqa: RUF012


class TestLatency(CostConformance):
    name = "latency"
    options = {"texts": "a.jsonl", "max_length": 10, "new_tokens": 0, "repeats": 1}  # noqa: RUF012
    changes = [{"repeats": 2}, {"limit": 20}, {"new_tokens": 1}]  # noqa: RUF012
    facts = {"is_repeatable": False, "reads_outputs": False}  # noqa: RUF012


class TestSelfParam(CostConformance):
    name = "self_param"
    options = {"texts": {"a": "a.jsonl", "b": "a.jsonl"}, "max_length": 10, "positions": 3}  # noqa: RUF012
    changes = [{"positions": 2}, {"limit": 20}, {"texts": {"a": "a.jsonl"}}, {"new_tokens": 2}]  # noqa: RUF012


class TestSize(CostConformance):
    name = "size"
    facts = {"reads_outputs": False}  # noqa: RUF012


OWN = '''
import hashlib
import json

import numpy as np
import torch

from merge_search.errors import EvaluationError, StudyFileError
from merge_search.evaluation import Cost, Evaluation, Evaluator, MetricInfo, Scores, Split
from merge_search.evaluation import question_order, split_of, window


class Signs(Evaluator):
    """Whether a model's last logits are positive for given tokens: questions are pairs in a JSON file."""

    def __init__(self, options, *, shares, seed, folder):
        path = folder / str(options.get("file"))
        if not path.is_file():
            raise StudyFileError(f"file: no file {path}")
        pairs = [tuple(pair) for pair in json.loads(path.read_text())]
        ids = {hashlib.sha256(repr(pair).encode()).hexdigest(): pair for pair in pairs}
        self._rows = {split: [] for split in Split}
        for name in sorted(ids, key=question_order):
            self._rows[split_of(name, shares)].append((name, *ids[name]))
        self._model = None

    def metrics(self):
        return [MetricInfo("signs", "share", True, {s: len(r) for s, r in self._rows.items() if s is not Split.FIT})]

    def fingerprint(self):
        return hashlib.sha256(repr(sorted(self._rows.items())).encode()).hexdigest()

    def bind(self, model, tokenizer, *, folder):
        self._model = model

    def evaluate(self, split, fidelity=1.0, *, after=0.0):
        if self._model is None:
            raise EvaluationError("bind a model first")
        rows = self._rows[split][window(len(self._rows[split]), fidelity, after)]
        with torch.no_grad():
            logits = torch.stack([self._logit(a, b) for _, a, b in rows])
        values = logits.sigmoid().double().numpy()
        self.n_asked += len(rows)
        stderr = float(values.std(ddof=1) / len(rows) ** 0.5)
        scores = Scores(tuple(r[0] for r in rows), values, float(values.mean()), stderr)
        return Evaluation(split, fidelity, {"signs/share": scores}, Cost(questions=len(rows)))

    def _logit(self, context, token):
        return self._model(input_ids=torch.tensor([[context]]), use_cache=False).logits[0, -1, token]

    def fit_tasks(self):
        return {"signs": len(self._rows[Split.FIT])}

    def losses(self, task):
        return ("gold",)

    def predict(self, task, rows):
        return [1 for _ in rows]

    def set_pseudo_labels(self, task, labels):
        pass

    def loss(self, task, rows, kind="gold"):
        known = self._rows[Split.FIT]
        if task != "signs" or kind != "gold" or not rows or max(rows) >= len(known):
            raise EvaluationError(f"no loss {kind} of {task} on rows {rows}")
        return torch.stack([-torch.nn.functional.logsigmoid(self._logit(*known[i][1:])) for i in rows]).mean()
'''


class TestAUsersOwn(EvaluatorConformance):
    @pytest.fixture
    def case(self, make_models: Any, tmp_path: Path) -> EvaluatorCase:
        _, live = make_models()
        (tmp_path / "own.py").write_text(OWN)
        (tmp_path / "pairs.json").write_text(json.dumps([(a, b) for a in range(3, 9) for b in range(3, 12)]))
        (tmp_path / "fewer.json").write_text(json.dumps([(a, b) for a in range(3, 9) for b in range(3, 10)]))

        def build(file: str = "pairs.json") -> Evaluator:
            return built("own.py:Signs", tmp_path, file=file)

        def fit_ids(evaluator: Any, task: str) -> Sequence[str]:
            return [row[0] for row in evaluator._rows["fit"]]

        return EvaluatorCase(
            build,
            live.model,
            changed=[lambda: build("fewer.json")],
            wrong=[lambda: build("gone.json")],
            fit_ids=fit_ids,
        )
