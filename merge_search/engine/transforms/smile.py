"""SMILE: base and experts become one sparse mixture of low-rank experts, without data.

SMILE, Tang et al. 2024, arXiv 2408.10174. `engine.architectures.smile` has the formula of a layer, and what differs
from the released code. The linear layers inside the blocks become mixtures: with D_i = W_i - W = U_i S_i V_i^T, each
gets U_i S_i and V_i^T of the k largest singular values, and the first k_gate rows of V_i^T route. Everything else
(norms, embeddings, heads, layers that are left out) is the base's, or the average of the experts.

Ranks stop at what a layer has: its smaller side, and the largest rank among its deltas. A layer that no expert changed
stays as it is.

Differs from the released code: routes along the weights' own directions (``route: weights``, its ``routing_use_diff =
False``) are those of W_i, and ``shared: average`` (the mixture around the average of the experts, D_i taken from there)
is ours. Rank 0 is no mixture, where the code keeps dense deltas.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_search.engine.architectures import SMILE
from merge_search.engine.checkpoints.checkpoint import dtype_name
from merge_search.engine.checkpoints.headers import CheckpointInfo, TensorHeader
from merge_search.engine.checkpoints.layout import layout, name_groups
from merge_search.engine.checkpoints.module_names import Part, parts_on_disk, skeleton
from merge_search.engine.checkpoints.writer import write_model
from merge_search.engine.methods.operators.matrix import svd, working
from merge_search.engine.transforms.sources import Source, Sources
from merge_search.errors import NonFiniteError
from merge_search.memory import free_host_bytes
from merge_search.rules.transforms import Preview, Transformed

__all__ = ["preview", "smile"]

_NOISE = 1e-5
"""Singular values up to this share of the largest are rounding noise, and have no directions."""
_CACHED = 0.25
"""Share of the free memory that decompositions may keep. A search over ranks computes each of them once."""


@dataclass(frozen=True)
class _Layer:
    """A linear layer that becomes a mixture.

    Attributes:
        weight: Name of its weight in the model.
        bias: Name of its bias; '' for none.
        is_transposed: Whether the weight is (in, out).
        rank: k, at most the smaller side.
        gate_rank: k_gate, the same.
    """

    weight: str
    bias: str
    is_transposed: bool
    rank: int
    gate_rank: int


class _Model:
    """The base as its model sees it: parameters by name, each made of tensors on disk.

    Attributes:
        parts: Tensors on disk by name of the parameter. Of the names of a tied parameter the first that has any.
        shapes: Shape by name of the parameter.
        linear: Layers that can become mixtures, by name -> whether their weight is (in, out).
        class_name: Its class.
        lost: Tensors on disk that would be merged and that are no view of a parameter.
    """

    def __init__(self, base: Source) -> None:
        from merge_search.engine.architectures.smile import LINEAR

        model = skeleton(base.info)
        self.is_known = model is not None and type(model).__module__.startswith("transformers.")
        if not self.is_known:
            return
        state = model.state_dict(keep_vars=True)
        parts = parts_on_disk(base.info, state)
        written: dict[int, str] = {}
        for name in state:
            if parts.get(name):
                written.setdefault(id(state[name]), name)
        self.parts: dict[str, tuple[Part, ...]] = {name: parts[name] for name in written.values()}
        self.shapes = {name: tuple(state[name].shape) for name in self.parts}
        self.linear = {n: type(m) is not torch.nn.Linear for n, m in model.named_modules() if type(m) in LINEAR}
        self.class_name = type(model).__name__
        merged = layout(base.info)
        covered = {part.name for some in parts.values() for part in some}
        self.lost = [name for name in merged if name not in covered]
        self.merged = {n for n, some in self.parts.items() if all(p.name in merged for p in some)}

    def layers(self, modules: str, rank: int, gate_rank: int) -> dict[str, _Layer]:
        """The layers of the blocks that become mixtures, by name."""
        groups = name_groups(self.shapes)
        found = {}
        for name, is_transposed in self.linear.items():
            weight, bias = f"{name}.weight", f"{name}.bias"
            group = groups.get(weight)
            if group is None or group.block is None or modules not in ("all", group.kind):
                continue
            n = min(self.shapes[weight])
            has_bias = bias in self.shapes
            found[name] = _Layer(weight, bias if has_bias else "", is_transposed, min(rank, n), min(gate_rank, n))
        return found

    def read(self, source: Source, name: str) -> Tensor:
        """A parameter with a source's values, in the dtype of its files."""
        parts = self.parts[name]
        if len(parts) == 1 and parts[0].is_whole:
            return source.tensor(parts[0].name)
        tensors = [source.tensor(part.name) for part in parts]
        whole = torch.empty(self.shapes[name], dtype=tensors[0].dtype)
        for part, tensor in zip(parts, tensors, strict=True):
            part.of(whole).copy_(tensor)
        return whole


