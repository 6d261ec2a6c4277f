"""What a node keeps of its ranks' steps: read from the ranks' rings once a second, written to the run's folder.

Reading touches the node's memory alone. Writing touches storage, which may hold it up for minutes; so the two are apart,
and what can't be written waits in memory, of a bounded size. Nothing here raises into its caller's loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.rank import RankFiles
from faulttol import steady_clock
from faulttol.recorder import PhaseMark
from faulttol.timeline import trace
from faulttol.timeline.detail import DetailChunk, DetailLog
from faulttol.timeline.step_file import StepFile, folder
from faulttol.timeline.steps import FIELDS, RankSteps, StepRows

log = logging.getLogger("megaray.timeline")

_WIDTH = 8192
"""Steps that wait in memory, at most."""
_PATIENCE = 256
"""Steps that a rank may be behind the node's first before its values are given up."""
_EVERY = 5.0
"""Seconds between two writes."""
_DETAIL_RATE = (256 << 10, 64 << 20)
"""Bytes a second of detail: most of a node, and of all nodes of the gang together."""
_DETAIL_KEPT = (16 << 20, 4 << 30)
"""Bytes of detail kept, likewise."""
_DETAIL_LEAST = 1 << 20
_COARSEST = 4096
_GROUPS_EVERY = 64
"""Chunks of a rank between two that tell its groups."""
_DETAIL_WAITING = 4096
"""Chunks that wait in memory, at most."""


@dataclass
class _Rank:
    rank: int
    files: RankFiles
    steps: RankSteps
    done: int = -1
    """The step after the newest whose values are known; -1 before the first."""
    groups: tuple[int, ...] = ()
    """Groups that the detail has reported."""
    chunks: int = 0


