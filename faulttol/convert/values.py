"""Numbers as their bits, from one dtype to another. Numpy has no bfloat16, so bits it is; and torch isn't needed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from faulttol.checkpoint.pieces import DTYPES

Bits = NDArray[np.unsignedinteger]
"""Values of a dtype as unsigned integers of its size."""
FLOATS = ("float64", "float32", "bfloat16", "float16")
"""Dtypes that convert to one another."""


def bits_of(dtype: str) -> np.dtype[np.unsignedinteger]:
    """The unsigned integer of a dtype's size."""
    return np.dtype(f"u{DTYPES[dtype][1]}")


def convertible(given: str, wanted: str) -> bool:
    """Whether values of one dtype can become those of another."""
    return given == wanted or (given in FLOATS and wanted in FLOATS)


def convert(values: Bits, given: str, wanted: str) -> Bits:
    """Values of dtype `given` as those of `wanted`, rounded to the nearest (to even where two are as near), as torch does.

    Raises:
        ValueError: where one of two different dtypes isn't a float.
    """
    if given == wanted:
        return values
    if not convertible(given, wanted):
        raise ValueError(f"{given} doesn't become {wanted}")
    single = _single(values, given)
    if wanted == "float32":
        return single.view(np.uint32)
    if wanted == "bfloat16":
        return _rounded(single.view(np.uint32))
    with np.errstate(over="ignore"):  # infinity, as torch has it
        if wanted == "float64":
            exact = values.view(np.float64) if given == "float64" else single.astype(np.float64)
            return exact.view(np.uint64)
        return single.astype(np.float16).view(np.uint16)


def _single(values: Bits, given: str) -> NDArray[np.float32]:
    if given == "float32":
        return values.view(np.float32)
    if given == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    kind = np.float16 if given == "float16" else np.float64
    with np.errstate(over="ignore"):
        return values.view(kind).astype(np.float32)


def _rounded(values: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """fp32 as bf16."""
    half = ((values >> 16) & 1) + 0x7FFF
    rounded = ((values + half) >> 16).astype(np.uint16)
    rounded[(values & 0x7FFFFFFF) > 0x7F800000] = 0x7FC0  # not a number
    return rounded
