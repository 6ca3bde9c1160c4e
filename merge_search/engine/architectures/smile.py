"""SMILE: any architecture of transformers whose linear layers are sparse mixtures of low-rank experts.

SMILE, Tang et al. 2024, arXiv 2408.10174; the authors' code is in fusion_bench. With D_i = U_i S_i V_i^T, the delta of
expert i in one layer:

    r_i(x) = || V_i[:, :k_gate]^T x ||_2
    w(x)   = softmax(r(x) / temperature) over the top_k largest r_i, which is the softmax over all of them, cut and
             scaled to the sum 1; 0 elsewhere
    y      = W x + b + sum_i w_i(x) (U_i[:, :k] S_i[:k] V_i[:, :k]^T x + b_i - b)

Every token is routed in every layer. W is the base's weight, and r_i needs no data.

A layer keeps its ``weight`` and ``bias``, and gets ``expert_left`` (experts, out, k): U_i S_i, ``expert_right``
(experts, max(k, k_gate), in): V_i^T, ``expert_bias`` (experts, out) where it has a bias, and ``expert_gate`` (experts,
k_gate, in) where routes follow other directions than those of the deltas.

Differs from the released code: V_i is stored once for experts and router; an expert that left a layer alone has r = 0,
where the code routes by the first unit vectors; equal r go to the first expert; `temperature` is ours (1 as published).

A config.json of this architecture has all fields of the one that it was made from, the ``model_type`` of this package,
and the settings of the mixture under ``smile``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from merge_search._compat.transformers import auto_model_classes, config_class_of
from merge_search.engine.architectures import SMILE

__all__ = ["LINEAR", "SmileConfig", "class_of", "settings_of"]

_PREFIX = "Smile"


# ---------------------------------------------------------------------------------------------- layers


class _Experts(nn.Module):
    """What a linear layer adds for its experts. A layer becomes a mixture in place, by `upscale`."""

    expert_left: Tensor
    expert_right: Tensor
    expert_gate: Tensor | None
    expert_bias: Tensor | None
    rank: int
    gate_rank: int
    top_k: int
    temperature: float

    def upscale(self, n: int, settings: Mapping[str, Any], rank: int, gate_rank: int) -> None:
        """Add experts that change nothing.

        Args:
            n: Number of experts.
            settings: ``smile`` of the config.
            rank: k of this layer.
            gate_rank: k_gate of this layer.
        """
        weight: Tensor = self.weight  # type: ignore[assignment]
        n_in, n_out = weight.shape[::-1] if isinstance(self, nn.Linear) else weight.shape
        self.rank, self.gate_rank = rank, gate_rank
        self.top_k, self.temperature = min(settings["top_k"], n), settings["temperature"]
        shares_gate = settings["route"] == "deltas"

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))

        self.expert_left = zeros(n, n_out, rank)
        self.expert_right = zeros(n, max(rank, gate_rank) if shares_gate else rank, n_in)
        self.expert_gate = None if shares_gate else zeros(n, gate_rank, n_in)
        self.expert_bias = None if self.bias is None else zeros(n, n_out)

    def routes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts and their weights.

        Args:
            x: Shape (tokens, in).

        Returns:
            Numbers of experts, int64, and weights, float32, which sum to 1. Both have the shape (tokens, top_k).
        """
        gate = self.expert_right[:, : self.gate_rank] if self.expert_gate is None else self.expert_gate
        projected = functional.linear(x, gate.flatten(0, 1)).view(len(x), *gate.shape[:2])
        norms = torch.linalg.vector_norm(projected, dim=-1, dtype=torch.float32)
        values, experts = norms.sort(dim=-1, descending=True, stable=True)
        return experts[:, : self.top_k], (values[:, : self.top_k] / self.temperature).softmax(-1)

    def mixture(self, x: Tensor) -> Tensor:
        """Return what the experts add to the layer's output. Each expert sees the tokens that chose it, at once.

        Args:
            x: Shape (..., in).

        Returns:
            Shape (..., out), in the dtype of `x`.
        """
        flat = x.reshape(-1, x.shape[-1])
        n, n_out, _ = self.expert_left.shape
        if n == 1:
            return self._expert(0, flat).view(*x.shape[:-1], n_out)
        chosen, weights = self.routes(flat)
        order = chosen.flatten().argsort(stable=True)
        tokens = order // self.top_k
        factors = weights.flatten()[order].to(x.dtype)[:, None]
        total, start = flat.new_zeros(len(flat), n_out), 0
        for i, count in enumerate(chosen.flatten().bincount(minlength=n).tolist()):
            if count:
                part = slice(start, start + count)
                total.index_add_(0, tokens[part], self._expert(i, flat[tokens[part]]) * factors[part])
            start += count
        return total.view(*x.shape[:-1], n_out)

    def _expert(self, i: int, x: Tensor) -> Tensor:
        bias = None if self.expert_bias is None else self.expert_bias[i]
        return functional.linear(functional.linear(x, self.expert_right[i, : self.rank]), self.expert_left[i], bias)


