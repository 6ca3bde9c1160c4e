"""The table of options: complete, of the right kind, and computable from one bound to the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import pytest
import torch
from command_line import here
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.errors import RuleError
from merge_search.presets import PRESETS, preset_options
from merge_search.recipe import Allocate, Recipe, Rescale, Resolve, Select, Splice
from merge_search.rules import (
    MEASURES,
    OPERATORS,
    POSTS,
    SELECTIONS,
    SPLICES,
    STAGES,
    TABLES,
    TRANSFORMS,
    OptionInfo,
    Rule,
    measure,
    post,
)
from merge_search.rules.describe import option_line, rule_options
from merge_search.rules.option_table import (
    MEASURE_OPTIONS,
    OPERATOR_OPTIONS,
    POST_OPTIONS,
    STAGE_OPTIONS,
    TRANSFORM_OPTIONS,
)
from merge_search.rules.table import collecting
from merge_search.testing.rule import whole_pairs

ROWS = [(table, row) for table in (MEASURES, OPERATORS, POSTS, STAGES) for row in table.values()]
OPTIONS = [pytest.param(row, o, id=f"{row.name}-{o}") for _, row in ROWS for o in row.options]
OF_TRANSFORMS = [pytest.param(row, o, id=f"{row.name}-{o}") for row in TRANSFORMS.values() for o in row.options]
FREE_TEXT = {
    ("external", "name"), ("passthrough", "expert"), ("allocate", "allocate"), ("stack", "layers"), ("mal", "blocks"),
    ("alone", "model"), ("cki", "only"), ("cki_learned", "only"),
}  # fmt: skip
"""Names of other things: any text is right in itself."""


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Measured(MemoryTensors):
    """Tensors with every statistic."""

    def statistic(self, kind: str, expert: str, name: str) -> Tensor | None:
        shape = self.shape(name)
        if kind.startswith("cki_map"):  # a matrix over the inputs above an offset
            return drawn(0, shape[-1] + 1, shape[-1]) if len(shape) == 2 else drawn(0, 2, 1)
        x = drawn(sum(map(ord, kind + expert)), *shape)
        return x.mT @ x if kind == "gram" or kind.startswith("prompt_gram") else x.abs()


def make(n_experts: int) -> Measured:
    base = {"model.layers.0.mlp.up_proj.weight": drawn(0, 6, 4), "model.norm.weight": drawn(1, 4)}
    experts = {
        f"e{i}": {n: t + 0.1 * drawn(10 * i + j + 2, *t.shape) for j, (n, t) in enumerate(base.items())}
        for i in range(n_experts)
    }
    return Measured(base, experts, factors=whole_pairs(base, experts))


TENSORS = {n: make(n) for n in (2, 3)}


def merged(settings: Mapping[str, Any], n_experts: int = 3) -> list[Tensor]:
    tensors = TENSORS[n_experts]
    densities = dict.fromkeys(tensors.models.experts, 0.5)
    recipe = Recipe.from_dict({"models": tensors.models, "densities": densities, **settings})
    engine = MergeEngine(tensors, compile=False)
    assert engine.check(recipe) == []
    return [t for _, t in engine.merged(recipe)]


# ------------------------------------------------------------------------------------------------ complete and true


@pytest.mark.parametrize(("row", "option"), OPTIONS + OF_TRANSFORMS)
def test_every_option_has_a_line_and_bounds_or_choices(row: Rule, option: str) -> None:
    info, default = row.about[option], row.options[option]
    assert info.what
    assert not info.what.endswith(".")
    assert info.source in ("paper", "release", "mergekit", "ours")
    allowed = row.allowed(option)
    if (row.name, option) in FREE_TEXT:
        assert not allowed
        assert info.bounds is None
    elif isinstance(default, str | bool) or info.numbers:
        assert len(allowed) >= 2
        assert default in allowed
        assert info.bounds is None
    else:
        low, high = info.bounds  # type: ignore[misc]
        usual = info.usual or info.bounds
        assert low <= usual[0] < usual[1] <= high  # type: ignore[index]
        assert default is None or low <= default <= high
        assert usual[0] > 0 or not info.log  # type: ignore[index]
        if isinstance(default, int):
            assert all(isinstance(b, int) for b in (low, high, *usual))  # type: ignore[misc]


def test_the_table_has_no_option_that_no_rule_has() -> None:
    tables = [(MEASURES, MEASURE_OPTIONS), (OPERATORS, OPERATOR_OPTIONS), (POSTS, POST_OPTIONS)]
    tables += [(STAGES, STAGE_OPTIONS), (TRANSFORMS, TRANSFORM_OPTIONS)]
    for rules, about in tables:
        for name, options in about.items():
            assert options.keys() == rules[name].options.keys(), name


def test_fields_of_stages_have_the_defaults_and_words_of_the_recipe() -> None:
    plain = Recipe.from_dict({"models": {"base": "b", "experts": {"a": "a"}}})
    defaults = {"winsorise": plain.winsorise, "winsorise_limits": plain.winsorise_limits, "scale": plain.scale}
    defaults |= {"allocate": "none", "rescale": Rescale().kind}
    models = {"allocate": Allocate, "select": Select, "resolve": Resolve, "splice": Splice}
    for stage, row in STAGES.items():
        for option, default in row.options.items():
            model = models.get(stage)
            fields = model.model_fields if model is not None else {}
            wanted = defaults[option] if option in defaults else fields[option].default
            assert (default, type(default)) == (wanted, type(wanted)), option
            place = Rescale.model_fields["kind"] if option == "rescale" else {**Recipe.model_fields, **fields}[option]
            words = getattr(place.annotation, "__args__", ()) if option not in ("allocate", "scale") else ()
            assert row.choices.get(option, ()) == tuple(w for w in words if isinstance(w, str))
    for selection in SELECTIONS.values():
        assert set(selection.reads) <= STAGES["select"].options.keys()
    for splice in SPLICES.values():
        assert set(splice.reads) <= STAGES["splice"].options.keys()


# --------------------------------------------------------------------------------------------------- computable


def ends(row: Rule, option: str) -> list[Any]:
    """Both bounds of a number, or every word, switch position and single number."""
    info = row.about[option]
    return list(info.bounds) if info.bounds is not None else list(row.allowed(option))


def settings_of(row: Rule, option: str) -> Iterator[dict[str, Any]]:
    """Merges that read an option, at its ends."""
    for value in ends(row, option):
        rule = {"options": {option: value}}
        if row.name in MEASURES and row is MEASURES[row.name]:
            yield {"splice": {"kind": "score", "score": {"measure": row.name, **rule}}}
            if not (MEASURES[row.name].per_tensor or MEASURES[row.name].after_mask):
                yield {"assess": {"measure": row.name, **rule}, "select": {"kind": "top_k"}}
        elif row.name in OPERATORS and row is OPERATORS[row.name]:
            others = {"solver": "closed"} if (row.name, option) == ("wudi", "ridge") else {}
            yield {"operator": {"name": row.name, "options": {**others, option: value}}}
        elif row.name in POSTS:
            yield {"post": [{"name": row.name, **rule}]}
        else:
            yield from with_field(row.name, option, value)


def with_field(stage: str, option: str, value: Any) -> Iterator[dict[str, Any]]:
    picked = {"select": {"kind": "top_k"}}
    match stage:
        case "select":
            for kind, selection in SELECTIONS.items():
                if option in selection.reads and (option != "scope" or value in selection.scopes):
                    needs = {"threshold": 0.05} if kind == "threshold" else {}
                    yield {"select": {"kind": kind, **needs, option: value}}
        case "splice":
            for kind, splice in SPLICES.items():
                if option in splice.reads:
                    yield {**picked, "splice": {"kind": kind, "unique_boost": 0.5, option: value}}
        case "resolve":
            yield {**picked, "resolve": {"kind": "sum", option: value}}
        case "rescale":
            yield {"select": {"kind": "bernoulli"}, "rescale": {"kind": value}}
        case "allocate":
            for measure in ("magnitude", "apl"):
                yield {**picked, "allocate": {"kind": "importance", "measure": measure, option: value}}
        case _:
            yield {**picked, "winsorise": 0.1, option: value}


@pytest.mark.parametrize(("row", "option"), [p for p in OPTIONS if tuple(p.id.split("-")) not in FREE_TEXT])  # type: ignore[union-attr]
def test_a_rule_can_be_computed_at_both_ends_of_every_option(row: Rule, option: str) -> None:
    n = 2 if getattr(row, "experts", (1, None))[1] == 2 else 3
    found = [merged(settings, n) for settings in settings_of(row, option)]
    assert len(found) >= 2
    assert all(bool(t.isfinite().all()) for tensors in found for t in tensors)


@pytest.mark.parametrize("name", [n for n, m in MEASURES.items() if not m.after_mask])
def test_every_measure_that_scores_before_selection_can_allocate(name: str) -> None:
    """Scores of PCB can be negative, and so can their mean: no complex numbers come of its power."""
    allocate = {"kind": "importance", "measure": name, "spread": 0.5, "coefficient_power": 0.5}
    assert all(bool(t.isfinite().all()) for t in merged({"select": {"kind": "top_k"}, "allocate": allocate}))


# -------------------------------------------------------------------------------------------------- rules from outside


INFO = OptionInfo("counts as zero", bounds=(1e-6, 1.0), log=True)
ANNOTATED = Annotated[float, INFO]


def outside(function: Any, decorator: Any = measure) -> Rule:
    with collecting() as rows:
        decorator("mine")(function)
    ((_, row),) = rows
    assert isinstance(row, Rule)
    return row


def test_a_rule_from_outside_shows_its_ranges() -> None:
    def one(context, *, eps: ANNOTATED = 1e-3, flag: bool = True, other: float = 2.0):  # type: ignore[no-untyped-def]
        "scores"

    row = outside(one)
    assert row.about == {"eps": INFO}
    shown = {line.option: line for line in rule_options(row)}
    assert shown["eps"][1:] == ("number", "0.001", "[1e-06, 1]", "[1e-06, 1], log", "ours", "counts as zero")
    assert shown["flag"][1:4] == ("switch", "true", "false, true")
    assert shown["other"][1:4] == ("number", "2.0", "any")


@pytest.mark.parametrize(
    ("info", "default", "message"),
    [
        (OptionInfo("x", bounds=(1.0, 0.0)), 0.5, "low < high"),
        (OptionInfo("x", bounds=(0.0, 1.0)), 2.0, r"must have its default in its bounds \(0.0, 1.0\), got 2.0"),
        (OptionInfo("x", bounds=(0.0, 1.0)), "a", "its default must be a number, got 'a'"),
        (OptionInfo("x", bounds=(0.0, 1.0), log=True), 0.5, "above 0, as its scale is logarithmic"),
        (OptionInfo("x", bounds=(0.0, 1.0), usual=(0.5, 2.0)), 0.5, "its usual range within its bounds"),
    ],
)
def test_ranges_that_cannot_be_are_refused_with_the_place_of_the_rule(
    info: OptionInfo, default: Any, message: str
) -> None:
    def rule(context, delta, *, x=default):  # type: ignore[no-untyped-def]
        "nothing"

    rule.__annotations__["x"] = Annotated[float, info]
    with pytest.raises(RuleError, match=f"test_option_table.py:[0-9]+: option 'x' of rule .*{message}"):
        outside(rule, post)


# ------------------------------------------------------------------------------------------------------- the list


def test_the_list_shows_the_options_of_a_name_in_every_table() -> None:
    shown = here("list", "--options", "tsv_m").stdout
    assert "rank_share" in shown
    assert "[0.001, 100]" in shown
    assert "[0.1, 1.5]" in shown
    assert "alpha" not in shown
    both = here("list", "--options", "fisher").stdout
    assert "preset fisher" in both
    assert "measures" in both
    assert "rank_share" in here("list", "--options").stdout
    refused = here("list", "--options", "tsvm", check=False)
    assert "no preset, rule or stage is called 'tsvm'; did you mean 'tsv_m'?" in refused.stderr


def test_the_options_of_a_preset_have_its_values_as_defaults() -> None:
    lines = {line.option: (rule, line.default) for rule, line in preset_options("breadcrumbs")}
    assert lines["gamma"] == ("select", "0.01")
    assert lines["winsorise"] == ("winsorise", "0.0")
    assert "epsilon" not in lines
    assert "temperature" not in lines
    lines = {line.option: (rule, line.default) for rule, line in preset_options("fisher")}
    assert lines["normalise"] == ("fisher", "true")
    lines = {line.option: (rule, line.default) for rule, line in preset_options("apl")}
    assert lines["spread"] == ("allocate", "0.4")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_described(name: str) -> None:
    assert all(line.what for _, line in preset_options(name))


def test_every_row_of_every_table_is_described() -> None:
    for rules in TABLES.values():
        for row in rules.values():
            assert all(line.what and line.source for line in rule_options(row)), row.name
    assert option_line(OPERATORS["wudi"], "steps").search == "[10, 1000], log"
    assert {line.option for line in rule_options(SELECTIONS["band"])} >= {"gamma", "scope"}
    scope = next(line for line in rule_options(SELECTIONS["mass"]) if line.option == "scope")
    assert scope.allowed == "tensor, model"
