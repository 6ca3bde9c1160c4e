"""A recipe: the complete description of one merge, as a value.

A recipe names one choice per stage of the pipeline, with coefficients and densities per group:

    assess     a_i     selection score of every parameter of expert i       `Assess`
    allocate   d_i     density per expert and group                         `densities`, `Allocate`
    select     m_i     keep mask from a_i and d_i                           `Select`
    rescale    rho_i   how survivors are scaled                             `Rescale`
    resolve    c_i     sign conflicts                                       `Resolve`
    splice     omega_i coefficients and mixing                              `coefficients`, `Splice`
    combine    theta = theta_0 + scale * post( sum_i omega_i rho_i m_i c_i tau_i )

or, where a method acts on whole matrices, one tensor operator in place of the stages. A transform makes other models
from the recipe's before all of this.

Recipes are frozen, compared by content and free of torch. They have one canonical JSON form, whose sha256 is the
fingerprint. A colleague makes the same model from the file that `Recipe.to_json` writes.

    >>> recipe = Recipe.from_dict({"models": {"base": "b", "experts": {"maths": "m"}}, "select": {"kind": "top_k"}})
    >>> recipe.select.kind, recipe.densities
    ('top_k', {})
    >>> recipe.to_json()
    '{"format":1,"models":{"base":"b","experts":[["maths","m"]],"hashes":{}},"select":{"kind":"top_k"}}'
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from merge_search.errors import RecipeError, nearest, sentences
from merge_search.rules import MEASURES, OPERATORS, POSTS, SELECTIONS, SPLICES, STATISTICS, TRANSFORMS, Rule, RuleTable
from merge_search.rules.table import Scalar

__all__ = [
    "Allocate",
    "Assess",
    "Group",
    "Models",
    "Operator",
    "PerGroup",
    "Recipe",
    "Rescale",
    "Resolve",
    "Scalar",
    "Select",
    "Splice",
    "Transform",
    "groups_named",
    "value_for",
]


@dataclass(frozen=True, slots=True)
class Group:
    """The groups that a tensor belongs to: its block, its module kind, itself.

    Attributes:
        tensor: Name of the tensor on disk.
        block: Index of its layer, counted over all stacks; None outside all layers (embedding, head, final norm).
        kind: ``attention``, ``mlp``, ``norm``, ``embedding``, ``head`` or ``other``.
    """

    tensor: str
    block: int | None
    kind: str

    def keys(self) -> tuple[str, ...]:
        """Keys of a `PerGroup` value that apply to the tensor, the most specific first."""
        if self.block is None:
            return (self.tensor, self.kind, "*")
        return (self.tensor, f"block.{self.block}.{self.kind}", f"block.{self.block}", self.kind, "*")

    def key(self, per: str) -> str:
        """The key that all tensors of one part share; outside all blocks, parts are module kinds.

        Args:
            per: ``model``, ``block``, ``block_kind`` (block and module kind) or ``tensor``.
        """
        if per == "model":
            return "*"
        if per == "tensor":
            return self.tensor
        if self.block is None:
            return self.kind
        return f"block.{self.block}" if per == "block" else f"block.{self.block}.{self.kind}"


def groups_named(text: str, groups: Iterable[Group]) -> frozenset[str] | None:
    """The keys in a text like ``head+last``, in which ``last`` is the last block; None if it is empty, for all groups.

    Example:
        >>> sorted(groups_named("head+last", [Group("a", 0, "mlp"), Group("b", 1, "mlp")]))
        ['block.1', 'head']
    """
    if not text:
        return None
    blocks = [group.block for group in groups if group.block is not None]
    last = f"block.{max(blocks)}" if blocks else "last"
    return frozenset(last if key == "last" else key for key in text.split("+"))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


Finite = Annotated[float, AfterValidator(_finite)]


def _with_default(value: float | dict[str, float]) -> float | dict[str, float]:
    if isinstance(value, dict) and "*" not in value:
        raise ValueError("a value per group needs the key '*', used where no more specific key applies")
    return value


PerGroup = Annotated[Finite | dict[str, Finite], AfterValidator(_with_default)]
"""One number for all groups, or numbers by group key with '*' for the rest.

