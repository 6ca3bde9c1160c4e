"""A recipe is a value: one canonical text, one fingerprint, refused with all problems when wrong."""

from __future__ import annotations

import pytest

from merge_search.errors import RecipeError
from merge_search.recipe import Group, Models, Recipe, value_for

MODELS = {"base": "b", "experts": {"z": "one", "a": "two"}}


def recipe(**settings: object) -> Recipe:
    return Recipe.from_dict({"models": MODELS, **settings})


def test_json_round_trip_gives_an_equal_recipe_with_experts_in_order() -> None:
    r = recipe(coefficients={"a": {"*": 0.25, "block.1": 0.5}}, densities={"z": 0.2}, select={"kind": "top_k"}, seed=7)
    again = Recipe.from_json(r.to_json())
    assert again == r
    assert list(again.models.experts) == ["z", "a"]
    assert again.to_json() == r.to_json()


def test_fingerprint_ignores_the_label_and_sees_every_number() -> None:
    r = recipe(coefficients={"a": 0.5})
    assert r.fingerprint == r.model_copy(update={"preset": "ties"}).fingerprint
    assert r.fingerprint != recipe(coefficients={"a": 0.5000001}).fingerprint
    assert r.fingerprint != recipe(coefficients={"a": 0.5}, seed=1).fingerprint


def test_fingerprint_knows_models_by_their_hashes_not_their_places() -> None:
    hashes = {"base": "0", "z": "1", "a": "2"}
    here = Recipe(models=Models(base="/here", experts={"z": "/z", "a": "/a"}, hashes=hashes))
    there = Recipe(models=Models(base="/there", experts={"z": "/y", "a": "/x"}, hashes=hashes))
    other = Recipe(models=Models(base="/here", experts={"z": "/z", "a": "/a"}, hashes={**hashes, "a": "3"}))
    assert here.fingerprint == there.fingerprint
    assert here.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"densities": {"a": 0.0}}, r"densities: must lie in \(0, 1\], got 0 for expert 'a'.*set its coefficient to 0"),
        ({"coefficients": {"q": 1.0}}, r"'q' is not an expert \(experts: z, a\)"),
        ({"coefficients": {"a": {"block.0": 1.0}}}, r"needs the key '\*'"),
        ({"coefficients": {"a": float("nan")}}, "must be finite"),
        ({"selekt": {}}, "selekt"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**settings)


def test_the_most_specific_key_wins() -> None:
    values = {"*": 1.0, "mlp": 2.0, "block.3": 3.0, "block.3.mlp": 4.0, "t": 5.0}
    assert value_for(values, Group("t", 3, "mlp")) == 5.0
    assert value_for(values, Group("u", 3, "mlp")) == 4.0
    assert value_for(values, Group("u", 3, "attention")) == 3.0
    assert value_for(values, Group("u", 2, "mlp")) == 2.0
    assert value_for(values, Group("u", None, "embedding")) == 1.0
