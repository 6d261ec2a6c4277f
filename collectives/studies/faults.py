"""The study that finds slow hosts and links: each host's compute speed, and each pair of hosts in both directions.

Pairs are probed in rounds of a tournament, all pairs of a round at once, so the time grows with the number of
hosts and not with that of pairs. Endpoints are the ranks with an adapter of their own: each GPU's, or one of a
host without GPUs; on a single host, every rank.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from collectives.analysis.judge import judge, suspect_endpoints, suspects
from collectives.analysis.probes import Direction, Endpoint, Floats, Pair, Probes
from collectives.ops.groups import rounds
from collectives.studies.journal import Journal
from collectives.timing.measure import MeasurementSetup
from configs.hardware import HardwareConfig

_CPU_REPEATS, _CPU_LOOPS = 2, 3_000_000
"""Some 90 ms: what fits into the quota of one scheduler period, of 100 ms by default, would show no limit."""
_CONFIRMATIONS = 3
_MESSAGE = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Bytes: over NVLink, 4 MiB take less time than their launch."""
_DEVICE_REPEATS, _DEVICE_SIZE, _DEVICE_CALLS = 5, 4096, 8
_SHOWN = 16
"""Pairs of a round that a line names, at most."""


@dataclass(frozen=True)
class ProbePair:
    """Two ranks that probe each other in one round."""

    a: int
    b: int


def schedule(lanes: list[list[int]]) -> list[list[ProbePair]]:
    """Rounds of pairs of ranks that can be probed at once: in each lane the same round of its tournament."""
    of_lane = [
        [[ProbePair(lane[i], lane[j]) for i, j in pairs] for pairs in rounds(len(lane))] for lane in lanes
    ]
    return [
        [pairing for tournament in of_lane for pairing in tournament[number]]
        for number in range(max(map(len, of_lane)))
    ]


@dataclass
class ProbeRecord:
    """What was measured so far, on rank 0; a rank of 1,024 that kept it too would take as much memory again."""

    size: int
    """Bytes of a message."""
    endpoints: dict[int, Endpoint]
    directions: dict[Pair, Direction] = field(default_factory=dict)

    @classmethod
    def of(cls, lanes: list[list[int]], members: Sequence[Mapping[str, Any]], size: int) -> ProbeRecord:
        """An empty record of the ranks in `lanes`."""
        ranks = sorted(rank for lane in lanes for rank in lane)
        return cls(size, {r: Endpoint(r, members[r]["address"], members[r]["local_rank"], ()) for r in ranks})

    @property
    def ranks(self) -> list[int]:
        """All endpoints."""
        return list(self.endpoints)

    def probes(self) -> Probes:
        """As they are judged."""
        return Probes(self.size, tuple(self.endpoints.values()), tuple(self.directions.values()))

    def add_compute_times(self, ranks: Sequence[int], times: Floats) -> list[float]:
        """Keep [ranks, repeats] seconds of the processor, then of the device, NaN where there is none.

        Returns:
            Each of `ranks`' best time of its processor so far, in ms.
        """
        for rank in ranks:
            before = self.endpoints[rank]
            cpu, device = times[rank, :_CPU_REPEATS], times[rank, _CPU_REPEATS:]
            self.endpoints[rank] = replace(
                before,
                cpu_seconds=(*before.cpu_seconds, *cpu.tolist()),
                device_seconds=(*before.device_seconds, *device[np.isfinite(device)].tolist()),
            )
        return [min(self.endpoints[rank].cpu_seconds) * 1e3 for rank in ranks]

    def add_messages(self, pairing: ProbePair, times: Floats, *, alone: bool) -> float:
        """Keep the messages of both ways, [ranks, 1 + repeats] seconds by sender; GB/s of the slower way."""
        slowest = 0.0
        for pair in ((pairing.a, pairing.b), (pairing.b, pairing.a)):
            first, rest = float(times[pair[0], 0]), times[pair[0], 1:]
            before = self.directions.get(pair, Direction(*pair, first, ()))
            self.directions[pair] = replace(
                before, passes=(*before.passes, rest), confirmations=before.confirmations + alone
            )
            slowest = max(slowest, float(np.median(rest)))
        return self.size / slowest / 1e9


