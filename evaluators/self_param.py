"""Distance to the experts: how far a merge's next-token distribution is from each expert's on that expert's prompts.

    evaluate:
      - {evaluator: self_param, include_path: texts/, texts: {maths: maths.jsonl, stories: [tales.txt, fables.txt]}}
      - {evaluator: drift, include_path: texts/, texts: wiki.txt}
    objective: {maximise: mean, constraints: ["drift <= 0.3"]}

SELF-PARAM (arXiv 2410.00487) writes a context c into weights by minimising

    KL( P(. | c, x) || P_theta(. | x) )        over texts x about c, beside a term that keeps other texts as they are

This judge takes that objective with each expert in the place of the model that knows c: the metric
``self_param.EXPERT/kl`` is the mean over the expert's texts, and over `positions` positions of each, of
KL(expert || merge) in nats (`evaluators.costs.next_tokens`). Drift, KL(base || merge) on neutral texts, is the other
term. It needs no labels. The paper's code was not released; the correspondence is ours.

With ``new_tokens: 0`` the positions are spread over the given texts, which are best the prompts with their answers.
With ``new_tokens: n`` the texts are prompts: the expert continues each with up to n tokens, greedily, and the positions
are spread over its own answer.

Smaller is better. Each expert's metric is the main metric of a task of its own:

    minimise: self_param.maths/kl        one of them
    maximise: mean                       minus the mean KL over the experts; worst is minus the largest
    maximise: mean_retention             the mean of 1 - KL(merge) / KL(base), as an expert is at 0 from itself

Beside tasks with other units, ``objective.weights`` says what a task counts in `mean`: an accuracy and a nat are not
the same. Retention has no unit.

The experts' distributions are stored in half precision in main memory, once, before the first trial, and if that is
more than is free, the study is refused. Each text that an expert is asked counts as a question.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from evaluators.costs.texts import TextOptions, split_texts, text_hash
from merge_search.errors import EvaluationError, InputError, StudyFileError, nearest
from merge_search.evaluation import Cost, Evaluation, Evaluator, MetricInfo, Scores, Split, SplitShares, window
from merge_search.options import PathList, read_options

if TYPE_CHECKING:
    from evaluators.costs.next_tokens import AskedText, KeptText, NextTokens

__all__ = ["SelfParam"]


class Options(BaseModel):
    """Options of an entry ``evaluator: self_param``.

    Attributes:
        texts: Expert -> files with its prompts: one text a line, or JSON lines (``.jsonl``) with the text under `key`.
        key: The key of the text in a JSON-lines file.
        include_path: Folders of `texts`; none: the folder of the study file.
        limit: Most texts of each expert: the first in the order of questions.
        max_length: Most tokens of a text. Longer texts are cut.
        positions: Positions per text.
        new_tokens: Most tokens of the expert's answer to a text; 0: the given texts are compared.
        batch_size: Texts of one forward pass.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    texts: Annotated[dict[str, Annotated[PathList, Field(min_length=1)]], Field(min_length=1)]
    key: str = "text"
    include_path: PathList = []
    limit: Annotated[int, Field(ge=1)] | None = None
    max_length: Annotated[int, Field(ge=2)] = 128
    positions: Annotated[int, Field(ge=1)] = 8
    new_tokens: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=1)] = 16


