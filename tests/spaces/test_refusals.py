"""Mistakes in a study file's space are refused with place and hint, all at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_spaces import GENOME, build, make_context

from merge_search.errors import SpaceError
from merge_search.search.start.baselines import baselines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "slerp"}, "genome.merge_method: slerp has no place"),
        ({"merge_method": "tise"}, "genome.merge_method"),
        ({"normalize": True}, "genome.normalize"),
        ({"tokenizer_source": "union"}, "genome.tokenizer_source"),
        ({"layer_granularity": 4}, r"genome.layer_granularity: must divide the 6 blocks \(1, 2, 3, 6\), got 4"),
        ({"filters": ["self_atn"]}, "genome.filters: no tensor .*did you mean 'self_attn'"),
        ({"lambda": 1.0}, "genome.lambda: unknown key"),
        ({"smoth": True}, "genome.smoth: unknown key; did you mean 'smooth'"),
        ({"models": ["maths", "poems"]}, "'poems' is none of the study's experts"),
        ({"models": ["maths", "models/maths"]}, "expert 'maths' stands twice"),
        ({"base_model": "models/code"}, "genome.base_model: 'models/code' is not the base"),
        ({"base_model": None}, "genome.base_model: is missing"),
        ({"merge_method": "ties", "allow_negative_weights": True}, "genome.allow_negative_weights"),
        ({"merge_method": "linear", "normalize": False}, "genome.normalize: false would scale the base"),
        ({"merge_method": "linear", "models": ["maths"], "base_model": None}, "0 dimensions and needs at least 1"),
    ],
)
def test_what_a_mergekit_file_asks_in_vain_is_named_by_its_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        build("mergekit_genome", genome={**GENOME, "merge_method": "task_arithmetic", **change})


def test_a_mergekit_file_needs_to_be_there_and_to_have_a_genome(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="no such file"):
        build("mergekit_genome", file=str(tmp_path / "no.yaml"))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("models: []\n")
    with pytest.raises(SpaceError, match="needs a mapping under the key 'genome'"):
        build("mergekit_genome", file=str(wrong))
    with pytest.raises(SpaceError, match="'mathz' is neither 'base' nor an expert; did you mean 'maths'"):
        build("mergekit_genome", genome={**GENOME, "merge_method": "ties"}, models={"models/code": "mathz"})
    with pytest.raises(SpaceError, match="either file"):
        build("mergekit_genome")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("compatibility", {"coeficients": {}}, "space.coeficients: unknown key; did you mean 'coefficients'"),
        (
            "compatibility",
            {"coefficients": {"pre": "block"}},
            "space.coefficients.pre: unknown key; did you mean 'per'",
        ),
        ("compatibility", {"coefficients": {"bounds": [1, 0]}}, "low < high"),
        ("compatibility", {"density": {"bounds": [0, 1]}}, r"densities must lie in \(0, 1\]"),
        ("compatibility", {"presets": ["tie"]}, "no preset is called 'tie'; did you mean 'ties'"),
        ("compatibility", {"presets": ["expert"]}, "has no coefficients to search"),
        (
            "compatibility",
            {"presets": ["ties", {"tsv_m": {"rank_shar": 0.3}}]},
            "space.presets.1: 'tsv_m' has no option 'rank_shar'; did you mean 'rank_share'",
        ),
        ("uniform", {"presets": [{"ties": {"x": 1}}]}, "'ties' has no option 'x'"),
        ("uniform", {"presets": [{"tsv_m": {"rank_share": [0.1]}}]}, "two or more values to choose from"),
        ("uniform", {"presets": [{"tsv_m": {"rank_share": "half"}}]}, "must be a number, got 'half'"),
        (
            "uniform",
            {"presets": [{"breadcrumbs": {"gamma": 2}}]},
            r"'gamma' of 'breadcrumbs' must lie in \[0, 0.99\], got 2",
        ),
        ("uniform", {"presets": [{"tsv_m": 0.3}]}, "space.presets.0: write NAME or {NAME: {option: value}}"),
        ("uniform", {"presets": [{}]}, "space.presets.0: write NAME or {NAME: {option: value}}"),
        ("uniform", {"presets": [{"tsvm": {}}]}, "no preset is called 'tsvm'; did you mean 'tsv_m'"),
        ("compatibility", {"presets": ["ties"], "assess": ["magnitude"]}, "not both"),
        ("compatibility", {"assess": ["magnitud"]}, "no assessment is called 'magnitud'; did you mean 'magnitude'"),
        (
            "compatibility",
            {"select": ["topk"]},
            "space.select.0: no select kind is called 'topk'; did you mean 'top_k'",
        ),
        ("compatibility", {"select": ["threshold"]}, "give the number"),
        ("compatibility", {"assess": ["variance"], "select": ["all"], "splice": ["argmax"]}, "no combination"),
        ("uniform", {"presets": []}, "space.presets"),
        ("depth_curve", {"knots": 7}, "at most one knot per block, 6 here, got 7"),
        ("depth_curve", {"density_knots": 3}, "reads no density"),
        ("blockwise", {"density": {"per": "expert"}}, "reads no density"),
        ("lowrank", {"rank": 4}, "at most the number of experts and of knots, 3 here, got 4"),
        ("expert_choice", {"span": 0}, "space.span"),
    ],
)
def test_wrong_options_are_refused_with_place_and_hint(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        build(kind, **options)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(SpaceError) as caught:
        build("compatibility", coeficients={}, density={"bounds": [0, 2]}, presets=[])
    assert len(caught.value.problems) == 3


def test_spaces_say_when_they_are_large_and_refuse_to_be_absurd() -> None:
    assert build("blockwise").notes == []
    assert "303 dimensions" in build("blockwise", make_context(100)).notes[0]
    with pytest.raises(SpaceError, match="at most 100000 can be searched"):
        build("blockwise", make_context(1100, tuple(f"e{i}" for i in range(100))))


def test_models_without_blocks_are_told_what_fits() -> None:
    flat = make_context(0)
    for kind in ("blockwise", "depth_curve", "lowrank", "compatibility"):
        with pytest.raises(SpaceError, match="blocks"):
            build(kind, flat)
    assert len(build("uniform", flat).parameters) == 3


def test_a_point_outside_the_space_is_refused_with_all_its_faults() -> None:
    with pytest.raises(SpaceError) as caught:
        build("uniform").decode({"preset": "nothing", "coefficient": 9.0})
    assert len(caught.value.problems) == 3


def test_methods_for_adapters_are_searched_over_adapters_alone() -> None:
    whole = replace(make_context(), without_factors={"code": "it is whole"})
    with pytest.raises(SpaceError) as refused:
        build("compatibility", whole, presets=["ties", "copa", {"core": {"rule": "iso_c"}}])
    assert [p.split(" merges")[0] for p in refused.value.problems] == ["space.presets: 'copa'", "space.presets: 'core'"]
    assert all("expert 'code' has none: it is whole" in p for p in refused.value.problems)
    space = build("compatibility", presets=["copa"], density={"bounds": [0.1, 1]})
    assert any(name.startswith("density") for name in space.parameters)
    assert "copa" in baselines(make_context(), ["copa"])
    assert "copa" not in baselines(whole, ["copa"])
