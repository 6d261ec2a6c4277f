"""Which rank keeps the others waiting: a map of ranks by operation.

All ranks leave a synchronising call together, so a rank that enters it late has the *shortest* time of its own, and those
that wait for it the longest. What shows the cause is therefore how long the others wait, not how long a rank takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from collectives.analysis.compare import partition_of
from collectives.report.canvas import heat_map, plain, size_label
from collectives.report.report_data import MissingPlot, Plot, ReportData
from collectives.store.results import Results, SweepRow
from collectives.store.series import group_label, groups, rank_labels

LATE = 20.0
"""Per cent at the end of the colours at least, so that jitter among equals doesn't look like a fault."""
SYNCHRONOUS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_allv", "barrier")
"""Operations that no rank can leave before all have entered."""


def lateness_maps(report: ReportData) -> Iterator[Plot | MissingPlot]:
    """How long the others wait for each rank, rank by operation, at the largest size."""
    drawn = False
    for group in groups(report.results):
        cases = {op: rows for (op, kind), rows in report.results.cases().items() if kind == group}
        partition = _groups_of(report.results, group)
        columns = {
            op: late
            for op, rows in cases.items()
            if op in SYNCHRONOUS and (late := lateness(rows, partition))
        }
        most = max((len(shares) for _, shares in columns.values()), default=0)
        if most < 2:
            continue
        drawn = True
        table = np.full((most, len(columns)), np.nan)
        for i, (_, shares) in enumerate(columns.values()):
            table[: len(shares), i] = shares
        table *= 100
        names = rank_labels(range(most), report.results.metadata)
        heads = [f"{op}, {size_label(size)}" for op, (size, _) in columns.items()]
        scale = (0.0, min(max(float(np.nanmax(table)), LATE), 100.0))
        unit = "% of a call that others wait for the rank"
        axes_names = ("rank, host", "operation, size")
        figure = heat_map(table, (names, heads), axes_names, scale, unit, reverse=True, meaning="late")
        title = f"Lateness of each rank, {group_label(report.results, group)}"
        figure.suptitle(plain(title))
        caption = (
            "Ranks that enter a call early wait in it for the last one, whose own time is the shortest: a rank that is "
            "dark in all columns keeps the others waiting."
        )
        rooted = [op for op in cases if op not in SYNCHRONOUS]
        details = (
            (f"Not shown, as some of its ranks may leave early: {', '.join(rooted)}.",) if rooted else ()
        )
        yield Plot(f"ranks.{group}", title, caption, figure, details)
    if not drawn:
        yield MissingPlot(
            "Lateness of each rank",
            "no row has times of more than one rank of an operation that all end together",
        )


def lateness(rows: Sequence[SweepRow], partition: Sequence[Sequence[int]]) -> tuple[int, list[float]] | None:
    """The largest size with times of ranks, and the share of a call there that others of its group wait for each rank.

    In each call that is the longest time of a rank in the group less the rank's own; of several passes the median. NaN
    for a rank without times. None where no row has any.
    """
    timed = [(row.size, row.best.rank_times_us) for row in rows if row.best and any(row.best.rank_times_us)]
    if not timed:
        return None
    largest = max(size for size, _ in timed)
    passes = []
    for own in (times for size, times in timed if size == largest):
        shares = np.full(len(own), np.nan)
        for ranks in partition:
            there = [rank for rank in ranks if rank < len(own) and own[rank]]
            if there:
                calls = np.array([own[rank] for rank in there])
                longest = calls.max(axis=0)
                shares[there] = (longest - calls).mean(axis=1) / longest.mean()
        passes.append(shares)
    return largest, np.median(passes, axis=0).tolist()


def _groups_of(results: Results, kind: str) -> Sequence[Sequence[int]]:
    """The ranks of each group of a kind."""
    ranks = results.metadata.settings["ranks"]
    if all(row.ranks == ranks for row in results.rows if row.group == kind):
        return (range(ranks),)
    return partition_of(results.metadata, kind).groups