@lru_cache(maxsize=2)
def _model_of(base: Source) -> _Model:
    """The base's model. A space previews many options of one base."""
    return _Model(base)


def preview(
    sources: Sources, *, rank: float, gate_rank: float, top_k: float, modules: str, rest: str, shared: str, route: str,
    temperature: float,
) -> Preview:  # fmt: skip
    """Every problem with the options and the base's architecture, and the config of the mixture.

    Ranks in that config are upper bounds: deltas of lower rank are found when weights are read.
    """
    problems, n = [], len(sources.experts)
    for option, value, least in (("rank", rank, 0), ("gate_rank", gate_rank, 1), ("top_k", top_k, 1)):
        if value != int(value) or value < least:
            problems.append(f"transform: smile.{option} must be a whole number from {least} on, got {value:g}")
    if top_k > n:
        problems.append(f"transform: smile.top_k must be at most the number of experts, {n}, got {top_k:g}")
    if not temperature > 0:
        problems.append(f"transform: smile.temperature must be > 0, got {temperature:g}")
    where = sources.base.folder / "config.json"
    model = _model_of(sources.base)
    if not model.is_known:
        names = ", ".join(sources.base.config.get("architectures") or ["none"])
        problems.append(f"{where}: transform smile needs an architecture that transformers knows, got {names}")
        return Preview(tuple(problems))
    if model.lost:
        problems.append(
            f"{where}: transform smile cannot place {len(model.lost)} tensors of the base in its model "
            f"({', '.join(model.lost[:3])}); name the class that uses them under 'architectures', or take another base"
        )
    layers = model.layers(modules, int(rank), max(1, int(gate_rank)))
    if not layers:
        problems.append(f"{where}: transform smile finds no linear layer inside the blocks for modules: {modules}")
    most = max((min(model.shapes[layer.weight]) for layer in layers.values()), default=0)
    for option, value in (("rank", rank), ("gate_rank", gate_rank)):
        if layers and value > most:
            problems.append(
                f"transform: smile.{option} must be at most {most}, the largest that a layer has, got {value:g}"
            )
    if problems:
        return Preview(tuple(problems))
    ranks = {name: (layer.rank, layer.gate_rank) for name, layer in layers.items()} if rank else {}
    settings = {"rank": rank, "gate_rank": gate_rank, "top_k": top_k, "route": route, "temperature": temperature}
    config, headers = _config(sources, model, ranks, settings), _headers(sources, model)
    for name in ranks:
        for key in _keys(layers[name], route):
            headers[f"{name}.{key}"] = replace(headers[layers[name].weight], name=f"{name}.{key}")
    return Preview(config=config, names=tuple(layout(CheckpointInfo(sources.base.folder, headers, config))))


