"""The file of a node's steps: `attempts/NNN/steps/<node>.steps`, of a bounded size, written while others read it.

A pyramid of levels. Level 0 has each of the newest few thousand steps; each level above has the mean and the maximum of 4
columns of the one below. So a hundred thousand steps of eight ranks are 1.3 MiB, and a window of any width is a few hundred
columns of some level.

Layout: a page with a header in JSON, a page with two slots for what is committed, of which the newer whole one counts,
then each level's blocks of 128 columns, one after the other and round again. A block is the columns' begins (64 bits each:
ns since the epoch), then fields × kinds × ranks × 128 codes (`codes`), so one field of a block is one small read. Data is
written before the slot that tells of it, so a writer that dies leaves the last state whole; a reader's window keeps clear
of the blocks that may be overwritten next.
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import from_json
from configs.paths import AttemptPaths
from faulttol.timeline import codes
from faulttol.timeline.steps import FIELDS

STORED = (*FIELDS, "lag")
"""Fields of a file: `lag` is how much later than the node's first rank one began."""
FACTOR = 4
"""Columns of a level in one of the next."""
BLOCK = 128
"""Columns of a block."""
CAPACITIES = (4096, 1024, 1024, 1024, 1024, 1024, 1024)
"""Columns that each level holds: of 4,096 steps one by one, and so on up to 4.2 million."""
BATCH = 512
"""Most columns of level 0 that one commit adds."""
CLEAR = (1024, 256, 256, 256, 256, 256, 256)
"""Columns of each level, once it is full, that readers keep away from: a block, and what two commits may add."""
_MAGIC = b"MEGASTEPS1\n"
_PAGE = 4096
_SLOT = 512
_COMMIT = struct.Struct("<Qdq7Q")
"""Number, wall time, first step, columns by level; followed by a CRC-32."""


def folder(attempt: Path) -> Path:
    """Where an attempt's step files lie."""
    return AttemptPaths(attempt).steps


