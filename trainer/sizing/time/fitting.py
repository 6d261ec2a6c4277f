"""Finds a device's `Tuning` in its measured matmuls: robust least squares of log time.

The tiles are chosen anew at each step; the derivatives are taken with the choice held. `trainer.sizing.time.fits` keeps
what was found, since a plan must not wait for it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from trainer.sizing.time.kernels import LEVELS, Chip, Form, KernelKind, KernelPlan, MatmulShape, Tuning

Measured = tuple[MatmulShape, float]
"""A shape and its seconds."""

DENSE = ("rate", "launch", "ramp", "feed", "bandwidth", "split", "power")
SLOW = ("even", "even_feed", "odd", "odd_feed", "odd_result", "slow_ramp")
GROUPED = ("grouped_rate", "grouped_launch", "grouped_ramp", "expert")
BOUNDS: dict[str, tuple[float, float]] = {
    "launch": (2e-7, 1e-4), "ramp": (8.0, 4096.0), "feed": (1.0, 512.0), "split": (0.05, 50.0), "power": (0.2, 3.0),
    "even": (0.05, 1.2), "odd": (0.02, 1.2), "odd_result": (0.02, 1.2), "even_feed": (1.0, 1024.0),
    "odd_feed": (1.0, 1024.0), "slow_ramp": (8.0, 4096.0),
    "grouped_rate": (0.2, 1.2), "grouped_launch": (1e-8, 1e-3), "grouped_ramp": (0.2, 20.0), "expert": (1e-9, 1e-4),
}  # fmt: skip
"""What a parameter may be: beyond it, the data say nothing about it."""
_GOOD_ENOUGH = 1e-3
"""Relative gain of a step below which the search ends."""
_STEP = 0.02
_OUTLIER = 0.06
"""Log error from which on a shape counts linearly and no longer by its square."""
_FIRM = 1e-4
"""Weight of the starting point, in shapes: it decides where the data don't."""

UNMEASURED = (0.75, 1.4)
"""Measured over predicted where too little was measured to say."""
_REACH = 1.0
"""Octaves over which what the formula misses is alike."""
_FAR, _FAR_SQUARED = 2.5, 6.25
"""Reaches from which on shapes say nothing about each other."""
_SHRINK = 0.6
"""Weight, in shapes, of missing nothing."""
_CONFIDENCE = 0.95
_FEWEST = 8


def dense(chip: Chip, start: Tuning, rows: Sequence[Measured]) -> Tuning:
    """Fit the dense parameters, then the factors of rows less than 128 bytes aligned, then the kernels of the others."""
    aligned = [row for row in rows if row[0].kind == KernelKind.ALIGNED]
    tuning = fit(chip, start, DENSE, [row for row in aligned if min(row[0].levels) == LEVELS])
    form = Form(chip, replace(tuning, inner=(1.0,) * LEVELS, outer=(1.0,) * LEVELS))
    ratios: dict[tuple[int, int], list[float]] = {}
    for shape, seconds in aligned:
        if min(shape.levels) < LEVELS:
            ratios.setdefault(shape.levels, []).append(seconds / form.choose(shape).seconds)
    tuning = replace(tuning, inner=_factors(ratios, 0, start.inner), outer=_factors(ratios, 1, start.outer))
    return fit(chip, tuning, SLOW, [row for row in rows if row[0].kind != KernelKind.ALIGNED])


