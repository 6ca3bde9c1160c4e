"""An evolutionary search of one coefficient per expert at a fixed density: that of PCB-Merging (arXiv 2410.02396)."""

from __future__ import annotations

from pathlib import Path

import optuna
import yaml
from command_line import here

from merge_search.search.records import finished_records

EXPERTS = ("maths", "stories")


def test_pcbs_coefficients_are_evolved_on_search_questions_at_its_published_density(demo: Path, tmp_path: Path) -> None:
    study = {
        "study": {"name": "es", "seed": 2},
        "models": {
            "base": str(demo / "models" / "base"),
            "experts": {e: str(demo / "models" / e) for e in EXPERTS},
            "dtype": "float32",
        },
        "space": {
            "type": "compatibility", "presets": ["pcb"], "coefficients": {"per": "expert", "bounds": [0.5, 3]},
            "density": 0.1,
        },
        "evaluate": [
            {"evaluator": "lm_eval", "tasks": ["demo_stories"], "include_path": str(demo / "tasks"), "limit": 40}
        ],
        "objective": {"maximise": "mean"},
        "search": {"sampler": "cmaes", "n_trials": 19, "finalists": 1}, "device": "cpu",
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    here("run", path)
    stored = optuna.load_study(study_name="es", storage=f"sqlite:///{tmp_path / 'es.db'}")
    done = finished_records(stored)
    assert "pcb" in {r.label for r in done}  # the space's presets are tried as published
    searched = [r for r in done if not r.label and not str(r.attributes.get("start", "")).startswith("start")]
    assert len(searched) >= 4
    points = [dict(r.recipe.coefficients) for r in searched]
    assert all(0.5 <= c <= 3 for point in points for c in point.values() if isinstance(c, float))
    assert len({tuple(point.values()) for point in points}) == len(points)
    assert all(r.recipe.densities == dict.fromkeys(EXPERTS, 0.1) and r.recipe.scale == 1.0 for r in searched)
    (front,) = stored.get_trials(deepcopy=False)[-1:]
    assert set(front.params) == {f"coefficient.{e}" for e in EXPERTS}
