"""What a series of times tells: whether it is steady, how well its mean is known, and its percentiles."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_STEADY = 0.05
"""Relative change of the median from one window to the next, below which a series is steady."""
_BATCHES = 10


def steady(times: Array, window: int) -> bool:
    """Whether the last two windows of a series have the same median within 5 %."""
    if len(times) < 2 * window:
        return False
    before, after = np.median(times[-2 * window : -window]), np.median(times[-window:])
    return bool(abs(after - before) <= _STEADY * before)


def half_width(times: Array, confidence: float) -> float:
    """Half-width of the confidence interval of the mean, by batch means.

    Neighbouring iterations are correlated, which the plain formula takes for certainty; means of ten batches are
    nearly independent (Law, Simulation Modeling and Analysis, section 9.5.3). Infinite below ten values.
    """
    if len(times) < _BATCHES:
        return math.inf
    size = len(times) // _BATCHES
    means = times[len(times) - size * _BATCHES :].reshape(_BATCHES, size).mean(axis=1)
    return student(confidence, _BATCHES - 1) * float(means.std(ddof=1)) / math.sqrt(_BATCHES)


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
