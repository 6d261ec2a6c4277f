"""Plots of the study, as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from trainer.study.score import MODEL, MethodScore, RankingScore, TimeScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _GREY, _RED = "#2b6cb0", "#a0aec0", "#c53030"


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
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="measured step, s",
            ylabel="predicted step, s",
            title=score.table,
        )
        axes.legend(fontsize=7)

    return _png(draw)


def errors(scores: Sequence[TimeScore]) -> bytes:
    """MAPE of the forecast and of the baselines, by table."""

    def draw(axes: Axes) -> None:
        tables = [score for score in scores if score.errors]
        names = list(tables[0].errors)
        for i, name in enumerate(names):
            at = [j + (i - len(names) / 2) * 0.2 for j in range(len(tables))]
            heights = [100 * score.errors[name].mean for score in tables]
            axes.bar(
                at,
                heights,
                width=0.18,
                label=name,
                color=_BLUE if name == MODEL else None,
                alpha=1 if i == 0 else 0.6,
            )
        axes.set_xticks(range(len(tables)), [score.table for score in tables], fontsize=7)
        axes.set(ylabel="MAPE, %", title="step time: forecast and baselines")
        axes.legend(fontsize=7)

    return _png(draw)


def choices(groups: Sequence[RankingScore]) -> bytes:
    """Regret by group."""

    def draw(axes: Axes) -> None:
        names = list(groups[0].regret)
        for i, name in enumerate(names):
            at = [j + (i - len(names) / 2) * 0.25 for j in range(len(groups))]
            axes.bar(
                at, [100 * c.regret[name] for c in groups], width=0.23, label=name, alpha=1 if i == 0 else 0.6
            )
        axes.set_xticks(range(len(groups)), [c.group for c in groups], rotation=45, ha="right", fontsize=7)
        axes.set(ylabel="speed lost, %", title="regret of the chosen layout")
        axes.legend(fontsize=7)

    return _png(draw)


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


def _png(draw: Callable[[Axes], None]) -> bytes:
    import matplotlib.backends.backend_agg as agg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    agg.FigureCanvasAgg(figure)
    draw(figure.subplots())
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
