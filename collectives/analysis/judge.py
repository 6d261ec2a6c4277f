"""What is slow, from measurements alone: findings that a person reads and the orchestrator can cordon on. Pure.

A fault is named where its cause is, once: a host without its CPU also sends slowly, so hosts are judged first, then
adapters by all of their peers, then what is left pair by pair. Noise only ever adds time, and comes and goes: a path
is slow whose quick messages are far slower than the quick ones of sound paths, and slower than their usual ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import fmean, median, median_high
from typing import Any

from collectives.analysis.probes import Direction, Endpoint, Pair, Probes


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
        # Of all paths: a blamed host's are slow, and don't reach the fastest third as long as most hosts are sound.
        sound = _sound_path(probes, slow_ratio)
        found += _slow_paths(probes, left, sound, slow_ratio)
        found += _flapping(probes, left, sound)
        found += _cold(probes, left)
        rate = probes.size / sound.usual / 1e9
        if limit_gbps and rate < slow_ratio * limit_gbps:
            text = (
                f"the fastest pairs reach {rate:.3g} GB/s of the {limit_gbps:g} that the hardware is made for"
            )
            found.append(Finding(Kind.BELOW_LIMIT, text, ratio=rate / limit_gbps))
    return sorted(found, key=lambda finding: list(_ACTIONS).index(finding.kind))


def suspects(probes: Probes, slow_ratio: float) -> set[Pair]:
    """Pairs that look slow or unsteady and are worth a second look: no slow host explains it, and none was alone yet."""
    if _broken(probes):
        return set()
    sound = _sound_path(probes, slow_ratio)
    explained = suspect_endpoints(probes.endpoints, slow_ratio)
    left = [d for d in probes.directions if not explained & {d.source, d.target}]
    confirmed = {d for d in left if any(min(one) > sound.limit for one in d.alone)}
    return {(d.source, d.target) for d in left if d.quick > sound.limit and d not in confirmed} | {
        pair for pair, _ in _unsteady(left, sound, spared=0)
    }


def suspect_endpoints(endpoints: Sequence[Endpoint], slow_ratio: float) -> set[int]:
    """Ranks that look slow by themselves and are worth a second look."""
    sound = [e for e in endpoints if e.cpu_seconds and _sound((*e.cpu_seconds, *e.device_seconds))]
    return {rank for finding in _slow_endpoints(sound, slow_ratio) for rank in finding.ranks}


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


@dataclass(frozen=True)
class _SoundPath:
    """Seconds of messages on a path that nothing is wrong with."""

    quick: float
    usual: float
    limit: float
    """A path is slow whose quick messages take longer."""
    slow: float
    """A message is slow that takes longer."""


def _sound_path(probes: Probes, slow_ratio: float) -> _SoundPath:
    """The median of the fastest third of paths, as long as a third of them are sound.

    Of two middle ones the slower: a single path that is faster than the others makes none of them slow.
    """
    fastest = sorted(probes.directions, key=lambda d: d.quick)[: math.ceil(len(probes.directions) / 3)]
    quick, usual = median_high(d.quick for d in fastest), median_high(d.seconds for d in fastest)
    return _SoundPath(quick, usual, max(quick / slow_ratio, usual), usual / slow_ratio)


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


def _slow_paths(
    probes: Probes, left: Sequence[Direction], sound: _SoundPath, slow_ratio: float
) -> list[Finding]:
    """Adapters that are slow towards all peers, then pairs and directions that no adapter explains."""
    hosts = {endpoint.rank: endpoint.host for endpoint in probes.endpoints}
    slow = {(d.source, d.target): sound.quick / d.quick for d in left if d.quick > sound.limit}
    found: list[Finding] = []
    explained: set[Pair] = set()
    for rank in sorted({rank for d in left for rank in (d.source, d.target)}):
        ways = {
            "sending": [(d.source, d.target) for d in left if d.source == rank],
            "receiving": [(d.source, d.target) for d in left if d.target == rank],
        }
        if len(ways["sending"]) < 2:
            continue  # with one peer, an adapter can't be told from a link
        bad = [name for name, pairs in ways.items() if slow.keys() >= set(pairs)]
        if bad:
            # An adapter is as fast as the fastest of its paths; one that is far slower has a fault of its own.
            ratio = min(max(slow[p] for p in ways[name]) for name in bad)
            text = f"{hosts[rank]} rank {rank} is slow {' and '.join(bad)}, to all peers: {ratio:.2f} of the rate of others"
            found.append(Finding(Kind.SLOW_NIC, text, (hosts[rank],), (rank,), ratio, {"directions": bad}))
            explained.update(p for p, r in slow.items() if rank in p and r > slow_ratio * ratio)
    return found + _slow_pairs(hosts, {p: ratio for p, ratio in slow.items() if p not in explained})


def _slow_pairs(hosts: Mapping[int, str], slow: Mapping[Pair, float]) -> list[Finding]:
    """Links that are slow both ways, and directions that are slow alone."""
    found = []
    for a, b in sorted({(min(p), max(p)) for p in slow}):
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


def _flapping(probes: Probes, left: Sequence[Direction], sound: _SoundPath) -> list[Finding]:
    """Pairs that are fast at times and slow at others, more often than their peers, or the adapter of all."""
    hosts = {endpoint.rank: endpoint.host for endpoint in probes.endpoints}
    shares: dict[Pair, dict[Pair, float]] = {}
    for (source, target), share in _unsteady(left, sound, spared=1):
        shares.setdefault((min(source, target), max(source, target)), {})[source, target] = share
    if len(shares) > 1:
        for rank, host in hosts.items():
            peers = {d.source for d in left if d.target == rank}
            if shares.keys() == {(min(rank, peer), max(rank, peer)) for peer in peers}:
                share = median(max(ways.values()) for ways in shares.values())
                text = (
                    f"{host} rank {rank} flaps: {share:.0%} of the messages with each of its peers are slow"
                )
                return [Finding(Kind.FLAPPING, text, (host,), (rank,), 1 - share)]
    return [_flapping_pair(hosts, pair, ways) for pair, ways in sorted(shares.items())]


def _flapping_pair(hosts: Mapping[int, str], pair: Pair, ways: Mapping[Pair, float]) -> Finding:
    source, target = next(iter(ways)) if len(ways) == 1 else pair
    joint, share = ("and" if len(ways) == 2 else "to"), max(ways.values())
    text = (
        f"{hosts[source]} {joint} {hosts[target]} (ranks {source}, {target}) flap: {share:.0%} of the messages are "
        "slow, the others as fast as those of other pairs"
    )
    where = ((hosts[source], hosts[target]), (source, target))
    return Finding(Kind.FLAPPING, text, *where, 1 - share, {"directions": [list(way) for way in ways]})


def _unsteady(left: Sequence[Direction], sound: _SoundPath, spared: int) -> list[tuple[Pair, float]]:
    """Directions that are neither slow nor fast throughout, and their share of slow messages.

    Of several passes the `spared` worst ones don't count: what happens in one alone is noise.
    """
    messages = {}
    for d in left:
        if d.quick <= sound.limit:
            passes = sorted(([t > sound.slow for t in one] for one in d.passes), key=fmean)
            messages[d] = [slow for one in passes[: max(1, len(passes) - spared)] for slow in one]
    usual = max(_SLOW_BY_NATURE, median(map(fmean, messages.values()))) if messages else 1.0
    return [
        ((d.source, d.target), fmean(slow))
        for d, slow in messages.items()
        if len(messages) * _at_least(sum(slow), len(slow), usual) < _CHANCE
    ]


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
