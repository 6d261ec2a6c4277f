"""A cluster whose time is a number: the controller's own code runs on it unchanged.

`World` is what outlives a controller: nodes, gangs, what ranks wrote. `FakeRuntime` is one controller's hold on it, and
finds everything again as a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from configs.metrics import EndedLine, MetricLine, ResumedLine, SavedLine, SaveFailedLine, StepLine
from configs.paths import RunPaths
from faulttol.detect.snapshot import ExitReport, RankObservation
from faulttol.recorder import PhaseMark, RankPhase, Record
from orchestrator.control.gang import AgentReport, DesiredState, GangSpec, GangStatus
from orchestrator.decide.placement import Node
from orchestrator.record.clock import Instant

STOPPED_EXIT = 143


class FakeClock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.skew = 1_000_000.0
        """What the wall clock is ahead; a step of it is a test's."""

    def __call__(self) -> Instant:
        return Instant(self.now + self.skew, self.now)


@dataclass
class FakeGang:
    """An attempt that trains a step each second and saves every `every` steps."""

    spec: GangSpec
    resumed: int
    started: float
    wall: float = 0.0
    ended: float | None = None
    """When its ranks ended, for whatever reason."""
    lines: list[MetricLine] = field(default_factory=list)
    """All that it wrote."""
    deaths: dict[int, int] = field(default_factory=dict)
    """Exit code by rank."""
    errors: dict[int, ExitReport] = field(default_factory=dict)
    """By rank, what it wrote before it ended."""
    told: int = -1
    finished: bool = False
    failed: int = 0
    """Saves that failed in a row."""
    starts: int = 1


@dataclass
class World:
    """What outlives controllers."""

    clock: FakeClock
    steps: int
    every: int = 10
    alive: list[Node] = field(default_factory=list)
    gangs: dict[tuple[str, int], FakeGang] = field(default_factory=dict)
    """Attempts that were ever started, by run and number."""
    held: dict[str, GangSpec] = field(default_factory=dict)
    """Reservations."""
    saved: dict[str, int] = field(default_factory=dict)
    sinks: set[str] = field(default_factory=set)
    starting: dict[tuple[str, int], int] = field(default_factory=dict)
    """How often each attempt's ranks were started: twice is a defect."""
    evidence: set[tuple[str, int, str]] = field(default_factory=set)
    others: dict[str, int] = field(default_factory=dict)
    """Slots that other users of Ray hold, by node."""

    def clash(self) -> str:
        """Two living gangs on one node with more ranks than slots; empty where there is none."""
        used: dict[str, int] = {}
        for gang in self.gangs.values():
            if gang.ended is None:
                for share in gang.spec.shares:
                    used[share.node_id] = used.get(share.node_id, 0) + len(share.ranks)
        slots = {node.node_id: max(node.slots.values()) for node in self.alive}
        over = [n for n, count in used.items() if n in slots and count > slots[n]]
        return f"more ranks than slots on {', '.join(over)}" if over else ""


def make_world(clock: FakeClock, nodes: int, slots: int, steps: int, every: int = 10) -> World:
    """A world of equal nodes."""
    alive = [
        Node(f"n{i:05d}", f"10.0.{i // 250}.{i % 250 + 1}", f"host{i}", {"CPU": slots}, {"CPU": slots})
        for i in range(nodes)
    ]
    return World(clock, steps, every, alive)


