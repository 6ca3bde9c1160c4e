"""mergekit's YAML as recipes. Expected numbers were measured on mergekit 0.1.5 or computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mergekit_files import model, read, slices, task_arithmetic, weight_of, weights
from safetensors.torch import load_file

from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.pool import ModelPool
from merge_search.errors import RecipeError
from merge_search.merge_recipe import merge_recipe
from merge_search.mergekit import read_mergekit
from merge_search.mergekit.values import gradient_at
from merge_search.recipe import Recipe, Transform


class TestGradients:
    def test_two_anchors_over_five_layers_are_evenly_spaced(self, llama_folders: Path) -> None:
        recipe = read(llama_folders, task_arithmetic(model("a", weight=[0, 1])))
        assert weights(recipe, "a") == [0, 0.25, 0.5, 0.75, 1]

    def test_three_anchors_have_their_middle_on_the_middle_layer(self, llama_folders: Path) -> None:
        recipe = read(llama_folders, task_arithmetic(model("a", weight=[0, 1, 5])))
        assert weights(recipe, "a") == [0, 0.5, 1, 3, 5]

    def test_tensors_outside_the_layers_take_the_first_anchor(self, llama_folders: Path) -> None:
        recipe = read(llama_folders, task_arithmetic(model("a", weight=[2, 1])))
        for tensor in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert weight_of(recipe, "a", tensor) == 2

    def test_a_gradient_runs_over_the_layers_of_its_slice_and_one_layer_stands_at_the_end(
        self, llama_folders: Path
    ) -> None:
        parts = slices(([0, 1], [model("base"), model("a")]), ([1, 5], [model("base"), model("a")]))
        parts[0]["parameters"], parts[1]["parameters"] = {"weight": [3, 4]}, {"weight": [5, 6, 8]}
        recipe = read(llama_folders, {"merge_method": "task_arithmetic", "base_model": "base", "slices": parts})
        assert weights(recipe, "a") == pytest.approx([4, 5, 5 + 2 / 3, 6 + 2 / 3, 8])
        assert weight_of(recipe, "a", "model.embed_tokens.weight") == 3
        assert weight_of(recipe, "a", "model.norm.weight") == 5

    @given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0, 1))
    def test_a_gradient_stays_between_its_anchors(self, anchors: list[float], t: float) -> None:
        assert min(anchors) - 1e-9 <= gradient_at(anchors, t) <= max(anchors) + 1e-9


class TestFilters:
    def test_the_first_filter_that_is_part_of_the_name_applies(self, llama_folders: Path) -> None:
        conditions = [{"filter": "self_attn", "value": [1, 3]}, {"filter": "q_proj", "value": 77}, {"value": 0.5}]
        recipe = read(llama_folders, task_arithmetic(model("a", weight=conditions)))
        assert weights(recipe, "a", "self_attn.q_proj") == [1, 1.5, 2, 2.5, 3]
        assert weights(recipe, "a") == [0.5] * 5

    def test_a_filter_may_name_a_layer(self, llama_folders: Path) -> None:
        recipe = read(
            llama_folders, task_arithmetic(model("a", weight=[{"filter": "layers.3.", "value": 3}, {"value": 1}]))
        )
        assert weights(recipe, "a") == [1, 1, 1, 3, 1]

    def test_what_the_model_leaves_open_comes_from_the_file(self, llama_folders: Path) -> None:
        models = [model("a", weight=[{"filter": "self_attn", "value": 1}])]
        recipe = read(llama_folders, task_arithmetic(*models, parameters={"weight": [10, 20]}))
        assert weights(recipe, "a") == [10, 12.5, 15, 17.5, 20]
        assert weights(recipe, "a", "self_attn.o_proj") == [1] * 5

    def test_one_value_for_everything_needs_no_table(self, llama_folders: Path) -> None:
        recipe = read(llama_folders, task_arithmetic(model("a", weight=[{"filter": "*", "value": 2}])))
        assert recipe.coefficients == {"a": 2.0}


class TestMethods:
    def test_linear_divides_by_the_sum_of_all_weights(self, llama_folders: Path) -> None:
        recipe = read(llama_folders, {"merge_method": "linear", "models": [model("a", weight=1), model("b", weight=3)]})
        assert recipe.models.base == str(llama_folders / "a")
        assert recipe.coefficients == {"b": 0.75}

    def test_task_arithmetic_leaves_weights_as_they_are_and_takes_lambda_as_scale(self, llama_folders: Path) -> None:
        recipe = read(llama_folders, task_arithmetic(model("a", weight=0.5), parameters={"lambda": 0.7}))
        assert recipe.coefficients == {"a": 0.5}
        assert recipe.scale == 0.7

    def test_ties_trims_each_tensor_and_divides_by_the_weights_that_agree(self, llama_folders: Path) -> None:
        recipe = read(
            llama_folders,
            {**task_arithmetic(model("a", weight=1, density=0.2), model("b", weight=2)), "merge_method": "ties"},
        )
        assert (recipe.select.kind, recipe.select.rounding, recipe.select.vectors) == ("top_k", "down", True)
        assert (recipe.resolve.kind, recipe.resolve.weighted, recipe.splice.kind) == ("sum", True, "coefficient")
        assert recipe.densities == {"a": 0.2}

    def test_negative_weights_vote_with_their_sign_as_in_mergekit(self, llama_folders: Path) -> None:
        weights = {"a": 1.0, "b": -0.6, "c": 0.3}
        models = [model(m, weight=w) for m, w in weights.items()]
        recipe = read(llama_folders, {**task_arithmetic(*models), "merge_method": "ties"})
        files = {m: load_file(llama_folders / m / "model.safetensors") for m in ("base", *weights)}
        for name, merged in MergeEngine(ModelPool(recipe.models, device="cpu"), compile=False).merged(recipe):
            said = torch.stack([w * (files[m][name] - files["base"][name]) for m, w in weights.items()])
            agrees = said.sign() == (said.sum(0) >= 0) * 2 - 1
            total = (torch.tensor(list(weights.values()))[:, None, None] * agrees).sum(0)
            expected = files["base"][name] + (said * agrees).sum(0) / torch.where(total == 0, 1.0, total)
            torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("method", ["dare_ties", "breadcrumbs_ties", "dare_linear", "breadcrumbs"])
    def test_only_ties_and_della_normalise_by_default(self, llama_folders: Path, method: str) -> None:
        data = {**task_arithmetic(model("a", weight=1, density=0.2), model("b", weight=2)), "merge_method": method}
        recipe = read(llama_folders, data)
        assert recipe.splice.kind == "sum"
        assert recipe.coefficients == {"b": 2.0}
        assert (
            read(llama_folders, {**data, "merge_method": "della", "parameters": {"epsilon": 0.1}}).splice.kind
            == "coefficient"
        )

    @pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
    def test_random_masks_match_the_old_l1_norm_unless_told_otherwise(self, llama_folders: Path, method: str) -> None:
        data = {**task_arithmetic(model("a", weight=1, density=0.5)), "merge_method": method}
        assert read(llama_folders, data).rescale.kind == "match_l1"
        assert read(llama_folders, {**data, "parameters": {"rescale": False}}).rescale.kind == "none"

    def test_a_base_that_is_listed_is_no_expert_of_delta_methods(self, llama_folders: Path) -> None:
        recipe = read(llama_folders, task_arithmetic(model("base", weight=5), model("a", weight=1)))
        assert list(recipe.models.experts) == ["a"]

    def test_a_model_that_a_slice_leaves_out_weighs_nothing_there(self, llama_folders: Path) -> None:
        base = model("base")
        parts = slices(
            ([0, 2], [base, model("a", weight=1), model("b", weight=1)]), ([2, 5], [base, model("b", weight=2)])
        )
        recipe = read(llama_folders, {"merge_method": "task_arithmetic", "base_model": "base", "slices": parts})
        assert weights(recipe, "a") == [1, 1, 0, 0, 0]
        assert weights(recipe, "b") == [1, 1, 2, 2, 2]

    def test_a_weight_that_is_missing_in_one_slice_is_refused(self, llama_folders: Path) -> None:
        base = model("base")
        parts = slices(([0, 2], [base, model("b", weight=1)]), ([2, 5], [base, model("a"), model("b", weight=2)]))
        with pytest.raises(RecipeError, match=r"parameters\.weight of a: must be given"):
            read(llama_folders, {"merge_method": "task_arithmetic", "base_model": "base", "slices": parts})

    def test_passthrough_takes_every_layer_from_one_model(self, llama_folders: Path) -> None:
        parts = slices(([0, 2], [model("a")]), ([2, 5], [model("b")]))
        recipe = read(llama_folders, {"merge_method": "passthrough", "slices": parts, "dtype": "float32"})
        merged = dict(MergeEngine(ModelPool(recipe.models, device="cpu")).merged(recipe))
        a, b = (load_file(llama_folders / n / "model.safetensors") for n in "ab")
        for tensor, found in merged.items():
            layer = int(tensor.split(".")[2]) if "layers" in tensor else 0 if "embed" in tensor else 5
            torch.testing.assert_close(found, (a if layer < 2 else b)[tensor], rtol=2e-7, atol=1e-7)

    def test_karcher_counts_the_first_model_as_a_point(self, llama_folders: Path) -> None:
        recipe = read(llama_folders, {"merge_method": "karcher", "models": [model("a"), model("b"), model("c")]})
        merged = dict(MergeEngine(ModelPool(recipe.models, device="cpu")).merged(recipe))
        by_base = Recipe.from_dict(
            {
                "models": {"base": str(llama_folders / "base"), "experts": {n: str(llama_folders / n) for n in "abc"}},
                "operator": {"name": "karcher"},
            }
        )
        for tensor, wanted in MergeEngine(ModelPool(by_base.models, device="cpu")).merged(by_base):
            torch.testing.assert_close(merged[tensor], wanted, rtol=1e-5, atol=1e-6)

    def test_model_stock_by_rows_treats_each_row_as_a_tensor_of_its_own(self, llama_folders: Path) -> None:
        """t = M cos / (1 + (M - 1) cos) of each row, applied to the mean of its deltas."""
        models = [model("a"), model("b")]
        data = {
            "merge_method": "model_stock",
            "base_model": "base",
            "models": models,
            "parameters": {"filter_wise": True},
        }
        recipe = read(llama_folders, data)
        merged = dict(MergeEngine(ModelPool(recipe.models, device="cpu")).merged(recipe))
        name = "model.layers.1.mlp.up_proj.weight"
        base, a, b = (load_file(llama_folders / n / "model.safetensors")[name].double() for n in ("base", "a", "b"))
        for row in range(8):
            x, y = a[row] - base[row], b[row] - base[row]
            cos = x @ y / (x.norm() * y.norm())
            wanted = base[row] + 2 * cos / (1 + cos) * (x + y) / 2
            torch.testing.assert_close(merged[name][row].double(), wanted, rtol=1e-5, atol=1e-6)

    def test_numbers_in_quotes_and_the_output_dtype_are_read(self, llama_folders: Path) -> None:
        data = task_arithmetic(model("a", weight="0.5"), dtype="float32", out_dtype="bfloat16")
        recipe = read(llama_folders, data)
        assert recipe.coefficients == {"a": 0.5}
        assert recipe.dtype == "bfloat16"

    def test_int8_mask_changes_nothing(self, llama_folders: Path) -> None:
        plain = read(llama_folders, task_arithmetic(model("a", weight=1)))
        assert read(llama_folders, task_arithmetic(model("a", weight=1), parameters={"int8_mask": True})) == plain

    def test_sce_weighs_experts_alike_where_their_deltas_are_tiny(self, llama_folders: Path) -> None:
        """Below mergekit's limit of 1e-6 for the sum of energies, and with nothing dropped: the mean of the deltas."""
        from merge_search.engine.resident.in_memory import MemoryTensors

        data = {"merge_method": "sce", "base_model": "base", "models": [model("a"), model("b")]}
        recipe = read(llama_folders, data)
        for size, shares in ((1e-4, (0.5, 0.5)), (1.0, (0.1, 0.9))):
            experts = {"a": {"w": torch.full((4, 4), 1 + size)}, "b": {"w": torch.full((4, 4), 1 + 3 * size)}}
            tensors = MemoryTensors({"w": torch.ones(4, 4)}, experts)
            ((_, merged),) = MergeEngine(tensors, compile=False).merged(recipe)
            torch.testing.assert_close(
                merged - 1, torch.full((4, 4), (shares[0] + 3 * shares[1]) * size), rtol=2e-3, atol=0
            )

    def test_counts_are_rounded_down_and_a_band_gives_way_at_the_top(self) -> None:
        """Measured: of 64 entries density 0.85 keeps 54; density 0.9999 and gamma 0.1 keep 63 and drop the top one."""
        from merge_search.engine.resident.in_memory import MemoryTensors

        ramp = torch.randperm(64, generator=torch.Generator().manual_seed(0)).float() + 1
        tensors = MemoryTensors({"w": torch.zeros(64)}, {"a": {"w": ramp}})
        for density, gamma, kept, top in ((0.85, 0.0, 54, 64), (0.85, 0.1, 54, 58), (0.9999, 0.1, 63, 63)):
            select = {"kind": "band", "gamma": gamma, "vectors": True, "rounding": "down"}
            recipe = Recipe.from_dict(
                {"models": {"base": "b", "experts": {"a": "a"}}, "select": select, "densities": {"a": density}}
            )
            ((_, merged),) = MergeEngine(tensors, compile=False).merged(recipe)
            assert (int((merged != 0).sum()), float(merged.max())) == (kept, top)


