"""Rows of a measurement in the order that plots need: by group, line and size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collectives.store.results import Metadata, Results, SweepRow, Timing

LINES, VARIANTS = 12, 4
"""Lines that one panel tells apart, and types, reductions and roots of one operation among them."""


@dataclass(frozen=True)
class RowSeries:
    """Rows of one operation, type, reduction and root: they differ in size and pass."""

    op: str
    place: int
    """Which of the operation's variants, in the order they were measured."""
    label: str
    rows: tuple[SweepRow, ...]

    def by_size(self, placement: str, field: str) -> dict[int, float]:
        """A field of the timings by size, ascending: the median over the passes, of values above zero."""
        values: dict[int, list[float]] = {}
        for row in self.rows:
            timing: Timing | None = getattr(row, placement)
            value = getattr(timing, field) if timing else 0.0
            if 0 < value < math.inf and row.size > 0:
                values.setdefault(row.size, []).append(value)
        return {size: statistics.median(values[size]) for size in sorted(values)}


def groups(results: Results) -> list[str]:
    """Kinds of groups, in the order they were measured."""
    return list(dict.fromkeys(row.group for row in results.rows))


def series(rows: Iterable[SweepRow], group: str, variants: int = VARIANTS) -> tuple[list[RowSeries], int]:
    """Lines of one kind of group, at most `LINES` with at most `variants` of an operation; and how many are left out."""
    lines = every_series(rows, group)
    # Of each operation one, then of each the next.
    kept = sorted((line for line in lines if line.place < variants), key=lambda line: line.place)[:LINES]
    return [line for line in lines if line in kept], len(lines) - len(kept)


def every_series(rows: Iterable[SweepRow], group: str) -> list[RowSeries]:
    """All lines of one kind of group, however many a panel could tell apart."""
    by_op: dict[str, dict[tuple[str, str, int], list[SweepRow]]] = {}
    for row in rows:
        if row.group == group and row.size > 0 and row.timings:
            by_op.setdefault(row.op, {}).setdefault((row.dtype, row.redop, row.root), []).append(row)
    return [
        RowSeries(op, place, _label(op, variant, len(kinds) > 1), tuple(members))
        for op, kinds in by_op.items()
        for place, (variant, members) in enumerate(kinds.items())
    ]


def _label(op: str, variant: tuple[str, str, int], several: bool) -> str:
    dtype, redop, root = variant
    if not several:
        return op
    return " ".join(
        [op, dtype, *([redop] if redop != "none" else []), *([f"root {root}"] if root >= 0 else [])]
    )


def group_label(results: Results, group: str) -> str:
    """`group node (2 groups of 4 ranks)`."""
    kinds = dict.fromkeys((row.groups, row.ranks) for row in results.rows if row.group == group)
    texts = [f"{n} groups of {ranks} ranks" if n > 1 else f"{ranks} ranks" for n, ranks in kinds]
    return f"group {group} ({', '.join(texts)})"


def hosts(metadata: Metadata) -> dict[int, str]:
    """Host names by rank, where the metadata's `devices` tell them."""
    devices: Sequence[Mapping[str, Any]] = metadata.system.get("devices", ())
    return {int(d["rank"]): str(d["hostname"]) for d in devices if "rank" in d and "hostname" in d}


def rank_labels(ranks: Iterable[int], metadata: Metadata) -> list[str]:
    """`3 host-a`, or the bare rank where its host isn't known."""
    names = hosts(metadata)
    return [f"{rank} {names.get(rank, '')}".strip() for rank in ranks]


class Baseline:
    """An earlier measurement, to be asked case by case."""

    def __init__(self, results: Results) -> None:
        self._rows: dict[tuple[Any, ...], list[SweepRow]] = {}
        for row in results.rows:
            self._rows.setdefault(_case(row), []).append(row)

    def ratios(self, line: RowSeries, placement: str) -> dict[int, tuple[float, float]]:
        """Bus bandwidth now over then by size, and the half-width of its interval.

        Both are medians over the passes. Errors of the two means count as independent; NaN where one isn't known.
        """
        by_size = {}
        for size in sorted({row.size for row in line.rows}):
            now = [row for row in line.rows if row.size == size]
            rate, error = _rate(now, placement)
            before, uncertain = _rate(self._rows.get(_case(now[0]), ()), placement)
            if rate and before:
                by_size[size] = (rate / before, rate / before * math.hypot(error, uncertain))
        return by_size


def _case(row: SweepRow) -> tuple[Any, ...]:
    """What has to agree for two rows to be compared."""
    return (row.op, row.group, row.ranks, row.groups, row.dtype, row.redop, row.root, row.size)


def _rate(rows: Iterable[SweepRow], placement: str) -> tuple[float, float]:
    """Median bus bandwidth in GB/s, and the relative half-width of its interval, NaN where that isn't known."""
    timings: list[Timing] = [t for row in rows if (t := getattr(row, placement)) is not None and t.bus_bw > 0]
    if not timings:
        return 0.0, 0.0
    width = statistics.median(t.ci_us / t.time_us for t in timings)
    return statistics.median(t.bus_bw for t in timings), width if math.isfinite(width) else math.nan
