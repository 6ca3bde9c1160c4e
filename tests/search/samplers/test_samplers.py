"""What holds for every sampler, and how samplers are made."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy
import torch
from random_studies import MIXED, fill, new_study, smooth, tell
from small_spaces import build

from merge_search.errors import StudyFileError
from merge_search.search.samplers import SAMPLERS, make_sampler, suggest
from merge_search.search.samplers.unit_cube import UnitCube, holds
from merge_search.space import Categorical, Float, Parameter

optuna.logging.set_verbosity(optuna.logging.WARNING)
SINGLE_OBJECTIVE = sorted(SAMPLERS)
MULTI_OBJECTIVE = sorted(set(SAMPLERS) - {"cmaes"})


class TestEverySampler:
    """What the run loop relies on, whatever the sampler."""

    @pytest.mark.parametrize("constrained", [False, True])
    @pytest.mark.parametrize("name", SINGLE_OBJECTIVE)
    def test_proposes_points_of_the_space_in_a_study_with_baselines_failures_and_running_trials(
        self, name, constrained
    ):
        study = new_study(name)
        fill(study, constrained=constrained)
        before = torch.random.get_rng_state()
        for _ in range(3):
            point = suggest(study.ask(), MIXED)
            assert list(point) == list(MIXED)
            assert holds(MIXED, point)
        assert torch.equal(torch.random.get_rng_state(), before)

    @pytest.mark.parametrize("name", SINGLE_OBJECTIVE)
    def test_searches_options_that_count_only_where_their_preset_is_chosen(self, name):
        presets = [
            {"tsv_m": {"rank_share": {"bounds": [0.2, 1]}, "embeddings": "search"}}, "ties",
            {"wudi": {"steps": "search"}},
        ]  # fmt: skip
        space = build("uniform", presets=presets, post=[{"svc": {"alpha": [0.05, 0.1]}}])
        study = new_study(name, parameters=space.parameters)
        fill(study, space.parameters, score=lambda point: 0.5 + 0.1 * float(point["tsv_m.rank_share"]))
        for _ in range(2):
            point = suggest(study.ask(), space.parameters)
            assert holds(space.parameters, point)
            again = space.encode(space.decode(point))
            assert {k: again[k] for k in space.active(point)} == {k: point[k] for k in space.active(point)}

    @pytest.mark.parametrize("name", SINGLE_OBJECTIVE)
    def test_proposes_before_anything_was_tried(self, name):
        study = new_study(name)
        assert holds(MIXED, suggest(study.ask(), MIXED))

    @pytest.mark.parametrize("m", [2, 3])
    @pytest.mark.parametrize("name", MULTI_OBJECTIVE)
    def test_handles_several_objectives_with_constraints(self, name, m):
        study = new_study(name, m=m)
        fill(study, constrained=True)
        assert holds(MIXED, suggest(study.ask(), MIXED))

    @pytest.mark.parametrize("name", SINGLE_OBJECTIVE)
    def test_the_same_state_gives_the_same_point_and_the_seed_matters(self, name):
        points = []
        for seed in (3, 3, 4):
            study = new_study(name, seed=seed)
            fill(study)
            points.append(suggest(study.ask(), MIXED))
        assert points[0] == points[1] != points[2]

    @pytest.mark.parametrize("name", SINGLE_OBJECTIVE)
    def test_a_study_reopened_from_its_file_goes_on_as_if_never_closed(self, name, tmp_path):
        def run(path: Path, *, reopen: bool) -> list[dict[str, object]]:
            def load() -> optuna.Study:
                storages.append(optuna.storages.RDBStorage(f"sqlite:///{path}"))
                sqlalchemy.event.listen(
                    storages[-1].engine, "connect", lambda c, _: c.execute("PRAGMA synchronous=OFF")
                )
                storages[-1].engine.dispose()  # the connections opened before
                sampler = make_sampler(name, parameters=MIXED, seed=3)
                return optuna.create_study(
                    storage=storages[-1], study_name="s", sampler=sampler, direction="maximize", load_if_exists=True
                )

            storages: list[optuna.storages.RDBStorage] = []
            study, points = load(), []
            fill(study, n=8)
            for _ in range(3):
                study = load() if reopen else study
                trial = study.ask()
                points.append(suggest(trial, MIXED))
                tell(study, trial, [smooth(points[-1])])
            for storage in storages:
                storage.engine.dispose()
            return points

        points = run(tmp_path / "a.db", reopen=False)
        assert points == run(tmp_path / "b.db", reopen=True)
        assert len({str(p) for p in points}) == 3

    @pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"random", "cmaes", "nsga2"}))
    def test_every_parameter_is_modelled_although_a_baseline_has_none(self, name):
        """After 40 noise-free trials the suggestions lie nearer to the optimum than random ones, in both
        coordinates."""
        parameters: dict[str, Parameter] = {"a": Float(0, 1), "b": Float(0, 1), "c": Categorical(("x", "y", "z"))}

        def score(point):
            return -((point["a"] - 0.8) ** 2) - (point["b"] - 0.3) ** 2 - 0.2 * (point["c"] != "y")

        study = new_study(name, parameters=parameters)
        fill(study, parameters, n=40, score=score)
        points = []
        for _ in range(8):
            trial = study.ask()
            points.append(suggest(trial, parameters))
            tell(study, trial, [score(points[-1])])
        # Uniform draws would be off by 0.34 and 0.29 on average, and right about c in a third of the cases.
        assert np.mean([abs(p["a"] - 0.8) for p in points]) < 0.2
        assert np.mean([abs(p["b"] - 0.3) for p in points]) < 0.2
        assert sum(p["c"] == "y" for p in points) >= 5

    @pytest.mark.parametrize("name", SINGLE_OBJECTIVE)
    def test_four_trials_asked_without_an_answer_differ(self, name):
        study = new_study(name)
        fill(study)
        points = [UnitCube(MIXED).encode(suggest(study.ask(), MIXED)) for _ in range(4)]
        distances = [math.dist(a, b) for i, a in enumerate(points) for b in points[:i]]
        assert min(distances) > 0.01

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SINGLE_OBJECTIVE)
    def test_suggests_in_40_dimensions_after_100_trials(self, name, record_property):
        """The seconds are recorded, not judged."""
        parameters: dict[str, Parameter] = {
            f"coefficient.{e}.block.{i}": Float(0, 1.5) for e in ("a", "b", "c") for i in range(13)
        }
        parameters["preset"] = Categorical(("ties", "dare", "mean"))
        study = new_study(name, parameters=parameters)
        fill(
            study, parameters, n=100, score=lambda p: float(np.mean([v for v in p.values() if not isinstance(v, str)]))
        )
        start = time.process_time()
        point = suggest(study.ask(), parameters)
        seconds = time.process_time() - start
        record_property("cpu_s", seconds)
        print(f"{name}: {seconds:.2f} cpu s")
        assert holds(parameters, point)


class TestMakeSampler:
    def test_an_unknown_name_gets_a_hint(self):
        with pytest.raises(StudyFileError, match="did you mean 'botorch'"):
            make_sampler("botroch", parameters=MIXED, seed=0)

    @pytest.mark.parametrize("name", SINGLE_OBJECTIVE)
    def test_an_unknown_option_is_refused_before_the_first_trial(self, name):
        with pytest.raises(StudyFileError, match="nstartup"):
            make_sampler(name, parameters=MIXED, seed=0, nstartup=3)

    def test_all_bad_options_are_reported_at_once(self):
        with pytest.raises(StudyFileError, match=r"(?s)kernel.*'flat'.*n_startup.*cost_power"):
            make_sampler("botorch", parameters=MIXED, seed=0, kernel="flat", n_startup=0, cost_power=2)

    def test_cmaes_refuses_several_objectives(self):
        with pytest.raises(StudyFileError, match="one objective"):
            make_sampler("cmaes", parameters=MIXED, seed=0, n_objectives=2)

    def test_the_table_loads_no_torch(self):
        code = "import sys, merge_search.search.samplers; sys.exit('torch' in sys.modules or 'botorch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
