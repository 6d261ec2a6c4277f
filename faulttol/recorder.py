"""The recorder: a rank's last few thousand phase changes in a memory-mapped ring.

Writing is five stores of one machine word into a mapped page: no lock, no system call, no network. The pages
belong to the kernel, so what was written survives SIGKILL, and a process that is stopped or holds its
interpreter lock is as readable as any other. One rank writes a ring, anybody on its node reads it.

Layout, in words of 64 bits of the node's byte order: a header of 8 words, then `capacity` records of 4:
sequence number, time in ns, meaning, and the exclusive-or of these three. A reader that meets a record half
written, because its writer was killed in it or is overwriting it now, sees that they don't agree.

Records are dated by the node's monotonic clock, which nobody sets, and which all its processes share. A reader adds its
own `steady_clock.OFFSET_NS`, so what it reads is comparable with its own `steady_clock.now()`, and between nodes as far
as their clocks agree.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from faulttol import steady_clock

_MAGIC = b"MEGARAY3"
_HEADER = struct.Struct("=8sQQQQQ")  # magic, record size, capacity, rank, process id, newest sequence
_HEADER_WORDS = 8
_HEADER_BYTES = 8 * _HEADER_WORDS
_NEWEST = 5
"""Word of the header that holds the newest sequence number."""
_RECORD = struct.Struct("=QQQQ")
_STEP_SHIFT = 16
"""Meaning: mark in bits 0-7, phase in bits 8-15, step above."""
_END, _STEP = 1, 2
"""The marks as plain integers: arithmetic on an enumeration costs as much as the record."""


class RankPhase(IntEnum):
    """What a rank is doing."""

    START = 0
    DATA = 1
    FORWARD = 2
    BACKWARD = 3
    OPTIMIZER = 4
    CHECKPOINT = 5
    COLLECTIVE = 6
    METRICS = 7
    IMPORTS = 8
    """From the start of the process until its libraries are loaded."""
    RENDEZVOUS = 9
    """It waits for all ranks to meet."""
    BUILD = 10
    """The model and its groups are made."""
    LOAD = 11
    """A checkpoint is looked for and loaded."""


class PhaseMark(IntEnum):
    """What a record says of its phase."""

    BEGIN = 0
    END = 1
    STEP = 2
    """A step is finished; its phase has no meaning."""


@dataclass(frozen=True)
class Record:
    """One record of a ring."""

    sequence: int
    """From 1, without gaps."""
    time: float
    """Seconds since the epoch, by the clock of the rank's node (`faulttol.steady_clock`)."""
    mark: PhaseMark
    phase: RankPhase
    step: int
    """The step that it belongs to, from 1 as metric lines have it; 0 before the first."""

    @property
    def finished(self) -> int:
        """Steps that are finished for sure."""
        return self.step if self.mark is PhaseMark.STEP else max(0, self.step - 1)


def mapped(path: Path, size: int) -> mmap.mmap:
    """A new file of so many zeros, mapped; its folder is made.

    Raises:
        OSError: where the file can't be made in its full size. (A sparse file on a full disk would end the
            process by SIGBUS in the middle of a write instead.)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.posix_fallocate(fd, 0, size)
        return mmap.mmap(fd, size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # the call knows no name
    finally:
        os.close(fd)


class Recorder:
    """Writes one rank's ring. A new recorder on an old file starts the ring afresh.

    Args:
        path: file of the ring; its folder is made.
        rank: the rank that writes.
        capacity: records kept.

    Raises:
        OSError: where the file can't be made in its full size.
    """

    def __init__(self, path: Path, rank: int, capacity: int = 4096) -> None:
        self._map = mapped(path, _HEADER_BYTES + capacity * _RECORD.size)
        _HEADER.pack_into(self._map, 0, _MAGIC, _RECORD.size, capacity, rank, os.getpid(), 0)
        # Words and not `struct.pack_into`, which clears its target first and stores byte by byte.
        self._words = memoryview(self._map).cast("Q")
        self._capacity = capacity
        self._next = 1

    def begin(self, phase: RankPhase, step: int) -> None:
        """`phase` of `step` begins. Steps count from 1, as metric lines have them; 0 is the start."""
        self._write(phase << 8 | step << _STEP_SHIFT)

    def end(self, phase: RankPhase, step: int) -> None:
        """`phase` of `step` has ended."""
        self._write(_END | phase << 8 | step << _STEP_SHIFT)

    def step(self, step: int) -> None:
        """`step` steps are finished."""
        self._write(_STEP | step << _STEP_SHIFT)

    def touch(self) -> None:
        """Renew the time of the newest record: its phase still makes progress. The count of records stays as it is, since
        ranks are compared by it."""
        words, sequence, now = self._words, self._next - 1, time.monotonic_ns()
        if not sequence:
            return
        at = _HEADER_WORDS + (sequence - 1) % self._capacity * 4
        words[at + 1] = now
        words[at + 3] = sequence ^ now ^ words[at + 2]

    def _write(self, meaning: int) -> None:
        words, sequence, now = self._words, self._next, time.monotonic_ns()
        at = _HEADER_WORDS + (sequence - 1) % self._capacity * 4
        words[at] = sequence
        words[at + 1] = now
        words[at + 2] = meaning
        words[at + 3] = sequence ^ now ^ meaning
        words[_NEWEST] = sequence
        self._next = sequence + 1

    def close(self) -> None:
        """Unmap the ring; the file stays."""
        self._words.release()
        self._map.close()


def read(path: Path, after: int = 0) -> list[Record]:
    """Records with a sequence number above `after`, oldest first; what was overwritten is gone.

    A file that is missing, unreadable, foreign or just being made has none.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return []
    header = _header(data)
    if header is None:
        return []
    capacity, last = header
    records = []
    for sequence in range(max(after, last - capacity) + 1, last + 1):
        at = _offset(sequence, capacity)
        record = _parse(data[at : at + _RECORD.size])
        if record is not None and record.sequence == sequence:
            records.append(record)
    return records


def newest(path: Path) -> Record | None:
    """The newest record, with two small reads; None where there is none, as for `read`."""
    try:
        with path.open("rb") as file:
            header = _header(file.read(_HEADER_BYTES))
            if header is None:
                return None
            capacity, last = header
            # The slot may hold a newer record than the header reported, or one that is being written now.
            for sequence in range(last, max(0, last - 2), -1):
                file.seek(_offset(sequence, capacity))
                record = _parse(file.read(_RECORD.size))
                if record is not None:
                    return record
    except OSError:
        pass
    return None


def _offset(sequence: int, capacity: int) -> int:
    return _HEADER_BYTES + (sequence - 1) % capacity * _RECORD.size


def _header(data: bytes) -> tuple[int, int] | None:
    """Capacity and newest sequence number."""
    if len(data) < _HEADER_BYTES:
        return None
    magic, size, capacity, _, _, last = _HEADER.unpack_from(data)
    return (capacity, last) if magic == _MAGIC and size == _RECORD.size and capacity else None


def _parse(data: bytes) -> Record | None:
    """A record, or None for one that is empty, cut short or torn."""
    if len(data) < _RECORD.size:
        return None
    sequence, nanoseconds, meaning, check = _RECORD.unpack(data)
    if not sequence or check != sequence ^ nanoseconds ^ meaning:
        return None
    mark, phase = PhaseMark(meaning & 0xFF), RankPhase(meaning >> 8 & 0xFF)
    return Record(sequence, steady_clock.from_monotonic_ns(nanoseconds), mark, phase, meaning >> _STEP_SHIFT)
