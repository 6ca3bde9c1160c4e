"""lm-eval's tasks as an evaluator: what its command line would score, on one live model, without its overheads."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from evaluators.isolation import isolated_generators
from evaluators.lm_eval_options import LmEvalOptions
from evaluators.lm_eval_questions import TaskQuestions
from evaluators.lm_eval_scores import score_task
from evaluators.lm_eval_tasks import load_tasks, quiet_lm_eval
from merge_search.errors import EvaluationError, StudyFileError, nearest
from merge_search.evaluation import Cost, Evaluation, MetricInfo, Scores, Split, SplitShares
from merge_search.seeding import derive_seed

if TYPE_CHECKING:
    from evaluators.lm_eval_requests import LiveRequests

__all__ = ["LmEval"]


class LmEval:
    """Tasks of lm-eval 0.4.13, Hugging Face backend.

    Scores are those of `lm_eval.simple_evaluate` on the same documents with ``fewshot_random_seed=seed`` (what the
    command line computes): prompts, batches, filters, metrics and aggregations are lm-eval's own, kept between
    candidates. `tree_packing` alone departs from its path, in float32 by less than 1e-4 per log-likelihood.
    As in lm-eval the model's own generation settings apply where a task does not override them.

    Metrics are named ``task/metric``; under a task's second and further filters ``task/metric,filter``.

    Args:
        options: See `LmEvalOptions`.
        shares: Shares of the splits; a document's hash decides where it belongs.
        seed: Draws the shots, and whatever a task that samples its answers draws.

    Raises:
        StudyFileError: every problem with options, task files, tasks and metrics; splits with fewer than two questions.
    """

    def __init__(self, options: Mapping[str, Any], *, shares: SplitShares, seed: int) -> None:
        self.options = LmEvalOptions.parse(options)
        self.shares = shares
        self.seed = seed
        self.tasks: list[TaskQuestions] = []
        self._live: LiveRequests | None = None
        with isolated_generators(seed), quiet_lm_eval():
            tasks, problems = load_tasks(self.options)
            for name, task in tasks.items():
                try:
                    self.tasks.append(TaskQuestions.load(name, task, self.options, shares, seed))
                except StudyFileError as error:
                    problems += error.problems
        if not problems:
            names = {t.name for t in self.tasks}
            problems = [
                f"metrics: no task of this evaluator is called {name!r}{nearest(name, names)}"
                for name in self.options.metrics
                if name not in names
            ]
        if problems:
            raise StudyFileError(problems)

    def metrics(self) -> list[MetricInfo]:
        """Every metric of every task, in the order of `tasks`, the main one of each first."""
        return [info for task in self.tasks for info in task.infos()]

    def fingerprint(self) -> str:
        """Hash of documents, prompts, right answers, task settings, metrics and splits; not of paths or batch size."""
        chat = self.options.apply_chat_template
        shown = {
            "tasks": {t.name: t.digest for t in self.tasks},
            "shares": asdict(self.shares),
            "chat": [self.seed, self.options.system_instruction] if chat else None,
            "cut": [self.options.max_length, self.options.softmax_dtype],
        }
        return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()

    def bind(self, model: Any, tokenizer: Any, *, folder: str) -> None:
        """Make and tokenise all requests for a live model.

        Args:
            model: Hugging Face model on its final device; weights may change in place afterwards.
            tokenizer: Its tokenizer, or None to load that of `folder`.

        Raises:
            StudyFileError: prompts that this model or tokenizer cannot take.
        """
        from evaluators.lm_eval_requests import LiveRequests  # loads torch

        with isolated_generators(self.seed), quiet_lm_eval():
            self._live = LiveRequests(
                model, tokenizer, folder=folder, options=self.options, tasks=self.tasks, seed=self.seed
            )

    def evaluate(self, split: Split, fidelity: float = 1.0) -> Evaluation:
        """Score the bound model as it is now on the first ``ceil(fidelity * n)`` questions of each task.

        Raises:
            EvaluationError: lm-eval failed, or there is nothing to ask.
            NonFiniteError: NaN or infinity among the log-likelihoods.
            torch.OutOfMemoryError, MemoryError: even after halving the batch size twice.
        Determinism: the same weights give the same evaluation; global generators are as before.
        """
        if self._live is None:
            raise EvaluationError("bind a model before evaluating")
        if not 0 < fidelity <= 1:
            raise EvaluationError(f"fidelity must be in (0, 1], got fidelity={fidelity}")
        began = time.perf_counter()
        asked = {task.name: task.select(split, fidelity) for task in self.tasks}
        if empty := [name for name, questions in asked.items() if not questions]:
            raise EvaluationError(f"the {split} split has no questions of {', '.join(empty)}")
        scores: dict[str, Scores] = {}
        with isolated_generators(derive_seed(self.seed, "evaluate")), quiet_lm_eval():
            self._live.ask(asked)
            for task in self.tasks:
                scores |= score_task(task, asked[task.name], self.seed)
        n_questions = sum(map(len, asked.values()))
        return Evaluation(split, fidelity, scores, Cost(evaluate_s=time.perf_counter() - began, questions=n_questions))
