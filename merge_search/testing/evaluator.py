"""What every evaluator promises."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from merge_search.errors import EvaluationError, InputError, TrialError
from merge_search.evaluation import (
    ComparesWithExperts,
    Differentiable,
    Evaluation,
    Evaluator,
    MetricInfo,
    Split,
    Teachable,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EvaluatorCase", "EvaluatorConformance"]

_ROWS = 4
_NOISE = 0.05
"""Standard deviation by which weights are moved, relative to that of their tensor."""
_KL_TO_ITSELF = 0.01
"""Largest divergence of a model from its own stored outputs, in nats. The stored ones are rounded."""


@dataclass(frozen=True)
class EvaluatorCase:
    """An evaluator to test, and a model that it can score.

    Attributes:
        build: Builds the evaluator. Every call builds an equal one, with two or more questions in every scored split.
        model: The live model, a `torch.nn.Module`. The tests change its weights and restore them.
        tokenizer: The model's tokenizer.
        folder: The folder of the model's checkpoint.
        changed: Functions that build the evaluator with other questions, prompts or metrics.
        wrong: Functions that build the evaluator with wrong options. Each must raise an `InputError`.
        fit_ids: The ids of the documents that a task's rows to fit on come from, to compare with the scored ones. None:
            they are not known.
        is_repeatable: False where the same weights need not give the same scores, as for seconds.
        reads_outputs: False where the score does not depend on what the model computes, as for the number of
            parameters.
    """

    build: Callable[[], Evaluator]
    model: Any
    tokenizer: Any = None
    folder: str = ""
    changed: Sequence[Callable[[], Evaluator]] = ()
    wrong: Sequence[Callable[[], object]] = ()
    fit_ids: Callable[[Any, str], Sequence[str]] | None = None
    is_repeatable: bool = True
    reads_outputs: bool = True

    def bound(self) -> Evaluator:
        """A new evaluator, bound to the model."""
        return self.bind(self.build())

    def bind(self, evaluator: Evaluator) -> Evaluator:
        """Bind an evaluator to the model. Its experts, where it compares with some, are the model moved by noise."""
        evaluator.bind(self.model, self.tokenizer, folder=self.folder)
        if isinstance(evaluator, ComparesWithExperts):
            for number, expert in enumerate(evaluator.compared_experts(), start=1):
                with _moved(self.model, seed=number):
                    evaluator.cache_expert(expert)
        return evaluator

    def scored_splits(self, evaluator: Evaluator) -> list[Split]:
        """The splits that have questions in every metric, without the one to fit on."""
        counts = [m.n_questions for m in evaluator.metrics()]
        return [s for s in Split if s is not Split.FIT and all(n.get(s) for n in counts)]


class EvaluatorConformance:
    """Inherit and define the fixture `case`, which returns an `EvaluatorCase`."""

    def test_metrics_are_known_before_a_model_is_bound(self, case: EvaluatorCase) -> None:
        """Every metric has a name of its own and says how many questions it has in each split."""
        metrics = case.build().metrics()
        assert metrics, "an evaluator needs a metric"
        names = [m.name for m in metrics]
        assert len(set(names)) == len(names), f"a metric stands twice: {names}"
        for metric in metrics:
            assert isinstance(metric, MetricInfo)
            assert "/" not in metric.task
            assert all(n > 0 for n in metric.n_questions.values()), metric
            assert Split.SEARCH in metric.n_questions, f"{metric.name} has no question to search on"
        assert case.build().metrics() == metrics

    def test_the_fingerprint_is_stable(self, case: EvaluatorCase) -> None:
        """Evaluators built alike have one fingerprint, and binding or scoring does not change it."""
        evaluator = case.build()
        before = evaluator.fingerprint()
        assert before
        assert case.build().fingerprint() == before
        case.bind(evaluator).evaluate(Split.SEARCH)
        assert evaluator.fingerprint() == before

    def test_the_fingerprint_follows_what_changes_the_questions(self, case: EvaluatorCase) -> None:
        """Other questions, prompts or metrics give another fingerprint, each a different one."""
        found = [case.build().fingerprint(), *(build().fingerprint() for build in case.changed)]
        assert len(set(found)) == len(found)

    def test_wrong_options_are_an_input_error(self, case: EvaluatorCase) -> None:
        """The constructor refuses wrong options with an `InputError`, never with another exception."""
        for build in case.wrong:
            try:
                build()
            except InputError:
                continue
            raise AssertionError("wrong options were accepted")

    def test_a_second_model_may_be_bound(self, case: EvaluatorCase) -> None:
        """Bound to another model, it scores that one as it would score the same weights in the first one."""
        if not case.is_repeatable:
            return
        import copy

        split = Split.SEARCH
        with _moved(case.model):
            other = copy.deepcopy(case.model)
        twice, once = case.bound(), case.bound()
        before = twice.evaluate(split)
        twice.bind(other, case.tokenizer, folder=case.folder)
        found = twice.evaluate(split)
        with _moved(case.model):
            wanted = once.evaluate(split)
        twice.bind(case.model, case.tokenizer, folder=case.folder)
        for one, two in ((found, wanted), (twice.evaluate(split), before)):
            for name, scores in one.scores.items():
                assert np.allclose(scores.values, two.scores[name].values, atol=1e-6), name

    def test_nothing_is_scored_before_a_model_is_bound(self, case: EvaluatorCase) -> None:
        """`evaluate` without a model raises `EvaluationError`."""
        _raises(EvaluationError, lambda: case.build().evaluate(Split.SEARCH))

    def test_every_metric_is_reported_with_one_value_per_question(self, case: EvaluatorCase) -> None:
        """`evaluate` reports what `metrics` announced: as many ids and finite values as there are questions."""
        evaluator = case.bound()
        for split in case.scored_splits(evaluator):
            evaluation = evaluator.evaluate(split)
            evaluation.check_finite()
            assert (evaluation.split, evaluation.fidelity) == (split, 1.0)
            assert evaluation.cost.evaluate_s >= 0
            assert set(evaluation.scores) == {m.name for m in evaluator.metrics()}
            for metric in evaluator.metrics():
                scores = evaluation.scores[metric.name]
                n = metric.n_questions[split]
                assert len(scores.ids) == len(scores.values) == n, f"{metric.name} on {split}"
                assert scores.probability is None or len(scores.probability) == n
                assert math.isnan(scores.stderr) or scores.stderr >= 0

    def test_splits_are_disjoint(self, case: EvaluatorCase) -> None:
        """No document of a task is in two splits. A count of the whole model has no documents."""
        evaluator = case.bound()
        seen: dict[str, set[str]] = {}
        for split in case.scored_splits(evaluator):
            for name, scores in evaluator.evaluate(split).scores.items():
                if _is_sampled(evaluator, name):
                    assert not seen.setdefault(name, set()) & set(scores.ids), f"{name} on {split}"
                    seen[name] |= set(scores.ids)

    def test_questions_of_a_smaller_fidelity_are_the_first_of_a_larger_one(self, case: EvaluatorCase) -> None:
        """Fidelities are nested, so candidates scored at two fidelities share questions."""
        evaluator = case.bound()
        whole, before = evaluator.evaluate(Split.SEARCH), dict.fromkeys((m.name for m in evaluator.metrics()), 0)
        for fidelity in (1e-6, 0.3, 0.5, 1.0):
            for name, scores in evaluator.evaluate(Split.SEARCH, fidelity).scores.items():
                assert scores.ids == whole.scores[name].ids[: len(scores.ids)], f"{name} at {fidelity}"
                assert before[name] <= len(scores.ids)
                before[name] = len(scores.ids)

    def test_a_fidelity_outside_its_bounds_is_refused(self, case: EvaluatorCase) -> None:
        """0 <= after < fidelity <= 1, as `window` checks it."""
        evaluator = case.bound()
        if _is_all_sampled(evaluator):
            for fidelity, after in ((0.0, 0.0), (1.5, 0.0), (0.5, 0.5)):
                _raises(EvaluationError, partial(evaluator.evaluate, Split.SEARCH, fidelity, after=after))

    def test_the_rest_of_the_questions_continues_a_prefix(self, case: EvaluatorCase) -> None:
        """The first half and the questions after it are together the whole: racing asks nothing twice."""
        evaluator = case.bound()
        if not _is_all_sampled(evaluator):
            return
        half, rest = evaluator.evaluate(Split.SEARCH, 0.5), evaluator.evaluate(Split.SEARCH, 1.0, after=0.5)
        whole = evaluator.evaluate(Split.SEARCH)
        for name, scores in whole.scores.items():
            assert half.scores[name].ids + rest.scores[name].ids == scores.ids, name
            if case.is_repeatable and not scores.is_linearised:
                joined = half.scores[name].joined(rest.scores[name])
                np.testing.assert_allclose(joined.values, scores.values, rtol=1e-3, atol=1e-4, err_msg=name)

    def test_the_same_weights_give_the_same_scores(self, case: EvaluatorCase) -> None:
        """Scoring twice gives the same numbers to the bit, and so does another evaluator built alike."""
        if case.is_repeatable:
            evaluator = case.bound()
            first = evaluator.evaluate(Split.SEARCH)
            _check_same_scores(first, evaluator.evaluate(Split.SEARCH))
            _check_same_scores(first, case.bound().evaluate(Split.SEARCH))

    def test_two_models_are_asked_the_same_questions_in_the_same_order(self, case: EvaluatorCase) -> None:
        """Weights changed in place are scored at once, on the same questions: comparisons are paired."""
        evaluator = case.bound()
        one = evaluator.evaluate(Split.SEARCH)
        with _moved(case.model):
            two = evaluator.evaluate(Split.SEARCH)
        assert {name: s.ids for name, s in one.scores.items()} == {name: s.ids for name, s in two.scores.items()}
        assert any((s.values != two.scores[name].values).any() for name, s in one.scores.items()), (
            "no score has changed"
        )
        if case.is_repeatable:
            _check_same_scores(one, evaluator.evaluate(Split.SEARCH))

    def test_broken_weights_are_a_failure_and_no_score(self, case: EvaluatorCase) -> None:
        """NaN among the weights raises a `TrialError` or gives scores that are not finite. It leaves nothing behind."""
        if not case.reads_outputs:
            return
        evaluator = case.bound()
        before = evaluator.evaluate(Split.SEARCH)
        with _moved(case.model, by=math.nan):
            _raises(TrialError, lambda: evaluator.evaluate(Split.SEARCH).check_finite())
        _check_same_scores(before, evaluator.evaluate(Split.SEARCH))

    def test_questions_are_counted(self, case: EvaluatorCase) -> None:
        """`n_asked` grows by the questions that an evaluation says it cost. An evaluator may also leave it at 0."""
        evaluator = case.bound()
        for fidelity in (1.0, 0.5):
            before = evaluator.n_asked
            evaluation = evaluator.evaluate(Split.SEARCH, fidelity)
            assert evaluator.n_asked in (0, before + evaluation.cost.questions)

    def test_global_random_generators_are_left_alone(self, case: EvaluatorCase) -> None:
        """Building, binding, scoring and fitting leave the generators of random, numpy and torch as they were."""
        import torch

        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
        evaluator = case.bound()
        evaluator.evaluate(Split.SEARCH)
        for task, rows in _fit_rows(evaluator).items():
            assert isinstance(evaluator, Differentiable)
            evaluator.loss(task, rows)
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])

    # Of evaluators that compare with experts (`ComparesWithExperts`).

    def test_experts_are_seen_before_anything_is_compared_with_them(self, case: EvaluatorCase) -> None:
        """Without its experts' answers it scores nothing, an unknown expert is refused, and what is asked counts."""
        evaluator = case.build()
        if not isinstance(evaluator, ComparesWithExperts):
            return
        experts = list(evaluator.compared_experts())
        assert experts
        evaluator.bind(case.model, case.tokenizer, folder=case.folder)
        before = evaluator.n_asked
        for expert in experts:
            _raises(EvaluationError, lambda: evaluator.evaluate(Split.SEARCH))
            evaluator.cache_expert(expert)
        assert evaluator.n_asked > before
        evaluator.evaluate(Split.SEARCH)
        _raises(EvaluationError, lambda: evaluator.cache_expert("no such expert"))

    # Of evaluators with a loss (`Differentiable`); of others there is nothing to check.

    def test_losses_are_known_before_a_model_is_bound(self, case: EvaluatorCase) -> None:
        """The number of rows to fit on and the kinds of loss of each task need no model."""
        evaluator = case.build()
        if isinstance(evaluator, Differentiable):
            for task, n in evaluator.fit_tasks().items():
                assert n >= 0
                assert evaluator.losses(task), f"task {task!r} has no loss"

    def test_every_loss_is_a_finite_scalar_whose_gradient_reaches_the_weights(self, case: EvaluatorCase) -> None:
        """Every kind of loss is a float32 scalar with a graph: its gradient is finite and not zero everywhere."""
        evaluator = case.bound()
        for task, rows, kind in _losses(evaluator):
            with _taught(case, evaluator, task, rows, kind), _requiring_gradients(case.model):
                loss = evaluator.loss(task, rows, kind=kind)  # type: ignore[attr-defined]
                assert (str(loss.dtype), loss.ndim) == ("torch.float32", 0), f"{task}, {kind}: {loss}"
                assert math.isfinite(loss.item()), f"{task}, {kind}"
                loss.backward()
                gradients = [p.grad for p in case.model.parameters() if p.grad is not None]
                assert gradients, f"{task}, {kind}: no gradient"
                assert all(g.isfinite().all() for g in gradients), f"{task}, {kind}"
                assert any(g.any() for g in gradients), f"{task}, {kind}: every gradient is zero"

    def test_equal_rows_give_equal_losses_and_a_loss_is_the_mean_over_its_rows(self, case: EvaluatorCase) -> None:
        """Batches of any rows may be drawn: a loss depends on its rows alone."""
        evaluator = case.bound()
        for task, rows, kind in _losses(evaluator):
            with _taught(case, evaluator, task, rows, kind):
                whole = _loss(evaluator, task, rows, kind)
                assert _loss(evaluator, task, rows, kind) == whole
                alone = [_loss(evaluator, task, [row], kind) for row in rows]
                np.testing.assert_allclose(whole, np.mean(alone), rtol=1e-3, atol=1e-4, err_msg=f"{task}, {kind}")

    def test_rows_to_fit_on_are_never_scored(self, case: EvaluatorCase) -> None:
        """The documents of `fit_ids` are in no scored split."""
        evaluator = case.bound()
        if case.fit_ids is None or not isinstance(evaluator, Differentiable):
            return
        for task, n in evaluator.fit_tasks().items():
            fit = set(case.fit_ids(evaluator, task))
            assert len(fit) == n
            for split in case.scored_splits(evaluator):
                scores = evaluator.evaluate(split).scores
                assert not any(fit & set(s.ids) for name, s in scores.items() if name.startswith(f"{task}/"))

    def test_an_unknown_task_row_or_loss_is_a_typed_error(self, case: EvaluatorCase) -> None:
        """Mistakes of a caller are an `EvaluationError` or an `InputError`."""
        evaluator = case.bound()
        for task, rows in _fit_rows(evaluator).items():
            assert isinstance(evaluator, Differentiable)
            n = evaluator.fit_tasks()[task]
            _raises((EvaluationError, InputError), partial(evaluator.loss, f"not {task}", rows))
            _raises((EvaluationError, InputError), partial(evaluator.loss, task, [n]))
            _raises((EvaluationError, InputError), partial(evaluator.loss, task, []))
            _raises((EvaluationError, InputError), partial(evaluator.loss, task, rows, kind="no such loss"))

    def test_a_model_does_not_differ_from_its_own_stored_outputs(self, case: EvaluatorCase) -> None:
        """The loss ``kl`` of the teacher itself is zero up to rounding, and larger for another model."""
        evaluator = case.bound()
        for task, rows, kind in _losses(evaluator):
            if kind != "kl":
                continue
            assert isinstance(evaluator, Teachable)
            assert evaluator.teacher_questions(task) >= 1
            evaluator.cache_teacher(task, rows)
            itself = _loss(evaluator, task, rows, kind)
            assert abs(itself) < _KL_TO_ITSELF, f"{task}: {itself}"
            with _moved(case.model, by=10 * _NOISE):
                assert _loss(evaluator, task, rows, kind) > itself