class TestPlaces:
    def test_models_beside_the_file_are_found_and_named_by_their_folders(self, llama_folders: Path) -> None:
        recipe = read(llama_folders, task_arithmetic(model("./a", weight=1), model("b/", weight=1)))
        assert recipe.models.experts == {"a": str(llama_folders / "a"), "b": str(llama_folders / "b")}

    def test_models_in_the_working_directory_are_found(
        self, llama_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(llama_folders)
        file = tmp_path / "elsewhere.yml"
        file.write_text(yaml.safe_dump(task_arithmetic(model("a", weight=1))))
        assert read_mergekit(file).models.base == str(llama_folders / "base")

    def test_hub_ids_stay_as_they_are_and_equal_names_are_numbered(self) -> None:
        text = yaml.safe_dump(
            {
                **task_arithmetic(model("one/model-7b", weight=1), model("two/model-7b", weight=1)),
                "base_model": "org/base",
            }
        )
        recipe = read_mergekit(text)
        assert recipe.models.base == "org/base"
        assert recipe.models.experts == {"model-7b": "one/model-7b", "model-7b_2": "two/model-7b"}


REFUSED = {
    "merge_method: 'tise' is not supported; did you mean 'ties'": {
        **task_arithmetic(model("a", weight=1)),
        "merge_method": "tise",
    },
    "base_model: task_arithmetic needs it": {"merge_method": "task_arithmetic", "models": [model("a", weight=1)]},
    "parameters.weight of a: must be given": task_arithmetic(model("a")),
    "unknown parameter; did you mean 'density'": task_arithmetic(model("a", weight=1, densty=1)),
    "dypte: unknown key": task_arithmetic(model("a", weight=1), dypte="float32"),
    "dtype: must be one of": task_arithmetic(model("a", weight=1), dtype="bf16"),
    "tokenizer_source: only the base's": task_arithmetic(model("a", weight=1), tokenizer_source="union"),
    r"tokenizer\.source: only the base's": task_arithmetic(model("a", weight=1), tokenizer={"source": "a"}),
    r"tokenizer\.tokens: not supported": task_arithmetic(
        model("a", weight=1), tokenizer={"source": "base", "tokens": {}}
    ),
    "chat_template: the base's": task_arithmetic(model("a", weight=1), chat_template="chatml"),
    r"models\[0\].model: 'model\+adapter'": task_arithmetic(model("a+lora", weight=1)),
    r"models\[0\].model: revisions": task_arithmetic(model("org/a@v2", weight=1)),
    "listed twice": task_arithmetic(model("a", weight=1), model("./a", weight=1)),
    "must be above 0": {**task_arithmetic(model("a", weight=1, density=0)), "merge_method": "ties"},
    "must not sum to 0 where signs": {
        **task_arithmetic(model("a", weight=1), model("b", weight=-1)),
        "merge_method": "ties",
    },
    "density -\\+ epsilon must lie in": {**task_arithmetic(model("a", weight=1, density=0.1)), "merge_method": "della"},
    "must sum to 1 where normalize is off": {
        "merge_method": "linear",
        "models": [model("a", weight=1), model("b", weight=1)],
        "parameters": {"normalize": False},
    },
    "slerp takes 1 beside the base": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [model("a"), model("b")],
        "parameters": {"t": 0.5},
    },
    "layers of different depth": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [
            {
                "sources": [
                    {"model": "base", "layer_range": [0, 5]},
                    {"model": "a", "layer_range": [0, 4], "parameters": {"weight": 1}},
                ]
            }
        ],
    },
    "layers from 0 to 4, got 5": {
        "merge_method": "passthrough",
        "slices": slices(([0, 4], [model("a")]), ([2, 6], [model("b")])),
    },
    "cannot be scaled": {
        "merge_method": "passthrough",
        "slices": slices(([0, 2], [model("a", scale=2)]), ([2, 5], [model("b")])),
    },
    "modules: several modules": {"merge_method": "linear", "modules": {}},
    "must be a number, a list": task_arithmetic(model("a", weight="much")),
}


