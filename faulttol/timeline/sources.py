"""Where records of an attempt lie: what the nodes kept in detail, rings that are still there, and evidence of faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import from_json
from configs.paths import AttemptPaths
from configs.rank import RankFiles
from faulttol import steady_clock
from faulttol.recorder import PhaseMark, RankPhase
from faulttol.timeline import detail, rings, trace
from faulttol.timeline.step_file import folder
from faulttol.timeline.trace import RECORD, OngoingWait, TracedGroup


@dataclass
class Activity:
    """What one rank did; times in ns since the epoch, by its node's clock."""

    rank: int
    node: str
    phases: NDArray[Any] = field(default_factory=lambda: np.zeros(0, rings.ROW))
    """Of type `rings.ROW`, by time."""
    calls: NDArray[Any] = field(default_factory=lambda: np.zeros(0, RECORD))
    """Of type `trace.RECORD`, by the begin of the wait."""
    groups: dict[int, TracedGroup] = field(default_factory=dict)
    waiting: OngoingWait | None = None
    """The wait that it was in at the end."""

    def shift(self, nanoseconds: int) -> None:
        """Move all times."""
        self.phases["ns"] += nanoseconds
        for name in ("issued", "began", "ended", "device_began", "device_ended"):
            times = self.calls[name]
            times[times > 0] += nanoseconds
        if self.waiting is not None:
            self.waiting = OngoingWait(**{**vars(self.waiting), "began": self.waiting.began + nanoseconds})

    def between(self, begin: int, end: int) -> None:
        """Keep what happened in a span of time."""
        times, ends = self.phases["ns"], self.phases["mark"] == PhaseMark.END
        self.phases = self.phases[(times >= begin) & ((times < end) | (ends & (times == end)))]
        self.calls = self.calls[(self.calls["began"] >= begin) & (self.calls["began"] < end)]
        if self.waiting is not None and self.waiting.began > end:
            self.waiting = None


def activities(attempt: AttemptPaths) -> dict[int, Activity]:
    """What is on record of each rank of an attempt, by rank."""
    parts: dict[int, list[Activity]] = {}
    for one in (*_kept(attempt), *_rings(attempt), *_evidence(attempt)):
        parts.setdefault(one.rank, []).append(one)
    return {rank: _merged(parts[rank]) for rank in sorted(parts)}


def _kept(attempt: AttemptPaths) -> Iterator[Activity]:
    where = folder(attempt.root)
    if not where.is_dir():
        return
    for path in sorted(where.glob("*.detail")):
        for chunk in detail.read(path):
            one = Activity(chunk.rank, chunk.node, chunk.phases, chunk.calls, chunk.groups, chunk.waiting)
            one.shift(chunk.offset)
            yield one


def _rings(attempt: AttemptPaths) -> Iterator[Activity]:
    """Rings in the run's own folder, as under torchrun. They are of this node, or as good as that."""
    if not attempt.ranks.is_dir():
        return
    for path in sorted(attempt.ranks.glob("*.ring")):
        if not path.stem.isdigit():
            continue
        files = RankFiles(attempt.ranks, int(path.stem))
        traced = trace.read(trace.trace_of(files))
        one = Activity(
            files.rank,
            "",
            rings.read(path),
            traced.records,
            trace.read_groups(trace.table_of(files)),
            traced.waiting,
        )
        one.shift(steady_clock.OFFSET_NS)
        yield one


def _evidence(attempt: AttemptPaths) -> Iterator[Activity]:
    """Rings that were copied before the ranks were stopped."""
    if not attempt.evidence.is_dir():
        return
    for path in sorted(attempt.evidence.rglob("*.ring.json")):
        try:
            tree = from_json(path.read_bytes())
            rows = np.zeros(len(tree), rings.ROW)
            for row, one in zip(rows, tree, strict=True):
                row["sequence"], row["ns"], row["step"] = (
                    one["sequence"],
                    round(one["time"] * 1e9),
                    one["step"],
                )
                row["mark"], row["phase"] = PhaseMark[one["mark"]], RankPhase[one["phase"]]
            yield Activity(int(path.name.partition(".")[0]), "", rows)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # cut short while it was written


def _merged(parts: list[Activity]) -> Activity:
    node = next((part.node for part in parts if part.node), parts[0].node)
    whole = Activity(parts[0].rank, node)
    _, first = np.unique(np.concatenate([part.phases["sequence"] for part in parts]), return_index=True)
    phases = np.concatenate([part.phases for part in parts])[first]
    _, first = np.unique(np.concatenate([part.calls["sequence"] for part in parts]), return_index=True)
    calls = np.concatenate([part.calls for part in parts])[first]
    whole.phases = phases[np.argsort(phases["sequence"], kind="stable")]
    whole.calls = calls[np.argsort(calls["began"], kind="stable")]
    for part in parts:
        whole.groups |= part.groups
        whole.waiting = part.waiting or whole.waiting
    return whole
