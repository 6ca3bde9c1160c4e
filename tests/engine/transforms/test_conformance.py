"""Every transform keeps what `merge_search.testing` says of transforms, and so do those of a user's file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_families import add_adapter, write_family

from merge_search.recipe import Models
from merge_search.rules import TRANSFORMS, use_rule_files
from merge_search.testing import TransformCase, TransformConformance

USERS = Path(__file__).parents[2] / "support" / "user_transforms.py"
CASES: dict[str, dict[str, Any]] = {
    "stack": {"options": {"layers": "0 1 1"}, "wrong": [{"layers": "0 2"}, {"layers": "a"}, {"layers": "-"}]},
    "mal": {"options": {"same_shape": True}, "wrong": [{"blocks": "0", "same_shape": True}, {"passes": 0}]},
    "alone": {"options": {"model": "lora"}, "wrong": [{"model": "nobody"}]},
    "smile": {"options": {"rank": 2, "top_k": 2}, "wrong": [{"rank": 1000}, {"top_k": 3}, {"modules": "head"}]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A base, a fine-tune and an adapter."""
    folder = tmp_path_factory.mktemp("family")
    found = write_family(folder, experts=("a",))
    return found.model_copy(update={"experts": {**found.experts, "lora": add_adapter(folder / "lora", found.base)}})


def test_every_transform_has_a_case() -> None:
    assert {name for name, row in TRANSFORMS.items() if not row.is_outside} == set(CASES)


@pytest.mark.parametrize("name", sorted(CASES))
class TestTable(TransformConformance):
    @pytest.fixture
    def case(self, name: str, models: Models) -> TransformCase:
        return TransformCase(name, models, **CASES[name])


@pytest.mark.parametrize(("name", "wrong"), [("soup", []), ("scaled", [{"factor": 0.0}])])
class TestUsersOwn(TransformConformance):
    """The transforms of a user's file."""

    @pytest.fixture
    def case(self, name: str, wrong: list[Any], models: Models) -> Iterator[TransformCase]:
        use_rule_files([USERS])
        yield TransformCase(name, models, wrong=wrong)
        use_rule_files([])


FAULTY = """
import torch
from merge_search.engine.checkpoints.writer import write_model
from merge_search.rules import Transformed, transform

def write(sources, out, factor):
    tensors = ((n, factor * sources.base.tensor(n)) for n in sources.base.headers)
    base = sources.base
    write_model(out, like=base.folder, config=base.config, headers=base.headers, tensors=tensors)
    return out

@transform("draws", merges=False)
def draws(sources, out):
    "a random factor"
    return Transformed(write(sources, out / "base", torch.rand(())))

@transform("forgets")
def forgets(sources, out):
    "an expert is missing"
    return Transformed(write(sources, out / "base", 1.0), {"a": sources.experts["a"].folder})

@transform("elsewhere", merges=False)
def elsewhere(sources, out):
    "a folder that is not below out"
    return Transformed(write(sources, out.parent.parent / "elsewhere", 1.0))
"""


@pytest.mark.parametrize(
    ("name", "test", "problem"),
    [
        ("draws", "test_equal_models_and_options_give_equal_bits", None),
        ("draws", "test_its_sources_and_the_global_generators_are_left_alone", None),
        ("forgets", "test_it_returns_every_expert_or_none", "must return the experts a, lora, returned a"),
        ("elsewhere", "test_it_returns_every_expert_or_none", "must return folders below `out`"),
    ],
)
def test_a_fault_of_a_transform_is_noticed(
    tmp_path: Path, models: Models, name: str, test: str, problem: str | None
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    use_rule_files([tmp_path / "faulty.py"])
    try:
        with pytest.raises(Exception, match=problem):
            getattr(TransformConformance(), test)(TransformCase(name, models), tmp_path / "made")
    finally:
        use_rule_files([])
