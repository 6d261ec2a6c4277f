"""What all plots share: style, panels, axes of sizes and times, heat maps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "savefig.dpi": 180,
}
"""matplotlib's settings, to be in force from drawing to saving."""
WIDTH = 5.4
"""Inches: narrow, so that text stays readable on a phone."""
NAMED, FIGURES = 24, 12
"""Cells along an axis up to which each is named, and up to which each holds its figure."""


def plain(text: str, most: int = 60) -> str:
    """Text that matplotlib shows as it is, a dollar sign too, and that fits."""
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return (shown if len(shown) <= most else shown[: most - 1] + "…").replace("$", r"\$")


def size_label(size: float) -> str:
    """`8 B`, `1.5 KiB`, `32 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def grid(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels on common axes, each `height` inches high."""
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * rows + 1.0), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    panels = list(cells.flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)
    return figure, panels[:count]


def log_sizes(panels: Sequence[Axes]) -> None:
    """Let the common x axis count bytes in powers of two, named in KiB and MiB."""
    marked = [line for axes in panels for line in axes.lines if line.get_marker() != "None"]
    sizes = np.concatenate([line.get_xdata(orig=True) for line in marked])
    low, high = math.log2(min(sizes)), math.log2(max(sizes))
    exponents = range(math.ceil(low), math.floor(high) + 1)
    most = 4 if len({axes.get_position().x0 for axes in panels}) > 1 else 7
    step = next((s for s in (1, 2, 5, 10) if len([e for e in exponents if e % s == 0]) <= most), 10)
    ticks = [2.0**e for e in exponents if e % step == 0]
    axes = panels[0]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks if len(ticks) > 1 else sorted({min(sizes), max(sizes)}))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_label(value)))
    pad = max(0.03 * (high - low), 0.3)
    axes.set_xlim(2 ** (low - pad), 2 ** (high + pad))


def log_values(panels: Sequence[Axes]) -> None:
    """Make the common y axis logarithmic, with plain figures, over at least a factor of four."""
    axes = panels[0]
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    grow = max(1.0, 2 / math.sqrt(high / low))
    axes.set_ylim(low / grow, high * grow)
    close = high / low < 300
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if close else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def finish(figure: Figure, panels: Sequence[Axes], title: str, y: str, x: str) -> None:
    """Set title, axes' names and one legend for all panels."""
    figure.suptitle(plain(title, 80))
    figure.supylabel(y, fontsize=9)
    # On the panels: a name of the whole figure and a legend below it would lie over each other.
    spec = panels[0].get_subplotspec()
    columns = spec.get_gridspec().ncols if spec else 1
    for axes in panels[-columns:]:
        axes.set_xlabel(x, fontsize=9)
    named: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    longest = max(map(len, named), default=0)
    width = 1 if longest > 36 else 2 if longest > 20 else 3
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=width, fontsize=8.5)


def heat_map(
    values: np.ndarray,
    names: tuple[Sequence[str], Sequence[str]],
    axes_names: tuple[str, str],
    scale: tuple[float, float],
    unit: str,
    *,
    reverse: bool = False,
    meaning: str = "slow",
) -> Figure:
    """A matrix in colours, dark for low values, or for high ones where `reverse`; NaN is grey.

    Args:
        values: matrix of rows by columns, with one finite value at least.
        names: of its rows, and of its columns.
        axes_names: what rows are, and what columns are.
        scale: values at the two ends of the colours.
        unit: of the values, for the colour bar.
        reverse: dark is high.
        meaning: what a dark cell means, for the colour bar.
    """
    count = max(map(len, names))
    figure = Figure(figsize=(WIDTH, 1.9 + min(WIDTH - 1, 0.34 * len(names[0]))), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=False)
    axes.set_facecolor("#bbbbbb")
    look: dict[str, Any] = {"cmap": "cividis_r" if reverse else "cividis", "vmin": scale[0], "vmax": scale[1]}
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="nearest", **look)
    for axis, labels, name in zip((axes.yaxis, axes.xaxis), names, axes_names, strict=True):
        step = math.ceil(len(labels) / NAMED)
        axis.set_ticks(
            range(0, len(labels), step), [plain(label, 26) for label in labels[::step]], fontsize=8
        )
        axis.set_label_text(name)
    for label in axes.get_xticklabels():
        label.set(rotation=45, ha="right", rotation_mode="anchor")
    beyond = "max" if np.nanmax(values) > scale[1] else "neither"
    figure.colorbar(image, ax=axes, label=textwrap.fill(f"{unit} (dark is {meaning})", 24), extend=beyond)
    for (i, j), value in np.ndenumerate(values) if count <= FIGURES else ():
        if math.isfinite(value):
            dark = (float(value) - scale[0] > (scale[1] - scale[0]) / 2) == reverse
            axes.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
    return figure
