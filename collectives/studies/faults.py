"""The study that finds what is slow: every host's own speed, and every pair of hosts in both directions.

Pairs are probed in rounds of a tournament, all pairs of a round at once, so the time grows with the number of
hosts and not with that of pairs. Endpoints are the ranks with an adapter of their own: each GPU's, or one of a
host without GPUs; on a single host, every rank.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist

from collectives.analysis.judge import judge, suspect_endpoints, suspects
from collectives.analysis.probes import Direction, Endpoint, Pair, Probes
from collectives.ops.groups import rounds
from collectives.studies.journal import Journal
from collectives.timing.measure import Bench

_CPU_REPEATS, _CPU_LOOPS = 2, 3_000_000
"""Some 90 ms: what fits into the quota of one scheduler period, of 100 ms by default, would show no limit."""
_CONFIRMATIONS = 3
_MESSAGE = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Bytes: over NVLink, 4 MiB take less time than their launch."""
_DEVICE_REPEATS, _DEVICE_SIZE, _DEVICE_CALLS = 5, 4096, 8


@dataclass(frozen=True)
class Meeting:
    """Two ranks that probe each other in one round."""

    a: int
    b: int


def schedule(lanes: list[list[int]]) -> list[list[Meeting]]:
    """Rounds of pairs of ranks that can meet at once: in each lane the same round of its tournament."""
    of_lane = [
        [[Meeting(lane[i], lane[j]) for i, j in pairs] for pairs in rounds(len(lane))] for lane in lanes
    ]
    return [
        [meeting for found in of_lane for meeting in found[number]]
        for number in range(max(map(len, of_lane)))
    ]


