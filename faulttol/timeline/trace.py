"""The trace: a rank's last calls of torch.distributed, in a second memory-mapped ring beside the recorder's.

Each record says when a collective, a send or a receive was called, when the rank began to wait for it, and when it had
it. So the time that a step waits for others is separated from what it computes, and what ran beside the computation
from what held it up. Steps aren't told: a reader finds them by time, in the recorder's ring.

Layout, in words of 64 bits of the node's byte order: a header of 16 words, then `capacity` records of 12, of which the last
is the sum of the others. A reader that meets a record half written sees that it doesn't fit. Times are the node's
monotonic clock in ns, as in the recorder.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import from_json
from configs.paths import write_whole
from configs.rank import RankFiles
from faulttol.recorder import mapped

CAPACITY = 32768
"""Records kept: 3 MiB of the node's memory for each rank."""
_MAGIC = int.from_bytes(b"MEGATRC1", "little")
_HEADER_WORDS, _WORDS = 16, 12
_CAPACITY, _RANK, _PID, _NEWEST, _PENDING = 1, 2, 3, 4, 5
_OPEN = 8
"""Four words of the header: the wait that the rank is in (began, meaning, call, peer); began is 0 where it is in none."""
_MASK = (1 << 64) - 1


def trace_of(files: RankFiles) -> Path:
    """A rank's trace."""
    return files.ring.with_suffix(".trace")


def table_of(files: RankFiles) -> Path:
    """Its table of groups."""
    return files.ring.with_suffix(".groups")


class Op(IntEnum):
    """What was called."""

    OTHER = 0
    ALL_REDUCE = 1
    ALL_GATHER = 2
    REDUCE_SCATTER = 3
    ALL_TO_ALL = 4
    BROADCAST = 5
    REDUCE = 6
    GATHER = 7
    SCATTER = 8
    BARRIER = 9
    SEND = 10
    RECEIVE = 11


SYNCHRONIZING = (Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL, Op.BARRIER)
"""Nobody leaves these before everybody has entered."""


class WaitLane(IntEnum):
    """The thread that waited."""

    MAIN = 0
    AUTOGRAD = 1
    """The backward pass of a device, while the main thread stands still for it."""
    BESIDE = 2
    """A thread of the program's own, beside the step."""


_BESIDE = 2
"""As a plain integer: comparing an enumeration costs as much as the record."""
BATCHED = 1
"""Flag of a record whose wait is that of the record before: several calls were waited for as one."""

RECORD = np.dtype(
    [
        ("sequence", "u8"),
        ("issued", "i8"),
        ("began", "i8"),
        ("ended", "i8"),
        ("device_began", "i8"),
        ("device_ended", "i8"),
        ("op", "u1"),
        ("lane", "u1"),
        ("flags", "u1"),
        ("spare", "u1"),
        ("spare_2", "u4"),
        ("group", "u4"),
        ("count", "u4"),
        ("peer", "i4"),
        ("tag", "u4"),
        ("bytes", "u8"),
        ("total", "u8"),
        ("check", "u8"),
    ]
)
"""One record, as numpy reads it."""


class CollectiveCall(NamedTuple):
    """One call, as it was made. (A tuple, since each call of a step makes one.)"""

    op: int
    issued: int
    group: int
    """Number of the group (`Groups`)."""
    turn: int
    """Calls of this group so far; of sends and receives those to and from the same peer."""
    peer: int
    """Global rank at the other end; -1 where there isn't one."""
    bytes: int


class TraceWriter:
    """Writes one rank's trace. A new one on an old file starts afresh.

    Args:
        path: file of the trace; its folder is made.
        rank: the rank that writes.
        capacity: records kept.

    Raises:
        OSError: where the file can't be made in its full size.
    """

    def __init__(self, path: Path, rank: int, capacity: int = CAPACITY) -> None:
        self._map = mapped(path, 8 * (_HEADER_WORDS + capacity * _WORDS))
        self._words = memoryview(self._map).cast("Q")
        self._capacity, self._next, self._total = capacity, 1, 0
        self._lock = threading.Lock()
        self._words[_CAPACITY], self._words[_RANK], self._words[_PID] = capacity, rank, os.getpid()
        self._words[0] = _MAGIC

    def write(
        self,
        call: CollectiveCall,
        began: int,
        ended: int,
        lane: int,
        flags: int = 0,
        device: tuple[int, int] = (0, 0),
    ) -> None:
        """Record a call that has been waited for.

        Args:
            call: what was called.
            began: when the wait began, by the host.
            ended: when it was over, by the host.
            lane: of the waiting thread.
            flags: `BATCHED` or 0.
            device: when the wait began and ended on the device, by the host's clock; zeros where it had no part in it.
        """
        op, issued, group, count, peer, size = call
        device_began, device_ended = device
        meaning, where, peer = op | lane << 8 | flags << 16, group | count << 32, peer & 0xFFFFFFFF
        words = self._words
        with self._lock:
            sequence, total = self._next, self._total
            if not flags and lane != _BESIDE:
                total += device_ended - device_began if device_ended else ended - began
            at = _HEADER_WORDS + (sequence - 1) % self._capacity * _WORDS
            words[at] = sequence
            words[at + 1] = issued
            words[at + 2] = began
            words[at + 3] = ended
            words[at + 4] = device_began
            words[at + 5] = device_ended
            words[at + 6] = meaning
            words[at + 7] = where
            words[at + 8] = peer
            words[at + 9] = size
            words[at + 10] = total
            words[at + 11] = (
                sequence + issued + began + ended + device_began + device_ended + meaning + where + peer + size + total
            ) & _MASK  # fmt: skip
            words[_NEWEST] = sequence
            self._next, self._total = sequence + 1, total

    def begin_wait(self, call: CollectiveCall, began: int) -> None:
        """The rank waits from now on; what never ends shows by this."""
        op, _, group, count, peer, _ = call
        words = self._words
        words[_OPEN + 1] = op
        words[_OPEN + 2] = group | count << 32
        words[_OPEN + 3] = peer & 0xFFFFFFFF
        words[_OPEN] = began

    def end_wait(self) -> None:
        """The wait is over."""
        self._words[_OPEN] = 0

    def mark_pending(self, began: int) -> None:
        """Waits that began at `began` or later aren't all recorded: the device hasn't given their times yet. 0: all are."""
        self._words[_PENDING] = began

    def close(self) -> None:
        """Unmap the ring; the file stays."""
        self._words.release()
        self._map.close()


