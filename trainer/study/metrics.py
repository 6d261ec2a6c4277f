"""How far predictions are from measurements: errors, order, choice, classification. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean, median


@dataclass(frozen=True)
class Errors:
    """Relative errors |predicted / measured - 1| of some rows."""

    rows: int
    mean: float
    """MAPE, as a fraction."""
    median: float
    most: float
    bias: float
    """Geometric mean of predicted over measured."""


def errors(predicted: Sequence[float], measured: Sequence[float]) -> Errors | None:
    """Errors of rows; None where there are none."""
    ratios = [p / m for p, m in zip(predicted, measured, strict=True)]
    if not ratios:
        return None
    off = [abs(ratio - 1) for ratio in ratios]
    return Errors(len(off), fmean(off), median(off), max(off), geometric_mean(ratios))


def kendall(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Kendall's tau-b of two orders; None where one of them has no order."""
    from scipy.stats import kendalltau  # which takes half a second, and only choices need

    tau = float(kendalltau(predicted, measured).statistic)
    return None if math.isnan(tau) else tau


def regret(scores: Sequence[float], speeds: Sequence[float]) -> float:
    """What is lost by taking the row with the highest score: 1 - its measured speed over the best's."""
    return 1 - speeds[max(range(len(scores)), key=lambda i: scores[i])] / max(speeds)


def right_pairs(predicted: Sequence[float], measured: Sequence[float]) -> tuple[int, int]:
    """Pairs that are in the right order, and pairs that have one."""
    right = pairs = 0
    for i in range(len(predicted)):
        for j in range(i):
            if measured[i] != measured[j]:
                pairs += 1
                right += (predicted[i] - predicted[j]) * (measured[i] - measured[j]) > 0
    return right, pairs


@dataclass(frozen=True)
class Classified:
    """Of rows that do or don't fit: how many were predicted right. Positive: out of memory."""

    rows: int
    true_positive: int
    false_positive: int
    false_negative: int

    @property
    def accuracy(self) -> float:
        """Share predicted right."""
        return 1 - (self.false_positive + self.false_negative) / self.rows

    @property
    def precision(self) -> float:
        """Share of those called out of memory that were."""
        called = self.true_positive + self.false_positive
        return self.true_positive / called if called else math.nan

    @property
    def recall(self) -> float:
        """Share of those out of memory that were called so."""
        were = self.true_positive + self.false_negative
        return self.true_positive / were if were else math.nan


def classified(fits: Sequence[bool], did: Sequence[bool]) -> Classified | None:
    """Predicted and actual fits; None where there are no rows."""
    pairs = list(zip(fits, did, strict=True))
    if not pairs:
        return None
    return Classified(
        len(pairs),
        sum(not said and not was for said, was in pairs),
        sum(not said and was for said, was in pairs),
        sum(said and not was for said, was in pairs),
    )


def inside(low: Sequence[float], high: Sequence[float], measured: Sequence[float]) -> float:
    """Share of rows whose measurement is within their interval."""
    hits = [a <= m <= b for a, b, m in zip(low, high, measured, strict=True)]
    return sum(hits) / len(hits)
