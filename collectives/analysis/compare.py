"""A measurement against an earlier one, against what the hardware is made for, and its groups against each other. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, median
from typing import Any

from collectives.analysis.judge import Finding, Kind
from collectives.ops.groups import Partition, partitions
from collectives.store.results import Metadata, Results, Row
from collectives.store.series import Baseline, groups, series
from configs.errors import UserError
from configs.schema import HardwareConfig

_SHARE = 0.1
"""Share of the compared sizes that must be slower before an operation is: one of many may be, by chance."""
_BANDWIDTH_BOUND = 64 << 20
"""Bytes from which a call is bound by bandwidth."""
_ON_EVERY_LINK = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def against_baseline(results: Results, baseline: Results, tolerance: float) -> list[Finding]:
    """Operations whose bus bandwidth fell by more than `tolerance`, beyond both confidence intervals.

    Raises:
        UserError: where the two share no case.
    """
    before, found, compared = Baseline(baseline), [], 0
    for group in groups(results):
        for line in series(results.rows, group, variants=1 << 30)[0]:
            for placement in ("in_place", "out_of_place"):
                ratios = before.ratios(line, placement)
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
                    found.append(Finding(Kind.BELOW_BASELINE, text, ratio=slow[worst], evidence=evidence))
    if not compared:
        raise UserError(
            "the two measurements share no operation, group, number of ranks, type and size; measure the same again, "
            "with the settings in metadata.json of the baseline"
        )
    return found


def against_limit(results: Results, hardware: HardwareConfig, slow_ratio: float) -> list[Finding]:
    """Operations whose best bus bandwidth stays under `slow_ratio` of the links' rate, where that is known."""
    found = []
    for (op, group), rows in results.cases().items():
        partition = partition_of(results.metadata, group)
        inside = all(_on_one_node(results.metadata, ranks) for ranks in partition.groups)
        limit = hardware.intra_node_gbps if inside else hardware.inter_node_gbps
        rates = [t.bus_bw for row in rows if row.size >= _BANDWIDTH_BOUND for t in row.timings]
        if limit and rates and op in _ON_EVERY_LINK and max(rates) < slow_ratio * limit:
            what = "links in a node" if inside else "network"
            text = f"{op} in group {group} reaches {max(rates):.3g} GB/s of busbw; {hardware.name}'s {what} make {limit:g}"
            found.append(
                Finding(Kind.BELOW_LIMIT, text, ratio=max(rates) / limit, evidence={"op": op, "group": group})
            )
    return found


def among_peers(results: Results, slow_ratio: float) -> list[Finding]:
    """Groups that took longer than others that ran the same at once, in most of the cases."""
    ratios: dict[tuple[str, tuple[int, ...]], list[float]] = {}
    for row in results.rows:
        for ranks, ratio in _group_ratios(results.metadata, row):
            ratios.setdefault((row.group, ranks), []).append(ratio)
    found = []
    for (group, ranks), values in ratios.items():
        if median(values) < slow_ratio:
            hosts = _hosts(results.metadata, ranks)
            text = (
                f"ranks {', '.join(map(str, ranks))} on {', '.join(hosts)} run at {median(values):.2f} of the rate of the "
                f"other groups of kind {group}"
            )
            found.append(Finding(Kind.SLOW_GROUP, text, hosts, ranks, median(values)))
    return found


def _group_ratios(metadata: Metadata, row: Row) -> Iterator[tuple[tuple[int, ...], float]]:
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
    found: dict[tuple[int, int], tuple[int, float]] = {}
    for row in results.rows:
        if not row.group.startswith("pairs") or row.best is None:
            continue
        for pair in partition_of(results.metadata, row.group).groups:
            rate = row.size / fmean(fmean(row.best.rank_times_us[rank]) for rank in pair) / 1e3
            a, b = pair
            found[a, b] = found[b, a] = max(found.get((a, b), (0, 0.0)), (row.size, rate))
    return [(a, b, rate) for (a, b), (_, rate) in found.items()]


def partition_of(metadata: Metadata, kind: str) -> Partition:
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
