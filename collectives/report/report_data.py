"""The data of a report, and its plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from collectives.store.results import Results


@dataclass(frozen=True)
class FittedCurve:
    """A fitted curve of one operation in one kind of group, with its interval."""

    op: str
    group: str
    dtype: str
    redop: str
    sizes: Sequence[float]
    """Bytes, ascending; between them the curve is read off in log-log space, and nowhere beyond."""
    time_us: Sequence[float]
    low_us: Sequence[float]
    high_us: Sequence[float]
    label: str
    """What was fitted, as `3 segments`."""
    segments: str
    """Latency and bandwidth of each part, as text."""


@dataclass(frozen=True)
class ReportData:
    """What plots are made of: a measurement, and what is known beside it."""

    results: Results
    fits: Sequence[FittedCurve] = ()
    baseline: Results | None = None
    pairs: Sequence[tuple[int, int, float]] = ()
    """Source rank, destination rank, GB/s."""
    curves: Sequence[tuple[float, float, float]] = ()
    """Imbalance (most loaded rank over the mean), time over that of the even load, and what it ideally is."""


@dataclass(frozen=True)
class Plot:
    """A figure, and what to look for in it."""

    name: str
    """File name without its ending; it starts with the kind of plot."""
    title: str
    caption: str
    """One line: what to look for."""
    figure: Figure
    details: tuple[str, ...] = ()
    """Lines to be read with it."""


@dataclass(frozen=True)
class MissingPlot:
    """A plot that isn't drawn."""

    title: str
    why: str
