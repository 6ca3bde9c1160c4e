"""A rule file as a user writes it: one rule of every kind, and a preset that uses them. Tests name it by its path."""

import torch

from merge_search.engine.statistics.backward import mean_of_gradients
from merge_search.presets import add_preset
from merge_search.rules import granularity, measure, operator, post, selection, splice, statistic


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


@statistic("signal")
def signal(work, *, power: float = 2.0):
    """mean over rows of |gradient| to a power"""
    return mean_of_gradients(work, lambda gradient: gradient.abs() ** power)


@measure("signal_size", statistics=("signal@power={power}",), bounded=True)
def signal_size(context, *, power: float = 1.0):
    """|delta| times the signal"""
    signals = [context.statistic(f"signal@power={power}", e) for e in context.experts]
    return [t.abs() * s for t, s in zip(context.deltas, signals, strict=True)]


@operator("loudest", statistics=("signal",))
def loudest(context):
    """each entry from the expert with the largest signal"""
    signals = torch.stack([context.statistic("signal", e) for e in context.experts])
    deltas = torch.stack(context.deltas)
    return context.base + deltas.gather(0, signals.argmax(0, keepdim=True))[0]


@granularity("thirds", rows=100)
def thirds(group):
    """the first blocks, the others, and what is outside"""
    return "outside" if group.block is None else "first" if group.block < 2 else "later"


DROPPED = {"select": {"kind": "lottery"}, "rescale": {"kind": "inverse_density"}}

add_preset(
    "log_ties", "trimmed by log size", {"assess": {"measure": "log_size"}, "select": {"kind": "top_k"}}, density=0.4
)
add_preset("lucky_middle", "median of what a lottery leaves", {**DROPPED, "splice": {"kind": "middle"}}, density=0.5)
add_preset(
    "signal_ties",
    "trimmed by signal",
    {"assess": {"measure": "signal_size"}, "select": {"kind": "top_k"}},
    density=0.4,
    needs_data=True,
)
add_preset("above", "what is above the mean", {"select": {"kind": "above_mean"}})
add_preset("half", "half of everything, clipped", {"operator": {"name": "halved"}, "post": [{"name": "clipped"}]})