@dataclass(frozen=True)
class OngoingWait:
    """The wait that a rank is in."""

    began: int
    op: int
    group: int
    count: int
    peer: int


@dataclass(frozen=True)
class TraceRead:
    """What was new in a trace."""

    records: NDArray[Any]
    """Of type `RECORD`, oldest first."""
    pending: int
    """As `TraceWriter.mark_pending` reported it."""
    waiting: OngoingWait | None
    there: bool = True
    """There is a trace, though it may have nothing new."""


_NOTHING = TraceRead(np.zeros(0, RECORD), 0, None, False)


def read(path: Path, after: int = 0) -> TraceRead:
    """Records with a sequence number above `after`; what was overwritten is gone. A file that is none has nothing."""
    try:
        with path.open("rb") as file:
            head = np.frombuffer(file.read(8 * _HEADER_WORDS), "u8")
            if head.size < _HEADER_WORDS or head[0] != _MAGIC or not head[_CAPACITY]:
                return _NOTHING
            capacity, last = int(head[_CAPACITY]), int(head[_NEWEST])
            first = max(after, last - capacity) + 1
            start, stop = (first - 1) % capacity, (last - 1) % capacity + 1
            parts = []
            if last >= first:
                parts = [(start, stop)] if start < stop else [(start, capacity), (0, stop)]
            data = b""
            for begin, end in parts:
                file.seek(8 * (_HEADER_WORDS + begin * _WORDS))
                data += file.read(8 * _WORDS * (end - begin))
    except OSError:
        return _NOTHING
    words = np.frombuffer(data[: len(data) // (8 * _WORDS) * 8 * _WORDS], "u8").reshape(-1, _WORDS)
    expected = np.arange(first, first + len(words), dtype="u8")
    whole = (words[:, 0] == expected) & (words[:, :-1].sum(1, dtype="u8") == words[:, -1])
    records = np.ascontiguousarray(words[whole]).view(RECORD).reshape(-1)
    return TraceRead(records, int(head[_PENDING]), _waiting(head))


def _waiting(head: NDArray[np.uint64]) -> OngoingWait | None:
    began, op, where, peer = (int(word) for word in head[_OPEN : _OPEN + 4])
    if not began:
        return None
    return OngoingWait(began, op, where & 0xFFFFFFFF, where >> 32, peer - (1 << 32) if peer >> 31 else peer)


@dataclass(frozen=True)
class TracedGroup:
    """A communicator."""

    name: str
    ranks: Sequence[int]
    """Global ranks in its order; a `range` where they are evenly spaced."""


def write_groups(path: Path, groups: dict[int, TracedGroup]) -> None:
    """Write the groups of a rank by their numbers, replaced whole."""
    tree = {str(number): [group.name, compact_ranks(group.ranks)] for number, group in groups.items()}
    write_whole(path, json.dumps(tree))


def read_groups(path: Path) -> dict[int, TracedGroup]:
    """The groups of a rank; none where it hasn't reported any."""
    try:
        return groups_of(from_json(path.read_bytes()))
    except (OSError, ValueError):
        return {}


def groups_of(tree: Any) -> dict[int, TracedGroup]:
    """Groups from their plain tree, as `write_groups` writes it; ValueError where it is none."""
    try:
        return {
            int(number): TracedGroup(str(name), expand_ranks(ranks)) for number, (name, ranks) in tree.items()
        }
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not a table of groups: {error}") from error


def compact_ranks(ranks: Sequence[int]) -> list[Any]:
    """Ranks as ["range", start, stop, step] where they are evenly spaced, else as they are."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    if step and list(range(ranks[0], ranks[-1] + (1 if step > 0 else -1), step)) == list(ranks):
        return ["range", ranks[0], ranks[-1] + (1 if step > 0 else -1), step]
    return list(ranks)


def expand_ranks(ranks: Sequence[Any]) -> Sequence[int]:
    """The inverse of `compact_ranks`."""
    return range(*ranks[1:]) if ranks and ranks[0] == "range" else tuple(int(rank) for rank in ranks)
