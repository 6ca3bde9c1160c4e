"""mergekit's methods as recipes. Defaults were measured on mergekit 0.1.5.

Each method is one `Method`: the parameters that it reads, and a function that makes the fields of its recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CANCEL", "EPS", "IGNORED", "METHODS", "PER_MODEL", "Method", "Numbers", "cancel"]

EPS = 1e-8
"""mergekit's floor of norms in multislerp."""
CANCEL = (
    "weights of some models must not sum to 0 where signs are elected and normalize is on: mergekit then leaves out "
    "the division, we the entry"
)
PER_MODEL = {"gamma", "epsilon"}
"""Numbers that mergekit reads at each model."""

IGNORED = {
    "int8_mask": "masks take no memory here",
}
"""Parameters that change no number of the result."""


@dataclass(frozen=True)
class Numbers:
    """The parameters of one file by name, with defaults filled in."""

    flags: Mapping[str, bool]
    numbers: Mapping[str, float]
    is_dense: bool
    """Every density is 1."""


def _nothing(_: Numbers) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Method:
    """One merge method.

    Attributes:
        needs_base: It merges deltas and needs ``base_model``; None: it works with and without.
        experts: Smallest and largest number of models beside the base.
        weight: Models have a ``weight``, which must be given.
        normalize: Default of ``normalize``; None: the method has no such parameter.
        elects: Signs are elected, and ``normalize`` divides by the weights of the models that agree.
        sparse: Models have a ``density``.
        has_lambda: ``lambda`` scales the combined delta.
        flags: Other switches and their defaults, one value for all tensors.
        numbers: Other numbers and their defaults (None: must be given), one value for all tensors.
        settings: Makes recipe fields of a file's parameters.
    """

    needs_base: bool | None
    experts: tuple[int, int | None] = (1, None)
    weight: bool = False
    normalize: bool | None = None
    elects: bool = False
    sparse: bool = False
    has_lambda: bool = False
    flags: Mapping[str, bool] = field(default_factory=dict)
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    settings: Callable[[Numbers], dict[str, Any]] = _nothing


_ELECTED = {"kind": "sum", "weighted": True, "tie": "plus"}
_MAGNITUDE = {"measure": "magnitude"}


def _delta_method(select: Mapping[str, Any], *, elect: bool) -> Callable[[Numbers], dict[str, Any]]:
    def settings(given: Numbers) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if select and not given.is_dense:
            made["select"] = {**select, **given.numbers, "vectors": True}
            if given.flags.get("rescale"):
                made["rescale"] = {"kind": "match_l1"}
        if elect:
            made["resolve"] = _ELECTED
            if given.flags["normalize"]:
                made["splice"] = {"kind": "coefficient"}
        return made

    return settings


def _deltas(
    select: Mapping[str, Any], *, elect: bool, normalize: bool, rescale: bool = False, **numbers: float
) -> Method:
    return Method(
        True, weight=True, normalize=normalize, elects=elect, sparse=bool(select), has_lambda=True,
        flags={"rescale": rescale}, numbers=numbers, settings=_delta_method(select, elect=elect),
    )  # fmt: skip


_TOP = {"kind": "top_k", "rounding": "down"}
_BAND = {"kind": "band", "rounding": "down"}
_RANDOM = {"kind": "bernoulli"}
_RANKED = {"kind": "rank_probability", "scope": "row"}


def _sce(given: Numbers) -> dict[str, Any]:
    made: dict[str, Any] = {
        "resolve": {"kind": "sum", "tie": "plus"},
        "splice": {"kind": "score", "score": {"measure": "energy", "options": {"floor": 1e-6}}},
    }
    if not given.is_dense:
        made["assess"] = {"measure": "variance"}
        made["select"] = {"kind": "top_k", "nonzero": True, "vectors": True, "rounding": "down"}
    return made


def _operator(name: str, **options: Any) -> dict[str, Any]:
    return {"operator": {"name": name, "options": options} if options else {"name": name}}


def _nuslerp(given: Numbers) -> dict[str, Any]:
    # Measured: row-wise means vectors along the first axis, one per column of the stored matrix.
    axis = "tensor" if given.flags["nuslerp_flatten"] else "column" if given.flags["nuslerp_row_wise"] else "row"
    return _operator("nuslerp", **({} if axis == "tensor" else {"axis": axis}))


def _karcher(given: Numbers) -> dict[str, Any]:
    steps, tolerance = int(given.numbers["max_iter"]), given.numbers["tol"]
    options: dict[str, Any] = {"base_weight": 1.0}
    options |= ({} if steps == 10 else {"steps": steps}) | ({} if tolerance == 1e-5 else {"tolerance": tolerance})
    return _operator("karcher", **options)


def _model_stock(given: Numbers) -> dict[str, Any]:
    scope = {"scope": "row"} if given.flags["filter_wise"] else {}
    return _operator("model_stock", clamp=False, count="all", **scope)


METHODS: Mapping[str, Method] = {
    "linear": Method(None, (0, None), weight=True, normalize=True),
    "task_arithmetic": _deltas({}, elect=False, normalize=False),
    "ties": _deltas(_TOP, elect=True, normalize=True),
    "dare_linear": _deltas(_RANDOM, elect=False, normalize=False, rescale=True),
    "dare_ties": _deltas(_RANDOM, elect=True, normalize=False, rescale=True),
    "della": _deltas(_RANKED, elect=True, normalize=True, rescale=True, epsilon=0.15),
    "della_linear": _deltas(_RANKED, elect=False, normalize=False, rescale=True, epsilon=0.15),
    "breadcrumbs": _deltas(_BAND, elect=False, normalize=False, gamma=0.01),
    "breadcrumbs_ties": _deltas(_BAND, elect=True, normalize=False, gamma=0.01),
    "slerp": Method(True, (1, 1), settings=lambda _: _operator("slerp")),
    "nuslerp": Method(
        None, (2, 2), weight=True, flags={"nuslerp_flatten": True, "nuslerp_row_wise": False}, settings=_nuslerp,
    ),
    "multislerp": Method(
        None, (2, None), weight=True, flags={"normalize_weights": True}, numbers={"eps": EPS},
        settings=lambda _: _operator("multislerp"),
    ),
    "karcher": Method(None, (0, None), numbers={"max_iter": 10.0, "tol": 1e-5}, settings=_karcher),
    "model_stock": Method(True, (2, None), flags={"filter_wise": False}, settings=_model_stock),
    "sce": Method(True, (1, None), settings=_sce),
    "nearswap": Method(
        True, (1, 1), numbers={"t": None}, settings=lambda given: _operator("nearswap", t=given.numbers["t"]),
    ),
    "arcee_fusion": Method(True, (1, 1), settings=lambda _: _operator("arcee_fusion")),
    "passthrough": Method(None, (1, 1)),
}  # fmt: skip
"""mergekit's methods that recipes can say, by mergekit's name."""


def cancel(weights: Sequence[float]) -> bool:
    """Whether some of the weights sum to zero."""
    sums = {0.0}
    for w in weights:
        more = {s + w for s in sums}
        if any(abs(s) < 1e-8 for s in more) and w != 0:
            return True
        sums |= more
    return False
