"""The live model into which candidates are written, by the names of the base's files.

It is made once, from the base, and each candidate overwrites its weights in place. The bits scored here are
the bits that a user loads from the exported folder. Everything that would make the two differ is refused here.
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

from merge_search.engine.architectures import model_class
from merge_search.engine.checkpoints.checkpoint import TORCH_DTYPES, Checkpoint, dtype_name, raw_bytes, tied_aliases
from merge_search.engine.checkpoints.dtypes import FLOATING
from merge_search.engine.checkpoints.hashing import WeightsHash, hash_folder
from merge_search.engine.checkpoints.headers import CheckpointInfo
from merge_search.engine.checkpoints.layout import is_mergeable, layout
from merge_search.engine.checkpoints.views import disk_views, storages_shared
from merge_search.errors import WeightsError

__all__ = ["LiveModel", "hash_folder"]

# Parts that may be in a checkpoint and not in its model class, or the other way round, without changing any score.
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
        folder: Folder of the base.
        model: The module.
        tokenizer: Its tokenizer, or None where the folder has none.
        views: Strided views of parameters and buffers by name on disk. Write under `torch.no_grad`. A tied tensor has
            one name.
        absent: Names on disk that the model does not use (poolers, masks). They stay the base's, whatever is merged.
        notes: Harmless differences between files and model.
        dtype: The dtype asked for; None for that of the files.

    Invariants: every view has the shape of the tensor on disk and the dtype in which it is exported. After loading it
    holds the base's values exactly.
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
        """Load the base as a live model.

        Args:
            folder: Folder of the base.
            device: Where the model lives.
            dtype: ``float32``, ``float16`` or ``bfloat16``. None: the dtype of the files (not of config.json).
            task: ``causal`` for a language model, ``auto`` for the class that config.json names.
        Raises:
            WeightsError: The model would differ from the files: missing or unexpected tensors, other dtypes or values
                after loading, custom code, or a part that cannot be written in place.
        """
        checkpoint = Checkpoint(folder)
        loaded_dtype = _wanted_dtype(checkpoint.info, dtype)
        asked_dtype = None if dtype is None else loaded_dtype
        model, loading = _load(checkpoint.info, loaded_dtype, task)
        notes = _check_loading(checkpoint.info, model, loading)
        model.to(device)  # without a dtype, which would also cast the rotary buffers
        views, absent = _select(checkpoint, disk_views(model), tied_aliases(checkpoint))
        _check_dtypes(checkpoint.info, views, asked_dtype)
        _check_values(checkpoint, views)
        model.requires_grad_(False)
        model.eval()
        _reset_generation(model)
        tokenizer = _load_tokenizer(checkpoint.info.folder)
        return cls(Path(folder), model, tokenizer, views, absent, notes, asked_dtype)

    def hash(self, names: Collection[str] | None = None) -> str:
        """Return the sha256 of the weights as they are now, equal to `hash_folder` of the folder exported from them.

        Tensors that the model does not use are hashed as they are exported: the base's, in the dtype that was asked
        for.

        Args:
            names: Names to hash; None for all.
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
    """Return the dtype asked for, or the one that most elements on disk have."""
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

    try:
        named = model_class(info.config)
    except ValueError as error:
        raise WeightsError(f"{info.folder / 'config.json'}: {error}") from error
    kind = transformers.AutoModelForCausalLM if task == "causal" else named
    if kind is None:
        raise WeightsError(
            f"{info.folder / 'config.json'}: the architecture must be one that transformers "
            f"{transformers.__version__} or merge-search knows, got {info.config['architectures'][0]!r}; "
            "models that bring their own code are not run"
        )
    options = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True, "use_safetensors": True}
    bars, verbosity = transformers.utils.logging.is_progress_bar_enabled(), transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # `_check_loading` reports missing and unexpected tensors
    try:
        # The model must not map the files, which may be replaced while it lives.
        model, loading = kind.from_pretrained(str(info.folder), disable_mmap=True, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(f"{info.folder}: transformers cannot load the base: {error}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return model, loading


def _check_loading(info: CheckpointInfo, model: Any, loading: dict[str, Any]) -> list[str]:
    """Return notes about harmless differences between files and model. Optional parts that the files lack become zero.

    Raises:
        WeightsError: Files and model differ in any other way.
    """
    missing = _Difference(
        "the model has tensors that the files lack", loading.get("missing_keys"), may_be_optional=True
    )
    differences = (
        missing,
        _Difference(
            "the files have tensors that the model lacks", loading.get("unexpected_keys"), may_be_optional=True
        ),
        _Difference("tensors have other shapes in the model", loading.get("mismatched_keys")),
        _Difference("transformers reports", loading.get("error_msgs")),
    )
    if problems := [d.problem for d in differences if d.problem]:
        raise WeightsError(
            f"{info.folder}: files and model ({type(model).__name__}) must agree, but " + "; ".join(problems)
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in missing.harmless:
                parameter.zero_()  # transformers fills it with random values, which differ at each load
    return [d.note for d in differences if d.note]


class _Difference:
    """One way in which the files and the loaded model differ.

    Args:
        wording: The difference in words.
        entries: Names of tensors, or messages, as transformers lists them; None for none.
        may_be_optional: Whether the difference is harmless for the parts in `OPTIONAL`.
    """

    def __init__(self, wording: str, entries: Collection[object] | None, *, may_be_optional: bool = False) -> None:
        texts = sorted(map(str, entries or ()))
        self._wording = wording
        self.harmless = [t for t in texts if may_be_optional and any(part in t for part in OPTIONAL)]
        self._harmful = [t for t in texts if t not in self.harmless]

    @property
    def problem(self) -> str:
        """The harmful entries in words, '' if there are none."""
        if not self._harmful:
            return ""
        return f"{self._wording}: {', '.join(self._harmful[:5])}{', ...' if len(self._harmful) > 5 else ''}"

    @property
    def note(self) -> str:
        """The harmless entries in words, '' if there are none."""
        return f"{self._wording}, which is left as it is: {', '.join(self.harmless)}" if self.harmless else ""


def _select(
    checkpoint: Checkpoint, all_views: dict[str, Tensor], aliases: dict[str, str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the views of the tensors on disk, each parameter once, and the names on disk without a view.

    Raises:
        WeightsError: Files and model disagree about shapes or tied tensors, or a merged tensor has no view.
    """
    info = checkpoint.info
    _require_one_parameter(info, all_views, aliases)
    views: dict[str, Tensor] = {}
    for name, t in info.tensors.items():
        if name in all_views and name not in aliases:
            view = all_views[name]
            if view.shape != t.shape:
                raise WeightsError(
                    f"{t.file}: tensor {name!r} is {list(t.shape)} on disk, {list(view.shape)} in the model"
                )
            views[name] = view
    if shared := storages_shared(views):
        raise WeightsError(
            f"{info.folder}: {shared[0][0]!r} and {shared[0][1]!r} differ on disk but are one parameter of the model; "
            "set tie_word_embeddings to false in config.json"
        )
    absent = tuple(n for n in info.tensors if n not in views and n not in aliases)
    merged = layout(info)
    if lost := [n for n in absent if n in merged]:  # these would be merged and exported, but never scored
        raise WeightsError(
            f"{info.folder}: {len(lost)} tensors have no place in the model ({', '.join(lost[:5])}); "
            "name the class that uses them under 'architectures' in config.json, or save the base without them"
        )
    return views, absent


def _require_one_parameter(info: CheckpointInfo, views: dict[str, Tensor], aliases: dict[str, str]) -> None:
    """Raise `WeightsError` unless both names of every tied tensor are one parameter of the model."""
    for alias, kept in aliases.items():
        a, b = views.get(alias), views.get(kept)
        if a is not None and b is not None and a.data_ptr() != b.data_ptr():
            raise WeightsError(
                f"{info.folder}: stores {alias!r} and {kept!r} with equal values, but the model keeps them apart; "
                "say in config.json whether they are tied (tie_word_embeddings)"
            )


def _check_dtypes(info: CheckpointInfo, views: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """Raise unless every view has its exported dtype. Otherwise the scored and the exported bits would differ."""
    for name, view in views.items():
        on_disk = TORCH_DTYPES[info.tensors[name].dtype]
        exported = dtype if dtype is not None and is_mergeable(info.tensors[name]) else on_disk
        if view.dtype != exported:
            advice = "set dtype to float32 or bfloat16" if dtype is None else "leave dtype out, or set it to float32"
            raise WeightsError(
                f"{info.folder}: tensor {name!r} would be exported as {dtype_name(exported)} "
                f"but transformers computes with it as {dtype_name(view.dtype)}; {advice}"
            )


def _check_values(checkpoint: Checkpoint, views: dict[str, Tensor]) -> None:
    for name, view in views.items():
        on_disk = checkpoint.tensor(name).to(view.device, view.dtype)
        if not torch.equal(on_disk, view) and not torch.equal(on_disk.nan_to_num(), view.nan_to_num()):
            raise WeightsError(f"{checkpoint.info.folder}: tensor {name!r} has other values in the model than on disk")


def _reset_generation(model: Any) -> None:
    """Set greedy defaults, because a base's sampling settings must not steer the evaluation."""
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
