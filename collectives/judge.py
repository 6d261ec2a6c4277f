"""What is slow, from measurements alone: findings that a person reads and the orchestrator can cordon on. Pure.

A fault is named where its cause is, once: a host without its CPU also sends slowly, so hosts are judged first, then
adapters by all of their peers, then what is left pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import fmean, median
from typing import Any


class Kind(StrEnum):
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


_ACTIONS = {
    Kind.SLOW_HOST: ("critical", "cordon"),
    Kind.SLOW_DEVICE: ("critical", "cordon"),
    Kind.SLOW_NIC: ("critical", "cordon"),
    Kind.WRONG_DATA: ("critical", "inspect"),
    Kind.SLOW_LINK: ("warning", "inspect"),
    Kind.ASYMMETRIC_PAIR: ("warning", "inspect"),
    Kind.FLAPPING: ("warning", "inspect"),
    Kind.SLOW_GROUP: ("warning", "inspect"),
    Kind.BELOW_LIMIT: ("warning", "inspect"),
    Kind.BELOW_BASELINE: ("warning", "inspect"),
    Kind.PROBE_FAILED: ("warning", "inspect"),
    Kind.COLD_START: ("info", "none"),
}


@dataclass(frozen=True)
class Finding:
    """Something that is slow or wrong."""

    kind: Kind
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


@dataclass(frozen=True)
class Endpoint:
    """What is probed: a rank on its host, with its adapter and its device."""

    rank: int
    host: str
    """Address."""
    lane: int
    """Rank within the host; endpoints of one lane are paired across hosts."""
    cpu_seconds: tuple[float, ...]
    """Repeats of a fixed piece of work in the interpreter."""
    device_seconds: tuple[float, ...] = ()
    """Repeats of a fixed matmul; empty without a GPU."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.host} rank {self.rank}"


@dataclass(frozen=True)
class Direction:
    """Messages from one endpoint to another, each acknowledged; in seconds."""

    source: int
    """Rank."""
    target: int
    first: float
    """The very first message, which sets up the connection."""
    passes: tuple[tuple[float, ...], ...]
    """Messages of each pass, in order."""

    @property
    def seconds(self) -> float:
        """The median of the best pass: noise comes and goes, a fault stays."""
        return min(map(median, self.passes))


@dataclass(frozen=True)
class Probes:
    """All that the fault study measured."""

    size: int
    """Bytes of a message."""
    endpoints: tuple[Endpoint, ...]
    directions: tuple[Direction, ...]

    def rates(self) -> list[tuple[int, int, float]]:
        """Source rank, target rank, GB/s."""
        return [(d.source, d.target, self.size / d.seconds / 1e9) for d in self.directions]


_SLOW_BY_NATURE = 0.05
"""Share of messages that are slow on a sound path, at least."""
_CHANCE = 1e-3
"""Of calling any sound path flapping."""
_COLD_FACTOR, _COLD_SECONDS = 10.0, 0.25
"""A first message is cold that takes this many times what the others' take, and this much longer."""


def judge(probes: Probes, slow_ratio: float, limit_gbps: float | None) -> list[Finding]:
    """Findings about hosts, adapters, links and pairs, the most serious first; empty where all is well.

    Args:
        probes: at least two endpoints and their directions.
        slow_ratio: rate over that of the peers below which something is slow, in (0, 1).
        limit_gbps: rate that the hardware is made for, in GB/s; None where it is unknown.
    """
    broken = _broken(probes)
    if broken:
        return broken
    found = _slow_endpoints(probes.endpoints, slow_ratio)
    blamed = {rank for finding in found for rank in finding.ranks}
    left = [d for d in probes.directions if not blamed & {d.source, d.target}]
    if left:
        best = _reference(d.seconds for d in left)
        found += _slow_paths(probes, left, best, slow_ratio)
        found += _flapping(probes, left, best / slow_ratio)
        found += _cold(probes, left)
        rate = probes.size / best / 1e9
        if limit_gbps and rate < slow_ratio * limit_gbps:
            text = (
                f"the fastest pairs reach {rate:.3g} GB/s of the {limit_gbps:g} that the hardware is made for"
            )
            found.append(Finding(Kind.BELOW_LIMIT, text, ratio=rate / limit_gbps))
    return sorted(found, key=lambda finding: list(_ACTIONS).index(finding.kind))


def suspects(probes: Probes, slow_ratio: float) -> set[tuple[int, int]]:
    """Pairs, as source and target, that look slow or unsteady and are worth a second look."""
    if _broken(probes):
        return set()
    slow = _reference(d.seconds for d in probes.directions) / slow_ratio
    return {(d.source, d.target) for d in probes.directions if d.seconds > slow} | {
        (finding.ranks[0], finding.ranks[1]) for finding in _flapping(probes, probes.directions, slow)
    }


def _broken(probes: Probes) -> list[Finding]:
    """Figures that no measurement can give: the instrument is at fault, and nothing else is judged."""
    found = []
    for endpoint in probes.endpoints:
        if not _sound((*endpoint.cpu_seconds, *endpoint.device_seconds)) or not endpoint.cpu_seconds:
            text = f"the probe of {endpoint.name} gave {list(endpoint.cpu_seconds)} s"
            found.append(Finding(Kind.PROBE_FAILED, text, (endpoint.host,), (endpoint.rank,)))
    hosts = {endpoint.rank: endpoint.host for endpoint in probes.endpoints}
    for d in probes.directions:
        if not d.passes or not all(times and _sound(times) for times in d.passes):
            text = f"messages from rank {d.source} to rank {d.target} gave no times that can be right"
            pair = (d.source, d.target)
            found.append(Finding(Kind.PROBE_FAILED, text, tuple(hosts[r] for r in pair), pair))
    return found


