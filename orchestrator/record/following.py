"""A run's events and metric lines as they come, and the steps that were trained twice."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from configs.metrics import MetricLine, ResumedLine, StepLine, read_all, read_from
from configs.paths import RunPaths
from orchestrator.record import log
from orchestrator.record.events import Event
from orchestrator.record.log import Cursor


def lost_steps(run: RunPaths, through: int | None = None) -> dict[int, tuple[int, int]]:
    """By attempt, the steps `(first, last)` that a later attempt trained again; only attempts with such.

    With `through`, as it stood when that attempt was the newest.
    """
    begun: dict[int, int] = {}
    last: dict[int, int] = {}
    for attempt in run.attempt_numbers():
        if through is not None and attempt > through:
            break
        for line in read_all(run.attempt(attempt).metrics):
            if isinstance(line, ResumedLine):
                begun[attempt] = line.step
            elif isinstance(line, StepLine):
                last[attempt] = line.step
    lost = {}
    for attempt, end in last.items():
        later = [step for other, step in begun.items() if other > attempt]
        if later and min(later) < end:
            lost[attempt] = (max(min(later), begun.get(attempt, 0)) + 1, end)
    return lost


def _times(items: list[Event | MetricLine]) -> Iterable[float]:
    """Their times, none before an earlier item's: a clock that was set back mustn't move an end before its beginning."""
    return accumulate((item.time for item in items), max)


class Follower:
    """Reads a run's events and metric lines as they come, each once.

    `position` is all that it remembers: a follower made with it continues where another ended.
    """

    def __init__(self, run: RunPaths, position: dict[str, int] | None = None) -> None:
        self._run = run
        self.position: dict[str, int] = dict(position or {})
        """Bytes read by file: `events`, and attempts by number; and `seq` and `epoch` of the newest event."""

    def poll(self) -> list[Event | MetricLine]:
        """What is new, in order of time; of one file always in the order in which it was written."""
        files: list[list[Event | MetricLine]] = [list(self._events())]
        for attempt in self._run.attempt_numbers():
            lines, end = read_from(self._run.attempt(attempt).metrics, self.position.get(str(attempt), 0))
            self.position[str(attempt)] = end
            files.append(list(lines))
        placed = [pair for items in files for pair in zip(_times(items), items, strict=True)]
        return [item for _, item in sorted(placed, key=lambda pair: pair[0])]

    def _events(self) -> list[Event]:
        at = self.position
        cursor = Cursor(at.get("events", 0), at.get("seq", 0), at.get("epoch", 0))
        events, cursor = log.read_from(self._run.events, cursor)
        at |= {"events": cursor.offset, "seq": cursor.seq, "epoch": cursor.epoch}
        return events
