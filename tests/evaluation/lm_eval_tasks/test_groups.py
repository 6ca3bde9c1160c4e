"""A group or tag counts as one task, and its score is lm-eval's own aggregate, digit for digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_lm import (
    CHOICE,
    GENERATE,
    TASKS,
    THIRDS,
    WORD,
    bound,
    by_lm_eval,
    documents,
    evaluator,
    make_model,
    write_tasks,
)

from merge_search.errors import StudyFileError
from merge_search.evaluation import Split

pytestmark = pytest.mark.usefixtures("own_dataset_cache")

SIZES = {"g_long": 40, "g_short": 16, "g_mid": 24}


def write_groups(folder: Path, *, n: dict[str, int] | None = None) -> Path:
    """Three choice tasks of several lengths; group ``g`` of a task and a group, its twin by means, and a bare one."""
    sizes = n or SIZES
    for i, (name, rows) in enumerate(sizes.items()):
        data = folder / name
        own = {**CHOICE, "tag": "g_tag", "dataset_kwargs": {"data_files": {"test": f"{name}/test.jsonl"}}}
        write_tasks(data, {}, test=documents(rows, i))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **own}))
    inner: dict[str, Any] = {"group": "g_inner", "task": ["g_short", "g_mid"]}
    inner["aggregate_metric_list"] = [{"metric": "acc"}]
    outer = {"group": "g", "task": ["g_long", "g_inner"]}
    sized: list[dict[str, Any]] = [{"metric": "acc"}, {"metric": "acc_norm", "weight_by_size": False}]
    groups = {
        "g_inner": inner,
        "g": {**outer, "aggregate_metric_list": sized},
        "g_means": {**outer, "group": "g_means", "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}]},
        "g_bare": {**outer, "group": "g_bare"},
    }
    for name, group in groups.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_groups(tmp_path_factory.mktemp("groups"))


@pytest.mark.parametrize("name", ["g", "g_means"])
def test_a_group_scores_as_lm_eval_aggregates_it_to_the_last_digit(folder: Path, name: str) -> None:
    model = make_model()
    ours = bound(folder, [name], model, tree_packing=False).evaluate(Split.SEARCH).scores
    theirs = by_lm_eval(folder, [name], model)["results"]
    labels = ["acc", "acc_norm"] if name == "g" else ["acc"]
    for task, label in [*((name, m) for m in labels), ("g_inner", "acc"), ("g_short", "acc"), ("g_long", "acc_norm")]:
        assert ours[f"{task}/{label}"].score == theirs[task][f"{label},none"], task
        assert ours[f"{task}/{label}"].stderr == theirs[task][f"{label}_stderr,none"], task
    assert f"{name}/brier_score" not in ours  # lm-eval does not aggregate it


def test_a_split_scores_as_lm_eval_on_its_documents(folder: Path) -> None:
    e, model = bound(folder, ["g"], make_model(), shares=THIRDS, tree_packing=False), make_model()
    ours = e.evaluate(Split.VALIDATION).scores
    ids = {t.name: sorted(q.doc_id for q in t.select(Split.VALIDATION, 1.0)) for t in e.tasks}
    theirs = by_lm_eval(folder, ["g"], model, samples=ids)["results"]
    assert ours["g/acc"].score == theirs["g"]["acc,none"]


def test_a_group_comes_before_its_members_and_only_it_counts(folder: Path) -> None:
    infos = evaluator(folder, ["g"]).metrics()
    counts = {m.task: m.member_of for m in infos}
    assert list(counts.items()) == [
        ("g", ""), ("g_long", "g"), ("g_inner", "g"), ("g_short", "g_inner"), ("g_mid", "g_inner")
    ]  # fmt: skip
    assert [m.metric for m in infos if m.task == "g"] == ["acc", "acc_norm"]
    whole = next(m for m in infos if m.task == "g")
    assert whole.n_questions == {Split.SEARCH: 80}
    assert whole.chance == pytest.approx(0.25)


def test_a_member_that_is_named_counts_itself_too(folder: Path) -> None:
    infos = evaluator(folder, ["g_short", "g"]).metrics()
    assert {m.task for m in infos if not m.member_of} == {"g", "g_short"}


def test_tags_and_groups_without_an_aggregation_pool_what_all_members_report(folder: Path) -> None:
    for name in ("g_tag", "g_bare"):
        e = bound(folder, [name])
        scores = e.evaluate(Split.SEARCH).scores
        pooled = np.concatenate([scores[f"{task}/acc"].values for task in SIZES])
        assert scores[f"{name}/acc"].score == pytest.approx(pooled.mean())
        assert sorted(scores[f"{name}/acc"].values) == sorted(pooled)
        assert f"{name}/brier_score" not in scores  # not a mean
        assert {m.task for m in e.metrics() if not m.member_of} == {name}


def test_pooled_questions_have_ids_of_their_own_and_nested_prefixes(folder: Path) -> None:
    """The same documents may stand in two members."""
    e = bound(folder, ["g_means"], shares=THIRDS)
    whole = e.evaluate(Split.SEARCH).scores["g_means/acc"]
    assert len(set(whole.ids)) == len(whole.ids)
    assert all(i.split(":")[0] in SIZES for i in whole.ids)
    for share in (1e-6, 1 / 3, 0.5):
        part, rest = (e.evaluate(Split.SEARCH, f, after=a).scores["g_means/acc"] for f, a in ((share, 0), (1, share)))
        assert part.ids + rest.ids == whole.ids
        assert [*part.values, *rest.values] == pytest.approx(whole.values)


def test_values_of_members_that_weigh_the_same_have_the_mean_of_means_as_their_mean(folder: Path) -> None:
    scores = bound(folder, ["g_means"]).evaluate(Split.SEARCH).scores
    means = [scores[f"{task}/acc"].score for task in SIZES]
    assert scores["g_means/acc"].values.mean() == pytest.approx(sum(means) / 3)
    assert scores["g_means/acc"].score == pytest.approx(sum(means) / 3)
    assert scores["g_means/acc"].is_mean


def test_the_main_metric_of_a_group_can_be_chosen(folder: Path) -> None:
    assert evaluator(folder, ["g"], metrics={"g": "acc_norm"}).metrics()[0].name == "g/acc_norm"
    with pytest.raises(StudyFileError, match=r"metrics\.g: the task reports no metric 'accc'; did you mean 'acc'\?"):
        evaluator(folder, ["g"], metrics={"g": "accc"})


def test_members_count_one_by_one_where_they_share_no_mean_or_the_study_says_so(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tasks(tmp_path, {"t_generate": GENERATE, "t_word": WORD})
    infos = evaluator(tmp_path, ["t_all"]).metrics()
    assert {m.task for m in infos} == {"t_generate", "t_word"}
    assert not any(m.member_of for m in infos)
    assert "'t_all': its tasks report no mean in common and count one by one" in caplog.text
    each = evaluator(folder, ["g"], groups="each")
    assert [m.task for m in each.metrics() if m.metric == "acc"] == ["g_long", "g_short", "g_mid"]
    assert each.fingerprint() == evaluator(folder, ["g_long", "g_short", "g_mid"]).fingerprint()
    assert each.fingerprint() != evaluator(folder, ["g"]).fingerprint()
    assert evaluator(folder, ["g"]).fingerprint() != evaluator(folder, ["g_means"]).fingerprint()


def test_tasks_of_an_inner_group_that_cannot_count_are_members_of_the_outer_one(tmp_path: Path) -> None:
    write_tasks(tmp_path, {"t_choice": CHOICE, "t_generate": GENERATE, "t_word": WORD})
    inner = {"group": "inner", "task": ["t_generate", "t_word"]}
    group = {"group": "h", "task": ["t_choice", inner], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "h.yaml").write_text(yaml.safe_dump(group))
    e, model = bound(tmp_path, ["h"], tree_packing=False), make_model()
    assert {m.task: m.member_of for m in e.metrics()} == {"h": "", "t_choice": "h", "t_generate": "h", "t_word": "h"}
    theirs = by_lm_eval(tmp_path, ["h"], model)["results"]
    assert e.evaluate(Split.SEARCH).scores["h/acc"].score == theirs["h"]["acc,none"]


def test_tasks_that_no_group_names_are_as_before(scored_folder: Path) -> None:
    assert not any(m.member_of for m in evaluator(scored_folder, list(TASKS)).metrics())
