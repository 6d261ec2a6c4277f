"""The controller at 12,288 ranks on 1,536 nodes: `python -m tests.orchestrator.bench_scale`.

The controller's own code on real files. Reports of agents are unpickled in each turn, as they arrive from Ray, and ranks
are numbers. Prints processor seconds, each beside its bound; exit code 1 where one is missed. `bench_deciders` has the pure
deciders alone.
"""

from __future__ import annotations

import argparse
import gc
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from configs.compose import compose, dump
from configs.metrics import MetricLine, ResumedLine
from configs.paths import HomePaths
from faulttol.detect.snapshot import RankObservation
from faulttol.recorder import PhaseMark, RankPhase, Record
from orchestrator.control.controller import Controller
from orchestrator.control.gang import AgentReport, DesiredState, GangSpec, GangStatus
from orchestrator.decide.placement import Node
from orchestrator.record.clock import Instant
from orchestrator.record.events import CheckpointCommitted, GangShape, StateMoved, Submitted
from orchestrator.record.log import EventLog
from orchestrator.record.run_log import RunLogReader
from orchestrator.record.states import Reason, State
from tests.orchestrator.fake_runtime import FakeClock, step_line

NODES, SLOTS = 1536, 8
EVENTS = 100_000


@dataclass
class PickledRuntime:
    """`gang.GangRuntime` whose agents' reports are bytes until they are looked at."""

    clock: FakeClock
    alive: list[Node]
    reserved: bool = False
    started: float | None = None
    ended: bool = False
    aborted: bool = False
    step: int = 0
    wires: list[list[bytes]] = field(default_factory=list)
    """Two sets of reports, so that each turn's differ from the last."""
    unpickling: float = 0.0
    """Processor seconds that went to what Ray does in the cluster too."""

    def nodes(self, own: Collection[str]) -> list[Node]:
        return list(self.alive)

    def reservations(self) -> Collection[str]:
        return ()

    def wait(self, seconds: float) -> bool:
        self.clock.now += seconds
        return False

    def ensure(self, spec: GangSpec, desired: DesiredState, grace: float = 0.0) -> None:
        if desired is DesiredState.RESERVED:
            self.reserved = True
        if desired is DesiredState.STARTED and self.started is None:
            self.started = self.clock.now
            self.wires = [
                [pickle.dumps(_report(spec, i, k)) for i in range(len(spec.shares))] for k in (0, 1, 2)
            ]
        if desired is DesiredState.STOPPED:
            self.ended, self.started, self.aborted = True, None, False
        if desired is DesiredState.RELEASED:
            self.reserved = False

    def collect(self, spec: GangSpec, request: str) -> None: ...

    def ensure_sinks(self, run_root: str) -> None: ...

    def status(self, spec: GangSpec) -> GangStatus:
        if self.started is None:
            return GangStatus(reserved=self.reserved, stopped=True, released=not self.reserved)
        began = time.process_time()
        wire = self.wires[2 if self.aborted else self.step % 2]
        reports = [pickle.loads(data) for data in wire]
        self.unpickling += time.process_time() - began
        self.step += 1
        wall = self.clock().wall
        lines: tuple[MetricLine, ...] = ()
        if self.step == 1:
            lines = (ResumedLine(wall, spec.attempt, 0, None, "none"),)
        elif not self.aborted:
            lines = (step_line(spec.attempt, self.step, wall),)
        reports[0] = replace(reports[0], lines=lines)
        return GangStatus(
            reserved=True,
            pids={rank: 100 + rank for rank in range(spec.world)},
            master="n0:1",
            reports=tuple(reports),
            silent={share.node_id: 0.5 for share in spec.shares},
        )


def _report(spec: GangSpec, index: int, variant: int) -> AgentReport:
    share = spec.shares[index]
    ranks = []
    for rank in share.ranks:
        record = Record(10 + variant, 1000.0 + variant, PhaseMark.STEP, RankPhase.START, 1 + variant)
        dead = variant == 2
        code = (-9 if rank == 4711 else 1) if dead else None
        words = "RuntimeError: Connection closed by peer" if dead and rank != 4711 else ""
        ranks.append(
            RankObservation(
                rank, 100 + rank, code, 1000.0 + (rank != 4711) if dead else None, record, last_words=words
            )
        )
    return AgentReport(share.node_id, 1000.0 + variant, tuple(ranks))


class Bounds:
    """Figures beside their bounds."""

    def __init__(self) -> None:
        self.missed = False

    def say(self, what: str, value: float, bound: float, unit: str) -> None:
        """Print one."""
        self.missed |= value > bound
        print(
            f"{what:<58} {value:9.3f} {unit:<4} bound {bound:g}{'  MISSED' if value > bound else ''}",
            flush=True,
        )


def make_nodes(count: int) -> list[Node]:
    """Nodes of eight slots."""
    return [
        Node(
            f"n{i:05d}",
            f"10.{i // 250 // 250}.{i // 250 % 250}.{i % 250 + 1}",
            f"host{i}",
            {"GPU": SLOTS},
            {"GPU": SLOTS},
        )
        for i in range(count)
    ]


