"""What passes between a controller's runtime and the agent of a node: plain data, small whatever the gang's size."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from pathlib import Path

from orchestrator.control.gang import AgentReport, DesiredState

_TAIL = 20
"""Characters of a run's id that name its folders in memory: its date, time and letters."""
_RINGS = re.compile(r"-\d{3,}-.{1,8}-([0-9a-f]{32})$")


class OrderSuperseded(RuntimeError):
    """The order is of a controller that another one has followed."""


class AttemptPhase(StrEnum):
    """How far an attempt is on one node."""

    UNKNOWN = "unknown"
    """The agent has not heard of it."""
    PREPARING = "preparing"
    """Files are opened and the node is looked at."""
    READY = "ready"
    """Ranks can start at once."""
    RUNNING = "running"
    """They were started; each may have ended since."""
    STOPPING = "stopping"
    ENDING = "ending"
    """No process of it runs any program any more; the kernel and the drivers take back what they held, for seconds."""
    STOPPED = "stopped"
    """No process of it is left."""

    @property
    def is_past_stop(self) -> bool:
        """Its end has begun."""
        return self in (AttemptPhase.STOPPING, AttemptPhase.ENDING, AttemptPhase.STOPPED)


@dataclass(frozen=True)
class LaunchSpec:
    """What a node needs to know to start its share of a gang."""

    world: int
    ranks: tuple[int, ...]
    ip: str
    """Of the node, as the gang's other nodes reach it."""
    addresses: tuple[str, ...]
    """Of all the gang's nodes."""
    program: tuple[str, ...]
    code: str
    environment: dict[str, str] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)
    """Variables that say which devices are the gang's on this node, such as `CUDA_VISIBLE_DEVICES`."""
    uses_devices: bool = False
    """Its slots are devices and not processor cores."""
    master: str = ""
    """Address and port of the rendezvous; empty: get ready, and wait for it."""

    @property
    def trains(self) -> bool:
        """Its program is the trainer. Others measure the node, which mustn't be disturbed, and are short."""
        return self.program[:2] == ("-m", "trainer")


@dataclass(frozen=True)
class AttemptOrder:
    """The desired state of an attempt on one node, and how long the answer may wait while nothing changes."""

    epoch: int
    run_root: str
    attempt: int
    desired: DesiredState
    launch: LaunchSpec | None = None
    """For `STARTED`."""
    grace: float = 0.0
    """For `STOPPED`: seconds between SIGTERM and SIGKILL."""
    collect: tuple[str, ...] = ()
    """Requests that stacks and rings are to be written for, each to a folder of this name."""
    news: int = -1
    """`AttemptReport.news` of the newest answer: the next one waits until there is something newer."""
    serial: int = 0
    """`AttemptReport.serial` of the newest answer: ranks that are as they were then aren't reported again."""
    offset: int = 0
    """Byte of `metrics.jsonl` up to which lines have come in."""
    wait: float = 0.0
    """The agent answers after so many seconds though nothing has changed."""


@dataclass(frozen=True)
class AttemptReport:
    """An attempt on one node."""

    phase: AttemptPhase
    age: float
    """Seconds that the agent has lived."""
    started: float | None
    """Seconds since the ranks were started here; None: they were not."""
    report: AgentReport
    news: int
    """Version of the attempt: it rises with each exit, phase and metric line, and a rise is answered at once."""
    serial: int
    """Counts answers."""
    master: str = ""
    """Where the rendezvous would be on this node."""
    pids: dict[int, int] = field(default_factory=dict)
    """Process id by rank, once started."""
    missing: str = ""
    """Path that this node doesn't see."""
    unfit: str = ""
    """Why the node can't serve."""
    slow: float = 0.0
    """Seconds that it has waited for shared storage."""
    facts: dict[str, str] = field(default_factory=dict)
    """Versions that must be alike in a gang."""
    collected: tuple[str, ...] = ()
    """Those of the order's requests whose stacks and rings were written, or given up after their time."""


def attempt_mark(run_root: str, attempt: int, node_id: str) -> str:
    """Value of `MEGARAY_MARK`, by which a node's processes of an attempt are known, in 32 characters.

    With the node's id, since several nodes may share one kernel: an agent ends its own processes alone.
    """
    return blake2b(f"{run_root}\n{attempt}\n{node_id}".encode(), digest_size=16).hexdigest()


def rings_folder(run_root: str, attempt: int, node_id: str) -> Path:
    """Folder in the node's own memory for what ranks publish; the same for whoever asks.

    With the node's id, since containers and network namespaces may share one memory.
    """
    tail = Path(run_root).name[-_TAIL:]
    return shm_folder() / f"{tail}-{attempt:03d}-{node_id[:8]}-{attempt_mark(run_root, attempt, node_id)}"


def remove_stale_rings(living: Callable[[], set[str]], older: float = 3600.0) -> None:
    """Remove what agents that died have left in the node's memory.

    Args:
        living: marks of the attempts that have processes here.
        older: seconds that a folder must have been left alone: another agent may be making it just now.
    """
    marks = living()
    for folder in shm_folder().glob("*-*"):
        match = _RINGS.search(folder.name)
        if match is None:  # a node's snapshots lie here too, under its name
            continue
        try:
            if match[1] not in marks and time.time() - folder.stat().st_mtime > older:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue


def shm_folder() -> Path:
    """Folder of this user's files in the node's memory."""
    return Path(f"/dev/shm/megaray-{os.getuid()}")
