"""One seed per study, any number of named streams.

Streams are derived from names, never advanced: trial 17 draws the same numbers in any process and
after any restart.
"""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed", "unit_interval"]


def derive_seed(seed: int, *names: str | int, bits: int = 31) -> int:
    """Integer in [0, 2**bits) for the stream `names` of a study's `seed`.

    Determinism: sha256 of the canonical text; equal on every platform and Python version.
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - bits)


def unit_interval(*names: str | int) -> float:
    """A number in [0, 1) that depends on `names` alone: splits and orders of questions."""
    text = "\x1f".join(map(str, names))
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13
