"""Shared fixtures: the demo's real checkpoints, the zoo where it is given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite never reaches for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def demo() -> Path:
    """Folder with ``models/`` and ``tasks/``: a real base and three experts of 0.9 M parameters."""
    return ROOT / "examples" / "demo"


@pytest.fixture(scope="session")
def zoo() -> Path:
    """Folder of larger real checkpoints; tests that need it are skipped where it is not given."""
    folder = os.environ.get("MERGE_SEARCH_ZOO")
    if not folder:
        pytest.skip("MERGE_SEARCH_ZOO is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def own_dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What lm-eval's tasks read through `datasets` is cached in a folder of this run."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def scored_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lm-eval task files of `tiny_lm.TASKS` with their data. Tests only read it."""
    from tiny_lm import TASKS, write_tasks

    return write_tasks(tmp_path_factory.mktemp("scored"), TASKS)


@pytest.fixture(scope="session")
def fit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lm-eval task files of `tiny_lm.FIT_TASKS` with their data. Tests only read it."""
    from tiny_lm import FIT_TASKS, write_tasks

    return write_tasks(tmp_path_factory.mktemp("fit"), FIT_TASKS)


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    """Rows and heads of the two classification tasks of `tiny_encoder`. A test's own: it may change them."""
    from tiny_encoder import write_two_tasks

    return write_two_tasks(tmp_path)


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``models/`` and ``data/`` of `small_vision`: a tiny ViT, three experts, their heads and images."""
    from small_vision import write

    return write(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="session")
def recommender_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``models/`` and ``data/`` of `small_recommender`: a tiny SASRec, an expert per market, and their logs."""
    from small_recommender import write

    return write(tmp_path_factory.mktemp("recommender"))


@pytest.fixture(scope="session")
def llama_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``a``, ``b``, ``c``: llama checkpoints of five layers with random weights."""
    from mergekit_files import write_llamas

    return write_llamas(tmp_path_factory.mktemp("llamas"))


@pytest.fixture
def make_models(tmp_path: Path) -> Any:
    """``make_models("llama", dtype="bfloat16", **config)`` -> (pool, live model) of a tiny base and experts a, b.

    Random weights; expert b leaves the first block's query projection as the base has it.
    """

    def make(kind: str = "llama", *, dtype: str = "float32", **config: Any) -> Any:
        import torch
        import transformers as tf

        from merge_search.engine.resident.live_model import LiveModel
        from merge_search.engine.resident.pool import ModelPool
        from merge_search.recipe import Models

        size = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        size |= {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 16}
        size |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        if kind == "mixtral":
            model = tf.MixtralForCausalLM(tf.MixtralConfig(**size, num_local_experts=3, **config))
        else:
            model = tf.LlamaForCausalLM(tf.LlamaConfig(**size, **config))
        model = model.to(getattr(torch, dtype))
        model.config.dtype = getattr(torch, dtype)
        draw = torch.Generator().manual_seed(0)
        base = {n: torch.randn(p.shape, generator=draw) * 0.3 for n, p in model.named_parameters()}
        for name in ("base", "a", "b"):
            with torch.no_grad():
                for n, p in model.named_parameters():
                    same = name == "base" or (name == "b" and "layers.0.self_attn.q_proj" in n)
                    p.copy_(base[n] + (0.0 if same else 0.1 * torch.randn(p.shape, generator=draw)))
            model.save_pretrained(tmp_path / name)
        models = Models(base=str(tmp_path / "base"), experts={e: str(tmp_path / e) for e in ("a", "b")})
        return ModelPool(models, device="cpu"), LiveModel.load(tmp_path / "base")

    return make


@pytest.fixture
def bench(make_models: Any, tmp_path: Path) -> Any:
    """A `token_bench.Bench`: tiny models whose statistics come from random token rows."""
    from token_bench import Bench

    return Bench(*make_models(), tmp_path / "study.statistics")
