"""How C++ stores each dtype and computes with it: the one table for everything that is compiled."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["C_TYPES", "CType"]


class CType(NamedTuple):
    """One dtype in C++.

    Attributes:
        stored: Type of an element in memory.
        value: Type of an element in arithmetic.
        suffix: Of the conversions in `numbers.h` (``from_bf16``), if memory and arithmetic differ; else "".
    """

    stored: str
    value: str
    suffix: str = ""

    def load(self, stored: str) -> str:
        """The C++ expression of a stored element's value."""
        return f"from_{self.suffix}({stored})" if self.suffix else stored

    def store(self, value: str) -> str:
        """The C++ expression that stores a float."""
        return f"to_{self.suffix}({value})" if self.suffix else f"({self.stored})({value})"


def _plain(name: str) -> CType:
    return CType(name, name)


C_TYPES: dict[torch.dtype, CType] = {
    torch.float64: _plain("double"),
    torch.float32: _plain("float"),
    torch.bfloat16: CType("uint16_t", "float", "bf16"),
    torch.float16: CType("uint16_t", "float", "f16"),
    torch.int64: _plain("int64_t"),
    torch.int32: _plain("int32_t"),
    torch.int16: _plain("int16_t"),
    torch.int8: _plain("int8_t"),
    torch.uint8: _plain("uint8_t"),
    torch.bool: _plain("bool"),
}
