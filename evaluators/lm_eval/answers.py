"""Prompts and answers of single documents, rendered as lm-eval renders its questions. Losses are computed on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from lm_eval.api.utils import requires_delimiter

from evaluators.lm_eval._compat import sampling_shots
from evaluators.lm_eval.grading import gold_text
from evaluators.lm_eval.options import LmEvalOptions
from evaluators.lm_eval.scores import right_choices

__all__ = ["Answer", "choices_of", "delimiter", "fit_requests", "generated_answer", "gold_answer"]


@dataclass(frozen=True)
class Answer:
    """A text that should follow a context.

    Attributes:
        context: The prompt; None if the whole text is scored.
        text: The answer.
        then_stop: Whether the tokenizer's end-of-text token follows.
    """

    context: str | None
    text: str
    then_stop: bool = False

    @property
    def pair(self) -> Any:
        """The answer as a request of lm-eval, for its tokenisation."""
        return SimpleNamespace(args=(self.context, self.text))


def fit_requests(
    task: Any, doc: Any, options: LmEvalOptions, seed: int, lm: Any, *, with_answer: bool = True
) -> list[Any]:
    """lm-eval's requests of one document, by index.

    Args:
        task: A task of lm-eval.
        doc: The document.
        options: The evaluator's options.
        seed: Draws the shots. `doc` itself is never one of them.
        lm: lm-eval's model, for a chat template.
        with_answer: Whether the right answer of `doc` may be read. lm-eval reads it beside every prompt, without use.
    """
    chat = options.apply_chat_template
    template = lm.apply_chat_template if chat else None
    with _shots_without(task, doc, seed), nullcontext() if with_answer else _answer_unread(task, doc):
        context = task.fewshot_context(
            doc,
            num_fewshot=task.config.num_fewshot or 0,
            system_instruction=options.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
            chat_template=template,
            gen_prefix=task.doc_to_prefix(doc),
        )
        made = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(task.config["task"], 0, task.config.repeats),
            apply_chat_template=chat,
            chat_template=template,
        )
    return made if isinstance(made, list) else [made]


@contextmanager
def _shots_without(task: Any, doc: Any, seed: int) -> Iterator[None]:
    """Shots drawn with `seed`, without `doc`. lm-eval itself leaves a document out of the test split only."""
    task.set_fewshot_seed(seed)

    def draw(original: Callable[..., list[Any]], n: int, n_documents: int) -> list[Any]:
        shots = original(n=min(n + 1, n_documents))
        return [shot for shot in shots if shot != doc][:n]

    with sampling_shots(task, draw):
        yield


@contextmanager
def _answer_unread(task: Any, doc: Any) -> Iterator[None]:
    """Give '' for the right answer of `doc`; shots keep theirs."""
    own, read = vars(task).get("doc_to_target"), task.doc_to_target
    task.doc_to_target = lambda d, *rest: "" if d is doc else read(d, *rest)
    try:
        yield
    finally:
        if own is None:
            del task.doc_to_target
        else:
            task.doc_to_target = own


def choices_of(task: Any, doc: Any, requests: list[Any]) -> list[Answer]:
    """The choices of a multiple-choice document as lm-eval scores them."""
    return [Answer(*r.args[:2]) for r in requests[: len(task.doc_to_choice(doc))]]


def gold_answer(task: Any, doc: Any, requests: list[Any], options: LmEvalOptions, target: str | None = None) -> Answer:
    """The right answer; the first if there are several. `target` is that of `grading.gold_text`.

    In a generation task it is the delimiter and the target, as in lm-eval's shots, and then the text that ends an
    answer.
    """
    match task.OUTPUT_TYPE:
        case "multiple_choice":
            return choices_of(task, doc, requests)[right_choices(task, doc)[0]]
        case "loglikelihood":
            context, text = requests[0].args[:2]
            return Answer(context, text if len(requests) == 1 else str(task.doc_to_target(doc)))
        case "loglikelihood_rolling":
            return Answer(None, requests[0].args[0])
        case _:
            gold = gold_text(task, doc, target)
            return generated_answer(requests[0], delimiter(task, doc, gold, options) + gold)


def generated_answer(request: Any, text: str) -> Answer:
    """`text` as the answer to a generation request, with an ending from which the model learns to stop.

    The ending is the first stop string that consists of line breaks, or else the end-of-text token.
    """
    context, settings = request.args[:2]
    until = settings.get("until") or []
    stops = [until] if isinstance(until, str) else until
    line_break = next((s for s in stops if s and not s.strip("\n")), None)
    return Answer(context, text + (line_break or ""), then_stop=line_break is None)


def delimiter(task: Any, doc: Any, answer: str, options: LmEvalOptions) -> str:
    """The delimiter between prompt and answer in lm-eval's shots."""
    prefix = task.doc_to_prefix(doc)
    if prefix:
        return " " if answer and requires_delimiter(prefix, answer) else ""
    return "" if options.apply_chat_template else str(task.config.target_delimiter)