The most specific key wins. Keys are, in that order: a tensor's name; ``block.3.attention``; ``block.3``; ``attention``;
``*``.
"""


def value_for(values: float | Mapping[str, float], group: Group) -> float:
    """The number of a `PerGroup` that applies to `group`."""
    if not isinstance(values, Mapping):
        return float(values)
    for key in group.keys():  # noqa: SIM118
        if key in values:
            return float(values[key])
    raise RecipeError(f"no value for tensor {group.tensor!r}: give one of {', '.join(group.keys())}")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Models(_Value):
    """The models to merge: folders or hub ids. Experts keep the order in which they are listed."""

    base: str
    experts: dict[str, str] = Field(min_length=1)
    hashes: dict[str, str] = Field(default_factory=dict)
    """sha256 over the tensors, by expert name; ``base`` for the base. Checked where given."""


class Assess(_Value):
    """A measure by name, with its options. It gives every parameter of each expert a score."""

    measure: str = "magnitude"
    options: dict[str, Scalar] = Field(default_factory=dict)


class Allocate(_Value):
    """How densities spread over groups around the given ones.

    ``constant`` takes `densities` as they are. ``importance`` shifts each group's density by
    ``spread * (rank of its importance in [0, 1] - 1/2)``, clips it to [floor, 1] and shifts all of them so that the
    size-weighted mean stays. The importance of a group is its mean score under the measure (APL: ``causal_effect``, or
    ``apl`` by tensor). Groups are tensors, or what the measure's option ``partition`` says.
    """

    kind: Literal["constant", "importance"] = "constant"
    measure: str = "apl"
    options: dict[str, Scalar] = Field(default_factory=dict)
    spread: Finite = 0.0
    floor: Annotated[float, Field(gt=0, le=1)] = 0.01
    coefficient_power: Finite = 0.0
    """alpha >= 0: coefficients are multiplied by importance**alpha, scaled to mean one over the groups of an expert."""


def _known(table: RuleTable[Any]) -> AfterValidator:
    """Check that a name is in the table.

    A recipe that names rule files is read without them; `engine.check` checks its names once the files are in use.
    """

    def check(name: str, info: ValidationInfo) -> str:
        if not (info.context or {}).get("rules") and name not in table:
            raise ValueError(f"must name a {table.kind}, got {name!r}{nearest(name, table)}")
        return name

    return AfterValidator(check)


class Select(_Value):
    """Which parameters of a delta are kept.

    ``merge-search list`` shows every kind with a summary; a rule from outside is one more. The formulas:

        all               everything
        top_k             the round(density * n) largest scores; ties by lowest index. Above 2**16 elements the
                          threshold comes from a histogram: the count is off by little (`engine.passes.order_statistics`
                          says how little)
        threshold         score > `threshold`; density is not used
        band              drop the round(gamma * n) largest, keep the round(density * n) next
        bernoulli         each with probability density (counter-based, nested in the density)
        rank_probability  probability rises linearly with the score's rank, density -+ epsilon
        proportional      probability min(1, kappa * score), kappa such that the mean is the density
        soft_threshold    m = relu(a - Q) / (max a - Q) in [0, 1], Q the (1 - density)-quantile
        n_m               in every `block_size` consecutive entries of a row the density's share
        mass              largest scores until their sum is the density's share of the total
    """

    kind: Annotated[str, _known(SELECTIONS)] = "all"
    options: dict[str, Scalar] = Field(default_factory=dict)
    """Options of a selection from outside."""
    scope: Literal["row", "tensor", "model"] = "tensor"
    """Scores are ranked within each row, each tensor, or the whole model."""
    threshold: Finite = 0.0
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rounding: Literal["nearest", "down"] = "nearest"
    """How density * n and gamma * n become whole numbers.

    With ``down``, as in mergekit, a band whose two counts are together more than n drops fewer at the top.
    """
    epsilon: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    block_size: Annotated[int, Field(ge=2)] = 4
    exclusive: bool = False
    """Experts select in their order, and no expert keeps a parameter that an earlier one kept (CABS)."""
    gate: Annotated[int, Field(ge=0)] = 0
    """A parameter is kept, for all experts, where at least this many experts selected it; 0: no gate."""
    nonzero: bool = False
    """Densities count only parameters with a score above zero (SCE)."""
    vectors: bool = False
    """Selection applies to one-dimensional tensors (norm gains, biases), too; by default they stay whole."""


class Rescale(_Value):
    """How survivors of the selection are scaled: by 1, 1/density, 1/probability, or to the old L1 or L2 norm."""

    kind: Literal["none", "inverse_density", "inverse_probability", "match_l1", "match_l2"] = "none"


class Resolve(_Value):
    """Sign conflicts: at each entry only experts that agree with the elected sign are kept.

    ``sum`` elects the sign of the sum of surviving deltas, ``count`` the sign of the sum of their signs. With
    `weighted`, deltas are multiplied by their coefficients first, and an expert agrees where that product has the
    elected sign. An expert with a negative coefficient then votes for the opposite of its delta, and one with
    coefficient zero does not vote.

    `tie` decides an exact zero: ``plus``, ``minus``, ``drop``, or ``majority``. ``majority`` takes the sign that most
    entries of the tensor elect, counted on at most 2048 evenly spaced ones.
    """

    kind: Literal["none", "sum", "count"] = "none"
    weighted: bool = False
    tie: Literal["plus", "minus", "majority", "drop"] = "plus"


class Splice(_Value):
    """How surviving deltas are combined. A denominator of zero gives zero.

    ``merge-search list`` shows every kind with a summary; a rule from outside is one more. The formulas of omega_i:

        sum          lambda_i
        count        lambda_i / number of survivors
        mask         lambda_i / sum_j m_j c_j
        coefficient  lambda_i / sum_j lambda_j m_j c_j
        score        lambda_i b_i / sum_j b_j m_j c_j      (soft splicing)
        softmax      lambda_i softmax_i(log b_i / temperature) over survivors
        argmax       lambda_i [i = argmax_j b_j m_j c_j]   (hard splicing)
    """

    kind: Annotated[str, _known(SPLICES)] = "sum"
    options: dict[str, Scalar] = Field(default_factory=dict)
    """Options of a splice from outside."""
    score: Assess | None = None
    """The mixing score b; None: the selection score a."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    ties: Literal["first", "last"] = "first"
    """The expert that wins an exact tie of ``argmax``."""
    unique_boost: Finite = 0.0
    """r of RAM+: entries that one expert alone keeps are multiplied by 1 + r * min(shared / unique, `boost_cap`)."""
    boost_cap: Finite = 0.2


