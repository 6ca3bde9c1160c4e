"""How token sequences lie in the rows of one forward pass.

`plain_layout` gives every sequence a row of its own, padded on the right and without a mask: under causal attention no
token sees the padding, whatever the model. `packed_layout` puts sequences with a common beginning into one tree,
which runs that beginning once, and as many trees into a row as fit; a mask lets each token see its own branch and
what that grew from, and positions restart. It is for models that take such masks (`lm_eval_packed.obstacle`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Layout", "Piece", "packed_layout", "plain_layout"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Tokens to run, and those that the last positions should predict."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Rows of one forward pass.

    Attributes:
        tokens: Shape (rows, length).
        at: Flat positions that predict the targets, piece after piece. Shape (targets,).
        targets: Shape (targets,).
        positions: Position of each token in its sequence; None: that in its row. Shape (rows, length).
        tree, branch: What a token belongs to; -1 in the padding, and branch 0 for the common beginning.
    """

    tokens: Ints
    at: Ints
    targets: Ints
    positions: Ints | None = None
    tree: Ints | None = None
    branch: Ints | None = None


def plain_layout(pieces: Sequence[Piece]) -> Layout:
    """One row for each distinct sequence that no other one begins with."""
    hosts, host_of = _hosts([p.tokens for p in pieces])
    tokens = np.zeros((len(hosts), max(map(len, hosts))), dtype=np.int64)
    for row, host in enumerate(hosts):
        tokens[row, : len(host)] = host
    at = np.concatenate([host_of[i] * tokens.shape[1] + _predicting(p) for i, p in enumerate(pieces)])
    return Layout(tokens, at, _targets(pieces))


@dataclass(frozen=True)
class _Tree:
    """Tokens with their positions and branches; and where each piece's predicting tokens lie. Shapes (n,)."""

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    at: list[Ints]


def packed_layout(groups: Sequence[Sequence[Piece]]) -> Layout:
    """One tree for each distinct group, the longest first into the first row with room.

    Args:
        groups: Pieces with a common beginning; targets come in their order.
    """
    trees = {id(g): _tree(g) for g in groups}
    length = max(len(t.tokens) for t in trees.values())
    room: list[int] = []
    place: dict[int, tuple[int, int]] = {}
    for key, tree in sorted(trees.items(), key=lambda item: -len(item[1].tokens)):
        n = len(tree.tokens)
        row = next((r for r, free in enumerate(room) if free >= n), len(room))
        if row == len(room):
            room.append(length)
        place[key] = (row, length - room[row])
        room[row] -= n
    tokens, positions = np.zeros((2, len(room), length), dtype=np.int64)
    tree_of, branch = np.full((2, len(room), length), -1, dtype=np.int64)
    for number, (key, tree) in enumerate(trees.items()):
        row, start = place[key]
        here = (row, slice(start, start + len(tree.tokens)))
        tokens[here], positions[here], branch[here], tree_of[here] = tree.tokens, tree.positions, tree.branch, number
    at = [place[id(g)][0] * length + place[id(g)][1] + a for g in groups for a in trees[id(g)].at]
    return Layout(tokens, np.concatenate(at), _targets([p for g in groups for p in g]), positions, tree_of, branch)


def _tree(pieces: Sequence[Piece]) -> _Tree:
    hosts, host_of = _hosts([p.tokens for p in pieces])
    first, last = hosts[0], hosts[-1]  # they are sorted: what these two share, all share
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    tokens, positions = list(hosts[0][:common]), list(range(common))
    branch = [0] * common
    starts = []
    for number, host in enumerate(hosts, start=1):
        starts.append(len(tokens))
        tokens += host[common:]
        positions += range(common, len(host))
        branch += [number] * (len(host) - common)
    at = []
    for piece, host_number in zip(pieces, host_of, strict=True):
        inner = _predicting(piece)
        at.append(np.where(inner < common, inner, starts[host_number] + inner - common))
    return _Tree(tokens, positions, branch, at)


def _predicting(piece: Piece) -> Ints:
    return np.arange(len(piece.tokens) - len(piece.targets), len(piece.tokens))


def _targets(pieces: Sequence[Piece]) -> Ints:
    return np.array([t for p in pieces for t in p.targets], dtype=np.int64)


def _hosts(tokens: Sequence[tuple[int, ...]]) -> tuple[list[Any], Ints]:
    """Sequences that together begin with all of `tokens`; and for each of these which one does."""
    hosts: list[tuple[int, ...]] = []
    host_of = np.empty(len(tokens), dtype=np.int64)
    # In descending order whatever begins with a sequence comes right before it.
    for i in sorted(range(len(tokens)), key=lambda i: tokens[i], reverse=True):
        if not hosts or hosts[-1][: len(tokens[i])] != tokens[i]:
            hosts.append(tokens[i])
        host_of[i] = len(hosts) - 1
    return hosts, host_of
