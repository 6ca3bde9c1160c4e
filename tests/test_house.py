"""What a tool holds for us: import directions, a light command line, complete catalogues, honest packaging."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGES = ("merge_search", "search_spaces", "evaluators")
DRAWING_TEXT = 40
"""Spaces before the text of the drawing in docs/architecture.md: more than before any name."""
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
        "import merge_search.objective, merge_search.study_file, merge_search.catalogue, merge_search.options",
        "import search_spaces, evaluators, search_spaces.compatibility",
        "import merge_search.engine.checkpoints.headers, merge_search.engine.checkpoints.layout",
    ],
)
def test_light_things_load_nothing_heavy(code: str) -> None:
    check = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\n"
    check += f"print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    assert python(check).stdout.strip().endswith("HEAVY []")


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


def test_the_architecture_page_draws_every_module_and_no_other() -> None:
    """A row of the drawing is a folder (``name/``) or modules (names joined by commas), and their text to the right."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawing = re.search(r"^    merge_search/\n(?:    .*\n|\n)+", text, re.MULTILINE)
    assert drawing
    drawn: list[str] = []
    folders: dict[int, str] = {}
    for line in drawing[0].splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip() or indent > DRAWING_TEXT:
            continue
        names = re.split(r" {2,}", line.strip())[0].rstrip(",").split(", ")
        inside = "".join(folder for i, folder in sorted(folders.items()) if i < indent)
        if names[0].endswith("/"):
            folders = {i: folder for i, folder in folders.items() if i < indent} | {indent: names[0]}
        else:
            drawn += [inside + name for name in names]
    modules = [
        path.relative_to(ROOT).with_suffix("").as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert sorted(drawn) == sorted(modules)


def recipe_of_make(target: str) -> list[str]:
    """The commands of a target in the Makefile, without the folder of the environment."""
    text = (ROOT / "Makefile").read_text()
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert found
    return [line.strip().removeprefix("$(BIN)/") for line in found[1].splitlines()]


def test_the_pre_commit_file_runs_what_make_check_runs() -> None:
    document = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in document["repos"] for hook in repository["hooks"]]
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in hooks] == recipe_of_make("check")
    assert all(hook["always_run"] and not hook["pass_filenames"] for hook in hooks)


def test_the_workflow_runs_the_targets_that_a_contributor_runs_on_every_supported_python() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = {step["run"].split()[1] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert commands == {"test", "check", "test-lowest"}
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    claimed = [c.rsplit(" ", 1)[1] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == claimed


def test_the_lower_bounds_are_the_versions_that_make_test_lowest_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints-lowest.txt").read_text().split())
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        bounds = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        assert len(bounds) == 1, f"{text}: needs one lower bound"
        assert Version(pins[canonicalize_name(requirement.name)]) == Version(bounds[0]), text
