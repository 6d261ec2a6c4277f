"""Latency and bandwidth over size: piecewise straight lines, as many as unseen sizes ask for. Pure.

A region of sizes with one algorithm takes alpha + size / bandwidth; a library changes algorithms as size grows. Lines
and their borders minimise the relative error, by dynamic programming. How many there are is settled by sizes that are
held out. The error reported is nested: a size is predicted by lines whose number was chosen without it, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collectives.timing.statistics import student
from configs.errors import UserError
from configs.profile import Segment, piecewise_us

Array = NDArray[np.float64]

FEWEST = 4
"""Different sizes that a fit takes at least."""
_SHORTEST = 2
"""Sizes of a segment at least: a line has two parameters."""
_MOST = 10
"""Segments at most."""
_ALONE = 32
"""Sizes up to which each is held out alone; of more, interleaved folds, to stay within seconds."""
_SIGMAS = 5.0
"""Robust standard deviations beyond which an error counts no further: an outlier bends no line and founds no segment."""
_FINEST = 0.01
"""Relative noise that no measurement is taken to be below."""
_RESAMPLES = 400
_NEAR = 8
"""Nearest sizes whose residuals a size is resampled with."""


@dataclass(frozen=True)
class CurveFit:
    """A fitted curve, and how far it is to be trusted."""

    segments: tuple[Segment, ...]
    sizes: Array
    """Bytes, ascending."""
    errors: Array
    """Predicted over measured time, less 1, of each size when held out."""
    line_errors: Array
    """The same of one straight line, fitted in the same way."""
    interval: tuple[float, float]
    """A fresh measurement over the fitted time lies between these ratios, at the confidence."""
    drift: float
    """Relative standard deviation from pass to pass, over all sizes; 0 of a single pass, which can't show it."""
    outliers: tuple[int, ...]
    """Sizes off both neighbours in the same direction and off their prediction, beyond noise: excluded from the fit."""

    @property
    def held_out_error(self) -> float:
        """Mean relative error of sizes that the fit had not seen, outliers among them."""
        return float(np.abs(self.errors).mean())

    @property
    def line_error(self) -> float:
        """The same of one straight line."""
        return float(np.abs(self.line_errors).mean())

    def time_us(self, size: float) -> float:
        """Microseconds of `size` bytes."""
        return piecewise_us(self.segments, size)


