"""Boxes of a global tensor's index space, and the arithmetic that shards and files need of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

_CELLS = 1 << 21
"""Cells of a grid that are counted however few boxes there are."""


@dataclass(frozen=True)
class Box:
    """A box of a global tensor's index space: `[start, start + shape)` of `whole`, row-major."""

    whole: tuple[int, ...]
    """Shape of the global tensor."""
    start: tuple[int, ...]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        ranges = (f"{at}:{at + size}" for at, size in zip(self.start, self.shape, strict=True))
        return f"[{', '.join(ranges)}]"

    @classmethod
    def full(cls, whole: tuple[int, ...]) -> Box:
        """The box that is the whole tensor."""
        return cls(whole, (0,) * len(whole), whole)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def valid(self) -> bool:
        """Whether it lies in `whole` and has as many dims."""
        if not len(self.whole) == len(self.start) == len(self.shape):
            return False
        sizes = zip(self.start, self.shape, self.whole, strict=True)
        return all(at >= 0 and size >= 0 and at + size <= limit for at, size, limit in sizes)

    def overlap(self, other: Box) -> Box | None:
        """What two boxes of one tensor share; None where that is nothing."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        ends = zip(self.start, self.shape, other.start, other.shape, strict=True)
        shape = tuple(min(a + m, b + n) - s for (a, m, b, n), s in zip(ends, start, strict=True))
        return Box(self.whole, start, shape) if all(n > 0 for n in shape) else None

    def slices_within(self, outer: Box) -> tuple[slice, ...]:
        """Slices that cut this box out of a tensor that holds `outer`."""
        at = zip(self.start, outer.start, self.shape, strict=True)
        return tuple(slice(a - b, a - b + n) for a, b, n in at)

    def cut(self, dim: int, first: int, last: int) -> Box:
        """Places `[first, last)` of one dim, counted from the box's own start."""
        start = (*self.start[:dim], self.start[dim] + first, *self.start[dim + 1 :])
        return Box(self.whole, start, (*self.shape[:dim], last - first, *self.shape[dim + 1 :]))

    def flat(self, first: int, last: int) -> list[Box]:
        """Elements `[first, last)` of the box, counted row by row, as boxes in that order.

        At most 2n-1 boxes in n dims. Each is contiguous in the box's own memory, so a flat shard or
        a range of bytes of a file is a few boxes.
        """
        boxes = []
        for start, shape in _boxes_of_range(self.shape, first, last):
            boxes.append(Box(self.whole, tuple(a + b for a, b in zip(self.start, start, strict=True)), shape))
        return boxes

    def subtract(self, other: Box) -> list[Box]:
        """What is left of the box without `other`, as disjoint boxes."""
        common = self.overlap(other)
        if common is None:
            return [self]
        left, rest = [], self
        for dim in range(len(self.shape)):
            first = common.start[dim] - rest.start[dim]
            last = first + common.shape[dim]
            left += [rest.cut(dim, 0, first)] if first else []
            left += [rest.cut(dim, last, rest.shape[dim])] if last < rest.shape[dim] else []
            rest = rest.cut(dim, first, last)
        return left


