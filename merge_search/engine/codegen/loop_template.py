"""The generated lines around `loop.cpp`: arrays, loads, stores and the body of an element-wise function.

If every element has two bytes, the loop takes pairs of them as 32-bit words. A shift or a mask turns each half of a
word of bfloat16 into a float32 without widening a vector, and two results are stored as one word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from merge_search.engine.codegen.compiler import read_source
from merge_search.engine.codegen.dtypes import C_TYPES, CType

__all__ = ["PART", "Array", "Body", "program"]

PART = 2**18  # elements of one part: threads take whole parts, and every part has sums of its own
_BLOCK = 2**10  # elements whose values are stored before they are added up
_LANES = 64  # sums that run side by side


class Array(NamedTuple):
    """A tensor that the loop reads or writes: its name in C++, and its dtype."""

    name: str
    dtype: torch.dtype

    @property
    def type(self) -> CType:
        return C_TYPES[self.dtype]

    def half(self, which: str) -> str:
        """The ``low`` or ``high`` element of the word ``w_NAME``."""
        if self.type.suffix:
            return f"{which}_{self.type.suffix}(w_{self.name})"
        return f"({self.type.stored})(w_{self.name}{' >> 16' if which == 'high' else ''})"


class Body(NamedTuple):
    """The function's work on one element. It reads the arrays as ``x_NAME`` and the element's position as ``at``.

    Attributes:
        lines: Statements.
        results: Float32 expressions to store; none if the function makes sums.
        sums: Float32 expressions to add up; none if the function stores tensors.
    """

    lines: Sequence[str]
    results: Sequence[str]
    sums: Sequence[str]


def program(body: Body, reads: Sequence[Array], outs: Sequence[Array], floats: int, integers: int) -> str:
    """The C++ of one loop. Its sums do not depend on the machine or on the number of threads.

    Args:
        body: The function's work on one element.
        reads: Tensors that are read, in the order of the call.
        outs: Tensors that are written, before `reads` in the call; float32 if there are several.
        floats: How many numbers the body finds in ``f``.
        integers: How many numbers the body finds in ``k``.
    """
    arrays = [*outs, *reads]
    is_paired = all(array.dtype.itemsize == 2 for array in arrays) and len(outs) <= 1
    stored = [f"{'' if array in outs else 'const '}{array.type.stored} *" for array in arrays]
    buffers = [f"block{j}" for j in range(len(body.sums))]
    parameters = [f"float *__restrict {name}" for name in buffers]
    parameters += [f"{kind}__restrict {array.name}" for kind, array in zip(stored, arrays, strict=True)]
    macros = {
        "PART": str(PART),
        "BLOCK": str(_BLOCK),
        "LANES": str(_LANES),
        "ARRAYS": ", ".join(parameters),
        "TENSORS(at)": ", ".join(f"({kind})tensors[{place}] + (at)" for place, kind in enumerate(stored)),
        "FLOATS": ", ".join(f"F[{j}]" for j in range(floats)) or "0",
        "INTEGERS": ", ".join(f"K[{j}]" for j in range(integers)) or "0",
        "LOAD(i)": ", ".join(array.type.load(f"{array.name}[i]") for array in reads),
        "STORE(i, r)": _stores(outs, buffers),
        "N_SUMS": str(len(body.sums)),
        "BLOCKS": ", ".join(f"block[{j}]" for j in range(len(buffers))),
        "IS_PAIRED": str(int(is_paired)),
    }
    if is_paired:
        macros |= {
            "WORDS(i)": " ".join(f"const uint32_t w_{array.name} = word_at({array.name}, i);" for array in reads),
            "LOW": ", ".join(array.half("low") for array in reads),
            "HIGH": ", ".join(array.half("high") for array in reads),
            "STORE_PAIR(i, a, b)": _pair_stores(outs, buffers),
        }
    lines = [f"#define {name} {text}" for name, text in macros.items()]
    return "\n".join(
        [read_source("codegen/numbers.h"), *lines, "", *_function(body, reads), "", read_source("codegen/loop.cpp")]
    )


def _stores(outs: Sequence[Array], buffers: Sequence[str]) -> str:
    stores = [f"{array.name}[i] = {array.type.store(f'(r).r{j}')};" for j, array in enumerate(outs)]
    return " ".join([*stores, *(f"{name}[i] = (r).r{j};" for j, name in enumerate(buffers))])


def _pair_stores(outs: Sequence[Array], buffers: Sequence[str]) -> str:
    """One word of the output, or values of sums: those of first elements fill the first half of a block."""
    if outs:
        return f"put_word({outs[0].name}, i, pair_{outs[0].type.suffix}((a).r0, (b).r0));"
    return " ".join(f"{name}[i] = (a).r{j}; {name}[BLOCK / 2 + i] = (b).r{j};" for j, name in enumerate(buffers))


def _function(body: Body, reads: Sequence[Array]) -> list[str]:
    """`body` as a function of an element's values and position."""
    values = [*body.results, *body.sums]
    arguments = ["const float *f", "const int32_t *k", "const int32_t index", "const int32_t at"]
    arguments += [f"const {array.type.value} x_{array.name}" for array in reads]
    return [
        f"struct Results {{ float {', '.join(f'r{j}' for j in range(len(values)))}; }};",
        f"static inline __attribute__((always_inline)) Results body({', '.join(arguments)}) {{",
        *(f"    {line}" for line in body.lines),
        f"    return {{{', '.join(values)}}};",
        "}",
    ]
