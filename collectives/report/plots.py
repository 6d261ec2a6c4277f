"""Figures of a measurement: each a plot with what to look for, or the reason why it isn't drawn.

Colours are Okabe and Ito's, which colour-blind readers tell apart; in every heat map dark is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
from matplotlib.axes import Axes

from collectives.report.canvas import finish, grid, heat_map, log_sizes, log_values, plain
from collectives.report.lateness import lateness_maps
from collectives.report.report_data import FittedCurve, MissingPlot, Plot, ReportData
from collectives.store.series import (
    Baseline,
    RowSeries,
    group_label,
    groups,
    rank_labels,
    series,
)
from configs.fabric import Op

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX<>*h"
_DASHES = ("-", "--", ":", "-.")
_OPS: tuple[str, ...] = get_args(Op)
_PLACEMENTS = {"out_of_place": "out of place", "in_place": "in place"}
_SIZE = "message size"


def draw(report: ReportData) -> Iterator[Plot | MissingPlot]:
    """All plots, one after the other, so that one figure is held at a time."""
    for kind in (_bandwidth, _latency, _pairs, _residuals, lateness_maps, _against_baseline, _imbalance):
        yield from kind(report)


def _bandwidth(report: ReportData) -> Iterator[Plot | MissingPlot]:
    """Bus bandwidth over size by operation: a figure for each kind of group, a panel for each placement."""
    drawn = False
    for group in groups(report.results):
        lines, left = series(report.results.rows, group)
        by_placement = {p: [one for one in lines if one.by_size(p, "bus_bw")] for p in _PLACEMENTS}
        by_placement = {placement: members for placement, members in by_placement.items() if members}
        if not by_placement:
            continue
        drawn = True
        figure, panels = grid(len(by_placement), columns=1, height=2.3)
        for axes, (placement, members) in zip(panels, by_placement.items(), strict=True):
            axes.set_title(_PLACEMENTS[placement])
            for one in members:
                points = one.by_size(placement, "bus_bw")
                axes.plot(list(points), list(points.values()), label=plain(one.label), **_line_style(one))
        log_sizes(panels)
        log_values(panels)
        title = f"Bus bandwidth, {group_label(report.results, group)}"
        finish(figure, panels, title, "bus bandwidth (GB/s)", _SIZE)
        caption = (
            "Lines should rise and level out near the link's rate; a dip or a step is a change of algorithm "
            "or a disturbance."
        )
        yield Plot(f"bandwidth.{group}", title, caption, figure, _left_out(left))
    if not drawn:
        yield MissingPlot("Bus bandwidth over size", "no row has a size and a bus bandwidth above zero")


def _latency(report: ReportData) -> Iterator[Plot | MissingPlot]:
    """Time over size, a panel for each operation: the median, and the band from p95 to p99."""
    drawn = False
    for group in groups(report.results):
        lines, left = series(report.results.rows, group, variants=1)
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
        title = f"Time, {group_label(report.results, group)}"
        finish(figure, panels, title, "time of the slowest rank (µs)", _SIZE)
        caption = (
            "Flat on the left is latency, the slope on the right is bandwidth; where the band is far above its line, "
            "single iterations are slow."
        )
        yield Plot(f"latency.{group}", title, caption, figure, _left_out(left))
    if not drawn:
        yield MissingPlot("Time over size", "no row has a size and a time")


def _pairs(report: ReportData) -> Iterator[Plot | MissingPlot]:
    """Rate of every pair, source by destination."""
    title = "Bandwidth of every pair"
    ranks = sorted({rank for source, to, _ in report.pairs for rank in (source, to)})
    if not ranks:
        yield MissingPlot(title, "no rates of pairs were given")
        return
    place = {rank: i for i, rank in enumerate(ranks)}
    rates = np.full((len(ranks), len(ranks)), np.nan)
    for source, to, rate in report.pairs:
        rates[place[source], place[to]] = rate
    names = rank_labels(ranks, report.results.metadata)
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


def _residuals(report: ReportData) -> Iterator[Plot | MissingPlot]:
    """Median time over the fitted one, minus 1, in per cent, with the fit's interval: a fit is of medians."""
    if not report.fits:
        yield MissingPlot("Fit residuals", "no fit was given")
    for group in dict.fromkeys(fit.group for fit in report.fits):
        title = f"Fit residuals, group {group}"
        measured = []
        for fit in (f for f in report.fits if f.group == group):
            rows = report.results.cases().get((fit.op, group), [])
            points = [
                (row.size, row.best.p50_us)
                for row in rows
                if row.best and (row.dtype, row.redop) == (fit.dtype, fit.redop)
            ]
            within = [(size, time) for size, time in points if fit.sizes[0] <= size <= fit.sizes[-1]]
            if within:
                measured.append((fit, np.array(within, float)))
        if not measured:
            yield MissingPlot(title, "no measured size lies within those of a fit")
            continue
        figure, panels = grid(len(measured), columns=1, height=1.8)
        details = tuple(
            _residual_panel(*one) for one in zip(panels, *zip(*measured, strict=True), strict=True)
        )
        log_sizes(panels)
        finish(figure, panels, title, "measured / fitted − 1 (%)", _SIZE)
        caption = "Points should lie around zero, within the band; where they bend away together, the fit lacks a segment."
        yield Plot(f"residuals.{group}", title, caption, figure, details)