@dataclass(frozen=True)
class StepFileShape:
    """Where things are in a file."""

    node: str
    ranks: tuple[int, ...]

    @cached_property
    def header(self) -> bytes:
        """The first page."""
        tree = {
            "node": self.node,
            "ranks": list(self.ranks),
            "fields": STORED,
            "factor": FACTOR,
            "block": BLOCK,
            "columns": CAPACITIES,
        }
        text = _MAGIC + json.dumps(tree).encode()
        return text.ljust(-(-len(text) // _PAGE) * _PAGE, b"\0")

    @property
    def slots(self) -> int:
        """Byte of the first slot."""
        return len(self.header)

    def kinds(self, level: int) -> int:
        """1 for the values of steps, 2 for mean and maximum."""
        return 1 if level == 0 else 2

    def block(self, level: int) -> int:
        """Bytes of a block."""
        return 8 * BLOCK + len(STORED) * self.piece(level)

    def piece(self, level: int) -> int:
        """Bytes of one field in a block."""
        return self.kinds(level) * len(self.ranks) * BLOCK * 2

    def offset(self, level: int, number: int) -> int:
        """Byte at which a block begins."""
        start = self.slots + _PAGE
        for below in range(level):
            start += CAPACITIES[below] // BLOCK * self.block(below)
        return start + number % (CAPACITIES[level] // BLOCK) * self.block(level)


def shape_of(fd: int) -> StepFileShape | None:
    """The shape of an open file; None where it isn't one of this format."""
    data = os.pread(fd, 1 << 16, 0)
    if not data.startswith(_MAGIC):
        return None
    try:
        tree = from_json(data[len(_MAGIC) :].partition(b"\0")[0])
        shape = StepFileShape(str(tree["node"]), tuple(int(rank) for rank in tree["ranks"]))
    except (ValueError, KeyError, TypeError):
        return None
    return shape if data.startswith(shape.header.rstrip(b"\0")) else None


@dataclass(frozen=True)
class ColumnCommit:
    """What is whole in a file."""

    number: int = 0
    time: float = 0.0
    """Seconds since the epoch, when it was written."""
    first: int = 0
    """Step of the first column."""
    columns: tuple[int, ...] = (0,) * len(CAPACITIES)
    """By level, since the beginning."""

    def oldest(self, level: int) -> int:
        """First column that may be read."""
        return max(0, self.columns[level] - (CAPACITIES[level] - CLEAR[level]))


def read_commit(fd: int, shape: StepFileShape) -> ColumnCommit:
    """What is committed; nothing where nothing is."""
    data = os.pread(fd, 2 * _SLOT, shape.slots)
    best = ColumnCommit()
    for at in (0, _SLOT):
        part = data[at : at + _COMMIT.size + 4]
        if len(part) == _COMMIT.size + 4 and zlib.crc32(part[:-4]) == int.from_bytes(part[-4:], "little"):
            number, when, first, *columns = _COMMIT.unpack(part[:-4])
            if number > best.number:
                best = ColumnCommit(number, when, first, tuple(columns))
    return best


class StepFile:
    """Writes one file; one that is there is resumed, where it is of the same ranks.

    Args:
        path: of the file; its folder is made.
        node: its name.
        ranks: of the node.

    Raises:
        OSError: where it can't be made.
    """

    def __init__(self, path: Path, node: str, ranks: Sequence[int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.shape = StepFileShape(node, tuple(ranks))
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if shape_of(self._fd) != self.shape:
                os.ftruncate(self._fd, 0)
                self._put(self.shape.header, 0)
            self._commit = read_commit(self._fd, self.shape)
            self._columns = list(self._commit.columns)
            self._blocks = [self._block_at(level) for level in range(len(CAPACITIES))]
            self._below: list[list[tuple[int, NDArray[np.float64]]]] = [
                self._unfinished(level) for level in range(len(CAPACITIES))
            ]
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def first(self) -> int | None:
        """Step of the first column; None while there is none."""
        return self._commit.first if self._columns[0] else None

    @property
    def next(self) -> int | None:
        """Step that the next column is for; None while there is none."""
        return self._commit.first + self._columns[0] if self._columns[0] else None

    def append(self, first: int, starts: NDArray[np.int64], seconds: NDArray[Any]) -> None:
        """Add columns for steps that follow each other, and what is missing before them as unknown.

        Args:
            first: number of the first step.
            starts: [steps] ns since the epoch, when the node's first rank began.
            seconds: [fields of `STORED`, ranks, steps].

        Raises:
            OSError: where they can't be written. The file is then as it was committed last, and this object isn't: close
                it, and open the file again.
        """
        follows = self.next
        while follows is not None and follows < first:
            missing = min(BATCH, first - follows)
            self._commit_batch(
                follows, np.repeat(starts[:1], missing), np.full((*seconds.shape[:2], missing), np.nan)
            )
            follows += missing
        cut = 0 if follows is None else follows - first
        for at in range(cut, len(starts), BATCH):
            self._commit_batch(first + at, starts[at : at + BATCH], seconds[:, :, at : at + BATCH])

    def _commit_batch(self, first: int, starts: NDArray[np.int64], seconds: NDArray[Any]) -> None:
        """Write columns, then the slot that tells of them."""
        self._add(0, starts, seconds[:, None].astype(np.float64))
        number = self._commit.number + 1
        begin = self._commit.first if self._commit.number else first
        self._commit = ColumnCommit(number, time.time(), begin, tuple(self._columns))
        data = _COMMIT.pack(number, self._commit.time, begin, *self._columns)
        slot = data + zlib.crc32(data).to_bytes(4, "little")
        self._put(slot, self.shape.slots + number % 2 * _SLOT)

    def _put(self, data: bytes, at: int) -> None:
        """Write all of it: a storage that gets full takes a part first, and says so at the next write."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], at + done)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _add(self, level: int, starts: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        """Add columns [fields, kinds, ranks, columns] to a level, and what they complete to the levels above."""
        done = 0
        while done < len(starts):
            number, inside = divmod(self._columns[level], BLOCK)
            count = min(BLOCK - inside, len(starts) - done)
            block = self._blocks[level]
            block[0][inside : inside + count] = starts[done : done + count]
            block[1][..., inside : inside + count] = codes.encode(seconds[..., done : done + count])
            self._put(block[0].tobytes() + block[1].tobytes(), self.shape.offset(level, number))
            self._columns[level] += count
            done += count
            if inside + count == BLOCK:
                self._blocks[level] = self._empty(level)
        if level + 1 < len(CAPACITIES):
            self._raise(level, starts, seconds)

    def _raise(self, level: int, starts: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        """Complete columns of the level above."""
        waiting = self._below[level]
        all_starts = np.concatenate([np.array([start for start, _ in waiting], np.int64), starts])
        everything = np.concatenate([*(column[..., None] for _, column in waiting), seconds], axis=-1)
        whole = len(all_starts) // FACTOR * FACTOR
        self._below[level] = [
            (int(all_starts[i]), everything[..., i].copy()) for i in range(whole, len(all_starts))
        ]
        if whole:
            parts = everything[..., :whole].reshape(*everything.shape[:-1], whole // FACTOR, FACTOR)
            self._add(
                level + 1, all_starts[:whole:FACTOR], np.stack((mean(parts[:, 0]), most(parts[:, -1])), 1)
            )

    def _empty(self, level: int) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        shape = (len(STORED), self.shape.kinds(level), len(self.shape.ranks), BLOCK)
        return np.zeros(BLOCK, np.int64), np.full(shape, codes.UNKNOWN, np.uint16)

    def _block_at(self, level: int) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        """The block that is being filled."""
        starts, seconds = self._empty(level)
        number, inside = divmod(self._columns[level], BLOCK)
        if inside:
            data = os.pread(self._fd, self.shape.block(level), self.shape.offset(level, number))
            starts[:] = np.frombuffer(data[: 8 * BLOCK], np.int64)
            seconds[:] = np.frombuffer(data[8 * BLOCK :], np.uint16).reshape(seconds.shape)
        return starts, seconds

    def _unfinished(self, level: int) -> list[tuple[int, NDArray[np.float64]]]:
        """Columns of a level that the one above doesn't have yet."""
        columns: list[tuple[int, NDArray[np.float64]]] = []
        if level + 1 == len(CAPACITIES):
            return columns
        for column in range(self._columns[level + 1] * FACTOR, self._columns[level]):
            number, inside = divmod(column, BLOCK)
            data = os.pread(self._fd, self.shape.block(level), self.shape.offset(level, number))
            starts = np.frombuffer(data[: 8 * BLOCK], np.int64)
            block = np.frombuffer(data[8 * BLOCK :], np.uint16).reshape(self._empty(level)[1].shape)
            columns.append((int(starts[inside]), codes.decode(block[..., inside]).astype(np.float64)))
        return columns


def mean(parts: NDArray[Any]) -> NDArray[Any]:
    """The mean along the last axis of what is known; NaN where nothing is."""
    known = ~np.isnan(parts)
    count = known.sum(-1)
    return np.where(count > 0, np.where(known, parts, 0.0).sum(-1) / np.maximum(count, 1), np.nan)


def most(parts: NDArray[Any]) -> NDArray[Any]:
    """Likewise the maximum."""
    return np.fmax.reduce(parts, axis=-1)