class StepStore:
    """Keeps the steps of one attempt's ranks on one node.

    Args:
        attempt: the attempt's folder on the run's storage.
        node: a name of the node that no other one of the gang has, such as its address.
        ranks: that run here.
        rings: folder of their rings in the node's memory.
        nodes: of the gang; what all of them write together is bounded.
    """

    def __init__(self, attempt: Path, node: str, ranks: Sequence[int], rings: Path, nodes: int = 1) -> None:
        self._node, self._path = node.replace("/", "_"), folder(attempt)
        self._ranks = []
        for rank in sorted(ranks):
            files = RankFiles(rings, rank)
            self._ranks.append(_Rank(rank, files, RankSteps(files.ring, trace.trace_of(files))))
        self._seconds = np.full((len(FIELDS), len(self._ranks), _WIDTH), np.nan)
        self._starts = np.zeros((len(self._ranks), _WIDTH), np.int64)
        self._base = -1
        """Step of the first place of both; -1 before the first step."""
        self._sealed = -1
        """The step after the newest that is complete."""
        self._file: StepFile | None = None
        self._detail = DetailLog(
            self._path / f"{self._node}.detail",
            max(_DETAIL_LEAST, min(_DETAIL_KEPT[0], _DETAIL_KEPT[1] // nodes)) // 2,
        )
        self._rate = min(_DETAIL_RATE[0], _DETAIL_RATE[1] // nodes)
        self._chunks: list[DetailChunk] = []
        self._stride = 1
        self._last_write = time.monotonic()
        self._told = False

    def append(self) -> None:
        """Read the rings, and write what is due; called about once a second."""
        self.gather()
        self.write()

    def gather(self) -> None:
        """Read the rings. Touches the node's memory alone, in about a millisecond for each rank."""
        self._gather(RankSteps.gather)

    def _gather(self, how: Callable[[RankSteps], StepRows | None]) -> None:
        for row, one in enumerate(self._ranks):
            try:
                fresh = how(one.steps)
            except Exception:
                self._log_once(f"the ring of rank {one.rank} can't be read")
                continue
            if fresh is not None and fresh.count:
                self._keep(row, fresh)
                self._sample_detail(one, fresh)
        done = [one.done for one in self._ranks if one.done >= 0]
        if done:
            everybody = min(done) if len(done) == len(self._ranks) else -1
            self._sealed = max(self._sealed, everybody, max(done) - _PATIENCE)

    def write(self, everything: bool = False) -> None:
        """Write complete steps, where the last time is some seconds ago or `everything`. Touches storage."""
        now = time.monotonic()
        if now - self._last_write < _EVERY and not everything:
            return
        seconds, self._last_write = now - self._last_write, now
        try:
            self._write_steps()
            size = self._detail.append(self._chunks)
            self._chunks.clear()
            self._throttle_detail(size, max(seconds, 1e-3))
        except Exception:  # an observer's fault never stops training
            self._log_once(f"{self._path} takes no steps")

    def close(self) -> None:
        """Write what is left, the step that wasn't finished too; called when no rank is to be read any more."""
        self.gather()
        self._gather(RankSteps.finish)
        done = [one.done for one in self._ranks if one.done >= 0]
        self._sealed = max([self._sealed, *done])
        for one in self._ranks:
            phases, calls = one.steps.rest()
            calls = calls[calls["began"] >= phases["ns"][0]] if len(phases) else calls[calls["sequence"] > 0]
            if len(phases) or len(calls):
                self._chunks.append(self._chunk(one, -1, -1, phases, calls))
        self.write(everything=True)
        self._close_file()

    # ---- steps ----

    def _keep(self, row: int, fresh: StepRows) -> None:
        """Put a rank's steps where they wait for the other ranks'."""
        if self._base < 0:
            self._base = fresh.first
        end = fresh.first + fresh.count
        self._ranks[row].done = end
        if end - self._base > _WIDTH:  # storage has taken nothing for long
            self._drop(end - self._base - _WIDTH)
        skipped = max(0, self._base - fresh.first)
        begin = fresh.first + skipped - self._base
        if skipped < fresh.count:
            self._seconds[:, row, begin : end - self._base] = fresh.seconds[:, skipped:]
            self._starts[row, begin : end - self._base] = fresh.starts[skipped:]

    def _drop(self, count: int) -> None:
        """Forget the oldest steps."""
        left = max(0, _WIDTH - count)
        for rows, blank in ((self._seconds, np.nan), (self._starts, 0)):
            rows[..., :left] = rows[..., _WIDTH - left :].copy()
            rows[..., left:] = blank
        self._base += count

    def _write_steps(self) -> None:
        count = self._sealed - self._base
        if self._base < 0 or count <= 0:
            return
        if self._file is None:
            self._file = StepFile(
                self._path / f"{self._node}.steps", self._node, [one.rank for one in self._ranks]
            )
        starts, seconds = self._starts[:, :count], self._seconds[:, :, :count]
        known = starts > 0
        first = np.where(known, starts, np.iinfo(np.int64).max).min(0)
        lag = np.where(known, (starts - first) / 1e9, np.nan)
        wall = np.where(known.any(0), first + steady_clock.OFFSET_NS, 0)
        try:
            # In the order of `file.STORED`.
            self._file.append(self._base, wall, np.concatenate((seconds, lag[None])))
        except BaseException:
            # What it has in memory is ahead of the file, or the file's handle is stale: from the last commit anew.
            self._close_file()
            raise
        self._drop(count)

    def _close_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    # ---- detail ----

    def _sample_detail(self, one: _Rank, fresh: StepRows) -> None:
        """Take the detail of the steps that are kept in detail: the same ones on all nodes, or every second of theirs."""
        phases, calls = fresh.phases, fresh.calls
        first, last = fresh.first, fresh.first + fresh.count - 1
        if self._stride > 1:
            edges = np.append(fresh.starts, np.iinfo(np.int64).max)
            for index in range((-first) % self._stride, fresh.count, self._stride):
                own = phases[(phases["step"] == first + index) & (phases["mark"] != PhaseMark.STEP)]
                began = calls[(calls["began"] >= edges[index]) & (calls["began"] < edges[index + 1])]
                self._chunks.append(self._chunk(one, first + index, first + index, own, began))
        else:
            self._chunks.append(self._chunk(one, first, last, phases, calls))
        del self._chunks[:-_DETAIL_WAITING]

    def _chunk(
        self, one: _Rank, first: int, last: int, phases: NDArray[Any], calls: NDArray[Any]
    ) -> DetailChunk:
        groups = trace.read_groups(trace.table_of(one.files))
        # Now and then again, since the oldest chunks are removed.
        fresh = groups if tuple(groups) != one.groups or one.chunks % _GROUPS_EVERY == 0 else {}
        one.groups, one.chunks = tuple(groups), one.chunks + 1
        waiting = one.steps.waiting if first < 0 else None
        return DetailChunk(
            one.rank, self._node, steady_clock.OFFSET_NS, first, last, phases, calls, fresh, waiting
        )

    def _throttle_detail(self, size: int, seconds: float) -> None:
        """Keep fewer steps in detail where they take more than their share of storage."""
        rate = size / seconds
        if rate > self._rate and self._stride < _COARSEST:
            self._stride *= 2
        elif rate < self._rate / 4 and self._stride > 1:
            self._stride //= 2

    def _log_once(self, what: str) -> None:
        """Once, with the traceback: the next second says it again otherwise."""
        if not self._told:
            log.warning("%s; steps are missing in the heat map and the timeline", what, exc_info=True)
            self._told = True
