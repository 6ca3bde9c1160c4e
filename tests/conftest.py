"""Shared fixtures: the demo's real checkpoints, the zoo where it is given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite never reaches for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def demo() -> Path:
    """Folder with ``models/`` and ``tasks/``: a real base and three experts of 0.9 M parameters."""
    return ROOT / "examples" / "demo"


@pytest.fixture(scope="session")
def zoo() -> Path:
    """Folder of larger real checkpoints; tests that need it are skipped where it is not given."""
    folder = os.environ.get("MERGE_SEARCH_ZOO")
    if not folder:
        pytest.skip("MERGE_SEARCH_ZOO is not set")
    return Path(folder)
