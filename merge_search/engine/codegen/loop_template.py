"""The C++ around the body of an element-wise function: loads, stores, sums, and the loop over a tensor.

Where all elements have two bytes the loop takes them in pairs, as 32-bit words: a shift or a mask makes each half of a word
of bfloat16 a float32, with no widening of vectors, and two results are stored as one word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["CONVERSIONS", "C_TYPES", "PART", "SHORT", "STORED", "Array", "Body", "program"]

PART = 2**18  # elements a call takes: what a thread is given, and what is summed before it is added up
_BLOCK = 2**10
_LANES = 64  # enough that additions do not wait for each other

C_TYPES = {
    torch.float32: "float", torch.float64: "double", torch.int32: "int32_t", torch.int64: "int64_t",
    torch.int16: "int16_t", torch.int8: "int8_t", torch.uint8: "uint8_t", torch.bool: "bool",
}  # fmt: skip
STORED = {**C_TYPES, torch.bfloat16: "uint16_t", torch.float16: "uint16_t"}
SHORT = {torch.bfloat16: "bf16", torch.float16: "f16"}  # loaded as float32

CONVERSIONS = """\
#include <stdint.h>
#include <string.h>
static inline float as_float(int32_t x) { float f; memcpy(&f, &x, 4); return f; }
static inline int32_t as_int(float x) { int32_t i; memcpy(&i, &x, 4); return i; }
static inline float from_bf16(uint16_t x) { return as_float((int32_t)((uint32_t)x << 16)); }
/* Rounded to bfloat16 in the upper half of a word; the lower half holds what was rounded off. */
static inline uint32_t rounded_bf16(float x) {
    uint32_t u = (uint32_t)as_int(x), r = u + 0x7fffu + ((u >> 16) & 1u);
    return x != x ? 0x7fc00000u : r;
}
static inline uint16_t to_bf16(float x) { return (uint16_t)(rounded_bf16(x) >> 16); }
static inline float from_f16(uint16_t x) {
    int32_t u = (x & 0x7fff) << 13, e = x & 0x7c00;
    float f = as_float(u + (e == 0x7c00 ? 224 << 23 : 112 << 23)), small = as_float(u + (113 << 23)) - 0x1p-14f;
    return as_float(as_int(e == 0 ? small : f) | (x & 0x8000) << 16);
}
static inline uint16_t to_f16(float x) {
    int32_t u = as_int(x), a = u & 0x7fffffff;
    int32_t r = (a - (112 << 23) + 0xfff + ((a >> 13) & 1)) >> 13, small = as_int(as_float(a) + 0.5f) - (126 << 23);
    r = a < 113 << 23 ? small : r < 0x7c00 ? r : 0x7c00;
    return (uint16_t)((x != x ? 0x7e00 : r) | ((u >> 16) & 0x8000));
}
"""

# Two neighbours in one word, the first in its lower half.
_PAIRS = """\
static inline uint32_t word_at(const void *p, int32_t i) { uint32_t w; memcpy(&w, (const char *)p + 4 * (int64_t)i, 4); return w; }
static inline void put_word(void *p, int32_t i, uint32_t w) { memcpy((char *)p + 4 * (int64_t)i, &w, 4); }
static inline float low_bf16(uint32_t w) { return as_float((int32_t)(w << 16)); }
static inline float high_bf16(uint32_t w) { return as_float((int32_t)(w & 0xffff0000u)); }
static inline uint32_t pair_bf16(float a, float b) { return rounded_bf16(a) >> 16 | (rounded_bf16(b) & 0xffff0000u); }
static inline float low_f16(uint32_t w) { return from_f16((uint16_t)w); }
static inline float high_f16(uint32_t w) { return from_f16((uint16_t)(w >> 16)); }
static inline uint32_t pair_f16(float a, float b) { return to_f16(a) | (uint32_t)to_f16(b) << 16; }
"""


class Array(NamedTuple):
    """A tensor that the loop reads or writes: its name in C, and its dtype."""

    name: str
    dtype: torch.dtype

    @property
    def argument(self) -> str:
        """What the body gets of it: one element, as the arithmetic has it."""
        return f"const {'float' if self.dtype in SHORT else STORED[self.dtype]} x_{self.name}"

    def element(self, at: str) -> str:
        return f"from_{SHORT[self.dtype]}({self.name}[{at}])" if self.dtype in SHORT else f"{self.name}[{at}]"

    def half(self, which: str) -> str:
        """The low or high element of a word ``w_NAME``."""
        if self.dtype in SHORT:
            return f"{which}_{SHORT[self.dtype]}(w_{self.name})"
        return f"({STORED[self.dtype]})(w_{self.name}{' >> 16' if which == 'high' else ''})"


class Body(NamedTuple):
    """What is done with one element: the arrays are there as ``x_NAME``, the element's position as ``at``.

    Attributes:
        lines: Statements. results: Values to store, float32; none if only sums are wanted. sums: Values to add up.
    """

    lines: Sequence[str]
    results: Sequence[str]
    sums: Sequence[str]


def program(body: Body, reads: Sequence[Array], outs: Sequence[Array], floats: int, integers: int) -> str:
    """C++: `merge` runs parts begin..end; sums are taken over blocks, in lanes that do not depend on the machine.

    Args:
        reads: Tensors, in the order of the call. outs: Those that are written, the first of the call; float32 if several.
        floats, integers: How many numbers the body finds in ``f`` and ``k``.
    """
    arrays = [*outs, *reads]
    kinds = [f"{'' if array in outs else 'const '}{STORED[array.dtype]} *" for array in arrays]
    parameters = ", ".join(f"{kind}__restrict {array.name}" for kind, array in zip(kinds, arrays, strict=True))
    pointers = ", ".join(f"({kind})tensors[{place}] + at" for place, kind in enumerate(kinds))
    shared = "int64_t n, void *const *tensors, const float *F, const int32_t *K, int32_t index, double *sums"
    numbers = [f"const float f[{max(1, floats)}] = {{{', '.join(f'F[{j}]' for j in range(floats))}}};"]
    numbers += [f"const int32_t k[{max(1, integers)}] = {{{', '.join(f'K[{j}]' for j in range(integers))}}};"]
    is_paired = all(array.dtype.itemsize == 2 for array in arrays)
    if len(outs) > 1:
        loop = _several(reads, outs)
    elif outs:
        loop = _stores(reads, outs[0], paired=is_paired)
    else:
        loop = _sums(reads, len(body.sums), paired=is_paired)
    return "\n".join(
        [
            CONVERSIONS + _PAIRS,
            f"static __attribute__((noinline)) void part({parameters}, int32_t start, int32_t n, const float *F, const int32_t *K, int32_t index, double *sums) {{",
            *(f"    {line}" for line in [*numbers, *_function(body, reads), *loop]),
            "}",
            f'extern "C" void merge(int64_t begin, int64_t end, {shared}) {{',
            "    for (int64_t p = begin; p < end; p++) {",
            f"        const int64_t at = p * {PART};",
            f"        const int32_t left = (int32_t)(n - at < {PART} ? n - at : {PART});",
            f"        part({pointers}, (int32_t)at, left, F, K, index, sums + p * {max(1, len(body.sums))});",
            "    }",
            "}",
            "",
        ]
    )


def _function(body: Body, reads: Sequence[Array]) -> list[str]:
    """`body` as a lambda: of elements and a position, and for sums and several results of the places where to put them."""
    one = len(body.results) == 1
    places = [f"float *s{j}" for j in range(0 if one else len(body.results))] + ["float *s"] * bool(body.sums)
    arguments = ", ".join([*(array.argument for array in reads), "const int32_t at", *places])
    ends = [f"return {body.results[0]};"] if one else [f"*s{j} = {value};" for j, value in enumerate(body.results)]
    ends += [f"s[{j * _BLOCK}] = {value};" for j, value in enumerate(body.sums)]
    head = f"const auto body = [&]({arguments}) __attribute__((always_inline)) -> {'float' if one else 'void'} {{"
    return [head, *(f"    {line}" for line in [*body.lines, *ends]), "};"]


def _call(reads: Sequence[Array], half: str, at: str, place: str = "") -> str:
    """The body for the element at `at`; `half`: "low" or "high" if it lies in a word, "" if it is read by itself."""
    values = [array.half(half) if half else array.element(at) for array in reads]
    return f"body({', '.join([*values, f'start + {at}', *([place] if place else [])])})"


def _words(reads: Sequence[Array], offset: str = "") -> list[str]:
    return [f"    const uint32_t w_{array.name} = word_at({array.name}{offset}, i);" for array in reads]


def _stores(reads: Sequence[Array], out: Array, *, paired: bool) -> list[str]:
    short = SHORT.get(out.dtype)
    store = f"{f'to_{short}' if short else f'({STORED[out.dtype]})'}"
    if not paired or not short:
        return ["for (int32_t i = 0; i < n; i++)", f"    out[i] = {store}({_call(reads, '', 'i')});"]
    return [
        "for (int32_t i = 0; i < n / 2; i++) {",
        *_words(reads),
        f"    const float low = {_call(reads, 'low', '2 * i')}, high = {_call(reads, 'high', '2 * i + 1')};",
        f"    put_word(out, i, pair_{short}(low, high));",
        "}",
        f"if (n % 2) out[n - 1] = {store}({_call(reads, '', 'n - 1')});",
    ]


def _several(reads: Sequence[Array], outs: Sequence[Array]) -> list[str]:
    places = ", ".join(f"{array.name} + i" for array in outs)
    return ["for (int32_t i = 0; i < n; i++)", f"    {_call(reads, '', 'i', places)};"]


def _sums(reads: Sequence[Array], count: int, *, paired: bool) -> list[str]:
    """Blocks of what is added, element by element (of pairs first the low ones); then added up in lanes."""
    if paired:
        inner = [
            "for (int32_t i = 0; i < (e - b) / 2; i++) {",
            *_words(reads, " + b"),
            f"    {_call(reads, 'low', 'b + 2 * i', 's + i')};",
            f"    {_call(reads, 'high', 'b + 2 * i + 1', f's + {_BLOCK // 2} + i')};",
            "}",
            f"if (e % 2) {_call(reads, '', 'e - 1', f's + {_BLOCK - 1}')};",
        ]
    else:
        inner = ["for (int32_t i = b; i < e; i++)", f"    {_call(reads, '', 'i', 's + (i - b)')};"]
    return [
        f"float s[{count * _BLOCK}];",
        f"double lane[{count}][{_LANES}] = {{}};",
        f"for (int32_t b = 0; b < n; b += {_BLOCK}) {{",
        f"    const int32_t e = n - b < {_BLOCK} ? n : b + {_BLOCK};",
        f"    if (e - b < {_BLOCK}) memset(s, 0, sizeof s);",
        *(f"    {line}" for line in inner),
        f"    for (int32_t j = 0; j < {count}; j++)",
        f"        for (int32_t i = 0; i < {_BLOCK}; i += {_LANES})",
        f"            for (int32_t l = 0; l < {_LANES}; l++) lane[j][l] += (double)s[j * {_BLOCK} + i + l];",
        "}",
        f"for (int32_t j = 0; j < {count}; j++)",
        f"    for (int32_t l = 0; l < {_LANES}; l++) sums[j] += lane[j][l];",
    ]
