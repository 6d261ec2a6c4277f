"""The first thing on a page: what was measured, in a line or a small table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from collectives.report.canvas import size_label
from collectives.report.number import number
from collectives.store.results import Results, SweepRow

_STUDIES = {"faults": "what is slow", "moe": "expert-parallel traffic"}
_HEADS = (
    "operation",
    "group",
    "type",
    "sizes",
    "time of the smallest (µs)",
    "best busbw (GB/s)",
    "reached at",
    "#wrong",
)
_LAYER = {
    "routing": "routing",
    "imbalance": "imbalance",
    "bytes": "largest (B)",
    "dispatch_us": "dispatch (µs)",
    "experts_us": "experts (µs)",
    "sequential_us": "in turn (µs)",
    "overlapped_us": "in chunks (µs)",
    "hidden": "hidden share",
}


def title_of(results: Results) -> str:
    """What was measured, for the page's title."""
    study = _study(results)
    if study in _STUDIES:
        return f"Collectives: {_STUDIES[study]}"
    names = dict.fromkeys(op for op, _ in results.cases())
    return f"Collectives: {', '.join(names) or 'nothing measured yet'}"


def is_sweep(results: Results) -> bool:
    """Whether rows of operations over sizes are what it consists of."""
    return _study(results) not in _STUDIES


def summary(
    results: Results, pairs: Sequence[tuple[int, int, float]], layers: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """A table with a line for each operation, group and type; of a study, what it probed."""
    if is_sweep(results):
        yield from _of_sweep(results)
    elif pairs:
        rates = sorted(rate for *_, rate in pairs)
        ranks = {rank for a, b, _ in pairs for rank in (a, b)}
        slowest = sorted(pairs, key=lambda pair: pair[2])[:3]
        named = ", ".join(f"rank {a} to {b} {number(rate)}" for a, b, rate in slowest)
        yield (
            f"<p>{len(ranks)} ranks, {len(pairs)} directions: {number(rates[0])} to {number(rates[-1])} GB/s, median "
            f"{number(median(rates))}. Slowest: {escape(named)} GB/s.</p>"
        )
    elif layers:
        yield _table(
            tuple(_LAYER.values()), ([_cell(layer.get(name)) for name in _LAYER] for layer in layers)
        )
    else:
        yield "<p>The study has not come to a result yet.</p>"


def _of_sweep(results: Results) -> Iterator[str]:
    kinds: dict[tuple[str, str, str], list[SweepRow]] = {}
    for row in results.rows:
        if row.timings:
            kinds.setdefault((row.op, row.group, row.dtype), []).append(row)
    if kinds:
        yield _table(_HEADS, ([*kind, *_figures(rows)] for kind, rows in kinds.items()))


def _figures(rows: Sequence[SweepRow]) -> list[str]:
    """Sizes, time of the smallest, best rate and where, wrong elements."""
    smallest, largest = min(row.size for row in rows), max(row.size for row in rows)
    first = median(timing.time_us for row in rows if row.size == smallest for timing in row.timings)
    rate, size = max((timing.bus_bw, row.size) for row in rows for timing in row.timings)
    counts = [timing.wrong for row in rows for timing in row.timings if timing.wrong is not None]
    span = size_label(smallest) if smallest == largest else f"{size_label(smallest)} to {size_label(largest)}"
    best = [number(rate), size_label(size)] if rate else ["–", "–"]
    return [span, number(first), *best, str(sum(counts)) if counts else "not checked"]


def _table(heads: Sequence[str], lines: Iterator[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table class="figures summary"><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return number(value) if isinstance(value, float) else str(value)


def _study(results: Results) -> str:
    return str(results.metadata.settings["collectives"].get("study", "sweep"))
