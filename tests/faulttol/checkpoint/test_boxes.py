"""Arithmetic of boxes, against arrays that are small enough to count."""

from __future__ import annotations

import random
from math import prod

import numpy as np
import pytest

from faulttol.checkpoint import boxes as boxes_of
from faulttol.checkpoint.boxes import Box, coverage_error, covers_exactly, first_overlap, first_uncovered

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def _box(noise: random.Random, whole: tuple[int, ...]) -> Box:
    ends = [sorted((noise.randint(0, n), noise.randint(0, n))) for n in whole]
    return Box(whole, tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


def _places(box: Box) -> np.ndarray:
    """Numbers of its elements in the whole, row by row."""
    everything = np.arange(prod(box.whole)).reshape(box.whole)
    return everything[box.slices_within(Box.full(box.whole))]


@pytest.mark.parametrize("dims", range(6))
def test_a_flat_stretch_is_a_few_boxes_in_order(dims: int) -> None:
    for seed in range(60):
        noise = random.Random(seed)
        box = _box(noise, tuple(noise.randint(1, 5) for _ in range(dims)))
        first, last = sorted((noise.randint(0, box.elements), noise.randint(0, box.elements)))
        parts = box.flat(first, last)
        assert len(parts) <= max(1, 2 * dims - 1) and all(part.elements for part in parts)
        found = [place for part in parts for place in _places(part).ravel()]
        assert found == list(_places(box).ravel()[first:last])


@pytest.mark.parametrize("dims", range(1, 5))
def test_what_is_shared_and_what_is_left_make_up_the_box(dims: int) -> None:
    for seed in range(60):
        noise = random.Random(seed)
        whole = tuple(noise.randint(1, 6) for _ in range(dims))
        one, other = _box(noise, whole), _box(noise, whole)
        if not one.elements:
            continue
        common, left = one.overlap(other), one.subtract(other)
        shared = set(_places(one).ravel()) & set(_places(other).ravel())
        assert (set(_places(common).ravel()) if common else set()) == shared
        rest = [place for part in left for place in _places(part).ravel()]
        assert sorted(rest) == sorted(set(_places(one).ravel()) - shared)


def test_a_box_tells_its_ranges() -> None:
    assert str(Box((8, 3), (4, 0), (2, 3))) == "[4:6, 0:3]" and str(Box((), (), ())) == "[]"


def test_a_cut_counts_from_the_box() -> None:
    assert Box((9, 4), (2, 1), (5, 2)).cut(0, 1, 3) == Box((9, 4), (3, 1), (2, 2))


@pytest.mark.parametrize(
    ("start", "shape", "valid"),
    [
        ((0,), (4,), True),
        ((4,), (0,), True),
        ((1,), (4,), False),
        ((-1,), (2,), False),
        ((0, 0), (1, 1), False),
    ],
)
def test_a_box_lies_in_its_whole(start: tuple[int, ...], shape: tuple[int, ...], valid: bool) -> None:
    assert Box((4,), start, shape).valid is valid


@pytest.mark.parametrize(
    ("boxes", "why"),
    [
        ([(0, 4), (4, 5)], "[9:10] of [10] has no source: 9 of 10 elements have"),
        ([(0, 4), (6, 4)], "[4:6] of [10] has no source: 8 of 10"),
        ([], "[0:10] of [10] has no source: 0 of 10"),
        ([(0, 6), (5, 5)], "[5:6] has two sources, the boxes [0:6] and [5:10] of [10]"),
        ([(0, 5), (0, 5)], "[0:5] has two sources"),
        ([(0, 5), (0, 4), (9, 1)], "[0:4] has two sources"),
        ([(0, 5), (5, 6)], "[10] has a box [5:11] of [10], which is outside of it"),
        ([(-1, 5), (4, 6)], "outside"),
    ],
)
def test_a_cover_that_is_wrong_tells_the_range(boxes: list[tuple[int, int]], why: str) -> None:
    told = coverage_error(Box.full((10,)), [Box((10,), (at,), (size,)) for at, size in boxes])
    assert told is not None and why in told


def _tile(box: Box, noise: random.Random) -> list[Box]:
    dims = [d for d, size in enumerate(box.shape) if size > 1]
    if not dims or noise.random() < 0.25:
        return [box]
    d = noise.choice(dims)
    at = noise.randrange(1, box.shape[d])
    return _tile(box.cut(d, 0, at), noise) + _tile(box.cut(d, at, box.shape[d]), noise)


def test_random_tilings_are_whole_and_any_change_to_them_is_not() -> None:
    whole = Box.full((6, 5, 7))
    for seed in range(60):
        noise = random.Random(seed)
        boxes = _tile(whole, noise)
        noise.shuffle(boxes)
        assert (
            coverage_error(whole, boxes) is None
            and first_uncovered(whole, boxes) is None
            and first_overlap(boxes) is None
        )
        if len(boxes) < 2:
            continue
        assert str(first_uncovered(whole, boxes[1:])) in str(coverage_error(whole, boxes[1:]))
        moved = Box(whole.whole, boxes[1].start, boxes[0].shape)
        assert coverage_error(whole, [moved, *boxes[1:]]) is not None


def test_a_tensor_without_dims_and_an_empty_one() -> None:
    point, empty = Box.full(()), Box.full((0, 4))
    assert coverage_error(point, [point]) is None and coverage_error(empty, [empty]) is None
    assert "two sources" in str(coverage_error(point, [point, point]))
    assert "no source" in str(coverage_error(point, []))


def _tiled(whole: tuple[int, ...], boxes: list[Box]) -> bool:
    rows = [[box.start for box in boxes], [box.shape for box in boxes]]
    start, shape = (np.array(part, np.int64).reshape(len(boxes), len(whole)) for part in rows)
    return covers_exactly(np.array(whole, np.int64), start, shape)


def _cut(box: Box, noise: random.Random) -> list[Box]:
    dims = [d for d, size in enumerate(box.shape) if size > 1]
    if not dims or noise.random() < 0.2:
        return [box]
    d = noise.choice(dims)
    at = noise.randrange(1, box.shape[d])
    return _cut(box.cut(d, 0, at), noise) + _cut(box.cut(d, at, box.shape[d]), noise)


@pytest.mark.parametrize("cells", [0, 1 << 21])
@pytest.mark.parametrize("dims", range(5))
def test_many_boxes_are_judged_as_few_are(monkeypatch: pytest.MonkeyPatch, dims: int, cells: int) -> None:
    """Whole covers, and those with a box changed, moved, doubled or missing: in the grid, and where it is too large."""
    monkeypatch.setattr(boxes_of, "_CELLS", cells)
    seen = set()
    for seed in range(40):
        noise = random.Random(seed)
        whole = tuple(noise.randint(1, 5) for _ in range(dims))
        parts = _cut(Box.full(whole), noise)
        noise.shuffle(parts)
        assert _tiled(whole, parts)
        one = noise.choice(parts)
        rest = [part for part in parts if part is not one]
        changed = [
            Box(whole, tuple(a + noise.randint(-1, 1) for a in one.start), one.shape),
            _box(noise, whole),
        ]
        for boxes in ([*rest, changed[0]], [*rest, changed[1]], rest, [*parts, one], [*rest, *rest]):
            judged = coverage_error(Box.full(whole), boxes) is None
            assert _tiled(whole, boxes) == judged, (whole, boxes)
            seen.add(judged)
    assert False in seen


def test_a_box_twice_and_another_missing_have_the_right_count() -> None:
    """As many elements as the tensor has: only the grid sees it."""
    whole = (4, 4)
    rows = [Box(whole, (i, 0), (1, 4)) for i in (0, 1, 1, 3)]
    assert not _tiled(whole, rows) and coverage_error(Box.full(whole), rows)
    assert _tiled((0, 3), [Box.full((0, 3))]) and _tiled((0, 3), [])