def smile(
    sources: Sources, out: Path, *, rank: float, gate_rank: float, top_k: float, modules: str, rest: str, shared: str,
    route: str, temperature: float,
) -> Transformed:  # fmt: skip
    """Write the mixture to ``out / "base"``. Nothing is left to merge.

    Args:
        sources: Base and experts; adapters count by their dense deltas.
        out: A folder.
        rank: k, at least 0; 0 for no mixture.
        gate_rank: k_gate, at least 1.
        top_k: Number of experts that answer a token.
        modules: ``all``, ``attention`` or ``mlp``: the linear layers that become mixtures.
        rest: ``base`` or ``average``: everything else.
        shared: ``base`` or ``average``: the weight that all tokens see, from which D_i is taken.
        route: ``deltas`` or ``weights``: whose right singular vectors route.
        temperature: Of the softmax.

    Raises:
        NonFiniteError: A delta holds NaN or infinity.
        TrialError: A decomposition did not converge.
    Cost: one SVD per layer and expert, at most once per process as long as the cache has room. The added tensors are in
        memory, and of everything else one parameter at a time.
    """
    model = _model_of(sources.base)
    settings = {
        "rank": int(rank), "gate_rank": int(gate_rank), "top_k": int(top_k), "route": route,
        "temperature": float(temperature),
    }  # fmt: skip
    layers = model.layers(modules, int(rank), int(gate_rank)) if rank else {}
    added: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, int]] = {}
    around: dict[str, str] = {}
    for name, layer in layers.items():
        experts = _experts(model, sources, layer, shared, route)
        if experts:
            ranks[name] = experts.pop("ranks")
            added |= {f"{name}.{key}": tensor for key, tensor in experts.items()}
            around |= dict.fromkeys((layer.weight, layer.bias), shared)

    headers = _headers(sources, model)
    for name, tensor in added.items():
        headers[name] = TensorHeader(name, dtype_name(tensor.dtype), tuple(tensor.shape), Path(), 0, 0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in model.parts:
            how = around.get(name, rest) if name in model.merged else "base"
            yield name, _shared(model, sources, name, how)
        yield from added.items()

    config = _config(sources, model, ranks, settings)
    write_model(out / "base", like=sources.base.settings_folder, config=config, headers=headers, tensors=tensors())
    return Transformed(out / "base")


def _config(
    sources: Sources, model: _Model, ranks: Mapping[str, tuple[int, int]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    inner = sources.base.config
    modules = {name: list(pair) for name, pair in ranks.items()}
    mixture = {"model_type": inner["model_type"], "experts": list(sources.experts), **settings, "modules": modules}
    return {**inner, "architectures": [f"Smile{model.class_name}"], "model_type": SMILE, "smile": mixture}


def _headers(sources: Sources, model: _Model) -> dict[str, TensorHeader]:
    """Dtype and shape of the base's parameters by name in the model."""
    first = {name: sources.base.headers[parts[0].name] for name, parts in model.parts.items()}
    return {name: replace(t, name=name, shape=model.shapes[name]) for name, t in first.items()}


def _keys(layer: _Layer, route: str) -> list[str]:
    """Names that a mixture adds to a layer."""
    keys = {"expert_left": True, "expert_right": True, "expert_gate": route == "weights", "expert_bias": layer.bias}
    return [key for key, is_there in keys.items() if is_there]


def _shared(model: _Model, sources: Sources, name: str, how: str) -> Tensor:
    """The base's parameter, or W + mean_i (W_i - W) in the base's dtype."""
    base = model.read(sources.base, name)
    if how == "base":
        return base
    total = torch.zeros(base.shape)
    for expert in sources.experts.values():
        total += model.read(expert, name).float() - base.float()
    return (base.float() + total / len(sources.experts)).to(base.dtype)


def _experts(model: _Model, sources: Sources, layer: _Layer, shared: str, route: str) -> dict[str, Any]:
    """The added tensors of a layer, and its ``ranks``; {} where no expert changed the weight."""
    base = _shared(model, sources, layer.weight, shared)
    triples = [_factors(model, sources, e, layer, base, shared) for e in sources.experts.values()]
    n_values = max(_rank(s) for _, s, _ in triples)
    if n_values == 0:
        return {}
    rank = min(layer.rank, n_values)
    gate_rank = min(layer.gate_rank, n_values) if route == "deltas" else layer.gate_rank
    rows = max(rank, gate_rank) if route == "deltas" else rank
    result: dict[str, Any] = {
        "ranks": (rank, gate_rank),
        "expert_left": torch.stack([u[:, :rank] * s[:rank] for u, s, _ in triples]),
        "expert_right": torch.stack([vh[:rows] for _, _, vh in triples]),
    }
    if route == "weights":
        whole = [_factors(model, sources, e, layer, None, shared) for e in sources.experts.values()]
        result["expert_gate"] = torch.stack([vh[:gate_rank] for _, _, vh in whole])
    if layer.bias:
        bias = _shared(model, sources, layer.bias, shared).float()
        result["expert_bias"] = torch.stack(
            [model.read(e, layer.bias).float() - bias for e in sources.experts.values()]
        )
    return {k: v.to(base.dtype).contiguous() if isinstance(v, Tensor) else v for k, v in result.items()}


_Triple = tuple[Tensor, Tensor, Tensor]


class _Cache:
    """Decompositions by key, the most recently used ones that fit into a share of the free memory."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, ...], _Triple] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[str, ...], make: Callable[[], _Triple]) -> _Triple:
        """Return what is kept under `key`, or what `make` returns, which is kept."""
        if key not in self._known:
            self._known[key] = make()
            self._bytes += _n_bytes(self._known[key])
            limit = _CACHED * free_host_bytes()
            while len(self._known) > 1 and self._bytes > limit:
                self._bytes -= _n_bytes(self._known.popitem(last=False)[1])
        self._known.move_to_end(key)
        return self._known[key]


def _n_bytes(triple: _Triple) -> int:
    return sum(tensor.nbytes for tensor in triple)


_cache = _Cache()


def _factors(
    model: _Model, sources: Sources, expert: Source, layer: _Layer, base: Tensor | None, shared: str
) -> _Triple:
    """U (out, r), S (r), V^T (r, in) of W_i - base, or of W_i without a base, in float32. Noise is zero."""
    others = [s.hash for s in sources.experts.values()] if shared == "average" else []
    key = (sources.base.hash, expert.hash, layer.weight, "weights" if base is None else shared, *others)

    def decompose() -> _Triple:
        matrix = model.read(expert, layer.weight).float()
        if base is not None:
            matrix = matrix - base.float()
        if not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError(
                f"{expert.folder}: the delta of {layer.weight!r} must be finite, found NaN or infinity; "
                "check the expert's checkpoint"
            )
        u, s, vh = svd(working(matrix.T if layer.is_transposed else matrix))
        kept = ((s > _NOISE * s[:1]) & (s > 0)).to(s.dtype)
        return (u * kept).float(), (s * kept).float(), (vh * kept[:, None]).float()

    return _cache.get(key, decompose)


def _rank(values: Tensor) -> int:
    return int((values > 0).sum())
