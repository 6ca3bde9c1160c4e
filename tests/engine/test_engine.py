"""MergeEngine writes merges into live models: in place, only what changed, and the compiled pass agrees."""

from __future__ import annotations

import pytest
import torch

from merge_search.engine.engine import MergeEngine
from merge_search.engine.execute.runner import has_compiler
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.errors import NonFiniteError, RecipeError
from merge_search.presets import PRESETS, preset
from merge_search.recipe import Group, Models, Recipe
from merge_search.testing.rule import whole_pairs

NAMES = ("embed", "block.0", "block.1", "norm")
GROUPS = {
    "embed": Group("embed", None, "embedding"),
    "block.0": Group("block.0", 0, "mlp"),
    "block.1": Group("block.1", 1, "mlp"),
    "norm": Group("norm", None, "norm"),
}


def make(dtype=torch.bfloat16, size=24):
    generator = torch.Generator().manual_seed(0)
    shapes = {n: (size,) if n == "norm" else (size, size + 8) for n in NAMES}
    base = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    experts = {
        e: {n: (t.float() + 0.1 * torch.randn(t.shape, generator=generator)).to(dtype) for n, t in base.items()}
        for e in "abc"
    }
    return MemoryTensors(base, experts, groups=GROUPS, factors=whole_pairs(base, experts))


def fits_three(name: str) -> bool:
    """Whether a preset merges three experts without data."""
    p = PRESETS[name]
    return not p.needs_data and name != "expert" and (p.experts[1] is None or p.experts[1] >= 3)


@pytest.fixture
def tensors() -> MemoryTensors:
    return make()


@pytest.fixture
def engine(tensors) -> MergeEngine:
    return MergeEngine(tensors, compile=False)


def live(tensors):
    return {n: torch.zeros_like(tensors.base(n)) for n in tensors.groups}


def same(views, tensors, recipe) -> bool:
    return all(torch.equal(views[n], out) for n, out in MergeEngine(tensors, compile=False).merged(recipe))


def test_applying_writes_what_merging_yields(engine, tensors):
    views = live(tensors)
    recipe = preset("ties", tensors.models)
    report = engine.apply(recipe, views)
    assert (report.written, report.skipped) == (4, 0)
    assert report.elements == sum(v.numel() for v in views.values())
    assert same(views, tensors, recipe)


def test_applying_the_same_recipe_again_writes_nothing(engine, tensors):
    views = live(tensors)
    recipe = preset("ties", tensors.models)
    engine.apply(recipe, views)
    report = engine.apply(recipe.model_copy(update={"preset": "another label"}), views)
    assert (report.written, report.skipped) == (0, 4)


def test_only_tensors_whose_settings_changed_are_written(engine, tensors):
    views = live(tensors)
    engine.apply(preset("task_arithmetic", tensors.models), views)
    changed = preset("task_arithmetic", tensors.models, coefficients={e: {"*": 0.3, "block.1": 0.9} for e in "abc"})
    assert engine.apply(changed, views).written == 1
    assert same(views, tensors, changed)


def test_a_long_walk_over_recipes_ends_where_a_fresh_engine_does(engine, tensors):
    views = live(tensors)
    names = [n for n in PRESETS if fits_three(n)]
    for name in names + names[::-1]:
        recipe = preset(name, tensors.models)
        engine.apply(recipe, views)
        assert same(views, tensors, recipe), name


def test_a_view_that_someone_else_wrote_to_is_written_again(engine, tensors):
    views = live(tensors)
    recipe = preset("average", tensors.models)
    engine.apply(recipe, views)
    views["block.0"].zero_()
    assert engine.apply(recipe, views).written == 1
    assert same(views, tensors, recipe)


def test_new_views_are_written_whole_and_forgetting_writes_all(engine, tensors):
    recipe = preset("average", tensors.models)
    engine.apply(recipe, live(tensors))
    views = live(tensors)
    assert engine.apply(recipe, views).written == 4
    engine.forget()
    assert engine.apply(recipe, views).written == 4


def test_strided_views_of_one_storage_are_written_and_then_skipped(engine, tensors):
    n, m = tensors.base("block.0").shape
    fused = torch.zeros(2, m, n, dtype=torch.bfloat16)
    views = {"block.0": fused[0].T, "block.1": fused[1].T, "norm": torch.zeros(2 * n, dtype=torch.bfloat16)[::2]}
    recipe = preset("ties", tensors.models)
    assert engine.apply(recipe, views).written == 3
    expected = dict(engine.merged(recipe))
    assert all(torch.equal(views[k], expected[k]) for k in views)
    assert engine.apply(recipe, views).skipped == 3


