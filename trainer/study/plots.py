"""Plots of the study, as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from trainer.study.score import MethodScore, RankingScore, TimeScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _GREY = "#2b6cb0", "#a0aec0"


def times(score: TimeScore) -> bytes:
    """Predicted over measured step times of a table."""

    def draw(axes: Axes) -> None:
        for calibrates, colour, label in ((False, _BLUE, "scored"), (True, _GREY, "used to calibrate")):
            rows = [row for row in score.timed if row.case.calibrates is calibrates]
            if rows:
                axes.scatter(
                    [r.measured for r in rows], [r.seconds for r in rows], s=9, color=colour, label=label
                )
        ends = [min(r.measured for r in score.timed), max(r.measured for r in score.timed)]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.plot(ends, [1.2 * e for e in ends], color=_GREY, linewidth=0.6, linestyle="--", label="20 % off")
        axes.plot(ends, [e / 1.2 for e in ends], color=_GREY, linewidth=0.6, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="measured step, s", ylabel="predicted step, s")
        axes.set_title(score.table)
        axes.legend(fontsize=7)

    return _png(draw)


def errors(scores: Sequence[TimeScore]) -> bytes:
    """MAPE of the forecast and of the baselines, by table."""

    means = {s.table: {name: one.mean for name, one in s.errors.items()} for s in scores if s.errors}
    return _bars(means, "MAPE, %", "step time: forecast and baselines")


def choices(groups: Sequence[RankingScore]) -> bytes:
    """Regret by group."""

    return _bars({one.group: one.regret for one in groups}, "speed lost, %", "regret of the chosen layout")


def methods(score: MethodScore) -> bytes:
    """Predicted over measured MFU by method."""

    def draw(axes: Axes) -> None:
        for name in sorted({run.method for run in score.runs}):
            rows = [run for run in score.runs if run.method == name and run.mfu and run.predicted]
            axes.scatter([r.mfu or 0 for r in rows], [r.predicted or 0 for r in rows], s=14, label=name)
        axes.plot([0, 60], [0, 60], color="black", linewidth=0.8)
        axes.set(xlabel="measured MFU, %", ylabel="predicted MFU, %", title="MoE Parallel Folding")
        axes.legend(fontsize=7)

    return _png(draw)


def _bars(heights: Mapping[str, Mapping[str, float]], unit: str, title: str) -> bytes:
    """Shares in percent, a bar of each forecaster in each group; the forecast's own is the first and stands out."""

    def draw(axes: Axes) -> None:
        names = list(next(iter(heights.values())))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            at = [j + (i - (len(names) - 1) / 2) * width for j in range(len(heights))]
            values = [100 * group[name] for group in heights.values()]
            axes.bar(at, values, width=0.9 * width, label=name, alpha=1 if i == 0 else 0.6)
        axes.set_xticks(range(len(heights)), list(heights), rotation=45, ha="right", fontsize=7)
        axes.set(ylabel=unit, title=title)
        axes.legend(fontsize=7)

    return _png(draw)


def _png(draw: Callable[[Axes], None]) -> bytes:
    import matplotlib.backends.backend_agg as agg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    agg.FigureCanvasAgg(figure)
    draw(figure.subplots())
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
