"""A rule from outside is a rule like any other: the same bits on every path, and its file goes with the recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import here
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.execute.runner import has_compiler
from merge_search.engine.reference import merge_tensor
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.streaming.engine import StreamingEngine
from merge_search.errors import RecipeError, RuleError
from merge_search.merge_recipe import merge_recipe
from merge_search.mergekit import to_mergekit
from merge_search.presets import preset
from merge_search.recipe import Models, Recipe
from merge_search.rules import MEASURES, SELECTIONS, use_rule_files

RULES = Path(__file__).parent.parent / "support" / "user_rules.py"
SHA256 = hashlib.sha256(RULES.read_bytes()).hexdigest()
SHAPES = {"model.layers.0.mlp.up_proj.weight": (70, 90), "model.layers.0.input_layernorm.weight": (90,)}
MATRIX = next(iter(SHAPES))

STAGES: dict[str, dict[str, Any]] = {
    "measure": {"assess": {"measure": "log_size"}, "select": {"kind": "top_k"}},
    "measure with an option": {"assess": {"measure": "log_size", "options": {"eps": 1}}, "splice": {"kind": "score"}},
    "measure that sharpens": {"assess": {"measure": "log_size"}, "splice": {"kind": "softmax", "temperature": 0.5}},
    "selection": {"assess": {"measure": "magnitude"}, "select": {"kind": "above_mean", "options": {"times": 1.2}}},
    "selection, each its own": {"select": {"kind": "above_mean", "exclusive": True}, "resolve": {"kind": "sum"}},
    "selection at random": {"select": {"kind": "lottery"}, "rescale": {"kind": "inverse_density"}, "seed": 3},
    "splice": {"splice": {"kind": "middle"}},
    "splice of what is left": {
        "select": {"kind": "top_k"}, "resolve": {"kind": "sum", "tie": "majority"}, "splice": {"kind": "middle"},
    },
}  # fmt: skip
WHOLE: dict[str, dict[str, Any]] = {
    "operator": {"operator": {"name": "median"}},
    "operator in parts": {"operator": {"name": "halved", "options": {"factor": 0.25}}},
    "post": {"post": [{"name": "clipped", "options": {"limit": 0.05}}]},
}
NUMBERS = {"coefficients": {"a": 0.7, "b": 0.4, "c": 1.1}, "densities": {"a": 0.4, "b": 0.5, "c": 0.6}, "scale": 0.9}


@pytest.fixture(autouse=True)
def rules_in_use() -> Iterator[None]:
    use_rule_files([RULES])
    yield
    use_rule_files([])


def random_tensors() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    experts = {e: {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for e in "abc"}
    return {"base": base, **experts}


@pytest.fixture(scope="module")
def tensors() -> MemoryTensors:
    made = random_tensors()
    return MemoryTensors(made.pop("base"), made)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of `random_tensors`, by name."""
    root = tmp_path_factory.mktemp("models")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
    for name, made in random_tensors().items():
        (root / name).mkdir()
        save_file(made, root / name / "model.safetensors", {"format": "pt"})
        (root / name / "config.json").write_text(json.dumps(config))
    return root


def recipe(models: Models, settings: dict[str, Any]) -> Recipe:
    return Recipe.from_dict({"models": models, **NUMBERS, **settings})


def merged(engine: MergeEngine, r: Recipe) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in engine.merged(r)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


# ------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("settings", {**STAGES, **WHOLE}.values(), ids={**STAGES, **WHOLE})
def test_every_kind_of_rule_has_the_same_bits_on_every_path(
    settings: dict[str, Any], tensors: MemoryTensors, folders: Path
) -> None:
    r = recipe(tensors.models, settings)
    in_chunks = merged(MergeEngine(tensors, compile=False), r)
    assert not torch.equal(in_chunks[MATRIX], tensors.base(MATRIX))
    if has_compiler(tensors.device):
        assert equal(merged(MergeEngine(tensors, compile=True), r), in_chunks)
    if r.operator is None and not r.post:
        assert equal({name: merge_tensor(r, tensors, name) for name in SHAPES}, in_chunks)
    models = Models(base=str(folders / "base"), experts={e: str(folders / e) for e in "abc"})
    streamed = StreamingEngine(ModelPool(models, device="cpu", streaming=True))
    assert equal(merged(streamed, r.model_copy(update={"models": models})), in_chunks)