def gang(home: HomePaths, bounds: Bounds) -> None:
    """Start, train and lose a gang of 12,288 ranks."""
    clock = FakeClock()
    runtime = PickledRuntime(clock, make_nodes(NODES + 4))
    controller = Controller(home, runtime, clock)
    run = home.run("big")
    run.root.mkdir(parents=True)
    run.config.write_text(dump(compose(["experiment=smoke", "checkpoint.every=1000000"])))
    ranks = NODES * SLOTS
    began = time.process_time()
    controller.submit(
        "big", Submitted(0, GangShape(ranks, SLOTS, None, "GPU"), 10**6, 3, 1.0, "big", {"dp": ranks})
    )
    while RunLogReader.of(run).view.state is not State.RUNNING:
        clock.now += 0.5
        controller.turn()
    bounds.say("start-up, submission to the first step", time.process_time() - began, 10.0, "s")
    gc.collect()
    turns, runtime.unpickling, began = 30, 0.0, time.process_time()
    for _ in range(turns):
        clock.now += 1.0
        controller.turn()
    each = (time.process_time() - began) / turns
    bounds.say("a turn a second: share of a processor", each, 0.5, "")
    print(f"  of it unpickling the reports: {runtime.unpickling / turns:.3f}")
    runtime.aborted, worst, began = True, 0.0, time.process_time()
    while not RunLogReader.of(run).view.incidents:
        clock.now += 0.5
        controller.turn()
    worst = time.process_time() - began
    (incident,) = RunLogReader.of(run).view.incidents
    bounds.say("all ranks end at once: until it is in the log", worst, 2.0, "s")
    print(f"  named: {incident.event.detail}")
    bounds.missed |= incident.event.rank != 4711


def long_log(home: HomePaths, bounds: Bounds) -> None:
    """A run of 100,000 events: folded once, and told of by `status` at once."""
    run = home.run("long-20260101-000000-aaaa")
    run.root.mkdir(parents=True)
    run.config.write_text(dump(compose(["experiment=smoke", "checkpoint.every=1000000"])))
    log = EventLog(run.events, 1, Instant(1.0, 1.0))
    shape = GangShape(2, 1)
    log.append(
        [Submitted(0, shape, 10**6, 3, 1.0, "m", {"dp": 2}), StateMoved(State.QUEUED, Reason.SUBMITTED)],
        Instant(1.0, 1.0),
    )
    for first in range(0, EVENTS, 1000):
        saves = [
            CheckpointCommitted(1, step, f"/c/step-{step}", 1 << 30, 2.0)
            for step in range(first, first + 1000)
        ]
        log.append(saves, Instant(2.0 + first, 2.0 + first))
    log.close()
    clock = FakeClock()
    runtime = PickledRuntime(clock, make_nodes(1))
    began = time.process_time()
    controller = Controller(home, runtime, clock)
    folded = time.process_time() - began
    print(f"{EVENTS} events folded once: {folded:.2f} s")
    controller.turn()
    began = time.process_time()
    for _ in range(10):
        clock.now += 1.0
        controller.turn()
    bounds.say("a turn beside it", (time.process_time() - began) / 10, 0.05, "s")
    again = Controller(home, runtime, clock)
    began = time.process_time()
    again.turn()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "orchestrator", "status", run.run_id]
    subprocess.run(
        command,
        env={"MEGARAY_HOME": str(home.home), "PATH": "/usr/bin:/bin"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    bounds.say(
        "`status` of it", after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 0.5, "s"
    )


def day(home: HomePaths, bounds: Bounds) -> None:
    """A day of 1,024 ranks that all die each hour, a turn every ten seconds: memory of the second hour and the last."""
    clock = FakeClock()
    runtime = PickledRuntime(clock, make_nodes(160))
    controller = Controller(home, runtime, clock)
    run = home.run("day")
    run.root.mkdir(parents=True)
    run.config.write_text(dump(compose(["experiment=smoke", "checkpoint.every=1000000"])))
    controller.submit(
        "day", Submitted(0, GangShape(1024, 8, None, "GPU"), 10**6, 10**6, 1.0, "day", {"dp": 1024})
    )
    hours = []
    for _ in range(24):
        for _ in range(360):
            clock.now += 10.0
            controller.turn()
        runtime.aborted = True
        gc.collect()
        hours.append(_resident())
    assert len(RunLogReader.of(run).view.incidents) >= 20, "it lost its ranks each hour"
    bounds.say("memory after a day over that after two hours", hours[-1] / hours[1], 1.1, "")


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def main() -> int:
    """Exit code 1 where a bound is missed."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    bounds = Bounds()
    for part in (gang, long_log, day):
        with tempfile.TemporaryDirectory(prefix="megaray-scale-") as folder:
            part(HomePaths(Path(folder)), bounds)
    return int(bounds.missed)


if __name__ == "__main__":
    sys.exit(main())
