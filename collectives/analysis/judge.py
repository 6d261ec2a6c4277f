"""What is slow, from measurements alone: findings that a person reads and the orchestrator can cordon on. Pure.

A fault is named where its cause is, once: a host without its CPU also sends slowly, so hosts are judged first, then
adapters by all of their peers, then what is left pair by pair. Noise only ever adds time, and comes and goes: a path
is slow whose quick messages are far slower than the quick ones of sound paths, and slower than their usual ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any

import numpy as np

from collectives.analysis.expected import ExpectedTimes, expected_times
from collectives.analysis.probes import Endpoint, Ints, Pair, Probes
from configs.hardware import HardwareConfig


class FindingKind(StrEnum):
    """What was found."""

    SLOW_HOST = "slow_host"
    SLOW_DEVICE = "slow_device"
    SLOW_NIC = "slow_nic"
    SLOW_LINK = "slow_link"
    ASYMMETRIC_PAIR = "asymmetric_pair"
    FLAPPING = "flapping"
    COLD_START = "cold_start"
    SLOW_GROUP = "slow_group"
    BELOW_LIMIT = "below_limit"
    BELOW_BASELINE = "below_baseline"
    WRONG_DATA = "wrong_data"
    PROBE_FAILED = "probe_failed"
    UNCAPTURED = "uncaptured"
    """Launched one by one where a graph was to be replayed."""


_ACTIONS = {
    FindingKind.SLOW_HOST: ("critical", "cordon"),
    FindingKind.SLOW_DEVICE: ("critical", "cordon"),
    FindingKind.SLOW_NIC: ("critical", "cordon"),
    FindingKind.WRONG_DATA: ("critical", "inspect"),
    FindingKind.SLOW_LINK: ("warning", "inspect"),
    FindingKind.ASYMMETRIC_PAIR: ("warning", "inspect"),
    FindingKind.FLAPPING: ("warning", "inspect"),
    FindingKind.SLOW_GROUP: ("warning", "inspect"),
    FindingKind.BELOW_LIMIT: ("warning", "inspect"),
    FindingKind.BELOW_BASELINE: ("warning", "inspect"),
    FindingKind.PROBE_FAILED: ("warning", "inspect"),
    FindingKind.UNCAPTURED: ("warning", "inspect"),
    FindingKind.COLD_START: ("info", "none"),
}


@dataclass(frozen=True)
class BandwidthFinding:
    """Something that is slow or wrong."""

    kind: FindingKind
    what: str
    """One sentence, with figures."""
    hosts: tuple[str, ...] = ()
    """Addresses of the hosts to blame; two for a pair."""
    ranks: tuple[int, ...] = ()
    ratio: float | None = None
    """Measured rate over the reference; below 1 is slow."""
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def severity(self) -> str:
        """`critical`, `warning` or `info`."""
        return _ACTIONS[self.kind][0]

    @property
    def action(self) -> str:
        """`cordon` where the hosts should get no work, `inspect`, or `none`."""
        return _ACTIONS[self.kind][1]

    def __str__(self) -> str:
        return f"{self.severity} {self.kind}: {self.what}"

    def to_json(self) -> dict[str, Any]:
        """As a plain tree."""
        return asdict(self) | {
            "severity": self.severity,
            "action": self.action,
            "where": ", ".join(self.hosts),
        }


_SLOW_BY_NATURE = 0.05
"""Share of messages that are slow on a sound path, at least."""
_CHANCE = 1e-3
"""False-alarm probability per study of calling a sound path flapping."""
_COLD_FACTOR, _COLD_SECONDS = 10.0, 0.25
"""A first message is cold that takes this many times what the others' take, and this much longer."""


def judge(probes: Probes, slow_ratio: float, hardware: HardwareConfig) -> list[BandwidthFinding]:
    """Findings about hosts, adapters, links and pairs, the most serious first; empty where all is well.

    Args:
        probes: at least two endpoints and their directions.
        slow_ratio: rate over that of the peers below which something is slow, in (0, 1).
        hardware: what joins the endpoints, and how fast that is made to be.
    """
    broken = _broken(probes)
    if broken:
        return broken
    findings = _slow_endpoints(probes.endpoints, slow_ratio)
    unexplained = _UnexplainedPaths.of(probes, {rank for finding in findings for rank in finding.ranks})
    if unexplained.rows.size:
        # Of all paths: a blamed host's are slow, and don't reach the fastest third as long as most hosts are expected.
        expected = expected_times(probes, hardware, slow_ratio)
        findings += _slow_paths(unexplained, expected, slow_ratio)
        findings += _flapping(unexplained, expected)
        findings += _cold(unexplained)
        findings += _below_limit(expected, hardware, slow_ratio)
    return sorted(findings, key=lambda finding: list(_ACTIONS).index(finding.kind))


