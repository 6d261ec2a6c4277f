"""Exact values: every type holds them and their reductions, and no two places are easily mixed up."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from collectives.ops.exact import TYPES, expected_reduced, expected_sent, fill, mismatches
from collectives.ops.operations import WIDTHS

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

CPU = torch.device("cpu")
PERIOD = 65_521
FLOATS = [name for name, dtype in TYPES.items() if dtype.is_floating_point]
WHOLE = [name for name in TYPES if name not in FLOATS]
LEGAL = [
    (name, redop)
    for name in TYPES
    for redop in ("sum", "prod", "max", "min", *(("avg",) if name in FLOATS else ("band", "bor", "bxor")))
]


def test_types_are_those_of_the_sizes() -> None:
    assert {name: dtype.itemsize for name, dtype in TYPES.items()} == WIDTHS


MANY = [("int8", "sum", 300), ("bfloat16", "sum", 300), ("bfloat16", "avg", 512), ("half", "prod", 300)]


@pytest.mark.parametrize(
    ("name", "redop", "ranks"), [*((*legal, ranks) for legal in LEGAL for ranks in (2, 8)), *MANY]
)
def test_the_type_holds_every_value_and_every_partial_reduction(name: str, redop: str, ranks: int) -> None:
    dtype, target = TYPES[name], 1
    parts = [expected_sent(source, target, dtype, ranks, redop, CPU) for source in range(ranks)]
    partial = parts[0].to(torch.int64)
    combine = {
        "sum": torch.add, "avg": torch.add, "prod": torch.mul, "max": torch.maximum, "min": torch.minimum,
        "band": torch.bitwise_and, "bor": torch.bitwise_or, "bxor": torch.bitwise_xor,
    }[redop]  # fmt: skip
    for part in parts[1:]:
        assert torch.equal(part.to(dtype).to(torch.int64), part)
        partial = combine(partial, part)
    # Values are not below 0 and reductions to part of the ranks not above that to all of them (min: not above a value).
    assert torch.equal(partial.to(dtype).to(torch.int64), partial)
    whole = expected_reduced(dtype, ranks, redop, target, CPU)
    assert torch.equal(whole.to(dtype).double(), whole.double())
    assert torch.equal(whole.double() * (ranks if redop == "avg" else 1), partial.double())


def test_a_part_of_another_rank_or_for_another_or_shifted_differs_nearly_everywhere() -> None:
    mine = expected_sent(3, 2, torch.float, 8, "none", CPU)
    others = [
        expected_sent(s, t, torch.float, 8, "none", CPU)
        for s in range(8)
        for t in range(8)
        if (s == 3) != (t == 2)
    ]
    shifted = [mine.roll(1 << places) for places in range(16)]
    assert max(float((mine == other).float().mean()) for other in others + shifted) < 0.05


def test_no_tile_is_what_an_unwritten_buffer_holds() -> None:
    """Neither zeros, as allocated, nor ones, as the check writes before the call."""
    for source, target in product(range(8), range(8)):
        tile = expected_sent(source, target, torch.float, 8, "none", CPU)
        assert (tile == 0).float().mean() < 0.05
        assert (tile == 1).float().mean() < 0.05


@pytest.mark.parametrize("length", [0, 1, 7, PERIOD - 1, PERIOD, PERIOD + 1, 3 * PERIOD + 5])
@pytest.mark.parametrize("name", ["int8", "bfloat16", "double"])
def test_every_wrong_element_is_counted_once(length: int, name: str) -> None:
    tile = expected_sent(1, 2, TYPES[name], 4, "none", CPU)
    buffer = torch.zeros(length, dtype=TYPES[name])
    fill(buffer, tile)
    assert mismatches(buffer, tile) == 0
    assert torch.equal(buffer, tile.repeat(4)[:length].to(TYPES[name]))
    places = sorted({0, length // 2, length - 1, PERIOD - 1, PERIOD} & set(range(length)))
    for place in places:
        buffer[place] = 0 if buffer[place] else 1
    assert mismatches(buffer, tile) == len(places)
    if length and name != "int8":
        buffer[0] = float("nan")
        assert mismatches(buffer, tile) == len(places)


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made anew."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it."""
        made = func(*args, **kwargs or {})
        given = [one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)]
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
            self.bytes = max(self.bytes, made.nbytes)
        return made


def test_a_check_takes_little_memory_beside_the_buffer() -> None:
    """Of one byte each, the elements' truth values were as much as the buffer: the largest size that fitted ended in it."""
    buffer = torch.zeros(PERIOD * 1000 + 5, dtype=torch.uint8)
    buffer[[0, PERIOD * 700, -1]] = 1
    with LargestResult() as largest:
        assert mismatches(buffer, torch.zeros(PERIOD, dtype=torch.uint8)) == 3
    assert largest.bytes <= buffer.nbytes / 3
