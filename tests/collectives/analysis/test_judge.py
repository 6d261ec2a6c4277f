"""Each kind of fault is found, named and distinguished; noise isn't one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from collectives.analysis.judge import BandwidthFinding, FindingKind, judge, suspect_endpoints, suspects
from collectives.analysis.probes import Direction, Endpoint, Probes
from collectives.studies.faults import schedule
from configs.hardware import HardwareConfig

pytestmark = pytest.mark.unit

SIZE, SECONDS = 4 << 20, 0.004
PLAIN = HardwareConfig(name="plain", kind="cpu")


def healthy(hosts: int, seed: int = 0, noise: float = 0.15, passes: int = 3, repeats: int = 5) -> Probes:
    """Probes of equal hosts with log-normal noise and a rare slow message."""
    draw = random.Random(seed)

    def message() -> float:
        return SECONDS * draw.lognormvariate(0, noise) * (3.0 if draw.random() < 0.05 else 1.0)

    endpoints = tuple(
        Endpoint(rank, f"10.0.0.{rank + 1}", 0, tuple(0.1 * draw.lognormvariate(0, 0.05) for _ in range(3)))
        for rank in range(hosts)
    )
    directions = tuple(
        Direction(a, b, 2 * message(), tuple(tuple(message() for _ in range(repeats)) for _ in range(passes)))
        for a in range(hosts)
        for b in range(hosts)
        if a != b
    )
    return Probes(SIZE, endpoints, directions)


def slowed(probes: Probes, which: Callable[[int, int], bool], factor: float) -> Probes:
    """`probes` with some directions slower."""
    return replace(
        probes,
        directions=tuple(
            replace(d, passes=tuple(tuple(factor * t for t in one) for one in d.passes))
            if which(d.source, d.target)
            else d
            for d in probes.directions
        ),
    )


def starved(probes: Probes, rank: int, factor: float) -> Probes:
    """`probes` with a host that computes, sends and receives more slowly."""
    slow = slowed(probes, lambda a, b: rank in (a, b), factor)
    endpoints = tuple(
        replace(e, cpu_seconds=tuple(factor * t for t in e.cpu_seconds)) if e.rank == rank else e
        for e in slow.endpoints
    )
    return replace(slow, endpoints=endpoints)


def names(found: list[BandwidthFinding]) -> list[tuple[FindingKind, tuple[int, ...]]]:
    return [(finding.kind, finding.ranks) for finding in found]


@pytest.mark.parametrize("hosts", [2, 3, 4, 16])
def test_nothing_is_named_where_all_is_well(hosts: int) -> None:
    for seed in range(100):
        assert judge(healthy(hosts, seed), 0.6, PLAIN) == []


@pytest.mark.parametrize("hosts", [3, 4, 9])
@pytest.mark.parametrize("seed", range(20))
def test_faults_are_told_apart(hosts: int, seed: int) -> None:
    probes = healthy(hosts, seed)
    bad, other = random.Random(seed).sample(range(hosts), 2)
    assert names(judge(slowed(probes, lambda a, b: bad in (a, b), 4), 0.6, PLAIN)) == [
        (FindingKind.SLOW_NIC, (bad,))
    ]
    pair = (min(bad, other), max(bad, other))
    assert names(judge(slowed(probes, lambda a, b: {a, b} == {bad, other}, 4), 0.6, PLAIN)) == [
        (FindingKind.SLOW_LINK, pair)
    ]
    assert names(judge(starved(probes, bad, 3), 0.6, PLAIN)) == [(FindingKind.SLOW_HOST, (bad,))]
    (one,) = judge(slowed(probes, lambda a, b: (a, b) == (bad, other), 4), 0.6, PLAIN)
    assert (one.kind, one.ranks, one.evidence) == (
        FindingKind.ASYMMETRIC_PAIR,
        pair,
        {"source": bad, "target": other},
    )


def test_an_adapter_that_only_sends_slowly_says_so() -> None:
    (one,) = judge(slowed(healthy(4), lambda a, b: a == 2, 4), 0.6, PLAIN)
    assert (one.kind, one.ranks, one.evidence) == (FindingKind.SLOW_NIC, (2,), {"directions": ["sending"]})
    assert "slow sending, to all peers" in one.what and one.hosts == ("10.0.0.3",)


def test_two_faults_are_both_named_the_worse_first() -> None:
    both = slowed(starved(healthy(6), 0, 3), lambda a, b: {a, b} == {3, 5}, 4)
    assert names(judge(both, 0.6, PLAIN)) == [(FindingKind.SLOW_HOST, (0,)), (FindingKind.SLOW_LINK, (3, 5))]


def test_two_hosts_have_no_adapter_to_blame_but_a_direction() -> None:
    assert names(judge(slowed(healthy(2), lambda a, b: a == 0, 4), 0.6, PLAIN)) == [
        (FindingKind.ASYMMETRIC_PAIR, (0, 1))
    ]


def test_what_is_slow_in_one_pass_alone_is_noise() -> None:
    for seed in range(50):
        probes = healthy(3, seed)
        disturbed = tuple(
            replace(d, passes=(tuple(4 * t for t in d.passes[0]), *d.passes[1:]))
            if 1 in (d.source, d.target)
            else d
            for d in probes.directions
        )
        endpoints = tuple(
            replace(e, cpu_seconds=(3 * e.cpu_seconds[0], *e.cpu_seconds[1:])) if e.rank == 2 else e
            for e in probes.endpoints
        )
        assert judge(replace(probes, endpoints=endpoints, directions=disturbed), 0.6, PLAIN) == []


@pytest.mark.parametrize("hosts", [3, 4])
def test_noise_on_sound_paths_does_not_hide_a_slow_adapter(hosts: int) -> None:
    """As measured with two busy cores: the throttle is steady, and takes less than twice a sound path's median."""
    sound, slow = (24.0, 26.0, 32.0, 33.0, 38.0), (50.0, 51.0, 51.0, 53.0, 60.0)
    probes = healthy(hosts)
    directions = tuple(
        replace(d, passes=((slow if 1 in (d.source, d.target) else sound),) * 3) for d in probes.directions
    )
    assert names(judge(replace(probes, directions=directions), 0.6, PLAIN)) == [(FindingKind.SLOW_NIC, (1,))]
    # Steady messages that are not slower than the usual ones of restless paths are not fault.
    restless, steady = (10.0, 20.0, 40.0, 40.0, 40.0), (35.0,) * 5
    directions = tuple(
        replace(d, passes=((steady if 1 in (d.source, d.target) else restless),) * 3)
        for d in probes.directions
    )
    assert judge(replace(probes, directions=directions), 0.6, PLAIN) == []


