"""Image classification: the same judge on images. Scores by a direct forward pass, files, refusals, studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import small_vision
import torch
import yaml
from command_line import here
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from evaluators.classification.images import ImageClassification
from merge_search.errors import StudyFileError
from merge_search.evaluation import Split, SplitShares
from merge_search.search.records import finished_records

SHARES = SplitShares()


def load(folder: Path, name: str = "base") -> ViTModel:
    return ViTModel.from_pretrained(folder / "models" / name, add_pooling_layer=False).eval()


def bound(folder: Path, model: Any = None, **options: Any) -> ImageClassification:
    evaluator = ImageClassification({**small_vision.options(), **options}, shares=SHARES, seed=0, folder=folder)
    evaluator.bind(load(folder) if model is None else model, None, folder=str(folder / "models" / "base"))
    return evaluator


def test_scores_are_those_of_a_direct_forward_pass(vision_folder: Path) -> None:
    model = load(vision_folder, "textures")
    evaluator = bound(vision_folder, model)
    found = evaluator.evaluate(Split.SEARCH)
    assert [m.name for m in evaluator.metrics()[:2]] == ["shapes/acc", "shapes/nll"]
    data = dict(np.load(vision_folder / "data/textures/test.npz"))
    head = load_file(vision_folder / "models/textures/head.safetensors")
    with torch.no_grad():
        x = torch.from_numpy(data["image"]).float()[:, None] / 255
        hidden = model(pixel_values=(x - 0.5) / 0.5).last_hidden_state.mean(1)
        log_p = (hidden @ head["weight"].T + head["bias"]).log_softmax(-1)
    by_image = {image.tobytes(): i for i, image in enumerate(data["image"])}
    at = [by_image[row.image.tobytes()] for row in evaluator._tasks["textures"].scored[Split.SEARCH]]
    labels = torch.from_numpy(data["label"])[at]
    right = log_p[at, labels].double().numpy()
    np.testing.assert_allclose(found.scores["textures/nll"].values, -right, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.scores["textures/acc"].values, (log_p[at].argmax(-1) == labels).double())
    assert 0.2 < found.scores["textures/acc"].score < 1


def test_the_first_state_can_be_taken_and_normalisation_changes_the_answers(vision_folder: Path) -> None:
    plain = bound(vision_folder).evaluate(Split.SEARCH).scores["shapes/nll"].values
    first = (
        bound(vision_folder, **small_vision.options(pooling="cls")).evaluate(Split.SEARCH).scores["shapes/nll"].values
    )
    other = bound(vision_folder, mean=0.4, std=[0.3]).evaluate(Split.SEARCH).scores["shapes/nll"].values
    assert (plain != first).any()
    assert (plain != other).any()


def test_pixel_statistics_of_the_base_are_used_unless_the_study_says_others(
    vision_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4], "image_std": [0.3]}))
    found = []
    for folder, options in ((tmp_path, {}), (vision_folder, {"mean": 0.4, "std": 0.3}), (vision_folder, {})):
        evaluator = ImageClassification(
            {**small_vision.options(), **options}, shares=SHARES, seed=0, folder=vision_folder
        )
        evaluator.bind(load(vision_folder), None, folder=str(folder))
        found.append(evaluator.evaluate(Split.SEARCH).scores["shapes/nll"].values)
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def small_task(folder: Path, images: np.ndarray, *, labels: Any = None, **arrays: Any) -> dict[str, Any]:
    """A task of 40 images in files of its own."""
    n = len(images)
    np.savez(folder / "own.npz", image=images, label=np.arange(n) % 6 if labels is None else labels, **arrays)
    return {"own": {"data": "own.npz", "head": str(folder / "head.safetensors")}}


@pytest.fixture
def own(vision_folder: Path, tmp_path: Path) -> Path:
    """A folder with a head of six classes."""
    (tmp_path / "head.safetensors").write_bytes((vision_folder / "models/shapes/head.safetensors").read_bytes())
    return tmp_path


def test_all_forms_of_files_give_the_same_questions_answers(vision_folder: Path, own: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 24, 24), dtype=np.uint8)
    rows = []
    for i, image in enumerate(grey):
        np.save(own / f"{i}.npy", image)
        rows.append({"file": f"{i}.npy", "label": i % 6})
    (own / "files.jsonl").write_text("\n".join(map(json.dumps, rows)))
    forms = {
        "grey": small_task(own, grey),
        "channels last": None,
        "floats": None,
        "files": {"own": {"data": "files.jsonl", "head": "head.safetensors", "image": "file"}},
    }
    found = {}
    for name, tasks in forms.items():
        if name == "channels last":
            tasks = small_task(own, grey[..., None])
        if name == "floats":
            tasks = small_task(own, (grey / np.float32(255)).astype(np.float32)[:, None])
        evaluator = ImageClassification({"tasks": tasks}, shares=SplitShares(), seed=0, folder=own)
        evaluator.bind(load(vision_folder), None, folder="")
        values = {}
        for split in (Split.SEARCH, Split.VALIDATION, Split.TEST):
            scores = evaluator.evaluate(split).scores["own/nll"]
            images = [r.pixels().tobytes() for r in evaluator._tasks["own"].scored[split]]
            values |= dict(zip(images, scores.values, strict=True))
        found[name] = values
    for name in forms:
        assert found[name].keys() == found["grey"].keys(), name
        assert [found[name][k] for k in found["grey"]] == pytest.approx(list(found["grey"].values()), rel=1e-5), name


def test_png_files_are_read_where_pillow_is_installed(own: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    for i, p in enumerate(pixels):
        image.fromarray(p).save(own / f"{i}.png")
    (own / "f.jsonl").write_text("\n".join(json.dumps({"image": f"{i}.png", "label": i % 6}) for i in range(30)))
    tasks = {"own": {"data": "f.jsonl", "head": "head.safetensors"}}
    evaluator = ImageClassification({"tasks": tasks}, shares=SHARES, seed=0, folder=own)
    found = {r.image.tobytes() for rows in evaluator._tasks["own"].scored.values() for r in rows}
    assert found == {np.ascontiguousarray(p.transpose(2, 0, 1)).tobytes() for p in pixels}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "gone.npy", "label": 0}], "line 1: no file gone.npy in"),
        ([{"image": 3, "label": 0}], "the image must be the path of a file, got 3"),
        ([{"image": "a.npy", "label": 6}], "'label' must be a class from 0 to 5, got 6"),
        ([{"imgae": "a.npy", "label": 0}], "no field 'image'; did you mean 'imgae'"),
        ([{"image": "flat.npy", "label": 0}], r"an image must be \(height, width\) .*, got \(4,\)"),
        ([{"image": "ints.npy", "label": 0}], "pixels must be uint8 or floats of \\[0, 1\\], got int64"),
        ([{"image": "large.npy", "label": 0}], "must lie in \\[0, 1\\], got 0 to 2"),
        ([{"image": "objects.npy", "label": 0}], "objects.npy is not a readable image: Object arrays cannot be loaded"),
        ([{"image": "text.npy", "label": 0}], "text.npy is not a readable image"),
    ],
)
def test_wrong_rows_are_refused_before_any_weight_is_loaded(own: Path, rows: list[Any], message: str) -> None:
    np.save(own / "a.npy", np.zeros((4, 4), np.uint8))
    np.save(own / "flat.npy", np.zeros(4, np.uint8))
    np.save(own / "ints.npy", np.zeros((4, 4), np.int64))
    np.save(own / "large.npy", np.linspace(0, 2, 16, dtype=np.float32).reshape(4, 4))
    np.save(own / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (own / "text.npy").write_text("no array")
    (own / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(StudyFileError, match=message):
        ImageClassification(
            {"tasks": {"own": {"data": "rows.jsonl", "head": "head.safetensors"}}}, shares=SHARES, seed=0, folder=own
        )


def test_wrong_arrays_and_options_are_refused_at_once(own: Path) -> None:
    images = np.zeros((40, 8, 8), np.uint8)
    tasks = small_task(own, images, labels=np.zeros(39, int))
    (own / "bad.npz").write_text("no archive")
    given = {
        "own": tasks["own"],
        "bad": {**tasks["own"], "data": "bad.npz"},
        "text": {**tasks["own"], "data": "head.safetensors"},
    }
    given["none"] = {**tasks["own"], "image": "pixels"}
    with pytest.raises(StudyFileError) as caught:
        ImageClassification({"tasks": given}, shares=SHARES, seed=0, folder=own)
    text = "\n".join(caught.value.problems)
    assert "its arrays must have one entry per image, got {'image': 40, 'label': 39}" in text
    assert "bad.npz: is not a readable .npz file of arrays" in text
    assert "head.safetensors must be an .npz file of arrays or a .jsonl file" in text
    assert "no array 'pixels'" in text
    with pytest.raises(StudyFileError, match=r"std.0: input should be greater than 0, got 0"):
        ImageClassification({"tasks": given, "std": 0}, shares=SHARES, seed=0, folder=own)


def test_images_of_another_size_and_statistics_of_other_channels_are_refused_at_bind(
    vision_folder: Path, own: Path
) -> None:
    rng = np.random.default_rng(0)
    tasks = small_task(own, rng.integers(0, 256, (40, 20, 24), dtype=np.uint8))
    evaluator = ImageClassification({"tasks": tasks}, shares=SHARES, seed=0, folder=own)
    with pytest.raises(StudyFileError, match=r"must be 1 x 24 x 24 .* found 1 x 20 x 24 in .*own.npz, image \d+ and"):
        evaluator.bind(load(vision_folder), None, folder="")
    with pytest.raises(StudyFileError, match=r"mean, std: must be one number or one per channel \(1\), got 3"):
        bound(vision_folder, mean=[0.5, 0.5, 0.5])
    wide = ViTModel(ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                              image_size=24, patch_size=6, num_channels=1))  # fmt: skip
    with pytest.raises(StudyFileError, match=r"has hidden size 16, but the encoder's is 12"):
        bound(vision_folder, wide.eval())


def test_a_convolutional_encoder_is_pooled_over_its_map(vision_folder: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetModel(config).eval()
    evaluator = bound(vision_folder, model)
    values = evaluator.evaluate(Split.SEARCH).scores["shapes/nll"].values
    row = evaluator._tasks["shapes"].scored[Split.SEARCH][0]
    head = load_file(vision_folder / "models/shapes/head.safetensors")
    with torch.no_grad():
        states = model(pixel_values=torch.from_numpy(row.pixels())[None] * 2 - 1).last_hidden_state
        logits = head["weight"] @ states.mean((2, 3))[0] + head["bias"]
    assert values[0] == pytest.approx(-float(logits.log_softmax(-1)[row.label]), rel=1e-3)


def test_groups_of_images_have_gaps(vision_folder: Path) -> None:
    options = small_vision.options(group="group", gaps=["parity"])
    evaluator = bound(vision_folder, load(vision_folder, "shapes"), **options)
    assert [m.metric for m in evaluator.metrics()[:4]] == ["acc", "nll", "parity_gap", "acc"]
    assert 0 < evaluator.evaluate(Split.SEARCH).scores["shapes/parity_gap"].score <= 1


def study_file(folder: Path, vision: Path, **search: Any) -> Path:
    data = {
        "study": {"name": "vision", "storage": "sqlite:///vision.db"},
        "models": {
            "base": str(vision / "models/base"),
            "experts": {t: str(vision / "models" / t) for t in small_vision.TASKS},
        },
        "space": {"type": "compatibility", "presets": ["task_arithmetic", "ties"],
                  "coefficients": {"per": "expert", "bounds": [0, 1.5]}},
        "evaluate": [{"evaluator": "image_classification", "include_path": str(vision), **small_vision.options()}],
        "splits": {"search": 0.6, "validation": 0.2, "test": 0.2, "fit": 0.2},
        "objective": {"maximise": "mean"},
        "search": {"n_trials": 9, "finalists": 1, "baselines": ["tsv_m"], "sampler": "random", **search},
        "device": "cpu",
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def test_a_study_merges_vision_encoders_fits_coefficients_and_exports(vision_folder: Path, tmp_path: Path) -> None:
    learner = {"steps": [4], "per": "tensor", "batch_rows": 8, "loss": "gold"}
    path = study_file(tmp_path, vision_folder, learner=learner)
    here("run", path)
    study = optuna.load_study(study_name="vision", storage=f"sqlite:///{tmp_path / 'vision.db'}")
    done = finished_records(study)
    assert [r.label for r in done[:7]] == ["base", *small_vision.TASKS, "average", "task_arithmetic", "tsv_m"]
    assert all(r.is_scored for r in done)
    assert any("learner" in r.attributes for r in done[7:])
    last = done[-1]
    here("export", path, tmp_path / "merged", "--trial", str(last.number))
    shares = SplitShares(0.6, 0.2, 0.2, fit=0.2)
    evaluator = ImageClassification(small_vision.options(), shares=shares, seed=0, folder=vision_folder)
    merged = ViTModel.from_pretrained(tmp_path / "merged", add_pooling_layer=False).eval()
    evaluator.bind(merged, None, folder="")
    for name, scores in evaluator.evaluate(Split.SEARCH).scores.items():
        assert scores.score == pytest.approx(last.evaluation.scores[name].score, rel=1e-3), name