def test_parameters_are_written_without_a_gradient(engine, tensors):
    parameters = {n: torch.nn.Parameter(v) for n, v in live(tensors).items()}
    engine.apply(preset("average", tensors.models), parameters)
    assert same(parameters, tensors, preset("average", tensors.models))
    assert all(p.grad_fn is None for p in parameters.values())


def test_tensors_of_a_model_made_in_inference_mode_are_written_each_time(engine, tensors):
    with torch.inference_mode():
        views = live(tensors)
        recipe = preset("average", tensors.models)
        engine.apply(recipe, views)
        assert engine.apply(recipe, views).written == 4


def test_names_that_are_not_merged_are_left_alone(engine, tensors):
    views = {**live(tensors), "position_ids": torch.arange(3)}
    engine.apply(preset("average", tensors.models), views)
    assert views["position_ids"].tolist() == [0, 1, 2]


def test_a_view_of_another_shape_is_refused(engine, tensors):
    with pytest.raises(RecipeError, match=r"'norm' must have its shape \(24,\), got \(3,\)"):
        engine.apply(preset("average", tensors.models), {"norm": torch.zeros(3)})


def test_after_a_result_that_is_not_finite_the_next_recipe_is_written_whole():
    tensors = make(torch.float16)
    engine, views = MergeEngine(tensors, compile=False), live(tensors)
    engine.apply(preset("average", tensors.models), views)
    with pytest.raises(NonFiniteError, match="'embed'"):
        engine.apply(preset("task_arithmetic", tensors.models, coefficients=1e7), views)
    good = preset("task_arithmetic", tensors.models, coefficients=0.1)
    engine.apply(good, views)
    assert same(views, tensors, good)


def test_base_and_expert_are_copied_bit_for_bit(engine, tensors):
    tensors.expert("b", "norm")[0] = -0.0
    for recipe, source in (
        (preset("base", tensors.models), tensors.base),
        (preset("expert", tensors.models, expert="b"), lambda n: tensors.expert("b", n)),
    ):
        for name, out in engine.merged(recipe):
            assert torch.equal(out.view(torch.int16), source(name).view(torch.int16))


def test_checking_names_every_problem_before_any_work(engine, tensors):
    recipe = Recipe.model_validate({
        "models": Models(base="b", experts={"a": "x", "z": "y"}),
        "assess": {"measure": "magnitud"},
        "select": {"kind": "soft_threshold", "scope": "row", "exclusive": True},
        "coefficients": {"a": {"*": 1.0, "block.7": 2.0}},
        "post": [{"name": "svcc"}],
    })  # fmt: skip
    problems = engine.check(recipe)
    for text in (
        "'z' is not among",
        "unknown measure 'magnitud'; did you mean 'magnitude'",
        "'block.7'",
        "not rows",
        "exclusive",
        "'svcc'",
    ):
        assert any(text in p for p in problems), (text, problems)
    with pytest.raises(RecipeError, match="problems"):
        next(engine.merged(recipe))


def test_a_good_recipe_has_no_problems(engine, tensors):
    for name in PRESETS:
        if fits_three(name):
            assert engine.check(preset(name, tensors.models)) == []


def test_maps_scale_coefficients_by_output_row(tensors):
    rows = torch.linspace(0, 1, 24)
    base = {n: tensors.base(n).float() for n in NAMES}
    a = {n: tensors.expert("a", n).float() for n in NAMES}
    statistics = {("map:abc", "a", n): rows for n in NAMES}
    one = MemoryTensors(base, {"a": a}, groups=GROUPS, statistics=statistics)
    recipe = Recipe(models=one.models, coefficients={"a": 2.0}, maps={"a": "abc"})
    for name, out in MergeEngine(one, compile=False).merged(recipe):
        factor = rows if name == "norm" else rows[:, None]
        assert torch.allclose(out, base[name] + 2 * factor * (a[name] - base[name]), atol=1e-5)


COMPILED = [
    "task_arithmetic",
    "ties",
    "dare_ties",
    "della",
    "breadcrumbs",
    "sce",
    "cabs",
    "magmax",
    "pcb",
    "cki_recommender",
]


@pytest.mark.slow
def test_the_compiled_pass_gives_the_bits_of_the_definition():
    if not has_compiler(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    tensors = make(size=150)
    chunked, compiled = MergeEngine(tensors, compile=False), MergeEngine(tensors, compile=True)
    assert compiled.is_compiled
    for name in COMPILED:
        for scale in (1.0, 0.5):
            recipe = preset(name, tensors.models, scale=scale)
            expected = dict(chunked.merged(recipe))
            for key, out in compiled.merged(recipe):
                assert torch.equal(out, expected[key]), (name, key)
