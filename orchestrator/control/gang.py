"""What the controller knows of gangs: the plain data that crosses to node agents, and the fabric they run on.

`Fabric` is the seam between deciding and doing. `orchestrator.ray_fabric` implements it with Ray; the tests
implement it with a clock that they turn by hand. Every call returns at once: the controller's loop never
waits for a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from configs.metrics import MetricLine
from faulttol.recorder import Record
from orchestrator.decide.placement import Node
from orchestrator.record.events import NodeShare


@dataclass(frozen=True)
class GangSpec:
    """Everything that is needed to start one attempt's ranks."""

    run_root: str
    attempt: int
    shares: tuple[NodeShare, ...]
    resource: str
    """Ray resource that a slot takes one unit of: `CPU` or `GPU`."""
    world: int
    program: tuple[str, ...]
    """Arguments after the Python interpreter that start one rank, such as `-m trainer run --config …`."""
    runtime_env: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RankReport:
    """One rank as its node agent sees it."""

    rank: int
    pid: int
    exit_code: int | None
    """None while it lives; negative for a signal."""
    exit_time: float | None
    """When the agent first saw it ended, in seconds since the epoch."""
    newest: Record | None
    """Newest record of its ring."""
    last_words: str
    """Last line of its log, once it has ended."""


@dataclass(frozen=True)
class AgentReport:
    """One answer of a node agent."""

    node_id: str
    time: float
    """By the node's clock, in seconds since the epoch, as are all times in `ranks`."""
    ranks: tuple[RankReport, ...]
    lines: tuple[MetricLine, ...]
    """New metric lines, where the agent's node hosts rank 0."""
    offset: int = 0
    """Byte of `metrics.jsonl` behind the last of `lines`."""

    def told_at(self, now: float) -> AgentReport:
        """The same report with its times by the clock that says `now`, so that nodes' clocks may differ."""
        shift = now - self.time
        ranks = []
        for rank in self.ranks:
            newest = replace(rank.newest, time=rank.newest.time + shift) if rank.newest else None
            ended = None if rank.exit_time is None else rank.exit_time + shift
            ranks.append(replace(rank, newest=newest, exit_time=ended))
        return replace(self, time=now, ranks=tuple(ranks))


@dataclass(frozen=True)
class GangStatus:
    """A gang between two ticks of the controller."""

    pids: dict[int, int] = field(default_factory=dict)
    """Process id by rank, once all ranks are started; empty before."""
    master: str = ""
    """Address and port of the rendezvous."""
    reports: tuple[AgentReport, ...] = ()
    """Answers that came in since the last look."""
    silent: dict[str, float] = field(default_factory=dict)
    """Node id -> seconds since its agent last answered."""
    lost: dict[str, str] = field(default_factory=dict)
    """Node id -> why, for agents that Ray reports dead."""
    refused: str = ""
    """Why the ranks could not be started at all (a mistake in the set-up); empty otherwise."""


class Fabric(Protocol):
    """Places gangs and carries messages to their node agents."""

    def nodes(self) -> list[Node]:
        """All live nodes with the slots that they have; `free` equals `slots`."""

    def reserve(self, group: str, spec: GangSpec) -> None:
        """Begin to reserve one bundle per node for a gang."""

    def reserved(self, group: str) -> bool:
        """All bundles are held."""

    def launch(self, group: str) -> None:
        """Begin to start the gang's agents and their ranks."""

    def status(self, group: str) -> GangStatus:
        """What has come in since the last call; also asks the agents again."""

    def stop(self, group: str, grace: float) -> None:
        """Begin to stop the ranks: SIGTERM, and after `grace` seconds SIGKILL."""

    def stopped(self, group: str) -> bool:
        """No rank of the gang is left on a node that can be reached."""

    def release(self, group: str) -> None:
        """Give the bundles back and forget the gang."""

    def adopt(self, group: str, spec: GangSpec) -> bool:
        """Take over a gang that an earlier controller started; False where an agent is gone."""

    def ensure_sinks(self, run_root: str) -> None:
        """See to it that the run's log sinks are running."""