def _raises(kind: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{kind} was not raised")


def _is_sampled(evaluator: Evaluator, name: str) -> bool:
    """Whether a metric has questions; a count of the whole model is one number on every split."""
    return next(max(m.n_questions.values()) > 1 for m in evaluator.metrics() if m.name == name)


def _is_all_sampled(evaluator: Evaluator) -> bool:
    return all(_is_sampled(evaluator, m.name) for m in evaluator.metrics())


def _check_same_scores(one: Evaluation, two: Evaluation) -> None:
    assert set(one.scores) == set(two.scores)
    for name, a in one.scores.items():
        b = two.scores[name]
        assert a.ids == b.ids, name
        assert a.values.tolist() == b.values.tolist(), name
        assert a.score == b.score, name


def _fit_rows(evaluator: Evaluator) -> dict[str, list[int]]:
    """A few rows of each task that has any."""
    if not isinstance(evaluator, Differentiable):
        return {}
    return {task: list(range(min(n, _ROWS))) for task, n in evaluator.fit_tasks().items() if n}


def _losses(evaluator: Evaluator) -> Iterator[tuple[str, list[int], str]]:
    """Every task, a few of its rows, and every kind of its losses."""
    for task, rows in _fit_rows(evaluator).items():
        assert isinstance(evaluator, Differentiable)
        yield from ((task, rows, kind) for kind in evaluator.losses(task))


def _loss(evaluator: Any, task: str, rows: Sequence[int], kind: str) -> float:
    import torch

    with torch.no_grad():
        return float(evaluator.loss(task, rows, kind=kind))


@contextmanager
def _taught(case: EvaluatorCase, evaluator: Any, task: str, rows: list[int], kind: str) -> Iterator[None]:
    """The model as it is now is the teacher; inside it has other weights."""
    if kind in ("pseudo", "correct"):
        evaluator.set_pseudo_labels(task, dict(zip(rows, evaluator.predict(task, rows), strict=True)))
    if kind == "kl":
        evaluator.cache_teacher(task, rows)
    with _moved(case.model):
        yield


@contextmanager
def _moved(model: Any, *, by: float = _NOISE, seed: int = 0) -> Iterator[None]:
    """Inside, every weight is moved by noise of `by` standard deviations of its tensor."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    kept: list[tuple[Tensor, Tensor]] = [(p, p.detach().clone()) for p in model.parameters()]
    with torch.no_grad():
        for p, before in kept:
            spread = before.float().std().item() if before.numel() > 1 else 1.0
            noise = torch.randn(p.shape, generator=draw).to(p.device, torch.float32)
            p.copy_(before + (by * (spread or 1.0) * noise).to(p.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before in kept:
                p.copy_(before)


@contextmanager
def _requiring_gradients(model: Any) -> Iterator[None]:
    kept = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in kept:
        p.requires_grad_(True)
        p.grad = None
    try:
        yield
    finally:
        for p, required in kept:
            p.requires_grad_(required)
            p.grad = None