@pytest.mark.parametrize("hosts", [3, 4])
def test_a_path_that_is_faster_than_the_others_makes_none_of_them_slow(hosts: int) -> None:
    for seed in range(20):
        assert judge(slowed(healthy(hosts, seed), lambda a, b: (a, b) == (1, 0), 0.1), 0.6, PLAIN) == []


def test_an_adapter_does_not_explain_a_link_that_is_far_slower() -> None:
    both = slowed(slowed(healthy(5), lambda a, b: 2 in (a, b), 3), lambda a, b: {a, b} == {2, 4}, 5)
    assert names(judge(both, 0.6, PLAIN)) == [(FindingKind.SLOW_NIC, (2,)), (FindingKind.SLOW_LINK, (2, 4))]


def test_two_slow_links_of_one_adapter_are_links_as_long_as_a_third_is_sound() -> None:
    ways = {(0, 1), (1, 0), (0, 2), (2, 0)}
    found = judge(slowed(healthy(4), lambda a, b: (a, b) in ways, 4), 0.6, PLAIN)
    assert names(found) == [(FindingKind.SLOW_LINK, (0, 1)), (FindingKind.SLOW_LINK, (0, 2))]


def test_what_is_explained_or_was_slow_alone_is_not_probed_again() -> None:
    slow = slowed(healthy(4), lambda a, b: {a, b} == {1, 3}, 4)
    assert suspects(slow, 0.6, PLAIN) == {(1, 3), (3, 1)} and suspect_endpoints(slow.endpoints, 0.6) == set()
    alone = tuple(replace(d, confirmations=1) for d in slow.directions)
    assert suspects(replace(slow, directions=alone), 0.6, PLAIN) == set()
    host = starved(healthy(4), 1, 3)
    assert suspect_endpoints(host.endpoints, 0.6) == {1} and suspects(host, 0.6, PLAIN) == set()


def test_a_slow_device_is_no_slow_host() -> None:
    probes = healthy(4)
    endpoints = tuple(replace(e, device_seconds=(0.02 if e.rank == 1 else 0.01,)) for e in probes.endpoints)
    assert names(judge(replace(probes, endpoints=endpoints), 0.6, PLAIN)) == [(FindingKind.SLOW_DEVICE, (1,))]


