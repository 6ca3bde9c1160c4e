"""Whether experts fit a base, from headers, configs and tokenizer files alone; all problems at once. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merge_search.engine.checkpoints.adapter import factors_problem, plan_adapter
from merge_search.engine.checkpoints.dtypes import FLOATING
from merge_search.engine.checkpoints.headers import CheckpointInfo, read_checkpoint, resolve_model
from merge_search.engine.checkpoints.layout import layout, name_groups
from merge_search.engine.checkpoints.vocabulary import Vocabulary, compare, is_vocabulary_tensor, read_vocabulary
from merge_search.errors import WeightsError

__all__ = ["check_models", "misfits", "unusable_models", "without_factors"]

N_SHOWN = 5
_ANOTHER = "give a whole fine-tune of this base, or the base that it was trained from"


def check_models(base: str | Path, experts: Mapping[str, str | Path]) -> list[str]:
    """Return every reason why the experts cannot be merged into the base; empty if there is none.

    Dtypes of base and experts may differ. An expert's vocabulary may differ in added tokens.

    Args:
        base: Folder or hub id.
        experts: Folder or hub id by expert name.
    Cost: reads headers, configs and tokenizer files. Hub ids are downloaded once.
    """
    return [text for _, text in _problems(base, experts)]


def unusable_models(base: str | Path, experts: Mapping[str, str | Path]) -> list[str]:
    """As `check_models`, without the reasons why whole models are no fine-tunes of the base: some can be aligned."""
    return [text for misfit, text in _problems(base, experts) if not misfit]


def misfits(base: str | Path, experts: Mapping[str, str | Path]) -> dict[str, list[str]]:
    """Experts that are whole models, but no fine-tunes of the base, and every reason, by name."""
    found: dict[str, list[str]] = {}
    for misfit, text in _problems(base, experts):
        if misfit:
            found.setdefault(misfit, []).append(text)
    return found


def _problems(base: str | Path, experts: Mapping[str, str | Path]) -> list[tuple[str, str]]:
    """Every problem, and with it the expert that is a whole model, but no fine-tune of the base; '' for others."""
    unusable: list[str] = []
    problems: list[tuple[str, str]] = []
    base_info = _read(base, "base", unusable)
    vocabulary: Vocabulary | None = None
    if base_info is not None:
        unusable += [f"base: {p}" for p in _check_base(base_info)]
        vocabulary = _vocabulary(base_info, "base", unusable)
    for name, path in experts.items():
        where = f"expert {name!r}"
        info = _read(path, where, unusable)
        mismatches: list[str] = []
        if info is not None and base_info is not None and not base_info.is_adapter:
            if info.folder.resolve() == base_info.folder.resolve():
                unusable.append(
                    f"{where}: is the base's own folder, {info.folder}; an expert must differ from the base"
                )
                continue
            expert_vocabulary = _vocabulary(info, where, unusable)
            where = f"{where} ({info.folder})"
            if info.is_adapter:
                unusable += [f"{where}: {p}" for p in _shorten(plan_adapter(base_info, info)[1])]
            else:
                unusable += [f"{where}: {p}" for p in _check_quantised(info)]
                mismatches = _check_expert(base_info, info, vocabulary, expert_vocabulary)
        problems += [("", text) for text in unusable] + [(name, f"{where}: {p}") for p in mismatches]
        unusable.clear()
    return problems + [("", text) for text in unusable]


def without_factors(base: str | Path, experts: Mapping[str, str | Path]) -> dict[str, str]:
    """Return the experts that cannot be merged as LoRA pairs, and why. The models fit together (`check_models`).

    Args:
        base: Folder or hub id.
        experts: Folder or hub id by expert name.
    Cost: as `check_models`.
    """
    info = read_checkpoint(resolve_model(base))
    reasons = {name: factors_problem(info, read_checkpoint(resolve_model(path))) for name, path in experts.items()}
    return {name: why for name, why in reasons.items() if why}


def _read(path: str | Path, where: str, problems: list[str]) -> CheckpointInfo | None:
    try:
        return read_checkpoint(resolve_model(path))
    except WeightsError as error:
        problems.append(f"{where}: {error}")
        return None


def _vocabulary(info: CheckpointInfo, where: str, problems: list[str]) -> Vocabulary | None:
    try:
        return read_vocabulary(info.folder)
    except WeightsError as error:
        problems.append(f"{where}: {error}")
        return None


def _check_base(base: CheckpointInfo) -> list[str]:
    if base.is_adapter:
        return [f"{base.folder}: must be a whole model, found a LoRA adapter; give the model it was trained on"]
    problems = _check_quantised(base)
    if not layout(base):
        problems.append(f"{base.folder}: must hold floating tensors, found none among {len(base.tensors)}")
    return problems


def _check_quantised(info: CheckpointInfo) -> list[str]:
    quantised = info.config.get("quantization_config")
    if not quantised:
        return []
    method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else "unknown"
    return [f"{info.folder}: must hold plain weights, found quantised ones ({method}); dequantise and save them first"]


def _check_expert(
    base: CheckpointInfo,
    expert: CheckpointInfo,
    base_vocabulary: Vocabulary | None,
    expert_vocabulary: Vocabulary | None,
) -> list[str]:
    problems = _check_settings(base, expert)
    can_match_rows = base_vocabulary is not None and expert_vocabulary is not None
    if base_vocabulary is not None and expert_vocabulary is not None:
        mismatch = compare(base_vocabulary, expert_vocabulary)
        if mismatch:
            problems.append(f"its vocabulary must be the base's, apart from added tokens, but {mismatch}")
            can_match_rows = False
    wanted = list(layout(base))
    missing = [n for n in wanted if n not in expert.tensors]
    extra = [n for n in layout(expert) if n not in base.tensors]
    if missing:
        problems.append(f"must have every tensor of the base, {_count(missing, 'missing')}; {_ANOTHER}")
    if extra:
        problems.append(f"must have only tensors of the base, {_count(extra, 'too many')}; {_ANOTHER}")
    problems += _shorten(_check_tensors(base, expert, [n for n in wanted if n in expert.tensors], can_match_rows))
    return problems


def _check_settings(base: CheckpointInfo, expert: CheckpointInfo) -> list[str]:
    """Return the settings of config.json that both give and that differ."""
    problems = []
    for key in ("model_type", "tie_word_embeddings"):
        a, b = base.config.get(key), expert.config.get(key)
        if a is not None and b is not None and a != b:
            problems.append(f"config.json: {key} must be equal, got {a!r} in the base and {b!r} in the expert")
    return problems


def _check_tensors(base: CheckpointInfo, expert: CheckpointInfo, names: list[str], can_match_rows: bool) -> list[str]:
    groups = name_groups(base.tensors)
    problems = []
    for name in names:
        a, b = base.tensors[name], expert.tensors[name]
        if b.dtype not in FLOATING:
            problems.append(
                f"tensor {name!r} must be floating, got {b.dtype} (base: {a.dtype}); dequantise the expert first"
            )
        elif a.shape != b.shape:
            differs_in_rows = len(a.shape) == len(b.shape) and a.shape[1:] == b.shape[1:]
            if differs_in_rows and is_vocabulary_tensor(base, groups[name]):
                if can_match_rows:
                    continue
                advice = (
                    "rows can be matched only by tokenizers that both folders hold "
                    "and that differ in added tokens alone"
                )
            else:
                advice = _ANOTHER
            problems.append(
                f"tensor {name!r} must have the base's shape, got {list(a.shape)} in the base "
                f"and {list(b.shape)} in the expert; {advice}"
            )

    return problems


def _count(names: list[str], what: str) -> str:
    shown = ", ".join(names[:N_SHOWN]) + (", ..." if len(names) > N_SHOWN else "")
    return f"{len(names)} {'is' if len(names) == 1 else 'are'} {what} ({shown})"


def _shorten(problems: list[str]) -> list[str]:
    if len(problems) <= N_SHOWN:
        return problems
    return [*problems[:N_SHOWN], f"and {len(problems) - N_SHOWN} more of the same kind"]
