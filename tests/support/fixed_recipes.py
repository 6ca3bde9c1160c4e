"""Recipes and mergekit files over the models of `fixed_models`, for tests that compare with an earlier version.

They name every preset and the points of its grid, the rules of every stage, every measure, every operator and post rule
with a few of its options, and every method of mergekit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fixed_models import ADAPTER, EXPERTS, map_of

from merge_search.presets import PRESETS, preset
from merge_search.recipe import Models, Recipe

MODELS = Models(base="base", experts={e: e for e in EXPERTS})
NUMBERS = {"a": 0.75, "b": 0.5, "c": -0.25}
DENSITIES = {"a": 0.5, "b": 0.25, "c": 0.625}
MAGNITUDE = {"assess": {"measure": "magnitude"}}
BY_GROUP = {"*": 0.5, "attention": 0.25, "block.1": 0.75, "block.0.mlp": 1.25, "model.norm.weight": -0.5}


def _score(measure: str, **options: Any) -> dict[str, Any]:
    return {"measure": measure, "options": options}


STAGES: dict[str, dict[str, Any]] = {
    # what is kept
    "top_k of a row": {"select": {"kind": "top_k", "scope": "row"}},
    "top_k of the model": {"select": {"kind": "top_k", "scope": "model"}},
    "top_k of vectors, too": {"select": {"kind": "top_k", "vectors": True, "rounding": "down"}},
    "top_k of the model with vectors": {"select": {"kind": "top_k", "scope": "model", "vectors": True}},
    "top_k, one expert after the other": {"select": {"kind": "top_k", "exclusive": True}},
    "top_k, where two agree": {"select": {"kind": "top_k", "gate": 2}},
    "top_k of what is not zero": {"select": {"kind": "top_k", "nonzero": True}},
    "threshold": {"select": {"kind": "threshold", "threshold": 0.01}},
    "band": {"select": {"kind": "band", "gamma": 0.05}},
    "band of a row": {"select": {"kind": "band", "gamma": 0.1, "scope": "row"}},
    "band of the model": {"select": {"kind": "band", "gamma": 0.02, "scope": "model", "rounding": "down"}},
    "bernoulli": {"select": {"kind": "bernoulli", "vectors": True}, "seed": 3},
    "rank_probability of a row": {"select": {"kind": "rank_probability", "scope": "row", "epsilon": 0.1}},
    "rank_probability": {
        "select": {"kind": "rank_probability", "epsilon": 0.2}, "rescale": {"kind": "inverse_probability"},
    },
    "proportional": {"select": {"kind": "proportional"}, "rescale": {"kind": "inverse_probability"}},
    "soft_threshold": {"select": {"kind": "soft_threshold"}},
    "soft_threshold of the model": {"select": {"kind": "soft_threshold", "scope": "model"}},
    "n_m": {"select": {"kind": "n_m", "block_size": 4}},
    "n_m of long blocks": {"select": {"kind": "n_m", "block_size": 20, "exclusive": True}},
    "mass": {"select": {"kind": "mass"}},
    # how it is scaled
    "inverse_density": {"select": {"kind": "top_k"}, "rescale": {"kind": "inverse_density"}},
    "match_l1": {"select": {"kind": "bernoulli"}, "rescale": {"kind": "match_l1"}},
    "match_l2": {"select": {"kind": "top_k"}, "rescale": {"kind": "match_l2"}},
    # signs
    "elected by the sum": {"resolve": {"kind": "sum", "tie": "drop"}},
    "elected by the weighted sum": {"resolve": {"kind": "sum", "weighted": True, "tie": "minus"}},
    "elected by count": {"resolve": {"kind": "count", "tie": "majority"}, "splice": {"kind": "count"}},
    "elected by weighted count": {"resolve": {"kind": "count", "weighted": True}, "splice": {"kind": "coefficient"}},
    "elected among the kept": {
        "select": {"kind": "top_k"}, "resolve": {"kind": "sum", "tie": "majority"}, "splice": {"kind": "mask"},
    },
    # how it is combined
    "count": {"splice": {"kind": "count"}},
    "mask": {"select": {"kind": "soft_threshold"}, "splice": {"kind": "mask"}},
    "coefficient": {"splice": {"kind": "coefficient"}},
    "score": {"select": {"kind": "bernoulli"}, "resolve": {"kind": "sum"}, "splice": {"kind": "score"}},
    "softmax": {"splice": {"kind": "softmax", "temperature": 0.5}},
    "softmax of the kept": {"select": {"kind": "top_k"}, "splice": {"kind": "softmax"}},
    "argmax": {"splice": {"kind": "argmax", "ties": "last"}},
    "argmax of the kept": {"select": {"kind": "top_k"}, "resolve": {"kind": "sum"}, "splice": {"kind": "argmax"}},
    "unique_boost": {"select": {"kind": "top_k"}, "splice": {"kind": "count", "unique_boost": 0.5, "boost_cap": 0.3}},
    # measures
    "ones": {"assess": _score("ones"), "select": {"kind": "top_k"}},
    "rank": {"assess": _score("rank"), "select": {"kind": "soft_threshold"}},
    "variance": {"assess": _score("variance"), "select": {"kind": "top_k", "nonzero": True, "vectors": True}},
    "energy": {"select": {"kind": "top_k"}, "splice": {"kind": "score", "score": _score("energy", floor=1e-6)}},
    "pcb vision": {
        "assess": _score("pcb", inter="vision"), "select": {"kind": "soft_threshold"}, "splice": {"kind": "mask"},
    },
    "pcb es": {"assess": _score("pcb", inter="es", temperature=2.0), "select": {"kind": "top_k"}},
    "pcb_paper": {"assess": _score("pcb_paper"), "select": {"kind": "top_k"}},
    "tall_ratio": {"assess": _score("tall_ratio"), "select": {"kind": "threshold", "threshold": 0.6}},
    "cki local": {"splice": {"kind": "score", "score": _score("cki", kind="local", gain=3.0, bias=0.5)}},
    "cki global": {"splice": {"kind": "score", "score": _score("cki", kind="global", bins=7, sign=-1.0)}},
    "random": {"assess": _score("random"), "select": {"kind": "top_k"}, "seed": 11},
    "fisher": {"splice": {"kind": "score", "score": _score("fisher")}},
    "gradient_product": {"assess": _score("gradient_product"), "select": {"kind": "top_k"}},
    "activation_norm": {"assess": _score("activation_norm"), "select": {"kind": "top_k", "scope": "row"}},
    "apl as it is": {
        "allocate": {"kind": "importance", "spread": 0.3, "options": {"normalise": False}}, "select": {"kind": "top_k"},
    },
    "trust_region without data": {
        "assess": _score("trust_region", zero_shot=True), "select": {"kind": "band", "gamma": 0.05},
    },
    "external": {"assess": _score("external"), "splice": {"kind": "score"}},
    # numbers
    "importance by size": {
        "allocate": {
            "kind": "importance", "measure": "magnitude", "spread": 0.5, "floor": 0.05, "coefficient_power": 1.0,
        },
        "select": {"kind": "top_k"},
    },
    "winsorised": {"winsorise": 0.05, "select": {"kind": "top_k"}},
    "winsorised over the model": {"winsorise": 0.02, "select": {"kind": "top_k", "scope": "model"}},
    "numbers by group": {
        "select": {"kind": "bernoulli"}, "scale": {"*": 1.5, "norm": 0.5, "block.0": 0.75},
        "coefficients": {"a": BY_GROUP, "b": 0.5, "c": {"*": 0.0, "embedding": 1.0}},
        "densities": {"a": {"*": 0.5, "attention": 0.25}, "b": 0.375, "c": {"*": 1.0, "block.1": 0.125}},
    },
    "as float16": {"dtype": "float16"},
    "as bfloat16": {"dtype": "bfloat16", "select": {"kind": "top_k"}},
    "as float32": {"dtype": "float32", "select": {"kind": "top_k"}},
}  # fmt: skip
"""What differs from a sum of magnitude-assessed deltas with `NUMBERS` and `DENSITIES`."""

OPERATORS: dict[str, tuple[int, dict[str, Any]]] = {
    "passthrough": (3, {"expert": "b"}),
    "slerp of two": (2, {}),
    "slerp from the base": (1, {"t": 0.3, "space": "delta"}),
    "nuslerp": (2, {}),
    "nuslerp by row": (2, {"axis": "row"}),
    "nuslerp by column": (1, {"axis": "column", "space": "weights"}),
    "multislerp": (3, {"space": "weights", "base_weight": 0.5}),
    "karcher": (3, {"space": "delta", "steps": 3}),
    "model_stock": (3, {"scope": "layer", "clamp": False}),
    "model_stock by row": (3, {"scope": "row", "count": "all"}),
    "nearswap": (3, {"t": 0.01}),
    "arcee_fusion": (3, {"multiple": 0.5}),
    "regmean": (3, {"alpha": 0.5}),
    "tsv_m": (3, {"rank_share": 0.5}),
    "iso_c": (3, {"power": 0.5}),
    "iso_cts": (3, {"common": 0.5, "embeddings": False}),
    "wudi": (3, {"steps": 20, "relative_lr": True, "lr": 0.1}),
    "wudi, solved": (3, {"solver": "closed", "norm": "plain"}),
}
"""Name and remark -> number of experts and options."""
POSTS: dict[str, dict[str, Any]] = {
    "svc": {"alpha": 0.5},
    "svc, bounded": {"cap": 1.0},
    "iso_spectrum": {"power": 0.5},
    "norm_match": {},
}
_GEOMETRY = (
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "regmean",
    "regmean_parts",
    "tsv_m",
    "iso_c",
    "iso_cts",
    "wudi",
    "copa",
    "core",
)


def depends_on_the_machine(case: Recipe | dict[str, Any]) -> bool:
    """Whether a merge sums long vectors in float32, multiplies or decomposes matrices: libraries round these their way.

    Args:
        case: A recipe, or mergekit's file.
    """
    if isinstance(case, dict):
        return case["merge_method"] in _GEOMETRY
    operator = "" if case.operator is None else case.operator.name
    measures = {case.assess.measure, (case.splice.score or case.assess).measure}
    return operator in _GEOMETRY or bool(case.post) or "pcb_paper" in measures


def recipes() -> dict[str, Recipe]:
    """Every recipe over `VARIED` by name; places of models are relative to the file that a recipe is written to."""
    named = dict(_presets())
    common = {"models": MODELS, "coefficients": NUMBERS, "densities": DENSITIES, "scale": 0.875, **MAGNITUDE}
    for name, settings in STAGES.items():
        named[f"stage: {name}"] = Recipe.from_dict({**common, **settings})
    maps = {e: map_of(e)[0] for e in EXPERTS}
    by_row = {"models": MODELS, "coefficients": NUMBERS, "maps": maps, "densities": DENSITIES}
    named["map: sum"] = Recipe.from_dict(by_row)
    named["map: score of the kept"] = Recipe.from_dict(
        {**by_row, **MAGNITUDE, "select": {"kind": "top_k"}, "splice": {"kind": "score"}}
    )
    named["map: operator"] = Recipe.from_dict({**by_row, "operator": {"name": "nearswap", "options": {"t": 0.02}}})
    with_adapter = Models(base="base", experts={"a": "a", ADAPTER: ADAPTER})
    named["adapter: task_arithmetic"] = preset("task_arithmetic", with_adapter)
    named["adapter: ties"] = preset("ties", with_adapter, densities=0.5)
    for name, (n_experts, options) in OPERATORS.items():
        operator = {"name": name.replace(",", "").split()[0], "options": options}
        named[f"operator: {name}"] = Recipe.from_dict(
            {"models": _first(n_experts), "operator": operator, "coefficients": _positive(n_experts), "scale": 0.875}
        )
    for name, options in POSTS.items():
        rule = {"name": name.replace(",", "").split()[0], "options": options}
        named[f"post: {name}"] = Recipe.from_dict(
            {"models": MODELS, "coefficients": NUMBERS, "post": [rule], "scale": 0.875}
        )
    after = {"operator": {"name": "nearswap"}, "post": [{"name": "svc"}, {"name": "norm_match"}]}
    named["post: two after an operator"] = Recipe.from_dict({"models": MODELS, "coefficients": NUMBERS, **after})
    return named


def _cki(splice: str, **options: Any) -> dict[str, Any]:
    return {"splice": {"kind": splice, "score": {"measure": "cki", "options": options}}}


EARLIER: dict[str, dict[str, Any]] = {
    "cki_hard": _cki("argmax"),
    "cki_recommender": _cki("softmax", kind="recommender"),
    "cki_soft": _cki("score"),
    "pcb": {"winsorise_limits": "interpolated"},
    "pcb_paper": {
        "assess": {"measure": "pcb_paper"}, "select": {"kind": "top_k", "scope": "model"}, "splice": {"kind": "score"},
    },
}  # fmt: skip
"""Settings that presets had in version 0.1.0. Their formulas were corrected since; recipes of then keep their bits."""

EARLIER_GRIDS: dict[str, tuple[dict[str, Any], ...]] = {
    "cki_hard": ({}, {"settings": _cki("argmax", sign=-1.0)}),
    "cki_soft": ({}, {"settings": _cki("score", sign=-1.0)}),
}
"""Grids of the same version, where they are others now."""


NEWER = ("apl_paper", "apl_exact", "cki_learned", "cki_learned_hard")
"""Presets that 0.1.0 had not, whose measurements the fixed files have not."""


def _presets() -> Iterator[tuple[str, Recipe]]:
    for name, p in PRESETS.items():
        if p.fit is not None or name in NEWER:  # a fit begins at plain or trimmed task arithmetic
            continue
        earlier = EARLIER.get(name, {})
        adapters = Models(base="base", experts={ADAPTER: ADAPTER})
        models = adapters if p.needs_factors else _first(p.experts[1] or len(EXPERTS))
        more: dict[str, Any] = {"expert": "a"} if name == "expert" else {}
        if name == "df_merge":  # its Fisher information is that at the coefficients
            more = {"coefficients": 0.5}
        default = preset(name, models, **more, **earlier)
        yield f"preset: {name}", default
        grid = () if name == "df_merge" or depends_on_the_machine(default) else EARLIER_GRIDS.get(name, p.grid)
        for i, point in enumerate(grid):
            values = {{"coefficient": "coefficients", "density": "densities"}.get(k, k): v for k, v in point.items()}
            settings = values.pop("settings", {})
            if point:
                yield f"preset: {name}, grid {i}", preset(name, models, **values, **{**earlier, **settings})


def _first(n: int) -> Models:
    return Models(base="base", experts={e: e for e in EXPERTS[:n]})


def _positive(n: int) -> dict[str, float]:
    return {e: abs(NUMBERS[e]) for e in EXPERTS[:n]}


# ------------------------------------------------------------------------------------------------ mergekit's files


def _model(name: str, **parameters: Any) -> dict[str, Any]:
    return {"model": name, **({"parameters": parameters} if parameters else {})}


def _deltas(method: str, *models: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "base_model": "base", "models": list(models), **more}


def _slices(*parts: tuple[list[int], list[str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": m, "layer_range": r} for m in models], **more} for r, models, more in parts]


_FILTERS = [{"filter": "self_attn", "value": [1, 3]}, {"filter": "layers.3.", "value": 2}, {"value": 0.5}]
_A, _B, _C = _model("a", weight=0.5), _model("b", weight=0.75), _model("c", weight=-0.25)
_PLAIN = [_model("a"), _model("b"), _model("c")]
_SPARSE = (_model("a", weight=1, density=[0.25, 0.75]), _model("b", weight=0.5, density=0.5))
MERGEKIT: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": [_model("a", weight=1), _model("b", weight=[0, 3])]},
    "linear, not normalised": {
        "merge_method": "linear", "models": [_model("a", weight=0.25), _model("b", weight=0.75)],
        "parameters": {"normalize": False},
    },
    "task_arithmetic": _deltas("task_arithmetic", _A, _B, _C, parameters={"lambda": [1, 0.5]}),
    "task_arithmetic, gradients": _deltas("task_arithmetic", _model("a", weight=[0, 1, 5]), _model("b", weight="0.5")),
    "task_arithmetic, filters": _deltas(
        "task_arithmetic", _model("a", weight=_FILTERS), _model("b"), parameters={"weight": [1, 2]},
    ),
    "task_arithmetic, slices": {
        "merge_method": "task_arithmetic", "base_model": "base", "slices": _slices(
            ([0, 1], ["base", "a"], {"parameters": {"weight": [3, 4]}}),
            ([1, 5], ["base", "a"], {"parameters": {"weight": [0.5, 0.25, 0.75]}}),
        ),
    },
    "task_arithmetic, out_dtype": _deltas("task_arithmetic", _A, dtype="float32", out_dtype="bfloat16"),
    "ties": _deltas("ties", *_SPARSE, parameters={"int8_mask": True}),
    "ties, not normalised": _deltas("ties", *_SPARSE, _C, parameters={"normalize": False, "lambda": 0.75}),
    "dare_linear": _deltas("dare_linear", *_SPARSE),
    "dare_linear, not rescaled": _deltas("dare_linear", *_SPARSE, parameters={"rescale": False}),
    "dare_ties": _deltas("dare_ties", *_SPARSE, parameters={"normalize": True}),
    "della": _deltas("della", *_SPARSE, parameters={"epsilon": 0.125}),
    "della_linear": _deltas("della_linear", _model("a", weight=1, density=0.5, epsilon=0.2)),
    "della_linear, its own epsilon": _deltas("della_linear", *_SPARSE),
    "breadcrumbs": _deltas("breadcrumbs", _model("a", weight=1, density=0.5, gamma=0.1), parameters={"rescale": True}),
    "breadcrumbs_ties": _deltas("breadcrumbs_ties", *_SPARSE),
    "model_stock": _deltas("model_stock", _model("a"), _model("b")),
    "model_stock, filter-wise": _deltas("model_stock", *_PLAIN, parameters={"filter_wise": True}),
    "sce": _deltas("sce", *_PLAIN, parameters={"select_topk": 0.25}),
    "nearswap": _deltas("nearswap", _model("a"), parameters={"t": 0.01}),
    "arcee_fusion": _deltas("arcee_fusion", _model("a")),
    "passthrough": {"merge_method": "passthrough", "slices": _slices(([0, 2], ["a"], {}), ([2, 5], ["b"], {}))},
    "slerp": _deltas("slerp", _model("a"), parameters={"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.2}]}),
    "nuslerp": {"merge_method": "nuslerp", "models": [_model("a", weight=1), _model("b", weight=3)]},
    "nuslerp, row-wise": _deltas("nuslerp", _A, _B, parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "multislerp": {"merge_method": "multislerp", "models": [_A, _B, _model("c", weight=2)]},
    "karcher": {"merge_method": "karcher", "models": _PLAIN, "parameters": {"max_iter": 5}},
}  # fmt: skip
"""mergekit's files over `LLAMA`'s models by name."""
