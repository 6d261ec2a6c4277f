"""What a series of times tells: whether it is steady, how well its mean is known, and its percentiles."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_STEADY = 0.05
"""Relative change of the median from one window to the next, below which a series is steady."""
_BATCHES = 5
_MANY = 1000
"""Values from which on twice as many batches are still long ones."""
_CHEAP_SECONDS = 1.0
"""Time that a size may take where fewer calls would do for its precision."""


def steady(times: Array, window: int) -> bool:
    """Whether the last two windows of a series have the same median within 5 %."""
    if len(times) < 2 * window:
        return False
    before, after = np.median(times[-2 * window : -window]), np.median(times[-window:])
    return bool(abs(after - before) <= _STEADY * before)


def half_width(times: Array, confidence: float) -> float:
    """Half-width of the confidence interval of the mean, by batch means; infinite below five values.

    Neighbouring times are correlated, and the plain formula takes them for independent; means of a few long batches
    nearly are (Law, Simulation Modeling and Analysis, section 9.5.3). Few batches where there are few values: long ones
    matter more than many. Valid where the number of values was chosen beforehand (`enough`), and not by looking at this
    width until it was small.
    """
    count = len(times)
    if count < _BATCHES:
        return math.inf
    batches = count if count < 2 * _BATCHES else _BATCHES if count < _MANY else 2 * _BATCHES
    size = count // batches
    means = times[count - size * batches :].reshape(batches, size).mean(axis=1)
    return student(confidence, batches - 1) * float(means.std(ddof=1)) / math.sqrt(batches)


def enough(pilot: Array, least: int, most: int, seconds: float, precision: float, confidence: float) -> int:
    """How many calls to time, decided before any of them is timed.

    As many as fit into a second, since events that hit one call in a hundred only show in hundreds of calls; more where
    `pilot`, the last times of the warm-up in microseconds, scatter so much that `precision` needs them; never more
    than `most` or than fit into `seconds`, and never fewer than `least`.
    """
    if not len(pilot):
        return least
    typical = max(float(np.median(pilot)), 1e-3)
    scatter = float(pilot.std()) / max(float(pilot.mean()), 1e-3)
    quantile = NormalDist().inv_cdf(0.5 + confidence / 2)
    wanted = max((quantile * scatter / precision) ** 2, _CHEAP_SECONDS * 1e6 / typical)
    return max(least, int(min(wanted, seconds * 1e6 / typical, most)))


def student(confidence: float, freedom: float) -> float:
    """Two-sided quantile of Student's t, by Fisher's expansion about the normal; within 1 % from 4 degrees on."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def percentile(ordered: Array, percent: int) -> float:
    """As nccl-tests takes it: the value that `percent` of 100 don't exceed, from sorted values."""
    index = min(len(ordered) - 1, (len(ordered) * percent + 99) // 100 - 1)
    return float(ordered[max(0, index)])
