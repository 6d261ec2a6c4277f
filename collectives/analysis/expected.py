"""The time that each direction's messages should take on a path without a fault. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from collectives.analysis.paths import PathKind, path_kinds, return_times
from collectives.analysis.probes import Floats, Ints, Probes
from configs.hardware import HardwareConfig

SPREAD = 0.35
"""Of the fastest tenth's rate, the least of sound paths that differ by nature: one link or two, one socket or two."""


@dataclass(frozen=True)
class ExpectedTimes:
    """Seconds by direction, [P], and the rate of each kind of path."""

    quick: Floats
    """What three quarters of the messages would exceed."""
    limit: Floats
    """A path is slow whose quick messages take longer."""
    slow: Floats
    """A message is slow that takes longer."""
    kinds: tuple[PathKind, ...]
    of: Ints
    """Index of each direction's kind."""
    rates: tuple[float | None, ...]
    """GB/s that the fastest third of each kind's paths usually reach; None where paths of that kind weren't probed."""


def expected_times(probes: Probes, hardware: HardwareConfig, slow_ratio: float) -> ExpectedTimes:
    """The median of the fastest third of the paths of a kind, as long as a third of them are sound.

    Of two middle ones the slower: a single path that is faster than the others makes none of them slow.
    """
    table, paths = probes.table, path_kinds(probes, hardware)
    quick, limit, slow = (np.full(len(table.quick), np.inf) for _ in range(3))
    rates: list[float | None] = []
    for number, kind in enumerate(paths.kinds):
        rows = np.flatnonzero(paths.of == number)
        if not len(rows):
            rates.append(None)
            continue
        fastest = rows[np.argsort(table.quick[rows], kind="stable")[: math.ceil(len(rows) / 3)]]
        usual = _median_high(table.seconds[fastest])
        rates.append(probes.size / usual / 1e9)
        if kind.equal:
            quick[rows] = _median_high(table.quick[fastest])
            limit[rows] = max(quick[rows[0]] / slow_ratio, usual)
            slow[rows] = usual / slow_ratio
        else:
            least = float(np.sort(table.quick[rows])[len(rows) // 10]) / SPREAD
            quick[rows] = np.minimum(least, return_times(probes)[rows])
            limit[rows] = quick[rows] / slow_ratio
            slow[rows] = table.quick[rows] / slow_ratio
    return ExpectedTimes(quick, limit, slow, paths.kinds, paths.of, tuple(rates))


def _median_high(values: Floats) -> float:
    return float(np.sort(values)[len(values) // 2])
