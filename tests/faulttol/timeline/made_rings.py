"""Rings and traces as a rank would write them, on a clock that is told: every second of a step is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.rank import RankFiles
from faulttol import recorder
from faulttol.recorder import RankPhase, Recorder
from faulttol.timeline.trace import (
    BATCHED,
    CollectiveCall,
    Op,
    TracedGroup,
    TraceWriter,
    WaitLane,
    table_of,
    trace_of,
    write_groups,
)

MS = 1_000_000
START = 50_000 * MS


@dataclass(frozen=True)
class Did:
    """What a rank did in a step, in ms."""

    data: int = 2
    compute: int = 20
    wait: int = 5
    save: int = 0
    evaluate: int = 0
    beside: int = 0
    """Of waits of another thread, which hold nobody up."""


class MadeRank:
    """One rank that writes its files, on a clock of its own."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        patch: pytest.MonkeyPatch,
        capacity: int = 4096,
        calls: int = 1024,
        start: int = START,
    ) -> None:
        self.files = RankFiles(folder, rank)
        self.now = start
        self._patch = patch
        self.ring = Recorder(self.files.ring, rank, capacity)
        self.trace = TraceWriter(trace_of(self.files), rank, calls)
        write_groups(table_of(self.files), {7: TracedGroup("dp", range(4))})
        self.count = 0

    def _at(self, milliseconds: int) -> None:
        self.now += milliseconds * MS
        self._patch.setattr(recorder.time, "monotonic_ns", lambda: self.now)

    def phase(self, phase: RankPhase, step: int, milliseconds: int) -> None:
        """A phase from now on."""
        self._at(0)
        self.ring.begin(phase, step)
        self._at(milliseconds)
        self.ring.end(phase, step)

    def waits(
        self,
        milliseconds: int,
        lane: int = WaitLane.MAIN,
        flags: int = 0,
        op: int = Op.ALL_REDUCE,
        move: bool = True,
    ) -> None:
        """A call that is waited for from now on."""
        call = CollectiveCall(op, self.now - MS, 7, self.count, -1, 400)
        self.count += 1
        self.trace.write(call, self.now, self.now + milliseconds * MS, lane, flags)
        if move:
            self._at(milliseconds)

    def started(self, step: int = 0) -> None:
        """The start of a rank, up to its first step."""
        self._at(0)
        self.ring.begin(RankPhase.IMPORTS, 0)
        self._at(900)
        self.ring.begin(RankPhase.DATA, 0)
        self._at(100)
        self.ring.begin(RankPhase.RENDEZVOUS, 0)
        self.waits(300)
        self.ring.begin(RankPhase.BUILD, 0)
        self._at(10)
        self.ring.begin(RankPhase.LOAD, 0)
        self._at(10)

    def step(self, number: int, did: Did = Did()) -> None:
        """One step with its save."""
        self.phase(RankPhase.DATA, number, did.data)
        self._at(0)
        self.ring.begin(RankPhase.FORWARD, number)
        self._at(did.compute // 2)
        self.waits(did.beside, WaitLane.BESIDE, move=False)
        self.waits(did.wait, move=False)
        self.waits(did.wait, flags=BATCHED)
        self.ring.end(RankPhase.FORWARD, number)
        self.phase(RankPhase.OPTIMIZER, number, did.compute - did.compute // 2)
        self.ring.step(number)
        if did.save:
            self.ring.begin(RankPhase.CHECKPOINT, number)
            self.waits(did.save // 2)
            self.ring.touch()
            self.ring.begin(RankPhase.COLLECTIVE, number)
            self._at(did.save - did.save // 2)
            self.ring.begin(RankPhase.CHECKPOINT, number)
            self.ring.end(RankPhase.CHECKPOINT, number)

    def close(self) -> None:
        """Unmap the files."""
        self.ring.close()
        self.trace.close()


def gang(folder: Path, ranks: Sequence[int], patch: pytest.MonkeyPatch) -> list[MadeRank]:
    """Ranks that have started."""
    made = [MadeRank(folder, rank, patch) for rank in ranks]
    for one in made:
        one.started()
    return made
