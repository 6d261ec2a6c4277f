"""Exact expected values, so that a wrong element is counted and rounding is never mistaken for one.

Every value is a small whole number that the type and every partial result hold exactly. It depends on who sends,
who receives and where in the buffer it lies, with a prime period, so a part that lands in another's place, or
shifted by a power of two, differs nearly everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, reduce

import torch
from torch import Tensor

TYPES = {
    "int8": torch.int8, "uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64, "half": torch.half,
    "bfloat16": torch.bfloat16, "float": torch.float, "double": torch.double,
    "f8e4m3": torch.uint8, "f8e5m2": torch.uint8,  # what only moves is bytes, whatever they stand for
}  # fmt: skip
MOVED_ONLY = ("f8e4m3", "f8e5m2")
"""Types that are moved and not reduced: libraries round sums of eight bits each in their own way."""
_LARGEST = {torch.int8: 127, torch.uint8: 255, torch.half: 2048, torch.bfloat16: 256}
"""Up to which every whole number is exact; other types hold far more than is used."""
_PERIOD = 65_521
_COMPARED = 256
"""Periods that are compared at once: 16 MiB of truth values."""
_VALUES = 113
_FACTORS = 6
"""Ranks whose factor is 2 at one place of a product, at most: 2^6 is exact in every type."""

_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add, "avg": torch.add, "prod": torch.mul, "max": torch.maximum, "min": torch.minimum,
    "band": torch.bitwise_and, "bor": torch.bitwise_or, "bxor": torch.bitwise_xor,
}  # fmt: skip


def expected_sent(
    source: int,
    target: int,
    dtype: torch.dtype,
    ranks: int,
    redop: str,
    device: torch.device,
    length: int = _PERIOD,
) -> Tensor:
    """What rank `source` of a group has for `target`: one period of values, repeated over the buffer, or its beginning.

    A buffer of fewer than `length` elements needs no more: among many ranks most parts are short.
    """
    index = torch.arange(min(length, _PERIOD), device=device)
    if redop == "prod":
        return torch.where((index // 16 + source) % ranks < _FACTORS, 2, 1)
    values = index * 7 + index // 256 * 3 + source * 13 + target * 29
    if redop not in ("sum", "avg"):
        return values % _VALUES
    most = _LARGEST.get(dtype, 1 << 20)
    # With more ranks than the type can count, some of them have 0 at each place.
    sharing = -(-ranks // most)
    span = min(_VALUES, most // -(-ranks // sharing) + 1)
    return torch.where((index + source) % sharing == 0, values % span, 0)


@lru_cache(maxsize=16)
def expected_reduced(
    dtype: torch.dtype, ranks: int, redop: str, target: int, device: torch.device, length: int = _PERIOD
) -> Tensor:
    """The reduction of what all ranks have for `target`: one period or its beginning, kept for the next call."""
    length = min(length, _PERIOD)
    parts = (expected_sent(source, target, dtype, ranks, redop, device, length) for source in range(ranks))
    whole = reduce(_COMBINE[redop], parts)
    return whole / ranks if redop == "avg" else whole


def fill(buffer: Tensor, tile: Tensor) -> None:
    """Repeat one period over a flat buffer."""
    for part in buffer.split(_PERIOD):  # `tile` is a period, or longer than the buffer
        part.copy_(tile[: len(part)])


def mismatches(buffer: Tensor, tile: Tensor) -> int:
    """Elements of a flat buffer that differ from one period, repeated."""
    expected = tile.to(buffer.dtype)
    if len(buffer) <= len(expected):
        return int((buffer != expected[: len(buffer)]).sum())
    whole = len(buffer) // _PERIOD * _PERIOD
    # In parts: what is compared takes a byte an element, which of types of one byte is the buffer's memory once more.
    parts = buffer[:whole].view(-1, _PERIOD).split(_COMPARED)
    wrong = sum((part != expected).sum() for part in parts)
    return int(wrong + (buffer[whole:] != expected[: len(buffer) - whole]).sum())