class SelfParam(Evaluator):
    """An `Evaluator` that `ComparesWithExperts`: one metric, ``self_param.EXPERT/kl``, per expert.

    Args:
        options: See the module's docstring.
        shares: Shares of the splits. The fit share of the search split is scored with the rest of it.
        seed: Not used. Splits and order are functions of the texts.
        folder: The folder that relative paths are relative to; None: the current directory.

    Raises:
        StudyFileError: Options, files or rows are wrong, or a split of an expert has fewer than two texts.

    Determinism: Equal weights on one device give equal answers. Global random generators are not used.
    """

    def __init__(
        self, options: Mapping[str, Any], *, shares: SplitShares, seed: int, folder: Path | None = None
    ) -> None:
        self._options = read_options(Options, options)
        self._texts = _texts_of(self._options, shares, folder)
        self._live: NextTokens | None = None
        self._asked: dict[str, dict[Split, list[AskedText]]] = {}
        self._kept: dict[str, dict[Split, list[KeptText]]] = {}

    @property
    def n_asked(self) -> int:  # type: ignore[override]
        """Number of texts asked so far, of experts and merges."""
        return 0 if self._live is None else self._live.n_asked

    def metrics(self) -> list[MetricInfo]:
        counts = {e: {split: len(texts) for split, texts in by_split.items()} for e, by_split in self._texts.items()}
        return [MetricInfo(f"self_param.{expert}", "kl", False, n) for expert, n in counts.items()]

    def fingerprint(self) -> str:
        """sha256 of the texts by expert and split and of the options that change an answer."""
        hashes = {
            expert: {str(split): [text_hash(t) for t in texts] for split, texts in by_split.items()}
            for expert, by_split in self._texts.items()
        }
        content = [1, self._options.max_length, self._options.positions, self._options.new_tokens, hashes]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def bind(self, model: Any, tokenizer: Any, *, folder: str) -> None:
        """Tokenise every text. `cache_expert` stores the answers. A second model is compared with the same answers.

        Raises:
            StudyFileError: The model has no logits over a vocabulary (an encoder), a text has fewer than two tokens, or
                the experts' answers do not fit into memory.
        """
        from evaluators.costs.next_tokens import NextTokens

        options = self._options
        if self._live is not None:
            self._live.model = model
            return
        live = NextTokens(model, evaluator="self_param", whose="the experts'", batch_size=options.batch_size)
        size = {"max_length": options.max_length, "positions": options.positions}
        self._asked = {
            expert: {split: live.encode(tokenizer, texts, **size) for split, texts in by_split.items()}
            for expert, by_split in self._texts.items()
        }
        rows = [row for by_split in self._asked.values() for rows in by_split.values() for row in rows]
        most = min(options.positions, options.new_tokens)
        counts = [most or len(row.places) for row in rows]
        live.require_memory(rows, counts, list(self._texts.values()))
        self._live = live

    def compared_experts(self) -> Sequence[str]:
        return list(self._texts)

    def cache_expert(self, expert: str) -> None:
        """Store the live model's answers to the texts of `expert`, whose weights it has at this moment.

        Raises:
            EvaluationError: No model is bound, or the expert has no texts.
        """
        if self._live is None or expert not in self._asked:
            known = f"{expert!r} has no texts{nearest(expert, self._texts)}"
            raise EvaluationError(f"self_param: {'bind a model first' if self._live is None else known}")
        asked = self._asked[expert]
        if self._options.new_tokens:
            asked = {split: [self._answered(row) for row in rows] for split, rows in asked.items()}
        self._kept[expert] = {split: self._live.keep(rows, is_counted=True) for split, rows in asked.items()}

    def _answered(self, row: AskedText) -> AskedText:
        """The text with the live model's own greedy answer, asked at positions within it."""
        import torch

        from evaluators.costs.next_tokens import places

        assert self._live is not None
        model = self._live.model
        ids = row.ids.to(next(model.parameters()).device)
        n = self._options.new_tokens
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False).cpu()
        n_prompt, n_new = ids.shape[1], whole.shape[1] - ids.shape[1]
        return replace(row, ids=whole, places=n_prompt - 1 + places(n_new - 1, self._options.positions))

    def evaluate(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        """Mean KL(expert || merge) of each expert's texts in `window(n, fidelity, after)`, and their values.

        Raises:
            NonFiniteError: NaN or infinity among the logits.
            EvaluationError: No model is bound, an expert's answers are not stored, or the split is not scored.
        """
        if self._live is None or split is Split.FIT:
            raise EvaluationError(f"split {split} has no texts; bind a model, and choose search, validation or test")
        if absent := [e for e in self._texts if e not in self._kept]:
            raise EvaluationError(f"self_param: the answers of {', '.join(absent)} are not stored: call cache_expert")
        began, scores, n_questions = time.perf_counter(), {}, 0
        for expert, by_split in self._kept.items():
            kept = by_split[split]
            found: Scores = self._live.compare(kept[window(len(kept), fidelity, after)])
            scores[f"self_param.{expert}/kl"] = found
            n_questions += len(found.values)
        return Evaluation(split, fidelity, scores, Cost(0.0, time.perf_counter() - began, n_questions))


def _texts_of(options: Options, shares: SplitShares, folder: Path | None) -> dict[str, dict[Split, list[str]]]:
    """The texts of each expert by split. Raises `StudyFileError` with every problem of every expert."""
    problems: list[str] = []
    out: dict[str, dict[Split, list[str]]] = {}
    for expert, files in options.texts.items():
        same = options.model_dump(include={"key", "include_path", "limit", "max_length"})
        try:
            out[expert] = split_texts(TextOptions(texts=files, **same), shares, folder)
        except InputError as error:
            problems += [p.replace("texts:", f"texts.{expert}:", 1) for p in error.problems]
    if problems:
        raise StudyFileError(problems)
    return out
