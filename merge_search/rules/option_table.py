"""What the options of the built-in rules may be: meaning, source, bounds, and the range of a search that gives none.

Bounds are wide: within them a rule can be computed. The range after them is the one worth searching, mostly that of the
paper or of the released code. A row of another table shows its options by its name here. torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping

from merge_search.rules.table import OptionInfo

__all__ = ["MEASURE_OPTIONS", "OPERATOR_OPTIONS", "POST_OPTIONS", "STAGE_OPTIONS", "TRANSFORM_OPTIONS"]

About = Mapping[str, Mapping[str, OptionInfo]]

PAPER, RELEASE, MERGEKIT, OURS = "paper", "release", "mergekit", "ours"
_O = OptionInfo

_TOLERANCE = _O("singular values up to this share of the largest are noise", OURS, (0.0, 0.1), (1e-7, 1e-2), log=True)
_EMBEDDINGS = _O("treat embedding and head like the other matrices", OURS)
_SPACE = _O("directions of weights or of deltas", MERGEKIT)
_BASE_WEIGHT = _O("weight of the base among the experts", MERGEKIT, (0.0, 10.0), (0.0, 1.0))

MEASURE_OPTIONS: About = {
    "energy": {
        "floor": _O("added to every energy", MERGEKIT, (0.0, 1.0), (1e-9, 1e-3), log=True),
    },
    "pcb": {
        "inter": _O("agreement with the other experts, as in one of three released files", RELEASE),
        "temperature": _O("k of exp(k a^2); none: the number of experts", PAPER, (0.0, 20.0), (0.0, 8.0)),
    },
    "pcb_paper": {
        "scope": _O("what norms and softmaxes run over", PAPER),
        "centred": _O("subtract the number of experts; for selection alone", OURS),
    },
    "cki": {
        "kind": _O("local view, global view, both, or the recommender's rule", PAPER),
        "a": _O("weight of the global view", RELEASE, (0.0, 1.0)),
        "c": _O("steepness of the global view", RELEASE, (0.0, 1e6), (1.0, 1e3), log=True),
        "bins": _O("bins of the histogram whose entropy is the global view", RELEASE, (2, 4096), (8, 256), log=True),
        "gain": _O("steepness of the local view, for the learned map", OURS, (0.0, 20.0), (0.1, 20.0), log=True),
        "bias": _O("offset of the local view, for the learned map", OURS, (-20.0, 20.0), (-3.0, 3.0)),
        "sign": _O("whether the larger or the smaller entropy is preferred", RELEASE, numbers=(1.0, -1.0)),
        "standardise": _O("disagreement over each expert's entries, or over those of all", OURS),
        "order": _O("which of two experts is the first one", OURS),
        "only": _O("groups that are spliced, joined by '+': head, last, any key; '' for all", RELEASE),
        "rest": _O("whose weights the other tensors are", OURS),
    },
    "cki_learned": {
        "kind": _O("local view, both, or the recommender's rule", PAPER),
        "a": _O("weight of the global view", RELEASE, (0.0, 1.0)),
        "c": _O("steepness of the global view", RELEASE, (0.0, 1e6), (1.0, 1e3), log=True),
        "bins": _O("bins of the histogram whose entropy is the global view", RELEASE, (2, 4096), (8, 256), log=True),
        "gain": _O("steepness of the local view", RELEASE, (0.0, 20.0), (0.1, 20.0), log=True),
        "sign": _O("whether the larger or the smaller entropy is preferred", RELEASE, numbers=(1.0, -1.0)),
        "order": _O("which of two experts is the first one", OURS),
        "only": _O("groups that are spliced, joined by '+': head, last, any key; '' for all", RELEASE),
        "rest": _O("whose weights the other tensors are", OURS),
        "map": _O("a matrix over the inputs, a number per input, or one number", RELEASE),
        "inputs": _O("disagreement standardised within the tensor, or as it is", OURS),
        "start": _O("the map that leaves disagreement as it is, or a drawn one", OURS),
        "epochs": _O("most passes over the fit rows", RELEASE, (0, 1000), (1, 30), log=True),
        "step_size": _O("Adam's step size", RELEASE, (1e-7, 1.0), (1e-3, 1e-1), log=True),
        "batch_rows": _O("rows of each task in a step", OURS, (1, 10000), (4, 64), log=True),
    },
    "fisher": {
        "power": _O("exponent of the Fisher information; 0: every parameter alike", OURS, (0.0, 4.0), (0.0, 1.5)),
        "floor": _O("added to the Fisher information", RELEASE, (0.0, 1.0), (1e-12, 1e-3), log=True),
        "normalise": _O("divide by the norm over the tensor", RELEASE),
        "at": _O("measured at the expert, or at the base plus its scaled delta", PAPER),
        "kind": _O("of the right answers, or of all answers by their probability (the true one)", PAPER),
        "anchors": _O("distance of the coefficients it is interpolated between; 0: none", OURS, (0.0, 2.0), (0.0, 0.5)),
    },
    "apl": {
        "normalise": _O("divide by the norms of gradient and delta", OURS),
    },
    "causal_effect": {
        "form": _O("first order, a part put into the base, or a part taken out of the expert", PAPER),
        "partition": _O("what is one part", PAPER),
        "average": _O("change of the mean loss, or mean of the rows' |change|", OURS),
    },
    "trust_region": {
        "zero_shot": _O("deltas in place of gradients: no data", RELEASE),
    },
    "external": {
        "name": _O("the statistic that holds the scores", OURS),
    },
}  # fmt: skip

OPERATOR_OPTIONS: About = {
    "passthrough": {
        "expert": _O("the expert; without it the base", MERGEKIT),
    },
    "slerp": {
        "t": _O("place on the arc; none: from the coefficients", MERGEKIT, (0.0, 1.0)),
        "space": _SPACE,
    },
    "nuslerp": {
        "axis": _O("what is turned as one vector", MERGEKIT),
        "space": _SPACE,
    },
    "multislerp": {
        "space": _SPACE,
        "base_weight": _BASE_WEIGHT,
    },
    "karcher": {
        "space": _SPACE,
        "steps": _O("iterations at most", MERGEKIT, (1, 1000), (1, 30), log=True),
        "tolerance": _O("change at which the iteration ends", MERGEKIT, (0.0, 1.0), (1e-9, 1e-2), log=True),
        "base_weight": _BASE_WEIGHT,
    },
    "model_stock": {
        "scope": _O("what has one angle: a tensor, a block, a row", PAPER),
        "clamp": _O("cosines below 0 count as 0", OURS),
        "count": _O("experts that changed the tensor count, or all", MERGEKIT),
    },
    "nearswap": {
        "t": _O("distance up to which the expert's value counts whole", MERGEKIT, (1e-9, 10.0), (1e-5, 1e-2), log=True),
    },
    "arcee_fusion": {
        "multiple": _O("least distance above the median, in quartile distances", MERGEKIT, (0.0, 100.0), (0.0, 3.0)),
    },
    "regmean": {
        "alpha": _O("factor of the Gram matrices' off-diagonals", PAPER, (0.0, 1.0)),
        "ridge": _O("share of the mean diagonal that is added to it", OURS, (0.0, 10.0), (1e-8, 1e-1), log=True),
    },
    "regmean_parts": {
        "weights": _O("what an expert's share is divided by: its change of outputs, its inputs, or nothing", OURS),
        "ridge": _O("share of the mean diagonal that pulls to one coefficient per expert", OURS, (0.0, 10.0),
                    (1e-3, 1e-1), log=True),
        "gain": _O("exponent of the factor that makes the mean gain along the experts' changes one", OURS, (0.0, 1.0)),
        "prompts": _O("most prompts of a task", OURS, (1, 100_000), (8, 256), log=True),
    },
    "tsv_m": {
        "rank_share": _O("kept ranks x number of experts / smaller side", PAPER, (1e-3, 100.0), (0.1, 1.5)),
        "embeddings": _EMBEDDINGS,
    },
    "iso_c": {
        "power": _O("exponent of the singular values; 0: all equal, 1: unchanged", OURS, (0.0, 2.0), (0.0, 1.0)),
        "tolerance": _TOLERANCE,
        "embeddings": _EMBEDDINGS,
    },
    "iso_cts": {
        "common": _O("share of the directions that are common", PAPER, (0.0, 1.0)),
        "tolerance": _TOLERANCE,
        "embeddings": _EMBEDDINGS,
    },
    "wudi": {
        "solver": _O("Adam as released, or the stationary point", RELEASE),
        "steps": _O("steps of Adam", PAPER, (0, 10_000), (10, 1000), log=True),
        "lr": _O("step size of Adam", PAPER, (0.0, 10.0), (1e-6, 1e-3), log=True),
        "relative_lr": _O("step size as a multiple of the root mean square of the summed deltas", OURS),
        "ridge": _O("pull of the closed solution to the sum", OURS, (0.0, 100.0), (1e-4, 1.0), log=True),
        "norm": _O("divide by the norm of a delta or by its square", RELEASE),
        "embeddings": _EMBEDDINGS,
    },
    "copa": {
        "strength": _O("factor of the product", PAPER, (0.0, 100.0), (0.5, 4.0)),
        "prune": _O("the factors that lose their small entries", OURS),
        "rescale": _O("make up for what A lost, rank by rank", PAPER),
        "clip": _O("the scales below this quantile are raised to it", RELEASE, (0.0, 0.99), (0.0, 0.9)),
        "normalise": _O("divide the scales by their sum over the experts", PAPER),
        "cross": _O("multiply by the sum of all A, or by each expert's own", OURS),
        "gauge": _O("the pair that stands for a product", OURS),
    },
    "core": {
        "rule": _O("what merges the cores", PAPER),
        "rank_share": _O("kept ranks x number of experts / width of the core", PAPER, (1e-3, 100.0), (0.1, 1.5)),
        "power": _O("exponent of the singular values (iso_c); 0: all equal", OURS, (0.0, 2.0), (0.0, 1.0)),
        "common": _O("share of the directions that are common (iso_cts)", PAPER, (0.0, 1.0)),
    },
}  # fmt: skip

POST_OPTIONS: About = {
    "svc": {
        "alpha": _O("least count of a direction, which bounds growth", RELEASE, (1e-3, 10.0), (0.02, 1.0), log=True),
        "cap": _O("largest growth of a direction; none: 1 / alpha", OURS, (1e-3, 1e3), (1.0, 10.0), log=True),
    },
    "iso_spectrum": {
        "power": _O("exponent of the singular values; 0: all equal, 1: unchanged", OURS, (0.0, 2.0), (0.0, 1.0)),
        "tolerance": _TOLERANCE,
    },
}  # fmt: skip

STAGE_OPTIONS: About = {
    "winsorise": {
        "winsorise": _O("share of |delta| clipped at either end", PAPER, (0.0, 0.49), (0.0, 0.05)),
        "winsorise_limits": _O("the values at which it is clipped", RELEASE),
    },
    "allocate": {
        "allocate": _O("measure by which densities and coefficients spread; none: not at all", PAPER),
        "spread": _O("density of the most important tensor minus that of the least", PAPER, (-2.0, 2.0), (0.0, 0.6)),
        "floor": _O("smallest density", OURS, (1e-6, 1.0), (1e-2, 0.3), log=True),
        "coefficient_power": _O("exponent of the importance in the coefficients", PAPER, (0.0, 4.0), (0.0, 2.0)),
    },
    "select": {
        "scope": _O("what is ranked together", PAPER),
        "threshold": _O("scores above it are kept", PAPER, (-1e6, 1e6), (1e-6, 1.0), log=True),
        "gamma": _O("share of the largest scores that is dropped", PAPER, (0.0, 0.99), (0.0, 0.1)),
        "epsilon": _O("difference of the keep probabilities from the density, at most", PAPER, (0.0, 0.49), (0.0, 0.3)),
        "block_size": _O("consecutive entries that are ranked together", PAPER, (2, 4096), (2, 16), log=True),
        "gate": _O("experts that must select a parameter for any to keep it; 0: no gate", PAPER, (0, 100), (0, 3)),
        "exclusive": _O("no expert keeps what an earlier one kept", PAPER),
        "nonzero": _O("densities count only scores above 0", RELEASE),
        "rounding": _O("how density x n becomes a whole number", MERGEKIT),
        "vectors": _O("norm gains and biases are selected from, too", OURS),
    },
    "rescale": {
        "rescale": _O("how survivors are scaled", PAPER),
    },
    "resolve": {
        "weighted": _O("coefficients vote, too", MERGEKIT),
        "tie": _O("the sign of an exact tie", RELEASE),
    },
    "splice": {
        "temperature": _O("of the softmax", OURS, (1e-3, 1e3), (1e-2, 10.0), log=True),
        "ties": _O("the expert that wins an exact tie", OURS),
        "unique_boost": _O("how much entries of one expert alone are raised (RAM+)", PAPER, (-10.0, 10.0), (0.0, 1.0)),
        "boost_cap": _O("largest ratio of shared to unique entries that counts", PAPER, (0.0, 100.0), (0.0, 1.0)),
    },
    "scale": {
        "scale": _O("factor of the combined delta", PAPER, (-10.0, 10.0), (0.1, 3.0), log=True),
    },
}  # fmt: skip
"""Fields of a recipe's stages, by stage; ``merge_search.rules.stages`` has their defaults."""

