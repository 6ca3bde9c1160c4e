"""lm-eval's tasks as an evaluator: the scores of its command line, on one live model, without its overheads."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators.isolation import isolated_generators
from evaluators.lm_eval.answers import fit_requests
from evaluators.lm_eval.fit_rows import FitRows, fit_source
from evaluators.lm_eval.groups import Group, groups_of, score_group
from evaluators.lm_eval.options import LmEvalOptions
from evaluators.lm_eval.questions import TaskQuestions
from evaluators.lm_eval.scores import score_task
from evaluators.lm_eval.tasks import Loaded, load_tasks, quiet_lm_eval, reason, unknown_tasks
from merge_search.errors import EvaluationError, StudyFileError, nearest
from merge_search.evaluation import Cost, Evaluation, Evaluator, MetricInfo, Scores, Split, SplitShares, window
from merge_search.seeding import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from evaluators.lm_eval.losses import LiveLoss
    from evaluators.lm_eval.requests import LiveRequests

__all__ = ["LmEval"]

log = logging.getLogger(__name__)


class LmEval(Evaluator):
    """Tasks of lm-eval 0.4.13 with its Hugging Face backend: an `Evaluator` that is `Teachable`. `bind` imports torch.

    Scores are those of `lm_eval.simple_evaluate` on the same documents with ``fewshot_random_seed=seed``, which is what
    the command line computes. Prompts, batches, filters, metrics and aggregations are lm-eval's own and are kept
    between candidates. Only `tree_packing` computes differently: in float32 it changes a log-likelihood by less than
    1e-4. As in lm-eval, the model's own generation settings apply where a task does not override them.

    Metrics are named ``task/metric``, and under a task's second and further filters ``task/metric,filter``. A group or
    tag counts as one task (see `evaluators.lm_eval.groups`). Its members are scored, too.

    Args:
        options: See `LmEvalOptions`.
        shares: Shares of the splits. A document's hash decides which split it belongs to.
        folder: The folder that relative paths are relative to; None: the current directory.
        seed: Draws the shots, and the answers of tasks that sample them.

    Raises:
        StudyFileError: Every problem with options, task files, tasks and metrics, and every split with fewer than two
            questions.
    """

    def __init__(
        self, options: Mapping[str, Any], *, shares: SplitShares, seed: int, folder: Path | None = None
    ) -> None:
        self.options = LmEvalOptions.parse(options, folder)
        self.shares = shares
        self.seed = seed
        self.n_asked = 0
        self.tasks: list[TaskQuestions] = []
        self.groups: list[Group] = []
        self._fit: dict[str, FitRows] = {}
        self._live: LiveRequests | None = None
        self._loss: LiveLoss | None = None
        with isolated_generators(seed), quiet_lm_eval():
            tasks, named, problems = load_tasks(self.options, folder)
            for name, task in tasks.items():
                source = fit_source(task, self.options.fit)
                withheld = shares.fit if source == "search" else 0.0
                try:
                    questions = TaskQuestions.load(
                        name, task, self.options.for_task(name), replace(shares, fit=withheld), seed
                    )
                    self.tasks.append(questions)
                    self._fit[name] = FitRows(questions, source, self.options.fit_limit, self.options)
                except StudyFileError as error:
                    problems += error.problems
        if not problems and self.options.groups == "one":
            by_name = {t.name: t for t in self.tasks}
            try:
                self.groups, apart = groups_of(
                    [n for n in named if isinstance(n, Loaded)], by_name, self.options.metrics
                )
                for name in apart:
                    log.warning("%r: its tasks report no mean in common and count one by one", name)
            except StudyFileError as error:
                problems += error.problems
        self._counted = {n if isinstance(n, str) else n.name for n in named}
        if not problems:
            names = {t.name for t in self.tasks} | {g.name for g in self.groups}
            problems = [
                f"{key}: no task of this evaluator is called {name!r}{nearest(name, names)}"
                for key, by_task in (("metrics", self.options.metrics), ("task_options", self.options.task_options))
                for name in by_task
                if name not in names
            ]
        if problems:
            raise StudyFileError(problems)

    @staticmethod
    def unknown_tasks(options: Mapping[str, Any], folder: Path | None = None) -> list[str]:
        """A sentence for each name of a task that lm-eval does not know, with the nearest one. No data set is read.

        Raises:
            StudyFileError: Problems with the options.
        """
        with quiet_lm_eval():
            return unknown_tasks(LmEvalOptions.parse(options, folder), folder)

    def metrics(self) -> list[MetricInfo]:
        """Every metric of every task and group, a group before its members. The main metric of each comes first."""
        parents = self._parents()
        own = {task.name: task.infos() for task in self.tasks}
        by_name = {info.name: info for infos in own.values() for info in infos}
        out: dict[str, list[MetricInfo]] = {}
        for name, infos in own.items():
            for group in self.groups:
                if name in group.tasks and group.name not in out:
                    out[group.name] = list(group.infos(by_name, parents.get(group.name, "")))
            out[name] = [replace(info, member_of=parents.get(name, "")) for info in infos]
        return [info for infos in out.values() for info in infos]

    def _parents(self) -> dict[str, str]:
        """Task or group -> the group that counts instead of it. What the option ``tasks`` names counts itself, too."""
        out: dict[str, str] = {}
        for group in self.groups:
            for member in group.members:
                if member not in self._counted:
                    out.setdefault(member, group.name)
        return out

    def fingerprint(self) -> str:
        """sha256 of documents, prompts, right answers, task settings, metrics, splits and rows to fit on.

        Paths and the batch size are no part of it.
        """
        chat = {t.name: self.options.for_task(t.name).apply_chat_template for t in self.tasks}
        some = any(chat.values())
        shown: dict[str, Any] = {
            "tasks": {t.name: t.digest for t in self.tasks},
            "shares": asdict(self.shares),
            "chat": [self.seed, self.options.system_instruction] if some else None,
            "fit": {name: fit.digest() for name, fit in self._fit.items()},
            "cut": [self.options.max_length, self.options.softmax_dtype],
            **({"groups": [g.digest() for g in self.groups]} if self.groups else {}),
        }
        if some and not all(chat.values()):
            shown["chat of"] = [name for name, is_chat in chat.items() if is_chat]
        if thinking := {t.name: said for t in self.tasks if (said := self.options.for_task(t.name).thinking)}:
            shown["thinking"] = thinking
        if targets := {t.name: text for t in self.tasks if (text := self.options.target_of(t.name))}:
            shown["targets"] = targets
        return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()

    def check_prompts(self, folder: str) -> None:
        """Render a prompt of each task that uses a chat template with the tokenizer in `folder`.

        Raises:
            StudyFileError: Every task whose prompt cannot be rendered.
        """
        chat = [t for t in self.tasks if t.questions and self.options.for_task(t.name).apply_chat_template]
        if not chat:
            return
        from evaluators.lm_eval.templates import TemplateOnly  # loads transformers

        problems = []
        with isolated_generators(self.seed), quiet_lm_eval():
            for task in chat:
                options = self.options.for_task(task.name)
                try:
                    template = TemplateOnly(folder, options.template_args)
                    fit_requests(task.task, task.questions[0].doc, options, self.seed, template)
                except Exception as error:  # templates and tokenizers of somebody else
                    problems.append(
                        f"task {task.name!r}: its prompts cannot be rendered with the tokenizer in {folder}: "
                        f"{reason(error)}; give the base a chat template, or set apply_chat_template: false"
                    )
        if problems:
            raise StudyFileError(problems)

    def check_model(self, config: Mapping[str, Any], what: str) -> None:
        """Check that a model is a language model.

        Raises:
            StudyFileError: Its config names another architecture.
        """
        names = [str(name) for name in config.get("architectures") or []]
        if names and not any("CausalLM" in name or "LMHead" in name for name in names):
            raise StudyFileError(f"lm_eval needs language models, and {what} is a {names[0]}; judge it otherwise")

    def bind(self, model: Any, tokenizer: Any, *, folder: str) -> None:
        """Make and tokenise all requests for a live model.

        Args:
            model: A Hugging Face model on its final device. Its weights may change in place afterwards.
            tokenizer: Its tokenizer; None: the tokenizer in `folder` is loaded.
            folder: The folder of the checkpoint.

        Raises:
            StudyFileError: Prompts that this model or tokenizer cannot take.
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
            EvaluationError: lm-eval failed, or there is no question to ask.
            NonFiniteError: NaN or infinity among the log-likelihoods.
            torch.OutOfMemoryError: Even after halving the batch size twice.
            MemoryError: As `torch.OutOfMemoryError`.

        Determinism: The same weights give the same evaluation. Global generators are restored.
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
        if self.groups:
            of_split = {task.name: task.select(split, 1.0) for task in self.tasks}
            n = {name: len(questions) for name, questions in of_split.items()}
            first = {name: window(k, fidelity, after).start for name, k in n.items()}
            for group in self.groups:
                scores |= score_group(group, scores, first, n)
        cost = Cost(evaluate_s=time.perf_counter() - began, questions=n_questions)
        return Evaluation(split, fidelity, scores, cost, self._live.ends)

    def fit_tasks(self) -> dict[str, int]:
        """Number of rows to fit on by task. None of them is ever scored.

        The rows come from the task's training split (option `fit`), or else from the fit share of its questions. There
        are `fit_limit` at most, chosen by hash.

        Raises:
            StudyFileError: The task's own code cannot read or render them.

        Cost: The first call hashes every row of the training split.
        """
        return {name: len(fit.rows) for name, fit in self._fit.items()}

    def predict(self, task: str, rows: Sequence[int]) -> list[Any]:
        """The answers of the bound model, as it is now, to these rows to fit on.

        Returns:
            In multiple choice the number of the likeliest choice. In generation the text up to the first stop string,
            as lm-eval generates it (greedily, unless the task samples).

        Raises:
            EvaluationError: As `evaluate`, and for an unknown task or row.
            NonFiniteError: As `evaluate`.
            InputError: The task scores given texts, so the model has no answer of its own.
        """
        return self._losses().predict(self._fit_rows(task), rows)

    def set_pseudo_labels(self, task: str, labels: Mapping[int, Any]) -> None:
        """Store answers by row for the loss ``pseudo``, in the form of `predict`: usually those of the task's teacher.

        Rows that are not named keep their answers.

        Raises:
            EvaluationError: An unknown row, or a label that cannot be an answer.
            InputError: The task scores given texts.
        """
        from evaluators.lm_eval.losses import check_pseudo_labels

        fit = self._fit_rows(task)
        fit.pseudo |= check_pseudo_labels(fit, labels)

    def cache_teacher(self, task: str, rows: Sequence[int]) -> None:
        """Store how the bound model, as it is now, answers these rows of `task`, for the loss ``kl``.

        In multiple choice the softmax over the choices is stored. In generation the model's own answer is stored and,
        at each of its tokens, the distribution over the `distillation.TOP` likeliest tokens. For a given text the same
        distributions are stored at each of its tokens. Rows that are not named keep what was stored for them.

        Raises:
            EvaluationError: As `predict`.
            NonFiniteError: As `predict`.
        """
        self._losses().cache_teacher(self._fit_rows(task), rows)

    def teacher_questions(self, task: str) -> int:
        """Questions that `cache_teacher` asks per row: one, or two if the answer is generated first."""
        return 2 if self._fit_rows(task).task.OUTPUT_TYPE == "generate_until" else 1

    def generated_questions(self, task: str, kind: str) -> int:
        """One question per row where the loss generates the model's own answer first."""
        return int(kind == "entropy" and self._fit_rows(task).task.OUTPUT_TYPE == "generate_until")

    def losses(self, task: str) -> tuple[str, ...]:
        """Kinds of `loss` that `task` has. They follow from its output type, the source of its rows and `why_not_gold`.

        ``correct`` is the loss ``pseudo`` on the `right_rows` alone.
        """
        return self._fit_rows(task).losses

    def why_not_gold(self, task: str) -> str | None:
        """Why `task` has no loss ``gold`` though its rows have labels; None if it has.

        The gold texts of `fit_rows.N_JUDGED` rows are put through the task's own filters and ``process_results`` once.
        """
        return self._fit_rows(task).problem_of_gold

    def auto_loss(self, task: str) -> str:
        """The loss that ``auto`` stands for: ``gold`` where it is right and short, else ``correct``, else ``kl``."""
        return self._fit_rows(task).auto

    def right_rows(self, task: str, rows: Sequence[int]) -> list[int]:
        """Those of `rows` whose answer of `set_pseudo_labels` gets full marks of the task's main metric."""
        return self._fit_rows(task).right_rows(rows)

    def loss(self, task: str, rows: Sequence[int], kind: str = "gold") -> Tensor:
        """Mean loss of the bound model on these rows, with a graph to the parameters that require gradients.

        Args:
            task: A key of `fit_tasks`.
            rows: Numbers below ``fit_tasks()[task]``, in any order, repeats allowed. They run in one forward pass.
            kind:
                ``gold``: mean over rows of the mean over the right answer's tokens of -log p(token | tokens before it).
                The answer is the right choice in multiple choice, the text in a task that scores a text, and in
                generation the target and its ending (a stop string of line breaks, else the end-of-text token).
                ``pseudo``: the same for the answers of `set_pseudo_labels`.
                ``correct``: the same again. The caller draws from `right_rows` alone.
                ``kl``: mean over rows of KL(teacher || live) in nats, over the choices or, as a mean over the answer's
                tokens, over the vocabulary (as SELF-PARAM distils, arXiv 2410.00487. Differs: from teacher to merge).
                ``entropy``: entropy of the softmax over the choices' summed log-likelihoods, divided by log(n_choices),
                in [0, 1] (AdaMerging, arXiv 2310.02575. Differs: over choices, not over the classes of a head). In
                generation the mean over the first `losses.MOST_OWN_TOKENS` tokens of the answer that the model gives as
                it is now, of the entropy of the next token divided by log(vocabulary); the answer has no gradient.
                ``choice``: -log of the right choice's share in that softmax. Accuracy follows this loss.

        Returns:
            Scalar, float32, on the model's device. The log-softmax is float32 whatever the model's dtype.

        Raises:
            NonFiniteError: NaN or infinity.
            EvaluationError: Unknown task or row, a row without a label, or the model failed. Out-of-memory errors pass.
            InputError: Unknown kind, or a kind that the task does not have.
        """
        return self._losses().loss(self._fit_rows(task), rows, kind)

    def answers(self, task: str, row: int) -> tuple[Tensor, Tensor] | None:
        """The mean over tokens of -log p of every choice, and the softmax of its negatives over the choices (DF-Merge).

        Returns:
            Shape (choices,) each, the first with a graph. None unless the task is multiple choice.
        """
        return self._losses().answers(self._fit_rows(task), row)

    def _losses(self) -> LiveLoss:
        if self._loss is None:
            raise EvaluationError("no model is bound: call bind before asking for losses or predictions")
        return self._loss

    def _fit_rows(self, task: str) -> FitRows:
        if task not in self._fit:
            raise EvaluationError(f"no task is called {task!r}{nearest(task, self._fit)}")
        return self._fit[task]
