"""Studies whose experts are LoRA adapters, and studies with an adapter beside a full fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from command_line import here
from safetensors.torch import load_file
from tiny_adapters import PEFT_WARNS, extract_adapter, peft_merged

from merge_search.search.records import Record, finished_records

pytestmark = PEFT_WARNS
TASKS = ["demo_maths", "demo_spelling"]


@pytest.fixture(scope="module")
def adapters(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo's experts as adapters of rank 16."""
    folder, models = tmp_path_factory.mktemp("adapters"), demo / "models"
    return {e: str(extract_adapter(models / "base", models / e, folder / e)) for e in ("maths", "spelling")}


def write_study(folder: Path, demo: Path, experts: dict[str, str], presets: list[str], **search: Any) -> Path:
    data = {
        "study": {"name": "tiny", "storage": "sqlite:///tiny.db", "seed": 1},
        "models": {"base": str(demo / "models" / "base"), "experts": experts, "dtype": "float32"},
        "space": {"coefficients": {"bounds": [0, 1.5]}, "density": {"bounds": [0.1, 1]}, "presets": presets},
        "evaluate": [
            {"evaluator": "lm_eval", "tasks": TASKS, "include_path": str(demo / "tasks"), "batch_size": 64, "limit": 40}
        ],
        "search": {"finalists": 1, **search},
        "device": "cpu",
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def done(folder: Path) -> list[Record]:
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{folder / 'tiny.db'}")
    return [r for r in finished_records(study) if r.is_scored]


def test_adapters_are_searched_as_pairs_and_a_trial_is_exported_as_an_adapter(
    demo: Path, adapters: dict[str, str], tmp_path: Path
) -> None:
    path = write_study(tmp_path, demo, adapters, ["copa"], n_trials=11)
    here("run", path)
    tried = [r for r in done(tmp_path) if r.recipe.preset == "copa"]
    assert len(tried) >= 3
    assert len({tuple(r.recipe.densities.values()) for r in tried}) >= 2
    number = str(tried[-1].number)
    said = here("export", path, tmp_path / "adapter", "--adapter", "--trial", number).stdout
    assert "A LoRA adapter of rank 16 on " in said
    here("export", path, tmp_path / "whole", "--trial", number)
    merged = peft_merged(demo / "models" / "base", tmp_path / "adapter", dtype=torch.float32)
    for name, tensor in load_file(tmp_path / "whole/model.safetensors").items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=2e-5)
    card = (tmp_path / "adapter/README.md").read_text()
    assert "library_name: peft" in card
    assert "| base |" in card
    assert "sha256 of the whole weights" in card


def test_an_adapter_beside_a_full_fine_tune_is_searched_and_merged_whole(
    demo: Path, adapters: dict[str, str], tmp_path: Path
) -> None:
    experts = {"maths": str(demo / "models" / "maths"), "spelling": adapters["spelling"]}
    path = write_study(tmp_path, demo, experts, ["task_arithmetic", "ties"], n_trials=7)
    here("run", path)
    scored = done(tmp_path)
    assert {"base", "maths", "spelling", "average", "task_arithmetic"} <= {r.name for r in scored}
    refused = here("export", path, tmp_path / "out", "--adapter", check=False)
    assert refused.returncode == 2
    assert "every expert must be a LoRA adapter, but expert 'maths' has no pairs" in refused.stderr.replace("\n", " ")
    here("export", path, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_method_for_pairs_is_refused_on_whole_models_before_any_weight(
    demo: Path, adapters: dict[str, str], tmp_path: Path
) -> None:
    experts = {"maths": str(demo / "models" / "maths"), "spelling": adapters["spelling"]}
    refused = here("validate", write_study(tmp_path, demo, experts, ["ties", "copa"]), check=False)
    assert refused.returncode == 2
    text = " ".join(refused.stderr.split())
    assert "space.presets: 'copa' merges LoRA adapters as pairs, but expert 'maths' has none" in text
    assert "whole model and no LoRA adapter" in text
    assert "'spelling'" not in text
    path = write_study(tmp_path, demo, {"spelling": adapters["spelling"]}, ["copa"])
    data = yaml.safe_load(path.read_text())
    data["space"]["transform"] = {"stack": {"layers": "0-1,0"}}
    path.write_text(yaml.safe_dump(data))
    text = " ".join(here("validate", path, check=False).stderr.split())
    assert "expert 'spelling' has none: space.transform makes whole models" in text
    path = write_study(tmp_path, demo, experts, ["ties"], baselines=["copa_released"])
    text = here("validate", path, check=False).stderr.replace("\n", " ")
    assert "search.baselines: 'copa_released' merges LoRA adapters as pairs, but expert 'maths' has none" in text
