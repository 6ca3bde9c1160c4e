"""The one live model into which candidates are written, by the names of the base's files.

It is made once, by transformers, from the base; a candidate overwrites its weights in place. What is scored here and
what a user loads from the exported folder are the same bits, so everything that would part the two is refused here.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_search.engine.checkpoints.checkpoint import TORCH_DTYPES, Checkpoint, dtype_name, raw_bytes, tied_aliases
from merge_search.engine.checkpoints.dtypes import FLOATING
from merge_search.engine.checkpoints.hashing import WeightsHash, hash_folder
from merge_search.engine.checkpoints.headers import CheckpointInfo
from merge_search.engine.checkpoints.layout import is_mergeable, layout
from merge_search.engine.checkpoints.views import disk_views, storages_shared
from merge_search.errors import WeightsError

__all__ = ["LiveModel", "hash_folder"]

# Parts that a checkpoint may hold and a model class lack, or the other way round, without harm to what is scored.
OPTIONAL = ("pooler", "seq_relationship")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveModel:
    """A transformers model in eval mode without gradients, and live views of its weights.

    Attributes:
        model: The module.
        tokenizer: Its tokenizer, or None where the folder has none.
        views: Strided views of parameters and buffers by name on disk; write under `torch.no_grad`.
            A tied tensor has one name.
        absent: Names on disk that the model has no use for (poolers, masks): the base's, whatever is merged.
        dtype: The one asked for, None for that of the files.

    Invariants: every view has the shape of the tensor on disk and the dtype in which it is exported, and holds,
    after loading, the base's values exactly.
    """

    folder: Path
    model: Any
    tokenizer: Any
    views: dict[str, Tensor]
    absent: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    dtype: torch.dtype | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        task: str = "auto",
    ) -> LiveModel:
        """The base as a live model.

        Args:
            folder: Of the base.
            dtype: ``float32``, ``float16``, ``bfloat16``; None: the dtype of the files (not of config.json).
            task: ``causal`` for a language model, ``auto`` for the class that config.json names.
        Raises:
            WeightsError: the model would not be what the files say: missing or unexpected tensors, other
                dtypes or values after loading, custom code, a part that cannot be written in place.
        """
        checkpoint = Checkpoint(folder)
        wanted = _wanted_dtype(checkpoint.info, dtype)
        model, info = _load(checkpoint.info, wanted, task)
        notes = _check_loading(checkpoint.info, model, info)
        model.to(device)  # the device alone: a dtype here would also cast the rotary buffers
        views, absent = _select(checkpoint, disk_views(model), tied_aliases(checkpoint))
        _check_dtypes(checkpoint.info, views, None if dtype is None else wanted)
        _check_values(checkpoint, views)
        model.requires_grad_(False)
        model.eval()
        _reset_generation(model)
        return cls(
            Path(folder),
            model,
            _load_tokenizer(checkpoint.info.folder),
            views,
            absent,
            notes,
            None if dtype is None else wanted,
        )

    def hash(self, names: Collection[str] | None = None) -> str:
        """sha256 of the weights as they are now, equal to `hash_folder` of the folder exported from them.

        Tensors without a place in the model are hashed as they are exported: the base's, in the dtype that was asked for.
        With `names`, only those.
        """
        base = Checkpoint(self.folder)
        result = WeightsHash()
        for name in sorted([*self.views, *self.absent] if names is None else names):
            tensor = self.views[name] if name in self.views else base.tensor(name)
            if name not in self.views and self.dtype is not None and is_mergeable(base.info.tensors[name]):
                tensor = tensor.to(self.dtype)
            result.add(name, dtype_name(tensor.dtype), tensor.shape, [raw_bytes(tensor)])
        return result.hexdigest()


def _wanted_dtype(info: CheckpointInfo, dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype asked for, or the one that most elements on disk have."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    count: Counter[str] = Counter()
    for t in info.tensors.values():
        if t.dtype in FLOATING:
            count[t.dtype] += t.n_elements
    return TORCH_DTYPES[count.most_common(1)[0][0]] if count else torch.float32


def _load(info: CheckpointInfo, dtype: torch.dtype, task: str) -> tuple[Any, dict[str, Any]]:
    import transformers

    names = info.config.get("architectures") or []
    known = getattr(transformers, names[0], None) if names else None
    if task == "causal" or (known is None and not names):
        known = transformers.AutoModelForCausalLM if task == "causal" else transformers.AutoModel
    if known is None:
        raise WeightsError(
            f"{info.folder / 'config.json'}: the architecture must be one that transformers {transformers.__version__} knows, got "
            f"{names[0]!r}; models that bring their own code are not run"
        )
    options = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True, "use_safetensors": True}
    bars, verbosity = transformers.utils.logging.is_progress_bar_enabled(), transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what is missing or unexpected is checked and said by us
    try:
        # The files may be replaced while the model lives: it must not be a mapping of them.
        model, loading = known.from_pretrained(str(info.folder), disable_mmap=True, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(f"{info.folder}: transformers cannot load the base: {error}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return model, loading


def _check_loading(info: CheckpointInfo, model: Any, loading: dict[str, Any]) -> list[str]:
    """Notes about harmless differences between files and model; any other is refused."""
    notes, problems = [], []
    wordings = {
        "missing_keys": "the model has tensors that the files lack",
        "unexpected_keys": "the files have tensors that the model lacks",
        "mismatched_keys": "tensors have other shapes in the model",
        "error_msgs": "transformers reports",
    }
    for key, wording in wordings.items():
        found = sorted(map(str, loading.get(key) or ()))
        harmless = (
            [k for k in found if any(word in k for word in OPTIONAL)]
            if key.endswith(("missing_keys", "unexpected_keys"))
            else []
        )
        if rest := [k for k in found if k not in harmless]:
            problems.append(f"{wording}: {', '.join(rest[:5])}{', ...' if len(rest) > 5 else ''}")
        if harmless:
            notes.append(f"{wording}, which is left as it is: {', '.join(harmless)}")
    if problems:
        raise WeightsError(
            f"{info.folder}: files and model ({type(model).__name__}) must agree, but " + "; ".join(problems)
        )
    missing = {k for k in loading.get("missing_keys") or () if any(word in k for word in OPTIONAL)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in missing:
                parameter.zero_()  # transformers invents random values, others at each load
    return notes


def _select(
    checkpoint: Checkpoint, found: dict[str, Tensor], aliases: dict[str, str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Views of the tensors on disk, each parameter once, and the names on disk that have none."""
    info = checkpoint.info
    for alias, kept in aliases.items():
        a, b = found.get(alias), found.get(kept)
        if a is not None and b is not None and a.data_ptr() != b.data_ptr():
            raise WeightsError(
                f"{info.folder}: stores {alias!r} and {kept!r} with equal values, but the model keeps them apart; "
                "say in config.json whether they are tied (tie_word_embeddings)"
            )
    views: dict[str, Tensor] = {}
    for name, t in info.tensors.items():
        if name in found and name not in aliases:
            if found[name].shape != t.shape:
                raise WeightsError(
                    f"{t.file}: tensor {name!r} is {list(t.shape)} on disk, {list(found[name].shape)} in the model"
                )
            views[name] = found[name]
    if shared := storages_shared(views):
        raise WeightsError(
            f"{info.folder}: {shared[0][0]!r} and {shared[0][1]!r} differ on disk but are one parameter of the model; "
            "set tie_word_embeddings to false in config.json"
        )
    absent = tuple(n for n in info.tensors if n not in views and n not in aliases)
    merged = layout(info)
    if lost := [n for n in absent if n in merged]:  # they would be exported merged and never scored
        raise WeightsError(
            f"{info.folder}: {len(lost)} tensors have no place in the model ({', '.join(lost[:5])}); name the class that uses "
            "them under 'architectures' in config.json, or save the base without them"
        )
    return views, absent