class Faults:
    """Probes on one rank; every rank goes through the same rounds."""

    def __init__(self, bench: Bench, journal: Journal, limit_gbps: float | None) -> None:
        self._bench, self._team, self._journal = bench, bench.team, journal
        self._settings, self._limit = bench.settings, limit_gbps
        self._lanes = self._in_lanes()
        self._rounds = schedule(self._lanes)
        # In another order each pass, so that what comes and goes doesn't meet the same pair.
        order = random.Random(self._settings.seed)
        self._order = [
            order.sample(range(len(self._rounds)), len(self._rounds)) for _ in range(self._settings.passes)
        ]
        usual = _MESSAGE[self._team.device.type]
        self._buffer = torch.ones(
            self._settings.probe_size or usual, dtype=torch.uint8, device=self._team.device
        )
        self._ack = torch.ones(8, dtype=torch.uint8, device=self._team.device)
        members = self._team.members
        self._endpoints = {
            rank: Endpoint(rank, members[rank]["address"], members[rank]["local_rank"], ())
            for rank in sorted(rank for lane in self._lanes for rank in lane)
        }
        self._directions: dict[Pair, Direction] = {}

    @property
    def cases(self) -> int:
        """Steps that are foreseen: in every pass the hosts' own speed and the rounds. Confirmations come on top."""
        return (1 + len(self._rounds)) * self._settings.passes

    def run(self, done: frozenset[tuple[str | int, ...]]) -> None:  # noqa: ARG002 (a study of seconds starts anew)
        """Probe, and on rank 0 judge."""
        for number, order in enumerate(self._order, start=1):
            self._own_speed(f"pass {number}", self._endpoints.keys())
            for index in order:
                self._round(f"pass {number}", self._rounds[index])
        self._confirm()
        if self._team.rank.rank == 0:
            probes = self._probes
            self._journal.store.keep("probes", asdict(probes))
            for finding in judge(probes, self._settings.slow_ratio, self._limit):
                self._journal.finding(finding)
            if not self._journal.findings:
                many = f"{len(probes.endpoints)} endpoints, {len(probes.directions)} directions"
                self._journal.note(f"# nothing slow among {many}")

    @property
    def _probes(self) -> Probes:
        """All that was measured so far."""
        endpoints, directions = tuple(self._endpoints.values()), tuple(self._directions.values())
        return Probes(self._buffer.numel(), endpoints, directions)

    def _confirm(self) -> None:
        """Probe again what looks slow or unsteady, on its own: what else went on at the time is no fault."""
        ratio = self._settings.slow_ratio
        for number in range(1, _CONFIRMATIONS + 1):
            probes, name = self._probes, f"confirmation {number}"
            ranks, pairs = suspect_endpoints(probes.endpoints, ratio), suspects(probes, ratio)
            if ranks:
                self._own_speed(name, ranks)
            for meetings in self._rounds if pairs else []:
                for alone in self._apart([m for m in meetings if (m.a, m.b) in pairs or (m.b, m.a) in pairs]):
                    self._round(name, alone, alone=True)

    def _apart(self, meetings: list[Meeting]) -> Iterator[list[Meeting]]:
        """Meetings that share a machine one after the other, the others at once."""
        machines = [member["machine"] for member in self._team.members]
        left = meetings
        while left:
            taken: set[str] = set()
            at_once = []
            for meeting in left:
                needed = {machines[meeting.a], machines[meeting.b]}
                if not needed & taken:
                    at_once.append(meeting)
                    taken |= needed
            yield at_once
            left = [meeting for meeting in left if meeting not in at_once]

    def _in_lanes(self) -> list[list[int]]:
        """Ranks that are paired with each other."""
        nodes, members = self._team.nodes, self._team.members
        if len(set(nodes)) == 1:
            return [list(range(len(nodes)))]
        lanes: dict[int, list[int]] = {}
        for rank, member in enumerate(members):
            if member["local_rank"] == 0 or self._team.device.type == "cuda":
                lanes.setdefault(member["local_rank"], []).append(rank)
        return [lane for lane in lanes.values() if len(lane) > 1]

    def _own_speed(self, name: str, ranks: Collection[int]) -> None:
        """Work of the endpoints `ranks`, one after the other where they share a machine."""
        me, machines = self._team.rank.rank, [member["machine"] for member in self._team.members]
        turn = {rank: sum(machines[r] == machines[rank] for r in ranks if r < rank) for rank in ranks}
        cpu: tuple[float, ...] = ()
        device: tuple[float, ...] = ()
        for number in range(max(turn.values()) + 1):
            self._bench.beat()
            self._team.wait()
            if turn.get(me) == number:
                cpu = tuple(_interpreter_probe() for _ in range(_CPU_REPEATS))
                if self._team.device.type == "cuda":
                    device = _matmul_probe(self._team.device)
        self._team.wait()
        told = self._team.share((cpu, device))
        for rank in ranks:
            before, (more_cpu, more_device) = self._endpoints[rank], told[rank]
            self._endpoints[rank] = replace(
                before,
                cpu_seconds=(*before.cpu_seconds, *more_cpu),
                device_seconds=(*before.device_seconds, *more_device),
            )
        best = {rank: min(self._endpoints[rank].cpu_seconds) * 1e3 for rank in sorted(ranks)}
        text = f"# {name}: own speed of {len(best)} endpoints, {min(best.values()):.4g} to {max(best.values()):.4g} ms"
        self._journal.step(
            {"study": "faults", "probe": "own speed", "pass": name}, {"ms": [*best.values()]}, text
        )

    def _round(self, name: str, meetings: list[Meeting], *, alone: bool = False) -> None:
        """Probe all pairs of a round at once, one direction after the other; `alone` on their machines or not."""
        me = self._team.rank.rank
        meeting = next((m for m in meetings if me in (m.a, m.b)), None)
        self._team.wait()
        found: list[tuple[int, int, list[float]]] = []
        if meeting is not None:
            for source, target in ((meeting.a, meeting.b), (meeting.b, meeting.a)):
                self._bench.beat()
                times = self._push(target) if me == source else self._absorb(source)
                if me == source:
                    found.append((source, target, times))
        for source, target, times in (one for rank in self._team.share(found) for one in rank):
            self._keep(source, target, times, alone)
        rates = {f"{m.a}-{m.b}": self._rate(m) for m in meetings}
        text = f"# {name}: " + ", ".join(f"ranks {pair} {rate:.3g} GB/s" for pair, rate in rates.items())
        self._journal.step({"study": "faults", "probe": "pairs", "pass": name}, {"gbps": rates}, text)

    def _keep(self, source: int, target: int, times: list[float], alone: bool) -> None:
        first, *rest = times
        before = self._directions.get((source, target), Direction(source, target, first, ()))
        passes, confirmations = (*before.passes, tuple(rest)), before.confirmations + alone
        self._directions[source, target] = replace(before, passes=passes, confirmations=confirmations)

    def _rate(self, meeting: Meeting) -> float:
        """GB/s of the slower direction."""
        ways = (self._directions[meeting.a, meeting.b], self._directions[meeting.b, meeting.a])
        return self._buffer.numel() / max(way.seconds for way in ways) / 1e9

    def _push(self, peer: int) -> list[float]:
        """Seconds of each message until its acknowledgement is back."""
        times = []
        for _ in range(1 + self._settings.probe_repeats):
            begun = time.perf_counter()
            dist.send(self._buffer, peer)
            dist.recv(self._ack, peer)
            self._finish()
            times.append(time.perf_counter() - begun)
        return times

    def _absorb(self, peer: int) -> list[float]:
        for _ in range(1 + self._settings.probe_repeats):
            dist.recv(self._buffer, peer)
            dist.send(self._ack, peer)
        self._finish()
        return []

    def _finish(self) -> None:
        if self._team.device.type == "cuda":
            torch.cuda.synchronize(self._team.device)


def _interpreter_probe() -> float:
    """Seconds of a fixed piece of work in the interpreter: what launching kernels and feeding data depend on."""
    begun, total = time.perf_counter(), 0
    for number in range(_CPU_LOOPS):
        total ^= number
    return time.perf_counter() - begun


def _matmul_probe(device: torch.device) -> tuple[float, ...]:
    """Seconds of a fixed number of matmuls, by repeats; the first, which warms up, is left out."""
    a = torch.randn(_DEVICE_SIZE, _DEVICE_SIZE, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(1 + _DEVICE_REPEATS):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(_DEVICE_CALLS):
            a @ a
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return tuple(times[1:])
