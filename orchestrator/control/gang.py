"""What the controller knows of gangs: plain data that crosses to node agents, and the seam to what runs them.

`GangRuntime` is level-triggered. The controller says in every turn what should be (`ensure`), and the runtime moves
there; saying it again changes nothing, and a runtime that was just started finds what an earlier one began. So no call
depends on an earlier one having been made. `orchestrator.ray_runtime` implements it with Ray, the tests with a clock
that they turn by hand. Every call returns at once: the controller's loop never waits for a node.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

from configs.metrics import MetricLine
from faulttol.detect.snapshot import RankObservation
from orchestrator.decide.placement import Node
from orchestrator.record.events import NodeShare


class DesiredState(StrEnum):
    """What should be with an attempt's gang."""

    RESERVED = "reserved"
    """Its slots are held."""
    STARTED = "started"
    """Its ranks run; they are started where they were not."""
    WATCHED = "watched"
    """Its ranks were started; they are watched, and never started again."""
    STOPPED = "stopped"
    """No rank is left, nor any process that one has started; the slots stay held."""
    RELEASED = "released"
    """Nothing is left, the slots are free."""


def reservation_of(run_id: str, attempt: int) -> str:
    """Name under which an attempt's slots are held."""
    return f"{run_id}-a{attempt:03d}"


def run_of(reservation: str) -> str:
    """Id of the run that a reservation's name is of; empty where it is of none."""
    return reservation.rpartition("-a")[0]


@dataclass(frozen=True)
class GangSpec:
    """Everything that is needed to run one attempt's ranks: what the attempt owns."""

    reservation: str
    """`reservation_of` its first attempt; those that follow in place share it."""
    run_root: str
    attempt: int
    shares: tuple[NodeShare, ...]
    resource: str
    """Ray resource that a slot takes one unit of: `CPU` or `GPU`."""
    world: int
    program: tuple[str, ...]
    """Arguments after the Python interpreter that start one rank, such as `-m trainer run --config …`."""
    code: str
    """Folder that the packages of the ranks are imported from."""
    epoch: int
    """Of the controller; an agent refuses one below the highest that it has heard of."""
    heartbeat: float = 1.0
    """Seconds after which an agent answers though nothing has changed."""
    runtime_env: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the ranks beside their own."""

    @property
    def key(self) -> tuple[str, int]:
        """What an agent knows an attempt by."""
        return self.run_root, self.attempt


@dataclass(frozen=True)
class AgentReport:
    """What a node agent tells of one attempt."""

    node_id: str
    time: float
    """By the node's clock, in seconds since the epoch, as are all times in `ranks`."""
    ranks: tuple[RankObservation, ...]
    """Those that changed since the last report."""
    lines: tuple[MetricLine, ...] = ()
    """New metric lines, where the agent's node hosts rank 0."""
    offset: int = 0
    """Byte of `metrics.jsonl` behind the last of `lines`."""

    def with_clock(self, now: float) -> AgentReport:
        """The same report with its times by the clock that says `now`, so that nodes' clocks may differ."""
        shift = now - self.time
        return replace(self, time=now, ranks=tuple(rank.shifted(shift) for rank in self.ranks))


@dataclass(frozen=True)
class GangStatus:
    """A gang between two turns of the controller."""

    reserved: bool = False
    """All slots are held."""
    pids: dict[int, int] = field(default_factory=dict)
    """Process id by rank, once all ranks are started; empty before."""
    master: str = ""
    """Address and port of the rendezvous."""
    reports: tuple[AgentReport, ...] = ()
    """What came in since the last look."""
    silent: dict[str, float] = field(default_factory=dict)
    """Node id -> seconds since its agent last answered."""
    lost: dict[str, str] = field(default_factory=dict)
    """Node id -> why, for agents that are known to be gone."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Node id -> why it can't start ranks, where that is the node's fault: a mount, an I/O error, its memory."""
    refused: str = ""
    """Why no node can start the ranks: a mistake in the set-up; empty otherwise."""
    gone: str = ""
    """Why nothing of a watched attempt is left anywhere; empty otherwise."""
    stopped: bool = False
    """No rank is left on any node that can be reached, and the devices of the slots are free."""
    released: bool = False
    """The slots are free."""
    collected: frozenset[str] = frozenset()
    """Requests of `collect` whose stacks and records are there, or were given up."""


class GangRuntime(Protocol):
    """Holds slots, runs ranks, and carries messages to node agents."""

    def nodes(self, own: Collection[str]) -> list[Node]:
        """All live nodes; `free` is what no other user of Ray holds of their slots.

        Args:
            own: reservations of the runs that the controller knows; what they hold counts as free.
        """

    def reservations(self) -> Collection[str]:
        """Names under which slots were held lately, by whomever."""

    def ensure(self, spec: GangSpec, desired: DesiredState, grace: float = 0.0) -> None:
        """Say what should be with an attempt; begins whatever is missing, and may be said again at any time.

        Args:
            spec: the attempt.
            desired: what should be. The order is one way: what was said to stop doesn't start again.
            grace: for `STOPPED`, seconds between SIGTERM and SIGKILL; 0 kills at once.
        """

    def status(self, spec: GangSpec) -> GangStatus:
        """What has come in since the last call; also asks again."""

    def collect(self, spec: GangSpec, request: str) -> None:
        """Begin to write the stacks of all living ranks and their rings.

        Args:
            spec: the attempt.
            request: names the folder among its evidence that they come to. The same one again writes nothing again.
        """

    def wait(self, seconds: float) -> bool:
        """Return once something has come in that is worth a turn, or after `seconds`; False where nothing did."""

    def ensure_sinks(self, run_root: str) -> None:
        """See to it that the run's log sinks are running; said in each turn of a run that has ranks."""
