"""Append-only logs: one JSON record per line, one writer, any number of readers.

What a turn of the controller decides is one record, so a controller that dies leaves all of a turn or none. Each record
carries the epoch of its writer. A reader passes over records of an epoch below one that it has met, so a writer that was
replaced and doesn't know it yet changes nothing, whatever it still writes. A record ends with a checksum, since one flipped
digit of an epoch would have all that follows passed over. A record that can't be read, or whose checksum is wrong, is named
and stepped over; a last line without its end was torn by a writer that died, and doesn't count.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from configs.errors import from_json
from orchestrator.record import events
from orchestrator.record.clock import Instant
from orchestrator.record.events import Event

_NAMED = 80
"""Characters of a damaged line that are shown."""
_UNSEALED = frozenset(("epoch", "time", "clock", "events"))
"""What a record has without its seal; those of an earlier version have none."""
_SEAL, _SEALED = b', "crc": "', b'"}\n'
"""Around the checksum, eight hexadecimal digits: CRC-32 of the record as it would be without it, up to its brace."""
_SEAL_BYTES = len(_SEAL) + 8 + len(_SEALED)
_LONGEST_RECORD = 1 << 26
"""Bytes that are searched for the end of a record, where a part of a log is read."""


class Fenced(Exception):
    """A newer controller owns the log; this one must end."""


@dataclass(frozen=True)
class Cursor:
    """How far a log was read."""

    offset: int = 0
    """Byte behind the last whole line."""
    seq: int = 0
    """Events so far."""
    epoch: int = 0
    """Highest epoch that was met."""
    time: float = 0.0
    clock: float = 0.0
    """Of the newest record."""
    damage: tuple[str, ...] = ()
    """Lines that were stepped over."""


def read_from(
    path: Path,
    cursor: Cursor = Cursor(),
    decode: Callable[[dict[str, Any]], Any] = events.decode,
    limit: int | None = None,
) -> tuple[list[Event], Cursor]:
    """Events behind a cursor, and the cursor behind them. A log that isn't there has none.

    Args:
        path: the log.
        cursor: where to begin.
        decode: makes a payload of its plain tree, or raises `ValueError`.
        limit: bytes that are read at once, or a whole record where that is longer; None: all that there is.

    Raises:
        OSError: where the file can't be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(cursor.offset)
            data = file.read() if limit is None else _part(file, limit)
    except FileNotFoundError:
        return [], cursor
    whole = data[: data.rfind(b"\n") + 1]
    collected: list[Event] = []
    seq, epoch, time, clock = cursor.seq, cursor.epoch, cursor.time, cursor.clock
    damage, offset = list(cursor.damage), cursor.offset
    for line in whole.splitlines(keepends=True):
        offset += len(line)
        try:
            record = _record(line)
            written, at = int(record.get("epoch", 0)), float(record["time"])
            # Lines of an earlier version hold one event each, and no clock.
            ran = float(record.get("clock", clock + max(0.0, at - time) if time else 0.0))
            trees = record["events"] if "events" in record else [_of_old(record)]
            payloads = [decode(tree) for tree in trees]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            shown = line[:_NAMED].decode(errors="replace").rstrip()
            damage.append(f"{path} at byte {offset - len(line)}: {error}: {shown}")
            continue
        if written < epoch:
            continue
        epoch, time, clock = written, at, ran
        for payload in payloads:
            collected.append(Event(seq, at, payload, ran))
            seq += 1
    return collected, Cursor(offset, seq, epoch, time, clock, tuple(damage))


def _record(line: bytes) -> dict[str, Any]:
    """A record's tree.

    Raises:
        ValueError, TypeError, AttributeError: where it isn't as it was written.
    """
    tail = line[-_SEAL_BYTES:]
    sealed = tail.startswith(_SEAL) and tail.endswith(_SEALED)
    if sealed and tail[len(_SEAL) : -len(_SEALED)] != checksum(line[:-_SEAL_BYTES]).encode():
        raise ValueError("its checksum is wrong")
    record: dict[str, Any] = from_json(line.decode())
    # A seal that is itself damaged doesn't make it a record of an earlier version.
    if not sealed and "events" in record and not record.keys() <= _UNSEALED:
        raise ValueError("its checksum can't be read")
    return record


