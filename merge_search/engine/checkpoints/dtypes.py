"""Dtypes by their names in safetensors headers: width, name in torch, name in recipes. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DTYPES", "FLOATING", "RECIPE_NAMES", "Dtype"]


class Dtype(NamedTuple):
    """One dtype.

    Attributes:
        bits: Width of one element.
        torch_name: Name of the dtype in torch, '' for those that are never read.
    """

    bits: int
    torch_name: str


DTYPES = {
    "BOOL": Dtype(8, "bool"),
    "F4": Dtype(4, ""),
    "F6_E2M3": Dtype(6, ""),
    "F6_E3M2": Dtype(6, ""),
    "U8": Dtype(8, "uint8"),
    "I8": Dtype(8, "int8"),
    "F8_E5M2": Dtype(8, "float8_e5m2"),
    "F8_E4M3": Dtype(8, "float8_e4m3fn"),
    "F8_E8M0": Dtype(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": Dtype(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": Dtype(8, "float8_e5m2fnuz"),
    "I16": Dtype(16, "int16"),
    "U16": Dtype(16, "uint16"),
    "F16": Dtype(16, "float16"),
    "BF16": Dtype(16, "bfloat16"),
    "I32": Dtype(32, "int32"),
    "U32": Dtype(32, "uint32"),
    "F32": Dtype(32, "float32"),
    "C64": Dtype(64, "complex64"),
    "F64": Dtype(64, "float64"),
    "I64": Dtype(64, "int64"),
    "U64": Dtype(64, "uint64"),
}
"""Every dtype that safetensors knows, in its own order, by which it sorts the tensors of a file."""

FLOATING = ("F64", "F32", "BF16", "F16")
"""Dtypes that can be merged. Narrower floats are quantised storage that means nothing without its scales."""

RECIPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes that a recipe or a mergekit file may ask for, by the name that they use."""
