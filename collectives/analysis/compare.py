"""A measurement against an earlier one, against what the hardware is made for, and its groups against each other. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isfinite
from statistics import fmean, median
from typing import Any

from collectives.analysis.judge import BandwidthFinding, FindingKind
from collectives.analysis.paths import group_limit
from collectives.ops.groups import GroupPartition, partitions
from collectives.store.results import Metadata, Results, SweepRow
from collectives.store.series import Baseline, every_series, groups
from configs.errors import UserError
from configs.schema import HardwareConfig

_SHARE = 0.1
"""Share of the compared sizes that must be slower before an operation is: one of many may be, by chance."""
_SATURATED_SECONDS, _SATURATED_SECONDS_PER_RANK = 1e-3, 1e-4
"""A call is bound by bandwidth that would take this long at the full rate. Before, latency and protocols make its time:
8 MI300X reach 294 GB/s at 128 MiB and 319 at 16 GiB, and a ring's latency grows with its ranks."""
_ON_EVERY_LINK = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def against_baseline(
    results: Results, baseline: Results, tolerance: float, warn: Callable[[str], None] = lambda _: None
) -> list[BandwidthFinding]:
    """Operations whose bus bandwidth fell by more than `tolerance`, beyond both confidence intervals.

    Args:
        results: what is judged.
        baseline: the earlier measurement.
        tolerance: share by which a rate may fall, in (0, 1).
        warn: called with a line about sizes that can't be judged: nobody knows an interval of theirs.

    Raises:
        UserError: where the two share no case, or none whose intervals are known.
    """
    before, findings, shared, compared = Baseline(baseline), [], 0, 0
    for group in groups(results):
        for line in every_series(results.rows, group):
            for placement in ("in_place", "out_of_place"):
                every = before.ratios(line, placement)
                ratios = {size: (ratio, width) for size, (ratio, width) in every.items() if isfinite(width)}
                shared += len(every)
                compared += len(ratios)
                slow = {
                    size: ratio for size, (ratio, width) in ratios.items() if ratio + width < 1 - tolerance
                }
                if len(slow) > _SHARE * len(ratios) and slow:
                    worst = min(slow, key=lambda size: slow[size])
                    text = (
                        f"{line.label} in group {group}, {placement.replace('_', ' ')}: slower than the baseline at "
                        f"{len(slow)} of {len(ratios)} sizes, at {worst} bytes {slow[worst]:.2f} of its bus bandwidth"
                    )
                    evidence = {
                        "op": line.op,
                        "group": group,
                        "ratios": {str(s): round(r, 4) for s, r in slow.items()},
                    }
                    findings.append(
                        BandwidthFinding(
                            FindingKind.BELOW_BASELINE, text, ratio=slow[worst], evidence=evidence
                        )
                    )
    if not shared:
        raise UserError(
            "the two measurements share no operation, group, number of ranks, type and size; measure the same again, "
            "with the settings in metadata.json of the baseline"
        )
    if not compared:
        raise UserError(
            "none of the sizes that both measured has a confidence interval, which takes five calls or bursts: measure "
            "again with more of them, e.g. -n 20 collectives.max_iterations=1000"
        )
    if compared < shared:
        warn(
            f"{shared - compared} of {shared} times have fewer than the five calls that intervals take, and aren't judged"
        )
    return findings


