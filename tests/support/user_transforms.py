"""A rule file with transforms, as a user writes it: one whose result is final, and one that is merged."""

import torch

from merge_search.engine.checkpoints.writer import write_model
from merge_search.rules import Preview, Transformed, transform


@transform("soup", merges=False)
def soup(sources, out, *, share: float = 1.0):
    """the mean of the experts, and no merge"""
    base, experts = sources.base, list(sources.experts.values())

    def mixed(name):
        own = base.tensor(name)
        mean = torch.stack([e.tensor(name).float() for e in experts]).mean(0)
        return own + share * (mean - own) if own.is_floating_point() else own

    tensors = ((name, mixed(name)) for name in base.headers)
    write_model(out / "base", like=base.settings_folder, config=base.config, headers=base.headers, tensors=tensors)
    return Transformed(out / "base")


def previewed(sources, *, factor):
    return Preview((f"the factor must be positive, got {factor}",) if factor <= 0 else ())


@transform("scaled", check=previewed)
def scaled(sources, out, *, factor: float = 0.5):
    """the base as it is, the experts with a part of their deltas"""
    experts = {}
    for name, expert in sources.experts.items():
        tensors = ((n, torch.lerp(sources.base.tensor(n), expert.tensor(n), factor)) for n in sources.base.headers)
        write_model(
            out / name, like=expert.settings_folder, config=expert.config, headers=sources.base.headers, tensors=tensors
        )
        experts[name] = out / name
    return Transformed(sources.base.folder, experts)