def _boxes_of_range(
    shape: tuple[int, ...], first: int, last: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Start and shape of the boxes that elements `[first, last)` of an array are."""
    if first >= last:
        return
    if not shape:
        yield (), ()
        return
    row, zeros = prod(shape[1:]), (0,) * (len(shape) - 1)
    low, high = -(-first // row), last // row
    if low > high:  # within one row
        for start, size in _boxes_of_range(shape[1:], first - high * row, last - high * row):
            yield (high, *start), (1, *size)
        return
    for start, size in _boxes_of_range(shape[1:], first - (low - 1) * row, row) if first < low * row else ():
        yield (low - 1, *start), (1, *size)
    if low < high:
        yield (low, *zeros), (high - low, *shape[1:])
    for start, size in _boxes_of_range(shape[1:], 0, last - high * row):
        yield (high, *start), (1, *size)


def first_uncovered(target: Box, boxes: Sequence[Box]) -> Box | None:
    """A part of `target` that none of `boxes` covers; None where there is none."""
    left = [target]
    for box in sorted(boxes, key=lambda b: b.start):
        left = [part for region in left for part in region.subtract(box)]
        if not left:
            return None
    return left[0]


def first_overlap(boxes: Sequence[Box]) -> tuple[Box, Box, Box] | None:
    """Two boxes that share an element, with what they share, by a sweep along the dim that is cut most often."""
    boxes = [box for box in boxes if box.elements]
    dims = range(len(boxes[0].shape)) if boxes else range(0)
    if not dims:
        return (boxes[0], boxes[1], boxes[0]) if len(boxes) > 1 else None
    sweep = max(dims, key=lambda d: len({box.start[d] for box in boxes}))
    reached: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.start[sweep]):
        reached = [o for o in reached if o.start[sweep] + o.shape[sweep] > box.start[sweep]]
        for other in reached:
            common = box.overlap(other)
            if common is not None:
                return other, box, common
        reached.append(box)
    return None


def coverage_error(target: Box, boxes: Sequence[Box]) -> str | None:
    """Why `boxes` don't cover `target` exactly once, with the range; None where they do.

    Args:
        target: the whole tensor, or the part of it that is looked at.
        boxes: parts of `target`.
    """
    for box in boxes:
        if not box.valid or box.whole != target.whole:
            return f"{list(target.whole)} has a box {box} of {list(box.whole)}, which is outside of it"
    pair = first_overlap(boxes)
    if pair is not None:
        return f"{pair[2]} has two sources, the boxes {pair[0]} and {pair[1]} of {list(target.whole)}"
    count = sum(box.elements for box in boxes)
    if count != target.elements:
        hole = first_uncovered(target, boxes)
        return f"{hole} of {list(target.whole)} has no source: {count} of {target.elements} elements have"
    return None


def covers_exactly(whole: Any, start: Any, shape: Any) -> bool:
    """Whether boxes cover a tensor exactly once: `coverage_error` without the reason, for thousands of boxes.

    The boxes' edges cut the tensor into a grid. A box adds one to its cells, through the differences at its corners; in the
    end each cell must have one. Where the grid is far larger than the boxes are many, `coverage_error` decides.

    Args:
        whole: array of int64 [dims].
        start: array of int64 [boxes, dims].
        shape: as `start`.
    """
    import numpy as np

    if not ((start >= 0).all() and (shape >= 0).all() and (start + shape <= whole).all()):
        return False
    kept = (shape > 0).all(axis=1)
    start, end = start[kept], (start + shape)[kept]
    if int((end - start).prod(axis=1).sum()) != prod(whole.tolist()):
        return False
    if len(start) < 2:
        return True
    if not len(whole):
        return False
    edges = [np.unique(np.concatenate([start[:, d], end[:, d]])) for d in range(len(whole))]
    cells = prod(len(edge) for edge in edges)
    if cells > max(_CELLS, 16 * len(start)):
        extent = tuple(whole.tolist())
        sizes = (end - start).tolist()
        boxes = [Box(extent, tuple(a), tuple(n)) for a, n in zip(start.tolist(), sizes, strict=True)]
        return coverage_error(Box.full(extent), boxes) is None
    corners = [
        (np.searchsorted(edge, start[:, d]), np.searchsorted(edge, end[:, d])) for d, edge in enumerate(edges)
    ]
    grid = np.zeros([len(edge) for edge in edges], np.int32)
    for choice in product((0, 1), repeat=len(edges)):
        sign = -1 if sum(choice) % 2 else 1
        np.add.at(grid, tuple(corner[side] for corner, side in zip(corners, choice, strict=True)), sign)
    for d in range(len(edges)):
        grid = grid.cumsum(axis=d)
    inner = grid[tuple(slice(0, -1) for _ in edges)]
    return bool((inner == 1).all())
