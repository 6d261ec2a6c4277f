"""Any window of an attempt's steps, from the files of all its nodes, as a small matrix; while they are written.

Reads a few blocks of each file, of the finest level whose columns are few enough. Twelve thousand ranks are fifteen
hundred files: they are kept open, and one is read with one small call for each block.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faulttol.timeline import codes
from faulttol.timeline.binning import BinTotals
from faulttol.timeline.step_file import (
    BATCH,
    BLOCK,
    CAPACITIES,
    FACTOR,
    STORED,
    ColumnCommit,
    StepFileShape,
    folder,
    read_commit,
    shape_of,
)

_AT_ONCE = 48
"""Files whose values are worked on together: so they stay in the processor's caches."""
_VALUES = 4 << 20
"""Values that a window should read; with more ranks it is coarser."""
_FRESH = 1.0
"""Seconds for which a look at what is committed holds."""
_LIST = 5.0
"""Likewise at which files there are."""


@dataclass
class _File:
    path: Path
    shape: StepFileShape
    fd: int = -1
    commit: ColumnCommit = field(default_factory=ColumnCommit)


@dataclass(frozen=True)
class Window:
    """Values of ranks and steps."""

    edges: NDArray[np.int64]
    """[columns + 1]: column c holds the steps from edges[c] up to but without edges[c + 1]."""
    ranks: NDArray[np.int64]
    """[rows], ascending."""
    mean: NDArray[np.float32]
    """[rows, columns] seconds; NaN where nothing is known."""
    most: NDArray[np.float32]
    """Likewise the largest within a column."""


