"""Causal effects of the parts of an expert: values by hand, what they cost, and the agreement of their forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import here
from token_bench import N_FIT, OWNERS, Bench, apply, row_loss, snapshot
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.statistics.agreement import spearman
from merge_search.engine.statistics.effect import measure
from merge_search.engine.statistics.rows import TaskRows, Work
from merge_search.presets import preset
from merge_search.recipe import Group
from merge_search.rules import STATISTICS, statistic_named


def part_of(bench: Bench, partition: str) -> dict[str, str]:
    return {name: group.key(partition) for name, group in bench.pool.groups.items()}


def row_losses(bench: Bench, weights: Callable[[str], Tensor], expert: str) -> Tensor:
    """Loss of every row of an expert's tasks, and its weight: shape (2, rows)."""
    model, out = bench.model(expert), []
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights(name))
        tasks = [t for t, e in OWNERS.items() if e == expert]
        for task in tasks:
            rows = bench.tasks.rows[task]
            out += [[float(row_loss(model, ids)), 1 / (len(tasks) * len(rows))] for ids in rows]
    return torch.tensor(out, dtype=torch.float64).T


@pytest.mark.parametrize("partition", ["model", "block_kind"])
@pytest.mark.parametrize("form", ["activation", "ablation"])
def test_exact_effects_are_differences_of_losses_with_one_part_exchanged(
    bench: Bench, form: str, partition: str
) -> None:
    parts = part_of(bench, partition)
    whole, other = (lambda n: bench.pool.base(n)), (lambda n: bench.pool.expert("b", n))
    if form == "ablation":
        whole, other = other, whole
    before = row_losses(bench, whole, "b")
    for part in set(parts.values()):
        after = row_losses(bench, lambda n, part=part: other(n) if parts[n] == part else whole(n), "b")
        change = after[0] - before[0]
        wanted = torch.stack([(change * before[1]).sum(), (change.abs() * before[1]).sum()]).float()
        name = next(n for n in parts if parts[n] == part)
        found = bench.statistics.get(f"effect@form={form},partition={partition}", "b", name)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, msg=f"{form} {part}")


@pytest.mark.parametrize("partition", ["model", "block", "tensor"])
def test_the_gradient_form_is_the_inner_product_of_delta_and_gradient_over_the_part(
    bench: Bench, partition: str
) -> None:
    gradients, parts = bench.gradients("b", 0.0), part_of(bench, partition)
    for part in set(parts.values()):
        names = [n for n in parts if parts[n] == part]
        per_task = []
        for of_task in gradients.values():
            rows = sum(
                (of_task[n].double() * (bench.pool.expert("b", n) - bench.pool.base(n)).double()).flatten(1).sum(1)
                for n in names
            )
            per_task.append(torch.stack([rows.mean(), rows.abs().mean()]))  # type: ignore[union-attr]
        wanted = torch.stack(per_task).mean(0).float()
        found = bench.statistics.get(f"effect@partition={partition}", "b", names[0])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7, msg=part)


@pytest.mark.parametrize("form", ["gradient", "activation", "ablation"])
def test_effects_are_counted_asked_about_once_and_leave_the_live_weights_alone(bench: Bench, form: str) -> None:
    before = snapshot(bench.live)
    kind = f"effect@form={form},partition=block"
    for name in bench.pool.groups:
        bench.statistics.get(kind, "a", name)
    per_row = 3 if form == "gradient" else 1 + len(set(part_of(bench, "block").values()))
    assert bench.statistics.questions == per_row * N_FIT["one"]
    assert all(torch.equal(v, before[n]) for n, v in bench.live.views.items())
    again = Bench(bench.pool, bench.live, bench.folder)
    assert torch.equal(*(b.statistics.get(kind, "a", "lm_head.weight") for b in (bench, again)))  # type: ignore[arg-type]
    assert again.statistics.questions == 0
    assert again.statistics._path(kind, "a") != again.statistics._path(kind, "b")


