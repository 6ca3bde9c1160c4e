"""The conformance classes notice what they are for: a plug-in with one fault fails the test of that promise."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from merge_search.errors import EvaluationError
from merge_search.evaluation import Cost, Evaluation, Evaluator, MetricInfo, Scores, Split, window
from merge_search.space import Float, SearchSpace
from merge_search.testing import (
    EvaluatorCase,
    EvaluatorConformance,
    SearchSpaceCase,
    SearchSpaceConformance,
    example_context,
)

CONTEXT = example_context(2)
SPLITS = (Split.SEARCH, Split.VALIDATION, Split.TEST)


class Outputs(Evaluator):
    """The output of a linear layer for each of its inputs; `fault` names what is wrong with it."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.model: Any = None

    def ids(self, split: Split) -> list[str]:
        name = "" if self.fault == "splits" else str(split)
        return [hashlib.sha256(f"{name}{i}".encode()).hexdigest() for i in range(8)]

    def metrics(self) -> list[MetricInfo]:
        return [MetricInfo("t", "output", True, dict.fromkeys(SPLITS, 9 if self.fault == "count" else 8))]

    def fingerprint(self) -> str:
        return str(random.random()) if self.fault == "fingerprint" else "outputs"

    def bind(self, model: Any, tokenizer: Any, *, folder: str) -> None:
        self.model = model
        self.frozen = model.weight.detach().clone()

    def evaluate(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        if self.model is None:
            raise EvaluationError("bind a model first")
        if self.fault == "generator":
            torch.rand(1)
        asked = window(8, fidelity, 0.0 if self.fault == "after" else after)
        weight = self.frozen if self.fault == "frozen" else self.model.weight
        values = weight.detach().double().flatten()[asked].numpy() * 1.0
        if self.fault == "not repeatable":
            values = values + np.random.default_rng().random(len(values))
        if self.fault == "broken weights":
            values = np.nan_to_num(values)
        ids = self.ids(split)[asked]
        if self.fault == "prefix" and fidelity < 1:
            ids = ids[::-1]
        self.n_asked += len(ids) + (self.fault == "counted twice")
        scores = Scores(tuple(ids), values, float(values.mean()), float(values.std(ddof=1)))
        return Evaluation(split, fidelity, {"t/output": scores}, Cost(questions=len(ids)))

    def fit_tasks(self) -> dict[str, int]:
        return {"t": 4}

    def losses(self, task: str) -> tuple[str, ...]:
        return ("gold",)

    def predict(self, task: str, rows: Any) -> list[int]:
        return [0 for _ in rows]

    def set_pseudo_labels(self, task: str, labels: Any) -> None: ...

    def loss(self, task: str, rows: Any, kind: str = "gold") -> Any:
        if task != "t" or kind != "gold" or not rows or max(rows) >= 4:
            raise KeyError(task) if self.fault == "untyped" else EvaluationError(task)
        values = self.model.weight.flatten()[list(rows)].square()
        if self.fault == "graph":
            values = values.detach().requires_grad_(True)
        return values.sum() if self.fault == "sum" else values.mean()


def evaluator_case(fault: str = "") -> EvaluatorCase:
    torch.manual_seed(0)
    ids = Outputs(fault).ids(Split.SEARCH)[:4] if fault == "fitted on" else list("abcd")
    changed = [Outputs] if fault == "changed" else []
    return EvaluatorCase(
        lambda: Outputs(fault), torch.nn.Linear(8, 1, bias=False), fit_ids=lambda *_: ids, changed=changed
    )


class TestSound(EvaluatorConformance):
    @pytest.fixture
    def case(self) -> EvaluatorCase:
        return evaluator_case()


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("splits", "test_splits_are_disjoint"),
        ("count", "test_every_metric_is_reported_with_one_value_per_question"),
        ("fingerprint", "test_the_fingerprint_is_stable"),
        ("changed", "test_the_fingerprint_follows_what_changes_the_questions"),
        ("generator", "test_global_random_generators_are_left_alone"),
        ("after", "test_the_rest_of_the_questions_continues_a_prefix"),
        ("frozen", "test_two_models_are_asked_the_same_questions_in_the_same_order"),
        ("not repeatable", "test_the_same_weights_give_the_same_scores"),
        ("broken weights", "test_broken_weights_are_a_failure_and_no_score"),
        ("prefix", "test_questions_of_a_smaller_fidelity_are_the_first_of_a_larger_one"),
        ("counted twice", "test_questions_are_counted"),
        ("untyped", "test_an_unknown_task_row_or_loss_is_a_typed_error"),
        ("graph", "test_every_loss_is_a_finite_scalar_whose_gradient_reaches_the_weights"),
        ("sum", "test_equal_rows_give_equal_losses_and_a_loss_is_the_mean_over_its_rows"),
        ("fitted on", "test_rows_to_fit_on_are_never_scored"),
    ],
)
def test_a_fault_of_an_evaluator_is_noticed(fault: str, test: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        getattr(EvaluatorConformance(), test)(evaluator_case(fault))


class Strength(SearchSpace):
    """One coefficient for all experts; `fault` names what is wrong with it."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.calls = 0
        low = -1.0 if fault == "logarithm" else 0.1
        self.parameters = {"strength": Float(low, 1.0, log=True)}
        if fault == "order":
            self.parameters = {str(random.random()): Float(0.1, 1.0)}
        if fault == "notes":
            self.notes = "a note"

    def decode(self, point: Any) -> Any:
        self.calls += 1
        strength = next(iter(point.values())) * (self.calls if self.fault == "state" else 1)
        if self.fault == "total" and strength == 1.0:
            raise ValueError("too strong")
        if self.fault == "torch":
            import torch.nn  # noqa: F401
        recipe = CONTEXT.recipe(coefficients=dict.fromkeys(CONTEXT.experts, strength))
        return recipe.model_copy(update={"seed": 99}) if self.fault == "seed" else recipe

    def encode(self, recipe: Any) -> Any:
        if recipe.models != CONTEXT.models and self.fault != "strangers":
            return None
        strength = recipe.coefficients["code"]
        return {"strength": strength / 2 + 0.1 if self.fault == "inverse" else strength}

    def initial_points(self) -> Any:
        return [{"strength": 2.0 if self.fault == "start" else 0.5}] * (2 if self.fault == "twice" else 1)


class TestSoundSpace(SearchSpaceConformance):
    @pytest.fixture
    def case(self) -> SearchSpaceCase:
        return SearchSpaceCase(Strength, CONTEXT)


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("logarithm", "test_parameters_are_flat_bounded_and_named"),
        ("order", "test_parameters_are_the_same_in_every_space_built_alike"),
        ("total", "test_every_point_is_a_valid_recipe_of_the_studys_models"),
        ("seed", "test_every_point_is_a_valid_recipe_of_the_studys_models"),
        ("state", "test_a_point_always_gives_the_same_recipe_and_is_left_alone"),
        ("inverse", "test_a_recipes_point_decodes_to_the_recipe"),
        ("strangers", "test_a_recipe_of_other_models_has_no_point"),
        ("start", "test_initial_points_are_complete_within_bounds_and_distinct"),
        ("twice", "test_initial_points_are_complete_within_bounds_and_distinct"),
        ("notes", "test_notes_are_sentences_for_the_users_log"),
        ("torch", "test_it_needs_no_torch"),
    ],
)
def test_a_fault_of_a_space_is_noticed(fault: str, test: str) -> None:
    with pytest.raises((AssertionError, ValueError, ImportError)):
        getattr(SearchSpaceConformance(), test)(SearchSpaceCase(lambda: Strength(fault), CONTEXT))


def test_wrong_options_that_are_accepted_are_noticed() -> None:
    with pytest.raises(AssertionError, match="wrong options were accepted"):
        SearchSpaceConformance().test_wrong_options_are_a_space_error(
            SearchSpaceCase(Strength, CONTEXT, wrong=[Strength])
        )
    case = EvaluatorCase(Outputs, None, wrong=[Outputs])
    with pytest.raises(AssertionError, match="wrong options were accepted"):
        EvaluatorConformance().test_wrong_options_are_an_input_error(case)


def test_importing_it_imports_neither_pytest_nor_torch() -> None:
    code = "import sys, merge_search.testing; assert not {'pytest', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
