"""What detectors look at: all ranks of a gang at one instant, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from faulttol.recorder import Record

if TYPE_CHECKING:  # pydantic needn't load for what reads checkpoints
    from configs.timeouts import Timeouts


@dataclass(frozen=True)
class ExitReport:
    """The error that a rank ends by, as it writes it before anything is torn down."""

    time: float
    """Seconds since the epoch, by the clock of its node."""
    error: str
    """Type and message, one line."""
    blames_peer: bool
    """The error is that of a lost peer or of a collective that gave up, so its cause is another rank."""


@dataclass(frozen=True)
class GroupStatus:
    """One communicator as one of its ranks sees it."""

    name: str
    """The same on all its ranks, such as `dp.0`."""
    ranks: Sequence[int]
    """Its global ranks; a `range` where they are evenly spaced, so that a large group stays small to send."""
    entered: int
    """Collectives that this rank has entered."""
    left: int
    """Collectives that it has left; below `entered` while it is inside one."""


@dataclass(frozen=True)
class RankObservation:
    """One rank as its node agent sees it."""

    rank: int
    pid: int
    exit_code: int | None = None
    """None while it lives; negative for a signal."""
    exit_time: float | None = None
    """When the kernel reported its end, in seconds since the epoch."""
    newest: Record | None = None
    """Newest record of its ring."""
    groups: tuple[GroupStatus, ...] = ()
    """Its communicators, where it has reported them."""
    raised: ExitReport | None = None
    """What it wrote before it ended by an error."""
    last_words: str = ""
    """Last line of its log, once it has ended."""
    state: str = ""
    """The kernel's state of the process (`R`, `S`, `D`, `T` stopped, `Z`), empty where it isn't known."""
    waits: str = ""
    """Distributed call that it reports to be in, such as `all_reduce`; `device` where it waits for its device."""
    held_since: float | None = None
    """Since when it, or a process that it has started, is stopped (state `T`)."""
    asleep_since: float | None = None
    """Since when no thread of it and of its processes has run or waited for a file, a device or another host."""
    held: str = ""
    """What was seen of it, for a person: `stopped (state T)`, `asleep in clock_nanosleep`; empty where it gets on."""

    @property
    def ended(self) -> bool:
        """Its process is gone."""
        return self.exit_code is not None

    def shifted(self, seconds: float) -> RankObservation:
        """The same with its times by a clock that is `seconds` ahead of its node's."""
        newest = replace(self.newest, time=self.newest.time + seconds) if self.newest else None
        raised = replace(self.raised, time=self.raised.time + seconds) if self.raised else None
        return replace(
            self,
            newest=newest,
            raised=raised,
            exit_time=_later(self.exit_time, seconds),
            held_since=_later(self.held_since, seconds),
            asleep_since=_later(self.asleep_since, seconds),
        )


def _later(time: float | None, seconds: float) -> float | None:
    return None if time is None else time + seconds


@dataclass(frozen=True)
class SavesStatus:
    """How far the saves of an attempt are."""

    step: int
    """Newest finished one."""
    saved_step: int
    """Of the newest commit, or that the attempt began at."""
    interval: int
    """Steps between two commits, as they are due or as they came lately, whichever is more."""
    failing: int
    """Saves that failed in a row."""
    error: str
    """Of the last one that failed or was left out; empty where none did."""
    max_failed: int


@dataclass(frozen=True)
class Snapshot:
    """A gang at one instant. All times are by the observer's clock."""

    now: float
    """Seconds since the epoch."""
    since_start: float
    """Seconds since its ranks were started, by a monotonic clock."""
    world: int
    ranks: Mapping[int, RankObservation]
    """Those that were seen; others have reported nothing yet."""
    nodes: Mapping[int, str]
    """Rank -> address of its node."""
    timeouts: Timeouts
    first_step_done: bool
    """The gang has finished a step in this attempt."""
    silent: Mapping[str, float] = field(default_factory=dict)
    """Address of a node -> seconds since its agent last answered."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Address of a node -> why its agent is known to be gone."""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Address of a node -> why it could not start ranks, where that is the node's fault (a mount, its memory)."""
    refused: str = ""
    """Why no node could start the ranks: a user's mistake; empty otherwise."""
    gone: str = ""
    """Why nothing of the attempt can be found any more; empty otherwise."""
    saves: SavesStatus | None = None
    """None where the state isn't saved, or nothing is known of it yet."""
    logs: str = ""
    """Folder of the ranks' logs, `<rank, five digits>.log`."""

    def log(self, rank: int) -> str:
        """Path of a rank's log; empty where the folder isn't known."""
        return f"{self.logs}/{rank:05d}.log" if self.logs else ""
