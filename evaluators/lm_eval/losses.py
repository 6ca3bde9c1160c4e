"""Differentiable losses of lm-eval's tasks on one live model.

Every row becomes pieces: tokens whose last positions should predict an answer. All pieces of a call run in one forward
pass (see `packing`), and the head runs only at the positions that predict something. With one pass in place of several
smaller ones, the backward pass can finish one tensor's gradient after the other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lm_eval.models.utils import normalize_gen_kwargs
from torch.nn import functional

from evaluators.distillation import TOP, TeacherOutputs, divergence, join
from evaluators.isolation import isolated_generators
from evaluators.lm_eval._compat import rendering_with
from evaluators.lm_eval.answers import Answer, choices_of, fit_requests, generated_answer, gold_answer
from evaluators.lm_eval.fit_rows import LOSSES, FitRows
from evaluators.lm_eval.options import LmEvalOptions
from evaluators.lm_eval.packed_scorer import obstacle
from evaluators.lm_eval.packing import Layout, Piece, attention_mask, packed_layout, plain_layout
from evaluators.lm_eval.requests import LiveRequests
from evaluators.lm_eval.scores import right_choices
from evaluators.lm_eval.tasks import quiet_lm_eval, reason
from merge_search._compat.torch import unobserved
from merge_search.errors import EvaluationError, InputError, MergeSearchError, NonFiniteError, nearest
from merge_search.seeding import derive_seed

__all__ = ["LiveLoss", "check_pseudo_labels"]

log = logging.getLogger(__name__)

MIN_GAIN = 1.2
"""Smallest ratio of the tokens run without and with packing at which packing is used."""

MOST_OWN_TOKENS = 32
"""Most tokens of its own answer over which a model's entropy is averaged; no more are generated."""

N_TEST = 8
"""Number of rows on which packing is compared once with plain rows."""