def suspects(probes: Probes, slow_ratio: float, hardware: HardwareConfig) -> set[Pair]:
    """Pairs that look slow or unsteady and are worth a second look: no slow host explains it, and none was alone yet."""
    if _broken(probes):
        return set()
    unexplained = _UnexplainedPaths.of(probes, suspect_endpoints(probes.endpoints, slow_ratio))
    if not unexplained.rows.size:
        return set()
    expected, table = expected_times(probes, hardware, slow_ratio), probes.table
    slow = unexplained.rows[table.quick[unexplained.rows] > expected.limit[unexplained.rows]].tolist()
    confirmed = {
        row for row in slow if any(min(one) > expected.limit[row] for one in probes.directions[row].alone)
    }
    unsteady = {table.pair(row) for row, _ in _unsteady(unexplained, expected, spared=0)}
    return {table.pair(row) for row in slow if row not in confirmed} | unsteady


def suspect_endpoints(endpoints: Sequence[Endpoint], slow_ratio: float) -> set[int]:
    """Ranks that look slow by themselves and are worth a second look."""
    valid = [e for e in endpoints if e.cpu_seconds and _is_measurable((*e.cpu_seconds, *e.device_seconds))]
    return {rank for finding in _slow_endpoints(valid, slow_ratio) for rank in finding.ranks}


@dataclass(frozen=True)
class _UnexplainedPaths:
    """The directions that no slow host or device explains."""

    probes: Probes
    rows: Ints
    """Rows of the probes' table."""

    @classmethod
    def of(cls, probes: Probes, blamed: set[int]) -> _UnexplainedPaths:
        table = probes.table
        ranks = np.array(sorted(blamed), dtype=np.int64)
        explained = np.isin(table.source, ranks) | np.isin(table.target, ranks)
        return cls(probes, np.flatnonzero(~explained))


def _broken(probes: Probes) -> list[BandwidthFinding]:
    """Figures that no measurement can give: the instrument is at fault, and nothing else is judged."""
    findings = []
    for endpoint in probes.endpoints:
        if not _is_measurable((*endpoint.cpu_seconds, *endpoint.device_seconds)) or not endpoint.cpu_seconds:
            text = f"the probe of {endpoint.name} gave {list(endpoint.cpu_seconds)} s"
            findings.append(
                BandwidthFinding(FindingKind.PROBE_FAILED, text, (endpoint.host,), (endpoint.rank,))
            )
    # All at once, since messages are millions: a time that isn't above zero and finite is missing in the count.
    good = ((probes.table.messages > 0) & np.isfinite(probes.table.messages)).sum(axis=(1, 2)).tolist()
    for d, right in zip(probes.directions, good, strict=True):
        lengths = [len(one) for one in d.passes]
        if not right or right < sum(lengths) or not all(lengths):
            text = f"messages from rank {d.source} to rank {d.target} gave no times that can be right"
            where = (tuple(probes.hosts[r] for r in d.pair), d.pair)
            findings.append(BandwidthFinding(FindingKind.PROBE_FAILED, text, *where))
    return findings


def _is_measurable(times: Sequence[float]) -> bool:
    return all(math.isfinite(t) and t > 0 for t in times)


def _slow_endpoints(endpoints: Sequence[Endpoint], slow_ratio: float) -> list[BandwidthFinding]:
    """Hosts and devices that do the same work more slowly than the fastest half of their peers."""
    findings = []
    kinds = (
        (FindingKind.SLOW_HOST, "interpreter", {e.rank: min(e.cpu_seconds) for e in endpoints}),
        (
            FindingKind.SLOW_DEVICE,
            "matmul",
            {e.rank: min(e.device_seconds) for e in endpoints if e.device_seconds},
        ),
    )
    for kind, work, seconds in kinds:
        if not seconds:
            continue
        ordered = sorted(seconds.values())
        usual = median(ordered[: math.ceil(len(ordered) / 2)])
        for endpoint in endpoints:
            ratio = usual / seconds.get(endpoint.rank, usual)
            if ratio < slow_ratio:
                text = (
                    f"{endpoint.name} does the {work} probe in {seconds[endpoint.rank] * 1e3:.3g} ms, its peers in "
                    f"{usual * 1e3:.3g} ms"
                )
                findings.append(BandwidthFinding(kind, text, (endpoint.host,), (endpoint.rank,), ratio))
    return findings


