"""The recorder: a rank's last few thousand phase changes in a memory-mapped ring.

Writing is a few stores into a mapped page: no lock, no system call, no network. The pages belong to the
kernel, so what was written survives SIGKILL, and a process that is stopped or holds its interpreter lock is
as readable as any other. One rank writes a ring, anybody reads it.

Layout, little-endian: a header of 64 bytes, then `capacity` records of 32 bytes. A record's sequence number
is cleared first and written last, so a reader recognises one that is being overwritten.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_MAGIC = b"MEGARAY1"
_HEADER = struct.Struct("<8sIIIIQ")  # magic, record size, capacity, rank, process id, newest sequence
_HEADER_BYTES = 64
_NEWEST_AT = _HEADER.size - 8
_RECORD = struct.Struct("<QQHHIQ")  # sequence, time in ns, mark, phase, step, spare
_SEQUENCE = struct.Struct("<Q")


class Phase(IntEnum):
    """What a rank is doing."""

    START = 0
    DATA = 1
    FORWARD = 2
    BACKWARD = 3
    OPTIMIZER = 4
    CHECKPOINT = 5
    COLLECTIVE = 6
    METRICS = 7


class Mark(IntEnum):
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
    """Seconds since the epoch, by the rank's clock."""
    mark: Mark
    phase: Phase
    step: int


class Recorder:
    """Writes one rank's ring. A new recorder on an old file starts the ring afresh.

    Args:
        path: file of the ring; its folder is made.
        rank: the rank that writes.
        capacity: records kept.
    """

    def __init__(self, path: Path, rank: int, capacity: int = 4096) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = _HEADER_BYTES + capacity * _RECORD.size
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self._capacity = capacity
        self._next = 1
        _HEADER.pack_into(self._map, 0, _MAGIC, _RECORD.size, capacity, rank, os.getpid(), 0)

    def begin(self, phase: Phase, step: int) -> None:
        """`phase` of `step` begins."""
        self._write(0, phase, step)

    def end(self, phase: Phase, step: int) -> None:
        """`phase` of `step` has ended."""
        self._write(1, phase, step)

    def step(self, step: int) -> None:
        """`step` is finished."""
        self._write(2, 0, step)

    def _write(self, mark: int, phase: int, step: int) -> None:
        sequence = self._next
        at = _HEADER_BYTES + (sequence - 1) % self._capacity * _RECORD.size
        _SEQUENCE.pack_into(self._map, at, 0)
        _RECORD.pack_into(self._map, at, 0, time.time_ns(), mark, phase, step, 0)
        _SEQUENCE.pack_into(self._map, at, sequence)
        _SEQUENCE.pack_into(self._map, _NEWEST_AT, sequence)
        self._next = sequence + 1

    def close(self) -> None:
        """Unmap the ring; the file stays."""
        self._map.close()


def read(path: Path, after: int = 0) -> list[Record]:
    """Records with a sequence number above `after`, oldest first; what was overwritten is gone.

    A missing file, a foreign one, or one that is being created has none.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    header = _header(data)
    if header is None:
        return []
    capacity, newest = header
    first = max(after, newest - capacity) + 1
    found = (_record(data, capacity, sequence) for sequence in range(first, newest + 1))
    return [record for record in found if record is not None]


def newest(path: Path) -> Record | None:
    """The newest record, with two small reads; None where there is none."""
    try:
        with path.open("rb") as file:
            header = _header(file.read(_HEADER_BYTES))
            if header is None:
                return None
            capacity, sequence = header
            # The newest may be overwritten between the two reads only by one that is newer still.
            for candidate in (sequence, sequence - 1):
                if candidate > 0:
                    file.seek(_HEADER_BYTES + (candidate - 1) % capacity * _RECORD.size)
                    record = _parse(file.read(_RECORD.size))
                    if record is not None:
                        return record
    except FileNotFoundError:
        pass
    return None


def _header(data: bytes) -> tuple[int, int] | None:
    if len(data) < _HEADER_BYTES:
        return None
    magic, size, capacity, _, _, sequence = _HEADER.unpack_from(data)
    return (capacity, sequence) if magic == _MAGIC and size == _RECORD.size else None


def _record(data: bytes, capacity: int, sequence: int) -> Record | None:
    at = _HEADER_BYTES + (sequence - 1) % capacity * _RECORD.size
    record = _parse(data[at : at + _RECORD.size])
    return record if record is not None and record.sequence == sequence else None


def _parse(data: bytes) -> Record | None:
    if len(data) < _RECORD.size:
        return None
    sequence, nanoseconds, mark, phase, step, _ = _RECORD.unpack(data)
    return Record(sequence, nanoseconds / 1e9, Mark(mark), Phase(phase), step) if sequence else None
