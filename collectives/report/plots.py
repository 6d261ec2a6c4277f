"""Figures of a measurement: each a plot with what to look for, or the reason why it isn't drawn.

Colours are Okabe and Ito's, which colour-blind readers tell apart; in every heat map dark is slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from collectives.report.canvas import finish, grid, heat_map, log_sizes, log_values, plain, size_label
from collectives.store.results import Results
from collectives.store.series import Baseline, Series, group_label, groups, rank_labels, rank_ratios, series
from configs.fabric import Op

SLOWEST = 3.0
"""End of the colours of ranks, as time over the fastest: beyond, figures tell, not colours."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX<>*h"
_DASHES = ("-", "--", ":", "-.")
_OPS: tuple[str, ...] = get_args(Op)
_PLACEMENTS = {"out_of_place": "out of place", "in_place": "in place"}
_SIZE = "message size"


@dataclass(frozen=True)
class Curve:
    """A fitted curve of one operation in one kind of group, with its interval."""

    op: str
    group: str
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
class Material:
    """What plots are made of: a measurement, and what is known beside it."""

    results: Results
    fits: Sequence[Curve] = ()
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
class Missing:
    """A plot that isn't drawn."""

    title: str
    why: str


def draw(material: Material) -> Iterator[Plot | Missing]:
    """All plots, one after the other, so that one figure is held at a time."""
    for kind in (_bandwidth, _latency, _pairs, _residuals, _ranks, _against_baseline, _imbalance):
        yield from kind(material)


def _bandwidth(material: Material) -> Iterator[Plot | Missing]:
    """Bus bandwidth over size by operation: a figure for each kind of group, a panel for each placement."""
    drawn = False
    for group in groups(material.results):
        lines, left = series(material.results.rows, group)
        found = {p: [one for one in lines if one.by_size(p, "bus_bw")] for p in _PLACEMENTS}
        found = {placement: members for placement, members in found.items() if members}
        if not found:
            continue
        drawn = True
        figure, panels = grid(len(found), columns=1, height=2.3)
        for axes, (placement, members) in zip(panels, found.items(), strict=True):
            axes.set_title(_PLACEMENTS[placement])
            for one in members:
                points = one.by_size(placement, "bus_bw")
                axes.plot(list(points), list(points.values()), label=plain(one.label), **_look(one))
        log_sizes(panels)
        log_values(panels)
        title = f"Bus bandwidth, {group_label(material.results, group)}"
        finish(figure, panels, title, "bus bandwidth (GB/s)", _SIZE)
        caption = (
            "Lines should rise and level out near the link's rate; a dip or a step is a change of algorithm "
            "or a disturbance."
        )
        yield Plot(f"bandwidth.{group}", title, caption, figure, _left_out(left))
    if not drawn:
        yield Missing("Bus bandwidth over size", "no row has a size and a bus bandwidth above zero")


def _latency(material: Material) -> Iterator[Plot | Missing]:
    """Time over size, a panel for each operation: the median, and the band from p95 to p99."""
    drawn = False
    for group in groups(material.results):
        lines, left = series(material.results.rows, group, variants=1)
        if not lines:
            continue
        drawn = True
        figure, panels = grid(len(lines), columns=min(2, len(lines)), height=1.9)
        for axes, one in zip(panels, lines, strict=True):
            axes.set_title(plain(one.label))
            for (field, name), colour, marker in zip(_PLACEMENTS.items(), _COLOURS, _MARKERS, strict=False):
                p50, p95, p99 = (one.by_size(field, f"p{p}_us") for p in (50, 95, 99))
                if p50:
                    axes.plot(
                        list(p50), list(p50.values()), color=colour, marker=marker, label=f"{name}: p50"
                    )
                    shade: dict[str, Any] = {
                        "color": colour,
                        "alpha": 0.3,
                        "lw": 0,
                        "label": f"{name}: p95 to p99",
                    }
                    axes.fill_between(list(p95), list(p95.values()), list(p99.values()), **shade)
        log_sizes(panels)
        log_values(panels)
        title = f"Time, {group_label(material.results, group)}"
        finish(figure, panels, title, "time of the slowest rank (µs)", _SIZE)
        caption = (
            "Flat on the left is latency, the slope on the right is bandwidth; where the band is far above its line, "
            "single iterations are slow."
        )
        yield Plot(f"latency.{group}", title, caption, figure, _left_out(left))
    if not drawn:
        yield Missing("Time over size", "no row has a size and a time")


