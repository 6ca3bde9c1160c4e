"""What every search space promises."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from merge_search.errors import SpaceError
from merge_search.recipe import Group, Models, Recipe, value_for
from merge_search.space import Categorical, Float, Parameter, SearchSpace, SpaceContext

__all__ = ["SearchSpaceCase", "SearchSpaceConformance", "example_context"]

_HEAVY = ("torch", "botorch", "gpytorch", "transformers", "lm_eval", "optuna")
_N_POINTS = 20
_TOLERANCE = 1e-6


def example_context(n_blocks: int = 6, experts: Sequence[str] = ("maths", "code", "stories")) -> SpaceContext:
    """The tensors of a small Llama: for tests that need no checkpoint.

        >>> context = example_context(2)
        >>> context.n_blocks, context.experts, len(context.groups)
        (2, ('maths', 'code', 'stories'), 11)

    Args:
        n_blocks: The number of transformer blocks.
        experts: The names of the experts.
    """
    groups = []
    for i in range(n_blocks):
        groups += [
            Group(f"model.layers.{i}.input_layernorm.weight", i, "norm"),
            Group(f"model.layers.{i}.self_attn.q_proj.weight", i, "attention"),
            Group(f"model.layers.{i}.self_attn.o_proj.weight", i, "attention"),
            Group(f"model.layers.{i}.mlp.up_proj.weight", i, "mlp"),
        ]
    groups += [
        Group("model.embed_tokens.weight", None, "embedding"),
        Group("model.norm.weight", None, "norm"),
        Group("lm_head.weight", None, "head"),
    ]
    models = Models(base="models/base", experts={e: f"models/{e}" for e in experts})
    return SpaceContext(models, tuple(groups), seed=5, dtype="bfloat16")


@dataclass(frozen=True)
class SearchSpaceCase:
    """A search space to test.

    Attributes:
        build: Builds the space. Every call builds an equal one.
        context: The context that `build` passes to it.
        wrong: Functions that build the space with wrong options. Each must raise `SpaceError`.
    """

    build: Callable[[], SearchSpace]
    context: SpaceContext
    wrong: Sequence[Callable[[], object]] = ()

    def points(self, space: SearchSpace) -> Iterator[dict[str, Any]]:
        """Random points, and the corners where every number is lowest or highest. The same ones in every call."""
        draw = random.Random(0)
        for level in (0.0, 1.0, *[None] * _N_POINTS):
            yield {name: _value(domain, level, draw) for name, domain in space.parameters.items()}


class SearchSpaceConformance:
    """Inherit and define the fixture `case`, which returns a `SearchSpaceCase`."""

    def test_parameters_are_flat_bounded_and_named(self, case: SearchSpaceCase) -> None:
        """Every parameter has a name and a domain with two or more values."""
        space = case.build()
        assert space.parameters, "nothing varies"
        for name, domain in space.parameters.items():
            assert name, "a parameter has no name"
            assert isinstance(name, str), name
            if isinstance(domain, Categorical):
                assert len(set(domain.choices)) == len(domain.choices) >= 2, f"{name}: {domain}"
            else:
                assert -math.inf < domain.low < domain.high < math.inf, f"{name}: {domain}"
                assert domain.low > 0 or not domain.log, (
                    f"{name}: a logarithmic scale needs positive bounds, got {domain}"
                )

    def test_parameters_are_the_same_in_every_space_built_alike(self, case: SearchSpaceCase) -> None:
        """Names, order and domains depend on the options and the models alone: a study can be resumed."""
        one, two = case.build(), case.build()
        assert list(one.parameters.items()) == list(two.parameters.items())
        next(iter(case.points(one)))
        assert list(one.parameters.items()) == list(two.parameters.items())

    def test_every_point_is_a_valid_recipe_of_the_studys_models(self, case: SearchSpaceCase) -> None:
        """Decoding is total: corners and random points give recipes of the context's models, seed and dtype."""
        space, context = case.build(), case.context
        for point in case.points(space):
            recipe = space.decode(point)
            assert isinstance(recipe, Recipe)
            assert recipe.models == context.models, (
                "a recipe must merge the models of the context; see SpaceContext.recipe"
            )
            assert (recipe.seed, recipe.dtype) == (context.seed, context.dtype), "see SpaceContext.recipe"
            named = {*recipe.coefficients, *recipe.densities}
            assert named <= set(context.experts), f"no experts of the study: {named - set(context.experts)}"
            assert Recipe.from_json(recipe.to_json()) == recipe, "a recipe must survive being stored"

    def test_a_point_always_gives_the_same_recipe_and_is_left_alone(self, case: SearchSpaceCase) -> None:
        """Decoding is a function: it draws nothing, keeps nothing and does not change the point."""
        space, other = case.build(), case.build()
        for point in case.points(space):
            before = dict(point)
            recipe = space.decode(point)
            assert point == before
            assert space.decode(point) == recipe == other.decode(point)

    def test_a_recipes_point_decodes_to_the_recipe(self, case: SearchSpaceCase) -> None:
        """Where `encode` gives a point, that point is complete, within bounds and the same merge."""
        space = case.build()
        for point in case.points(space):
            recipe = space.decode(point)
            again = space.encode(recipe)
            if again is not None:
                _check_point(space.parameters, again)
                _check_same_merge(space.decode(again), recipe, case.context)

    def test_an_exact_form_is_exact_and_has_the_same_coefficients(self, case: SearchSpaceCase) -> None:
        """Where a recipe approximates another one, that one approximates nothing."""
        space = case.build()
        for point in case.points(space):
            recipe = space.decode(point)
            exact = space.exact_form(recipe)
            if exact is not None:
                assert space.exact_form(exact) is None
                assert exact.fingerprint != recipe.fingerprint
                assert exact.coefficients == recipe.coefficients

    def test_a_recipe_of_other_models_has_no_point(self, case: SearchSpaceCase) -> None:
        """`encode` answers None for a merge of models that the study does not have."""
        space = case.build()
        recipe = space.decode(next(iter(case.points(space))))
        experts = {name: f"{place}-of-another-study" for name, place in recipe.models.experts.items()}
        other = recipe.model_copy(update={"models": Models(base="another-base", experts=experts)})
        assert space.encode(other) is None

    def test_initial_points_are_complete_within_bounds_and_distinct(self, case: SearchSpaceCase) -> None:
        """Every initial point can be decoded, and none stands twice."""
        space = case.build()
        points = space.initial_points()
        for point in points:
            _check_point(space.parameters, point)
            assert isinstance(space.decode(point), Recipe)
        assert len({tuple(sorted(p.items())) for p in points}) == len(points), "an initial point stands twice"

    def test_notes_are_sentences_for_the_users_log(self, case: SearchSpaceCase) -> None:
        """`notes` is a sequence of texts, empty where there is nothing to say."""
        notes = case.build().notes
        assert not isinstance(notes, str)
        assert all(isinstance(note, str) and note for note in notes)

    def test_it_needs_no_torch(self, case: SearchSpaceCase) -> None:
        """A space is built, decoded and encoded without torch or any other heavy library."""
        with _without(_HEAVY):
            space = case.build()
            space.encode(space.decode(next(iter(case.points(space)))))

    def test_wrong_options_are_a_space_error(self, case: SearchSpaceCase) -> None:
        """The constructor refuses wrong options with a `SpaceError`, never with another exception."""
        for build in case.wrong:
            try:
                build()
            except SpaceError:
                continue
            raise AssertionError("wrong options were accepted")