class AttemptSteps:
    """Reads the steps of one attempt; keep it, since it keeps files open.

    Args:
        attempt: the attempt's folder.
    """

    def __init__(self, attempt: Path) -> None:
        self._folder = folder(attempt)
        self._files: dict[str, _File] = {}
        self._listed = self._looked = -1e9
        self._keeps = True
        """Files may be kept open; False once the process has as many as it may."""

    # ---- what there is ----

    @property
    def ranks(self) -> NDArray[np.int64]:
        """Ranks that have a file, ascending."""
        self._refresh()
        return np.array(sorted(rank for one in self._files.values() for rank in one.shape.ranks), np.int64)

    @property
    def nodes(self) -> dict[str, tuple[int, ...]]:
        """Ranks by node."""
        self._refresh()
        return {one.shape.node: one.shape.ranks for one in self._files.values()}

    @property
    def span(self) -> tuple[int, int] | None:
        """First step, and the one after the last, that something is known of; None where there is none."""
        self._refresh()
        spans = [
            (c.first, c.first + c.columns[0])
            for c in (one.commit for one in self._files.values())
            if c.number
        ]
        return (min(a for a, _ in spans), max(b for _, b in spans)) if spans else None

    def _refresh(self, again: bool = False) -> None:
        now = time.monotonic()
        if now - self._listed > _LIST or again:
            self._listed = now
            self._list()
        if now - self._looked > _FRESH or again:
            self._looked = now
            for one in self._files.values():
                self._with_open_file(one, self._recommit)

    def _list(self) -> None:
        try:
            names = {entry.name for entry in os.scandir(self._folder) if entry.name.endswith(".steps")}
        except OSError:
            names = set()
        for name in self._files.keys() - names:
            self._close_file(self._files.pop(name))
        for name in sorted(names - self._files.keys()):
            path = self._folder / name
            try:
                fd = os.open(path, os.O_RDONLY)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    continue
                self._close_all()
                fd = os.open(path, os.O_RDONLY)
            try:
                shape = shape_of(fd)
            except OSError:
                shape = None
            if shape is not None:
                self._files[name] = _File(path, shape, fd)
            if shape is None or not self._keeps:
                os.close(fd)
                if shape is not None:
                    self._files[name].fd = -1

    def _close_all(self) -> None:
        """The process has as many open files as it may: keep none."""
        self._keeps = False
        for one in self._files.values():
            self._close_file(one)

    @staticmethod
    def _close_file(one: _File) -> None:
        if one.fd >= 0:
            os.close(one.fd)
            one.fd = -1

    def close(self) -> None:
        """Close the files."""
        for one in self._files.values():
            self._close_file(one)
        self._files.clear()

    def _with_open_file(self, one: _File, act: Any) -> Any:
        """What `act` gives of an open file; None where it can't be read."""
        if one.fd >= 0:
            try:
                return act(one, one.fd)
            except OSError:  # a handle that a file server doesn't know any more, after a restart of it
                self._close_file(one)
        try:
            fd = os.open(one.path, os.O_RDONLY)
        except OSError:
            return None
        try:
            answer = act(one, fd)
        except OSError:
            os.close(fd)
            return None
        if self._keeps:
            one.fd = fd
        else:
            os.close(fd)
        return answer

    @staticmethod
    def _recommit(one: _File, fd: int) -> None:
        one.commit = read_commit(fd, one.shape)

    # ---- windows ----

    def window(
        self, name: str, first: int, last: int, columns: int = 200, ranks: range | None = None
    ) -> Window:
        """A field of ranks over steps.

        Args:
            name: one of `file.STORED`.
            first: first step.
            last: the step after the last.
            columns: about how many; as many steps are joined to a column as it takes, and never fewer than are joined in
                the files for steps that long ago.
            ranks: only these; None: all.
        """
        self._refresh()
        wanted = range(1 << 62) if ranks is None else ranks
        files = [one for one in self._files.values() if any(rank in wanted for rank in one.shape.ranks)]
        rows = np.array(sorted(rank for one in files for rank in one.shape.ranks), np.int64)
        chosen = (rows >= wanted.start) & (rows < wanted.stop)
        span = self.span
        first, last = (max(first, span[0]), min(last, span[1])) if span else (first, first)
        if last <= first or span is None or not files:
            empty = np.zeros((int(chosen.sum()), 0), np.float32)
            return Window(np.array([first], np.int64), rows[chosen], empty, empty)
        width = max(1, -(-(last - first) // max(1, columns)))
        level = self._level(files, span[0], (first, last), width)
        width = -(-width // FACTOR**level) * FACTOR**level
        # At multiples of their width from the attempt's first step, columns hold the same steps in any window.
        begin = span[0] + (first - span[0]) // width * width
        edges = np.arange(begin, last + width, width, dtype=np.int64)
        means = np.full((len(rows), len(edges) - 1), np.nan, np.float32)
        mosts = means.copy()
        for alike in _group_alike(files):
            for at in range(0, len(alike), _AT_ONCE):
                some = alike[at : at + _AT_ONCE]
                own = np.searchsorted(rows, [rank for one in some for rank in one.shape.ranks])
                means[own], mosts[own] = self._read_group(some, STORED.index(name), edges, level)
        edges[-1] = min(edges[-1], span[1])
        if not chosen.all():
            rows, means, mosts = rows[chosen], means[chosen], mosts[chosen]
        return Window(edges, rows, means, mosts)

    @staticmethod
    def _level(files: list[_File], begin: int, span: tuple[int, int], width: int) -> int:
        """The coarsest level that is as fine as asked, or the finest that still has the first step."""
        first, last = span
        commit = max((one.commit for one in files), key=lambda c: c.columns[0])
        finest = 0
        while finest + 1 < len(CAPACITIES) and begin + commit.oldest(finest) * FACTOR**finest > first:
            finest += 1
        most = max(1.0, _VALUES / sum(len(one.shape.ranks) for one in files))
        while finest + 1 < len(CAPACITIES) and commit.columns[finest + 1]:
            if FACTOR ** (finest + 1) > width and (last - first) / FACTOR**finest <= most:
                break
            finest += 1
        return finest

    def _read_group(
        self, files: list[_File], which: int, edges: NDArray[np.int64], level: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and most of alike files: [their ranks, columns]."""
        first = files[0].commit.first
        total = BinTotals(len(files) * len(files[0].shape.ranks), edges)
        lower, upper = int(edges[0]), int(edges[-1])
        for at in range(level, -1, -1):  # what a level doesn't have yet is in the ones below
            size = FACTOR**at
            begin = max((lower - first) // size, 0, max(one.commit.oldest(at) for one in files))
            end = min(max(one.commit.columns[at] for one in files), -(-(upper - first) // size))
            if end > begin:
                means, mosts = self._read(files, which, at, (begin, end))
                total.add(means, mosts, first + np.arange(begin, end, dtype=np.int64) * size, size)
                lower = first + end * size
            if upper - lower < (edges[1] - edges[0]) / 8:
                break  # too little of the last column to show
        return total.result()

    def _read(
        self, files: list[_File], which: int, level: int, span: tuple[int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and most of columns of a level: [ranks of the files, columns]."""
        means, mosts = self._read_once(files, which, level, span)
        self._with_open_file(files[0], self._recommit)  # all nodes train the same steps
        # What the writer may have gone over meanwhile: up to the end of the block that its next commit may reach.
        reached = files[0].commit.columns[level] + -(-BATCH // FACTOR**level)
        lost = -(-reached // BLOCK) * BLOCK - CAPACITIES[level] - span[0]
        if lost > 0:
            means[:, :lost] = mosts[:, :lost] = np.nan
        return means, mosts

    def _read_once(
        self, files: list[_File], which: int, level: int, span: tuple[int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        begin, end = span
        shape = files[0].shape
        size, skip = shape.piece(level), 8 * BLOCK + which * shape.piece(level)
        numbers = range(begin // BLOCK, (end - 1) // BLOCK + 1)
        places = [shape.offset(level, number) + skip for number in numbers]
        blank = b"\xff" * (size * len(places))

        def pieces(_one: _File, fd: int) -> bytes:
            data = b"".join([os.pread(fd, size, place) for place in places])
            return data if len(data) == len(blank) else blank

        data = b"".join([self._with_open_file(one, pieces) or blank for one in files])
        kinds, ranks = shape.kinds(level), len(shape.ranks)
        table = np.frombuffer(data, np.uint16).reshape(len(files), len(places), kinds, ranks, BLOCK)
        cut = slice(begin - numbers[0] * BLOCK, end - numbers[0] * BLOCK)
        rows = len(files) * ranks
        decoded: list[NDArray[np.float32]] = []
        for kind in range(kinds):
            part = table[:, :, kind].transpose(0, 2, 1, 3).reshape(rows, -1)[:, cut]
            decoded.append(codes.decode(part))
        for index, one in enumerate(files):
            if one.commit.columns[level] < end:
                for values in decoded:
                    values[
                        index * ranks : (index + 1) * ranks, max(0, one.commit.columns[level] - begin) :
                    ] = np.nan
        return decoded[0], decoded[-1]


def _group_alike(files: list[_File]) -> list[list[_File]]:
    """Files by first step, ranks and length of the header: alike ones are read as one array."""
    by_shape: dict[tuple[int, int, int], list[_File]] = {}
    for one in files:
        if one.commit.number:
            key = (one.commit.first, len(one.shape.ranks), one.shape.slots)
            by_shape.setdefault(key, []).append(one)
    return list(by_shape.values())
