"""lm-eval's requests on one live model: made and tokenised once, and asked again after every change of the weights."""

from __future__ import annotations

import copy
import gc
import logging
import math
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evaluators.lm_eval._compat import (
    decoding,
    first_logits,
    log_likelihoods,
    rendering_with,
    set_answer_hook,
    set_batch_size,
    thinking_until,
    tokenised,
    watching_ends,
)
from evaluators.lm_eval.options import LmEvalOptions
from evaluators.lm_eval.packed_scorer import PackedScorer, packed_scorer
from evaluators.lm_eval.questions import Question, TaskQuestions, build_requests
from evaluators.lm_eval.tasks import reason
from merge_search.errors import EvaluationError, NonFiniteError, StudyFileError, TrialError
from merge_search.evaluation import AnswerEnds

__all__ = ["LiveRequests"]

log = logging.getLogger(__name__)

N_HALVINGS = 2
"""Number of times that one evaluation may halve the batch size after running out of memory."""


class LiveRequests:
    """The requests of some tasks, bound to a model whose weights change in place.

    Invariant: Prompts, token ids and windows are kept. They depend on the tokenizer alone, never on weights.

    Args:
        model: A Hugging Face model. Its device and class must not change afterwards.
        tokenizer: A Hugging Face tokenizer. It is copied, because lm-eval gives it a padding token. None: the tokenizer
            in `folder` is loaded.
        folder: The folder of the checkpoint.
        options: The evaluator's options.
        tasks: The tasks with their questions.
        seed: Draws the shots.

    Attributes:
        ends: How the generated answers of the last `ask` ended, by task; tasks that generate only.

    Raises:
        StudyFileError: Prompts that cannot be rendered or tokenised for this model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        folder: str,
        options: LmEvalOptions,
        tasks: Sequence[TaskQuestions],
        seed: int,
    ) -> None:
        self.model = model
        self.lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer) if tokenizer is not None else folder,
            batch_size=options.batch_size,
            max_length=options.max_length,
            softmax_dtype=options.softmax_dtype,
        )
        self.ends: dict[str, AnswerEnds] = {}
        self._answered = _Answered()
        set_answer_hook(self.lm, self._answered)
        self._n_requests = 0
        self._think_ends: dict[str, str | int | None] = {}
        self.encoded: dict[int, Any] = {}
        self.windows: dict[int, list[Any]] = {}
        for task in tasks:
            try:
                own = options.for_task(task.name)
                if own.apply_chat_template:
                    with rendering_with(self.lm, own.template_args):
                        build_requests(task.task, task.questions, own, seed, self.lm)
                self._think_ends |= {i.task_name: own.think_end for q in task.questions for i in q.instances}
                self._encode(task)
            except Exception as error:  # templates and tokenizers of somebody else
                raise StudyFileError(
                    f"task {task.name!r}: its prompts do not fit the model in {folder}: {reason(error)}"
                ) from error
        self.packed: PackedScorer | None = None
        if options.tree_packing:
            self.packed = packed_scorer(self.lm, [self._choices(q) for t in tasks for q in t.questions])

    def _encode(self, task: TaskQuestions) -> None:
        """Tokenise the requests of a task, and log how many prompts are cut."""
        instances = [i for q in task.questions for i in q.instances]
        n_cut = 0
        scored = [i for i in instances if i.request_type == "loglikelihood"]
        for instance, request in zip(scored, self.tokenised(scored), strict=True):
            _, context, continuation = request
            if not continuation:
                raise ValueError(f"document {instance.doc_id}: the answer {instance.args[1]!r} has no tokens")
            if len(continuation) > self.lm.max_length:
                raise ValueError(
                    f"document {instance.doc_id}: an answer of {len(continuation)} tokens is longer than max_length"
                )
            n_cut += len(context) + len(continuation) > self.lm.max_length + 1
            self.encoded[id(instance)] = request
        for instance in instances:
            if instance.request_type == "loglikelihood_rolling":
                self.windows[id(instance)] = self.rolling_windows(instance.args[0])
            elif instance.request_type == "generate_until":
                n_cut += self._is_cut(instance)
        if n_cut:
            log.warning(
                "task %r: %d of %d prompts are longer than the model's max_length=%d and lose their beginning",
                task.name,
                n_cut,
                len(instances),
                self.lm.max_length,
            )

    def tokenised(self, requests: Sequence[Any]) -> list[Any]:
        """lm-eval's own tokens of requests with ``args`` (context, continuation): (texts, context, continuation)."""
        return tokenised(self.lm, requests)

    def rolling_windows(self, text: str) -> list[Any]:
        """The tokens of a long text in disjoint windows, as lm-eval cuts it."""
        windows = get_rolling_token_windows(
            token_list=self.lm.tok_encode(text),
            prefix_token=self.lm.prefix_token_id,
            max_seq_len=self.lm.max_length,
            context_len=1,
        )
        return [(None, *make_disjoint_window(w)) for w in windows]

    def _is_cut(self, instance: Any) -> bool:
        """Whether a generation request's prompt loses its beginning. Raises `ValueError` if nothing would stay."""
        n_new: int = normalize_gen_kwargs(instance.args[1], self.lm.max_gen_toks)["max_gen_toks"]
        if n_new >= self.lm.max_length:
            raise ValueError(
                f"max_gen_toks={n_new} of its generation_kwargs must be less than max_length={self.lm.max_length}"
            )
        n_tokens = len(self.lm.tok_encode(instance.args[0]))
        return bool(n_tokens > self.lm.max_length - n_new)

    def _choices(self, question: Question) -> list[Any]:
        return [self.encoded[id(i)] for i in question.instances if id(i) in self.encoded]

    def ask(self, asked: dict[str, list[Question]]) -> None:
        """Put the model's answers into `resps` of every request of these questions.

        Requests are asked in lm-eval's order. So batches are the same as in lm-eval, and with them all digits.

        Args:
            asked: Questions by task name.

        Raises:
            EvaluationError: lm-eval or the model failed.
            NonFiniteError: A log-likelihood or a logit is not finite. NaN would be scored as the first choice.
            torch.OutOfMemoryError: Even with smaller batches.
            MemoryError: As `torch.OutOfMemoryError`.
        """
        self.model.eval()
        self._answered.n = self._n_requests = 0
        self._answered.is_cut.clear()
        requests: dict[str, list[Any]] = defaultdict(list)
        for questions in asked.values():
            for question in sorted(questions, key=lambda q: q.doc_id):
                for instance in question.instances:
                    # NOTE: If they were left in place, the previous candidate's answers would be scored.
                    instance.resps, instance.filtered_resps = [], {}
                    requests[instance.request_type] += [instance] * (instance.repeats or 1)
        kinds: dict[str, Callable[[list[Any]], Sequence[Any]]] = {
            "loglikelihood": self._loglikelihood,
            "loglikelihood_rolling": self._rolling,
            "generate_until": self._generate_without_thoughts,
        }
        self._n_requests = sum(map(len, requests.values()))
        for kind, instances in requests.items():
            answers = self._guarded(kinds[kind], instances)
            for instance, answer in zip(instances, answers, strict=True):
                instance.resps.append(answer)
        self.ends = {name: ends for name, questions in asked.items() if (ends := self._ends(questions)).n}

    def _ends(self, questions: list[Question]) -> AnswerEnds:
        """How the generated answers to these questions ended."""
        instances = [i for q in questions for i in q.instances if i.request_type == "generate_until"]
        return AnswerEnds(
            n=len(instances),
            cut=sum(self._answered.is_cut.get(_request_key(i.args), False) for i in instances),
            empty=sum(not i.resps[0].strip() for i in instances),
        )

    @property
    def share_answered(self) -> float:
        """The share of the last call's requests that were answered, batch by batch, even if it failed. In [0, 1]."""
        return min(1.0, self._answered.n / self._n_requests) if self._n_requests else 0.0

    def generate(self, instances: list[Any]) -> Sequence[Any]:
        """The texts that the model, as it is now, generates for these requests. Raises the errors of `ask`.

        A text begins with a space if its first token does. Some tokenizers (SentencePiece and its like) lose that space
        in decoding. lm-eval scores such texts without it, but a learner would learn other tokens from them. It also has
        the model's thoughts: without them a learner would learn to answer at once.
        """
        with decoding(self.lm, self._decoded_whole):
            return self._guarded(self._generate, instances)

    def _decoded_whole(self, tokens: Any, **settings: Any) -> str:
        """lm-eval's own decoding, with the leading space that it drops."""
        text: str = HFLM.tok_decode(self.lm, tokens, **settings)
        if not isinstance(tokens, list) or not text:
            return text
        twice: str = HFLM.tok_decode(self.lm, [*tokens, *tokens], **settings)
        return " " + text if twice == f"{text} {text}" else text

    def _guarded(self, ask: Callable[[list[Any]], Sequence[Any]], instances: list[Any]) -> Sequence[Any]:
        """Call `ask` with smaller batches after running out of memory, and with typed errors."""
        tasks = ", ".join(sorted({str(i.task_name) for i in instances}))
        for halvings_left in range(N_HALVINGS, -1, -1):
            try:
                return ask(instances)
            except (torch.OutOfMemoryError, MemoryError):
                if halvings_left == 0 or self.lm.batch_size == 1:
                    _free()
                    raise
            except TrialError:
                raise
            except Exception as error:  # lm-eval and transformers raise all kinds; the study goes on
                if "can't allocate memory" in str(error):  # torch's message on a CPU
                    raise MemoryError(str(error)) from error
                raise EvaluationError(f"scoring {tasks} failed: {reason(error)}") from error
            _free()
            set_batch_size(self.lm, self.lm.batch_size // 2)
            log.warning("out of memory while scoring %s: trying again with batch_size=%d", tasks, self.lm.batch_size)
        raise AssertionError("unreachable")

    def _loglikelihood(self, instances: list[Any]) -> Sequence[Any]:
        requests = [self.encoded[id(i)] for i in instances]
        answers = self.packed.score(requests) if self.packed is not None else log_likelihoods(self.lm, requests)
        _check_finite([a[0] for a in answers], instances)
        return answers

    def _rolling(self, instances: list[Any]) -> Sequence[Any]:
        """The answers of `HFLM.loglikelihood_rolling`, from windows that are already cut."""
        windows = [w for i in instances for w in self.windows[id(i)]]
        ends, before = list(accumulate(len(self.windows[id(i)]) for i in instances)), self._answered.n
        sums: list[float] = []
        for start in range(0, len(windows), self.lm.batch_size):
            batch = windows[start : start + self.lm.batch_size]
            sums += [a[0] for a in log_likelihoods(self.lm, batch, batch_size=len(batch))]
            self._answered.n = before + bisect_right(ends, len(sums))
        values = iter(sums)
        answers = [sum(next(values) for _ in self.windows[id(i)]) for i in instances]
        _check_finite(answers, instances)
        return answers

    def _generate_without_thoughts(self, instances: list[Any]) -> Sequence[Any]:
        """The answers of lm-eval's model, which is asked once for each of the tokens that end the thoughts."""
        by_end: dict[str | int | None, list[int]] = defaultdict(list)
        for at, instance in enumerate(instances):
            by_end[self._think_ends.get(instance.task_name)].append(at)
        answers = dict[int, Any]()
        for end, places in by_end.items():
            with thinking_until(self.lm, end):
                answers |= zip(places, self._generate([instances[at] for at in places]), strict=True)
        return [answers[at] for at in range(len(instances))]

    def _generate(self, instances: list[Any]) -> Sequence[Any]:
        first = self.lm.tok_encode(instances[0].args[0])[-self.lm.max_length :]
        if first:
            logits = first_logits(self.lm, torch.tensor([first], device=self.lm.device))
            if not torch.isfinite(logits).all():
                _raise_non_finite(instances[:1], "logits")
        self._answered.cut_of_batch.clear()
        with watching_ends(self.lm, self._answered.cut_of_batch.append):
            answers: list[str] = self.lm.generate_until(instances, disable_tqdm=True)
        return answers


class _Answered:
    """Counts requests as soon as their batch is answered (`_compat.AnswerHook`).

    Attributes:
        n: Number of requests answered.
        cut_of_batch: Whether each answer of the batch that ended last was cut, in the order in which lm-eval reports
            them.
        is_cut: Whether the answer to a generation request was cut (`_request_key`).
    """

    def __init__(self) -> None:
        self.n = 0
        self.cut_of_batch: deque[bool] = deque()
        self.is_cut: dict[tuple[str, str], bool] = {}

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.n += 1
        if kind == "generate_until" and self.cut_of_batch:
            self.is_cut[_request_key(request)] = self.cut_of_batch.popleft()


def _request_key(arguments: Sequence[Any]) -> tuple[str, str]:
    """Context and settings of a generation request. Requests that are equal in both have the same answer."""
    return str(arguments[0]), str(arguments[1])


def _check_finite(values: Sequence[float], instances: Sequence[Any]) -> None:
    bad = [i for v, i in zip(values, instances, strict=True) if not math.isfinite(v)]
    if bad:
        _raise_non_finite(bad, f"log-likelihoods of {len(bad)} of {len(instances)} requests")


def _raise_non_finite(instances: Sequence[Any], what: str) -> None:
    tasks = ", ".join(sorted({str(i.task_name) for i in instances}))
    raise NonFiniteError(f"{what} must be finite, got NaN or infinity on {tasks}: the merged weights are broken")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