@dataclass
class _PathsOfRank:
    """The slow directions of one rank, by kind of path."""

    all: dict[tuple[str, int], int] = field(default_factory=dict)
    """Number of its directions, by `sending` or `receiving` and kind."""
    slow: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """Their rates over those of sound paths."""

    def bad(self) -> dict[tuple[str, int], float]:
        """Where all of two directions or more are slow, and the best of their rates: an adapter is as fast as that."""
        return {
            way: max(ratios)
            for way, ratios in self.slow.items()
            if len(ratios) == self.all[way] and len(ratios) > 1
        }


def _slow_paths(
    unexplained: _UnexplainedPaths, expected: ExpectedTimes, slow_ratio: float
) -> list[BandwidthFinding]:
    """Adapters that are slow towards all peers, then pairs and directions that no adapter explains."""
    table, hosts = unexplained.probes.table, unexplained.probes.hosts
    is_slow = table.quick > expected.limit
    slow = {
        table.pair(row): (row, float(expected.quick[row] / table.quick[row]))
        for row in unexplained.rows[is_slow[unexplained.rows]].tolist()
    }
    if not slow:
        return []
    ways: dict[int, _PathsOfRank] = {rank: _PathsOfRank() for pair in slow for rank in pair}
    for row in unexplained.rows.tolist():
        pair = table.pair(row)
        for rank, name in zip(pair, ("sending", "receiving"), strict=True):
            if (mine := ways.get(rank)) is not None:
                way = (name, int(expected.of[row]))
                mine.all[way] = mine.all.get(way, 0) + 1
                if pair in slow:
                    mine.slow.setdefault(way, []).append(slow[pair][1])
    findings: list[BandwidthFinding] = []
    bad_ranks: dict[int, float] = {}
    for rank in sorted(ways):
        if bad := ways[rank].bad():
            names = [name for name in ("sending", "receiving") if any(way[0] == name for way in bad)]
            ratio = min(bad.values())
            bad_ranks[rank] = ratio if all(expected.kinds[kind].equal for _, kind in bad) else 0.0
            text = f"{hosts[rank]} rank {rank} is slow {' and '.join(names)}, to all peers: {ratio:.2f} of their rate"
            evidence = {"directions": names}
            findings.append(
                BandwidthFinding(FindingKind.SLOW_NIC, text, (hosts[rank],), (rank,), ratio, evidence)
            )
    rest = {}
    for pair, (row, ratio) in slow.items():
        # One that is far slower than its adapter has a fault of its own. Where paths differ by nature, nothing
        # distinguishes the two.
        own = [slow_ratio * bad_ranks[rank] for rank in pair if rank in bad_ranks]
        if not own or (expected.kinds[expected.of[row]].equal and all(ratio <= least for least in own)):
            rest[pair] = ratio
    return findings + _slow_pairs(hosts, rest)


def _slow_pairs(hosts: Mapping[int, str], slow: Mapping[Pair, float]) -> list[BandwidthFinding]:
    """Links that are slow both ways, and directions that are slow alone."""
    findings = []
    for a, b in sorted({(min(p), max(p)) for p in slow}):
        bad_ways = [p for p in ((a, b), (b, a)) if p in slow]
        ratio = min(slow[p] for p in bad_ways)
        where = (tuple(hosts[r] for r in (a, b)), (a, b), ratio)
        if len(bad_ways) == 2:
            text = f"{hosts[a]} and {hosts[b]} (ranks {a}, {b}) reach {ratio:.2f} of the rate of other pairs, both ways"
            findings.append(BandwidthFinding(FindingKind.SLOW_LINK, text, *where))
        else:
            source, target = bad_ways[0]
            text = (
                f"{hosts[source]} to {hosts[target]} (ranks {source}, {target}) reaches {ratio:.2f} of the rate of other "
                "pairs; the way back is as fast as they are"
            )
            evidence = {"source": source, "target": target}
            findings.append(BandwidthFinding(FindingKind.ASYMMETRIC_PAIR, text, *where, evidence))
    return findings


def _below_limit(
    expected: ExpectedTimes, hardware: HardwareConfig, slow_ratio: float
) -> list[BandwidthFinding]:
    """Kinds of path whose fastest are far slower than the hardware is made for."""
    findings = []
    for kind, rate in zip(expected.kinds, expected.rates, strict=True):
        if kind.gbps and rate is not None and rate < slow_ratio * kind.gbps:
            text = f"the fastest {kind.name} reach {rate:.3g} GB/s of the {kind.gbps:.4g} that {hardware.name}'s reach"
            findings.append(BandwidthFinding(FindingKind.BELOW_LIMIT, text, ratio=rate / kind.gbps))
    return findings


