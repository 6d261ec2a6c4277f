"""The detail of a node's steps: `attempts/NNN/steps/<node>.detail`, records as the ranks wrote them, for the timeline.

Chunks are appended, each whole or not there: length, CRC-32, then JSON and arrays, compressed. When the file has its size
it becomes `<node>.detail.1`, and the one before goes. A chunk holds the records of one rank; times are the node's monotonic
clock, and the chunk says what is added for the time since the epoch.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import from_json
from faulttol.timeline import rings, trace
from faulttol.timeline.trace import RECORD, OngoingWait, TracedGroup

_HEAD = struct.Struct("<4sII")
_MAGIC = b"MDT1"


@dataclass(frozen=True)
class DetailChunk:
    """Records of one rank."""

    rank: int
    node: str
    offset: int
    """Nanoseconds that are added to the node's monotonic clock for the time since the epoch."""
    first: int
    """First step of the records; -1 for what was not finished."""
    last: int
    phases: NDArray[Any]
    """Of type `rings.ROW`; times by the monotonic clock."""
    calls: NDArray[Any]
    """Of type `trace.RECORD`, likewise."""
    groups: dict[int, TracedGroup] = field(default_factory=dict)
    """Where they have changed since this rank's last chunk."""
    waiting: OngoingWait | None = None
    """The wait that it was in, where the records end within it."""


class DetailLog:
    """Appends chunks.

    Args:
        path: of the file; its folder is made.
        limit: bytes after which it is begun anew; twice as many are kept.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._limit = path, limit

    def append(self, chunks: list[DetailChunk]) -> int:
        """Write chunks; the bytes that they took.

        Raises:
            OSError: where they can't be written.
        """
        data = b"".join(_pack(chunk) for chunk in chunks)
        if not data:
            return 0
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists() and self._path.stat().st_size + len(data) > self._limit:
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(fd, data)  # cut short, its last chunk is stepped over
        finally:
            os.close(fd)
        return len(data)


def _pack(chunk: DetailChunk) -> bytes:
    head: dict[str, Any] = {
        "rank": chunk.rank,
        "node": chunk.node,
        "offset": chunk.offset,
        "steps": [chunk.first, chunk.last],
        "records": [len(chunk.phases), len(chunk.calls)],
    }
    if chunk.groups:
        head["groups"] = {str(n): [g.name, trace.compact_ranks(g.ranks)] for n, g in chunk.groups.items()}
    if chunk.waiting is not None:
        head["waiting"] = vars(chunk.waiting)
    parts = [json.dumps(head).encode() + b"\n"]
    for rows in (chunk.phases, chunk.calls):
        # A column after the other, as differences: most are small and alike.
        for name in rows.dtype.names or ():
            parts.append(np.diff(rows[name].astype(np.int64), prepend=0).tobytes())
    body = zlib.compress(b"".join(parts), 1)
    return _HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body


def read(path: Path) -> Iterator[DetailChunk]:
    """Chunks of a detail file and of the one before it, oldest first. What is cut short or damaged is stepped over."""
    for part in (path.with_name(path.name + ".1"), path):
        try:
            data = part.read_bytes()
        except OSError:
            continue
        at = 0
        while 0 <= at <= len(data) - _HEAD.size:
            magic, size, check = _HEAD.unpack_from(data, at)
            body = data[at + _HEAD.size : at + _HEAD.size + size]
            if magic == _MAGIC and len(body) == size and zlib.crc32(body) == check:
                yield _unpack(body)
                at += _HEAD.size + size
            else:
                at = data.find(_MAGIC, at + 1)


def _unpack(body: bytes) -> DetailChunk:
    head, _, data = zlib.decompress(body).partition(b"\n")
    tree = from_json(head)
    tables, at = [], 0
    for kind, count in zip((rings.ROW, RECORD), tree["records"], strict=True):
        rows = np.zeros(count, kind)
        for name in kind.names or ():
            rows[name] = np.frombuffer(data[at : at + 8 * count], np.int64).cumsum().astype(kind[name])
            at += 8 * count
        tables.append(rows)
    waiting = OngoingWait(**tree["waiting"]) if "waiting" in tree else None
    groups = trace.groups_of(tree.get("groups", {}))
    first, last = tree["steps"]
    phases, calls = tables
    return DetailChunk(
        tree["rank"], tree["node"], tree["offset"], first, last, phases, calls, groups, waiting
    )
