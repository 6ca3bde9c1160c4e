"""Measure how much faster a model answers and differentiates on a CPU with `fast_products`, and whether it is as exact.

    python benchmarks/cpu_matmul.py [--threads 1] [--repeats 5] [--out FILE.csv]

The models are a Llama and a BERT of four blocks with random float32 weights, each 384 and 1024 wide. They get batches
of short and of long texts, in turn as they are and inside `merge_search.cpu_matmul.fast_products`. The table has the
best time of `--repeats`. An error is the largest difference of the last hidden states from float64, as a share of
their largest value. Where `cpu_matmul.exact` is false for this processor, both columns measure the same thing, and the
row says so.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import append, place
from torch import Tensor

from merge_search.cpu_matmul import exact, fast_products, short_attention

OUT = Path(__file__).parent / "results" / "products.csv"
SHAPES = ((32, 24), (8, 96), (2, 512))
"""Number of texts, and of tokens in each."""
FIELDS = [
    "date", "commit", "machine", "threads", "model", "width", "parameters", "texts", "tokens", "exact",
    "answer_s", "answer_fast_s", "answer_ratio", "both_s", "both_fast_s", "both_ratio",
    "error", "error_fast", "torch", "python",
]  # fmt: skip


def models() -> Iterator[tuple[str, int, Any]]:
    """Name, width and module of every model."""
    torch.manual_seed(0)
    for width in (384, 1024):
        shape = {"hidden_size": width, "num_hidden_layers": 4, "vocab_size": 1000, "num_attention_heads": width // 32}
        bert = transformers.BertConfig(intermediate_size=4 * width, **shape)
        yield "bert", width, transformers.BertModel(bert).eval()
        llama = transformers.LlamaConfig(intermediate_size=3 * width, **shape)
        yield "llama", width, transformers.LlamaModel(llama).eval()


class Batch:
    """A model and one batch of texts."""

    def __init__(self, model: Any, texts: int, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        self.ids = torch.randint(10, 1000, (texts, tokens), generator=torch.Generator().manual_seed(1))
        self.mask = torch.ones_like(self.ids)

    def hidden(self, model: Any) -> Tensor:
        """The last hidden states."""
        with short_attention(self.tokens, torch.device("cpu")):
            states: Tensor = model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
        return states

    def context(self, *, is_fast: bool) -> AbstractContextManager[None]:
        return fast_products(dict(self.model.named_parameters())) if is_fast else nullcontext()

    def answer(self) -> None:
        """A forward pass."""
        with torch.inference_mode():
            self.hidden(self.model)

    def both(self) -> None:
        """A forward and a backward pass."""
        self.model.zero_grad(set_to_none=True)
        torch.autograd.backward(self.hidden(self.model).square().mean())

    def seconds(self, repeats: int) -> dict[str, float]:
        """The best wall seconds with and without `fast_products`, measured in turn."""
        best: dict[str, float] = {}
        for _ in range(repeats + 1):  # the first warms up
            for name, run in (("answer", self.answer), ("both", self.both)):
                for suffix, is_fast in (("_s", False), ("_fast_s", True)):
                    with self.context(is_fast=is_fast):
                        began = time.perf_counter()
                        run()
                        taken = time.perf_counter() - began
                    best[name + suffix] = min(taken, best.get(name + suffix, taken))
        return best

    def errors(self) -> dict[str, float]:
        """The largest relative error with and without `fast_products`."""
        with torch.inference_mode():
            true = self.hidden(copy.deepcopy(self.model).double())
            largest = {}
            for name, is_fast in (("error", False), ("error_fast", True)):
                with self.context(is_fast=is_fast):
                    largest[name] = float((self.hidden(self.model) - true).abs().max() / true.abs().max())
        return largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = {**place(), "threads": args.threads, "exact": exact()}
    for name, width, model in models():
        size = sum(p.numel() for p in model.parameters())
        for texts, tokens in SHAPES:
            batch = Batch(model, texts, tokens)
            row = {**batch.seconds(args.repeats), **batch.errors()}
            ratios = {f"{k}_ratio": round(row[f"{k}_s"] / row[f"{k}_fast_s"], 2) for k in ("answer", "both")}
            about = {"model": name, "width": width, "parameters": size, "texts": texts, "tokens": tokens}
            append(args.out, FIELDS, [{**where, **about, **{k: f"{v:.3g}" for k, v in row.items()}, **ratios}])
            print(f"{name} {width}, {texts} x {tokens}: {ratios}, errors {row['error']:.1e} {row['error_fast']:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