class _SmileLinear(_Experts, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.Linear.forward(self, input) + self.mixture(input)


class _SmileConv1D(_Experts, Conv1D):  # type: ignore[misc]
    """GPT-2's linear layer, whose weight is (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = Conv1D.forward(self, x)
        return base + self.mixture(x)


LINEAR: dict[type[nn.Module], type[_Experts]] = {nn.Linear: _SmileLinear, Conv1D: _SmileConv1D}
"""Layers that can become mixtures. Layers derived from these compute something else, and are left alone."""


# ---------------------------------------------------------------------------------------------- models


class SmileConfig(PreTrainedConfig):  # type: ignore[misc]
    """What `AutoConfig` finds by our ``model_type``. `from_dict` returns a config with the fields of the inner one."""

    model_type = SMILE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return _config_class(config_class_of(settings_of(config_dict)["model_type"])).from_dict(config_dict, **kwargs)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the mixture in a config.json.

    Raises:
        ValueError: They are missing or incomplete.
    """
    settings = config.get("smile")
    wanted = ("experts", "gate_rank", "model_type", "modules", "rank", "route", "temperature", "top_k")
    if not isinstance(settings, dict) or any(key not in settings for key in wanted):
        raise ValueError(f"config.json of a {SMILE} model must have a mapping smile with {', '.join(wanted)}")
    return settings


@cache
def _config_class(inner: Any) -> Any:
    """Return `inner` with our ``model_type``, known to every Auto class that knows `inner`."""
    made = type(_PREFIX + inner.__name__, (inner,), {"model_type": SMILE, "__module__": __name__})
    for auto, model in auto_model_classes(inner):
        auto.register(made, _model_class(model, made), exist_ok=True)
    return made


@cache
def _model_class(inner: Any, config_class: Any) -> Any:
    body = {"config_class": config_class, "__module__": __name__}
    return type(_PREFIX + inner.__name__, (_SmileModel, inner), body)


def class_of(config: Mapping[str, Any]) -> Any | None:
    """Return the class that a SMILE model's config.json names; None where transformers has no such architecture.

    Raises:
        ValueError: The settings are missing.
    """
    names = config.get("architectures") or []
    inner = getattr(transformers, str(names[0]).removeprefix(_PREFIX), None) if names else None
    if inner is None or not names[0].startswith(_PREFIX):
        return None if names else transformers.AutoModel
    return _model_class(inner, _config_class(config_class_of(settings_of(config)["model_type"])))


class _SmileModel:
    """Comes before an architecture of transformers among the bases of a class: its layers become mixtures."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        for module in model.modules():
            # transformers renames the tensors of its own models while loading. Ours are named as in the model.
            if isinstance(module, PreTrainedModel) and not isinstance(module, _SmileModel):
                kind: Any = type(module)
                module.__class__ = _inner_class(kind)
        settings = config.smile
        for name, (rank, gate_rank) in settings["modules"].items():
            layer = _submodule(model, name)
            layer.__class__ = LINEAR[type(layer)]
            layer.upscale(len(settings["experts"]), settings, rank, gate_rank)


@cache
def _inner_class(inner: Any) -> Any:
    return type(_PREFIX + inner.__name__, (inner,), {"__module__": __name__})


def _submodule(model: Any, name: str) -> Any:
    """The layer, also where a model is loaded with a head that its folder lacks, or without one that it has."""
    prefix = f"{model.base_model_prefix}."
    for known in (name, name.removeprefix(prefix), prefix + name):
        try:
            return model.get_submodule(known)
        except AttributeError:
            continue
    raise AttributeError(f"{type(model).__name__} has no layer {name!r}, which config.json names under smile.modules")
