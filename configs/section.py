"""What all sections of the configuration are made of."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST_DEVICES = 10_000_000
MOST_WHOLE = (1 << 63) - 1
"""Of any whole number: tensors and files count in 64 bits, and larger ones have no quotient as a float."""
Positive = Annotated[int, Field(gt=0, le=MOST_WHOLE)]
Devices = Annotated[int, Field(gt=0, le=MOST_DEVICES)]
"""Ranks, nodes and the like: lists as long are made of them."""
NonNegative = Annotated[int, Field(ge=0, le=MOST_WHOLE)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NAME_CHARACTERS = 64
"""That a run id begins with at most: names of folders, which file systems bound at 255 bytes, are made of it."""
Name = Annotated[str, Field(max_length=NAME_CHARACTERS)]

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _bytes(value: Any) -> Any:
    """`4M` and `1.5M` in bytes, in powers of 1024 as nccl-tests reads sizes; anything else as it is."""
    if isinstance(value, str):
        parts = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT])(?:I?B)?", value.strip().upper(), re.ASCII)
        if parts:
            return int(Decimal(parts[1]) * _UNITS[parts[2]])  # a float would be infinite for many digits
    return value


def _words(value: Any) -> Any:
    """`a,b` or `[a, b]` as a list."""
    if isinstance(value, str):
        return [word.strip().strip("'\"") for word in value.strip("[]() ").split(",") if word.strip()]
    return value


Bytes = Annotated[int, BeforeValidator(_bytes), Field(gt=0, le=MOST_WHOLE)]
"""A size, as a number or with K, M, G or T."""
AsWords = BeforeValidator(_words)
"""Marks a tuple that is typed with commas."""


class Section(BaseModel):
    """Base of every section: frozen, and a key that isn't declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