def test_a_rule_does_what_its_function_says(tensors: MemoryTensors) -> None:
    engine = MergeEngine(tensors, compile=False)
    base, deltas = tensors.base(MATRIX), [tensors.expert(e, MATRIX) - tensors.base(MATRIX) for e in "abc"]
    coefficients = NUMBERS["coefficients"]
    weighted = [torch.tensor(c) * t for c, t in zip(coefficients.values(), deltas, strict=True)]
    middle = merged(engine, recipe(tensors.models, STAGES["splice"]))[MATRIX]
    assert torch.equal(middle, base + torch.tensor(0.9) * torch.stack(weighted).median(0).values)
    plain = merged(engine, recipe(tensors.models, {"select": {"kind": "above_mean"}}))[MATRIX]
    kept = [torch.where(t.abs() > t.abs().mean(), w, 0.0) for t, w in zip(deltas, weighted, strict=True)]
    torch.testing.assert_close(plain, base + 0.9 * sum(kept))
    soft = merged(engine, recipe(tensors.models, STAGES["measure with an option"]))[MATRIX]
    scores = [torch.log1p(t.abs()) for t in deltas]
    mean = sum(s * w for s, w in zip(scores, weighted, strict=True)) / sum(scores)
    torch.testing.assert_close(soft, base + 0.9 * mean)


def test_a_random_rule_depends_on_the_seed_and_keeps_its_share(tensors: MemoryTensors) -> None:
    engine = MergeEngine(tensors, compile=False)
    one, again, other = (
        merged(engine, recipe(tensors.models, {"select": {"kind": "lottery"}, "seed": seed})) for seed in (1, 1, 2)
    )
    assert equal(one, again)
    assert not equal(one, other)
    alone = {**NUMBERS, "coefficients": {"a": 1.0, "b": 0.0, "c": 0.0}, "select": {"kind": "lottery"}}
    kept = merged(engine, recipe(tensors.models, alone))[MATRIX] != tensors.base(MATRIX)
    assert abs(float(kept.float().mean()) - 0.4) < 0.02


def test_parts_of_a_decomposing_operator_add_up(tensors: MemoryTensors) -> None:
    engine = MergeEngine(tensors, compile=False)
    r = recipe(tensors.models, WHOLE["operator in parts"])
    experts, parts = engine.parts(r, MATRIX)
    total = sum(r.coefficients[e] * part for e, part in zip(experts, parts, strict=True))
    torch.testing.assert_close(merged(engine, r)[MATRIX], tensors.base(MATRIX) + total)
    with pytest.raises(RecipeError, match="splice 'middle' is not declared linear"):
        engine.parts(recipe(tensors.models, STAGES["splice"]), MATRIX)


def test_a_preset_of_the_file_is_a_recipe(tensors: MemoryTensors) -> None:
    made = preset("log_ties", tensors.models)
    assert (made.assess.measure, made.densities["a"], made.rules) == ("log_size", 0.4, {"user_rules.py": SHA256})
    merged(MergeEngine(tensors, compile=False), made)


def test_mergekit_cannot_say_it(tensors: MemoryTensors) -> None:
    with pytest.raises(RecipeError, match="mergekit has no rule from outside"):
        to_mergekit(recipe(tensors.models, STAGES["measure"]), tensors.groups)


# ------------------------------------------------------------------------------------------------ recipes


def test_a_recipe_names_the_file_of_its_rules_and_counts_its_content(tensors: MemoryTensors) -> None:
    plain = recipe(tensors.models, {"select": {"kind": "top_k"}})
    assert plain.rules == {}
    assert '"rules"' not in plain.to_json()
    named = recipe(tensors.models, STAGES["measure"])
    assert named.rules == {"user_rules.py": SHA256}
    assert Recipe.from_json(named.to_json()) == named
    moved = named.model_copy(update={"rules": {"other_name.py": SHA256}})
    changed = named.model_copy(update={"rules": {"user_rules.py": "0" * 64}})
    assert moved.fingerprint == named.fingerprint
    assert changed.fingerprint != named.fingerprint


