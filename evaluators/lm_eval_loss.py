"""Differentiable losses of lm-eval's tasks on one live model.

Every row becomes sequences of tokens whose last ones are to be predicted. All sequences of a call run in one forward
pass, padded on the right and without a mask, as in lm-eval: under causal attention no token sees the padding. A
sequence that another one begins with is not run again, so choices of one token cost one sequence together. The head
runs only where something is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from evaluators.isolation import isolated_generators
from evaluators.lm_eval_answers import Answer, choices_of, fit_requests, generated_answer, gold_answer
from evaluators.lm_eval_fit import FitRows
from evaluators.lm_eval_options import LmEvalOptions
from evaluators.lm_eval_requests import LiveRequests
from evaluators.lm_eval_scores import right_choices
from evaluators.lm_eval_tasks import quiet_lm_eval, reason
from merge_search.errors import EvaluationError, InputError, MergeSearchError, NonFiniteError, nearest
from merge_search.seeding import derive_seed

__all__ = ["LOSSES", "LiveLoss", "check_pseudo_labels"]

LOSSES = ("gold", "pseudo", "entropy", "choice")


@dataclass(frozen=True)
class _Sequence:
    """What is run, and the tokens that its last positions should predict."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


class LiveLoss:
    """Losses on fit rows, bound to a model whose weights change in place.

    Rows are rendered and tokenised when first asked for and then kept.

    Args:
        live: The model and tokenizer.
        seed: Of the study; the shots of a row depend on it and on the row alone.
    """

    def __init__(self, live: LiveRequests, options: LmEvalOptions, seed: int) -> None:
        self._live = live
        self._options = options
        self._seed = seed
        self._requests: dict[tuple[str, int], list[Any]] = {}
        self._tokens: dict[tuple[str, int, str], list[_Sequence]] = {}

    def loss(self, fit: FitRows, rows: Sequence[int], kind: str) -> torch.Tensor:
        """See `LmEval.loss`."""
        fit.select(rows)
        _check_kind(fit, kind)
        if self._live.lm.backend != "causal":
            raise EvaluationError("losses are defined for causal language models; this model has an encoder")
        self._live.model.eval()
        try:
            value = self._by_choice(fit, rows, kind) if kind in ("entropy", "choice") else self._mean(fit, rows, kind)
        except (torch.OutOfMemoryError, MemoryError, MergeSearchError):
            raise
        except Exception as error:  # transformers raises all kinds; the study goes on
            raise EvaluationError(f"task {fit.name!r}: the {kind} loss failed: {reason(error)}") from error
        if not torch.isfinite(value):
            raise NonFiniteError(
                f"the {kind} loss of task {fit.name!r} must be finite, got {value.item()}: the merged weights are broken"
            )
        return value

    def predict(self, fit: FitRows, rows: Sequence[int]) -> list[Any]:
        """See `LmEval.predict`."""
        fit.select(rows)
        _check_kind(fit, "predict")
        self._live.model.eval()
        with isolated_generators(derive_seed(self._seed, "predict")), quiet_lm_eval():
            if fit.task.OUTPUT_TYPE == "generate_until":
                requests = [self._rendered(fit, i)[0] for i in rows]
                return [str(a) for a in self._live.generate(requests)]
            out: list[Any] = []
            with torch.no_grad():
                for start in range(0, len(rows), self._options.batch_size):
                    sums, _ = self._choice_sums(fit, rows[start : start + self._options.batch_size])
                    if torch.isnan(sums).any():
                        raise NonFiniteError(f"log-likelihoods of task {fit.name!r} must be finite, got NaN")
                    out += [int(c) for c in sums.cpu().numpy().argmax(axis=1)]
            return out

    def _mean(self, fit: FitRows, rows: Sequence[int], kind: str) -> torch.Tensor:
        """Mean over rows of the mean over the answer's tokens of -log p."""
        parts = [self._sequences(fit, i, kind) for i in rows]
        lengths = [sum(len(s.targets) for s in part) for part in parts]
        weight = np.repeat(1.0 / (len(rows) * np.array(lengths, dtype=np.float64)), lengths)
        log_p = self._log_probabilities([s for part in parts for s in part])
        return -(log_p * torch.as_tensor(weight, dtype=log_p.dtype, device=log_p.device)).sum().float()

    def _by_choice(self, fit: FitRows, rows: Sequence[int], kind: str) -> torch.Tensor:
        sums, n_choices = self._choice_sums(fit, rows)
        log_p = functional.log_softmax(sums, dim=-1)
        if kind == "choice":
            right = np.zeros(tuple(sums.shape), dtype=bool)
            for at, row in enumerate(fit.select(rows)):
                right[at, right_choices(fit.task, row.doc)] = True
            mask = torch.as_tensor(right, device=sums.device)
            return -log_p.masked_fill(~mask, -torch.inf).logsumexp(-1).mean().float()
        present = torch.arange(sums.shape[1], device=sums.device) < n_choices[:, None]
        entropy = -(log_p.exp() * log_p.masked_fill(~present, 0.0)).sum(-1)
        return (entropy / n_choices.to(sums.dtype).clamp(min=2).log()).mean().float()

    def _choice_sums(self, fit: FitRows, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-likelihood of each choice, -inf where a row has fewer: shape (rows, most choices); and their numbers."""
        parts = [self._sequences(fit, i, "choices") for i in rows]
        n_choices = np.array([len(part) for part in parts])
        sequences = [s for part in parts for s in part]
        log_p = self._log_probabilities(sequences)
        lengths = np.array([len(s.targets) for s in sequences])
        inside = np.arange(lengths.max()) < lengths[:, None]
        starts = np.cumsum(lengths) - lengths
        at = np.where(inside, starts[:, None] + np.arange(lengths.max()), 0)
        device = log_p.device
        # NOTE: gathering and a masked sum, not index_add, whose order of summation varies on a GPU.
        sums = (log_p[torch.as_tensor(at, device=device)] * torch.as_tensor(inside, device=device)).sum(-1)
        is_choice = np.arange(n_choices.max()) < n_choices[:, None]
        where = np.where(is_choice, (np.cumsum(n_choices) - n_choices)[:, None] + np.arange(n_choices.max()), 0)
        table = sums[torch.as_tensor(where, device=device)]
        table = table.masked_fill(~torch.as_tensor(is_choice, device=device), -torch.inf)
        return table, torch.as_tensor(n_choices, device=device)

    def _log_probabilities(self, sequences: Sequence[_Sequence]) -> torch.Tensor:
        """log p of every target, sequence after sequence. Shape (targets,), float32 (float64 of a float64 model)."""
        hosts, host_of = _hosts([s.tokens for s in sequences])
        length = max(map(len, hosts))
        tokens = np.zeros((len(hosts), length), dtype=np.int64)
        for row, host in enumerate(hosts):
            tokens[row, : len(host)] = host
        flat = np.concatenate(
            [
                host_of[i] * length + np.arange(len(s.tokens) - len(s.targets), len(s.tokens))
                for i, s in enumerate(sequences)
            ]
        )
        positions, at = np.unique(flat, return_inverse=True)
        device = self._live.lm.device
        targets = torch.as_tensor([t for s in sequences for t in s.targets], device=device)
        logits = _logits_at(
            self._live.model, torch.as_tensor(tokens, device=device), torch.as_tensor(positions, device=device)
        )
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return functional.log_softmax(logits, dim=-1)[torch.as_tensor(at, device=device), targets]

    def _rendered(self, fit: FitRows, row: int) -> list[Any]:
        key = (fit.name, row)
        if key not in self._requests:
            stream = derive_seed(self._seed, "fit", fit.name, fit.rows[row].id)
            self._requests[key] = fit_requests(fit.task, fit.rows[row].doc, self._options, stream, self._live.lm)
        return self._requests[key]

    def _sequences(self, fit: FitRows, row: int, kind: str) -> list[_Sequence]:
        """Those of a row: of its choices, or of one answer (several windows where that is a long text)."""
        label = fit.pseudo[row] if kind == "pseudo" and fit.pseudo is not None else None
        key = (fit.name, row, f"pseudo {label!r}" if kind == "pseudo" else kind)
        if key not in self._tokens:
            with isolated_generators(self._seed), quiet_lm_eval():
                answers = self._answers(fit, row, kind, label)
                self._tokens[key] = [s for a in answers for s in self._tokenised(fit, a)]
        return self._tokens[key]

    def _answers(self, fit: FitRows, row: int, kind: str, label: Any) -> list[Answer]:
        requests, doc = self._rendered(fit, row), fit.rows[row].doc
        if kind == "choices":
            return choices_of(fit.task, doc, requests)
        if kind == "gold":
            return [gold_answer(fit.task, doc, requests, self._options)]
        if fit.task.OUTPUT_TYPE == "multiple_choice":
            return [choices_of(fit.task, doc, requests)[label]]
        return [generated_answer(requests[0], label)]

    def _tokenised(self, fit: FitRows, answer: Answer) -> list[_Sequence]:
        if answer.context is None:
            found = self._live.rolling_windows(answer.text)
        else:
            found = self._live.tokenised([answer.pair])
        if answer.then_stop:
            found = [(text, context, [*target, self._live.lm.eot_token_id]) for text, context, target in found]
        if not found or not all(target for _, _, target in found):
            raise EvaluationError(
                f"task {fit.name!r}: the answer {answer.text[:80]!r} has no tokens, so no loss is defined"
            )
        return [_cut(context, target, self._live.lm.max_length) for _, context, target in found]


def check_pseudo_labels(fit: FitRows, labels: Sequence[Any]) -> list[Any]:
    """The labels, if there is one of the right kind for each fit row.

    Raises:
        EvaluationError: it says which is wrong.
        InputError: the task has no answers to choose from or to generate.
    """
    _check_kind(fit, "pseudo labels")
    if len(labels) != len(fit.rows):
        raise EvaluationError(f"task {fit.name!r} needs {len(fit.rows)} pseudo labels, got {len(labels)}")
    if fit.task.OUTPUT_TYPE == "generate_until":
        if wrong := [x for x in labels if not isinstance(x, str)]:
            raise EvaluationError(f"task {fit.name!r}: pseudo labels must be texts, got {wrong[0]!r}")
        return list(labels)
    for row, label in zip(fit.rows, labels, strict=True):
        n = len(fit.task.doc_to_choice(row.doc))
        if not 0 <= int(label) < n:
            raise EvaluationError(f"task {fit.name!r}: pseudo labels must be choices from 0 to {n - 1}, got {label!r}")
    return [int(x) for x in labels]


def _check_kind(fit: FitRows, kind: str) -> None:
    output = fit.task.OUTPUT_TYPE
    if kind not in (*LOSSES, "predict", "pseudo labels"):
        raise InputError(f"no loss is called {kind!r}{nearest(kind, LOSSES)}")
    if kind in ("entropy", "choice") and output != "multiple_choice":
        raise InputError(f"the {kind} loss needs the choices of a multiple_choice task, {fit.name!r} is {output}")
    if kind in ("predict", "pseudo", "pseudo labels") and output not in ("multiple_choice", "generate_until"):
        raise InputError(
            f"{kind}: task {fit.name!r} is {output}, which scores a given text; the model gives no answer of its own"
        )
    if kind == "pseudo" and fit.pseudo is None:
        raise EvaluationError(f"task {fit.name!r} has no pseudo labels: give them to set_pseudo_labels first")


def _cut(context: Sequence[int], target: Sequence[int], max_length: int) -> _Sequence:
    """As in lm-eval the beginning is lost of what is longer than the model takes."""
    tokens = [*context, *target][-(max_length + 1) :][:-1]
    return _Sequence(tuple(tokens), tuple(target[-len(tokens) :]))


def _hosts(tokens: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Sequences that together begin with all of `tokens`; and for each of these which one does."""
    hosts: list[tuple[int, ...]] = []
    host_of = np.empty(len(tokens), dtype=np.int64)
    # In descending order whatever begins with a sequence comes right before it.
    for i in sorted(range(len(tokens)), key=lambda i: tokens[i], reverse=True):
        if not hosts or hosts[-1][: len(tokens[i])] != tokens[i]:
            hosts.append(tokens[i])
        host_of[i] = len(hosts) - 1
    return hosts, host_of


def _logits_at(model: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The model's logits at some flat positions. Shape (positions, vocabulary).

    The model's own forward pass runs, so that whatever it does to logits is done; before its head the other
    positions are left out.
    """
    is_cut = False

    def keep(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal is_cut
        if is_cut or inputs[0].shape[:2] != tokens.shape:
            return None
        is_cut = True
        return (inputs[0].flatten(0, 1)[positions][None], *inputs[1:])

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(keep) if head is not None else None
    try:
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits[0] if is_cut else logits.flatten(0, 1)[positions]
