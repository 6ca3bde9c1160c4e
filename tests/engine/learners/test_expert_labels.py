"""Losses without labels: teachers answer each row that a fit draws once, and the cost is known before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.learners.expert_labels import ExpertLabels
from merge_search.engine.learners.fit import FitSettings, TaskLoss, drawn_rows, fit, task_losses
from merge_search.engine.resident.live_model import LiveModel
from merge_search.errors import InputError
from merge_search.recipe import Recipe
from merge_search.search.prepare import prepare
from merge_search.search.trial.worker import Worker
from merge_search.study_file import read_study_file

N_ROWS = 300
OWNERS = {"next": "a"}


class Answers:
    """A `Differentiable` evaluator over the live model whose task is to predict the next token."""

    def __init__(self, live: LiveModel, n: int = N_ROWS) -> None:
        self.live, self.n = live, n
        self.labels: dict[int, int] = {}
        self.asked: list[list[int]] = []
        self.rows = torch.randint(0, 24, (max(n, 1), 5), generator=torch.Generator().manual_seed(1))

    def fit_tasks(self) -> dict[str, int]:
        return {"next": self.n}

    def losses(self, task: str) -> tuple[str, ...]:
        return ("pseudo",)

    def predict(self, task: str, rows: Any) -> list[int]:
        self.asked.append(list(rows))
        return self.answers(rows)

    def answers(self, rows: Any) -> list[int]:
        with torch.no_grad():
            return self.live.model(input_ids=self.rows[list(rows)]).logits[:, -1].argmax(-1).tolist()

    def set_pseudo_labels(self, task: str, labels: Any) -> None:
        self.labels |= labels

    def loss(self, task: str, rows: Any, kind: str = "gold") -> Tensor:
        assert kind == "pseudo"
        logits = self.live.model(input_ids=self.rows[list(rows)]).logits[:, -1]
        return torch.nn.functional.cross_entropy(logits, torch.tensor([self.labels[i] for i in rows]))


def test_experts_answer_for_their_tasks_and_learning_from_the_answers_makes_the_merge_agree(make_models) -> None:
    pool, live = make_models()
    engine = MergeEngine(pool)
    recipe = Recipe(models=pool.models, coefficients={"a": 0.0, "b": 0.5})
    evaluator = Answers(live)
    labels = ExpertLabels([object(), evaluator])
    assert labels.questions("pseudo", {"next": range(N_ROWS)}) == N_ROWS
    assert labels.ask(engine, live.views, recipe, OWNERS, "pseudo", {"next": range(N_ROWS)}) == N_ROWS
    expert = LiveModel.load(pool.models.experts["a"]).model
    with torch.no_grad():
        wanted = expert(input_ids=evaluator.rows).logits[:, -1].argmax(-1).tolist()
    assert evaluator.labels == dict(enumerate(wanted))
    losses = task_losses([object(), evaluator], "pseudo")
    engine.apply(recipe, live.views)
    before = np.mean(np.array(evaluator.answers(range(N_ROWS))) == wanted)
    fit(engine, live.model, live.views, recipe, losses, FitSettings(per="block", steps=25, step_size=0.05))
    assert np.mean(np.array(evaluator.answers(range(N_ROWS))) == wanted) > before + 0.1


def test_questions_to_an_expert_that_fails_to_answer_count(make_models) -> None:
    """The answers of one task's teacher are kept although the next task's teacher fails."""
    pool, live = make_models()

    class Fails(Answers):
        def fit_tasks(self) -> dict[str, int]:
            return {"other": self.n}

        def predict(self, task: str, rows: Any) -> list[int]:
            raise MemoryError

    recipe = Recipe(models=pool.models, coefficients={"a": 0.0, "b": 0.5})
    labels = ExpertLabels([Answers(live), Fails(live)])
    rows = {"next": range(7), "other": range(5)}
    for asked in (7 + 5, 7 + 5 + 5):
        with pytest.raises(MemoryError):
            labels.ask(MergeEngine(pool), live.views, recipe, {"next": "a", "other": "b"}, "pseudo", rows)
        assert labels.asked == asked


@pytest.mark.parametrize(
    ("n_rows", "batch_rows", "steps"), [(50, 8, 0), (50, 8, 5), (50, 8, 7), (10, 32, 1), (7, 3, 9)]
)
def test_the_rows_a_fit_draws_are_known_from_its_settings(
    make_models, n_rows: int, batch_rows: int, steps: int
) -> None:
    pool, live = make_models()
    seen: set[int] = set()

    def loss(rows: Any) -> Tensor:
        seen.update(rows)
        return live.model(input_ids=torch.tensor([[1, 2, 3]])).logits.mean()

    recipe = Recipe(models=pool.models, coefficients={"a": 0.2, "b": 0.2})
    settings = FitSettings(per="expert", steps=steps, batch_rows=batch_rows, seed=4)
    fit(MergeEngine(pool), live.model, live.views, recipe, {"t": TaskLoss(n_rows, loss)}, settings)
    assert drawn_rows(settings, {"t": n_rows}) == {"t": seen}
    assert len(seen) == min(n_rows, steps * min(batch_rows, n_rows))
    assert drawn_rows(replace(settings, steps=steps + 1), {"t": n_rows})["t"] >= seen


def test_a_fit_asks_the_expert_for_its_own_rows_and_the_next_for_those_that_are_new(make_models) -> None:
    pool, live = make_models()
    engine, recipe = MergeEngine(pool), Recipe(models=pool.models, coefficients={"a": 0.1, "b": 0.5})
    few, all_rows = Answers(live), Answers(live)
    sparing, whole = ExpertLabels([few]), ExpertLabels([all_rows])
    whole.ask(engine, live.views, recipe, OWNERS, "pseudo", {"next": range(N_ROWS)})
    before: set[int] = set()
    for seed, steps in ((1, 5), (2, 3), (1, 4)):
        settings = FitSettings(per="tensor", steps=steps, batch_rows=32, seed=seed)
        drawn = drawn_rows(settings, few.fit_tasks())
        new = sorted(drawn["next"] - before)
        assert sparing.questions("pseudo", drawn) == len(new)
        few.asked.clear()
        assert sparing.ask(engine, live.views, recipe, OWNERS, "pseudo", drawn) == len(new)
        assert few.asked == ([new] if new else [])
        before |= drawn["next"]
        one, other = (
            fit(engine, live.model, live.views, recipe, task_losses([e], "pseudo"), settings) for e in (few, all_rows)
        )
        assert one.recipe == other.recipe
        assert (one.losses == other.losses).all()
    assert 0 < len(before) < N_ROWS


def test_a_task_that_no_expert_improves_is_labelled_by_the_base(make_models) -> None:
    pool, live = make_models()
    engine, recipe = MergeEngine(pool), Recipe(models=pool.models)
    answers = Answers(live)
    engine.apply(recipe, live.views)  # the weights before the fit do not matter
    ExpertLabels([answers]).ask(engine, live.views, recipe, {"next": "base"}, "pseudo", {"next": [3]})
    assert answers.asked == [[3]]
    for name, view in live.views.items():
        assert torch.equal(view, engine.tensors.base(name).to(view.dtype))


def test_rows_without_an_expert_or_a_loss_that_an_evaluator_lacks_are_refused(make_models) -> None:
    pool, live = make_models()
    engine, recipe = MergeEngine(pool), Recipe(models=pool.models)
    labels = ExpertLabels([Answers(live)])
    with pytest.raises(InputError, match="task 'next' needs a model that is best at it"):
        labels.ask(engine, live.views, recipe, {"next": "c"}, "pseudo", {"next": [3]})
    with pytest.raises(InputError, match=r"Answers has no loss kl .* take pseudo"):
        labels.ask(engine, live.views, recipe, OWNERS, "kl", {"next": [3]})
    with pytest.raises(InputError, match="no task has a differentiable loss and rows to fit on"):
        task_losses([Answers(live, 0), object()])


# --- the worker, on the demo's real models

EXPERTS = ["maths", "stories"]
DEMO_TEACHERS = {f"demo_{e}": e for e in EXPERTS}
N_FIT = 48


def worker(folder: Path, demo: Path) -> tuple[Worker, Recipe]:
    """As a new process makes it: evaluators without any labels."""
    data = {
        "study": {"name": "s", "seed": 1},
        "models": {
            "base": str(demo / "models" / "base"),
            "experts": {e: str(demo / "models" / e) for e in EXPERTS},
            "dtype": "float32",
        },
        "space": {"type": "uniform", "presets": ["task_arithmetic"]},
        "evaluate": [
            {"evaluator": "lm_eval", "tasks": list(DEMO_TEACHERS), "include_path": str(demo / "tasks"), "limit": 60,
             "fit_limit": N_FIT}
        ],
        "device": "cpu",
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    bench = Worker(prepare(read_study_file(path)), device="cpu")
    return bench, Recipe(models=bench.models, coefficients=dict.fromkeys(EXPERTS, 0.3))


@pytest.mark.usefixtures("own_dataset_cache")
@pytest.mark.parametrize(("loss", "price"), [("pseudo", 1 + 1), ("kl", 2 + 1)])  # maths are generated, stories chosen
def test_a_worker_asks_the_questions_it_foresaw_and_only_new_rows_until_it_is_made_again(
    demo: Path, tmp_path: Path, loss: str, price: int
) -> None:
    bench, recipe = worker(tmp_path, demo)
    settings = FitSettings(per="block", steps=2, batch_rows=8, loss=loss, seed=1)
    steps = 3 * 2 * 8 * len(EXPERTS)
    first = bench.fit(recipe, settings, DEMO_TEACHERS)
    assert first.questions == steps + price * 16
    assert bench.fit_questions(settings) == steps, "the same rows once more"
    rest = replace(settings, steps=20)
    assert bench.fit_questions(rest) == 10 * steps + price * (N_FIT - 16)
    other = replace(settings, seed=2)
    foreseen = bench.fit_questions(other)
    assert steps < foreseen <= steps + price * 16
    assert bench.fit(recipe, other, DEMO_TEACHERS).questions == foreseen
    resumed, recipe = worker(tmp_path, demo)
    again = resumed.fit(recipe, settings, DEMO_TEACHERS)
    assert again.questions == first.questions
    assert again.recipe == first.recipe
    assert (again.losses == first.losses).all()


@pytest.mark.usefixtures("own_dataset_cache")
def test_block_outputs_need_the_answers_to_all_rows_whose_states_they_hold(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge_search.engine.learners import block_outputs
    from merge_search.search.trial import worker as module

    for place in (block_outputs, module):
        monkeypatch.setattr(place, "MOST_INPUTS", 12)
    bench, recipe = worker(tmp_path, demo)
    settings = FitSettings(per="block", steps=1, batch_rows=16, loss="block_output")
    foreseen = bench.fit_questions(settings)
    assert foreseen == (3 * 12 + 4 * 12 + 12) * len(EXPERTS)
    assert bench.fit(recipe, settings, DEMO_TEACHERS).questions == foreseen
    assert bench.fit_questions(settings) == (3 * 12 + 4 * 12) * len(EXPERTS)
