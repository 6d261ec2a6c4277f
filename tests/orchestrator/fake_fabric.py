"""A cluster whose time is a number: the controller's own code runs on it unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from configs.metrics import EndedLine, MetricLine, ResumedLine, SavedLine, SaveFailedLine, StepLine
from configs.paths import RunPaths
from faulttol.recorder import Mark, Phase, Record
from orchestrator.control.gang import AgentReport, GangSpec, GangStatus, RankReport
from orchestrator.decide.queue import Node


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeGang:
    """A gang that trains a step each second and saves every `every` steps."""

    spec: GangSpec
    resumed: int
    started: float | None = None
    told: int = -1
    ended: bool = False
    deaths: dict[int, int] = field(default_factory=dict)
    """Exit code by rank."""
    lost: set[str] = field(default_factory=set)
    stopped: bool = False
    failed: int = 0
    """Saves that failed in a row."""


class FakeFabric:
    """`gang.Fabric` with ranks that are numbers. Like real agents, gangs live on when a controller dies."""

    def __init__(self, clock: Clock, nodes: int, slots: int, steps: int, every: int = 10) -> None:
        self.clock, self.steps, self.every = clock, steps, every
        self.alive = [
            Node(f"n{i:05d}", f"10.0.{i // 250}.{i % 250 + 1}", f"host{i}", {"CPU": slots}, {"CPU": slots})
            for i in range(nodes)
        ]
        self.gangs: dict[str, FakeGang] = {}
        self.saved: dict[str, int] = {}
        self.granting = True
        self.storage: str | None = "well"
        """`well`, or the error of each save, or None where saves end without a word."""
        self.snapshots: int | None = None
        """Steps between snapshots in memory."""
        self.sinks: set[str] = set()
        self.skew = 0.0
        """Seconds that the nodes' clocks are ahead."""

    def nodes(self) -> list[Node]:
        return list(self.alive)

    def lose_node(self, node_id: str) -> None:
        """The node and every agent on it are gone."""
        self.alive = [node for node in self.alive if node.node_id != node_id]
        for gang in self.gangs.values():
            if any(share.node_id == node_id for share in gang.spec.shares):
                gang.lost.add(node_id)

    def kill_rank(self, group: str, rank: int, code: int = -9) -> None:
        """A rank ends, and its peers follow with exit code 1."""
        self.gangs[group].deaths[rank] = code

    def reserve(self, group: str, spec: GangSpec) -> None:
        self.gangs[group] = FakeGang(spec, self.saved.get(spec.run_root, 0))

    def reserved(self, group: str) -> bool:
        return self.granting

    def launch(self, group: str) -> None:
        self.gangs[group].started = self.clock.now

    def status(self, group: str) -> GangStatus:
        gang = self.gangs[group]
        assert gang.started is not None
        reports = []
        done = gang.resumed + int(self.clock.now - gang.started) >= self.steps and not gang.deaths
        lines = () if gang.stopped else tuple(self._lines(gang))
        for share in gang.spec.shares:
            if share.node_id in gang.lost:
                continue
            ranks = tuple(self._rank(gang, r, done) for r in share.ranks)
            reports.append(
                AgentReport(
                    share.node_id, self.clock.now + self.skew, ranks, lines if 0 in share.ranks else ()
                )
            )
        pids = {r: 100 + r for r in range(gang.spec.world)}
        return GangStatus(
            pids, "fake:1", tuple(reports), {s.node_id: 0.0 for s in gang.spec.shares},
            dict.fromkeys(gang.lost, "node died"), "",
        )  # fmt: skip

    def _rank(self, gang: FakeGang, rank: int, done: bool) -> RankReport:
        now = self.clock.now + self.skew
        record = Record(1 + int(self.clock.now), now, Mark.STEP, Phase.START, 0)
        return RankReport(rank, 100 + rank, gang.deaths.get(rank, 0 if done else None), now, record, "")

    def _lines(self, gang: FakeGang) -> list[MetricLine]:
        assert gang.started is not None
        now, attempt = self.clock.now, gang.spec.attempt
        lines: list[MetricLine] = []
        if gang.told < 0:
            lines.append(ResumedLine(now, attempt, gang.resumed, None, "none"))
            gang.told = gang.resumed
        target = min(self.steps, gang.resumed + int(now - gang.started))
        for step in range(gang.told + 1, target + 1):
            lines.append(step_line(attempt, step, now))
            if self.snapshots and step % self.snapshots == 0:
                lines.append(SavedLine(now, attempt, step, "node", 1, 0.2, 0.01, "memory"))
            if step % self.every == 0 or step == self.steps:
                lines += self._save(gang, step)
        gang.told = target
        if target == self.steps and not gang.ended:
            gang.ended = True
            lines.append(EndedLine(now, attempt, target, 1.5, target))
        return lines

    def _save(self, gang: FakeGang, step: int) -> list[MetricLine]:
        now, attempt = self.clock.now, gang.spec.attempt
        if self.storage == "well":
            gang.failed = 0
            self.saved[gang.spec.run_root] = step
            return [SavedLine(now, attempt, step, "folder", 1, 2.0, 0.1)]
        gang.failed += 1
        return [SaveFailedLine(now, attempt, step, self.storage, gang.failed)] if self.storage else []

    def stop(self, group: str, grace: float) -> None:
        self.gangs[group].stopped = True

    def stopped(self, group: str) -> bool:
        return self.gangs[group].stopped

    def release(self, group: str) -> None:
        self.gangs.pop(group, None)

    def adopt(self, group: str, spec: GangSpec) -> bool:
        gang = self.gangs.get(group)
        if gang is None:
            self.gangs[group] = FakeGang(spec, 0, stopped=True)
            return False
        gang.told, gang.ended, gang.failed = (
            -1,
            False,
            0,
        )  # a new controller reads the metric lines from the start
        return True

    def ensure_sinks(self, run_root: str) -> None:
        self.sinks.add(run_root)


def step_line(attempt: int, step: int, time: float, loss: float = 2.0) -> StepLine:
    """A step line with plausible numbers."""
    return StepLine(
        time=time, attempt=attempt, step=step, loss=loss, aux_loss=0.0, lr=1e-3, grad_norm=1.0, tokens=step * 64,
        tokens_per_second=64.0, step_seconds=1.0, phase_seconds={"forward": 0.5}, mfu=None,
        expert_load=[[32, 32]], balance_entropy=1.0, dropped=0, memory_bytes=1 << 20,
    )  # fmt: skip


def run_paths(home: Path, run_id: str) -> RunPaths:
    """A run's folder under a home."""
    return RunPaths(home / "runs" / run_id)