def _factors(
    ratios: Mapping[tuple[int, int], Sequence[float]], dim: int, start: tuple[float, ...]
) -> tuple[float, ...]:
    """Factor by level: where one dim alone is off it counts whole, where both are, its root.

    A level that wasn't measured is as slow as `start` says, but between what was measured of its neighbours.
    """
    known: dict[int, float] = {}
    for own in range(LEVELS):
        alone = [
            x
            for key, measured in ratios.items()
            if key[dim] == own and key[1 - dim] >= LEVELS
            for x in measured
        ]
        both = [
            math.sqrt(max(x, 1.0)) for key, measured in ratios.items() if key == (own, own) for x in measured
        ]
        if alone or both:
            known[own] = math.log(max(1.0, _median(alone or both)))
    known[LEVELS] = 0.0
    factors = []
    for own in range(LEVELS):
        above = known[min(at for at in known if at >= own)]
        below = [known[at] for at in known if at <= own]
        # What is farther off than all that was measured is at least as slow as that.
        slowest = max(below[-1], above) if below else math.inf
        factors.append(math.exp(min(max(math.log(start[own]), above), slowest)))
    return tuple(factors)


def solve_rate(chip: Chip, start: Tuning, shape: MatmulShape, seconds: float) -> Tuning:
    """The rate at which `shape` takes `seconds`, all else given."""
    low, high = math.log(start.rate) - 3, math.log(start.rate) + 3
    for _ in range(50):
        middle = (low + high) / 2
        slow = Form(chip, replace(start, rate=math.exp(middle))).choose(shape).seconds > seconds
        low, high = (middle, high) if slow else (low, middle)
    return replace(start, rate=math.exp(low))


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def fit(chip: Chip, start: Tuning, names: Sequence[str], rows: Sequence[Measured]) -> Tuning:
    """Fit the parameters of these names, by robust least squares of log time in logs of the parameters.

    They are drawn to `start` by `_FIRM`, and are `start`'s where there are fewer shapes than names.
    """
    if len(rows) < len(names):
        return start
    import numpy as np  # only a profile that was never fitted needs these two
    from scipy.optimize import least_squares

    measured = np.log([seconds for _, seconds in rows])
    origin = np.log([getattr(start, name) for name in names])
    edges = np.log([BOUNDS.get(name, (1e-300, 1e300)) for name in names]).T
    pull = _OUTLIER * math.sqrt(2 * _FIRM * len(rows))

    def tuned(point: Sequence[float]) -> Tuning:
        values: dict[str, Any] = {name: math.exp(x) for name, x in zip(names, point, strict=True)}
        return replace(start, **values)

    def errors(point: Sequence[float], plans: Sequence[KernelPlan] | None = None) -> Any:
        form = Form(chip, tuned(point))
        chosen = plans or [form.plan(shape) for shape, _ in rows]
        timed = [form.time(shape, plan).seconds for (shape, _), plan in zip(rows, chosen, strict=True)]
        return np.concatenate([np.log(timed) - measured, pull * (np.asarray(point) - origin)])

    def slopes(point: Sequence[float]) -> Any:
        form = Form(chip, tuned(point))
        plans = [form.plan(shape) for shape, _ in rows]
        here, moves = errors(point, plans), _STEP * np.eye(len(names))
        return np.stack([(errors(point + move, plans) - here) / _STEP for move in moves], axis=1)

    inside = np.clip(origin, edges[0] + 1e-6, edges[1] - 1e-6)
    solution = least_squares(
        errors, inside, slopes, (edges[0], edges[1]), loss="soft_l1", f_scale=_OUTLIER, ftol=_GOOD_ENOUGH
    )
    return tuned(solution.x)


class _Point(NamedTuple):
    """A measured shape in reaches, and the log of measured over predicted."""

    inner: float
    rows: float
    columns: float
    experts: float
    imbalance: float
    miss: float


Place = tuple[tuple[KernelKind, str], tuple[float, float, float, float, float]]
"""The kernels that a shape may use, and where it lies among those of them."""


