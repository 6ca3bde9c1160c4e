"""lm-eval's tasks as an evaluator: what its command line would score, on one live model, without its overheads."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators.isolation import isolated_generators
from evaluators.lm_eval.fit_rows import FitRows, fit_source, losses_of
from evaluators.lm_eval.options import LmEvalOptions
from evaluators.lm_eval.questions import TaskQuestions
from evaluators.lm_eval.scores import score_task
from evaluators.lm_eval.tasks import load_tasks, quiet_lm_eval
from merge_search.errors import EvaluationError, StudyFileError, nearest
from merge_search.evaluation import Cost, Evaluation, Evaluator, MetricInfo, Scores, Split, SplitShares
from merge_search.seeding import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from evaluators.lm_eval.losses import LiveLoss
    from evaluators.lm_eval.requests import LiveRequests

__all__ = ["LmEval"]


class LmEval(Evaluator):
    """Tasks of lm-eval 0.4.13, Hugging Face backend: an `Evaluator` that is `Teachable` and `Counting`.

    Scores are those of `lm_eval.simple_evaluate` on the same documents with ``fewshot_random_seed=seed`` (what the
    command line computes): prompts, batches, filters, metrics and aggregations are lm-eval's own, kept between
    candidates. `tree_packing` alone departs from its path, in float32 by less than 1e-4 per log-likelihood.
    As in lm-eval the model's own generation settings apply where a task does not override them.

    Metrics are named ``task/metric``; under a task's second and further filters ``task/metric,filter``.

    Args:
        options: See `LmEvalOptions`.
        shares: Shares of the splits; a document's hash decides where it belongs.
        folder: The folder that relative paths are relative to; None: the current directory.
        seed: Draws the shots, and whatever a task that samples its answers draws.

    Raises:
        StudyFileError: every problem with options, task files, tasks and metrics; splits with fewer than two questions.
    """

    def __init__(
        self, options: Mapping[str, Any], *, shares: SplitShares, seed: int, folder: Path | None = None
    ) -> None:
        self.options = LmEvalOptions.parse(options, folder)
        self.shares = shares
        self.seed = seed
        self.n_asked = 0
        self.tasks: list[TaskQuestions] = []
        self._fit: dict[str, FitRows] = {}
        self._live: LiveRequests | None = None
        self._loss: LiveLoss | None = None
        with isolated_generators(seed), quiet_lm_eval():
            tasks, problems = load_tasks(self.options, folder)
            for name, task in tasks.items():
                source = fit_source(task, self.options.fit)
                withheld = shares.fit if source == "search" else 0.0
                try:
                    questions = TaskQuestions.load(name, task, self.options, replace(shares, fit=withheld), seed)
                    self.tasks.append(questions)
                    self._fit[name] = FitRows(questions, source, self.options.fit_limit)
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
        """Hash of documents, prompts, right answers, task settings, metrics, splits, fit rows; not of paths or batch size."""
        chat = self.options.apply_chat_template
        shown = {
            "tasks": {t.name: t.digest for t in self.tasks},
            "shares": asdict(self.shares),
            "chat": [self.seed, self.options.system_instruction] if chat else None,
            "fit": {name: fit.digest() for name, fit in self._fit.items()},
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
        from evaluators.lm_eval.losses import LiveLoss
        from evaluators.lm_eval.requests import LiveRequests  # loads torch

        with isolated_generators(self.seed), quiet_lm_eval():
            self._live = LiveRequests(
                model, tokenizer, folder=folder, options=self.options, tasks=self.tasks, seed=self.seed
            )
        self._loss = LiveLoss(self._live, self.options, self.seed)

    def evaluate(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        """Score the bound model as it is now on `window(n, fidelity, after)` of each task's questions.

        Raises:
            EvaluationError: lm-eval failed, or there is nothing to ask.
            NonFiniteError: NaN or infinity among the log-likelihoods.
            torch.OutOfMemoryError, MemoryError: even after halving the batch size twice.
        Determinism: the same weights give the same evaluation; global generators are as before.
        """
        if self._live is None:
            raise EvaluationError("bind a model before evaluating")
        began = time.perf_counter()
        asked = {task.name: task.select(split, fidelity, after) for task in self.tasks}
        if empty := [name for name, questions in asked.items() if not questions]:
            raise EvaluationError(f"the {split} split has no questions of {', '.join(empty)}")
        n_questions, scores = sum(map(len, asked.values())), dict[str, Scores]()
        with isolated_generators(derive_seed(self.seed, "evaluate")), quiet_lm_eval():
            try:
                self._live.ask(asked)
            finally:
                self.n_asked += math.ceil(self._live.share_answered * n_questions)
            for task in self.tasks:
                scores |= score_task(task, asked[task.name], self.seed)
        return Evaluation(split, fidelity, scores, Cost(evaluate_s=time.perf_counter() - began, questions=n_questions))

    def fit_tasks(self) -> dict[str, int]:
        """Number of rows a learner may fit on, by task; none of them is ever scored.

        They are the task's training split (option `fit`), else the fit share of its questions, by hash, `fit_limit`
        at most. Cost: on the first call every row of the training split is hashed.

        Raises:
            StudyFileError: the task's own code cannot read or render them.
        """
        return {name: len(fit.rows) for name, fit in self._fit.items()}

    def predict(self, task: str, rows: Sequence[int]) -> list[Any]:
        """The answers of the bound model, as it is now, to these fit rows.

        Multiple choice: the number of the likeliest choice. Generation: the text behind the prompt up to the first
        stop string, by lm-eval's own path (greedy unless the task samples).

        Raises: as `evaluate`; EvaluationError for an unknown task or row; InputError for a task that scores given texts.
        """
        return self._losses().predict(self._fit_rows(task), rows)

    def set_pseudo_labels(self, task: str, labels: Mapping[int, Any]) -> None:
        """Answers for the loss ``pseudo``, by fit row, as `predict` gives them: usually the task's own expert's.

        Other rows keep theirs.

        Raises:
            EvaluationError: an unknown row, or a label that cannot be an answer.
            InputError: a task that scores given texts.
        """
        from evaluators.lm_eval.losses import check_pseudo_labels

        fit = self._fit_rows(task)
        fit.pseudo |= check_pseudo_labels(fit, labels)

    def cache_teacher(self, task: str, rows: Sequence[int]) -> None:
        """Keep how the bound model, as it is now, answers these fit rows of `task`, for the loss ``kl``: a task's expert.

        Multiple choice: the softmax over the choices. Generation: its own answer and, in every place of it, the
        likeliest tokens (`teacher.TOP`). A given text: the same in every place of the text. Other rows keep theirs.

        Raises: as `predict`.
        """
        self._losses().cache_teacher(self._fit_rows(task), rows)

    def teacher_questions(self, task: str) -> int:
        """What `cache_teacher` asks for each row: one question, two where the answer is generated first."""
        return 2 if self._fit_rows(task).task.OUTPUT_TYPE == "generate_until" else 1

    def losses(self, task: str) -> tuple[str, ...]:
        """Kinds of `loss` that a task of its output type has."""
        return losses_of(self._fit_rows(task).task.OUTPUT_TYPE)

    def loss(self, task: str, rows: Sequence[int], kind: str = "gold") -> Tensor:
        """Mean loss of the bound live model on these fit rows, with a graph to the parameters that require one.

        Args:
            task: A key of `fit_tasks`.
            rows: Numbers below ``fit_tasks()[task]``, in any order, repeats allowed; one forward pass, not batched.
            kind:
                ``gold``: mean over rows of the mean over the right answer's tokens of -log p(token | what precedes).
                The answer of multiple choice is the right choice, of generation the target and what ends it (a
                stop string of line breaks, else the end-of-text token), of a text to be scored the text.
                ``pseudo``: the same for the answers of `set_pseudo_labels`.
                ``kl``: mean over rows of KL(remembered || live), over the choices, or mean over the answer's tokens
                over the vocabulary, in nats (as SELF-PARAM distils, arXiv 2410.00487; differs: from expert to merge).
                ``entropy``: of the softmax over the choices' summed log-likelihoods, divided by log(n_choices), in
                [0, 1] (AdaMerging, arXiv 2310.02575; differs: over choices, not over classes of a head).
                ``choice``: -log of the right choice's share in that softmax, which is what accuracy follows.

        Returns:
            Scalar, float32, on the model's device. The log-softmax is float32 whatever the model's dtype.

        Raises:
            NonFiniteError: NaN or infinity.
            EvaluationError: unknown task or row, one without a label, or the model failed; out of memory is passed on.
            InputError: unknown kind, or one that the task does not have.
        """
        return self._losses().loss(self._fit_rows(task), rows, kind)

    def _losses(self) -> LiveLoss:
        if self._loss is None:
            raise EvaluationError("no model is bound: call bind before asking for losses or predictions")
        return self._loss

    def _fit_rows(self, task: str) -> FitRows:
        if task not in self._fit:
            raise EvaluationError(f"no task is called {task!r}{nearest(task, self._fit)}")
        return self._fit[task]
