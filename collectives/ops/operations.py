"""The operations, with nccl-tests' sizes, counts and bandwidths. Pure arithmetic.

Source: nccl-tests 2.19, `doc/PERFORMANCE.md` and the `GetCollByteCount` and `GetBw` functions in `src/*.cu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from configs.errors import UserError

WIDTHS = {
    "int8": 1, "uint8": 1, "int32": 4, "int64": 8, "half": 2, "bfloat16": 2, "float": 4, "double": 8,
    "f8e4m3": 1, "f8e5m2": 1,
}  # fmt: skip
"""Bytes of an element."""
_ALIGN = 16
"""Bytes of which a rank's part is a multiple, in operations that have parts."""


@dataclass(frozen=True)
class Operation:
    """What tells one collective from another."""

    name: str
    parts: bool = False
    """The size is that of as many equal parts as there are ranks."""
    reduces: bool = False
    rooted: bool = False
    in_place: bool = True
    """It has an in-place form."""
    bus_numerator: int = 0
    """Bus factor: this times (n - 1) / n; 0 stands for a factor of 1."""

    def bus_factor(self, ranks: int) -> float:
        """busbw over algbw: what makes the figure comparable with a link's rate, whatever the number of ranks."""
        return self.bus_numerator * (ranks - 1) / ranks if self.bus_numerator else 1.0

    def wire_factor(self, ranks: int) -> float | None:
        """Bytes on a device's link over `size` where the switch multiplies and reduces (NVLS, SHARP).

        An all-reduce then sends all it has and a share of the result, and receives as much: 1 + 1/n; gathering and
        scattering fill one direction once. None where the switch can't help. Source: nccl-tests issue 312.
        """
        return {"all_reduce": 1 + 1 / ranks, "all_gather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0}.get(
            self.name
        )


OPERATIONS = {
    op.name: op
    for op in (
        Operation("all_reduce", reduces=True, bus_numerator=2),
        Operation("all_gather", parts=True, bus_numerator=1),
        Operation("reduce_scatter", parts=True, reduces=True, bus_numerator=1),
        Operation("all_to_all", parts=True, in_place=False, bus_numerator=1),
        Operation("all_to_allv", parts=True, in_place=False, bus_numerator=1),
        Operation("broadcast", rooted=True),
        Operation("reduce", reduces=True, rooted=True),
        Operation("gather", parts=True, rooted=True, bus_numerator=1),
        Operation("scatter", parts=True, rooted=True, bus_numerator=1),
        Operation("sendrecv", in_place=False),
        Operation("barrier"),
    )
}


def bandwidths(op: Operation, size: int, seconds: float, ranks: int) -> tuple[float, float]:
    """algbw and busbw in GB/s (10^9 bytes)."""
    alg = size / 1e9 / seconds
    return alg, alg * op.bus_factor(ranks)


def count_of(op: Operation, size: int, ranks: int, width: int) -> int:
    """Elements of nccl-tests' `count` column: of a rank's part, rounded down to 16 bytes, or of the whole."""
    count = size // width
    if not op.parts:
        return count
    unit = _ALIGN // width
    return count // ranks // unit * unit


def size_of(op: Operation, count: int, ranks: int, width: int) -> int:
    """Bytes of nccl-tests' `size` column for a count."""
    return count * width * (ranks if op.parts else 1)


def sizes(low: int, high: int, factor: int, step: int | None) -> Iterator[int]:
    """Sizes of a sweep, `low` and on by `step` bytes or by `factor`, at most `high`."""
    size = low
    while size <= high:
        yield size
        size = size + step if step else size * factor


def counts(op: Operation, swept: Iterator[int], ranks: int, dtype: str) -> list[int]:
    """Counts of a sweep for one operation, each once; sizes too small for a part of 16 bytes have none.

    Raises:
        UserError: for a size that isn't whole elements.
    """
    width, elements = WIDTHS[dtype], []
    if op.name == "barrier":
        return [0]
    for size in swept:
        if size % width:
            raise UserError(
                f"a size of {size} bytes is not whole elements of {dtype} ({width} bytes each); set "
                f"collectives.min_size (-b) and collectives.step_size (-i) to multiples of {width}"
            )
        count = count_of(op, size, ranks, width)
        if count and count not in elements:
            elements.append(count)
    return elements


def spread_counts(ranks: int, count: int, spread: float, width: int) -> list[list[int]]:
    """Elements from each rank (row) to each (column) of an `all_to_allv`, nccl-tests' generated pattern.

    A mixture of even and of in proportion to the distance (j - i) mod n, so that every rank sends and receives the
    same total of about ranks * count; each entry is rounded down to 16 bytes.
    """
    whole, distances = ranks * count * width, ranks * (ranks - 1) // 2
    # In bytes and term by term as there, so that doubles round alike.
    shares = [
        int((1 - spread) * (whole / ranks) + spread * (distance * whole / distances))
        // _ALIGN
        * _ALIGN
        // width
        for distance in range(ranks)
    ]
    return [[shares[(j - i) % ranks] for j in range(ranks)] for i in range(ranks)]


def largest(matrix: list[list[int]]) -> int:
    """The most elements that one rank sends or receives."""
    return max(*map(sum, matrix), *map(sum, zip(*matrix, strict=True)))
