"""A tiny random language model, its tokenizer, documents and lm-eval tasks over them. Shared by several test files.

Every test can import it as ``tiny_lm``, because its folder is in pytest's ``pythonpath``.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evaluators.isolation import quiet
from evaluators.lm_eval.evaluator import LmEval
from merge_search.evaluation import SplitShares

WORDS = [
    "the",
    "red",
    "blue",
    "green",
    "dog",
    "cat",
    "bird",
    "fish",
    "runs",
    "sleeps",
    "eats",
    "sings",
    "fast",
    "slow",
    "today",
    "now",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<nl>"]
N, N_TRAIN, SEED = 40, 24, 7
WHOLE = SplitShares(1.0, 0.0, 0.0)
THIRDS = SplitShares(0.5, 0.25, 0.25)

BASE = {"dataset_path": "json", "test_split": "test", "doc_to_text": "query", "num_fewshot": 0}
MEAN = {"aggregation": "mean", "higher_is_better": True}
CHOICE: dict[str, Any] = {
    **BASE,
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}, {"metric": "brier_score"}],
}
GENERATE: dict[str, Any] = {
    **BASE,
    "output_type": "generate_until",
    "doc_to_target": "word",
    "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 4, "do_sample": False},
    "filter_list": [
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]},
        {
            "name": "last",
            "filter": [
                {"function": "regex", "regex_pattern": r"(\w+)", "group_select": -1},
                {"function": "take_first"},
            ],
        },
    ],
    "metric_list": [{"metric": "exact_match", **MEAN}],
}
WORD: dict[str, Any] = {
    **BASE,
    "output_type": "loglikelihood",
    "doc_to_target": "{{' ' + word}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", **MEAN},
    ],
}
ROLLING: dict[str, Any] = {
    **BASE,
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "query",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
TASKS: dict[str, dict[str, Any]] = {
    "t_choice": CHOICE,
    "t_generate": GENERATE,
    "t_word": WORD,
    "t_rolling": ROLLING,
    "t_shots": {**CHOICE, "num_fewshot": 3, "fewshot_split": "train", "training_split": "train"},
}
"""To score: every kind of task, one with shots."""

_TRAIN = {"training_split": "train"}
FIT_TASKS: dict[str, dict[str, Any]] = {
    "t_choice": {**CHOICE, **_TRAIN, "doc_to_choice": "few", "metric_list": [{"metric": "acc"}]},
    "t_generate": {**GENERATE, **_TRAIN, "doc_to_target": "words"},
    "t_word": {**WORD, **_TRAIN, "doc_to_target": "{{' ' + words}}"},
    "t_rolling": {**ROLLING, **_TRAIN},
}
"""To fit on: every kind of task with rows of its own, answers and choices of several lengths."""


def documents(n: int, seed: int) -> list[dict[str, Any]]:
    """Return rows with a query, four choices, the first few of these, the right one's index, a word, and 1 to 3."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        choices = [" ".join(rng.sample(WORDS, rng.randint(1, 4))) for _ in range(4)]
        gold = rng.randrange(4)
        rows.append(
            {
                "query": " ".join([*rng.choices(WORDS, k=rng.randint(1, 12)), WORDS[i % 16], WORDS[i // 16]]),
                "choices": choices,
                "few": choices[: rng.randint(max(2, gold + 1), 4)],
                "gold": gold,
                "word": rng.choice(WORDS),
                "words": " ".join(rng.sample(WORDS, rng.randint(1, 3))),
            }
        )
    return rows


def write_tasks(
    folder: Path,
    tasks: dict[str, dict[str, Any]],
    test: list[dict[str, Any]] | None = None,
    train: list[dict[str, Any]] | None = None,
) -> Path:
    """Write task files with their data beside them, named relative to the task file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("test", test or documents(N, 0)), ("train", train or documents(N_TRAIN, 1))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = {"test": "test.jsonl", "train": "train.jsonl"}
    for name, task in tasks.items():
        whole = {"task": name, "tag": "t_all", "dataset_kwargs": {"data_files": files}, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return folder


def make_tokenizer() -> Any:
    """Make a tokenizer with one token a word, and one for a line break."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.normalizer = normalizers.Replace("\n", " <nl> ")
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_special(words)


def make_pieces() -> Any:
    """Make a tokenizer like SentencePiece's: a space belongs to the next word, and decoding drops the first space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [(p, 0.0) for p in SPECIAL] + [("▁" + w, -1.0) for w in WORDS] + [(w, -1.5) for w in WORDS]
    words = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    return _with_special(words)


def _with_special(words: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unk, _ = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk)


def make_model(kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Make a model of two blocks of width 32, with random weights large enough to prefer some answers clearly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, dict[str, Any]] = {
        "llama": {"num_key_value_heads": 2, "intermediate_size": 48},
        "gemma2": {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "final_logit_softcapping": 1.5},
        "gpt2": {},
    }
    config = AutoConfig.for_model(
        kind, max_position_embeddings=96, initializer_range=0.4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **{"vocab_size": len(SPECIAL + WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
           **sizes[kind], **settings},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def evaluator(folder: Path, tasks: list[str], *, shares: SplitShares = WHOLE, **options: Any) -> LmEval:
    return LmEval({"tasks": tasks, "include_path": str(folder), **options}, shares=shares, seed=SEED)


def bound(folder: Path, tasks: list[str], model: Any = None, *, tokenizer: Any = None, **options: Any) -> LmEval:
    e = evaluator(folder, tasks, **options)
    with quiet(["transformers"]):
        e.bind(model if model is not None else make_model(), tokenizer or make_tokenizer(), folder="tiny")
    return e


def by_lm_eval(folder: Path, tasks: list[str], model: Any, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
    """What `simple_evaluate` says of the same model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with quiet(["lm_eval", "transformers"]), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # lm-eval finds data files from there
        patch.setenv("DISABLE_MULTIPROC", "1")
        lm = HFLM(pretrained=model, tokenizer=tokenizer or make_tokenizer(), batch_size=16)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        return simple_evaluate(
            lm, tasks=tasks, task_manager=manager, fewshot_random_seed=SEED, bootstrap_iters=10, **options
        )


def docs(e: LmEval, task: str) -> list[Any]:
    """Return the documents of a task's fit rows, in their order."""
    return [row.doc for row in e._fit[task].rows]


def cache_another(e: LmEval, model: Any, task: str) -> None:
    """Let a model of other weights be the expert of all fit rows."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * p.std() * torch.randn(p.shape, generator=draw).to(p.dtype))
        e.cache_teacher(task, range(e.fit_tasks()[task]))
        for name, p in model.named_parameters():
            p.copy_(kept[name])