def fit_curve(
    sizes: ArrayLike, times: ArrayLike, passes: ArrayLike | None = None, confidence: float = 0.95
) -> CurveFit:
    """Fit time over size.

    Args:
        sizes: bytes of each measurement, above 0, in any order.
        times: microseconds of each, above 0.
        passes: number of the pass that each belongs to; one pass where left out.
        confidence: level of all intervals.

    Raises:
        UserError: for fewer than 4 different sizes.
    """
    x, table = _table(np.asarray(sizes, float), np.asarray(times, float), passes)
    if len(x) < FEWEST:
        raise UserError(
            f"sizes: {len(x)} are too few for a fit; measure at least {FEWEST}, e.g. -b 8 -e 16M -f 2"
        )
    level = _levels(table)
    y = np.exp(np.nanmedian(table - level[:, None], axis=0))
    cap = _cap(y)
    folds = np.arange(len(x)) % (len(x) if len(x) <= _ALONE else max(8, _ALONE**2 // len(x)))
    errors = _held_out(x, y, folds)
    own = errors[folds, :, np.arange(len(x))].T
    chosen = [_choose(errors[fold][:, folds != fold], cap) for fold in range(folds.max() + 1)]
    nested = own[[chosen[fold] for fold in folds], np.arange(len(x))]
    lines = _fits(x, y, _choose(own, cap) + 1)[-1]
    spikes = _spikes(y, cap)
    if len(table) == 1:
        drift, rest = 0.0, _alone(x, y, lines, spikes)
    else:
        rest = np.concatenate([_unseen(x, table - level[:, None], i, len(lines)) for i in range(len(table))])
        drift = float(level.std(ddof=1))
    return CurveFit(
        segments=tuple(_segments(lines, x[~spikes], y[~spikes], drift, len(table), confidence)),
        sizes=x,
        errors=np.expm1(nested),
        line_errors=np.expm1(own[0]),
        interval=_ratios(rest if len(rest) >= FEWEST else -nested, drift, len(table), confidence),
        drift=drift,
        outliers=tuple(int(size) for size in x[spikes & (np.abs(nested) > cap)]),
    )


def _table(sizes: Array, times: Array, passes: ArrayLike | None) -> tuple[Array, Array]:
    """Sizes, ascending, and log times [pass, size]: the median of equals, NaN where there is none."""
    x, column = np.unique(sizes, return_inverse=True)
    numbers, line = np.unique(np.zeros(len(sizes)) if passes is None else passes, return_inverse=True)
    table = np.full((len(numbers), len(x)), np.nan)
    for i, j in sorted(set(zip(line.tolist(), column.tolist(), strict=True))):
        table[i, j] = math.log(np.median(times[(line == i) & (column == j)]))
    return x, table


def _levels(table: Array) -> Array:
    """How far each pass lies above the mean of all, in log time: the median over sizes, about 0."""
    level = np.nanmedian(table - np.nanmean(table, axis=0), axis=1)
    return level - level.mean()


@dataclass(frozen=True)
class _Line:
    """A line over the sizes from number `first` up to, not including, `end`."""

    first: int
    end: int
    low: float
    high: float
    alpha: float
    beta: float

    def time_us(self, size: float) -> float:
        return self.alpha + self.beta * size


def _candidates(x: Array, y: Array) -> tuple[Array, Array]:
    """Alpha and beta [..., line] of lines through two of the points [..., point], flat ones, and ones through the origin.

    A line of least absolute error passes through two points, or through one where a bound holds it: alpha and beta
    aren't negative. Lines that would be are given infinite alpha.
    """
    count = len(x)
    first, second = np.triu_indices(count, 1)
    if count > _ALONE:  # of many sizes, pairs at distances that grow: enough, where all would take count ** 4
        near = np.isin(second - first, np.unique(np.geomspace(1, count, _ALONE // 4).round()))
        first, second = first[near], second[near]
    slope = (y[..., second] - y[..., first]) / (x[second] - x[first])
    alpha = np.concatenate([y[..., first] - slope * x[first], y, np.zeros_like(y)], axis=-1)
    beta = np.concatenate([slope, np.zeros_like(y), y / x], axis=-1)
    return np.where((alpha >= 0) & (beta >= 0), alpha, np.inf), beta


def _losses(x: Array, y: Array, alpha: Array, beta: Array, cap: float) -> Array:
    """Relative errors [..., line, point] as log ratios, up to `cap`."""
    fitted = alpha[..., None] + beta[..., None] * x
    return np.minimum(np.abs(np.log(fitted / y[..., None, :])), cap)


def _lines(x: Array, y: Array, most: int, cap: float) -> list[tuple[_Line, ...]]:
    """The best fit of one segment, of two, and so on to `most` (Bellman and Roth 1969)."""
    count = len(x)
    alpha, beta = _candidates(x, y)
    keep = np.isfinite(alpha)
    alpha, beta = alpha[keep], beta[keep]
    sums = np.zeros((count + 1, len(alpha)))  # of the losses of the sizes before
    np.cumsum(_losses(x, y, alpha, beta, cap).T, axis=0, out=sums[1:])
    cost = np.full((count + 1, count + 1), np.inf)
    line = np.zeros((count + 1, count + 1), int)
    for first in range(count - _SHORTEST + 1):
        of_lines = sums[first + _SHORTEST :] - sums[first]
        chosen = of_lines.argmin(axis=1)
        line[first, first + _SHORTEST :] = chosen
        cost[first, first + _SHORTEST :] = of_lines[np.arange(len(chosen)), chosen]
    best, borders, fits = cost[0], [np.zeros(count + 1, int)], []
    for segments in range(1, min(most, count // _SHORTEST) + 1):
        if segments > 1:
            totals = best[:, None] + cost
            borders.append(totals.argmin(axis=0))
            best = totals.min(axis=0)
        end, lines = count, []
        for border in reversed(borders):
            first = int(border[end])
            i = line[first, end]
            lines.append(
                _Line(first, end, float(x[first]), float(x[end - 1]), float(alpha[i]), float(beta[i]))
            )
            end = first
        fits.append(tuple(reversed(lines)))
    return fits


def _fits(x: Array, y: Array, most: int) -> list[tuple[_Line, ...]]:
    """Fits of one segment, of two, and so on to points among which there may be spikes, which count for nothing."""
    cap = _cap(y)
    calm = ~_spikes(y, cap)
    return _lines(x[calm], y[calm], most, cap)


def _cap(y: Array) -> float:
    """Relative error beyond which a point is an outlier, by how far points lie off the middle of their neighbours."""
    log = np.log(y)
    off = np.abs(log[1:-1] - (log[:-2] + log[2:]) / 2) if len(y) > 2 else np.zeros(1)
    # Half-width of a normal distribution's middle half, and the variance that two halves of neighbours add.
    return _SIGMAS * max(_FINEST, float(np.median(off)) * 1.4826 / math.sqrt(1.5))


def _held_out(x: Array, y: Array, folds: NDArray[np.int64]) -> Array:
    """Log errors [fold, segments, size]: of sizes that were predicted without their own fold, and without that one."""
    last = int(folds.max())
    most = min(_MOST, (len(x) - 2 * int(np.bincount(folds).max())) // _SHORTEST)
    errors = np.empty((last + 1, most, len(x)))
    for one in range(last + 1):
        for other in range(one, last + 1):
            seen = (folds != one) & (folds != other)
            fits = _fits(x[seen], y[seen], most)
            fits += fits[-1:] * (most - len(fits))  # without spikes, there may be too few sizes for more
            for i in np.flatnonzero(~seen):
                without = other if folds[i] == one else one
                errors[without, :, i] = [math.log(piecewise_us(lines, float(x[i])) / y[i]) for lines in fits]
    return errors


def _choose(errors: Array, cap: float) -> int:
    """Index of the fewest segments [segments, size] whose error isn't, beyond one standard error, above the least.

    The standard error is that of the difference, size by size (after Breiman et al. 1984, section 3.4.3).
    """
    errors = np.minimum(np.abs(errors), cap)
    worse = errors - errors[errors.mean(axis=1).argmin()]
    return int(np.argmax(worse.mean(axis=1) <= worse.std(axis=1) / math.sqrt(errors.shape[1])))


def _spikes(y: Array, cap: float) -> NDArray[np.bool_]:
    """Points off both neighbours, and off what two neighbours lead to from either side, in one direction beyond the cap.

    The last point before time falls, as it may where the algorithm changes, is a peak, but follows from those before.
    """
    log = np.log(y)
    off = np.full((4, len(y)), np.nan)
    off[0, 1:-1], off[1, 1:-1] = log[1:-1] - log[:-2], log[1:-1] - log[2:]
    off[2, 2:-1] = log[2:-1] - 2 * log[1:-2] + log[:-3]
    off[3, 1:-2] = log[1:-2] - 2 * log[2:-1] + log[3:]
    inner = off[:, 1:-1]
    return np.pad((np.nanmin(inner, axis=0) > cap) | (np.nanmax(inner, axis=0) < -cap), 1)


def _alone(x: Array, y: Array, lines: tuple[_Line, ...], spikes: NDArray[np.bool_]) -> Array:
    """Log residuals of a single pass: of each size from its line without it, where the line has a size to spare."""
    cap, calm = _cap(y), np.flatnonzero(~spikes)
    residuals = [math.log(y[i] / piecewise_us(lines, float(x[i]))) for i in np.flatnonzero(spikes)]
    for line in lines:
        part = calm[line.first : line.end]
        for i in part if len(part) > _SHORTEST else ():
            others = part[part != i]
            residuals.append(math.log(y[i] / _lines(x[others], y[others], 1, cap)[0][0].time_us(x[i])))
    return np.array(residuals)


def _unseen(x: Array, log: Array, i: int, count: int) -> Array:
    """Log residuals of a pass from the fit of the others."""
    others = np.delete(log, i, axis=0)
    known = ~np.isnan(others).all(axis=0)
    fit = _fits(x[known], np.exp(np.nanmedian(others[:, known], axis=0)), count)[-1]
    there = ~np.isnan(log[i])
    return log[i, there] - np.log([piecewise_us(fit, float(size)) for size in x[there]])


def _ratios(residuals: Array, drift: float, passes: int, confidence: float) -> tuple[float, float]:
    """Ratios between which a fresh measurement lies: residuals and drift, widened for having seen few passes.

    Drift is known from as many values as there are passes; the degrees of freedom of the sum are Satterthwaite's.
    """
    level = 0.5 + confidence / 2
    normal = NormalDist().inv_cdf(level)
    shared = drift**2 * (1 + 1 / passes)
    ends = []
    for side in (-1, 1):
        total = (_quantile(side * residuals, level) / normal) ** 2 + shared
        # What residuals leave open is in the rank of their quantile already: only drift takes freedom away.
        reach = student(confidence, (passes - 1) * (total / shared) ** 2) if shared else normal
        ends.append(math.exp(side * reach * math.sqrt(total)))
    return ends[0], ends[1]


def _quantile(values: Array, level: float) -> float:
    """The value that a fresh one stays below at `level`: of rank (n + 1) level (Vovk et al. 2005), 0 at least.

    Where that is beyond the largest, the largest, widened as a normal tail would.
    """
    ordered, most = np.sort(values), len(values) / (len(values) + 1)
    rank = min(level, most) * (len(values) + 1)
    value = max(0.0, float(np.interp(rank, np.arange(1, len(values) + 1), ordered)))
    normal = NormalDist()
    return value * max(1.0, normal.inv_cdf(level) / normal.inv_cdf(most))


def _segments(
    lines: tuple[_Line, ...], x: Array, y: Array, drift: float, passes: int, confidence: float
) -> Iterator[Segment]:
    """Lines with intervals: residuals are drawn anew, and each line is fitted to what they make (Efron 1979)."""
    rng, cap = np.random.default_rng(0), _cap(y)
    fitted = np.array([line.time_us(size) for line in lines for size in x[line.first : line.end]])
    residuals = np.log(y / fitted)
    # A line goes through two of its points: their zeros are the fit's, not the noise's.
    noisy = np.flatnonzero(np.abs(residuals) > 1e-9)
    level = np.ones((_RESAMPLES, 1))
    if passes > 1:
        level = np.exp(drift / math.sqrt(passes) * rng.standard_t(passes - 1, level.shape))
    for line in lines:
        part = slice(line.first, line.end)
        count = line.end - line.first
        widened = math.sqrt(count / max(1, count - 2))  # two parameters took their share of the noise
        drawn = fitted[part] * level
        for i in range(line.first, line.end) if len(noisy) else ():
            near = noisy[np.argsort(np.abs(noisy - i), kind="stable")[:_NEAR]]  # noise changes with size
            drawn[:, i - line.first] *= np.exp(widened * rng.choice(residuals[near], _RESAMPLES))
        refits = np.concatenate(
            [_refits(x[part], some, cap) for some in np.array_split(drawn, 1 + count**2 // 64)]
        )
        tails = [50 - 50 * confidence, 50 + 50 * confidence]
        latency, slope = (np.percentile(values, tails, method="nearest") for values in refits.T)
        steepest, flattest = max(float(slope[1]), line.beta), min(float(slope[0]), line.beta)
        yield Segment(
            low=int(line.low),
            high=int(line.high),
            latency_us=line.alpha,
            gbps=_gbps(line.beta),
            latency_range_us=(min(float(latency[0]), line.alpha), max(float(latency[1]), line.alpha)),
            gbps_range=(1e-3 / steepest, _gbps(flattest)) if steepest else None,
        )


def _refits(x: Array, drawn: Array, cap: float) -> Array:
    """Alpha and beta [resample, 2] of the best lines through resampled points [resample, point]."""
    alpha, beta = _candidates(x, drawn)
    chosen = _losses(x, drawn, alpha, beta, cap).sum(axis=-1).argmin(axis=-1)[:, None]
    return np.concatenate([np.take_along_axis(values, chosen, axis=-1) for values in (alpha, beta)], axis=1)


def _gbps(beta: float) -> float | None:
    """GB/s of microseconds a byte."""
    return 1e-3 / beta if beta else None
