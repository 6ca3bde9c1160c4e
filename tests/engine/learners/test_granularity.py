"""Granularities from outside: a fit shares numbers as their functions say, and its recipe has plain numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_search.engine.engine import MergeEngine
from merge_search.engine.learners.block_outputs import fit_blocks
from merge_search.engine.learners.fit import FitSettings, Fitted, TaskLoss, fit
from merge_search.errors import InputError, RuleError
from merge_search.recipe import Recipe
from merge_search.rules import GRANULARITIES, use_rule_files
from merge_search.search.start.learned_space import LearnedSpace
from merge_search.study_file import Learner

HEAD = "from merge_search.rules import granularity\n"


@pytest.fixture(autouse=True)
def no_rules_left() -> Iterator[None]:
    yield
    use_rule_files([])


@pytest.fixture
def use(tmp_path: Path) -> Callable[[str], Path]:
    """Use a rule file with a granularity ``mine`` of this body."""

    def write(body: str, arguments: str = "group", given: str = "'mine'") -> Path:
        path = tmp_path / "rules.py"
        path.write_text(f"{HEAD}@granularity({given})\ndef f({arguments}):\n    'x'\n    {body}\n")
        use_rule_files([path])
        return path

    return write


def learn(models: Any, per: str, **coefficients: Any) -> Fitted:
    pool, live = models
    rows = torch.randint(0, 24, (6, 5), generator=torch.Generator().manual_seed(1))

    def loss(asked: Any) -> torch.Tensor:
        ids = rows[list(asked)]
        return live.model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    recipe = Recipe(models=pool.models, coefficients=coefficients or {"a": 0.3, "b": 0.3})
    settings = FitSettings(per=per, steps=4, batch_rows=3)
    return fit(MergeEngine(pool), live.model, live.views, recipe, {"t": TaskLoss(6, loss)}, settings)


def numbers(models: Any, recipe: Recipe) -> dict[tuple[str, str], float]:
    groups = models[0].groups
    return {(e, n): recipe.coefficient(e, group) for e in "ab" for n, group in groups.items()}


@pytest.mark.parametrize(
    ("body", "per"),
    [
        ("return 'all'", "expert"),
        ("return group.kind if group.block is None else str(group.block)", "block"),
        ("return group.tensor", "tensor"),
    ],
)
def test_a_function_that_says_what_a_built_in_one_says_gives_the_same_fit(
    make_models: Any, use: Any, body: str, per: str
) -> None:
    models = make_models()
    use(body)
    uneven = {"a": {"mlp": 0.5, "*": 0.2}, "b": 0.3}
    mine, built_in = learn(models, "mine", **uneven), learn(models, per, **uneven)
    assert numbers(models, mine.recipe) == numbers(models, built_in.recipe)
    assert mine.n_coefficients == built_in.n_coefficients
    assert (mine.losses == built_in.losses).all()


def test_tensors_of_a_part_share_a_number_across_blocks(make_models: Any, use: Any) -> None:
    models = make_models()
    use("return 'mlp' if group.kind == 'mlp' else 'others'")
    fitted = learn(models, "mine")
    assert fitted.n_coefficients == 4
    found = numbers(models, fitted.recipe)
    for e in "ab":
        by_part = {
            k: {found[e, n] for n, g in models[0].groups.items() if (g.kind == "mlp") == k} for k in (True, False)
        }
        assert [len(values) for values in by_part.values()] == [1, 1]
        assert by_part[True] != by_part[False]
    assert fitted.recipe.rules == {}
    use_rule_files([])
    assert Recipe.from_json(fitted.recipe.to_json()) == fitted.recipe
    assert MergeEngine(models[0]).check(fitted.recipe) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", "2: what granularity 'mine' returns for tensor .* must be a text, got int"),
        ("return group.nothing", "5: granularity 'mine' failed for tensor .*: AttributeError"),
    ],
)
def test_what_it_returns_is_checked(make_models: Any, use: Any, body: str, message: str) -> None:
    path = use(body)
    with pytest.raises(RuleError, match=re.escape(f"{path}:") + message):
        learn(make_models(), "mine")


def test_a_row_that_cannot_be_is_refused_with_its_line(use: Any, tmp_path: Path) -> None:
    for body, given, message in (
        ("group, *, n: int = 2", "'mine'", "a granularity can have no options"),
        ("group", "'block'", "the granularity 'block' is built in"),
        ("group, name", "'mine'", "f must take (group, *, option=default)"),
    ):
        with pytest.raises(RuleError, match=re.escape(f"{tmp_path / 'rules.py'}:2: {message}")):
            use("return ''", body, given)


def test_block_outputs_are_not_fitted_by_parts_that_may_span_blocks(make_models: Any, use: Any) -> None:
    use("return group.tensor")
    pool, live = make_models()
    losses = {"t": TaskLoss(1, lambda rows: torch.zeros(()))}
    with pytest.raises(InputError, match="set per to block or finer, not 'mine'"):
        fit_blocks(
            MergeEngine(pool), live.model, live.views, Recipe(models=pool.models), losses, {"t": "a"},
            FitSettings(per="mine", loss="block_output"),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("n_rows", "wanted"), [(99, ("expert", "expert")), (250, ("mine", "block")), (400, ("tensor", "mine"))]
)
def test_a_search_begins_with_the_finest_that_its_rows_are_enough_for(
    use: Any, n_rows: int, wanted: tuple[str, str]
) -> None:
    use("return group.tensor", given="'mine', rows=250")
    assert GRANULARITIES["mine"].rows == 250
    learner = Learner(per=["block", "mine", "expert", "tensor"], steps=[10, 20])
    space: Any = type("Space", (), {"notes": (), "transforms": None, "parameters": {}})
    assert LearnedSpace(space, learner, n_rows=n_rows)._granularities(n_rungs=2) == wanted
