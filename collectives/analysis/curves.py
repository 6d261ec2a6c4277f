"""From a measurement to a fabric profile, and from that to what the report draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from collectives.analysis.fit import FEWEST, fit_curve
from collectives.ops.groups import partitions
from collectives.report.canvas import size_label
from collectives.report.report_data import FittedCurve
from collectives.store.results import Metadata, Results, SweepRow
from configs.errors import UserError
from configs.profile import CollectiveCurve, FabricProfile, Segment

_POINTS = 200
"""Of a drawn curve: a line of a fit is bent in log-log space."""


def profile(results: Results, name: str, hardware: str, confidence: float = 0.95) -> FabricProfile:
    """Fit every operation, kind of group, type and reduction of a measurement over size.

    What has no size (barrier), or too few of them, has no curve: `conditions["left_out"]` names it.

    Args:
        results: a sweep; the more passes, the better are intervals founded.
        name: of the profile.
        hardware: preset name of the devices.
        confidence: level of the intervals.

    Raises:
        UserError: where nothing can be fitted.
    """
    spans = nodes_spanned(results.metadata)
    fitted, left_out = [], []
    for (op, group, ranks, groups, dtype, redop), rows in cases(results).items():
        if len({row.size for row in rows}) < FEWEST:
            left_out.append(
                f"{op}, group {group}, {dtype}, {redop}: fewer than {FEWEST} sizes above 0 with times"
            )
            continue
        fit = fit_curve(*measured(rows), confidence=confidence)
        curve = CollectiveCurve(
            op=op, group=group, ranks=ranks, groups=groups, nodes=spans[group], dtype=dtype, redop=redop,
            segments=fit.segments, held_out_error=fit.held_out_error, line_error=fit.line_error,
            interval=fit.interval, confidence=confidence, outliers=fit.outliers,
        )  # fmt: skip
        fitted.append(curve)
    if not fitted:
        raise UserError(
            f"the measurement has no operation with {FEWEST} sizes or more, which a fit takes; measure more of them, "
            "e.g. -b 8 -e 16M -f 2"
        )
    conditions = asdict(results.metadata) | {"left_out": left_out}
    return FabricProfile(name=name, hardware=hardware, conditions=conditions, curves=tuple(fitted))


def cases(results: Results) -> dict[tuple[str, str, int, int, str, str], list[SweepRow]]:
    """Rows by operation, group, its ranks, groups at once, type and reduction; without times or size they are none."""
    by_case: dict[tuple[str, str, int, int, str, str], list[SweepRow]] = {}
    for row in results.rows:
        rows = by_case.setdefault((row.op, row.group, row.ranks, row.groups, row.dtype, row.redop), [])
        if row.size > 0 and row.best and row.best.time_us > 0:
            rows.append(row)
    return by_case


def measured(rows: Sequence[SweepRow]) -> tuple[list[int], list[float], list[int]]:
    """Bytes, median microseconds and number of the pass of each row, all of which have times.

    The median, since single iterations that are held up say nothing of the next size.
    """
    timed = [(row.size, row.best.p50_us, row.sweep) for row in rows if row.best]
    sizes, times, passes = zip(*timed, strict=True)
    return list(sizes), list(times), list(passes)


def nodes_spanned(metadata: Metadata) -> dict[str, int]:
    """Nodes that a group reaches over, at most, by kind of group."""
    hosts: Sequence[Mapping[str, Any]] = metadata.system["hosts"]
    node = {int(rank): number for number, host in enumerate(hosts) for rank in host["ranks"]}
    nodes = [node[rank] for rank in sorted(node)]
    return {
        partition.kind: max(len({nodes[rank] for rank in ranks}) for ranks in partition.groups)
        for kind in metadata.settings["collectives"]["groups"]
        for partition in partitions(kind, nodes, metadata.settings["layout"])
    }


def curves(profile: FabricProfile) -> list[FittedCurve]:
    """Curves of a profile for the report, over the sizes that were measured."""
    return [_drawn(curve) for curve in profile.curves]


def table(profile: FabricProfile) -> list[str]:
    """A profile as lines for a terminal: each curve, then its regions, then what has no curve."""
    lines = []
    for curve in profile.curves:
        case = f"{curve.op}, {curve.groups} group{'s' * (curve.groups > 1)} of {curve.ranks} ranks ({curve.group})"
        low, high = curve.interval
        outliers = f"; outliers {', '.join(map(size_label, curve.outliers))}" if curve.outliers else ""
        lines.append(
            f"{case}, {curve.dtype}, {curve.redop}: held-out error {curve.held_out_error:.1%}, of one line "
            f"{curve.line_error:.1%}; {curve.confidence:.0%} of fresh times within {low:.2f} to {high:.2f}{outliers}"
        )
        lines += [f"  {_text(segment)}" for segment in curve.segments]
    return lines + [f"# no curve: {one}" for one in profile.conditions["left_out"]]


def _drawn(curve: CollectiveCurve) -> FittedCurve:
    ends = [end for segment in curve.segments for end in (segment.low, segment.high)]
    sizes = np.unique(np.concatenate([ends, np.geomspace(ends[0], ends[-1], _POINTS)]))
    times = np.array([curve.time_us(size) for size in sizes])
    count = len(curve.segments)
    text = "; ".join(_text(segment) for segment in curve.segments)
    return FittedCurve(
        op=curve.op,
        group=curve.group,
        dtype=curve.dtype,
        redop=curve.redop,
        sizes=sizes.tolist(),
        time_us=times.tolist(),
        low_us=(times * curve.interval[0]).tolist(),
        high_us=(times * curve.interval[1]).tolist(),
        label=f"{curve.dtype}, {count} segment{'' if count == 1 else 's'}",
        segments=(
            f"{text}. Held-out error {curve.held_out_error:.1%}, of one line {curve.line_error:.1%}"
            + (f"; outliers {', '.join(map(size_label, curve.outliers))}" if curve.outliers else "")
        ),
    )


def _text(segment: Segment) -> str:
    """`8 to 64K: 12.3 µs (11.9 to 12.8) and 4.56 GB/s (4.2 to 4.9)`."""
    low, high = segment.latency_range_us
    parts = [f"{segment.latency_us:.3g} µs ({low:.3g} to {high:.3g})"]
    if segment.gbps and segment.gbps_range:
        least, most = segment.gbps_range
        parts.append(f"{segment.gbps:.3g} GB/s ({least:.3g} to {'any' if most is None else f'{most:.3g}'})")
    return f"{size_label(segment.low)} to {size_label(segment.high)}: {' and '.join(parts)}"
