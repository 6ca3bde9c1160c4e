"""Derive any number of named random streams from the one seed of a study.

Streams are derived from names and never advanced. So trial 17 draws the same numbers in any process and after any
restart.
"""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed", "unit_interval"]


def derive_seed(seed: int, *names: str | int, bits: int = 31) -> int:
    """Integer in [0, 2**bits) for the stream `names` of a study's `seed`.

        >>> derive_seed(0, "learner", 17) == derive_seed(0, "learner", 17) != derive_seed(0, "learner", 18)
        True

    Determinism: the sha256 of the canonical text, equal on every platform and Python version.
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - bits)


def unit_interval(*names: str | int) -> float:
    """A number in [0, 1) that depends only on `names`. It decides the split and the order of questions."""
    text = "\x1f".join(map(str, names))
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13
