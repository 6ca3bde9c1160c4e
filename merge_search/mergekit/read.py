"""Reads a mergekit YAML file into a `Recipe`."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_search.engine.checkpoints.headers import CheckpointInfo, read_checkpoint, resolve_model
from merge_search.engine.checkpoints.layout import layout, name_groups
from merge_search.engine.transforms.layers import config_problems, read_layers, restacked_names
from merge_search.errors import RecipeError, WeightsError, nearest
from merge_search.mergekit.document import Document, Slice, Source, read_document
from merge_search.mergekit.methods import CANCEL, EPS, IGNORED, METHODS, PER_MODEL, Method, Numbers, cancel
from merge_search.mergekit.values import Table, lookup, needs_layout, place_of, shorten
from merge_search.recipe import Group, Recipe

__all__ = ["read_mergekit"]

_ALONE = {"": Group("", None, "other")}
"""Stands for all of the base's tensors where they have the same numbers."""
_SHARED = {"normalize", "lambda", "density", "rescale", "weight", "t", "select_topk", "scale", *IGNORED}
_KNOWN = _SHARED | {k for m in METHODS.values() for k in (*m.flags, *m.numbers)}
_log = logging.getLogger(__name__)


def read_mergekit(path_or_text: str | Path, *, where: str = "") -> Recipe:
    """The recipe of a mergekit file.

    Experts are named after their folders. The base is ``base_model``, or the first model where the method needs none.
    Its config and tokenizer are kept, as mergekit does. Masks of DARE and DELLA are drawn with the recipe's seed: they
    have mergekit's rate and rescaling, but not its bits. Arithmetic is float32 whatever ``dtype`` says. The result is
    rounded once, to ``out_dtype`` (else ``dtype``).

    Args:
        path_or_text: A file's `Path`, or its text. Relative model paths are looked up beside the file, then in the
            working directory.
        where: What to call the file in messages; its name if not given.

    Raises:
        RecipeError: with every problem, each by its key: tokenizers other than the base's, unknown methods and
            parameters, and whatever else a recipe cannot express.

    Slices that repeat layers, leave some out or move them become the transform ``stack``, whose layers the numbers of
    the recipe belong to. Sources with different ranges in one slice are refused.

    Cost: the base's headers are read where numbers differ between layers or tensors.
    """
    folder = path_or_text.resolve().parent if isinstance(path_or_text, Path) else None
    if isinstance(path_or_text, Path):
        where = where or path_or_text.name
        try:
            text = path_or_text.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"cannot be read: {error.strerror or error}", where=where) from None
    else:
        text, where = path_or_text, where or "mergekit file"
    problems: list[str] = []
    document = read_document(text, folder, problems, where=where)
    if document is not None:
        data = _Reader(document, problems).recipe()
        if not problems:
            return Recipe.from_dict(data, where=where)
    raise RecipeError(problems, where=where)


