"""Where tensors of another format lie in ours: one table for both directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Protocol

import numpy as np

from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.hashes import MAX_READ, CheckpointSource
from faulttol.checkpoint.pieces import DTYPES
from faulttol.convert.values import Bits, convert


class Foreign(Protocol):
    """A checkpoint of another format, read a range at a time; by several threads at once."""

    bytes: int
    """Read so far."""

    def names(self) -> Sequence[str]:
        """Of its tensors; an optimizer's slot has the parameter's name and `/slot`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""

    def dtype(self, name: str) -> str:
        """As torch names it."""

    def read(self, name: str, first: int, last: int) -> Bits:
        """Elements `[first, last)`, counted row by row, as bits."""


@dataclass(frozen=True)
class DimOrder:
    """Places of one dim that are in another order there: our place i is their place `places[i]`."""

    dim: int
    """0 or 1 of the foreign tensor."""
    places: tuple[int, ...]

    @cached_property
    def ours(self) -> np.ndarray:
        """By our place, theirs."""
        return np.array(self.places)

    @cached_property
    def theirs(self) -> np.ndarray:
        """By their place, ours."""
        return np.argsort(self.ours)

    @cached_property
    def cuts(self) -> list[int]:
        """Places where what comes before is the same places here and there, 0 and the end among them."""
        reached = np.maximum.accumulate(self.ours)
        return [0, *(np.flatnonzero(reached == np.arange(len(reached))) + 1).tolist()]


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of another format, as a part of one of ours."""

    foreign: str
    """Its name there."""
    shape: tuple[int, ...]
    """As it has there: that of `box` without leading dims of 1."""
    name: str
    """Of ours."""
    box: Box
    """In ours."""
    order: DimOrder | None = None
    dtype: str | None = None
    """As it is written, whatever is asked for; None: as asked."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def lead(self) -> int:
        """Dims of `box` before those of the foreign tensor."""
        return len(self.box.shape) - len(self.shape)

    def rows(self, first: int, last: int, most: int) -> Iterator[tuple[int, int]]:
        """Rows `[first, last)` in ranges of at most `most` elements, or as many more as have to stay together."""
        if not self.elements or first >= last:
            return
        per = max(1, most // prod(self.shape[1:]))
        if self.order is None or self.order.dim != 0:
            for at in range(first, last, per):
                yield at, min(at + per, last)
            return
        begin = first
        for end, after in pairwise([*(cut for cut in self.order.cuts if first < cut <= last), last + per]):
            if after - begin > per:
                yield begin, end
                begin = end


def part(
    foreign: str, shape: tuple[int, ...], name: str, whole: tuple[int, ...], at: Sequence[int] = ()
) -> PlacedTensor:
    """A foreign tensor that is the whole of ours, or that with the leading places `at`."""
    start = (*at, *(0 for _ in shape))
    return PlacedTensor(foreign, shape, name, Box(whole, start, (*(1 for _ in at), *shape)))


def cost(source: CheckpointSource, placed: PlacedTensor) -> int:
    """Bytes that `export_bytes` reads, without indexes."""
    return sum(source.cost(placed.name, box) for box in _boxes(source, placed))


def _boxes(source: CheckpointSource, placed: PlacedTensor) -> Iterator[Box]:
    """What `export_bytes` reads at a time, in ours."""
    if not placed.shape:
        yield placed.box
        return
    most = MAX_READ // DTYPES[source.tensors[placed.name].dtype][1]
    for first, last in placed.rows(0, placed.shape[0], most):
        yield placed.box.cut(placed.lead, first, last)


def export_bytes(source: CheckpointSource, placed: PlacedTensor, wanted: str) -> Iterator[memoryview]:
    """The bytes of a foreign tensor, from ours, in chunks.

    Args:
        wanted: dtype of the bytes.
    """
    given, pieces = source.tensors[placed.name].dtype, source.pieces(placed.name)
    for box in _boxes(source, placed):
        values = source.read(placed.name, box, pieces).reshape(box.shape[placed.lead :])
        if placed.order is not None:
            first = box.start[placed.lead] - placed.box.start[placed.lead]
            places = _within(placed.order.theirs, placed.order, first, first + len(values))
            values = np.take(values, places, placed.order.dim)
        yield _bytes(convert(values.reshape(-1), given, wanted))


def import_bytes(
    foreign: Foreign, parts: Iterable[PlacedTensor], box: Box, wanted: str
) -> Iterator[memoryview]:
    """The bytes of a box of ours, whole rows, from the foreign tensors that it is made of, in chunks.

    Args:
        parts: of the tensor, in the order of their places; each wholly in the box or with its first dim cut by it.
        wanted: dtype of ours.
    """
    for placed in parts:
        common = placed.box.overlap(box)
        if common is None:
            continue
        given = foreign.dtype(placed.foreign)
        if not placed.shape:
            yield _bytes(convert(foreign.read(placed.foreign, 0, 1), given, wanted))
            continue
        begin = common.start[placed.lead] - placed.box.start[placed.lead]
        width = prod(placed.shape[1:])
        item = max(DTYPES[given][1], DTYPES[wanted][1])
        for first, last in placed.rows(begin, begin + common.shape[placed.lead], MAX_READ // item):
            values = foreign.read(placed.foreign, first * width, last * width)
            values = values.reshape(last - first, *placed.shape[1:])
            if placed.order is not None:
                values = np.take(
                    values, _within(placed.order.ours, placed.order, first, last), placed.order.dim
                )
            yield _bytes(convert(values, given, wanted))


def _within(places: np.ndarray, order: DimOrder, first: int, last: int) -> np.ndarray:
    return places[first:last] - first if order.dim == 0 else places


def _bytes(values: Bits) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