def _check_dtypes(info: CheckpointInfo, views: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """Every view must have the dtype in which it is exported, or the scored and the exported bits would differ."""
    for name, view in views.items():
        on_disk = TORCH_DTYPES[info.tensors[name].dtype]
        exported = dtype if dtype is not None and is_mergeable(info.tensors[name]) else on_disk
        if view.dtype != exported:
            advice = "set dtype to float32 or bfloat16" if dtype is None else "leave dtype out, or set it to float32"
            raise WeightsError(
                f"{info.folder}: tensor {name!r} would be exported as {dtype_name(exported)} but transformers computes with it as "
                f"{dtype_name(view.dtype)}; {advice}"
            )


def _check_values(checkpoint: Checkpoint, views: dict[str, Tensor]) -> None:
    for name, view in views.items():
        on_disk = checkpoint.tensor(name).to(view.device, view.dtype)
        if not torch.equal(on_disk, view) and not torch.equal(on_disk.nan_to_num(), view.nan_to_num()):
            raise WeightsError(f"{checkpoint.info.folder}: tensor {name!r} has other values in the model than on disk")


def _reset_generation(model: Any) -> None:
    """Greedy defaults: a base's sampling settings must not steer the evaluation."""
    from transformers import GenerationConfig

    old = getattr(model, "generation_config", None)
    if old is not None:
        kept = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        model.generation_config = GenerationConfig(**{k: getattr(old, k, None) for k in kept})


def _load_tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise WeightsError(f"{folder}: transformers cannot load the tokenizer: {error}") from error