TRANSFORM_OPTIONS: About = {
    "stack": {
        "layers": _O("the old layer of every new one, as in '0 1 1 2'; '' for all of them once", MERGEKIT),
    },
    "mal": {
        "blocks": _O("the expert's block for each of the base's, - for none, as in '0 1 - 3'; '' spreads them", PAPER),
        "passes": _O("most rounds over all permutations", PAPER, (1, 100), (1, 4)),
        "same_shape": _O("align experts that have the base's shapes, too", OURS),
    },
    "smile": {
        "rank": _O("singular triples of each delta; 0: no mixture", PAPER, (0, 65536), (4, 256), log=True),
        "gate_rank": _O("right singular vectors of each expert that route", PAPER, (1, 65536), (1, 64), log=True),
        "top_k": _O("experts that answer a token", PAPER, (1, 64), (1, 2)),
        "modules": _O("linear layers of the blocks that become mixtures", OURS),
        "rest": _O("everything else: the base's, or the average of the experts", RELEASE),
        "shared": _O("what all tokens see in a mixture: the base's weight, or the average", OURS),
        "route": _O("whose right singular vectors route", RELEASE),
        "temperature": _O("of the softmax over the chosen experts", OURS, (1e-6, 1e6), (0.1, 10.0), log=True),
    },
    "alone": {
        "model": _O("the expert, or base", OURS),
    },
}  # fmt: skip
