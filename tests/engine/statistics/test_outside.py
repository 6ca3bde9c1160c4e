"""A statistic from outside is one like any other: measured once, stored by its file, checked, named by other rules."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from token_bench import N_FIT, NAME, OWNERS, Bench, apply, snapshot

from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.statistics.provider import DataStatistics
from merge_search.engine.statistics.store import FOLDER, FolderStatistics
from merge_search.errors import NonFiniteError, RecipeError, RuleError
from merge_search.presets import preset
from merge_search.recipe import Recipe
from merge_search.rules import STATISTICS, statistic_named, table, use_rule_files

USERS = Path(__file__).parents[2] / "support" / "user_rules.py"
HEAD = "import torch\nfrom merge_search.rules import measure, statistic\n"  # two lines
PLAIN = "    return {name: torch.ones_like(view) for name, view in work.views.items()}\n"


@pytest.fixture(autouse=True)
def no_rules_left() -> Iterator[None]:
    yield
    use_rule_files([])


@pytest.fixture
def use(tmp_path: Path) -> Callable[..., Path]:
    """Use a rule file of this text below `HEAD`."""

    def write(text: str, name: str = "rules.py", *others: Path) -> Path:
        path = tmp_path / name
        path.write_text(HEAD + text)
        use_rule_files([path, *others])
        return path

    return write


def again(bench: Bench) -> DataStatistics:
    """The statistics of another process on the same files."""
    return DataStatistics(bench.pool, bench.live, [bench.tasks], OWNERS, folder=bench.folder)


# --- measured and stored


def test_it_is_the_mean_over_rows_then_over_tasks_at_the_expert_and_its_rows_are_counted(bench: Bench) -> None:
    use_rule_files([USERS])
    rows = bench.gradients("b")
    for name in bench.pool.groups:
        wanted = torch.stack([of_task[name].abs().pow(3).mean(0) for of_task in rows.values()]).mean(0)
        found = bench.statistics.get("signal@power=3.0", "b", name)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert bench.statistics.questions == 3 * (N_FIT["two"] + N_FIT["three"])
    squares = [bench.statistics.get(kind, "b", NAME) for kind in ("signal", "fisher")]
    torch.testing.assert_close(*squares)


def test_a_file_that_was_changed_is_measured_again_and_the_same_one_is_not(bench: Bench, use: Any) -> None:
    text = "@statistic('mine', questions=0)\ndef f(work):\n    'x'\n" + PLAIN
    use(text)
    bench.statistics.get("mine", "a", NAME)
    bench.statistics.get("fisher", "a", NAME)
    assert len(list(bench.folder.iterdir())) == 2
    use(text, "renamed.py")
    again(bench).get("mine", "a", NAME)
    assert len(list(bench.folder.iterdir())) == 2
    use(text.replace("ones_like", "zeros_like"))
    found = again(bench)
    assert float(found.get("mine", "a", NAME).sum()) == 0.0  # type: ignore[union-attr]
    found.get("fisher", "a", NAME)
    assert len(list(bench.folder.iterdir())) == 3


def test_an_installed_package_brings_statistics_and_says_by_its_version_that_numbers_changed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(STATISTICS._rows)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("mine", "a_package_of_statistics", table.GROUP)
    monkeypatch.setattr(table, "entry_points", lambda group: [point])
    try:
        for version, n_files in ((1, 1), (1, 1), (2, 2)):
            text = f"@statistic('mine', questions=1, version={version})\ndef f(work):\n    'x'\n{PLAIN}"
            (tmp_path / "a_package_of_statistics.py").write_text(HEAD + text + "#" * version)  # another size
            monkeypatch.setattr(table, "_is_loaded", False)
            monkeypatch.delitem(sys.modules, "a_package_of_statistics", raising=False)
            STATISTICS._rows.pop("mine", None)
            assert again(bench).get("mine", "a", NAME) is not None
            assert len(list(bench.folder.iterdir())) == n_files
    finally:
        STATISTICS._rows.clear()
        STATISTICS._rows.update(before)


@pytest.mark.parametrize(("point", "c"), [("base", 0.0), ("expert", 1.0), ("either", 1.0), ("either", 0.25)])
def test_it_is_measured_at_the_weights_of_its_row(bench: Bench, use: Any, point: str, c: float) -> None:
    use(f"@statistic('mine', point='{point}')\ndef f(work):\n    'x'\n    return dict(work.views)\n")
    name = "lm_head.weight"
    base, expert = bench.pool.base(name), bench.pool.expert("b", name)
    found = bench.statistics.get("mine@0.25" if c == 0.25 else "mine", "b", name)
    torch.testing.assert_close(found, torch.lerp(base, expert, c))


def test_models_are_there_for_what_the_row_declares(bench: Bench, use: Any) -> None:
    """A stored file is found by the models that its row declares, so no others are given. Each expert has its rows."""
    kinds = [(p, r) for p in ("base", "expert") for r in ("point", "pair", "all")]
    body = "    size = 2.0 * (work.models is not None) + (work.expert == 'b')\n"
    body += "    return {name: torch.tensor(size) for name in work.views}\n"
    use("".join(f"@statistic('{p}_{r}', point='{p}', reads='{r}')\ndef f(work):\n    'x'\n{body}" for p, r in kinds))
    found = {(p, r): float(bench.statistics.get(f"{p}_{r}", "b", NAME)) for p, r in kinds}  # type: ignore[arg-type]
    assert found == {
        ("base", "point"): 0.0, ("base", "pair"): 3.0, ("base", "all"): 2.0,
        ("expert", "point"): 1.0, ("expert", "pair"): 3.0, ("expert", "all"): 3.0,
    }  # fmt: skip
    paths = {kind: {bench.statistics._path("_".join(kind), e) for e in "ab"} for kind in kinds}
    assert {kind: len(files) for kind, files in paths.items()} == {
        ("base", "point"): 2, ("base", "pair"): 2, ("base", "all"): 1,
        ("expert", "point"): 2, ("expert", "pair"): 2, ("expert", "all"): 2,
    }  # fmt: skip


def test_what_it_asks_besides_is_counted_and_what_it_writes_into_the_model_is_undone(bench: Bench, use: Any) -> None:
    use(
        "@statistic('mine', questions=1)\ndef f(work):\n    'x'\n    work.on_asked(100)\n"
        "    for view in work.views.values():\n        view.zero_()\n    return {}\n"
    )
    before = snapshot(bench.live)
    assert bench.statistics.get("mine", "a", NAME) is None
    assert bench.statistics.questions == 100 + N_FIT["one"]
    assert all(torch.equal(before[n], v) for n, v in bench.live.views.items())


def test_an_option_prompts_is_the_most_rows_of_each_task(bench: Bench, use: Any) -> None:
    body = f"    return {{{NAME!r}: torch.tensor(float(work.n_rows))}}\n"
    use("@statistic('mine', questions=1)\ndef f(work, *, prompts: int = 2):\n    'x'\n" + body)
    for kind, n_rows in (("mine", 4), ("mine@prompts=1", 2), ("mine@prompts=99", N_FIT["two"] + N_FIT["three"])):
        assert float(bench.statistics.get(kind, "b", NAME)) == n_rows  # type: ignore[arg-type]
    assert bench.statistics.questions == 4 + 2 + 6


def test_options_of_every_type_are_read_from_a_name(use: Any) -> None:
    use(
        "from typing import Literal\n@statistic('mine')\n"
        "def f(work, *, n: int = 2, x: float = 0.5, on: bool = False, how: Literal['a', 'b'] = 'a', c: float = None):\n"
        "    'x'\n"
    )
    plain = {"n": 2, "x": 0.5, "on": False, "how": "a", "c": None}
    for text, changed in (
        ("", {}), ("@n=3,on=True", {"n": 3, "on": True}), ("@how=b,x=1e-05", {"how": "b", "x": 1e-5}),
        ("@c=2", {"c": 2.0}),
    ):  # fmt: skip
        named = statistic_named("mine" + text)
        assert named is not None
        assert named[0].options == {**plain, **changed}
    for text in ("@n=2.5", "@on=yes", "@how=c", "@m=1", "@n", "@0.5", "@n=3,"):
        assert statistic_named("mine" + text) is None


# --- checks


@pytest.mark.parametrize(
    ("arguments", "body", "message"),
    [
        ("", "return [1.0]", ", expert 'a' must be a dictionary from tensor name to tensor, got list"),
        ("", "return None", "must be a dictionary from tensor name to tensor, got NoneType"),
        ("", "return {'lm_head': torch.ones(1)}", "must be named like the merged tensors, got 'lm_head'; did you mean"),
        ("", "return {NAME: 1.0}", " for tensor 'model.norm.weight', expert 'a' must be a tensor, got float"),
        ("", "return {NAME: torch.ones(16, dtype=torch.int64)}", "must be a floating dtype, got torch.int64"),
        ("", "return {NAME: torch.ones(15)}", "must have the tensor's shape (16,), got (15,)"),
        ("point='base'", "return {NAME: torch.ones(2, 16)}", "'model.norm.weight' must have the tensor's shape (16,)"),
    ],
)
def test_what_it_returns_is_checked(bench: Bench, use: Any, arguments: str, body: str, message: str) -> None:
    before = snapshot(bench.live)
    body = body.replace("NAME", repr(NAME))
    path = use(
        f"@statistic('mine', {arguments})\ndef f(work):\n    'x'\n    work.views[{NAME!r}].zero_()\n    {body}\n"
    )
    with pytest.raises(RuleError) as refused:
        bench.statistics.get("mine", "a", NAME)
    assert str(refused.value).startswith(f"{path}:3: what statistic 'mine' returns")
    assert message in str(refused.value)
    assert not list(bench.folder.glob("*"))
    assert all(torch.equal(before[n], v) for n, v in bench.live.views.items())


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "1e300"])
def test_numbers_that_are_not_finite_in_float32_are_refused(bench: Bench, use: Any, value: str) -> None:
    body = f"return {{{NAME!r}: torch.tensor({value}, dtype=torch.float64)}}"
    path = use(f"@statistic('mine')\ndef f(work):\n    'x'\n    {body}\n")
    place = re.escape(f"{path}:3: what statistic 'mine' returns for tensor '{NAME}', expert 'a' must be finite")
    with pytest.raises(NonFiniteError, match=f"measuring 'mine' of expert 'a': {place}"):
        bench.statistics.get("mine", "a", NAME)


def test_shapes_that_only_its_readers_know_are_kept_where_the_row_says_so(bench: Bench, use: Any) -> None:
    body = f"    return {{{NAME!r}: torch.arange(3, dtype=torch.float64)}}\n"
    use("@statistic('mine', broadcasts=False)\ndef f(work):\n    'x'\n" + body)
    found = bench.statistics.get("mine", "a", NAME)
    assert torch.equal(found, torch.tensor([0.0, 1.0, 2.0]))  # type: ignore[arg-type]
    assert found.dtype == torch.float32  # type: ignore[union-attr]


def test_a_failure_inside_is_given_with_the_line_that_raised_it(bench: Bench, use: Any) -> None:
    path = use("@statistic('mine')\ndef f(work):\n    'x'\n    a = 1\n    return work.nothing\n")
    wanted = re.escape(f"{path}:7: statistic 'mine' failed: AttributeError")
    with pytest.raises(RuleError, match=wanted):
        bench.statistics.get("mine", "a", NAME)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("@statistic('fisher')\ndef f(work):\n    'x'\n", 3, "the statistic 'fisher' is built in"),
        ("@statistic()\ndef f(work, rows):\n    'x'\n", 3, "f must take (work, *, option=default)"),
        (
            "@statistic(point='middle')\ndef f(work):\n    'x'\n",
            3,
            "point must be among base, expert, either, got 'mid",
        ),
        ("@statistic(reads='both')\ndef f(work):\n    'x'\n", 3, "reads must be among point, pair, all, got 'both'"),
        (
            "@statistic(point='either')\ndef f(work, *, n: int = 1):\n    'x'\n",
            3,
            "a statistic at scaled experts can have no options",
        ),
        (
            "@measure(statistics=('fisher@{c}',))\ndef f(context, *, power: float = 1.0):\n    'x'\n",
            3,
            "statistics may name options with a default in braces, got fisher@{c}",
        ),
        (
            "from merge_search.rules import operator\n@operator(statistics=('gram@{x}',))\ndef f(context):\n    'x'\n",
            4,
            "statistics may name options with a default in braces, got gram@{x}",
        ),
    ],
)
def test_a_row_that_cannot_be_is_refused_with_its_line(
    use: Any, tmp_path: Path, text: str, line: int, message: str
) -> None:
    with pytest.raises(RuleError) as refused:
        use(text)
    assert str(refused.value).startswith(f"{tmp_path / 'rules.py'}:{line}: ")
    assert message in str(refused.value)


# --- read by other rules


def settings(measure: str, **options: Any) -> dict[str, Any]:
    splice = {"kind": "score", "score": {"measure": measure, "options": options}}
    return {"splice": splice, "coefficients": {"a": 1.0, "b": 1.0}}


def recipe(bench: Bench, **fields: Any) -> Recipe:
    return Recipe.from_dict({"models": bench.pool.models, **fields})


def test_a_measure_an_operator_and_the_external_scores_read_it(bench: Bench) -> None:
    use_rule_files([USERS])
    name = "model.layers.1.mlp.up_proj.weight"
    deltas = [bench.pool.expert(e, name) - bench.pool.base(name) for e in "ab"]
    signals = [bench.statistics.get("signal", e, name) for e in "ab"]
    by_hand = torch.where(signals[0] >= signals[1], *deltas)  # type: ignore[operator]
    found = apply(bench, recipe(bench, operator={"name": "loudest"}))
    torch.testing.assert_close(found[name], bench.pool.base(name) + by_hand)
    weights = [s * d.abs() for s, d in zip(signals, deltas, strict=True)]
    mean = sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
    found = apply(bench, recipe(bench, **settings("signal_size", power=2)))
    torch.testing.assert_close(found[name], bench.pool.base(name) + mean, rtol=1e-3, atol=1e-5)
    found = apply(bench, recipe(bench, **settings("external", name="signal")))
    mean = sum(s * d for s, d in zip(signals, deltas, strict=True)) / sum(signals)  # type: ignore[arg-type, operator]
    torch.testing.assert_close(found[name], bench.pool.base(name) + mean, rtol=1e-3, atol=1e-5)


def test_a_recipe_names_the_files_of_the_statistics_that_it_reads(bench: Bench, use: Any) -> None:
    use(
        "@measure('loud', statistics=('signal',))\ndef f(context):\n    'x'\n"
        "    return [context.statistic('signal', e) for e in context.experts]\n",
        "rules.py",
        USERS,
    )
    assert recipe(bench, **settings("loud")).rules.keys() == {"rules.py", "user_rules.py"}
    assert recipe(bench, **settings("external", name="signal")).rules.keys() == {"user_rules.py"}
    assert recipe(bench, **settings("external")).rules == {}
    assert recipe(bench, **settings("fisher")).rules == {}
    stored = recipe(bench, **settings("external", name="signal"))
    use_rule_files([])
    (problem,) = MergeEngine(bench.pool).check(Recipe.from_json(stored.to_json()))
    assert "rules: the recipe was made with the rule file user_rules.py" in problem


def test_an_export_merges_again_from_the_numbers_that_travel_with_it(bench: Bench, tmp_path: Path) -> None:
    use_rule_files([USERS])
    made = preset("signal_ties", bench.pool.models)
    whole = made.model_copy(update={"assess": made.assess.model_copy(update={"options": {"power": 1}})})
    merged = apply(bench, whole)
    files = bench.statistics.files()
    assert set(files) == {f"{FOLDER}/signal@power=1.0/{e}.safetensors" for e in "ab"}
    for target, source in files.items():
        (tmp_path / "export" / target).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "export" / target).write_bytes(Path(source).read_bytes())
    pool = ModelPool(bench.pool.models, device="cpu")
    pool.statistics = FolderStatistics(tmp_path / "export" / FOLDER)
    assert MergeEngine(pool).check(whole) == []
    assert all(torch.equal(t, merged[n]) for n, t in MergeEngine(pool).merged(whole))


def test_a_name_that_nothing_measures_is_refused_before_any_weight_is_read(bench: Bench, use: Any) -> None:
    use("@measure('loud', statistics=('signl',))\ndef f(context):\n    'x'\n    return list(context.deltas)\n")
    with pytest.raises(RecipeError, match="needs the statistic 'signl': there is no file"):
        apply(bench, recipe(bench, **settings("loud")))
