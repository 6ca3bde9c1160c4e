"""mergekit's YAML, read and written. Expected numbers were measured on mergekit 0.1.5 or computed by hand.

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
from safetensors.torch import load_file

from merge_search.engine.engine import MergeEngine
from merge_search.engine.headers import read_checkpoint
from merge_search.engine.layout import layout, name_groups
from merge_search.engine.pool import ModelPool
from merge_search.errors import RecipeError
from merge_search.mergekit import read_mergekit, to_mergekit
from merge_search.mergekit.filters import said
from merge_search.mergekit.values import evaluate, gradient_at, shorten
from merge_search.presets import preset
from merge_search.recipe import Group, Models, Recipe, value_for

PARTS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def llama_names(n_layers: int) -> list[str]:
    inside = [f"model.layers.{i}.{part}.weight" for i in range(n_layers) for part in PARTS]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", "lm_head.weight"]


GROUPS = name_groups(llama_names(12))
KEYS = sorted({key for group in GROUPS.values() for key in Group.keys(group)} - {"*"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``a``, ``b``, ``c``: llama checkpoints of five layers with random weights."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(8, 4, generator=generator) for n in llama_names(5)}
    for name in ("base", "a", "b", "c"):
        folder = root / name
        folder.mkdir()
        (folder / "config.json").write_text(
            '{"model_type": "llama", "num_hidden_layers": 5, "architectures": ["LlamaForCausalLM"]}'
        )
        noise = 0.0 if name == "base" else 0.1
        tensors = {n: t + noise * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return root


def read(root: Path, data: dict) -> Recipe:
    file = root / "merge.yml"
    file.write_text(yaml.safe_dump(data))
    return read_mergekit(file)


def model(name: str, **parameters: object) -> dict:
    return {"model": name, "parameters": parameters} if parameters else {"model": name}


def task_arithmetic(*models: dict, **more: object) -> dict:
    return {"merge_method": "task_arithmetic", "base_model": "base", "models": list(models), **more}


def slices(*parts: tuple[list[int], list[dict]]) -> list[dict]:
    return [{"sources": [{**source, "layer_range": layers} for source in sources]} for layers, sources in parts]


def weights(recipe: Recipe, expert: str, part: str = "mlp.up_proj") -> list[float]:
    groups = name_groups(llama_names(5))
    return [recipe.coefficient(expert, groups[f"model.layers.{i}.{part}.weight"]) for i in range(5)]


def weight_of(recipe: Recipe, expert: str, tensor: str) -> float:
    return recipe.coefficient(expert, name_groups(llama_names(5))[tensor])


class TestGradients:
    def test_two_anchors_over_five_layers_are_evenly_spaced(self, folders: Path) -> None:
        recipe = read(folders, task_arithmetic(model("a", weight=[0, 1])))
        assert weights(recipe, "a") == [0, 0.25, 0.5, 0.75, 1]

    def test_three_anchors_have_their_middle_on_the_middle_layer(self, folders: Path) -> None:
        recipe = read(folders, task_arithmetic(model("a", weight=[0, 1, 5])))
        assert weights(recipe, "a") == [0, 0.5, 1, 3, 5]

    def test_tensors_outside_the_layers_take_the_first_anchor(self, folders: Path) -> None:
        recipe = read(folders, task_arithmetic(model("a", weight=[2, 1])))
        for tensor in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert weight_of(recipe, "a", tensor) == 2

    def test_a_gradient_runs_over_the_layers_of_its_slice_and_one_layer_stands_at_the_end(self, folders: Path) -> None:
        parts = slices(([0, 1], [model("base"), model("a")]), ([1, 5], [model("base"), model("a")]))
        parts[0]["parameters"], parts[1]["parameters"] = {"weight": [3, 4]}, {"weight": [5, 6, 8]}
        recipe = read(folders, {"merge_method": "task_arithmetic", "base_model": "base", "slices": parts})
        assert weights(recipe, "a") == pytest.approx([4, 5, 5 + 2 / 3, 6 + 2 / 3, 8])
        assert weight_of(recipe, "a", "model.embed_tokens.weight") == 3
        assert weight_of(recipe, "a", "model.norm.weight") == 5

    @given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0, 1))
    def test_a_gradient_stays_between_its_anchors(self, anchors: list[float], t: float) -> None:
        assert min(anchors) - 1e-9 <= gradient_at(anchors, t) <= max(anchors) + 1e-9


class TestFilters:
    def test_the_first_filter_that_is_part_of_the_name_applies(self, folders: Path) -> None:
        conditions = [{"filter": "self_attn", "value": [1, 3]}, {"filter": "q_proj", "value": 77}, {"value": 0.5}]
        recipe = read(folders, task_arithmetic(model("a", weight=conditions)))
        assert weights(recipe, "a", "self_attn.q_proj") == [1, 1.5, 2, 2.5, 3]
        assert weights(recipe, "a") == [0.5] * 5

    def test_a_filter_may_name_a_layer(self, folders: Path) -> None:
        recipe = read(folders, task_arithmetic(model("a", weight=[{"filter": "layers.3.", "value": 3}, {"value": 1}])))
        assert weights(recipe, "a") == [1, 1, 1, 3, 1]

    def test_what_the_model_leaves_open_comes_from_the_file(self, folders: Path) -> None:
        models = [model("a", weight=[{"filter": "self_attn", "value": 1}])]
        recipe = read(folders, task_arithmetic(*models, parameters={"weight": [10, 20]}))
        assert weights(recipe, "a") == [10, 12.5, 15, 17.5, 20]
        assert weights(recipe, "a", "self_attn.o_proj") == [1] * 5

    def test_one_value_for_everything_needs_no_table(self, folders: Path) -> None:
        recipe = read(folders, task_arithmetic(model("a", weight=[{"filter": "*", "value": 2}])))
        assert recipe.coefficients == {"a": 2.0}


class TestMethods:
    def test_linear_divides_by_the_sum_of_all_weights(self, folders: Path) -> None:
        recipe = read(folders, {"merge_method": "linear", "models": [model("a", weight=1), model("b", weight=3)]})
        assert recipe.models.base == str(folders / "a")
        assert recipe.coefficients == {"b": 0.75}

    def test_task_arithmetic_leaves_weights_as_they_are_and_takes_lambda_as_scale(self, folders: Path) -> None:
        recipe = read(folders, task_arithmetic(model("a", weight=0.5), parameters={"lambda": 0.7}))
        assert recipe.coefficients == {"a": 0.5}
        assert recipe.scale == 0.7

    def test_ties_trims_each_tensor_and_divides_by_the_weights_that_agree(self, folders: Path) -> None:
        recipe = read(
            folders,
            {**task_arithmetic(model("a", weight=1, density=0.2), model("b", weight=2)), "merge_method": "ties"},
        )
        assert (recipe.select.kind, recipe.select.rounding, recipe.select.vectors) == ("top_k", "down", True)
        assert (recipe.resolve.kind, recipe.resolve.weighted, recipe.splice.kind) == ("sum", True, "coefficient")
        assert recipe.densities == {"a": 0.2}

    def test_negative_weights_vote_with_their_sign_as_in_mergekit(self, folders: Path) -> None:
        weights = {"a": 1.0, "b": -0.6, "c": 0.3}
        models = [model(m, weight=w) for m, w in weights.items()]
        recipe = read(folders, {**task_arithmetic(*models), "merge_method": "ties"})
        files = {m: load_file(folders / m / "model.safetensors") for m in ("base", *weights)}
        for name, merged in MergeEngine(ModelPool(recipe.models, device="cpu"), compile=False).merged(recipe):
            said = torch.stack([w * (files[m][name] - files["base"][name]) for m, w in weights.items()])
            agrees = said.sign() == (said.sum(0) >= 0) * 2 - 1
            total = (torch.tensor(list(weights.values()))[:, None, None] * agrees).sum(0)
            expected = files["base"][name] + (said * agrees).sum(0) / torch.where(total == 0, 1.0, total)
            torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("method", ["dare_ties", "breadcrumbs_ties", "dare_linear", "breadcrumbs"])
    def test_only_ties_and_della_normalise_by_default(self, folders: Path, method: str) -> None:
        data = {**task_arithmetic(model("a", weight=1, density=0.2), model("b", weight=2)), "merge_method": method}
        recipe = read(folders, data)
        assert recipe.splice.kind == "sum"
        assert recipe.coefficients == {"b": 2.0}
        assert (
            read(folders, {**data, "merge_method": "della", "parameters": {"epsilon": 0.1}}).splice.kind
            == "coefficient"
        )

    @pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
    def test_random_masks_match_the_old_l1_norm_unless_told_otherwise(self, folders: Path, method: str) -> None:
        data = {**task_arithmetic(model("a", weight=1, density=0.5)), "merge_method": method}
        assert read(folders, data).rescale.kind == "match_l1"
        assert read(folders, {**data, "parameters": {"rescale": False}}).rescale.kind == "none"

    def test_a_base_that_is_listed_is_no_expert_of_delta_methods(self, folders: Path) -> None:
        recipe = read(folders, task_arithmetic(model("base", weight=5), model("a", weight=1)))
        assert list(recipe.models.experts) == ["a"]

    def test_a_model_that_a_slice_leaves_out_weighs_nothing_there(self, folders: Path) -> None:
        base = model("base")
        parts = slices(
            ([0, 2], [base, model("a", weight=1), model("b", weight=1)]), ([2, 5], [base, model("b", weight=2)])
        )
        recipe = read(folders, {"merge_method": "task_arithmetic", "base_model": "base", "slices": parts})
        assert weights(recipe, "a") == [1, 1, 0, 0, 0]
        assert weights(recipe, "b") == [1, 1, 2, 2, 2]

    def test_a_weight_that_is_missing_in_one_slice_is_refused(self, folders: Path) -> None:
        base = model("base")
        parts = slices(([0, 2], [base, model("b", weight=1)]), ([2, 5], [base, model("a"), model("b", weight=2)]))
        with pytest.raises(RecipeError, match=r"parameters\.weight of a: must be given"):
            read(folders, {"merge_method": "task_arithmetic", "base_model": "base", "slices": parts})

    def test_passthrough_takes_every_layer_from_one_model(self, folders: Path) -> None:
        parts = slices(([0, 2], [model("a")]), ([2, 5], [model("b")]))
        recipe = read(folders, {"merge_method": "passthrough", "slices": parts, "dtype": "float32"})
        merged = dict(MergeEngine(ModelPool(recipe.models, device="cpu")).merged(recipe))
        a, b = (load_file(folders / n / "model.safetensors") for n in "ab")
        for tensor, found in merged.items():
            layer = int(tensor.split(".")[2]) if "layers" in tensor else 0 if "embed" in tensor else 5
            torch.testing.assert_close(found, (a if layer < 2 else b)[tensor], rtol=2e-7, atol=1e-7)

    def test_karcher_counts_the_first_model_as_a_point(self, folders: Path) -> None:
        recipe = read(folders, {"merge_method": "karcher", "models": [model("a"), model("b"), model("c")]})
        merged = dict(MergeEngine(ModelPool(recipe.models, device="cpu")).merged(recipe))
        by_base = Recipe.from_dict(
            {
                "models": {"base": str(folders / "base"), "experts": {n: str(folders / n) for n in "abc"}},
                "operator": {"name": "karcher"},
            }
        )
        for tensor, wanted in MergeEngine(ModelPool(by_base.models, device="cpu")).merged(by_base):
            torch.testing.assert_close(merged[tensor], wanted, rtol=1e-5, atol=1e-6)

    def test_model_stock_by_rows_treats_each_row_as_a_tensor_of_its_own(self, folders: Path) -> None:
        """t = M cos / (1 + (M - 1) cos) of each row, applied to the mean of its deltas."""
        models = [model("a"), model("b")]
        data = {
            "merge_method": "model_stock",
            "base_model": "base",
            "models": models,
            "parameters": {"filter_wise": True},
        }
        recipe = read(folders, data)
        merged = dict(MergeEngine(ModelPool(recipe.models, device="cpu")).merged(recipe))
        name = "model.layers.1.mlp.up_proj.weight"
        base, a, b = (load_file(folders / n / "model.safetensors")[name].double() for n in ("base", "a", "b"))
        for row in range(8):
            x, y = a[row] - base[row], b[row] - base[row]
            cos = x @ y / (x.norm() * y.norm())
            wanted = base[row] + 2 * cos / (1 + cos) * (x + y) / 2
            torch.testing.assert_close(merged[name][row].double(), wanted, rtol=1e-5, atol=1e-6)

    def test_numbers_in_quotes_and_the_output_dtype_are_read(self, folders: Path) -> None:
        data = task_arithmetic(model("a", weight="0.5"), dtype="float32", out_dtype="bfloat16")
        recipe = read(folders, data)
        assert recipe.coefficients == {"a": 0.5}
        assert recipe.dtype == "bfloat16"

    def test_int8_mask_changes_nothing(self, folders: Path) -> None:
        plain = read(folders, task_arithmetic(model("a", weight=1)))
        assert read(folders, task_arithmetic(model("a", weight=1), parameters={"int8_mask": True})) == plain

    def test_sce_weighs_experts_alike_where_their_deltas_are_tiny(self, folders: Path) -> None:
        """Below a sum of energies of 1e-6, mergekit's limit; with one sign and nothing dropped, the mean of the deltas."""
        from merge_search.engine.memory import MemoryTensors

        data = {"merge_method": "sce", "base_model": "base", "models": [model("a"), model("b")]}
        recipe = read(folders, data)
        for size, shares in ((1e-4, (0.5, 0.5)), (1.0, (0.1, 0.9))):
            experts = {"a": {"w": torch.full((4, 4), 1 + size)}, "b": {"w": torch.full((4, 4), 1 + 3 * size)}}
            tensors = MemoryTensors({"w": torch.ones(4, 4)}, experts)
            ((_, merged),) = MergeEngine(tensors, compile=False).merged(recipe)
            torch.testing.assert_close(
                merged - 1, torch.full((4, 4), (shares[0] + 3 * shares[1]) * size), rtol=2e-3, atol=0
            )

    def test_counts_are_rounded_down_and_a_band_gives_way_at_the_top(self) -> None:
        """Measured: of 64 entries, density 0.85 keeps 54; density 0.9999 and gamma 0.1 keep 63 and drop one at the top."""
        from merge_search.engine.memory import MemoryTensors

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
    def test_models_beside_the_file_are_found_and_named_by_their_folders(self, folders: Path) -> None:
        recipe = read(folders, task_arithmetic(model("./a", weight=1), model("b/", weight=1)))
        assert recipe.models.experts == {"a": str(folders / "a"), "b": str(folders / "b")}

    def test_models_in_the_working_directory_are_found(
        self, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folders)
        file = tmp_path / "elsewhere.yml"
        file.write_text(yaml.safe_dump(task_arithmetic(model("a", weight=1))))
        assert read_mergekit(file).models.base == str(folders / "base")

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
    "merge_method: 'tise' is not supported; did you mean 'ties'": {**task_arithmetic(model("a", weight=1)), "merge_method": "tise"},
    "base_model: task_arithmetic needs it": {"merge_method": "task_arithmetic", "models": [model("a", weight=1)]},
    "parameters.weight of a: must be given": task_arithmetic(model("a")),
    "unknown parameter; did you mean 'density'": task_arithmetic(model("a", weight=1, densty=1)),
    "dypte: unknown key": task_arithmetic(model("a", weight=1), dypte="float32"),
    "dtype: must be one of": task_arithmetic(model("a", weight=1), dtype="bf16"),
    "tokenizer_source: only the base's": task_arithmetic(model("a", weight=1), tokenizer_source="union"),
    r"tokenizer\.source: only the base's": task_arithmetic(model("a", weight=1), tokenizer={"source": "a"}),
    r"tokenizer\.tokens: not supported": task_arithmetic(model("a", weight=1), tokenizer={"source": "base", "tokens": {}}),
    "chat_template: the base's": task_arithmetic(model("a", weight=1), chat_template="chatml"),
    r"models\[0\].model: 'model\+adapter'": task_arithmetic(model("a+lora", weight=1)),
    r"models\[0\].model: revisions": task_arithmetic(model("org/a@v2", weight=1)),
    "listed twice": task_arithmetic(model("a", weight=1), model("./a", weight=1)),
    "must be above 0": {**task_arithmetic(model("a", weight=1, density=0)), "merge_method": "ties"},
    "must not sum to 0 where signs": {**task_arithmetic(model("a", weight=1), model("b", weight=-1)), "merge_method": "ties"},
    "density -\\+ epsilon must lie in": {**task_arithmetic(model("a", weight=1, density=0.1)), "merge_method": "della"},
    "must sum to 1 where normalize is off": {
        "merge_method": "linear", "models": [model("a", weight=1), model("b", weight=1)], "parameters": {"normalize": False},
    },
    "slerp takes 1 beside the base": {"merge_method": "slerp", "base_model": "base", "models": [model("a"), model("b")], "parameters": {"t": 0.5}},
    "layers of different depth": {
        "merge_method": "task_arithmetic", "base_model": "base",
        "slices": [{"sources": [{"model": "base", "layer_range": [0, 5]}, {"model": "a", "layer_range": [0, 4], "parameters": {"weight": 1}}]}],
    },
    "no layer repeated": {"merge_method": "passthrough", "slices": slices(([0, 4], [model("a")]), ([2, 5], [model("b")]))},
    "last layer_range must end at 5": {"merge_method": "passthrough", "slices": slices(([0, 2], [model("a")]), ([2, 4], [model("b")]))},
    "cannot be scaled": {"merge_method": "passthrough", "slices": slices(([0, 2], [model("a", scale=2)]), ([2, 5], [model("b")]))},
    "modules: several modules": {"merge_method": "linear", "modules": {}},
    "must be a number, a list": task_arithmetic(model("a", weight="much")),
}  # fmt: skip