def _seal(record: dict[str, Any]) -> bytes:
    """A record as a line."""
    text = json.dumps(record)[:-1].encode()
    return text + _SEAL + checksum(text).encode() + _SEALED


def checksum(text: bytes) -> str:
    """CRC-32 as eight hexadecimal digits."""
    return f"{zlib.crc32(text):08x}"


def _part(file: IO[bytes], limit: int) -> bytes:
    """The next bytes, with at least one whole line where there is one."""
    data = file.read(limit)
    while b"\n" not in data and len(data) < _LONGEST_RECORD and (more := file.read(limit)):
        data += more
    return data


def read(path: Path) -> list[Event]:
    """All events of a log."""
    return read_from(path)[0]


def _of_old(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("seq", "time", "clock", "epoch")}


class EventLog:
    """The one writer of a log.

    Args:
        path: the file; its folder is made.
        epoch: of the controller that writes.
        now: the present.
        fence: raises `Fenced` where a newer controller has begun; asked before each record.
        cursor: how far the caller has read it already.
        decode: as for `read_from`.

    Raises:
        Fenced: where the log holds records of a newer controller.
        OSError: where it can't be opened.
    """

    def __init__(
        self,
        path: Path,
        epoch: int,
        now: Instant,
        fence: Callable[[], None] = lambda: None,
        cursor: Cursor = Cursor(),
        decode: Callable[[dict[str, Any]], Any] = events.decode,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.events, self.cursor = read_from(path, cursor, decode)
        """Events behind `cursor` that were there when it was opened, and how far the log goes."""
        if self.cursor.epoch > epoch:
            raise Fenced(f"{path} is written by controller {self.cursor.epoch}, and this is {epoch}")
        self._epoch, self._fence = epoch, fence
        # The clock of the log continues from its newest record; a wall clock that was set back adds nothing.
        gap = max(0.0, now.wall - self.cursor.time) if self.cursor.time else 0.0
        self._base, self._origin = self.cursor.clock + gap, now.mono
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._end = self.cursor.offset
        try:
            if os.fstat(self._fd).st_size > self._end:
                # A torn last line: the next record starts one of its own.
                os.ftruncate(self._fd, self._end)
        except OSError:
            os.close(self._fd)
            raise

    def clock(self, now: Instant) -> float:
        """Seconds that the log has been written, by clocks that never step."""
        return self._base + max(0.0, now.mono - self._origin)

    def append(self, payloads: Sequence[Any], now: Instant) -> list[Event]:
        """Add events as one record; it is on disk before this returns.

        Raises:
            Fenced: where another controller writes the log; nothing of ours counts then.
            OSError: where the disk doesn't take it; what was written of it is cut off again.
        """
        if not payloads:
            return []
        self._fence()
        clock = self.clock(now)
        trees = [{"kind": p.kind} | asdict(p) for p in payloads]
        record = {"epoch": self._epoch, "time": now.wall, "clock": clock, "events": trees}
        self._write(_seal(record))
        first = self.cursor.seq
        written = [Event(first + i, now.wall, payload, clock) for i, payload in enumerate(payloads)]
        end = first + len(written)
        self.cursor = Cursor(self._end, end, self._epoch, now.wall, clock, self.cursor.damage)
        return written

    def _write(self, line: bytes) -> None:
        if os.fstat(self._fd).st_size != self._end:
            self._step_over()
        try:
            written = 0
            while written < len(line):  # a disk that fills up takes a part first, and only then refuses
                written += os.write(self._fd, line[written:])
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._end)
            raise
        self._end += len(line)

    def _step_over(self) -> None:
        """Pass over what a replaced controller has written since the last look.

        Raises:
            Fenced: where it isn't of an earlier epoch: then this one was replaced, or the file is somebody else's.
        """
        size = os.fstat(self._fd).st_size
        data = os.pread(self._fd, max(0, size - self._end), self._end)
        for line in data.splitlines(keepends=True):
            try:
                stale = int(from_json(line)["epoch"]) < self._epoch
            except (ValueError, KeyError, TypeError):
                stale = not line.endswith(b"\n")  # its writer died, or is cut off here
            if not stale:
                raise Fenced(f"somebody else has written the log: {line[:_NAMED].decode(errors='replace')}")
        whole = data.rfind(b"\n") + 1
        if size < self._end:
            raise Fenced("somebody else has shortened the log")
        os.ftruncate(self._fd, self._end + whole)
        self._end += whole

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
