"""Merges are what version 0.1.0 made of the same models and recipes: bit for bit, but for what libraries round.

`fixed_models` and `fixed_recipes` say what is merged. `data/bits.json` says what version 0.1.0 made of it
(`record_bits.py`).
Rules on elements, counts and orders give the same bits on any machine: their weights are recorded as one sha256. Rules
that sum long vectors in float32, multiply or decompose matrices give what BLAS, LAPACK and torch make of it: of those,
lengths and some entries of the deltas are recorded, and must be met within a tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fixed_cases import SETS, depends_on_the_machine, digest, result, search_engine

from merge_search.presets import PRESETS

RECORDED = json.loads((Path(__file__).parent / "data" / "bits.json").read_text())
ALL = [(name, case) for name, models in SETS.items() for case in models.cases]
NEAR = [(name, case) for name, case in ALL if depends_on_the_machine(SETS[name].cases[case])]
IN_CHUNKS = [(name, case) for name, case in ALL if name == "varied float32" and (name, case) not in NEAR]
COMPILED = [
    *((name, case) for name, case in ALL if name == "long bfloat16" and case != "cabs"),
    *(("varied bfloat16", case) for case in ("preset: ties", "preset: della", "stage: argmax of the kept")),
]
COMMANDED = [pair for pair in ALL if pair not in IN_CHUNKS]


class Roots:
    """Folders of the sets' models, each written when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Path:
        root = self._folder / name.replace(" ", "_")
        return root if root.is_dir() else SETS[name].write(root)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Roots:
    return Roots(tmp_path_factory.mktemp("fixed"))


@pytest.mark.parametrize(("name", "case"), [pair for pair in COMMANDED if pair not in NEAR])
def test_the_command_merges_to_the_recorded_bits(roots: Roots, name: str, case: str) -> None:
    assert result(SETS[name], case, roots[name]) == RECORDED[name][case]


@pytest.mark.parametrize(("name", "case"), NEAR)
def test_the_command_merges_to_the_recorded_numbers_where_libraries_round(roots: Roots, name: str, case: str) -> None:
    found, recorded = result(SETS[name], case, roots[name]), RECORDED[name][case]
    assert isinstance(found, dict)
    assert found.keys() == recorded.keys()
    for tensor, numbers in recorded.items():
        assert found[tensor] == pytest.approx(numbers, rel=1e-3, abs=3e-5), tensor


@pytest.mark.parametrize(("name", "case"), IN_CHUNKS)
def test_the_engine_of_a_search_merges_to_the_recorded_bits(roots: Roots, name: str, case: str) -> None:
    engine = search_engine(roots[name], compiled=False)
    assert digest(dict(engine.merged(SETS[name].cases[case]))) == RECORDED[name][case]


@pytest.mark.parametrize(("name", "case"), COMPILED)
def test_compiled_loops_merge_to_the_recorded_bits(roots: Roots, name: str, case: str) -> None:
    engine = search_engine(roots[name], compiled=True)
    if not engine.is_compiled:
        pytest.skip("needs a C++ compiler")
    assert digest(dict(engine.merged(SETS[name].cases[case]))) == RECORDED[name][case]


def test_every_case_is_recorded_and_every_preset_is_a_case() -> None:
    for name, models in SETS.items():
        assert models.cases.keys() == RECORDED[name].keys(), f"{name}: python tests/compatibility/record_bits.py"
    assert {f"preset: {name}" for name, p in PRESETS.items() if p.fit is None} <= SETS["varied float32"].cases.keys()