def _sound(times: Iterable[float]) -> bool:
    return all(math.isfinite(t) and t > 0 for t in times)


def _reference(seconds: Iterable[float]) -> float:
    """Median of the fastest third: healthy as long as a third of the paths are."""
    ordered = sorted(seconds)
    return median(ordered[: max(1, math.ceil(len(ordered) / 3))])


def _slow_endpoints(endpoints: Sequence[Endpoint], slow_ratio: float) -> list[Finding]:
    """Hosts and devices that do the same work more slowly than the fastest half of their peers."""
    found = []
    kinds = (
        (Kind.SLOW_HOST, "interpreter", {e.rank: min(e.cpu_seconds) for e in endpoints}),
        (Kind.SLOW_DEVICE, "matmul", {e.rank: min(e.device_seconds) for e in endpoints if e.device_seconds}),
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
                found.append(Finding(kind, text, (endpoint.host,), (endpoint.rank,), ratio))
    return found


def _slow_paths(probes: Probes, left: Sequence[Direction], best: float, slow_ratio: float) -> list[Finding]:
    """Adapters that are slow towards all peers, then pairs and directions that no adapter explains."""
    hosts = {endpoint.rank: endpoint.host for endpoint in probes.endpoints}
    slow = {(d.source, d.target): best / d.seconds for d in left if best / d.seconds < slow_ratio}
    found: list[Finding] = []
    explained: set[tuple[int, int]] = set()
    for rank in sorted({rank for d in left for rank in (d.source, d.target)}):
        sends = [(d.source, d.target) for d in left if d.source == rank]
        receives = [(d.source, d.target) for d in left if d.target == rank]
        if len(sends) < 2:
            continue  # with one peer, an adapter can't be told from a link
        bad = [
            name for name, pairs in (("sending", sends), ("receiving", receives)) if slow.keys() >= set(pairs)
        ]
        if bad:
            mine = [p for p in (*sends, *receives) if p in slow]
            ratio = median(slow[p] for p in mine)
            text = f"{hosts[rank]} rank {rank} is slow {' and '.join(bad)}, to all peers: {ratio:.2f} of the rate of others"
            found.append(Finding(Kind.SLOW_NIC, text, (hosts[rank],), (rank,), ratio, {"directions": bad}))
            explained.update(mine)
    for a, b in sorted({(min(p), max(p)) for p in slow.keys() - explained}):
        bad_ways = [p for p in ((a, b), (b, a)) if p in slow]
        ratio = min(slow[p] for p in bad_ways)
        where = (tuple(hosts[r] for r in (a, b)), (a, b), ratio)
        if len(bad_ways) == 2:
            text = f"{hosts[a]} and {hosts[b]} (ranks {a}, {b}) reach {ratio:.2f} of the rate of other pairs, both ways"
            found.append(Finding(Kind.SLOW_LINK, text, *where))
        else:
            source, target = bad_ways[0]
            text = (
                f"{hosts[source]} to {hosts[target]} (ranks {source}, {target}) reaches {ratio:.2f} of the rate of other "
                "pairs; the way back is as fast as they are"
            )
            found.append(Finding(Kind.ASYMMETRIC_PAIR, text, *where, {"source": source, "target": target}))
    return found


def _flapping(probes: Probes, left: Sequence[Direction], slow_seconds: float) -> list[Finding]:
    """Directions that are fast at times and slow at others, more often than their peers."""
    hosts = {endpoint.rank: endpoint.host for endpoint in probes.endpoints}
    messages = {
        d: [t > slow_seconds for one in d.passes for t in one] for d in left if d.seconds <= slow_seconds
    }
    usual = max(_SLOW_BY_NATURE, median(map(fmean, messages.values()))) if messages else 1.0
    found = []
    for d, slow in messages.items():
        if len(messages) * _at_least(sum(slow), len(slow), usual) < _CHANCE:
            text = (
                f"{hosts[d.source]} to {hosts[d.target]} (ranks {d.source}, {d.target}) flaps: {sum(slow)} of its "
                f"{len(slow)} messages are slow, and {usual:.0%} would be usual"
            )
            pair = (d.source, d.target)
            found.append(Finding(Kind.FLAPPING, text, tuple(hosts[r] for r in pair), pair, 1 - fmean(slow)))
    return found


def _at_least(count: int, of: int, chance: float) -> float:
    """Probability of `count` or more of `of`, each with `chance`."""
    return sum(math.comb(of, k) * chance**k * (1 - chance) ** (of - k) for k in range(count, of + 1))


def _cold(probes: Probes, left: Sequence[Direction]) -> list[Finding]:
    """Pairs whose first message takes far longer than the first messages of others."""
    hosts = {endpoint.rank: endpoint.host for endpoint in probes.endpoints}
    usual = median(d.first for d in left)
    return [
        Finding(
            Kind.COLD_START,
            f"the first message from {hosts[d.source]} to {hosts[d.target]} (ranks {d.source}, {d.target}) took "
            f"{d.first:.3g} s, that of others {usual:.3g} s",
            (hosts[d.source], hosts[d.target]),
            (d.source, d.target),
            usual / d.first,
        )
        for d in left
        if d.first > max(_COLD_FACTOR * usual, usual + _COLD_SECONDS)
    ]
