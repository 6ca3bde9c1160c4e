"""Read a mergekit-evolve file as a search space. Every key that no recipe can follow is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field

from merge_search.errors import SpaceError, nearest
from merge_search.options import absolute
from merge_search.space import SpaceContext
from search_spaces.parts.options import Bounds, DensityBounds, Options, space_options

__all__ = ["DENSITY_METHODS", "Genome", "MergekitOptions", "read_genome"]

DENSITY_METHODS = ("ties", "dare_ties")
NORMALISING = ("linear", "ties", "dare_ties")

ELSEWHERE = {
    "tasks": "evaluate", "limit": "search.fidelity", "num_fewshot": "evaluate", "shuffle": "splits",
    "random_init": "search", "apply_chat_template": "evaluate", "fewshot_as_multiturn": "evaluate",
}  # fmt: skip
"""Keys of the file that do not describe the space -> the section of the study file that decides instead."""


def _holds_one(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] < 1 < bounds[1]:
        raise ValueError(f"ratios must be positive, on both sides of 1, got {list(bounds)}")
    return bounds


def _not_negative(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] < 0:
        raise ValueError(
            f"weights must not be negative here, got {list(bounds)}; the file's allow_negative_weights decides"
        )
    return bounds


class MergekitOptions(Options):
    """Options of ``type: mergekit_genome``.

    Attributes:
        file: The mergekit-evolve file.
        genome: The file's section of that name, in place of `file`.
        models: Names of models in the file -> an expert of the study or ``base``. Needed only for names that cannot be
            matched automatically.
        weights: Bounds of weights that are not normalised.
        ratio: Bounds of weights relative to the first model's.
        density: Bounds of densities.
    """

    file: str | None = None
    genome: dict[str, Any] | None = None
    models: Annotated[dict[str, str], Field(default_factory=dict)]
    weights: Annotated[Bounds, AfterValidator(_not_negative)] = (0.0, 1.5)
    ratio: Annotated[Bounds, AfterValidator(_holds_one)] = (0.1, 10.0)
    density: DensityBounds = (0.05, 1.0)


class Genome(Options):
    """The ``genome`` section of the file."""

    models: Annotated[tuple[str, ...], Field(min_length=1)]
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
    base_model: str | None = None
    tokenizer_source: str | None = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: tuple[str, ...] | None = None
    smooth: bool = False

    @property
    def normalised(self) -> bool:
        return self.merge_method in NORMALISING if self.normalize is None else self.normalize

    def layer_groups(self, context: SpaceContext) -> int:
        return max(1, context.n_blocks // self.layer_granularity) if self.layer_granularity > 0 else 1


def read_genome(
    options: Mapping[str, Any], context: SpaceContext, folder: Path | None = None
) -> tuple[MergekitOptions, Genome, tuple[str, ...], list[str]]:
    """Read and check options and genome.

    Args:
        options: The ``space`` entry of the study file without ``type``.
        context: The models of the study.
        folder: The folder that a relative `file` is relative to; None: the current directory.

    Returns:
        The options, the genome, its experts in its order, and notes.

    Raises:
        SpaceError: Every key that cannot be read or expressed.
    """
    chosen = space_options(MergekitOptions, options)
    section, notes = _section(chosen, folder)
    genome = space_options(Genome, section, at=("genome",))
    problems = _inexpressible(genome, context)
    problems += [
        f"space.models: {target!r} is neither 'base' nor an expert{nearest(target, context.experts)}"
        for target in chosen.models.values()
        if target != "base" and target not in context.experts
    ]
    places = {"base": context.models.base, **context.models.experts}
    if genome.base_model is not None and _match(genome.base_model, chosen.models, {"base": places["base"]}) is None:
        problems.append(
            f"genome.base_model: {genome.base_model!r} is not the base of the study ({context.models.base}); "
            f"if it is, say so: space.models: {{{genome.base_model!r}: base}}"
        )
    experts = _experts(genome, chosen, places, problems, notes)
    if not experts and not problems:
        problems.append("genome.models: no expert is left to merge")
    if problems:
        raise SpaceError(problems, where=chosen.file or "")
    absent = [e for e in context.experts if e not in experts]
    if absent:
        notes.append(f"the mergekit file does not merge {', '.join(absent)}: coefficient 0")
    return chosen, genome, tuple(experts), notes


def _experts(
    genome: Genome, chosen: MergekitOptions, places: Mapping[str, str], problems: list[str], notes: list[str]
) -> list[str]:
    """Experts of the genome in its order. What is wrong is added to `problems`, and what is left out to `notes`."""
    experts: list[str] = []
    for text in genome.models:
        name = _match(text, chosen.models, places)
        if name is None:
            known = ", ".join(e for e in places if e != "base")
            problems.append(
                f"genome.models: {text!r} is none of the study's experts ({known}); "
                f"if it is one, say so: space.models: {{{text!r}: NAME}}"
            )
        elif name == "base" and genome.merge_method == "linear":
            problems.append(
                "genome.models: the base cannot be one of the models of a linear merge here; list experts only"
            )
        elif name == "base":
            notes.append("the base among genome.models has no delta: its numbers change nothing and are left out")
        elif name in experts:
            problems.append(f"genome.models: expert {name!r} stands twice")
        else:
            experts.append(name)
    return experts


def _section(chosen: MergekitOptions, folder: Path | None) -> tuple[Mapping[str, Any], list[str]]:
    if (chosen.file is None) == (chosen.genome is None):
        raise SpaceError("space: give either file (a mergekit-evolve YAML) or genome (its section of that name)")
    if chosen.genome is not None:
        return chosen.genome, []
    path = absolute(str(chosen.file), folder)
    if not path.is_file():
        raise SpaceError(f"space.file: no such file: {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpaceError(f"space.file: not YAML: {error}", where=path.name) from None
    if not isinstance(data, dict) or not isinstance(data.get("genome"), dict):
        raise SpaceError("space.file: needs a mapping under the key 'genome'", where=path.name)
    unknown = [k for k in data if k != "genome" and k not in ELSEWHERE]
    if unknown:
        raise SpaceError(
            [f"{k}: unknown key{nearest(str(k), ['genome', *ELSEWHERE])}" for k in unknown], where=path.name
        )
    notes = [f"{path.name}: {k} is not read; the study file's {ELSEWHERE[k]} decides" for k in data if k in ELSEWHERE]
    return data["genome"], notes


def _match(text: str, given: Mapping[str, str], places: Mapping[str, str]) -> str | None:
    """The name in `places` of a model of the file, or None.

    The given map comes first. Without an entry in it, the model is matched by its name, its place or the last part of
    its place.
    """
    if text in given:
        return given[text] if given[text] in places else None
    if text in places:
        return text
    tests = (
        lambda p: p == text,
        lambda p: _resolved(p) == _resolved(text),
        lambda p: Path(p).name == Path(text).name,
    )
    for test in tests:
        names = [name for name, place in places.items() if test(place)]
        if len(names) == 1:
            return names[0]
    return None


def _resolved(text: str) -> Path:
    return Path(text).expanduser().resolve()


def _inexpressible(genome: Genome, context: SpaceContext) -> list[str]:
    """One sentence per key that no recipe can follow."""
    problems = []
    depth, step = context.n_blocks, genome.layer_granularity
    if genome.merge_method == "slerp":
        problems.append("genome.merge_method: slerp has no place here; use linear, task_arithmetic, ties or dare_ties")
    if genome.merge_method in ("task_arithmetic", *DENSITY_METHODS) and genome.base_model is None:
        problems.append(f"genome.base_model: is missing, and {genome.merge_method} needs it")
    if genome.merge_method == "linear" and genome.normalize is False:
        problems.append(
            "genome.normalize: false would scale the base too, which no recipe does; "
            "leave it out or use task_arithmetic"
        )
    if genome.merge_method == "task_arithmetic" and genome.normalize is True:
        problems.append("genome.normalize: true makes task_arithmetic a linear merge; write merge_method: linear")
    elif genome.normalised and genome.allow_negative_weights:
        problems.append(
            "genome.allow_negative_weights: the rule divides by the sum of the weights, which must not change sign; "
            "write normalize: false or allow_negative_weights: false"
        )
    if genome.tokenizer_source not in (None, "base"):
        problems.append("genome.tokenizer_source: the base's tokenizer is kept; leave the key out")
    if step > 0 and (depth == 0 or depth % step):
        divisors = [d for d in range(1, depth + 1) if depth % d == 0]
        problems.append(
            f"genome.layer_granularity: must divide the {depth} blocks ({', '.join(map(str, divisors))}), got {step}"
        )
    return problems + _filter_problems(genome, context)


def _filter_problems(genome: Genome, context: SpaceContext) -> list[str]:
    problems = []
    left = [g.tensor for g in context.groups]
    words = {part for name in left for part in name.split(".") if not part.isdecimal()}
    for word in genome.filters or ():
        rest = [t for t in left if word not in t]
        if len(rest) == len(left):
            problems.append(
                f"genome.filters: no tensor (left by the filters before) has {word!r} in its name{nearest(word, words)}"
            )
        left = rest
    return problems
