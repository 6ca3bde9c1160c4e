"""Rules of one's own: each is one decorated function. `study.yaml` beside this file searches over them."""

import torch

from merge_search.presets import add_preset
from merge_search.rules import measure, operator, selection, splice


@measure("log_size", bounded=True)
def log_size(context, *, eps: float = 1e-3):
    """log(1 + |delta| / eps)"""
    return [torch.log1p(delta.abs() / eps) for delta in context.deltas]


@selection("above_mean", uses_density=False)
def above_mean(context, *, times: float = 1.0):
    """scores above a multiple of their mean"""
    return [scores > times * scores.mean() for scores in context.scores]


@splice("middle")
def middle(context):
    """median of the deltas times their coefficients"""
    weighted = [c * delta for c, delta in zip(context.coefficients, context.deltas, strict=True)]
    return torch.stack(weighted).median(0).values


@operator("whitened", decomposing=True, ndim=(2,))
def whitened(context, *, power: float = 0.5):
    """each delta with a flatter spectrum"""
    out = []
    for delta in context.deltas:
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        flat = s**power
        scale = torch.linalg.vector_norm(s) / torch.linalg.vector_norm(flat).clamp_min(1e-12)
        out.append(u @ torch.diag(flat * scale) @ v)
    return out


add_preset(
    "log_ties", "the largest by log size", {"assess": {"measure": "log_size"}, "select": {"kind": "top_k"}}, density=0.2
)
add_preset("whitened", "sum of deltas with flatter spectra", {"operator": {"name": "whitened"}}, coefficient=0.4)
