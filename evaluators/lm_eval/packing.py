"""How token sequences lie in the rows of one forward pass.

- `plain_layout` gives every sequence a row of its own, padded on the right, without a mask. Under causal attention no
  token sees the padding, whatever the model.
- `context_layout` gives every question one row: its context once, then its choices. Only tokens of the context and of
  the same choice see each other.
- `packed_layout` puts sequences with a common beginning into one tree, which runs that beginning once, and as many
  trees into a row as fit.

The last two need a model that takes such masks and positions; `packed_scorer.obstacle` says which do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Layout", "Piece", "attention_mask", "context_layout", "packed_layout", "plain_layout"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A sequence to run.

    Attributes:
        tokens: The tokens to run.
        targets: The tokens that the last positions of `tokens` should predict.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Rows of one forward pass.

    Attributes:
        tokens: Shape (rows, length).
        at: Flat positions that predict the targets, piece after piece. Shape (targets,).
        targets: Shape (targets,).
        positions: The position of each token in its sequence; None: its position in the row. Shape (rows, length).
        branch: The branch that each token belongs to: 0 for the common beginning, -1 for the padding. Shape (rows,
            length).
        tree: The tree that each token belongs to, -1 for the padding; None: every row is one tree. Shape (rows,
            length).
    """

    tokens: Ints
    at: Ints
    targets: Ints
    positions: Ints | None = None
    branch: Ints | None = None
    tree: Ints | None = None


def attention_mask(branch: torch.Tensor, tree: torch.Tensor | None = None) -> torch.Tensor:
    """Which earlier tokens each token sees: those of its own branch and those of what the branch grew from.

    Args:
        branch: As in `Layout`. Shape (rows, length).
        tree: As in `Layout`.

    Returns:
        Shape (rows, 1, length, length), bool.
    """
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    seen = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    if tree is not None:
        return (seen & causal & (tree[:, None, :] == tree[:, :, None]))[:, None]
    return (seen & causal)[:, None]


def plain_layout(pieces: Sequence[Piece]) -> Layout:
    """One row for each distinct sequence that no other one begins with."""
    hosts, host_of = _hosts([p.tokens for p in pieces])
    tokens = np.zeros((len(hosts), max(map(len, hosts))), dtype=np.int64)
    for row, host in enumerate(hosts):
        tokens[row, : len(host)] = host
    at = np.concatenate([host_of[i] * tokens.shape[1] + _predicting(p) for i, p in enumerate(pieces)])
    return Layout(tokens, at, _targets(pieces))


def context_layout(groups: Sequence[Sequence[Piece]]) -> Layout:
    """One row per group: the context of its pieces, then each piece's own tokens.

    Args:
        groups: Pieces that share the tokens up to the one that predicts the first target. Targets come in their order.
    """
    trees = [_star(group) for group in groups]
    length = max(len(tree.tokens) for tree in trees)
    places = [(row, 0) for row in range(len(trees))]
    tokens, positions, branch, _ = _filled(trees, places, len(trees), length)
    at = [row * length + flat for row, tree in enumerate(trees) for flat in tree.at]
    return Layout(tokens, np.concatenate(at), _targets([p for g in groups for p in g]), positions, branch)


def packed_layout(groups: Sequence[Sequence[Piece]]) -> Layout:
    """One tree for each distinct group, the longest first into the first row with room.

    Args:
        groups: Pieces with a common beginning. Targets come in their order.
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
    arrays = _filled(list(trees.values()), [place[key] for key in trees], len(room), length)
    tokens, positions, branch, tree_of = arrays
    at = [place[id(g)][0] * length + place[id(g)][1] + a for g in groups for a in trees[id(g)].at]
    return Layout(tokens, np.concatenate(at), _targets([p for g in groups for p in g]), positions, branch, tree_of)


@dataclass(frozen=True)
class _Tree:
    """A common beginning and the branches that grow from it.

    Attributes:
        tokens, positions, branch: One entry per token. Shape (n,).
        at: The positions in `tokens` that predict each piece's targets, one array per piece.
    """

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    at: list[Ints]


def _filled(
    trees: Sequence[_Tree], places: Sequence[tuple[int, int]], n_rows: int, length: int
) -> tuple[Ints, Ints, Ints, Ints]:
    """Tokens, positions, branches and trees of rows that hold each tree at its place: a row and a first column."""
    tokens, positions = np.zeros((2, n_rows, length), dtype=np.int64)
    branch, tree_of = np.full((2, n_rows, length), -1, dtype=np.int64)
    for number, (tree, (row, start)) in enumerate(zip(trees, places, strict=True)):
        here = (row, slice(start, start + len(tree.tokens)))
        tokens[here], positions[here], branch[here], tree_of[here] = tree.tokens, tree.positions, tree.branch, number
    return tokens, positions, branch, tree_of


def _star(pieces: Sequence[Piece]) -> _Tree:
    """The tree whose branches all grow from the end of the context, one branch per piece."""
    n_context = len(pieces[0].tokens) - len(pieces[0].targets) + 1
    tree = _Tree(list(pieces[0].tokens[:n_context]), list(range(n_context)), [0] * n_context, [])
    for number, piece in enumerate(pieces, start=1):
        inner = piece.tokens[n_context:]
        start = len(tree.tokens)
        tree.tokens.extend(inner)
        tree.positions.extend(range(n_context, n_context + len(inner)))
        tree.branch.extend([number] * len(inner))
        tree.at.append(np.array([n_context - 1, *range(start, start + len(inner))], dtype=np.int64))
    return tree


def _tree(pieces: Sequence[Piece]) -> _Tree:
    """The tree of the longest common beginning. A piece that another one begins with has no branch of its own."""
    hosts, host_of = _hosts([p.tokens for p in pieces])
    first, last = hosts[0], hosts[-1]  # They are sorted, so what these two share all share.
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
    """The positions in a piece's tokens that predict its targets."""
    return np.arange(len(piece.tokens) - len(piece.targets), len(piece.tokens))


def _targets(pieces: Sequence[Piece]) -> Ints:
    return np.array([t for p in pieces for t in p.targets], dtype=np.int64)


def _hosts(tokens: Sequence[tuple[int, ...]]) -> tuple[list[Any], Ints]:
    """The sequences that all of `tokens` are beginnings of, and for each of `tokens` the number of its sequence."""
    hosts: list[tuple[int, ...]] = []
    host_of = np.empty(len(tokens), dtype=np.int64)
    # In descending order the sequences that begin with a given one come right before it.
    for i in sorted(range(len(tokens)), key=lambda i: tokens[i], reverse=True):
        if not hosts or hosts[-1][: len(tokens[i])] != tokens[i]:
            hosts.append(tokens[i])
        host_of[i] = len(hosts) - 1
    return hosts, host_of