def _pairs(material: Material) -> Iterator[Plot | Missing]:
    """Rate of every pair, source by destination."""
    title = "Bandwidth of every pair"
    ranks = sorted({rank for source, to, _ in material.pairs for rank in (source, to)})
    if not ranks:
        yield Missing(title, "no rates of pairs were given")
        return
    place = {rank: i for i, rank in enumerate(ranks)}
    rates = np.full((len(ranks), len(ranks)), np.nan)
    for source, to, rate in material.pairs:
        rates[place[source], place[to]] = rate
    names = rank_labels(ranks, material.results.metadata)
    # From zero: else noise among equals would look like a fault.
    scale = (0.0, float(np.nanmax(rates)))
    figure = heat_map(
        rates, (names, names), ("source (rank, host)", "destination (rank, host)"), scale, "GB/s"
    )
    figure.suptitle(title)
    caption = (
        "A dark row is a slow sender, a dark column a slow receiver, a dark cell a slow link; a cell unlike its "
        "mirror image is an asymmetric pair. Grey wasn't measured."
    )
    yield Plot("pairs", title, caption, figure)


def _residuals(material: Material) -> Iterator[Plot | Missing]:
    """Mean time over the fitted one, minus 1, in per cent, with the fit's interval."""
    if not material.fits:
        yield Missing("Fit residuals", "no fit was given")
    for group in dict.fromkeys(fit.group for fit in material.fits):
        title = f"Fit residuals, group {group}"
        found = []
        for fit in (f for f in material.fits if f.group == group):
            rows = material.results.cases().get((fit.op, group), [])
            points = [(row.size, row.best.time_us) for row in rows if row.best]
            within = [(size, time) for size, time in points if fit.sizes[0] <= size <= fit.sizes[-1]]
            if within:
                found.append((fit, np.array(within, float)))
        if not found:
            yield Missing(title, "no measured size lies within those of a fit")
            continue
        figure, panels = grid(len(found), columns=1, height=1.8)
        details = tuple(_residual_panel(*one) for one in zip(panels, *zip(*found, strict=True), strict=True))
        log_sizes(panels)
        finish(figure, panels, title, "measured / fitted − 1 (%)", _SIZE)
        caption = "Points should lie around zero, within the band; where they bend away together, the fit lacks a segment."
        yield Plot(f"residuals.{group}", title, caption, figure, details)


def _residual_panel(axes: Axes, fit: Curve, points: np.ndarray) -> str:
    """Draw the residuals of one fit; the fit in words, and how large they are."""
    sizes, times = points.T
    at = np.asarray(fit.sizes, float)
    fitted, low, high = (np.asarray(values, float) for values in (fit.time_us, fit.low_us, fit.high_us))
    middle, least, most = (
        np.exp(np.interp(np.log(sizes), np.log(at), np.log(v))) for v in (fitted, low, high)
    )
    residual = 100 * (times / middle - 1)
    look = _look(Series(fit.op, 0, "", ()))
    axes.set_title(plain(f"{fit.op}, {fit.label}"))
    axes.axhline(0, color="black", lw=0.8)
    band: dict[str, Any] = {"color": "#888888", "alpha": 0.3, "lw": 0, "label": "interval of the fit"}
    axes.fill_between(at, 100 * (low / fitted - 1), 100 * (high / fitted - 1), **band)
    axes.plot(sizes, residual, **look | {"ls": "", "label": plain(fit.op)})
    inside = int(np.sum((least <= times) & (times <= most)))
    return (
        f"{fit.op}, {fit.label}: {fit.segments}. Median size of its residuals "
        f"{np.median(np.abs(residual)):.2g} %; {inside} of {len(times)} points within the interval."
    )


