"""Times: how long an iteration lasts, when a series is steady, and its percentiles."""

from __future__ import annotations

import numpy as np
import pytest

from collectives.timing.clock import iteration_times
from collectives.timing.statistics import percentile, steady, student

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