def _flapping(unexplained: _UnexplainedPaths, expected: ExpectedTimes) -> list[BandwidthFinding]:
    """Pairs that are fast at times and slow at others, more often than their peers, or the adapter of all."""
    table, hosts = unexplained.probes.table, unexplained.probes.hosts
    shares: dict[Pair, dict[Pair, float]] = {}
    for row, share in _unsteady(unexplained, expected, spared=1):
        source, target = table.pair(row)
        shares.setdefault((min(source, target), max(source, target)), {})[source, target] = share
    if len(shares) > 1:
        for rank in sorted(set.intersection(*(set(pair) for pair in shares))):
            peers = table.source[unexplained.rows[table.target[unexplained.rows] == rank]].tolist()
            if shares.keys() == {(min(rank, peer), max(rank, peer)) for peer in peers}:
                host, share = hosts[rank], median(max(ways.values()) for ways in shares.values())
                text = (
                    f"{host} rank {rank} flaps: {share:.0%} of the messages with each of its peers are slow"
                )
                return [BandwidthFinding(FindingKind.FLAPPING, text, (host,), (rank,), 1 - share)]
    return [_flapping_pair(hosts, pair, ways) for pair, ways in sorted(shares.items())]


def _flapping_pair(hosts: Mapping[int, str], pair: Pair, ways: Mapping[Pair, float]) -> BandwidthFinding:
    source, target = next(iter(ways)) if len(ways) == 1 else pair
    joint, share = ("and" if len(ways) == 2 else "to"), max(ways.values())
    text = (
        f"{hosts[source]} {joint} {hosts[target]} (ranks {source}, {target}) flap: {share:.0%} of the messages are "
        "slow, the others as fast as those of other pairs"
    )
    where = ((hosts[source], hosts[target]), (source, target))
    evidence = {"directions": [list(way) for way in ways]}
    return BandwidthFinding(FindingKind.FLAPPING, text, *where, 1 - share, evidence)


def _unsteady(
    unexplained: _UnexplainedPaths, expected: ExpectedTimes, spared: int
) -> list[tuple[int, float]]:
    """Rows of directions that are neither slow nor fast throughout, and their share of slow messages.

    Of several passes the `spared` worst ones don't count: what happens in one alone is noise.
    """
    table = unexplained.probes.table
    rows = unexplained.rows[table.quick[unexplained.rows] <= expected.limit[unexplained.rows]]
    if not rows.size:
        return []
    messages = table.messages[rows]
    there, slow = np.isfinite(messages), messages > expected.slow[rows, None, None]
    sizes, late = there.sum(axis=2), slow.sum(axis=2)  # [P, passes]
    share = np.where(sizes > 0, late / np.maximum(sizes, 1), np.inf)
    kept = np.maximum(1, (sizes > 0).sum(axis=1) - spared)
    counts = np.argsort(np.argsort(share, axis=1, kind="stable"), axis=1, kind="stable") < kept[:, None]
    number, total = (late * counts).sum(axis=1), (sizes * counts).sum(axis=1)
    shares = number / total
    usual = max(_SLOW_BY_NATURE, float(np.sort(shares)[(len(shares) - 1) // 2]))
    chances = {
        (k, n): _at_least(k, n, usual) for k, n in set(zip(number.tolist(), total.tolist(), strict=True))
    }
    return [
        (row, slow_share)
        for row, slow_share, k, n in zip(
            rows.tolist(), shares.tolist(), number.tolist(), total.tolist(), strict=True
        )
        if len(rows) * chances[k, n] < _CHANCE
    ]


def _at_least(count: int, of: int, chance: float) -> float:
    """Probability of `count` or more of `of`, each with `chance`."""
    return sum(math.comb(of, k) * chance**k * (1 - chance) ** (of - k) for k in range(count, of + 1))


def _cold(unexplained: _UnexplainedPaths) -> list[BandwidthFinding]:
    """Pairs whose first message takes far longer than the first messages of others."""
    table, hosts = unexplained.probes.table, unexplained.probes.hosts
    usual = float(np.median(table.first[unexplained.rows]))
    findings = []
    for row in unexplained.rows[
        table.first[unexplained.rows] > max(_COLD_FACTOR * usual, usual + _COLD_SECONDS)
    ].tolist():
        (source, target), first = table.pair(row), float(table.first[row])
        text = (
            f"the first message from {hosts[source]} to {hosts[target]} (ranks {source}, {target}) took "
            f"{first:.3g} s, that of others {usual:.3g} s"
        )
        where = ((hosts[source], hosts[target]), (source, target))
        findings.append(BandwidthFinding(FindingKind.COLD_START, text, *where, usual / first))
    return findings