def against_limit(results: Results, hardware: HardwareConfig, slow_ratio: float) -> list[BandwidthFinding]:
    """Operations whose best bus bandwidth stays under `slow_ratio` of what links or adapters can do, where that is known.

    Inside a node the reference is that of a group of the same number of devices: on a mesh, two have one link of seven.
    Across nodes it is one adapter's rate, which a sound fabric exceeds: how far, depends on algorithm and scale.
    """
    findings = []
    for (op, group), rows in results.cases().items():
        partition = partition_of(results.metadata, group)
        inside = all(_on_one_node(results.metadata, ranks) for ranks in partition.groups)
        limit = group_limit(hardware, partition.ranks) if inside else hardware.inter_node_gbps
        if not limit or op not in _ON_EVERY_LINK:
            continue
        least = max(_SATURATED_SECONDS, _SATURATED_SECONDS_PER_RANK * partition.ranks)
        rates = [t.bus_bw for row in rows for t in row.timings if t.time_us / 1e6 * t.bus_bw / limit >= least]
        if rates and max(rates) < slow_ratio * limit:
            what = f"links give a group of {partition.ranks}" if inside else "adapters make"
            text = f"{op} in group {group} reaches {max(rates):.3g} GB/s of busbw; {hardware.name}'s {what} {limit:.4g}"
            evidence = {"op": op, "group": group}
            findings.append(
                BandwidthFinding(FindingKind.BELOW_LIMIT, text, ratio=max(rates) / limit, evidence=evidence)
            )
    return findings


def among_peers(results: Results, slow_ratio: float) -> list[BandwidthFinding]:
    """Groups that took longer than others that ran the same at once, in most of the cases."""
    ratios: dict[tuple[str, tuple[int, ...]], list[float]] = {}
    for row in results.rows:
        for ranks, ratio in _group_ratios(results.metadata, row):
            ratios.setdefault((row.group, ranks), []).append(ratio)
    findings = []
    for (group, ranks), values in ratios.items():
        if median(values) < slow_ratio:
            hosts = _hosts(results.metadata, ranks)
            text = (
                f"ranks {', '.join(map(str, ranks))} on {', '.join(hosts)} run at {median(values):.2f} of the rate of the "
                f"other groups of kind {group}"
            )
            findings.append(BandwidthFinding(FindingKind.SLOW_GROUP, text, hosts, ranks, median(values)))
    return findings


def _group_ratios(metadata: Metadata, row: SweepRow) -> Iterator[tuple[tuple[int, ...], float]]:
    """Rate of each group over the median of the groups, where there are three or more."""
    if row.groups < 3 or row.best is None:
        return
    times = row.best.rank_times_us
    means = {
        ranks: fmean(fmean(times[rank]) for rank in ranks)
        for ranks in partition_of(metadata, row.group).groups
    }
    usual = median(means.values())
    for ranks, mean in means.items():
        yield ranks, usual / mean


def pair_rates(results: Results) -> list[tuple[int, int, float]]:
    """Source, target and GB/s of each pair, where pairs were swept: of the largest size, both ways alike."""
    largest: dict[tuple[int, int], tuple[int, float]] = {}
    for row in results.rows:
        if not row.group.startswith("pairs") or row.best is None:
            continue
        for pair in partition_of(results.metadata, row.group).groups:
            rate = row.size / fmean(fmean(row.best.rank_times_us[rank]) for rank in pair) / 1e3
            a, b = pair
            largest[a, b] = largest[b, a] = max(largest.get((a, b), (0, 0.0)), (row.size, rate))
    return [(a, b, rate) for (a, b), (_, rate) in largest.items()]


def partition_of(metadata: Metadata, kind: str) -> GroupPartition:
    """The groups that a row's kind stood for; `pairs3` is the third round of pairs."""
    layout: dict[str, Any] = metadata.settings["layout"]
    if kind.startswith("pairs"):
        return partitions("pairs", _nodes(metadata), layout)[int(kind.removeprefix("pairs")) - 1]
    return partitions(kind, _nodes(metadata), layout)[0]


def _nodes(metadata: Metadata) -> list[int]:
    """The node of each rank, as a number."""
    where = {rank: node for node, host in enumerate(metadata.system["hosts"]) for rank in host["ranks"]}
    return [where[rank] for rank in sorted(where)]


def _on_one_node(metadata: Metadata, ranks: tuple[int, ...]) -> bool:
    nodes = _nodes(metadata)
    return len({nodes[rank] for rank in ranks}) == 1


def _hosts(metadata: Metadata, ranks: tuple[int, ...]) -> tuple[str, ...]:
    """Addresses of the hosts that hold some of `ranks`."""
    return tuple(host["address"] for host in metadata.system["hosts"] if set(ranks) & set(host["ranks"]))