class TestRefusals:
    @pytest.mark.parametrize("message", REFUSED)
    def test_what_a_recipe_cannot_say_is_refused_by_its_key(self, folders: Path, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            read(folders, REFUSED[message])

    def test_all_problems_are_reported_at_once(self, folders: Path) -> None:
        data = {
            **task_arithmetic(model("a", wieght=1)),
            "tokenizer_source": "union",
            "dtype": "half",
            "merge_method": "tie",
        }
        with pytest.raises(RecipeError) as caught:
            read(folders, data)
        assert len(caught.value.problems) == 4
        assert str(caught.value).startswith("merge.yml: 4 problems")

    @pytest.mark.parametrize("text", ["a: [", "- 1", "", "a: 1\n---\nb: 2"])
    def test_a_text_that_is_not_one_mapping_is_refused(self, text: str) -> None:
        with pytest.raises(RecipeError, match="YAML"):
            read_mergekit(text)

    def test_a_missing_file_is_a_recipe_error(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="cannot be read"):
            read_mergekit(tmp_path / "none.yml")


def round_trip(recipe: Recipe, folders: Path) -> Recipe:
    groups = layout(read_checkpoint(folders / "base"))
    return read_mergekit(to_mergekit(recipe, groups))


class TestWriting:
    @pytest.mark.parametrize(
        "data",
        [
            task_arithmetic(model("a", weight=0.3), model("b", weight=[0, 1]), parameters={"lambda": [1, 0.5]}, dtype="bfloat16"),
            {**task_arithmetic(model("a", weight=1, density=[0.1, 0.9]), model("b", weight=2, density=0.4)), "merge_method": "ties"},
            {**task_arithmetic(model("a", weight=1, density=0.5)), "merge_method": "dare_ties", "parameters": {"normalize": True}},
            {**task_arithmetic(model("a", weight=1, density=0.5, epsilon=0.2)), "merge_method": "della_linear"},
            {**task_arithmetic(model("a", weight=1, density=0.5, gamma=0.1)), "merge_method": "breadcrumbs", "parameters": {"rescale": True}},
            {**task_arithmetic(model("a")), "merge_method": "slerp", "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.2}]}},
            {"merge_method": "nuslerp", "models": [model("a", weight=1), model("b", weight=3)]},
            {**task_arithmetic(model("a", weight=1), model("b", weight=3)), "merge_method": "nuslerp",
             "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}},
            {"merge_method": "multislerp", "models": [model("a", weight=1), model("b", weight=3), model("c", weight=2)]},
            {**task_arithmetic(model("a", weight=1), model("b", weight=3)), "merge_method": "multislerp"},
            {"merge_method": "karcher", "models": [model("a"), model("b")], "parameters": {"max_iter": 5}},
            {**task_arithmetic(model("a"), model("b")), "merge_method": "model_stock", "parameters": {"filter_wise": True}},
            {**task_arithmetic(model("a"), model("b")), "merge_method": "sce", "parameters": {"select_topk": 0.2}},
            {**task_arithmetic(model("a")), "merge_method": "nearswap", "parameters": {"t": 0.01}},
            {**task_arithmetic(model("a")), "merge_method": "arcee_fusion"},
            {"merge_method": "linear", "models": [model("a", weight=1), model("b", weight=[0, 3])]},
            {"merge_method": "passthrough", "slices": slices(([0, 2], [model("a")]), ([2, 5], [model("b")]))},
        ],
        ids=lambda data: data["merge_method"],
    )  # fmt: skip
    def test_what_was_read_is_written_back(self, folders: Path, data: dict) -> None:
        recipe = read(folders, data)
        again = round_trip(recipe, folders)
        assert again.fingerprint == recipe.fingerprint
        assert again.models == recipe.models

    @settings(max_examples=40, deadline=None)
    @given(
        table=st.dictionaries(
            st.sampled_from(KEYS), st.sampled_from([0.0, 0.5, 1.25]), max_size=8
        ),
        rest=st.sampled_from([0.0, 0.5]),
    )  # fmt: skip
    def test_any_numbers_by_group_survive_as_filters(self, table: dict[str, float], rest: float) -> None:
        wanted = {n: value_for({**table, "*": rest}, g) for n, g in GROUPS.items()}
        value = said(wanted, GROUPS)
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
        [("ties", "resolve: "), ("pcb", "winsorise: "), ("fisher", "splice: "), ("magmax", "no 'argmax' mixing"), ("cabs", "no selection 'n_m'"),
         ("dare", "not by 'inverse_density'"), ("sce", "floor: 1e-6"), ("consensus", "gate")],
    )  # fmt: skip
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
        "merge_method": method, "dtype": "float32",
        "models": [model(str(zoo / "lm" / n), **p) for n, p in zip(names, parameters, strict=True)],
        **({} if method in ("linear", "karcher") else {"base_model": str(zoo / "lm" / "base")}),
        "parameters": {"slerp": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.3}]}, "sce": {"select_topk": 0.3}}.get(method, {}),
    }  # fmt: skip
    recipe = read(tmp_path, data)
    command = [program, str(tmp_path / "merge.yml"), str(tmp_path / "out"), "--quiet", "--no-copy-tokenizer"]
    subprocess.run(command, check=True, capture_output=True)
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    for tensor, ours in MergeEngine(ModelPool(recipe.models, device="cpu")).merged(recipe):
        torch.testing.assert_close(ours, theirs[tensor], rtol=1e-5, atol=1e-6)