class FakeRuntime:
    """`gang.GangRuntime` on a `World`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.granting = True
        self.storage: str | None = "well"
        """`well`, or the error of each save, or None where saves end without a word."""
        self.snapshots: int | None = None
        """Steps between snapshots in memory."""
        self.skew = 0.0
        """Seconds that the nodes' clocks are ahead."""
        self.hung: dict[int, float] = {}
        """Rank -> when it stopped making records."""
        self.before: Callable[[str], None] = lambda act: None
        """Called before each act; a test may raise in it."""
        self._read: dict[tuple[str, int], int] = {}
        """Lines of each attempt that this runtime has passed on."""
        self._gone: set[tuple[str, int]] = set()
        self._collected: dict[tuple[str, int], set[str]] = {}

    @property
    def clock(self) -> FakeClock:
        return self.world.clock

    def nodes(self, own: Collection[str]) -> list[Node]:
        self.before("nodes")
        held = {name: spec for name, spec in self.world.held.items() if name not in own}
        taken = dict(self.world.others)
        for spec in held.values():
            for share in spec.shares:
                taken[share.node_id] = taken.get(share.node_id, 0) + len(share.ranks)
        return [
            replace(node, free={r: max(0, n - taken[node.node_id]) for r, n in node.slots.items()})
            if taken.get(node.node_id)
            else node
            for node in self.world.alive
        ]

    def reservations(self) -> Collection[str]:
        self.before("reservations")
        return set(self.world.held)

    def wait(self, seconds: float) -> bool:
        self.clock.now += seconds
        return False

    def lose_node(self, node_id: str) -> None:
        """The node and every process on it are gone."""
        self.world.alive = [node for node in self.world.alive if node.node_id != node_id]

    def kill_rank(self, run: str, rank: int, code: int = -9) -> None:
        """A rank of a run's living gang ends."""
        self.gang(run).deaths[rank] = code

    def raise_all(self, run: str, error: str, own: Collection[int]) -> None:
        """All ranks of a run's living gang end by an error, which is that of some of them."""
        gang, now = self.gang(run), self.clock().wall
        for rank in range(gang.spec.world):
            gang.errors[rank] = ExitReport(now, error, rank not in own)
            gang.deaths[rank] = 1

    def gang(self, run: str) -> FakeGang:
        """The newest gang of a run, by the end of its folder."""
        found = [gang for (root, _), gang in self.world.gangs.items() if root.endswith(f"/{run}")]
        return found[-1]

    def ensure(self, spec: GangSpec, desired: DesiredState, grace: float = 0.0) -> None:
        self.before(f"ensure {desired}")
        world, gang = self.world, self.world.gangs.get(spec.key)
        match desired:
            case DesiredState.RESERVED if self.granting and self._free_for(spec):
                world.held.setdefault(spec.reservation, spec)
            case DesiredState.STARTED if gang is None:
                assert spec.reservation in world.held, "ranks start on slots that are held"
                self._start(spec)
            case DesiredState.WATCHED if gang is None:
                self._gone.add(spec.key)
            case DesiredState.STOPPED if gang is not None and gang.ended is None:
                if grace > 0 and not gang.deaths:
                    self._train(gang)
                    gang.lines += self._save(gang, gang.told)
                    gang.deaths = dict.fromkeys(range(spec.world), STOPPED_EXIT)
                gang.ended = self.clock.now
            case DesiredState.RELEASED:
                assert gang is None or gang.ended is not None, (
                    "slots are given back after the ranks have ended"
                )
                world.held.pop(spec.reservation, None)

    def _free_for(self, spec: GangSpec) -> bool:
        """Ray grants no slot twice, whatever the controller believes."""
        held = [s for s in self.world.held.values() if s.reservation != spec.reservation]
        slots = {
            n.node_id: n.slots[spec.resource] - self.world.others.get(n.node_id, 0) for n in self.world.alive
        }
        for share in [*spec.shares, *(share for other in held for share in other.shares)]:
            slots[share.node_id] = slots.get(share.node_id, 0) - len(share.ranks)
        return all(slots[share.node_id] >= 0 for share in spec.shares)

    def _start(self, spec: GangSpec) -> None:
        world = self.world
        world.starting[spec.key] = world.starting.get(spec.key, 0) + 1
        resumed = world.saved.get(spec.run_root, 0)
        world.gangs[spec.key] = FakeGang(spec, resumed, self.clock.now)

    def collect(self, spec: GangSpec, request: str) -> None:
        self.before("collect")
        self._collected.setdefault(spec.key, set()).add(request)
        self.world.evidence.add((*spec.key, request))

    def ensure_sinks(self, run_root: str) -> None:
        self.before("sinks")
        self.world.sinks.add(run_root)

    def status(self, spec: GangSpec) -> GangStatus:
        self.before("status")
        gang = self.world.gangs.get(spec.key)
        reserved = spec.reservation in self.world.held
        if gang is None and spec.key in self._gone:
            return GangStatus(
                gone="no agent knows it", stopped=True, released=not reserved, reserved=reserved
            )
        if gang is None:
            return GangStatus(reserved=reserved, stopped=True, released=not reserved)
        if gang.ended is None:
            self._train(gang)
        alive = {node.node_id for node in self.world.alive}
        return GangStatus(
            reserved=reserved,
            pids={r: 100 + r for r in range(spec.world)},
            master="fake:1",
            reports=tuple(self._reports(gang, alive)),
            silent={s.node_id: 0.0 for s in spec.shares if s.node_id in alive},
            lost={s.node_id: "node died" for s in spec.shares if s.node_id not in alive},
            stopped=gang.ended is not None,
            released=not reserved,
            collected=frozenset(self._collected.get(spec.key, ())),
        )

    def _reports(self, gang: FakeGang, alive: set[str]) -> list[AgentReport]:
        done = gang.finished and not gang.deaths
        read = self._read.get(gang.spec.key, 0)
        lines, self._read[gang.spec.key] = tuple(gang.lines[read:]), len(gang.lines)
        reports = []
        for share in gang.spec.shares:
            if share.node_id in alive:
                ranks = tuple(self._rank(gang, r, done) for r in share.ranks)
                own = lines if 0 in share.ranks else ()
                reports.append(AgentReport(share.node_id, self.clock().wall + self.skew, ranks, own))
            elif 0 in share.ranks:
                self._read[gang.spec.key] = read
        return reports

    def _rank(self, gang: FakeGang, rank: int, done: bool) -> RankObservation:
        last = min(self.hung.get(rank, self.clock.now), self.clock.now)
        step = gang.resumed + max(0, int(last - gang.started))
        record = Record(
            1 + 2 * step, last + self.clock.skew + self.skew, PhaseMark.STEP, RankPhase.START, step
        )
        code = gang.deaths.get(rank, 0 if done else None)
        ended = None if code is None else self.clock().wall + self.skew
        return RankObservation(rank, 100 + rank, code, ended, record, raised=gang.errors.get(rank))

    def _train(self, gang: FakeGang) -> None:
        """Write the lines of the steps since the last look."""
        if gang.deaths or not {s.node_id for s in gang.spec.shares} <= {n.node_id for n in self.world.alive}:
            return
        now, attempt, world = self.clock.now, gang.spec.attempt, self.world
        wall = self.clock().wall
        if gang.told < 0:
            gang.lines.append(ResumedLine(wall, attempt, gang.resumed, None, "none"))
            gang.told = gang.resumed
        until = min([now, *self.hung.values()])
        target = min(world.steps, gang.resumed + int(until - gang.started))
        for step in range(gang.told + 1, target + 1):
            gang.lines.append(step_line(attempt, step, wall))
            if self.snapshots and step % self.snapshots == 0:
                gang.lines.append(SavedLine(wall, attempt, step, "node", 1, 0.2, 0.01, "memory"))
            if step % world.every == 0 or step == world.steps:
                gang.lines += self._save(gang, step)
        gang.told = max(gang.told, target)
        if target == world.steps and not gang.finished:
            gang.finished = True
            gang.lines.append(EndedLine(wall, attempt, target, 1.5, target))

    def _save(self, gang: FakeGang, step: int) -> list[MetricLine]:
        wall, attempt, root = self.clock().wall, gang.spec.attempt, gang.spec.run_root
        if self.storage == "well":
            gang.failed = 0
            self.world.saved[root] = max(step, self.world.saved.get(root, 0))
            return [SavedLine(wall, attempt, step, "folder", 1, 2.0, 0.1)]
        gang.failed += 1
        return [SaveFailedLine(wall, attempt, step, self.storage, gang.failed)] if self.storage else []


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