class Operator(_Value):
    """A rule on whole tensors in place of the pipeline, by name, with its options; ``merge-search list`` shows them."""

    name: str
    options: dict[str, Scalar] = Field(default_factory=dict)


class Transform(_Value):
    """A rule that makes other models from the recipe's before the merge, by name, with its options."""

    name: str
    options: dict[str, Scalar] = Field(default_factory=dict)


class Recipe(_Value):
    """Complete description of one merge.

    Invariants: every expert of `coefficients`, `densities` and `maps` is one of `models.experts`; densities lie in
    (0, 1]; numbers are finite.
    """

    format: Literal[1] = 1
    models: Models
    transform: Transform | None = None
    """Makes the models that are merged from `models`; None: `models` are merged as they are."""
    preset: str = ""
    """The published name of these settings, for people. Only the fields below decide the merge."""
    winsorise: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """|delta| is clipped to its [q, 1 - q] quantiles before anything else (PCB)."""
    winsorise_limits: Literal["interpolated", "released"] = "interpolated"
    """Which values the quantiles of n sorted |delta| are.

    ``released``: numbers int(n q) and int(n (1 - q) - 1), counted from 0, as in PCB's released code. ``interpolated``:
    the ones floor(q (n - 1)) from either end, above 2**16 entries interpolated in a histogram. A tensor that an expert
    left as it is does not count.
    """
    assess: Assess = Assess()
    allocate: Allocate = Allocate()
    select: Select = Select()
    rescale: Rescale = Rescale()
    resolve: Resolve = Resolve()
    splice: Splice = Splice()
    operator: Operator | None = None
    post: tuple[Operator, ...] = ()
    """Rules applied to the combined delta of each tensor, in order (``svc``, ``iso_spectrum``, ...)."""
    coefficients: dict[str, PerGroup] = Field(default_factory=dict)
    """lambda by expert; 1 for an expert that is not named."""
    densities: dict[str, PerGroup] = Field(default_factory=dict)
    """Kept fraction by expert; 1 for an expert that is not named."""
    scale: PerGroup = 1.0
    """lambda_out, which multiplies the combined delta."""
    maps: dict[str, str] = Field(default_factory=dict)
    """Expert -> sha256 of a safetensors file with its coefficients per output row, by tensor name."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of the merged floating tensors; None: the base's."""
    seed: int = 0
    """Seed of the counter-based masks."""
    rules: dict[str, str] = Field(default_factory=dict)
    """Rule file -> its sha256, for every file whose rules the recipe names.

    A new recipe gets the files in use; a stored one keeps what it says.
    """

    @field_validator("rules")
    @classmethod
    def _plain_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name, digest in value.items():
            if not re.fullmatch(r"[^/\\\0]+\.py", name):
                raise ValueError(f"a rule file is named without its folder and ends in .py, got {name!r}")
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"a rule file's sha256 has 64 hexadecimal digits, got {digest!r}")
        return value

    @model_validator(mode="after")
    def _bring_rule_files(self) -> Recipe:
        origins = [row.origin for row in self.known_rules() if row.origin is not None and row.origin.file]
        added = {o.file: o.sha256 for o in origins if o.file not in self.rules}
        if added:
            self.__dict__["rules"] = {**self.rules, **added}
        return self

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = []
        for field in ("coefficients", "densities", "maps"):
            for expert in getattr(self, field):
                if expert not in self.models.experts:
                    problems.append(f"{field}: {expert!r} is not an expert (experts: {', '.join(self.models.experts)})")
        for expert, values in self.densities.items():
            for key, d in (values if isinstance(values, dict) else {"*": values}).items():
                if not 0 < d <= 1:
                    problems.append(
                        f"densities: must lie in (0, 1], got {d:g} for expert {expert!r}, group {key!r}; "
                        "to leave an expert out, set its coefficient to 0"
                    )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def coefficient(self, expert: str, group: Group) -> float:
        """lambda of `expert` for the tensors of `group`, without its map."""
        return value_for(self.coefficients.get(expert, 1.0), group)

    def density(self, expert: str, group: Group) -> float:
        """Kept fraction of `expert` for the tensors of `group`, in (0, 1]."""
        return value_for(self.densities.get(expert, 1.0), group)

    def numbers_of(self, experts: Sequence[str], group: Group) -> tuple[tuple[float, ...], tuple[float, ...], float]:
        """Coefficients and densities of `experts`, and the scale, for the tensors of `group`."""
        coefficients = tuple(self.coefficient(e, group) for e in experts)
        densities = tuple(self.density(e, group) for e in experts)
        return coefficients, densities, value_for(self.scale, group)

    def known_rules(self) -> list[Rule]:
        """Rows of the rules that the recipe names and of the statistics that these read, without unknown names."""
        rows: list[Rule] = [table[name] for table, name in self._named_rules() if name in table]
        return rows + [STATISTICS[name] for name in self._statistics() if name in STATISTICS]

    def unknown_rules(self) -> list[str]:
        """A problem for every rule that the recipe names and no table has."""
        return [problem for table, name in self._named_rules() if (problem := table.unknown(name))]

    def _measures(self) -> list[tuple[str, Mapping[str, Scalar]]]:
        """Name and options of every measure that the recipe names."""
        measures: list[tuple[str, Mapping[str, Scalar]]] = [(self.assess.measure, self.assess.options)]
        if self.splice.score is not None:
            measures.append((self.splice.score.measure, self.splice.score.options))
        if self.allocate.kind == "importance":
            measures.append((self.allocate.measure, self.allocate.options))
        return measures

    def _statistics(self) -> list[str]:
        """Names of the statistics that its rules read; among them those that are no rules but files."""
        kinds = [k for m, options in self._measures() if m in MEASURES for k in MEASURES[m].statistics_asked(options)]
        if self.operator is not None and self.operator.name in OPERATORS:
            kinds += OPERATORS[self.operator.name].statistics_asked(self.operator.options)
        return [kind.partition("@")[0] for kind in kinds]

    def _named_rules(self) -> list[tuple[RuleTable[Any], str]]:
        names: list[tuple[RuleTable[Any], str]] = [(MEASURES, measure) for measure, _ in self._measures()]
        names += [(SELECTIONS, self.select.kind), (SPLICES, self.splice.kind)]
        if self.operator is not None:
            names.append((OPERATORS, self.operator.name))
        if self.transform is not None:
            names.append((TRANSFORMS, self.transform.name))
        return names + [(POSTS, rule.name) for rule in self.post]

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON types."""
        return {"format": 1, **self.model_dump(mode="json", exclude_defaults=True)}

    def to_json(self) -> str:
        """Canonical text: sorted keys (experts keep their order in ``models``), no blanks, shortest floats."""
        data = self.to_dict()
        data["models"] = {
            "base": self.models.base,
            "experts": list(self.models.experts.items()),
            "hashes": dict(self.models.hashes),
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        """Read data of `to_dict` or `to_json`.

        Args:
            data: The fields.
            where: What to call the recipe in messages.

        Raises:
            RecipeError: with every problem found, each with its place.
        """
        data = dict(data)
        models = data.get("models")
        if isinstance(models, Mapping) and isinstance(models.get("experts"), list):
            data["models"] = {**models, "experts": dict(models["experts"])}
        try:
            return cls.model_validate(data, context={"rules": data.get("rules")})
        except ValidationError as error:
            raise RecipeError(sentences(error, cls, root="recipe"), where=where) from None

    @classmethod
    def from_json(cls, text: str, *, where: str = "recipe") -> Recipe:
        """Read the text of `to_json`; arguments and errors as in `from_dict`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"not JSON: {error}", where=where) from None
        if not isinstance(data, dict):
            raise RecipeError("must be a JSON object", where=where)
        return cls.from_dict(data, where=where)

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that the result depends on: recipes of the same merge have the same one.

        The label `preset` is left out. Models count by their hashes where these are given, else by their places. Rule
        files count by their hashes alone.
        """
        models = self.models
        if models.hashes.keys() == {"base", *models.experts}:
            models = models.model_copy(update={"base": "", "experts": dict.fromkeys(models.experts, "")})
        update: dict[str, Any] = {"preset": "", "models": models}
        if self.rules:
            update["rules"] = {digest: digest for digest in self.rules.values()}
        plain = self.model_copy(update=update)
        return hashlib.sha256(plain.to_json().encode()).hexdigest()
