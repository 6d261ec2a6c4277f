"""Sizes, counts and bandwidths against nccl-tests' own."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from collectives.ops.operations import (
    OPERATIONS,
    WIDTHS,
    bandwidths,
    count_of,
    counts,
    largest,
    size_of,
    sizes,
    spread_counts,
)
from configs.errors import UserError

pytestmark = [pytest.mark.unit, pytest.mark.timeout(20)]


class Vector(NamedTuple):
    """A line of nccl-tests' table."""

    op: str
    ranks: int
    dtype: str
    asked: int
    """Bytes that the sweep asks for."""
    size: int
    elements: int
    """Of the table's `count` column."""
    microseconds: float
    alg_bw: float
    bus_bw: float


# By hand from the GetCollByteCount and GetBw functions in src/*.cu of nccl-tests 2.19.6.
VECTORS = [
    Vector("all_reduce", 2, "float", 8, 8, 2, 2.0, 0.004, 0.004),
    Vector("all_reduce", 3, "bfloat16", 1002, 1002, 501, 1.002, 1.0, 4 / 3),
    Vector("all_reduce", 8, "float", 1 << 20, 1 << 20, 1 << 18, 1048.576, 1.0, 1.75),
    Vector("all_reduce", 8, "float", 8 << 30, 8 << 30, 2 << 30, 18_000.0, 477.218588, 835.132530),
    Vector("all_gather", 8, "float", 1 << 20, 1 << 20, 1 << 15, 1048.576, 1.0, 0.875),
    Vector("all_gather", 3, "float", 1 << 20, 1_048_560, 87_380, 1048.56, 1.0, 2 / 3),
    Vector("reduce_scatter", 4, "bfloat16", 100_000, 99_968, 12_496, 49.984, 2.0, 1.5),
    Vector("reduce_scatter", 2, "int8", 63, 32, 16, 1.0, 0.032, 0.016),
    Vector("all_to_all", 2, "double", 80, 64, 4, 1.0, 0.064, 0.032),
    Vector("all_to_all", 16, "half", 1 << 20, 1 << 20, 1 << 15, 1048.576, 1.0, 0.9375),
    Vector("all_to_allv", 4, "float", 1024, 1008, 64, 1.008, 1.0, 0.75),
    Vector("all_to_allv", 2, "double", 4096, 4096, 256, 4.096, 1.0, 0.5),
    Vector("broadcast", 8, "int8", 1000, 1000, 1000, 0.5, 2.0, 2.0),
    Vector("reduce", 5, "half", 1002, 1002, 501, 1.002, 1.0, 1.0),
    Vector("gather", 4, "uint8", 1000, 960, 240, 0.96, 1.0, 0.75),
    Vector("scatter", 3, "int64", 4096, 4080, 170, 4.08, 1.0, 2 / 3),
    Vector("sendrecv", 7, "int32", 4004, 4004, 1001, 4.004, 1.0, 1.0),
]


@pytest.mark.parametrize("v", VECTORS, ids=lambda v: f"{v.op}-{v.ranks}-{v.asked}")
def test_a_line_is_nccl_tests(v: Vector) -> None:
    op, width = OPERATIONS[v.op], WIDTHS[v.dtype]
    assert counts(op, iter([v.asked]), v.ranks, v.dtype) == [v.elements]
    size = size_of(op, v.elements, v.ranks, width)
    if v.op == "all_to_allv":
        size = largest(spread_counts(v.ranks, v.elements, 1.0, width)) * width
    assert size == v.size
    assert bandwidths(op, v.size, v.microseconds / 1e6, v.ranks) == pytest.approx((v.alg_bw, v.bus_bw))


def test_every_operation_has_a_vector() -> None:
    assert {v.op for v in VECTORS} == OPERATIONS.keys() - {"barrier"}


# Bytes that rank 0 sends at each distance, by hand from AlltoAllvGetPeerBytesDistanceWeighted in src/alltoallv.cu.
SPREADS = [
    (4, 64, 4, 1.0, [0, 160, 336, 512]),
    (4, 64, 4, 0.0, [256, 256, 256, 256]),
    (4, 64, 4, 0.5, [128, 208, 288, 384]),
    (2, 160, 1, 0.3, [112, 208]),  # 0.7 * 160 + 0.3 * 320, which doubles in another order put just below 208
    (3, 512, 8, 1.0, [0, 4096, 8192]),
    (8, 16, 1, 1.0, [0, 0, 0, 0, 16, 16, 16, 32]),
]


@pytest.mark.parametrize(("ranks", "count", "width", "spread", "sent"), SPREADS)
def test_uneven_splits_are_nccl_tests(
    ranks: int, count: int, width: int, spread: float, sent: list[int]
) -> None:
    matrix = spread_counts(ranks, count, spread, width)
    assert [n * width for n in matrix[0]] == sent
    for rank, row in enumerate(matrix):
        assert row == matrix[0][-rank:] + matrix[0][:-rank]
    assert largest(matrix) * width == sum(sent)
    assert largest([[1, 2], [30, 4]]) == 34  # a row or a column


@pytest.mark.parametrize(
    ("sweep", "found"),
    [
        ((8, 64, 2, None), [8, 16, 32, 64]),
        ((8, 100, 3, None), [8, 24, 72]),
        ((1000, 1000, 2, None), [1000]),
        ((8, 32, 2, 8), [8, 16, 24, 32]),
        ((10, 35, 4, 10), [10, 20, 30]),
        ((1 << 30, 16 << 30, 4, None), [1 << 30, 4 << 30, 16 << 30]),
    ],
)
def test_sizes_go_by_factor_or_by_step(sweep: tuple[int, int, int, int | None], found: list[int]) -> None:
    assert list(sizes(*sweep)) == found


def test_parts_are_of_16_bytes_and_each_count_comes_once() -> None:
    gather = OPERATIONS["all_gather"]
    assert counts(gather, sizes(8, 128, 2, 4), 4, "float") == [4, 8]
    assert counts(gather, sizes(8, 63, 2, None), 4, "float") == []
    assert [count_of(gather, 1 << 10, 3, width) for width in (1, 2, 4, 8)] == [336, 168, 84, 42]
    assert counts(OPERATIONS["barrier"], sizes(7, 7, 2, None), 4, "float") == [0]


def test_a_size_of_broken_elements_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"size of 10 bytes is not whole elements of float \(4 bytes each\); set"
    ):
        counts(OPERATIONS["all_reduce"], iter([8, 10]), 2, "float")


def test_wire_bandwidth_is_what_a_multiplying_switch_moves() -> None:
    factors = {name: op.wire_factor(8) for name, op in OPERATIONS.items()}
    assert factors.pop("all_reduce") == 1.125
    assert [name for name, factor in factors.items() if factor == 1.0] == [
        "all_gather",
        "reduce_scatter",
        "broadcast",
    ]
    assert OPERATIONS["all_to_all"].wire_factor(8) is None