def flapping(hosts: int, which: Callable[[int, int], bool]) -> Probes:
    """Probes in which eight of twenty messages of some directions are slow."""
    probes = healthy(hosts, repeats=20)
    directions = tuple(
        replace(d, passes=tuple((*t[:12], *(9 * late for late in t[12:])) for t in d.passes))
        if which(d.source, d.target)
        else d
        for d in probes.directions
    )
    return replace(probes, directions=directions)


def test_what_comes_and_goes_flaps_and_is_named_once() -> None:
    direction = flapping(4, lambda a, b: (a, b) == (3, 1))
    assert names(judge(direction, 0.6, PLAIN)) == [(FindingKind.FLAPPING, (3, 1))]
    assert (3, 1) in suspects(direction, 0.6, PLAIN)
    (pair,) = judge(flapping(4, lambda a, b: {a, b} == {1, 3}), 0.6, PLAIN)
    assert (pair.kind, pair.ranks, pair.hosts) == (FindingKind.FLAPPING, (1, 3), ("10.0.0.2", "10.0.0.4"))
    assert "10.0.0.2 and 10.0.0.4 (ranks 1, 3) flap: " in pair.what
    (adapter,) = judge(flapping(5, lambda a, b: 2 in (a, b)), 0.6, PLAIN)
    assert (adapter.kind, adapter.ranks, adapter.hosts) == (FindingKind.FLAPPING, (2,), ("10.0.0.3",))
    assert "of the messages with each of its peers are slow" in adapter.what


def test_a_first_message_that_takes_far_longer_is_a_cold_start() -> None:
    probes = healthy(4)
    cold = tuple(replace(d, first=2.0) if (d.source, d.target) == (0, 2) else d for d in probes.directions)
    assert names(judge(replace(probes, directions=cold), 0.6, PLAIN)) == [(FindingKind.COLD_START, (0, 2))]


def test_a_fabric_that_is_slow_as_a_whole_is_below_its_limit() -> None:
    rate = SIZE / SECONDS / 1e9
    made_for = [PLAIN.model_copy(update={"inter_node_gbps": factor * rate}) for factor in (4, 1.2)]
    (finding,) = judge(healthy(4), 0.6, made_for[0])
    assert (finding.kind, finding.ranks, finding.ratio) == (
        FindingKind.BELOW_LIMIT,
        (),
        pytest.approx(0.25, rel=0.1),
    )
    assert f"of the {4 * rate:.4g} that plain's reach" in finding.what
    assert judge(healthy(4), 0.6, made_for[1]) == []


@pytest.mark.parametrize("broken", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_broken_instrument_is_no_slow_host(broken: float) -> None:
    probes = starved(healthy(4), 0, 3)
    endpoints = (replace(probes.endpoints[1], cpu_seconds=(broken,)), *probes.endpoints[2:])
    found = judge(replace(probes, endpoints=endpoints), 0.6, PLAIN)
    assert names(found) == [(FindingKind.PROBE_FAILED, (1,))]
    torn = replace(probes.directions[0], passes=((broken, *probes.directions[0].passes[0]),))
    only = replace(probes, directions=(torn, *probes.directions[1:]))
    assert names(judge(only, 0.6, PLAIN)) == [(FindingKind.PROBE_FAILED, torn.pair)]
    assert suspects(only, 0.6, PLAIN) == set()
    silent = (replace(probes.directions[0], passes=()), *probes.directions[1:])
    assert [f.kind for f in judge(replace(probes, directions=silent), 0.6, PLAIN)] == [
        FindingKind.PROBE_FAILED
    ]


def test_a_finding_is_plain_data_that_can_be_acted_on() -> None:
    (finding,) = judge(starved(healthy(3), 1, 3), 0.6, PLAIN)
    tree = finding.to_json()
    assert (tree["kind"], tree["severity"], tree["action"], tree["where"]) == (
        "slow_host",
        "critical",
        "cordon",
        "10.0.0.2",
    )
    assert tree["ranks"] == (1,) and 0.2 < tree["ratio"] < 0.5
    assert str(finding).startswith("critical slow_host: 10.0.0.2 rank 1 does the interpreter probe in")


@pytest.mark.parametrize("hosts", [2, 3, 4, 7, 64, 257])
def test_rounds_grow_with_hosts_and_not_with_pairs(hosts: int) -> None:
    found = schedule([list(range(hosts)), [1000 + rank for rank in range(hosts)]])
    assert len(found) == hosts - 1 + hosts % 2
    met = [(m.a, m.b) for meetings in found for m in meetings]
    assert len(met) == len(set(met)) == hosts * (hosts - 1)
    for meetings in found:
        ranks = [rank for m in meetings for rank in (m.a, m.b)]
        assert len(ranks) == len(set(ranks)), "a rank is in one pair at a time"
