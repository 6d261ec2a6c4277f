"""Fits a device's `MatmulParameters` to its measured matmuls, keeps them beside the profile, and predicts residuals.

The fit is robust least squares of log time. A plan must not wait for it: `h100.fit.json` beside `h100.yaml` holds the
parameters and the residual of each measured shape, under a digest of the shapes and of the starting point. Where there is
none, or the digest differs, the fit is done. It is kept where there was none of these measurements: a plan with a device
of other figures (`hardware.memory_gbps=3000`) leaves the file alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from configs import profile
from configs.errors import from_json
from configs.paths import write_whole
from trainer.sizing.time.kernels import (
    LEVELS,
    Chip,
    KernelKind,
    KernelPlan,
    MatmulModel,
    MatmulParameters,
    MatmulShape,
)

VERSION = 1  # of the formula and of the fit: to be raised where either changes
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
_GOOD_ENOUGH = 1e-3  # relative gain of a step below which the search ends
_STEP = 0.02
_OUTLIER = 0.06  # log error from which on a shape counts linearly and no longer by its square
_FIRM = 1e-4  # weight of the starting point, in shapes: it decides where the data don't

UNMEASURED = (0.75, 1.4)  # measured over predicted where too little was measured to say
_FAR, _FAR_SQUARED = 2.5, 6.25  # octaves from which on shapes say nothing about each other
_SHRINK = 0.6  # weight, in shapes, of missing nothing
_CONFIDENCE = 0.95
_FEWEST = 8


def load_or_fit(
    name: str,
    chip: Chip,
    start: MatmulParameters,
    dense_rows: Sequence[Measured],
    grouped_rows: Sequence[Measured],
    is_whole: Callable[[], bool],
) -> tuple[MatmulParameters, list[float], list[float]]:
    """A profile's tuning, and log of measured over predicted of each of its dense and grouped shapes.

    Args:
        is_whole: whether these are the measurements of the profile that lies under `name`, and not a part of them; asked
            after a fit alone.
    """
    rows = [*dense_rows, *grouped_rows]
    key, path = _digest(rows, chip, start), profile.FOLDER / "device" / f"{name}.fit.json"
    kept = _read(path)
    if kept.get("key") == key:
        pairs = kept["tuning"].items()
        values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in pairs}
        return MatmulParameters(**values), kept["dense"], kept["grouped"]
    tuning = fit(chip, dense(chip, start, dense_rows), GROUPED, grouped_rows)
    form = MatmulModel(chip, tuning)
    logs = {"dense": log_residuals(form, dense_rows), "grouped": log_residuals(form, grouped_rows)}
    measured = _digest(rows)
    if kept.get("measured") != measured and is_whole():
        made = {"measured": measured, "key": key, "tuning": asdict(tuning), **logs}
        with contextlib.suppress(OSError):  # a folder that can't be written costs the next plan the same fit
            write_whole(path, json.dumps(made) + "\n")
    return tuning, logs["dense"], logs["grouped"]


def _digest(rows: Sequence[Measured], *more: Chip | MatmulParameters) -> str:
    """Of what a fit begins with, numbers to nine digits: processors differ in the last ones of `exp` and `log`."""
    given = (VERSION, [(asdict(shape), seconds) for shape, seconds in rows], [asdict(one) for one in more])
    return hashlib.sha256(repr(_rounded(given)).encode()).hexdigest()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def dense(chip: Chip, start: MatmulParameters, rows: Sequence[Measured]) -> MatmulParameters:
    """Fit the dense parameters, then the factors of rows less than 128 bytes aligned, then the kernels of the others."""
    aligned = [row for row in rows if row[0].kind == KernelKind.ALIGNED]
    tuning = fit(chip, start, DENSE, [row for row in aligned if min(row[0].levels) == LEVELS])
    form = MatmulModel(chip, replace(tuning, inner=(1.0,) * LEVELS, outer=(1.0,) * LEVELS))
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
    known = {LEVELS: 0.0}
    for own in range(LEVELS):
        alone = ratios.get((own, LEVELS) if dim == 0 else (LEVELS, own))
        values = sorted(alone or (math.sqrt(max(x, 1.0)) for x in ratios.get((own, own), ())))
        if values:
            known[own] = math.log(max(1.0, values[len(values) // 2]))
    factors = []
    for own in range(LEVELS):
        above = known[min(at for at in known if at >= own)]
        below = [at for at in known if at <= own]
        # What is farther off than all that was measured is at least as slow as that.
        slowest = max(known[max(below)], above) if below else math.inf
        factors.append(math.exp(min(max(math.log(start[own]), above), slowest)))
    return tuple(factors)


def solve_rate(chip: Chip, start: MatmulParameters, shape: MatmulShape, seconds: float) -> MatmulParameters:
    """The rate at which `shape` takes `seconds`, all else given."""
    low, high = math.log(start.rate) - 3, math.log(start.rate) + 3
    for _ in range(50):
        middle = (low + high) / 2
        slow = MatmulModel(chip, replace(start, rate=math.exp(middle))).choose(shape).seconds > seconds
        low, high = (middle, high) if slow else (low, middle)
    return replace(start, rate=math.exp(low))


def fit(
    chip: Chip, start: MatmulParameters, names: Sequence[str], rows: Sequence[Measured]
) -> MatmulParameters:
    """Fit the parameters of these names, by robust least squares of log time in logs of the parameters.

    They are drawn to `start` by `_FIRM`, and are `start`'s where there are fewer shapes than names. Tiles are chosen anew
    at each step; the derivatives are taken with the choice held.
    """
    if len(rows) < len(names):
        return start
    import numpy as np  # only a profile that was never fitted needs these two
    from scipy.optimize import least_squares

    measured = np.log([seconds for _, seconds in rows])
    origin = np.log([getattr(start, name) for name in names])
    edges = np.log([BOUNDS.get(name, (1e-300, 1e300)) for name in names]).T
    pull = _OUTLIER * math.sqrt(2 * _FIRM * len(rows))

    def tuned(point: Sequence[float]) -> MatmulParameters:
        values: dict[str, Any] = {name: math.exp(x) for name, x in zip(names, point, strict=True)}
        return replace(start, **values)

    def errors(point: Sequence[float], plans: Sequence[KernelPlan] | None = None) -> Any:
        form = MatmulModel(chip, tuned(point))
        chosen = plans or [form.plan(shape) for shape, _ in rows]
        timed = [form.time(shape, plan).seconds for (shape, _), plan in zip(rows, chosen, strict=True)]
        return np.concatenate([np.log(timed) - measured, pull * (np.asarray(point) - origin)])

    def slopes(point: Sequence[float]) -> Any:
        form = MatmulModel(chip, tuned(point))
        plans = [form.plan(shape) for shape, _ in rows]
        here, moves = errors(point, plans), _STEP * np.eye(len(names))
        return np.stack([(errors(point + move, plans) - here) / _STEP for move in moves], axis=1)

    inside = np.clip(origin, edges[0] + 1e-6, edges[1] - 1e-6)
    solution = least_squares(
        errors, inside, slopes, (edges[0], edges[1]), loss="soft_l1", f_scale=_OUTLIER, ftol=_GOOD_ENOUGH
    )
    return tuned(solution.x)


Place = tuple[tuple[KernelKind, str], tuple[float, float, float, float, float]]
"""The kernels that a shape may use, and where it lies among those of them, in octaves."""


def place(shape: MatmulShape) -> Place:
    """Where a shape lies: inner width, rows, columns, experts, which count half, and imbalance."""
    rows, inner = map(math.log2, shape.each)
    columns, experts, imbalance = math.log2(shape.n), math.log2(shape.experts) / 2, math.log2(shape.imbalance)
    layout = "" if shape.kind == KernelKind.ALIGNED else shape.layout
    return (shape.kind, layout), (inner, rows, columns, experts, imbalance)


def log_residuals(form: MatmulModel, rows: Sequence[Measured]) -> list[float]:
    """Log of measured over predicted of each of some shapes."""
    return [math.log(seconds / form.choose(shape).seconds) for shape, seconds in rows]


class Residuals:
    """What the formula misses (`misses`) of the shapes that it was fitted to, smoothed over neighbouring shapes."""

    def __init__(self, rows: Sequence[Measured], logs: Sequence[float]) -> None:
        self._groups: dict[tuple[KernelKind, str], list[tuple[Any, float]]] = {}
        for (shape, _), log in zip(rows, logs, strict=True):
            kind, where = place(shape)
            self._groups.setdefault(kind, []).append((where, log))
        for group in self._groups.values():
            group.sort()

    def has(self, kind: KernelKind) -> bool:
        """Whether shapes of a kind are among them."""
        return any(own == kind for own, _ in self._groups)

    def at(self, place: Place) -> float:
        """Log factor at a place."""
        near, total = self._near(place)
        return total / (near + _SHRINK)

    def _near(self, place: Place, others: bool = False) -> tuple[float, float]:
        """Weight of the shapes nearby, and their misses by weight; `others` leaves out those that differ in rows alone."""
        kind, (inner, rows, columns, experts, imbalance) = place
        points = self._groups.get(kind, [])
        weight = total = 0.0
        first, last = (bisect_left(points, ((inner + far,),)) for far in (-_FAR, _FAR))
        for (k, m, n, e, i), miss in points[first:last]:
            distance = (k - inner) ** 2 + (m - rows) ** 2 + (n - columns) ** 2
            if distance < _FAR_SQUARED:
                distance += (e - experts) ** 2 + (i - imbalance) ** 2
                if distance < _FAR_SQUARED and not (others and (k, n) == (inner, columns)):
                    near = math.exp(-distance / 2)
                    weight += near
                    total += near * miss
        return weight, total

    def between(self, place: Place) -> tuple[float, float]:
        """Measured over predicted at `_CONFIDENCE`.

        Near measured shapes as for those that were left out with all that differ in rows alone, far from them as the
        formula alone fits those of its kind.
        """
        key = place[0][0] == KernelKind.ALIGNED, self._near(place)[0] > _SHRINK
        return self._intervals.get(key, UNMEASURED)

    @cached_property
    def _intervals(self) -> dict[tuple[bool, bool], tuple[float, float]]:
        """By whether rows are aligned, and whether shapes like it were measured."""
        left: dict[tuple[bool, bool], list[float]] = {}
        for kind, group in self._groups.items():
            aligned = kind[0] == KernelKind.ALIGNED
            for where, miss in group:
                weight, total = self._near((kind, where), others=True)
                left.setdefault((aligned, True), []).append(miss - total / (weight + _SHRINK))
                left.setdefault((aligned, False), []).append(miss)
        return {key: _edges(logs) for key, logs in left.items()}


def _edges(logs: Sequence[float]) -> tuple[float, float]:
    """Ratios between which `_CONFIDENCE` of some logs lie."""
    if len(logs) < _FEWEST:
        return UNMEASURED
    left = sorted(logs)
    edge = (1 - _CONFIDENCE) / 2 * (len(left) - 1)
    low, high = left[math.floor(edge)], left[math.ceil(len(left) - 1 - edge)]
    return math.exp(min(low, 0.0)), math.exp(max(high, 0.0))
