"""A rule file as a user writes it: one rule of every kind, and a preset that uses them. Tests name it by its path."""

import torch

from merge_search.presets import add_preset
from merge_search.rules import measure, operator, post, selection, splice


@measure("log_size", bounded=True)
def log_size(context, *, eps: float = 1e-3):
    """log(1 + |delta| / eps)"""
    return [torch.log1p(t.abs() / eps) for t in context.deltas]


@selection("above_mean", uses_density=False)
def above_mean(context, *, times: float = 1.0):
    """scores above a multiple of their mean"""
    return [a > times * a.mean() for a in context.scores]


@selection("lottery", uses_scores=False, is_random=True, rescale="inverse_density")
def lottery(context):
    """each at random"""
    return [context.uniform(e) < d for e, d in zip(context.experts, context.densities, strict=True)]


@splice("middle", is_scored=False)
def middle(context):
    """median of the deltas times their coefficients"""
    return torch.stack([c * t for c, t in zip(context.coefficients, context.deltas, strict=True)]).median(0).values


@operator("median")
def median(context):
    """median of the weights"""
    return (
        context.base + context.scale * torch.stack([torch.zeros_like(context.base), *context.deltas]).median(0).values
    )


@operator("halved", decomposing=True)
def halved(context, *, factor: float = 0.5):
    """each delta times a factor"""
    return [factor * t for t in context.deltas]


@post("clipped")
def clipped(context, delta, *, limit: float = 0.1):
    """clip the combined delta"""
    return delta.clamp(-limit, limit)


DROPPED = {"select": {"kind": "lottery"}, "rescale": {"kind": "inverse_density"}}

add_preset(
    "log_ties", "trimmed by log size", {"assess": {"measure": "log_size"}, "select": {"kind": "top_k"}}, density=0.4
)
add_preset("lucky_middle", "median of what a lottery leaves", {**DROPPED, "splice": {"kind": "middle"}}, density=0.5)
add_preset("above", "what is above the mean", {"select": {"kind": "above_mean"}})
add_preset("half", "half of everything, clipped", {"operator": {"name": "halved"}, "post": [{"name": "clipped"}]})