def test_parts_that_an_expert_left_alone_are_not_asked_about_and_have_no_effect(
    make_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(*make_models(), tmp_path / "s")
    real, base = bench.pool.expert, bench.pool.base
    frozen = {n for n, p in part_of(bench, "block").items() if p == "block.0"}
    monkeypatch.setattr(bench.pool, "expert", lambda e, n: base(n) if n in frozen else real(e, n))
    for name in bench.pool.groups:
        found = bench.statistics.get("effect@form=activation,partition=block", "a", name)
        assert bool(found.any()) != (name in frozen), name  # type: ignore[union-attr]
    changed = {p for n, p in part_of(bench, "block").items() if n not in frozen}
    assert bench.statistics.questions == (1 + len(changed)) * N_FIT["one"]


class Pair:
    """Base and expert of one float64 model, as a statistic reads them."""

    def __init__(self, base: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> None:
        self._base, self._expert = base, expert

    def base(self, name: str) -> Tensor:
        return self._base[name]

    def expert(self, expert: str, name: str) -> Tensor:
        return self._expert[name]


def test_the_gradient_form_is_the_derivative_of_the_activation_form_in_float64() -> None:
    """d/de L(base + e delta on p) at 0, by central differences of float64 losses."""
    draw = torch.Generator().manual_seed(0)
    layers = [torch.nn.Embedding(11, 6), torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 11)]
    model = torch.nn.Sequential(*layers).double()
    views = {n: p.detach() for n, p in model.named_parameters()}
    base, delta = ({n: torch.randn(v.shape, generator=draw).double() for n, v in views.items()} for _ in range(2))
    rows = [torch.randint(11, (5,), generator=draw) for _ in range(3)]
    kinds = {"0": (None, "embedding"), "1": (0, "mlp"), "3": (0, "head")}
    groups = {n: Group(n, *kinds[n[0]]) for n in views}

    def loss(some: Sequence[int]) -> Tensor:
        return torch.nn.functional.cross_entropy(model(rows[some[0]][:-1]), rows[some[0]][1:])

    def found(form: str, size: float) -> dict[str, Tensor]:
        for n, v in views.items():
            v.copy_(base[n])
        pair: Any = Pair(base, {n: base[n] + size * delta[n] for n in base})
        task = TaskRows("one", (0, 1, 2), loss, "f")
        return measure(Work(model, views, groups, (task,), models=pair, expert="a"), form, "block_kind")

    step = 1e-4
    slopes, ahead, behind = found("gradient", 1.0), found("activation", step), found("activation", -step)
    assert len({float(s[0]) for s in slopes.values()}) == 3  # weight and bias share their part's number
    for name, slope in slopes.items():
        numeric = (ahead[name][0].double() - behind[name][0].double()) / (2 * step)
        assert float(slope[0]) == pytest.approx(float(numeric), rel=1e-5), name


def test_names_of_effects_say_what_differs_and_unknown_settings_are_no_statistic() -> None:
    parsed = statistic_named("effect@form=ablation")
    assert parsed is not None
    assert parsed[0].options == {"form": "ablation", "partition": "block"}
    for wrong in ("effect@form=sideways", "effect@size=2", "effect@0.5", "gradient@form=ablation"):
        assert statistic_named(wrong) is None
    assert STATISTICS["effect"].options == {"form": "gradient", "partition": "block"}


# --- densities and coefficients


def settings_of(bench: Bench, name: str, **options: Any) -> dict[str, tuple[float, float]]:
    """Density and coefficient of expert b, by tensor that it changed."""
    recipe = preset(name, bench.pool.models, coefficients=1.0)
    allocate = recipe.allocate.model_copy(update={"options": {**recipe.allocate.options, **options}})
    recipe = recipe.model_copy(update={"allocate": allocate})
    engine = MergeEngine(bench.pool)
    assert engine.check(recipe) == []
    changed = [n for n in bench.pool.groups if not torch.equal(bench.pool.base(n), bench.pool.expert("b", n))]
    settings = {n: engine._planner.settings(recipe, n) for n in changed}
    return {n: (s.densities[s.experts.index("b")], s.coefficients[s.experts.index("b")]) for n, s in settings.items()}


@pytest.mark.parametrize(
    ("form", "partition"),
    [("gradient", "block"), ("gradient", "tensor"), ("activation", "block"), ("ablation", "block_kind")],
)
def test_parts_with_more_effect_keep_more_and_count_more(bench: Bench, form: str, partition: str) -> None:
    column = 1 if form == "ablation" else 0
    found = settings_of(bench, "apl_paper", form=form, partition=partition, average=("loss", "rows")[column])
    parts = {n: part for n, part in part_of(bench, partition).items() if n in found}
    effect = {
        n: abs(float(bench.statistics.get(f"effect@form={form},partition={partition}", "b", n)[column]))  # type: ignore[index]
        for n in parts
    }
    by_part = {parts[n]: (effect[n], *found[n]) for n in parts}
    assert {n: found[n] for n in parts} == {n: by_part[parts[n]][1:] for n in parts}  # one number a part
    ordered = sorted(by_part.values())
    assert [d for _, d, _ in ordered] == sorted(d for _, d, _ in ordered)
    assert ordered[0][1] < ordered[-1][1]
    mean = sum(e**0.5 for e, *_ in ordered) / len(ordered)
    for e, _, c in ordered:
        assert c == pytest.approx(e**0.5 / mean, rel=1e-5)
    sizes = {n: bench.pool.base(n).numel() for n in parts}
    kept = sum(found[n][0] * size for n, size in sizes.items()) / sum(sizes.values())
    assert kept == pytest.approx(0.5, abs=1e-6)


def test_ranks_are_those_of_parts_however_many_tensors_a_part_has(bench: Bench) -> None:
    """Before the shift that keeps the mean, five parts are a quarter of the spread apart."""
    densities = sorted({d for d, _ in settings_of(bench, "apl_paper").values()})
    assert len(densities) == 5
    assert [b - a for a, b in pairwise(densities)] == pytest.approx([0.1] * 4, abs=1e-6)


def test_a_part_as_large_as_the_model_changes_nothing(bench: Bench) -> None:
    found = settings_of(bench, "apl_exact", partition="model")
    assert all(d == pytest.approx(0.5, abs=1e-9) and c == pytest.approx(1.0) for d, c in found.values())


def test_the_presets_merge_and_carry_their_statistics(bench: Bench) -> None:
    first, second = (apply(bench, preset(name, bench.pool.models)) for name in ("apl_paper", "apl_exact"))
    assert any(not torch.equal(first[n], second[n]) for n in first)
    assert "statistics/effect@form=activation,partition=block/a.safetensors" in bench.statistics.files()


# --- on real models


def test_exact_and_first_order_effects_agree_on_real_models(demo: Path, tmp_path: Path) -> None:
    """The command, on the demo's experts by lm-eval's tasks: blocks' attention, MLP and norms, and the embedding."""
    tasks = {"demo_maths": "maths", "demo_spelling": "spelling"}
    lm_eval = {
        "evaluator": "lm_eval", "tasks": list(tasks), "include_path": str(demo / "tasks"), "limit": 40, "fit_limit": 8,
    }  # fmt: skip
    study = {
        "study": {"name": "tiny"},
        "models": {
            "base": str(demo / "models" / "base"),
            "experts": {e: str(demo / "models" / e) for e in tasks.values()},
            "dtype": "float32",
        },
        "space": {"presets": ["apl_paper", {"apl_exact": {"form": "ablation", "partition": "block_kind"}}]},
        "evaluate": [lm_eval], "splits": {"search": 0.6, "fit": 0.3}, "device": "cpu",
        "search": {"n_trials": 1, "baselines": []},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    early = here("effects", tmp_path / "study.yaml", check=False)
    assert early.returncode == 2
    here("run", tmp_path / "study.yaml")
    done = here("effects", tmp_path / "study.yaml", "--partition", "block_kind")
    found = re.findall(r"over (\d+) parts: ([-.\d]+) with activation and ([-.\d]+) with ablation", done.stdout)
    assert len(found) == 2
    for parts, activation, _ in found:
        assert int(parts) >= 12
        assert float(activation) > 0.9
    assert re.search(r"block\.1\.mlp +0\.\d{5} +0\.\d{5} +0\.\d{5}", done.stdout)
    wrong = here("effects", tmp_path / "study.yaml", "--partition", "layer", check=False)
    assert "no partition is called 'layer'" in wrong.stderr


def test_rank_correlation_of_values_by_hand() -> None:
    assert spearman([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 40.0, 30.0]) == pytest.approx(0.8)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert spearman([1.0, 1.0, 2.0], [0.0, 0.0, 5.0]) == pytest.approx(1.0)
    assert spearman([1.0, 1.0], [0.0, 2.0]) == 0.0