def test_a_stored_recipe_is_read_without_its_rules_and_merged_only_with_them(tensors: MemoryTensors) -> None:
    text = recipe(tensors.models, STAGES["selection"]).to_json()
    use_rule_files([])
    stored = Recipe.from_json(text)
    assert stored.to_json() == text
    (problem,) = MergeEngine(tensors, compile=False).check(stored)
    assert "user_rules.py" in problem
    assert SHA256[:12] in problem
    with pytest.raises(RecipeError, match="must name a selection, got 'above_mean'"):
        recipe(tensors.models, STAGES["selection"])


@pytest.mark.parametrize("name", ["a/b.py", "rules.txt", ""])
def test_a_recipe_names_a_rule_file_without_its_folder(name: str, tensors: MemoryTensors) -> None:
    with pytest.raises(RecipeError, match="named without its folder"):
        recipe(tensors.models, {"rules": {name: SHA256}})


# ------------------------------------------------------------------------------------------------ files


def write_recipe(folder: Path, folders: Path, settings: dict[str, Any]) -> Path:
    models = Models(base=str(folders / "base"), experts={e: str(folders / e) for e in "abc"})
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.json"
    path.write_text(recipe(models, settings).to_json())
    return path


def test_a_merge_runs_the_rules_beside_its_recipe_and_hands_them_on(folders: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "given", folders, STAGES["measure"])
    (path.parent / "user_rules.py").write_bytes(RULES.read_bytes())
    use_rule_files([])
    notes: list[str] = []
    digest = merge_recipe(path, tmp_path / "first", device="cpu", note=notes.append)
    assert notes == [f"runs the rule file {path.parent / 'user_rules.py'}, which the recipe names"]
    assert (tmp_path / "first" / "rules" / "user_rules.py").read_bytes() == RULES.read_bytes()
    use_rule_files([])
    assert merge_recipe(tmp_path / "first" / "recipe.json", tmp_path / "second", device="cpu") == digest
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert equal(first, second)


def test_a_merge_refuses_other_rules_than_those_of_the_recipe(folders: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "given", folders, STAGES["measure"])
    done = here("merge", path, tmp_path / "out", check=False)
    assert done.returncode == 2
    assert "the recipe needs the rule file user_rules.py" in done.stderr
    other = path.parent / "user_rules.py"
    other.write_bytes(RULES.read_bytes() + b"\nraise SystemExit('never run')\n")
    done = here("merge", path, tmp_path / "out", check=False)
    assert done.returncode == 2
    assert f"{other} is not the file that the recipe was made with" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_rules_in_use_are_those_of_the_last_files_named(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from merge_search.rules import measure\n"
        "@measure()\ndef mine(context):\n    'mine'\n    return context.deltas\n"
    )
    use_rule_files([own])
    assert "mine" in MEASURES
    assert "log_size" not in MEASURES
    use_rule_files([own, RULES])
    assert {"mine", "log_size"} <= set(MEASURES)
    assert SELECTIONS["above_mean"].options == {"times": 1.0}
    use_rule_files([])
    assert not {"mine", "log_size"} & set(MEASURES)


def test_an_edited_file_is_run_again(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    text = (
        "from merge_search.rules import measure\n@measure()\ndef mine(context):\n    '{}'\n    return context.deltas\n"
    )
    for summary in ("one", "two"):
        own.write_text(text.format(summary))
        use_rule_files([own])
        assert MEASURES["mine"].summary == summary


def test_the_rules_of_the_example_and_of_the_page_can_be_used(tmp_path: Path, tensors: MemoryTensors) -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "study-file.md").read_text(encoding="utf-8")
    (tmp_path / "on_the_page.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    for file, names in (
        (root / "examples" / "rules" / "my_rules.py", ("log_ties", "whitened")),
        (tmp_path / "on_the_page.py", ("log_ties",)),
    ):
        use_rule_files([file])
        for name in names:
            merged(MergeEngine(tensors, compile=False), preset(name, tensors.models))


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "user_rules.py").write_bytes(RULES.read_bytes())
    with pytest.raises(RuleError, match=r"two rule files are called user_rules\.py"):
        use_rule_files([RULES, tmp_path / "user_rules.py"])
    assert "log_size" not in MEASURES
