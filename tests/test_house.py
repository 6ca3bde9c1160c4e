"""What a tool holds for us: import directions, a light command line, complete catalogues, honest packaging."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from merge_search import catalogue
from merge_search.errors import InputError

ROOT = Path(__file__).parent.parent
PACKAGES = ("merge_search", "search_spaces", "evaluators")
HEAVY = ("torch", "botorch", "gpytorch", "transformers", "lm_eval")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)


def test_imports_point_downwards() -> None:
    """The contracts in pyproject.toml, held by import-linter."""
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import merge_search.cli; merge_search.cli.main(['--help'])",
        "import merge_search.cli; merge_search.cli.main(['list'])",
        "import merge_search.recipe, merge_search.presets, merge_search.space, merge_search.evaluation",
        "import merge_search.objective, merge_search.study_file, merge_search.catalogue",
        "import search_spaces, evaluators, search_spaces.compatibility",
        "import merge_search.engine.checkpoints.headers, merge_search.engine.checkpoints.layout",
    ],
)
def test_light_things_load_nothing_heavy(code: str) -> None:
    check = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\nprint('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    assert python(check).stdout.strip().endswith("HEAVY []")


@pytest.mark.parametrize("kind", ["search_spaces", "evaluators"])
def test_every_row_of_a_catalogue_names_a_class(kind: str) -> None:
    table = catalogue.names(kind)
    assert table
    for name in table:
        assert isinstance(catalogue.load(kind, name), type), name


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(InputError, match=r"no search space is called 'compatability'; did you mean 'compatibility'\?"):
        catalogue.load("search_spaces", "compatability")


def test_a_users_own_file_is_loaded_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class Mine:\n    pass\n")
    assert catalogue.load("evaluators", "mine.py:Mine", folder=tmp_path).__name__ == "Mine"
    with pytest.raises(InputError, match="has no class 'Yours'"):
        catalogue.load("evaluators", "mine.py:Yours", folder=tmp_path)
    with pytest.raises(InputError, match="no file"):
        catalogue.load("evaluators", "none.py:Mine", folder=tmp_path)


def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"  # a build writes beside what it builds, and takes along what an earlier one left there
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "demo"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    packages = {t for t in tops if not t.endswith(".dist-info")}
    assert packages == set(PACKAGES)
    assert {f"{p}/py.typed" for p in packages} <= set(names)
    c_files = {str(f.relative_to(ROOT)) for kind in ("*.cpp", "*.h") for f in (ROOT / "merge_search").rglob(kind)}
    assert c_files <= set(names)
    assert len(c_files) > 3


def test_public_names_exist() -> None:
    for path in sorted((ROOT / "merge_search").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(name)
        missing = [n for n in getattr(module, "__all__", []) if not hasattr(module, n)]
        assert not missing, f"{name}.__all__ names {missing}"