class Misses:
    """What the formula misses, smoothed over neighbouring shapes."""

    def __init__(self, points: Sequence[tuple[Place, float]]) -> None:
        groups: dict[tuple[KernelKind, str], list[_Point]] = {}
        for (kind, where), miss in points:
            groups.setdefault(kind, []).append(_Point(*where, miss))
        self._groups = {kind: sorted(group) for kind, group in groups.items()}

    def has(self, kind: KernelKind) -> bool:
        """Whether shapes of a kind are among them."""
        return any(own == kind for own, _ in self._groups)

    def at(self, place: Place) -> float:
        """Log factor at a place."""
        near, total = self._near(place)
        return total / (near + _SHRINK)

    def _near(self, place: Place, but: _Point | None = None) -> tuple[float, float]:
        """Weight of the shapes nearby, and their misses by weight; `but` leaves one out, and those as wide."""
        kind, (inner, rows, columns, experts, imbalance) = place
        points = self._groups.get(kind, [])
        weight = total = 0.0
        first, last = bisect_left(points, (inner - _FAR,)), bisect_left(points, (inner + _FAR,))
        for point in points[first:last]:
            k, m, n, e, i, miss = point
            distance = (k - inner) ** 2 + (m - rows) ** 2 + (n - columns) ** 2
            if distance < _FAR_SQUARED:
                distance += (e - experts) ** 2 + (i - imbalance) ** 2
                if distance < _FAR_SQUARED and not (but and (k, n) == (but.inner, but.columns)):
                    near = math.exp(-distance / 2)
                    weight += near
                    total += near * miss
        return weight, total

    def between(self, place: Place) -> tuple[float, float]:
        """Measured over predicted at `_CONFIDENCE`.

        Near measured shapes as for those that were left out with all that differ in rows alone, far from them as the
        formula alone fits those of its kind.
        """
        aligned = place[0][0] == KernelKind.ALIGNED
        return self._intervals[aligned, self._near(place)[0] > _SHRINK]

    @cached_property
    def _intervals(self) -> dict[tuple[bool, bool], tuple[float, float]]:
        """By whether rows are aligned, and whether shapes like it were measured."""
        intervals = {}
        for aligned in (False, True):
            points = [
                ((kind, point[:5]), point)
                for kind, group in self._groups.items()
                if (kind[0] == KernelKind.ALIGNED) == aligned
                for point in group
            ]
            near = []
            for where, point in points:
                weight, total = self._near(where, but=point)
                near.append(point.miss - total / (weight + _SHRINK))
            intervals[aligned, True] = _edges(near)
            intervals[aligned, False] = _edges([point.miss for _, point in points])
        return intervals


def _edges(logs: Sequence[float]) -> tuple[float, float]:
    """Ratios between which `_CONFIDENCE` of some logs lie."""
    if len(logs) < _FEWEST:
        return UNMEASURED
    left = sorted(logs)
    edge = (1 - _CONFIDENCE) / 2 * (len(left) - 1)
    low, high = left[math.floor(edge)], left[math.ceil(len(left) - 1 - edge)]
    return math.exp(min(low, 0.0)), math.exp(max(high, 0.0))


def place(shape: MatmulShape) -> Place:
    """Where a shape lies, in reaches; the experts count half."""
    rows = shape.m if shape.inner else shape.m / shape.experts
    inner = shape.k / shape.experts if shape.inner else shape.k
    where = (
        math.log2(inner) / _REACH,
        math.log2(rows) / _REACH,
        math.log2(shape.n) / _REACH,
        math.log2(shape.experts) / (2 * _REACH),
        math.log2(shape.imbalance) / _REACH,
    )
    return (shape.kind, "" if shape.kind == KernelKind.ALIGNED else shape.layout), where


def misses(form: Form, rows: Sequence[Measured]) -> list[float]:
    """Log of measured over predicted of each of some shapes."""
    return [math.log(seconds / form.choose(shape).seconds) for shape, seconds in rows]


def missed(rows: Sequence[Measured], logs: Sequence[float]) -> Misses | None:
    """What a fitted formula misses of the shapes that it was fitted to, by `misses`; None without any."""
    points = [(place(shape), log) for (shape, _), log in zip(rows, logs, strict=True)]
    return Misses(points) if points else None