def _ranks(material: Material) -> Iterator[Plot | Missing]:
    """Each rank's mean time over the fastest rank's, rank by operation, at the largest size."""
    drawn = False
    for group in groups(material.results):
        cases = {op: rows for (op, kind), rows in material.results.cases().items() if kind == group}
        columns = {op: found for op, rows in cases.items() if (found := rank_ratios(rows))}
        most = max((len(ratios) for _, ratios in columns.values()), default=0)
        if most < 2:
            continue
        drawn = True
        table = np.full((most, len(columns)), np.nan)
        for i, (_, ratios) in enumerate(columns.values()):
            table[: len(ratios), i] = ratios
        names = rank_labels(range(most), material.results.metadata)
        heads = [f"{op}, {size_label(size)}" for op, (size, _) in columns.items()]
        scale = (1.0, min(max(float(np.nanmax(table)), 1.2), SLOWEST))
        unit = "time over the fastest rank's"
        figure = heat_map(table, (names, heads), ("rank, host", "operation, size"), scale, unit, reverse=True)
        title = f"Time of each rank, {group_label(material.results, group)}"
        figure.suptitle(plain(title))
        caption = (
            "A rank that is dark in all columns is slow itself; around a root (broadcast, reduce, gather, scatter) "
            "ranks differ by nature, as some may leave early."
        )
        yield Plot(f"ranks.{group}", title, caption, figure)
    if not drawn:
        yield Missing("Time of each rank", "no row has times of more than one rank")


def _against_baseline(material: Material) -> Iterator[Plot | Missing]:
    """Bus bandwidth over the baseline's by size, with the interval that both have."""
    title = "Against the baseline"
    if material.baseline is None:
        yield Missing(title, "no baseline was given")
        return
    baseline = Baseline(material.baseline)
    drawn = False
    for group in groups(material.results):
        lines, left = series(material.results.rows, group)
        found = {p: [(one, r) for one in lines if (r := baseline.ratios(one, p))] for p in _PLACEMENTS}
        found = {placement: members for placement, members in found.items() if members}
        if not found:
            continue
        drawn = True
        figure, panels = grid(len(found), columns=1, height=2.3)
        for axes, (placement, members) in zip(panels, found.items(), strict=True):
            axes.set_title(_PLACEMENTS[placement])
            axes.axhline(1, color="black", lw=0.8)
            for one, ratios in members:
                values, errors = zip(*ratios.values(), strict=True)
                look = _look(one) | {"elinewidth": 0.8, "capsize": 1.5, "label": plain(one.label)}
                axes.errorbar(list(ratios), values, yerr=errors, **look)
        # A fifth to either side at least, so that a per cent doesn't look like a fall.
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(min(low, 0.8), max(high, 1.2))
        log_sizes(panels)
        named = f"{title}, {group_label(material.results, group)}"
        finish(figure, panels, named, "bus bandwidth, now / baseline", _SIZE)
        caption = (
            "At 1 nothing has changed, below 1 it is slower now; a bar that reaches 1 is within the noise. The baseline "
            f"was begun {material.baseline.metadata.started}."
        )
        yield Plot(f"baseline.{group}", named, caption, figure, _left_out(left))
    if not drawn:
        why = "it shares no operation, group, number of ranks, type and size with this measurement"
        yield Missing(title, why)


def _imbalance(material: Material) -> Iterator[Plot | Missing]:
    """Time over imbalance, both against the even load, beside the ideal."""
    title = "Cost of imbalance"
    if not material.curves:
        yield Missing(title, "no curve of imbalance was given")
        return
    imbalance, ratio, ideal = zip(*sorted(material.curves), strict=True)
    figure, panels = grid(1, columns=1, height=2.6)
    panels[0].plot(imbalance, ratio, color=_COLOURS[0], marker="o", label="measured")
    panels[0].plot(imbalance, ideal, color="black", ls="--", label="ideal")
    finish(
        figure, panels, title, "time / time of the even load", "most loaded rank / mean of the ranks (ratio)"
    )
    caption = (
        "Above the ideal line, imbalance costs more than its bytes; below it, part of the cost is hidden."
    )
    yield Plot("imbalance", title, caption, figure)


def _look(line: Series) -> dict[str, Any]:
    """Colour, marker and dash: an operation looks the same in every figure."""
    i = _OPS.index(line.op) if line.op in _OPS else len(_OPS) - 1
    dash = _DASHES[line.place % len(_DASHES)]
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "ls": dash}


def _left_out(count: int) -> tuple[str, ...]:
    what = "other types, reductions or roots are" if count > 1 else "other type, reduction or root is"
    return (f"{count} {what} in the tables alone.",) if count else ()