class LiveLoss:
    """Losses on rows to fit on, bound to a model whose weights change in place.

    Rows are rendered and tokenised when they are first used, and then kept.

    Args:
        live: The model and tokenizer.
        options: The evaluator's options.
        seed: The study's seed. The shots of a row depend on it and on the row alone.
    """

    def __init__(self, live: LiveRequests, options: LmEvalOptions, seed: int) -> None:
        self._live = live
        self._options = options
        self._seed = seed
        self._requests: dict[tuple[str, int], list[Any]] = {}
        self._tokens: dict[tuple[str, int, str], list[Piece]] = {}
        self._packs: bool | None = None if options.tree_packing and obstacle(live.lm) is None else False

    def loss(self, fit: FitRows, rows: Sequence[int], kind: str) -> torch.Tensor:
        """See `LmEval.loss`."""
        fit.select(rows)
        _check_kind(fit, kind)
        kind = "pseudo" if kind == "correct" else kind
        _check_teacher(fit, rows, kind)
        if self._live.lm.backend != "causal":
            raise EvaluationError("losses are defined for causal language models; this model has an encoder")
        self._live.model.eval()
        try:
            if kind == "kl":
                value = self._divergence(fit, rows)
            elif kind == "entropy" and fit.task.OUTPUT_TYPE == "generate_until":
                value = self._entropy_of_own_answers(fit, rows)
            elif kind in ("entropy", "choice"):
                value = self._by_choice(fit, rows, kind)
            else:
                value = self._mean(fit, rows, kind)
        except (torch.OutOfMemoryError, MemoryError, MergeSearchError):
            raise
        except Exception as error:  # transformers raises all kinds; the study goes on
            raise EvaluationError(f"task {fit.name!r}: the {kind} loss failed: {reason(error)}") from error
        if not torch.isfinite(value):
            raise NonFiniteError(
                f"the {kind} loss of task {fit.name!r} must be finite, got {value.item()}: "
                "the merged weights are broken"
            )
        return value

    def answers(self, fit: FitRows, row: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `LmEval.answers`."""
        fit.select([row])
        if fit.task.OUTPUT_TYPE != "multiple_choice":
            return None
        self._live.model.eval()
        parts = self._parts(fit, [row], "choices")
        lengths = [len(piece.targets) for piece in parts[0]]
        losses = torch.stack([-p.mean() for p in self._log_probabilities(parts).split(lengths)])  # type: ignore[no-untyped-call]
        return losses, (-losses.detach()).softmax(0)

    def predict(self, fit: FitRows, rows: Sequence[int]) -> list[Any]:
        """See `LmEval.predict`."""
        fit.select(rows)
        _check_kind(fit, "predict")
        self._live.model.eval()
        with isolated_generators(derive_seed(self._seed, "predict")), quiet_lm_eval():
            if fit.task.OUTPUT_TYPE == "generate_until":
                requests = [self._rendered(fit, i)[0] for i in rows]
                return [str(answer) for answer in self._live.generate(requests)]
            out: list[Any] = []
            with torch.no_grad():
                for start in range(0, len(rows), self._options.batch_size):
                    sums, _ = self._choice_sums(fit, rows[start : start + self._options.batch_size])
                    if torch.isnan(sums).any():
                        raise NonFiniteError(f"log-likelihoods of task {fit.name!r} must be finite, got NaN")
                    out += [int(c) for c in sums.cpu().numpy().argmax(axis=1)]
            return out

    def cache_teacher(self, fit: FitRows, rows: Sequence[int]) -> None:
        """See `LmEval.cache_teacher`."""
        fit.select(rows)
        _check_kind(fit, "cache_teacher")
        if fit.task.OUTPUT_TYPE == "generate_until":
            fit.answers |= dict(zip(rows, self.predict(fit, rows), strict=True))
        size = self._options.batch_size
        new: list[TeacherOutputs] = []
        self._live.model.eval()
        with torch.no_grad():
            for at in range(0, len(rows), size):
                new += self._teacher_outputs(fit, rows[at : at + size])
        if not all(np.isfinite(outputs.log_p).any(1).all() for outputs in new):
            raise NonFiniteError(f"a teacher's answers must be finite, found NaN for task {fit.name!r}")
        fit.teacher_outputs |= dict(zip(rows, new, strict=True))

    def _teacher_outputs(self, fit: FitRows, rows: Sequence[int]) -> list[TeacherOutputs]:
        """The live model's outputs on one batch of rows."""
        if fit.task.OUTPUT_TYPE == "multiple_choice":
            sums, n_choices = self._choice_sums(fit, rows)
            return [
                TeacherOutputs.from_log_p(p[None, :n])
                for p, n in zip(sums.log_softmax(-1), n_choices.tolist(), strict=True)
            ]
        parts = self._parts(fit, rows, "kl")
        ends = np.cumsum([_n_targets(part) for part in parts]).tolist()
        whole = TeacherOutputs.from_log_p(self._log_probabilities(parts, whole=True), top=TOP)
        return [whole[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def _divergence(self, fit: FitRows, rows: Sequence[int]) -> torch.Tensor:
        """Mean over rows of the mean over the answer's tokens of KL(teacher || live). A choice counts as one token."""
        outputs = join([fit.teacher_outputs[i] for i in rows])
        if fit.task.OUTPUT_TYPE == "multiple_choice":
            sums, _ = self._choice_sums(fit, rows)
            return divergence(outputs, sums.log_softmax(-1)).mean().float()
        parts = self._parts(fit, rows, "kl")
        return self._mean_over(parts, divergence(outputs, self._log_probabilities(parts, whole=True)))

    def _entropy_of_own_answers(self, fit: FitRows, rows: Sequence[int]) -> torch.Tensor:
        """Mean over rows of the mean over the own answer's first tokens of H(next token) / log(vocabulary).

        The answer is generated anew by the weights as they are now. It is a constant of the gradient.
        """
        with isolated_generators(derive_seed(self._seed, "predict")), quiet_lm_eval(), torch.no_grad():
            requests = [self._short(self._rendered(fit, i)[0]) for i in rows]
            texts = self._live.generate(requests)
            parts = [
                [_first_targets(piece) for piece in self._tokenised(fit, generated_answer(request, str(text)))]
                for request, text in zip(requests, texts, strict=True)
            ]
        log_p = self._log_probabilities(parts, whole=True)
        entropy = -(log_p.exp() * log_p).sum(-1) / math.log(log_p.shape[-1])
        return self._mean_over(parts, entropy)

    def _short(self, request: Any) -> Any:
        """The request with an answer of at most `MOST_OWN_TOKENS` tokens."""
        context, settings = request.args[:2]
        most = normalize_gen_kwargs(settings, self._live.lm.max_gen_toks)["max_gen_toks"]
        return replace(request, arguments=(context, {**settings, "max_gen_toks": min(most, MOST_OWN_TOKENS)}))

    def _mean(self, fit: FitRows, rows: Sequence[int], kind: str) -> torch.Tensor:
        """Mean over rows of the mean over the answer's tokens of -log p."""
        parts = self._parts(fit, rows, kind)
        return self._mean_over(parts, -self._log_probabilities(parts))

    @staticmethod
    def _mean_over(parts: Sequence[Sequence[Piece]], values: torch.Tensor) -> torch.Tensor:
        """Mean over rows of the mean over a row's targets."""
        lengths = [_n_targets(part) for part in parts]
        weight = np.repeat(1.0 / (len(parts) * np.array(lengths, dtype=np.float64)), lengths)
        return (values * torch.as_tensor(weight, dtype=values.dtype, device=values.device)).sum().float()

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
        """Log-likelihoods of the choices.

        Returns:
            Shape (rows, most choices), -inf where a row has fewer choices, and the number of choices of each row.
        """
        parts = self._parts(fit, rows, "choices")
        n_choices = np.array([len(part) for part in parts])
        log_p = self._log_probabilities(parts)
        lengths = np.array([len(p.targets) for part in parts for p in part])
        inside = np.arange(lengths.max()) < lengths[:, None]
        starts = np.cumsum(lengths) - lengths
        at = np.where(inside, starts[:, None] + np.arange(lengths.max()), 0)
        device = log_p.device
        # NOTE: Values are gathered and summed under a mask. The order of summation of index_add varies on a GPU.
        sums = (log_p[torch.as_tensor(at, device=device)] * torch.as_tensor(inside, device=device)).sum(-1)
        is_choice = np.arange(n_choices.max()) < n_choices[:, None]
        where = np.where(is_choice, (np.cumsum(n_choices) - n_choices)[:, None] + np.arange(n_choices.max()), 0)
        table = sums[torch.as_tensor(where, device=device)]
        table = table.masked_fill(~torch.as_tensor(is_choice, device=device), -torch.inf)
        return table, torch.as_tensor(n_choices, device=device)

    def _log_probabilities(self, parts: Sequence[Sequence[Piece]], *, whole: bool = False) -> torch.Tensor:
        """Log-probabilities of all targets, piece after piece.

        Args:
            parts: The pieces of each row.
            whole: Whether to return the log-probability of every token of the vocabulary at each target's position.

        Returns:
            Shape (targets,), or (targets, vocabulary) with `whole`. float32, or float64 if the model is float64.
        """
        plain = plain_layout([p for part in parts for p in part])
        if self._packs is False:
            return self._run(plain, whole)
        packed = packed_layout(parts)
        if plain.tokens.size < MIN_GAIN * packed.tokens.size:
            return self._run(plain, whole)
        if self._packs is None:
            self._packs = self._packs_well(parts[:N_TEST])
        return self._run(packed if self._packs else plain, whole)

    @torch.no_grad()
    def _packs_well(self, parts: Sequence[Sequence[Piece]]) -> bool | None:
        """Whether packed rows give the same numbers as plain rows; None if these numbers are not finite.

        Who observes the model's inputs does not see these passes, or a first measurement would differ from later ones.
        """
        with unobserved():
            return self._compare_layouts(parts)

    def _compare_layouts(self, parts: Sequence[Sequence[Piece]]) -> bool | None:
        plain = self._run(plain_layout([p for part in parts for p in part]))
        difference = (self._run(packed_layout(parts)) - plain).abs().mean().item()
        if not np.isfinite(difference):
            return None
        if difference >= (limit := 1e-4 if self._live.model.dtype in (torch.float32, torch.float64) else 0.03):
            log.warning("rows are not packed: log-likelihoods differ by %.2g, more than %g", difference, limit)
            return False
        return True

    def _run(self, layout: Layout, whole: bool = False) -> torch.Tensor:
        device = self._live.lm.device
        positions, at = np.unique(layout.at, return_inverse=True)
        settings: dict[str, torch.Tensor] = {}
        if layout.positions is not None:
            branch, tree = (torch.as_tensor(x, device=device) for x in (layout.branch, layout.tree))
            settings["attention_mask"] = attention_mask(branch, tree)
            settings["position_ids"] = torch.as_tensor(layout.positions, device=device)
        tokens = torch.as_tensor(layout.tokens, device=device)
        logits = _logits_at(self._live.model, tokens, torch.as_tensor(positions, device=device), **settings)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        log_p = functional.log_softmax(logits, dim=-1)
        where = torch.as_tensor(at, device=device)
        return log_p[where] if whole else log_p[where, torch.as_tensor(layout.targets, device=device)]

    def _rendered(self, fit: FitRows, row: int) -> list[Any]:
        key = (fit.name, row)
        if key not in self._requests:
            stream = derive_seed(self._seed, "fit", fit.name, fit.rows[row].id)
            options = self._options.for_task(fit.name)
            with rendering_with(self._live.lm, options.template_args):
                self._requests[key] = fit_requests(
                    fit.task, fit.rows[row].doc, options, stream, self._live.lm, with_answer=fit.has_labels
                )
        return self._requests[key]

    def _parts(self, fit: FitRows, rows: Sequence[int], kind: str) -> list[list[Piece]]:
        with quiet_lm_eval():
            return [self._pieces(fit, i, kind) for i in rows]

    def _pieces(self, fit: FitRows, row: int, kind: str) -> list[Piece]:
        """The pieces of a row: those of its choices, or those of one answer, several if it is a long text."""
        label: Any = {"pseudo": fit.pseudo, "kl": fit.answers}.get(kind, {}).get(row)
        key = (fit.name, row, f"{kind} {label!r}")
        if key not in self._tokens:
            with isolated_generators(self._seed):
                answers = self._answers(fit, row, kind, label)
                self._tokens[key] = [s for a in answers for s in self._tokenised(fit, a)]
        return self._tokens[key]

    def _answers(self, fit: FitRows, row: int, kind: str, label: Any) -> list[Answer]:
        requests, doc = self._rendered(fit, row), fit.rows[row].doc
        if kind == "choices":
            return choices_of(fit.task, doc, requests)
        if kind == "gold" or (kind == "kl" and fit.task.OUTPUT_TYPE != "generate_until"):
            return [gold_answer(fit.task, doc, requests, self._options.for_task(fit.name), fit.target)]
        if fit.task.OUTPUT_TYPE == "multiple_choice":
            return [choices_of(fit.task, doc, requests)[label]]
        return [generated_answer(requests[0], label)]

    def _tokenised(self, fit: FitRows, answer: Answer) -> list[Piece]:
        if answer.context is None:
            encoded = self._live.rolling_windows(answer.text)
        else:
            encoded = self._live.tokenised([answer.pair])
        if answer.then_stop:
            encoded = [(text, context, [*target, self._live.lm.eot_token_id]) for text, context, target in encoded]
        if not encoded or not all(target for _, _, target in encoded):
            raise EvaluationError(
                f"task {fit.name!r}: the answer {answer.text[:80]!r} has no tokens, so no loss is defined"
            )
        return [_cut(context, target, self._live.lm.max_length) for _, context, target in encoded]


def check_pseudo_labels(fit: FitRows, labels: Mapping[int, Any]) -> dict[int, Any]:
    """The labels, in the form that losses use.

    Args:
        fit: The rows to fit on.
        labels: Answers by row.

    Raises:
        EvaluationError: An unknown row, or a label that cannot be an answer.
        InputError: The task has no answers to choose from or to generate.
    """
    _check_kind(fit, "pseudo labels")
    docs = [row.doc for row in fit.select(list(labels))]
    if fit.task.OUTPUT_TYPE == "generate_until":
        if wrong := [x for x in labels.values() if not isinstance(x, str)]:
            raise EvaluationError(f"task {fit.name!r}: pseudo labels must be texts, got {wrong[0]!r}")
        return dict(labels)
    for doc, label in zip(docs, labels.values(), strict=True):
        n = len(fit.task.doc_to_choice(doc))
        if not 0 <= int(label) < n:
            raise EvaluationError(f"task {fit.name!r}: pseudo labels must be choices from 0 to {n - 1}, got {label!r}")
    return {row: int(x) for row, x in labels.items()}


def _check_teacher(fit: FitRows, rows: Sequence[int], kind: str) -> None:
    """Raise `EvaluationError` if the loss needs a teacher's answers and some of these rows have none."""
    if kind == "pseudo" and (absent := [i for i in rows if i not in fit.pseudo]):
        raise EvaluationError(
            f"task {fit.name!r} has no pseudo labels for {len(absent)} of {len(rows)} rows (row {absent[0]}): "
            "give them to set_pseudo_labels first"
        )
    if kind == "kl" and (absent := [i for i in rows if i not in fit.teacher_outputs]):
        raise EvaluationError(
            f"task {fit.name!r} has no teacher's answers to compare with for {len(absent)} of {len(rows)} rows "
            f"(row {absent[0]}): call cache_teacher first"
        )


def _check_kind(fit: FitRows, kind: str) -> None:
    """Raise `InputError` if tasks of this output type cannot do what `kind` names."""
    output = fit.task.OUTPUT_TYPE
    if kind not in (*LOSSES, "predict", "pseudo labels", "cache_teacher"):
        raise InputError(f"no loss is called {kind!r}{nearest(kind, LOSSES)}")
    has = fit.losses
    if kind in LOSSES and kind not in has and not fit.has_labels:
        raise InputError(
            f"task {fit.name!r} is fitted on its test questions, whose right answers are never read: it has no {kind} "
            f"loss, only {', '.join(has) or 'none'}"
        )
    if kind == "choice" and kind not in has:
        raise InputError(f"the {kind} loss needs the choices of a multiple_choice task, {fit.name!r} is {output}")
    if kind == "correct" and kind not in has:
        raise InputError(
            f"the {kind} loss needs a task that generates answers and whose metric has full marks; {fit.name!r} is "
            f"{output} and has {', '.join(has)}"
        )
    if kind in ("predict", "pseudo", "pseudo labels", "entropy") and "pseudo" not in has:
        raise InputError(
            f"{kind}: task {fit.name!r} is {output}, which scores a given text; the model gives no answer of its own"
        )


def _first_targets(piece: Piece) -> Piece:
    """The piece up to its first `MOST_OWN_TOKENS` targets."""
    surplus = len(piece.targets) - MOST_OWN_TOKENS
    return piece if surplus <= 0 else Piece(piece.tokens[:-surplus], piece.targets[:-surplus])


def _n_targets(part: Sequence[Piece]) -> int:
    return sum(len(piece.targets) for piece in part)


def _cut(context: Sequence[int], target: Sequence[int], max_length: int) -> Piece:
    """The piece of a context and its target. What is longer than the model takes loses its beginning, as in lm-eval."""
    tokens = [*context, *target][-(max_length + 1) :][:-1]
    return Piece(tuple(tokens), tuple(target[-len(tokens) :]))


def _logits_at(model: Any, tokens: torch.Tensor, positions: torch.Tensor, **settings: torch.Tensor) -> torch.Tensor:
    """The model's logits at some flat positions.

    The model's own forward pass runs, so whatever it does to logits is done. A hook before its head leaves out all
    other positions.

    Returns:
        Shape (positions, vocabulary).
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
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False, **settings).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits[0] if is_cut else logits.flatten(0, 1)[positions]
