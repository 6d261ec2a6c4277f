"""Times: what an iteration lasts, when a series is steady, and how well its mean is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from collectives.timing.clock import iteration_times
from collectives.timing.statistics import half_width, percentile, steady, student

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


@pytest.mark.parametrize(
    ("confidence", "freedom", "quantile"),
    [
        (0.9, 9, 1.8331),
        (0.95, 4, 2.7764),
        (0.95, 9, 2.2622),
        (0.95, 30, 2.0423),
        (0.99, 9, 3.2498),
        (0.999, 9, 4.7809),
    ],
)
def test_quantiles_of_students_t(confidence: float, freedom: int, quantile: float) -> None:
    assert student(confidence, freedom) == pytest.approx(quantile, rel=0.01)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_the_interval_covers_the_mean_as_often_as_it_says(correlation: float) -> None:
    rng = np.random.default_rng(7)
    trials, length, covered = 300, 300, 0
    for _ in range(trials):
        noise, times = rng.standard_normal(length), np.zeros(length)
        times[0] = noise[0] / math.sqrt(1 - correlation**2)
        for i in range(1, length):
            times[i] = correlation * times[i - 1] + noise[i]
        covered += abs(times.mean()) <= half_width(times, 0.95)
    assert 0.92 <= covered / trials <= 0.98


def test_a_mean_of_few_values_is_not_known() -> None:
    assert half_width(np.arange(9.0), 0.95) == math.inf
    assert half_width(np.full(25, 3.0), 0.95) == 0.0


@pytest.mark.parametrize(
    ("length", "percent", "index"),
    # As percentileIndex in src/util.cu of nccl-tests: min(n - 1, (n * p + 99) / 100 - 1), in whole numbers.
    [
        (1, 99, 0),
        (20, 95, 18),
        (20, 99, 19),
        (100, 95, 94),
        (101, 95, 95),
        (1000, 99, 989),
        (7, 50, 3),
        (5, 0, 0),
    ],
)
def test_percentiles_are_nccl_tests(length: int, percent: int, index: int) -> None:
    assert percentile(np.arange(float(length)), percent) == index


def test_a_series_is_steady_when_two_windows_agree() -> None:
    warming = np.array([90.0, 30, 20, 12, 10.6, 10.4, 10.2, 10.3, 10.1])
    assert not steady(warming[:5], 3)
    assert not steady(warming[:6], 3)
    assert steady(warming, 3)
    assert steady(np.array([10, 10, 10, 10.5, 10.5, 500]), 3)  # the median forgives one
    assert not steady(np.array([10, 10, 10, 10.6, 10.6, 10.6]), 3)


def test_an_iteration_lasts_from_the_last_rank_in_to_the_last_rank_out() -> None:
    stamps = np.array([[[0, 5000], [5000, 9000]], [[1000, 4000], [7000, 9500]]])
    assert iteration_times(stamps, comparable=True).tolist() == [4.0, 2.5]
    assert iteration_times(stamps, comparable=False).tolist() == [5.0, 4.0]
    assert iteration_times(np.array([[[0, 10]], [[50, 40]]]), comparable=True).tolist() == [0.001]
