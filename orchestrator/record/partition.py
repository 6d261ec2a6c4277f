"""A stretch of time cut into neighbouring intervals, each of one part: what the ledger is made of. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class TimePart(IntEnum):
    """What a stretch of time was."""

    PRODUCTIVE = 0
    EVALUATION = 1
    CHECKPOINT = 2
    OVERHEAD = 3
    LOST_WORK = 4
    DETECTION = 5
    RESTART = 6
    STARTUP = 7
    STOPPING = 8
    WAITING = 9
    IDLE = 10

    @property
    def label(self) -> str:
        """As it is written."""
        return self.name.lower()


MEANINGS: dict[TimePart, str] = {
    TimePart.PRODUCTIVE: "steps that count",
    TimePart.EVALUATION: "the loss on held-out documents",
    TimePart.CHECKPOINT: "training stood still for a save",
    TimePart.OVERHEAD: "between steps: metrics, logs",
    TimePart.LOST_WORK: "steps that were trained again, or cut off by a fault",
    TimePart.DETECTION: "from a fault until it was found and decided about",
    TimePart.RESTART: "from the decision to the first step of the next attempt",
    TimePart.STARTUP: "from the placing of a new or resumed run to its first step",
    TimePart.STOPPING: "ranks end, after the last step or because they were asked to",
    TimePart.WAITING: "in the queue",
    TimePart.IDLE: "ended, until it was resumed",
}


class PartitionBuilder:
    """Builds a partition from neighbouring intervals. One that would begin before the end of those so far begins there."""

    def __init__(self, begin: float) -> None:
        self.begin = self.end = begin
        self._pieces: list[tuple[Floats, NDArray[np.int8], NDArray[np.int32]]] = []

    def append(self, end: float, part: TimePart, attempt: int) -> None:
        """Append an interval up to `end`; nothing where the partition is past it already."""
        self.extend(np.array([end]), np.array([part], dtype=np.int8), attempt)

    def extend(self, ends: Floats, parts: NDArray[np.int8], attempt: int) -> None:
        """Append several intervals, each from the end of the one before."""
        if not len(ends):
            return
        ends = np.maximum.accumulate(np.maximum(ends, self.end))
        self._pieces.append((ends, parts, np.full(len(ends), attempt, dtype=np.int32)))
        self.end = float(ends[-1])

    def build(self) -> TimePartition:
        """The partition; it must have an interval."""
        ends, parts, attempts = (np.concatenate(column) for column in zip(*self._pieces, strict=True))
        return TimePartition(np.concatenate([[self.begin], ends]), parts, attempts)


@dataclass(frozen=True)
class TimePartition:
    """Intervals that cover a stretch of time: number i goes from `edges[i]` to `edges[i + 1]`."""

    edges: Floats
    parts: NDArray[np.int8]
    attempts: NDArray[np.int32]

    @property
    def seconds(self) -> Floats:
        """Length of each."""
        return np.diff(self.edges)

    def totals(self, attempt: int | None = None) -> dict[TimePart, float]:
        """Seconds by part, of one attempt or of all."""
        chosen = slice(None) if attempt is None else self.attempts == attempt
        sums = np.bincount(self.parts[chosen], weights=self.seconds[chosen], minlength=len(TimePart))
        return {part: float(sums[part]) for part in TimePart}

    def spans(self, most: int) -> list[tuple[float, float, TimePart, int]]:
        """From, to, part and attempt of neighbours of one kind joined; where there are more than `most`, time is cut into
        as many equal pieces, of which each shows what fills most of it."""
        joined = self._joined()
        if len(joined.parts) > most:
            joined = joined._coarse(most)
        rows = zip(joined.edges[:-1], joined.edges[1:], joined.parts, joined.attempts, strict=True)
        return [(float(a), float(b), TimePart(int(part)), int(attempt)) for a, b, part, attempt in rows]

    def _joined(self) -> TimePartition:
        keep = self.seconds > 0
        parts, attempts, ends = self.parts[keep], self.attempts[keep], self.edges[1:][keep]
        if not len(parts):
            return TimePartition(self.edges[:1], parts, attempts)
        last = np.append((parts[1:] != parts[:-1]) | (attempts[1:] != attempts[:-1]), True)
        return TimePartition(np.concatenate([self.edges[:1], ends[last]]), parts[last], attempts[last])

    def _coarse(self, most: int) -> TimePartition:
        """`most` pieces at most, each of one kind."""
        edges = np.linspace(self.edges[0], self.edges[-1], most + 1)
        kinds = self.attempts.astype(np.int64) * len(TimePart) + self.parts
        known, index = np.unique(kinds, return_inverse=True)
        shares = np.empty((len(known), most))
        for i in range(len(known)):
            filled = np.concatenate([[0.0], np.cumsum(np.where(index == i, self.seconds, 0.0))])
            shares[i] = np.diff(np.interp(edges, self.edges, filled))
        chosen = known[shares.argmax(axis=0)]
        parts, attempts = (chosen % len(TimePart)).astype(np.int8), (chosen // len(TimePart)).astype(np.int32)
        return TimePartition(edges, parts, attempts)._joined()
