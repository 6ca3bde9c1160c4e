"""MAL: experts of other widths and depths, brought into the base's shapes by assignment problems (arXiv 2503.21657).

    base W_b, expert W_t;  partial permutations P, Q with at most one 1 in each row and column, |P| = min(m, m')
    maximise  sum over tensors < W_b, P W_t Q^T >,  one permutation after the other (scipy's linear_sum_assignment)
    aligned = P W_t Q^T where both P and Q have a unit of the expert, and the base's value elsewhere

So the delta is zero where the expert covers nothing, and any method may follow. UNVERIFIED: only the abstract's
ingredients are certain (a generalised permutation, zero padding, alternating assignment problems). The equations are
our reading, in the spirit of weight matching (Git Re-Basin, arXiv 2209.04836). Its acceptance test by linear mode
connectivity is left to the search, which scores what it tries.

What may be permuted: the residual stream by one permutation for the whole model; inner units of an MLP by one for each
block (gate, up and down together); whole heads, query heads only together with their key/value head. Entries of a head
stay in place (rotary embeddings pair them). Tokens are matched by the tokenizers, or by equal ids where a folder has
none; positions and token types by equal ids.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merge_search.engine.checkpoints.layout import layer_of
from merge_search.engine.checkpoints.vocabulary import compare, read_vocabulary
from merge_search.engine.transforms.axes import is_head, shape_problem, sizes_of, stored_name
from merge_search.engine.transforms.layers import read_layers, stack_of
from merge_search.engine.transforms.sources import Source, Sources
from merge_search.rules.transforms import Preview, Transformed

__all__ = ["mal", "preview", "spread"]

_SHOWN = 5
_SAME = ("model_type", "hidden_act", "activation_function", "position_embedding_type")


# ------------------------------------------------------------------------------------- from headers and configs


def preview(sources: Sources, *, blocks: str, passes: int, same_shape: bool) -> Preview:
    """The base as it is. Refused: experts of other families, heads of another size, missing or unknown tensors."""
    problems = [] if passes >= 1 else [f"mal.passes must be at least 1, got {passes}"]
    base = sources.base
    for expert in _aligned(sources, same_shape):
        problems += [f"mal: expert {expert.name!r} ({expert.folder}): {p}" for p in _problems(base, expert, blocks)]
    return Preview(tuple(problems))


def _aligned(sources: Sources, same_shape: bool) -> list[Source]:
    return [e for e in sources.experts.values() if same_shape or not e.fits]


def _problems(base: Source, expert: Source, blocks: str) -> list[str]:
    """Every reason why an expert cannot be aligned."""
    problems = [
        f"config.json: {key} must be the base's, {base.config.get(key)!r}, got {expert.config.get(key)!r}"
        for key in _SAME
        if base.config.get(key) != expert.config.get(key)
    ]
    if problems:
        return problems
    sizes = [sizes_of(base.config), sizes_of(expert.config)]
    stacks = [stack_of(base.info), stack_of(expert.info if not expert.info.is_adapter else base.info)]
    if None in sizes or None in stacks:
        return ["config.json must have its width and heads, and the files one stack of layers, in base and expert"]
    (a, b), ((_, depth), (_, own_depth)) = (s for s in sizes if s), (s for s in stacks if s)
    if a.head != b.head:
        problems.append(f"its heads must have the base's size, {a.head}, got {b.head}: entries of a head stay in place")
    _, wrong = _blocks(blocks, depth, own_depth)
    problems += wrong
    vocabulary, own = read_vocabulary(base.settings_folder), read_vocabulary(expert.settings_folder)
    if vocabulary is not None and own is not None and (mismatch := compare(vocabulary, own)):
        problems.append(f"its vocabulary must be the base's, apart from added tokens, but {mismatch}")
    if problems:
        return problems
    odd = [p for n in base.groups if (p := shape_problem(n, base.headers[n], a))]
    names, needed = set(expert.headers), set()
    for name in base.groups:
        place = layer_of(name)
        layers = range(own_depth) if place is not None else [0]
        needed |= {name if place is None else f"{place[0]}.{i}.{place[2]}" for i in layers}
    missing = [n for n in sorted(needed) if stored_name(n, names, expert.config) is None]
    odd += [p for n in sorted(needed & names) if (p := shape_problem(n, expert.headers[n], b))]
    odd += [f"tensor {n!r} has no place in the base" for n in expert.groups if n not in needed and not is_head(n)]
    odd += [f"tensor {n!r} is missing" for n in missing]
    return [*odd[:_SHOWN], *([f"and {len(odd) - _SHOWN} more of the same kind"] if len(odd) > _SHOWN else [])]


def _blocks(text: str, depth: int, own_depth: int) -> tuple[list[int | None], list[str]]:
    """The expert's block that feeds each of the base's, and what is wrong with the text."""
    if not text:
        return list(spread(depth, own_depth)), []
    blocks, problems = read_layers(text, own_depth, what="mal.blocks", may_be_none=True)
    if not problems and len(blocks) != depth:
        problems.append(f"mal.blocks must name a block of the expert for each of the base's {depth}, got {text!r}")
    return blocks, problems


def spread(depth: int, own_depth: int) -> list[int]:
    """`depth` blocks of an expert with `own_depth`, evenly, the first and the last among them.

    Example:
        >>> spread(3, 5), spread(5, 3)
        ([0, 2, 4], [0, 0, 1, 1, 2])
    """
    if depth == 1:
        return [0]
    return [int(i * (own_depth - 1) / (depth - 1) + 0.5 - 1e-9) for i in range(depth)]


def mal(sources: Sources, out: Path, *, blocks: str, passes: int, same_shape: bool) -> Transformed:
    """The base as it is, and experts in its shapes.

    Args:
        sources: Base and experts.
        out: Where aligned experts are written.
        blocks: The expert's block for each of the base's, ``-`` for none, such as ``0 1 - 3``; '' spreads them evenly.
        passes: Most rounds over all permutations; a round that changes nothing is the last one.
        same_shape: Whether experts that have the base's shapes are aligned, too.
    """
    experts = {name: expert.folder for name, expert in sources.experts.items()}
    for expert in _aligned(sources, same_shape):
        experts[expert.name] = _write(sources.base, expert, out / "experts" / expert.name, blocks, int(passes))
    return Transformed(sources.base.folder, experts)


def _write(base: Source, expert: Source, out: Path, blocks: str, passes: int) -> Path:
    from merge_search.engine.checkpoints.writer import write_model  # these load torch, and the check does not
    from merge_search.engine.transforms.alignment import Alignment

    stacks = stack_of(base.info), stack_of(base.info if expert.info.is_adapter else expert.info)
    assert stacks[0] is not None
    assert stacks[1] is not None
    chosen, _ = _blocks(blocks, stacks[0][1], stacks[1][1])
    alignment = Alignment(base, expert, chosen)
    alignment.solve(passes)
    headers = {n: replace(t, dtype=alignment.dtype(n)) for n, t in base.headers.items()}
    tensors = ((n, alignment.aligned(n) if n in base.groups else base.tensor(n)) for n in headers)
    write_model(out, like=base.settings_folder, config=base.config, headers=headers, tensors=tensors)
    return out
