"""Results of transforms: kept, found again, bounded, and whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_families import nudged, save, write_family
from tiny_lm import make_model

import merge_search.engine.checkpoints.writer as writer
import merge_search.engine.transforms.store as store
from merge_search.engine.checkpoints.hashing import hash_folder
from merge_search.errors import RecipeError, WeightsError
from merge_search.merge_recipe import merge_recipe
from merge_search.recipe import Models, Recipe, Transform
from merge_search.rules import use_rule_files

USERS = Path(__file__).parents[2] / "support" / "user_transforms.py"


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return write_family(tmp_path / "models")


@pytest.fixture(autouse=True)
def users_transforms():
    use_rule_files([USERS])
    yield
    use_rule_files([])


def recipe(models: Models, **options: float) -> Recipe:
    return Recipe(models=models, transform=Transform(name="scaled", options=options))


def test_a_result_is_found_again_and_never_written_twice(models: Models, tmp_path: Path) -> None:
    first = store.transformed(recipe(models), tmp_path / "kept")
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "kept").rglob("*.safetensors")}
    assert store.transformed(recipe(models, factor=0.5), tmp_path / "kept") == first  # its default
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "kept").rglob("*.safetensors")} == stamps
    assert first.base == Path(models.base)  # a source's own folder is not copied
    other = store.transformed(recipe(models, factor=0.25), tmp_path / "kept")
    assert other.experts["a"] != first.experts["a"]


def test_other_weights_are_another_result(models: Models, tmp_path: Path) -> None:
    first = store.transformed(recipe(models), tmp_path / "kept")
    save(nudged(make_model(), 9), Path(models.experts["a"]))
    assert store.transformed(recipe(models), tmp_path / "kept").experts["a"] != first.experts["a"]


def test_a_model_that_is_not_the_recipes_is_refused(models: Models, tmp_path: Path) -> None:
    hashed = models.model_copy(update={"hashes": {"a": "0" * 64}})
    with pytest.raises(WeightsError, match="'a' must be the model with sha256 0000"):
        store.transformed(recipe(hashed), tmp_path / "kept")


def test_the_most_recently_used_results_are_kept(models: Models, tmp_path: Path) -> None:
    made = {f: store.transformed(recipe(models, factor=f), tmp_path / "kept", kept=2).experts["a"] for f in (0.1, 0.2)}
    for age, factor in ((20, 0.2), (10, 0.1)):  # 0.1 was used last
        index = made[factor].parent / "transformed.json"
        os.utime(index, (index.stat().st_mtime - age,) * 2)
    newest = store.transformed(recipe(models, factor=0.3), tmp_path / "kept", kept=2).experts["a"]
    assert (made[0.1].is_dir(), made[0.2].is_dir(), newest.is_dir()) == (True, False, True)


def test_a_kill_in_the_middle_leaves_nothing_that_is_taken_for_a_result(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    if (child := os.fork()) == 0:  # killed after the last weight was written, before the result is whole
        monkeypatch.setattr(writer, "sync_folder", lambda path: os.kill(os.getpid(), 9))
        store.transformed(recipe(models), folder)
    assert os.waitpid(child, 0)[1] == 9
    (left,) = folder.iterdir()
    assert left.name.endswith(f".tmp-{child}")
    made = store.transformed(recipe(models), folder)
    assert made.experts["a"].parent != left
    assert hash_folder(made.experts["a"]) == hash_folder(store.transformed(recipe(models), tmp_path / "b").experts["a"])
    os.utime(left, (0, 0))  # long ago: no process is at it any more
    store.transformed(recipe(models), folder)
    assert not left.exists()


def test_a_transform_that_fails_leaves_nothing_and_names_its_rule(models: Models, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "from merge_search.rules import transform\n@transform('bad')\ndef bad(sources, out):\n"
        "    'fails'\n    (out / 'half').mkdir()\n    raise KeyError('gone')\n"
    )
    use_rule_files([tmp_path / "bad.py"])
    with pytest.raises(RecipeError, match=r"bad.py:2: transform 'bad': the transform failed: KeyError: 'gone'"):
        store.transformed(Recipe(models=models, transform=Transform(name="bad")), tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


def test_unknown_names_and_options_are_refused_with_the_nearest_known_one(models: Models, tmp_path: Path) -> None:
    for transform, problem in (
        (Transform(name="scale"), "unknown transform 'scale'; did you mean 'scaled'"),
        (Transform(name="scaled", options={"factr": 1.0}), "'scaled' has no option 'factr'; did you mean 'factor'"),
        (Transform(name="scaled", options={"factor": -1.0}), "the factor must be positive, got -1"),
    ):
        with pytest.raises(RecipeError, match=problem):
            store.transformed(Recipe(models=models, transform=transform), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_model_of_other_shapes_is_refused_by_what_does_not_align(models: Models, tmp_path: Path) -> None:
    wide = save(make_model(hidden_size=48), tmp_path / "wide")
    odd = models.model_copy(update={"experts": {**models.experts, "wide": str(wide)}})
    with pytest.raises(RecipeError, match=r"'scaled' needs fine-tunes of the base: expert 'wide'.*\[21, 32\]"):
        store.transformed(recipe(odd), tmp_path / "kept")
    alone = Recipe(models=odd, transform=Transform(name="alone", options={"model": "wide"}))
    assert store.transformed(alone, tmp_path / "kept").base == wide


def test_a_recipe_alone_gives_the_merge_of_what_its_transform_makes(models: Models, tmp_path: Path) -> None:
    """A merge by half of each coefficient is the merge by the coefficients of experts with half their deltas."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "user_transforms.py").write_bytes(USERS.read_bytes())
    whole = recipe(models, factor=0.5).model_copy(update={"coefficients": {"a": 1.0, "b": 0.5}})
    (folder / "recipe.json").write_text(whole.to_json())
    digest = merge_recipe(folder / "recipe.json", tmp_path / "out", device="cpu")
    assert digest == hash_folder(tmp_path / "out")
    plain = Recipe(models=models, coefficients={"a": 0.5, "b": 0.25})
    (folder / "plain.json").write_text(plain.to_json())
    merge_recipe(folder / "plain.json", tmp_path / "plain", device="cpu")
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert all((one[n] - two[n]).abs().max() < 1e-5 for n in two)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models", "out", "plain", "recipes"]  # nothing is left over
    again = merge_recipe(tmp_path / "out" / "recipe.json", tmp_path / "again", device="cpu")
    assert again == digest


def test_a_result_without_experts_is_exported_as_it_is(models: Models, tmp_path: Path) -> None:
    (tmp_path / "user_transforms.py").write_bytes(USERS.read_bytes())
    soup = Recipe(models=models, transform=Transform(name="soup"))
    (tmp_path / "recipe.json").write_text(soup.to_json())
    digest = merge_recipe(tmp_path / "recipe.json", tmp_path / "out", device="cpu")
    made = store.transformed(soup, tmp_path / "kept")
    assert made.experts == {}
    assert digest == hash_folder(tmp_path / "out") == hash_folder(made.base)


def test_a_recipe_without_a_transform_keeps_its_text_and_fingerprint(models: Models) -> None:
    plain, scaled = Recipe(models=models), recipe(models)
    assert "transform" not in plain.to_json()
    assert plain.fingerprint != scaled.fingerprint != recipe(models, factor=0.4).fingerprint
    assert Recipe.from_json(scaled.to_json()) == scaled
    assert scaled.rules.keys() == {"user_transforms.py"}