def _residual_panel(axes: Axes, fit: FittedCurve, points: np.ndarray) -> str:
    """Draw the residuals of one fit; the fit in words, and how large they are."""
    sizes, times = points.T
    at = np.asarray(fit.sizes, float)
    fitted, low, high = (np.asarray(values, float) for values in (fit.time_us, fit.low_us, fit.high_us))
    middle, least, most = (
        np.exp(np.interp(np.log(sizes), np.log(at), np.log(v))) for v in (fitted, low, high)
    )
    residual = 100 * (times / middle - 1)
    look = _line_style(RowSeries(fit.op, 0, "", ()))
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


def _against_baseline(report: ReportData) -> Iterator[Plot | MissingPlot]:
    """Bus bandwidth over the baseline's by size, with the interval that both have."""
    title = "Against the baseline"
    if report.baseline is None:
        yield MissingPlot(title, "no baseline was given")
        return
    baseline = Baseline(report.baseline)
    drawn = False
    for group in groups(report.results):
        lines, left = series(report.results.rows, group)
        by_placement = {p: [(one, r) for one in lines if (r := baseline.ratios(one, p))] for p in _PLACEMENTS}
        by_placement = {placement: members for placement, members in by_placement.items() if members}
        if not by_placement:
            continue
        drawn = True
        figure, panels = grid(len(by_placement), columns=1, height=2.3)
        for axes, (placement, members) in zip(panels, by_placement.items(), strict=True):
            axes.set_title(_PLACEMENTS[placement])
            axes.axhline(1, color="black", lw=0.8)
            for one, ratios in members:
                values, errors = zip(*ratios.values(), strict=True)
                look = _line_style(one) | {"elinewidth": 0.8, "capsize": 1.5, "label": plain(one.label)}
                axes.errorbar(list(ratios), values, yerr=errors, **look)
        # A fifth to either side at least, so that a per cent doesn't look like a fall.
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(min(low, 0.8), max(high, 1.2))
        log_sizes(panels)
        named = f"{title}, {group_label(report.results, group)}"
        finish(figure, panels, named, "bus bandwidth, now / baseline", _SIZE)
        caption = (
            "At 1 nothing has changed, below 1 it is slower now; a bar that reaches 1 is within the noise. The baseline "
            f"was begun {report.baseline.metadata.started}."
        )
        yield Plot(f"baseline.{group}", named, caption, figure, _left_out(left))
    if not drawn:
        why = "it shares no operation, group, number of ranks, type and size with this measurement"
        yield MissingPlot(title, why)


def _imbalance(report: ReportData) -> Iterator[Plot | MissingPlot]:
    """Time over imbalance, both against the even load, beside the ideal."""
    title = "Cost of imbalance"
    if not report.curves:
        yield MissingPlot(title, "no curve of imbalance was given")
        return
    imbalance, ratio, ideal = zip(*sorted(report.curves), strict=True)
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


def _line_style(line: RowSeries) -> dict[str, Any]:
    """Colour, marker and dash: an operation looks the same in every figure."""
    i = _OPS.index(line.op) if line.op in _OPS else len(_OPS) - 1
    dash = _DASHES[line.place % len(_DASHES)]
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "ls": dash}


def _left_out(count: int) -> tuple[str, ...]:
    what = "other types, reductions or roots are" if count > 1 else "other type, reduction or root is"
    return (f"{count} {what} in the tables alone.",) if count else ()