class TestStacks:
    """mergekit 0.1.5 makes a layer of the merged model from each layer of each slice, in their order."""

    def test_passthrough_with_repeated_layers_copies_every_layer_from_its_source(
        self, llama_folders: Path, tmp_path: Path
    ) -> None:
        parts = slices(([0, 4], [model("a")]), ([2, 5], [model("b")]))
        recipe = read(llama_folders, {"merge_method": "passthrough", "slices": parts})
        assert recipe.transform == Transform(name="stack", options={"layers": "0 1 2 3 2 3 4"})
        (tmp_path / "recipe.json").write_text(recipe.to_json())
        merge_recipe(tmp_path / "recipe.json", tmp_path / "out", device="cpu")
        made = load_file(tmp_path / "out" / "model.safetensors")
        a, b = (load_file(llama_folders / n / "model.safetensors") for n in "ab")
        for new, (source, old) in enumerate([(a, 0), (a, 1), (a, 2), (a, 3), (b, 2), (b, 3), (b, 4)]):
            name = "model.layers.{}.mlp.up_proj.weight"
            torch.testing.assert_close(made[name.format(new)], source[name.format(old)])
        assert len(made) == 7 * 9 + 3
        torch.testing.assert_close(made["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
        torch.testing.assert_close(made["lm_head.weight"], b["lm_head.weight"])
        assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 7

    def test_numbers_belong_to_the_layers_of_the_merged_model(self, llama_folders: Path) -> None:
        parts = slices(([0, 2], [model("base"), model("a")]), ([1, 4], [model("base"), model("a")]))
        parts[1]["parameters"] = {"weight": [1, 3]}
        data = {"merge_method": "task_arithmetic", "base_model": "base", "slices": parts, "parameters": {"weight": 0.5}}
        recipe = read(llama_folders, data)
        assert recipe.transform == Transform(name="stack", options={"layers": "0 1 1 2 3"})
        assert weights(recipe, "a") == [0.5, 0.5, 1, 2, 3]

    def test_last_layers_may_be_left_out(self, llama_folders: Path) -> None:
        parts = slices(([0, 2], [model("a")]), ([2, 4], [model("b")]))
        recipe = read(llama_folders, {"merge_method": "passthrough", "slices": parts})
        assert recipe.transform == Transform(name="stack", options={"layers": "0 1 2 3"})


class TestRefusals:
    @pytest.mark.parametrize("message", REFUSED)
    def test_what_a_recipe_cannot_say_is_refused_by_its_key(self, llama_folders: Path, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            read(llama_folders, REFUSED[message])

    def test_all_problems_are_reported_at_once(self, llama_folders: Path) -> None:
        data = {
            **task_arithmetic(model("a", wieght=1)),
            "tokenizer_source": "union",
            "dtype": "half",
            "merge_method": "tie",
        }
        with pytest.raises(RecipeError) as caught:
            read(llama_folders, data)
        assert len(caught.value.problems) == 4
        assert str(caught.value).startswith("merge.yml: 4 problems")

    @pytest.mark.parametrize("text", ["a: [", "- 1", "", "a: 1\n---\nb: 2"])
    def test_a_text_that_is_not_one_mapping_is_refused(self, text: str) -> None:
        with pytest.raises(RecipeError, match="YAML"):
            read_mergekit(text)

    def test_a_missing_file_is_a_recipe_error(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="cannot be read"):
            read_mergekit(tmp_path / "none.yml")
