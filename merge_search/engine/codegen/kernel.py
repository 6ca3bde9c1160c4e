"""One compiled loop from an element-wise function: traced, written out as C++, compiled by the system's compiler.

For CPUs. A loop compiles in a fraction of a second and gives the bits of the same function run step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merge_search.engine.codegen.compiler import CompilerError, library
from merge_search.engine.codegen.dtypes import C_TYPES
from merge_search.engine.codegen.loop import Loop
from merge_search.engine.codegen.loop_template import Array, program
from merge_search.engine.codegen.render_c import Unsupported, render
from merge_search.engine.codegen.trace import Untraceable, trace

__all__ = ["Loop", "Unsupported", "compile_kernel"]


def compile_kernel(
    function: Callable[..., Sequence[Tensor]],
    dtypes: Sequence[torch.dtype],
    out: torch.dtype | None,
    floats: int,
    integers: int,
) -> Loop:
    """One loop that does what `function` does.

    Args:
        function: (tensors, floats, integers, index) -> tensors to store, or, if `out` is None, sums. It must be
            element-wise. `floats` and `integers` are one-dimensional tensors, `index` is 0-d.
        dtypes: Of the tensors that are read.
        out: Dtype of the tensors that are written, which come first in the loop's call; float32 if there are several.
        floats: How many float32 numbers `function` reads.
        integers: How many int32 numbers `function` reads.

    Raises:
        Unsupported: An operation or a dtype has no C++ form, or the compiler failed.
    """
    if unknown := {*dtypes, *([out] if out else [])} - set(C_TYPES):
        raise Unsupported(f"tensors of {unknown.pop()}")
    source, sums = _source(function, dtypes, out, floats, integers)
    try:
        return Loop(source, library(source), sums)
    except CompilerError as error:
        raise Unsupported(str(error)) from error


def _source(
    function: Callable[..., Sequence[Tensor]],
    dtypes: Sequence[torch.dtype],
    out: torch.dtype | None,
    floats: int,
    integers: int,
) -> tuple[str, int]:
    """C++ of the loop, and how many sums it makes."""
    examples = [torch.ones(7, dtype=dtype) for dtype in dtypes]
    numbers = (torch.ones(floats), torch.ones(integers, dtype=torch.int32), torch.zeros((), dtype=torch.int32))

    def flat(*values: Tensor) -> Sequence[Tensor]:
        return function(list(values[: len(dtypes)]), *values[len(dtypes) :])

    try:
        graph = trace(flat, [*examples, *numbers])
    except Untraceable as error:
        raise Unsupported(str(error)) from error
    graph.eliminate_dead_code()
    reads = [Array(f"p{place}", dtype) for place, dtype in enumerate(dtypes)]
    body = render(graph, reads, out)
    if len(body.results) > 1 and out != torch.float32:
        raise Unsupported(f"several results in {out}")
    outs = [Array(f"out{place}", out) for place in range(len(body.results)) if out]
    return program(body, reads, outs, floats, integers), len(body.sums)
