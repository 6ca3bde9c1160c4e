"""Recipes as mergekit's YAML: they come back as they were, and mergekit itself makes the same model.

Set MERGE_SEARCH_MERGEKIT to the program ``mergekit-yaml`` to compare with the real one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit_files import llama_names, model, read, slices, task_arithmetic
from safetensors.torch import load_file

from merge_search.engine.checkpoints.headers import read_checkpoint
from merge_search.engine.checkpoints.layout import layout, name_groups
from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.pool import ModelPool
from merge_search.errors import RecipeError
from merge_search.mergekit import read_mergekit, to_mergekit
from merge_search.mergekit.filters import as_value
from merge_search.mergekit.values import evaluate, shorten
from merge_search.presets import preset
from merge_search.recipe import Group, Models, Recipe, Transform, value_for

GROUPS = name_groups(llama_names(12))

KEYS = sorted({key for group in GROUPS.values() for key in Group.keys(group)} - {"*"})


def round_trip(recipe: Recipe, folders: Path) -> Recipe:
    groups = layout(read_checkpoint(folders / "base"))
    return read_mergekit(to_mergekit(recipe, groups))


class TestWriting:
    @pytest.mark.parametrize(
        "data",
        [
            task_arithmetic(
                model("a", weight=0.3), model("b", weight=[0, 1]), parameters={"lambda": [1, 0.5]}, dtype="bfloat16"
            ),
            {
                **task_arithmetic(model("a", weight=1, density=[0.1, 0.9]), model("b", weight=2, density=0.4)),
                "merge_method": "ties",
            },
            {
                **task_arithmetic(model("a", weight=1, density=0.5)),
                "merge_method": "dare_ties",
                "parameters": {"normalize": True},
            },
            {**task_arithmetic(model("a", weight=1, density=0.5, epsilon=0.2)), "merge_method": "della_linear"},
            {
                **task_arithmetic(model("a", weight=1, density=0.5, gamma=0.1)),
                "merge_method": "breadcrumbs",
                "parameters": {"rescale": True},
            },
            {
                **task_arithmetic(model("a")),
                "merge_method": "slerp",
                "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.2}]},
            },
            {"merge_method": "nuslerp", "models": [model("a", weight=1), model("b", weight=3)]},
            {
                **task_arithmetic(model("a", weight=1), model("b", weight=3)),
                "merge_method": "nuslerp",
                "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
            },
            {
                "merge_method": "multislerp",
                "models": [model("a", weight=1), model("b", weight=3), model("c", weight=2)],
            },
            {**task_arithmetic(model("a", weight=1), model("b", weight=3)), "merge_method": "multislerp"},
            {"merge_method": "karcher", "models": [model("a"), model("b")], "parameters": {"max_iter": 5}},
            {
                **task_arithmetic(model("a"), model("b")),
                "merge_method": "model_stock",
                "parameters": {"filter_wise": True},
            },
            {**task_arithmetic(model("a"), model("b")), "merge_method": "sce", "parameters": {"select_topk": 0.2}},
            {**task_arithmetic(model("a")), "merge_method": "nearswap", "parameters": {"t": 0.01}},
            {**task_arithmetic(model("a")), "merge_method": "arcee_fusion"},
            {"merge_method": "linear", "models": [model("a", weight=1), model("b", weight=[0, 3])]},
            {"merge_method": "passthrough", "slices": slices(([0, 2], [model("a")]), ([2, 5], [model("b")]))},
        ],
        ids=lambda data: data["merge_method"],
    )
    def test_what_was_read_is_written_back(self, llama_folders: Path, data: dict) -> None:
        recipe = read(llama_folders, data)
        again = round_trip(recipe, llama_folders)
        assert again.fingerprint == recipe.fingerprint
        assert again.models == recipe.models

    def test_a_transform_is_refused_with_the_reason(self) -> None:
        models = Models(base="org/base", experts={"a": "org/a"})
        recipe = preset("task_arithmetic", models).model_copy(update={"transform": Transform(name="mal")})
        with pytest.raises(RecipeError, match="transform: 'mal' makes other models before the merge"):
            to_mergekit(recipe, GROUPS)

    @settings(max_examples=40, deadline=None)
    @given(
        table=st.dictionaries(st.sampled_from(KEYS), st.sampled_from([0.0, 0.5, 1.25]), max_size=8),
        rest=st.sampled_from([0.0, 0.5]),
    )
    def test_any_numbers_by_group_survive_as_filters(self, table: dict[str, float], rest: float) -> None:
        wanted = {n: value_for({**table, "*": rest}, g) for n, g in GROUPS.items()}
        value = as_value(wanted, GROUPS)
        assert {n: evaluate(value, n, 0.0, "", []) for n in GROUPS} == wanted
        short = shorten(wanted, GROUPS.values())
        assert {n: value_for(short, g) for n, g in GROUPS.items()} == wanted

    def test_module_kinds_and_blocks_are_named_by_short_filters(self) -> None:
        models = Models(base="org/base", experts={"a": "org/a"})
        recipe = preset("task_arithmetic", models, coefficients={"a": {"attention": 0.5, "*": 0.25}})
        weight = yaml.safe_load(to_mergekit(recipe, GROUPS))["models"][0]["parameters"]["weight"]
        assert weight == [{"filter": "self_attn", "value": 0.5}, {"value": 0.25}]
        recipe = preset("task_arithmetic", models, coefficients={"a": {"block.1": 0.5, "*": 0.25}})
        weight = yaml.safe_load(to_mergekit(recipe, GROUPS))["models"][0]["parameters"]["weight"]
        assert weight == [{"filter": "model.layers.1.", "value": 0.5}, {"value": 0.25}]

    def test_the_base_s_dtype_is_kept_while_computing_in_float32(self) -> None:
        recipe = preset("task_arithmetic", Models(base="org/base", experts={"a": "org/a"}))
        data = yaml.safe_load(to_mergekit(recipe, GROUPS, dtype="bfloat16"))
        assert (data["dtype"], data["out_dtype"]) == ("float32", "bfloat16")
        assert "dtype" not in yaml.safe_load(to_mergekit(recipe, GROUPS))

    def test_vectors_that_stay_whole_get_density_one(self) -> None:
        recipe = preset(
            "ties_mergekit", Models(base="org/base", experts={"a": "org/a"}), select={"kind": "top_k"}, densities=0.5
        )
        vectors = [n for n in GROUPS if "norm" in n]
        with pytest.raises(RecipeError, match=r"select\.vectors"):
            to_mergekit(recipe, GROUPS)
        data = yaml.safe_load(to_mergekit(recipe, GROUPS, vectors=vectors))
        density = data["models"][0]["parameters"]["density"]
        assert {n: evaluate(density, n, 0.0, "", []) for n in GROUPS} == {
            n: 1.0 if n in vectors else 0.5 for n in GROUPS
        }

    def test_small_differences_are_told_in_comments(self) -> None:
        recipe = preset("ties_mergekit", Models(base="org/base", experts={"a": "org/a"}), densities=0.5)
        assert to_mergekit(recipe, GROUPS).startswith("# mergekit rounds counts of kept elements down")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("ties", "resolve: "),
            ("pcb", "winsorise: "),
            ("fisher", "splice: "),
            ("magmax", "no 'argmax' mixing"),
            ("cabs", "no selection 'n_m'"),
            ("dare", "not by 'inverse_density'"),
            ("sce", "floor: 1e-6"),
            ("consensus", "gate"),
        ],
    )
    def test_what_mergekit_cannot_say_is_refused_with_the_reason(self, name: str, message: str) -> None:
        recipe = preset(name, Models(base="org/base", experts={"a": "org/a", "b": "org/b"}))
        with pytest.raises(RecipeError, match=message):
            to_mergekit(recipe, GROUPS)

    def test_negative_coefficients_are_said_unless_some_cancel(self) -> None:
        models = Models(base="org/base", experts={"a": "org/a", "b": "org/b"})
        text = to_mergekit(preset("ties_mergekit", models, coefficients={"a": 1.0, "b": -0.5}), GROUPS, vectors=())
        assert yaml.safe_load(text)["models"][1]["parameters"]["weight"] == -0.5
        with pytest.raises(RecipeError, match="must not sum to 0"):
            to_mergekit(preset("ties_mergekit", models, coefficients={"a": 1.0, "b": -1.0}), GROUPS, vectors=())

    def test_all_reasons_are_given_at_once(self) -> None:
        recipe = preset(
            "pcb", Models(base="org/base", experts={"a": "org/a"}), post=[{"name": "svc"}], maps={"a": "0" * 64}
        )
        with pytest.raises(RecipeError) as caught:
            to_mergekit(recipe, GROUPS)
        text = str(caught.value)
        for word in ("winsorise", "select", "splice", "post", "maps"):
            assert f"- {word}" in text


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties", "breadcrumbs", "slerp", "karcher", "sce"])
def test_mergekit_itself_makes_the_same_model(zoo: Path, tmp_path: Path, method: str) -> None:
    """Float32 checkpoints: differences of rounding only."""
    program = os.environ.get("MERGE_SEARCH_MERGEKIT") or ""
    if not shutil.which(program):
        pytest.skip("MERGE_SEARCH_MERGEKIT does not name mergekit-yaml")
    names = ["intent"] if method == "slerp" else ["intent", "qtype", "where"]
    has_weights = method in ("linear", "ties", "breadcrumbs")
    density = {"density": 0.37} if method in ("ties", "breadcrumbs") else {}
    parameters = [{"weight": [0.2, 0.1 * i + 0.5], **density} if has_weights else {} for i, _ in enumerate(names)]
    data = {
        "merge_method": method,
        "dtype": "float32",
        "models": [model(str(zoo / "lm" / n), **p) for n, p in zip(names, parameters, strict=True)],
        **({} if method in ("linear", "karcher") else {"base_model": str(zoo / "lm" / "base")}),
        "parameters": {
            "slerp": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.3}]},
            "sce": {"select_topk": 0.3},
        }.get(method, {}),
    }
    recipe = read(tmp_path, data)
    command = [program, str(tmp_path / "merge.yml"), str(tmp_path / "out"), "--quiet", "--no-copy-tokenizer"]
    subprocess.run(command, check=True, capture_output=True)
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    for tensor, ours in MergeEngine(ModelPool(recipe.models, device="cpu")).merged(recipe):
        torch.testing.assert_close(ours, theirs[tensor], rtol=1e-5, atol=1e-6)
