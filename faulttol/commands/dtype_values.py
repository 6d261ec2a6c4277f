"""Values of every dtype that a checkpoint can hold as numpy numbers, without torch."""

from __future__ import annotations

from functools import cache
from typing import Any

_FLOAT8 = {
    "float8_e4m3fn": (3, 7), "float8_e4m3fnuz": (3, 8), "float8_e5m2": (2, 15), "float8_e5m2fnuz": (2, 16),
}  # fmt: skip
"""Bits of the mantissa, and bias of the exponent (Micikevicius et al. 2022; `fnuz` as in LLVM's APFloat)."""


def numbers(bits: Any, dtype: str) -> Any:
    """Values of a numpy array of unsigned integers that hold the bits of `dtype`, torch's name: float64 or complex.

    int64 and uint64 beyond 2^53 are rounded.
    """
    import numpy as np

    with np.errstate(invalid="ignore"):  # NaNs of every payload are fine
        return _numbers(bits, dtype)


def _numbers(bits: Any, dtype: str) -> Any:
    import numpy as np

    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype in _FLOAT8:
        return _float8(dtype)[bits]
    if dtype == "complex64":
        return bits.view(np.complex64).astype(np.complex128)
    if dtype == "bool":
        return (bits != 0).astype(np.float64)
    return bits.view(np.dtype(dtype)).astype(np.float64)


@cache
def _float8(dtype: str) -> Any:
    """The 256 values of a dtype."""
    import numpy as np

    mantissa, bias = _FLOAT8[dtype]
    code = np.arange(256)
    exponent, rest = (code & 127) >> mantissa, (code & ((1 << mantissa) - 1)).astype(np.float64)
    steps = rest / (1 << mantissa)
    value = np.where(
        exponent > 0, (1 + steps) * 2.0 ** (exponent - bias), steps * 2.0 ** np.float64(1 - bias)
    )
    value = np.where(code >= 128, -value, value)
    if dtype.endswith("fnuz"):
        value[128] = np.nan
    elif dtype == "float8_e4m3fn":
        value[[127, 255]] = np.nan
    else:
        top = exponent == 31
        value[top] = np.where(rest[top] == 0, np.copysign(np.inf, value[top]), np.nan)
    return value