def _value(domain: Parameter, level: float | None, draw: random.Random) -> str | int | float | bool:
    """The lowest number at level 0, the highest at 1, a random one at None; of a category a random choice."""
    if isinstance(domain, Categorical):
        return draw.choice(domain.choices)
    if level is not None:
        return domain.high if level else domain.low
    return draw.uniform(domain.low, domain.high) if isinstance(domain, Float) else draw.randint(domain.low, domain.high)


def _check_point(parameters: Mapping[str, Parameter], point: Mapping[str, Any]) -> None:
    assert set(point) == set(parameters), (
        f"a point must have a value for every parameter: {set(point) ^ set(parameters)}"
    )
    for name, domain in parameters.items():
        if isinstance(domain, Categorical):
            assert point[name] in domain.choices, f"{name}: {point[name]!r}"
        else:
            assert domain.low <= point[name] <= domain.high, f"{name}: {point[name]!r}"


_NUMBERS = ("coefficients", "densities", "scale")


def _check_same_merge(one: Recipe, two: Recipe, context: SpaceContext) -> None:
    """Equal stages and, up to rounding, equal numbers for every tensor."""
    assert one.model_dump(exclude=set(_NUMBERS)) == two.model_dump(exclude=set(_NUMBERS))
    for group in context.groups:
        scales = [float(value_for(r.scale, group)) for r in (one, two)]
        for expert in context.experts:
            pairs = [
                (r.coefficient(expert, group) * s, r.density(expert, group))
                for r, s in zip((one, two), scales, strict=True)
            ]
            for a, b in zip(*pairs, strict=True):
                assert math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE), (
                    f"{expert}, {group.tensor}: {a} and {b}"
                )


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Importing these modules fails inside."""
    kept = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