class _Reader:
    """Turns one document into a recipe. Problems are collected on the way."""

    def __init__(self, document: Document, problems: list[str]) -> None:
        self.document, self.problems = document, problems
        self.base = document.base or document.models[0]
        self.method = METHODS.get(document.method)
        self.groups: Mapping[str, Group] = _ALONE
        self.slices: Sequence[Slice] = document.slices
        self.places = {"": (0, 0.0)}
        self.layers = ""

    def recipe(self) -> dict[str, Any]:
        document = self.document
        if self.method is None:
            self.problems.append(
                f"merge_method: {document.method!r} is not supported{nearest(document.method, METHODS)}"
            )
        self._parameter_names()
        self._models()
        if self.problems or self.method is None or not self._layout():
            return {}
        experts = self._experts()
        names = _expert_names(experts)
        made = self._passthrough(experts) if document.method == "passthrough" else self._numbers(self.method, experts)
        made.pop("weights", None)
        data: dict[str, Any] = {
            "models": {"base": self.base, "experts": {names[m]: m for m in experts}},
            "preset": f"mergekit {document.method}",
            "dtype": document.dtype,
            **({"transform": {"name": "stack", "options": {"layers": self.layers}}} if self.layers else {}),
            **made,
        }
        for field in ("coefficients", "densities"):
            data[field] = {names[m]: v for m, v in made.get(field, {}).items() if v != 1.0}
        return data

    # --- conditions

    def _parameter_names(self) -> None:
        document = self.document
        places: list[tuple[str, Mapping[str, Any]]] = [("parameters", document.parameters)]
        for part in document.slices:
            places.append((f"{part.where}.parameters", part.parameters))
            places += [(f"{s.where}.parameters", s.parameters) for s in part.sources]
        for where, settings in places:
            for key in settings:
                if key in IGNORED:
                    _log.info("%s.%s has no effect: %s", where, key, IGNORED[key])
                elif key not in _KNOWN:
                    self.problems.append(f"{where}.{key}: unknown parameter{nearest(str(key), _KNOWN)}")

    def _models(self) -> None:
        method = self.method
        if method is None:
            return
        if method.needs_base and self.document.base is None:
            self.problems.append(f"base_model: {self.document.method} needs it")
        if self.document.method == "passthrough":
            self._passthrough_models()
            return
        self._number_of_models(method)
        if self.document.slices[0].end is not None:
            self._models_of_slices(method)

    def _passthrough_models(self) -> None:
        document = self.document
        if document.base is not None and document.models != (document.base,):
            self.problems.append("base_model: passthrough copies its sources and takes no base")
        if any(len(part.sources) != 1 for part in document.slices):
            self.problems.append("slices: passthrough takes one source per slice")
        elif len(document.models) < 2:
            self.problems.append("slices: every layer comes from one model, there is nothing to merge")

    def _number_of_models(self, method: Method) -> None:
        document = self.document
        others = [m for m in document.models if m != document.base]
        low, high = method.experts
        if len(others) < low or (high is not None and len(others) > high):
            bounds = f"at least {low}" if high is None else str(low)
            self.problems.append(f"models: {document.method} takes {bounds} beside the base, got {len(others)}")
        if len({*document.models, self.base}) < 2:
            self.problems.append("models: there is nothing to merge with the base")

    def _models_of_slices(self, method: Method) -> None:
        document = self.document
        sources = [{s.model for s in part.sources} for part in document.slices]
        if document.base is not None and any(document.base not in models for models in sources):
            self.problems.append("slices: base_model must be a source of every slice")
        if not method.weight and any(models != set(document.models) for models in sources):
            self.problems.append(f"slices: {document.method} needs the same models in every slice")

    def _layout(self) -> bool:
        """Find the base's tensors where numbers depend on them; whether that went well."""
        if not needs_layout(self.document):
            return True
        try:
            info = read_checkpoint(resolve_model(self.base))
        except WeightsError as error:
            self.problems.append(f"base_model: its tensors must be known for numbers by layer or filter: {error}")
            return False
        self.groups = layout(info)
        n_blocks = 1 + max((g.block for g in self.groups.values() if g.block is not None), default=-1)
        configured = info.config.get("num_hidden_layers", n_blocks)
        if configured != n_blocks:
            self.problems.append(
                f"base_model: numbers by layer need one stack of layers, found {n_blocks} blocks where the config says "
                f"{configured}"
            )
            return False
        last = self.slices[-1]
        if last.end is None:
            self.slices = [Slice(last.sources, last.parameters, 0, n_blocks, last.where)]
        elif (layers := self.document.layers or tuple(range(last.end))) != tuple(range(n_blocks)):
            return self._stack(info, n_blocks, layers)
        self.places = {name: place_of(g, self.slices) for name, g in self.groups.items()}
        return True

    def _stack(self, info: CheckpointInfo, depth: int, layers: tuple[int, ...]) -> bool:
        """Take the tensors of a base whose layers are repeated, left out or moved; whether that went well."""
        self.layers = " ".join(map(str, layers))
        _, problems = read_layers(self.layers, depth, what="slices: layer_range")
        problems += [f"base_model: {p}" for p in config_problems(info.config, depth)]
        if problems:
            self.problems += problems
            return False
        self.groups = name_groups(new for new, _ in restacked_names(self.groups, layers))
        self.places = {name: place_of(g, self.slices) for name, g in self.groups.items()}
        return True

    def _experts(self) -> list[str]:
        return [m for m in self.document.models if m != self.base]

    # --- numbers

    def _value(self, key: str, model: str | None, tensor: str) -> float | None:
        """A parameter of one tensor: the value of `model`, or, for None, the value of all models."""
        index, t = self.places[tensor]
        part = self.slices[index]
        source: Source | None = None
        if model is not None:
            source = next((s for s in part.sources if s.model == model), Source(model, {}, "base_model"))
        return lookup(key, source, part, self.document, tensor, t, self.problems)

    def _table(
        self, key: str, model: str | None, default: float | None, absent: Collection[str] = frozenset()
    ) -> Table:
        """A parameter of every tensor, 0 for `absent` ones. A missing value without a default is a problem."""
        table, missing = {}, False
        for tensor in self.groups:
            value = 0.0 if tensor in absent else self._value(key, model, tensor)
            if value is None:
                value, missing = (0.0, True) if default is None else (default, missing)
            table[tensor] = value
        if missing:
            whose = "" if model is None else f" of {_short(model)}"
            self.problems.append(f"parameters.{key}{whose}: must be given for every tensor")
        return table

    def _weights(self, models: Sequence[str]) -> dict[str, Table]:
        """``weight`` of every model, 0 in slices of which the model is no source."""
        tables = {}
        for model in models:
            absent = {t for t, (i, _) in self.places.items() if not self._takes(self.slices[i], model)}
            tables[model] = self._table("weight", model, None, absent)
        return tables

    def _takes(self, part: Slice, model: str) -> bool:
        """Whether a slice merges a model; a file with ``models:`` adds its base by itself."""
        return self.document.slices[0].end is None or any(s.model == model for s in part.sources)

    def _one(self, key: str, default: float | None, models: Sequence[str | None] = (None,)) -> float:
        """A parameter that must be the same for all tensors (and models, where each may have its own)."""
        values = {v for model in models for v in self._table(key, model, default).values()}
        if len(values) > 1:
            self.problems.append(
                f"parameters.{key}: must be one value for all tensors and models here, got {sorted(values)}"
            )
        return min(values)

    def _shorten(self, table: Table) -> float | dict[str, float]:
        return shorten(table, self.groups.values())

    def _numbers(self, method: Method, experts: list[str]) -> dict[str, Any]:
        """Recipe fields of a method that treats all layers alike."""
        made: dict[str, Any] = {"coefficients": {}, "densities": {}}
        dense = True
        key = "density" if method.sparse else "select_topk" if self.document.method == "sce" else ""
        if key:
            tables = {m: self._table(key, m if method.sparse else None, 1.0) for m in experts}
            self._check_densities(key, tables)
            made["densities"] = {
                m: self._shorten({t: min(v, 1.0) for t, v in table.items()}) for m, table in tables.items()
            }
            dense = all(v == 1.0 for v in made["densities"].values())
        flags = {k: bool(self._one(k, float(v))) for k, v in method.flags.items()}
        numbers = {k: self._one(k, v, experts if k in PER_MODEL else (None,)) for k, v in method.numbers.items()}
        if numbers.get("eps", EPS) != EPS:
            self.problems.append(f"parameters.eps: only {EPS:g} is supported, got {numbers['eps']:g}")
        self._coefficients(method, experts, flags, made)
        if method.has_lambda:
            made["scale"] = self._shorten(self._table("lambda", None, 1.0))
        if self.problems:
            return made
        self._check_epsilon(numbers, made["densities"], dense)
        for name, value in method.settings(Numbers(flags, numbers, dense)).items():
            made[name] = value
        if self.document.method in ("nuslerp", "multislerp"):
            self._spherical(experts, flags, made)
        return made

    def _check_densities(self, key: str, tables: Mapping[str, Table]) -> None:
        if any(v <= 0 for table in tables.values() for v in table.values()):
            self.problems.append(f"parameters.{key}: must be above 0; to leave a model out, give it the weight 0")

    def _check_epsilon(self, numbers: Mapping[str, float], densities: Mapping[str, Any], dense: bool) -> None:
        if "epsilon" not in numbers or dense:
            return
        epsilon = numbers["epsilon"]
        for values in densities.values():
            for d in values.values() if isinstance(values, dict) else [values]:
                if d < 1 and not 0 < d - epsilon <= d + epsilon < 1:
                    self.problems.append(
                        f"parameters.epsilon: density -+ epsilon must lie in (0, 1), got {d:g} -+ {epsilon:g}"
                    )
                    return

    def _coefficients(self, method: Method, experts: list[str], flags: dict[str, bool], made: dict[str, Any]) -> None:
        if self.document.method == "slerp":
            made["coefficients"] = {experts[0]: self._shorten(self._table("t", None, None))}
        if not method.weight:
            return
        # A method on deltas gives the base no weight. A method on weights treats it as one of the models.
        as_points = not (method.needs_base or (self.document.base is not None and self.document.method != "linear"))
        weights = self._weights([self.base, *experts] if as_points else experts)
        flags["as_points"] = as_points
        if method.normalize is not None:
            normalize = self._table("normalize", None, float(method.normalize))
            flags["normalize"] = any(normalize.values())
            if not method.elects:
                weights = self._normalized(weights, normalize)
            elif len(set(map(bool, normalize.values()))) > 1:
                self.problems.append("parameters.normalize: must be one value for all tensors here")
            if method.elects and any(normalize.values()) and _some_cancel(weights):
                self.problems.append(f"parameters.weight: {CANCEL}")
        made["weights"] = weights
        made["coefficients"] = {m: self._shorten(weights[m]) for m in experts}

    def _normalized(self, weights: dict[str, Table], normalize: Table) -> dict[str, Table]:
        """Weights, divided by their sum where ``normalize`` is on. Those of ``linear`` must then sum to one."""
        result: dict[str, Table] = {m: {} for m in weights}
        for tensor, on in normalize.items():
            total = sum(w[tensor] for w in weights.values())
            if self.document.method == "linear" and (total == 0 if on else abs(total - 1) > 1e-6) and not self.problems:
                what = "must not sum to 0" if on else "must sum to 1 where normalize is off"
                self.problems.append(
                    f"parameters.weight: {what}, got {total:g}" + (f" for tensor {tensor!r}" if tensor else "")
                )
            divisor = total if on and abs(total) >= 1e-8 else 1.0
            for m, w in weights.items():
                result[m][tensor] = w[tensor] / divisor
        return result

    def _spherical(self, experts: list[str], flags: Mapping[str, bool], made: dict[str, Any]) -> None:
        """nuslerp and multislerp: without a base the first model is one of the points."""
        weights: dict[str, Table] = made["weights"]
        options = dict(made["operator"].get("options", {}))
        totals = {t: sum(w[t] for w in weights.values()) for t in self.groups}
        if any(v < 0 for w in weights.values() for v in w.values()):
            self.problems.append("parameters.weight: must not be negative, there is no mean of directions then")
        if not flags.get("normalize_weights", True):
            made["scale"] = self._shorten(totals)
            if flags["as_points"] and any(abs(v - 1) > 1e-6 for v in totals.values()):
                self.problems.append("parameters.normalize_weights: without base_model the weights must sum to 1")
        if flags["as_points"]:
            options["space"] = "weights"
            if self.document.method == "nuslerp":
                if any(v == 0 for v in totals.values()):
                    self.problems.append("parameters.weight: must not sum to 0")
                    return
                made["coefficients"] = {
                    experts[0]: self._shorten({t: weights[experts[0]][t] / v for t, v in totals.items()})
                }
            else:
                self._relative(experts, weights, options, made)
        made["operator"] = {"name": made["operator"]["name"], **({"options": options} if options else {})}

    def _relative(
        self, experts: list[str], weights: dict[str, Table], options: dict[str, Any], made: dict[str, Any]
    ) -> None:
        """Weights relative to the first model's weight, which becomes an option of the operator."""
        first = weights[self.base]
        if all(v == 0 for v in first.values()):
            return
        if any(v == 0 for v in first.values()):
            self.problems.append(
                f"parameters.weight: of the first model must not be 0 on some tensors only ({_short(self.base)})"
            )
            return
        options["base_weight"] = 1.0
        made["coefficients"] = {m: self._shorten({t: weights[m][t] / v for t, v in first.items()}) for m in experts}

    def _passthrough(self, experts: list[str]) -> dict[str, Any]:
        """Every layer from one model: coefficient 1 there, 0 elsewhere."""
        sources = {t: self.slices[i].sources[0].model for t, (i, _) in self.places.items()}
        for tensor, source in sources.items():
            if self._value("scale", source, tensor) not in (None, 1.0):
                self.problems.append("parameters.scale: layers cannot be scaled, only copied")
                break
        return {"coefficients": {m: self._shorten({t: float(s == m) for t, s in sources.items()}) for m in experts}}


def _short(model: str) -> str:
    return Path(model).name


def _expert_names(models: Sequence[str]) -> dict[str, str]:
    """A name for every model: the last part of its place in letters, digits, '_' and '-', numbered where it is
    taken.
    """
    names: dict[str, str] = {}
    for model in models:
        plain = re.sub(r"[^\w-]+", "_", _short(model)).strip("_") or "expert"
        taken = {"base", *names.values()}
        name, n = plain, 2
        while name in taken:
            name, n = f"{plain}_{n}", n + 1
        names[model] = name
    return names


def _some_cancel(weights: Mapping[str, Table]) -> bool:
    return any(cancel(row) for row in set(zip(*(w.values() for w in weights.values()), strict=True)))