def _rates_text(rates: Mapping[str, float]) -> str:
    """Each pair with its rate, or of many the slowest ones and the fastest."""
    named = [f"ranks {pair} {rate:.3g} GB/s" for pair, rate in rates.items()]
    if len(rates) <= _SHOWN:
        return ", ".join(named)
    order = sorted(range(len(rates)), key=[*rates.values()].__getitem__)
    return f"{len(rates)} pairs, slowest {', '.join(named[i] for i in order[:3])}, fastest {named[order[-1]]}"


class FaultStudy:
    """Probes on one rank; every rank goes through the same rounds, and rank 0 keeps what they give."""

    def __init__(self, bench: MeasurementSetup, journal: Journal, hardware: HardwareConfig) -> None:
        self._bench, self._team, self._journal = bench, bench.team, journal
        self._settings, self._hardware = bench.settings, hardware
        self._lanes = self._probe_lanes()
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
        self._machines = [member["machine"] for member in self._team.members]
        self._record = ProbeRecord.of(self._lanes, self._team.members, self._buffer.numel())

    @property
    def cases(self) -> int:
        """Planned steps: in every pass the hosts' compute speed and the rounds. Confirmations come on top."""
        return (1 + len(self._rounds)) * self._settings.passes

    def run(self, done: frozenset[tuple[str | int, ...]]) -> None:  # noqa: ARG002 (a study of seconds starts anew)
        """Probe, and on rank 0 judge."""
        for number, order in enumerate(self._order, start=1):
            self._probe_compute(f"pass {number}", self._record.ranks)
            for index in order:
                self._probe_round(f"pass {number}", self._rounds[index])
        self._confirm()
        if self._team.rank.rank == 0:
            self._judge_and_store()

    def _judge_and_store(self) -> None:
        """Store what was measured, and judge it; for 1,024 ranks that takes seconds, so the rank sends heartbeats."""
        probes, store = self._record.probes(), self._journal.store
        temporary = store.folder / "probes.json.tmp"
        with temporary.open("w") as file:
            for part in probes.json_parts():
                self._bench.beat()
                file.write(part)
        temporary.replace(store.folder / "probes.json")
        for finding in judge(probes, self._settings.slow_ratio, self._hardware):
            self._journal.finding(finding)
        self._bench.beat()
        if not self._journal.findings:
            many = f"{len(probes.endpoints)} endpoints, {len(probes.directions)} directions"
            self._journal.note(f"# nothing slow among {many}")

    def _confirm(self) -> None:
        """Probe again what was slow or unsteady, without other traffic: interference isn't a fault."""
        for number in range(1, _CONFIRMATIONS + 1):
            name, doubts = f"confirmation {number}", (set[int](), set[Pair]())
            self._bench.beat()
            if self._team.rank.rank == 0:
                ratio, probes = self._settings.slow_ratio, self._record.probes()
                doubts = (suspect_endpoints(probes.endpoints, ratio), suspects(probes, ratio, self._hardware))
            ranks, pairs = self._team.tree.broadcast_object(doubts)
            self._bench.beat()
            if ranks:
                self._probe_compute(name, ranks)
            for pairings in self._rounds if pairs else []:
                for alone in self._disjoint_machines(
                    [m for m in pairings if (m.a, m.b) in pairs or (m.b, m.a) in pairs]
                ):
                    self._probe_round(name, alone, alone=True)

    def _disjoint_machines(self, pairings: list[ProbePair]) -> Iterator[list[ProbePair]]:
        """Pairs that share a machine one after the other, the others at once."""
        left = pairings
        while left:
            taken: set[str] = set()
            at_once: list[ProbePair] = []
            later: list[ProbePair] = []
            for pairing in left:
                needed = {self._machines[pairing.a], self._machines[pairing.b]}
                if needed & taken:
                    later.append(pairing)
                else:
                    at_once.append(pairing)
                    taken |= needed
            yield at_once
            left = later

    def _probe_lanes(self) -> list[list[int]]:
        """Ranks that are paired with each other."""
        nodes, members = self._team.nodes, self._team.members
        if len(set(nodes)) == 1:
            return [list(range(len(nodes)))]
        lanes: dict[int, list[int]] = {}
        for rank, member in enumerate(members):
            if member["local_rank"] == 0 or self._team.device.type == "cuda":
                lanes.setdefault(member["local_rank"], []).append(rank)
        return [lane for lane in lanes.values() if len(lane) > 1]

    def _probe_compute(self, name: str, ranks: Collection[int]) -> None:
        """Time compute on the endpoints `ranks`, one after the other where they share a machine."""
        me, turns = self._team.rank.rank, dict[int, int]()
        seen: dict[str, int] = {}
        for rank in sorted(ranks):
            machine = self._machines[rank]
            turns[rank] = seen[machine] = seen.get(machine, -1) + 1
        times = np.full(_CPU_REPEATS + _DEVICE_REPEATS, np.nan)
        for number in range(max(turns.values()) + 1):
            self._bench.beat()
            self._team.tree.wait()
            if turns.get(me) == number:
                times[:_CPU_REPEATS] = [_interpreter_probe() for _ in range(_CPU_REPEATS)]
                if self._team.device.type == "cuda":
                    times[_CPU_REPEATS:] = _matmul_probe(self._team.device)
        self._team.tree.wait()
        every = self._team.tree.gather(times)
        text = ""
        if every is not None:
            best = self._record.add_compute_times(sorted(ranks), every)
            text = f"# {name}: own speed of {len(best)} endpoints, {min(best):.4g} to {max(best):.4g} ms"
        case = {"study": "faults", "probe": "own speed", "pass": name}
        self._journal.step(case, {"ms": best if every is not None else []}, text)

    def _probe_round(self, name: str, pairings: list[ProbePair], *, alone: bool = False) -> None:
        """Probe all pairs of a round at once, one direction after the other; `alone` on their machines or not."""
        me = self._team.rank.rank
        pairing = next((m for m in pairings if me in (m.a, m.b)), None)
        self._team.tree.wait()
        # What this rank sends; what it receives is timed by its peer.
        times = np.full(1 + self._settings.probe_repeats, np.nan)
        if pairing is not None:
            for source, target in ((pairing.a, pairing.b), (pairing.b, pairing.a)):
                self._bench.beat()
                if me == source:
                    times[:] = self._send_messages(target)
                else:
                    self._acknowledge_messages(source)
        every = self._team.tree.gather(times)
        rates: dict[str, float] = {}
        if every is not None:
            rates = {f"{m.a}-{m.b}": self._record.add_messages(m, every, alone=alone) for m in pairings}
        case = {"study": "faults", "probe": "pairs", "pass": name}
        self._journal.step(case, {"gbps": rates}, f"# {name}: {_rates_text(rates)}")

    def _send_messages(self, peer: int) -> list[float]:
        """Seconds of each message until its acknowledgement is back."""
        times = []
        for _ in range(1 + self._settings.probe_repeats):
            begun = time.perf_counter()
            dist.send(self._buffer, peer)
            dist.recv(self._ack, peer)
            self._finish()
            times.append(time.perf_counter() - begun)
        return times

    def _acknowledge_messages(self, peer: int) -> None:
        for _ in range(1 + self._settings.probe_repeats):
            dist.recv(self._buffer, peer)
            dist.send(self._ack, peer)
        self._finish()

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
