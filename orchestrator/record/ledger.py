"""The goodput ledger: where a run's wall time went. Pure.

Wall time is cut into neighbouring intervals, each of which has one part. A `PartitionBuilder` appends only from where it
ended, so no second is counted twice or left out. Time is the run's clock, which never steps; the times of metric lines,
which rank 0's host dates, are mapped to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.record.history import AttemptHistory, RunHistory, StatePeriod
from orchestrator.record.partition import Floats, PartitionBuilder, TimePart, TimePartition
from orchestrator.record.states import State
from orchestrator.record.view import RESTARTS


@dataclass(frozen=True)
class AttemptLines:
    """Metric lines of one attempt, as far as the ledger needs them. Times are seconds since the epoch, by rank 0's host."""

    time: Floats
    """Of each step line."""
    step: NDArray[np.int64]
    """Steps finished, rising."""
    busy: Floats
    """Seconds that the steps since the line before took, without saves and evaluations."""
    saves: Sequence[tuple[float, float]] = ()
    """When training began to stand still for a save, and for how many seconds."""
    evaluations: Sequence[tuple[float, float]] = ()
    """Likewise for evaluations."""
    resumed: float | None = None
    """When ranks said which step they begin at."""
    begin: int | None = None
    """That step."""
    ended: float | None = None
    """When they had done all they were to do."""


EMPTY = AttemptLines(np.empty(0), np.empty(0, dtype=np.int64), np.empty(0))


@dataclass(frozen=True)
class Ledger:
    """Where the time went."""

    partition: TimePartition
    """By the run's clock."""
    offset: float
    """Wall time minus clock, for showing it."""
    seconds: dict[TimePart, float] = field(default_factory=dict)

    @property
    def wall(self) -> float:
        """Seconds from the submission to the end, or to now."""
        return float(self.partition.edges[-1] - self.partition.edges[0])

    @property
    def ettr(self) -> float | None:
        """Effective training time ratio: useful time over all but idle; None where there is none yet."""
        return self._ratio(self.wall - self.seconds[TimePart.IDLE])

    @property
    def ettr_held(self) -> float | None:
        """The same without the time in the queue."""
        return self._ratio(self.wall - self.seconds[TimePart.IDLE] - self.seconds[TimePart.WAITING])

    def _ratio(self, available: float) -> float | None:
        useful = self.seconds[TimePart.PRODUCTIVE] + self.seconds[TimePart.EVALUATION]
        return useful / available if available > 0 else None

    def incident(self, attempt: int) -> dict[str, float]:
        """Seconds that the end of an attempt by a fault cost: until it was found, until the next one trained, and again."""
        own, after = self.partition.totals(attempt), self.partition.totals(attempt + 1)
        return {
            "detection": own[TimePart.DETECTION],
            "restart": after[TimePart.RESTART],
            "lost": own[TimePart.LOST_WORK],
        }


def ledger(history: RunHistory, traces: Mapping[int, AttemptLines], now: float) -> Ledger:
    """The ledger of a run.

    Args:
        history: its events.
        traces: its metric lines by attempt.
        now: seconds since the epoch; where a run that has ended doesn't continue.
    """
    clock, wall = history.begin or (0.0, now)
    builder = PartitionBuilder(clock)
    newest_clock, newest_wall = history.newest if history.begin else (clock, wall)
    over = bool(history.state and history.state.terminal)
    end = newest_clock if over else newest_clock + max(0.0, now - newest_wall)
    lost = _lost_from(history, traces)
    periods, i = history.periods, 0
    if periods:
        builder.append(periods[0].clock, TimePart.WAITING, 0)
    while i < len(periods):
        one = periods[i]
        until = periods[i + 1].clock if i + 1 < len(periods) else end
        own = history.attempts.get(one.attempt)
        if one.state in (State.STARTING, State.RUNNING, State.CANCELLING) and own is not None:
            while i + 1 < len(periods) and periods[i + 1].state in (State.RUNNING, State.CANCELLING):
                i += 1
            goes_on = i + 1 == len(periods)
            until = end if goes_on else periods[i + 1].clock
            trace = traces.get(own.number, EMPTY)
            _attempt(builder, own, trace, until, lost.get(own.number), goes_on)
        else:
            part, attempt = _outside(one, own)
            builder.append(until, part, attempt)
        i += 1
    builder.append(end, TimePart.WAITING, 0)
    partition = builder.build()
    return Ledger(partition, newest_wall - newest_clock, partition.totals())


def _outside(one: StatePeriod, own: AttemptHistory | None) -> tuple[TimePart, int]:
    """The part of a period in which no rank of the run is there, and the attempt that it is counted to."""
    if one.state is State.QUEUED:
        return TimePart.WAITING, one.attempt
    if one.state is State.RECOVERING:
        return TimePart.RESTART, one.attempt + 1
    if one.state is State.PLACING:
        return _start(own), one.attempt
    return (TimePart.IDLE if one.state.terminal else TimePart.STOPPING), one.attempt


def _start(own: AttemptHistory | None) -> TimePart:
    return TimePart.RESTART if own is not None and own.again else TimePart.STARTUP


def _lost_from(history: RunHistory, traces: Mapping[int, AttemptLines]) -> dict[int, int]:
    """By attempt, the step after which its steps were trained again by a later one."""
    begun = {n: own.resumed_step for n, own in history.attempts.items() if own.resumed_step is not None}
    begun |= {n: trace.begin for n, trace in traces.items() if trace.begin is not None}
    return lost_after({number: begun.get(number) for number in {*history.attempts, *traces}})


def lost_after(begun: Mapping[int, int | None]) -> dict[int, int]:
    """By attempt, the step after which its steps were trained again; those that lost none are left out.

    Args:
        begun: step that each attempt continued from; None where it has not come so far.
    """
    lost: dict[int, int] = {}
    least: int | None = None
    for number, step in sorted(begun.items(), reverse=True):
        if least is not None:
            lost[number] = least
        if step is not None:
            least = step if least is None else min(least, step)
    return lost


def _attempt(
    builder: PartitionBuilder,
    own: AttemptHistory,
    trace: AttemptLines,
    until: float,
    lost: int | None,
    goes_on: bool,
) -> None:
    """An attempt, from the start of its ranks until it left its nodes, or now."""
    clock_of = _ClockMap(own, trace, until)
    decided = own.decided_clock if own.decided_clock is not None and own.decided_clock <= until else None
    steps_end = until if decided is None else decided
    times = np.minimum(clock_of(trace.time), steps_end)
    start, held = _start(own), _stalls(clock_of, trace)
    if not len(times):
        resumed = clock_of(np.array([trace.resumed or own.resumed or 0.0]))[0]
        fault = _fault_clock(
            own, clock_of, max(builder.end, resumed if own.resumed else builder.end), decided
        )
        builder.append(steps_end if fault is None else fault, start, own.number)
    else:
        _steps(builder, own.number, trace, times, held, start, lost, clock_of)
        fault = _fault_clock(own, clock_of, float(times[-1]), decided)
        _tail(builder, own, trace, held, clock_of, fault, until, goes_on)
    if decided is not None and own.decision is not None:
        builder.append(decided, TimePart.DETECTION, own.number)
        if own.decision.action in RESTARTS:
            builder.append(until, TimePart.RESTART, own.number + 1)
    builder.append(
        until, TimePart.STOPPING if len(times) or decided is not None or own.end else start, own.number
    )


def _fault_clock(
    own: AttemptHistory, clock_of: _ClockMap, last: float, decided: float | None
) -> float | None:
    """When what ended the attempt happened; where nobody saw it, right after its last sign. None where nothing did."""
    if decided is None:
        return None
    at = last if own.fault is None else float(clock_of(np.array([own.fault]))[0])
    return min(max(at, last), decided)


class _ClockMap:
    """Maps times of rank 0's host to the run's clock."""

    def __init__(self, own: AttemptHistory, trace: AttemptLines, until: float) -> None:
        self._knots = own.offsets
        self._skew = 0.0
        # The controller takes in a line within seconds; a larger difference is that of the hosts' clocks.
        seen, dated = (own.resumed, trace.resumed) if trace.resumed is not None else (own.first_step, None)
        if dated is None and len(trace.time):
            seen, dated = own.first_step, float(trace.time[0])
        if seen is not None and dated is not None and not -1.0 <= seen - dated <= _LAG:
            self._skew = seen - dated
        self._until = until

    def __call__(self, times: Floats) -> Floats:
        """As many clocks, none after the attempt's end."""
        walls = times + self._skew
        clocks = walls - self._knots[0][1]
        for at, offset in self._knots[1:]:
            clocks = np.where(walls - offset >= at, np.maximum(walls - offset, at), clocks)
        return np.minimum(clocks, self._until)


_QUIET = 10.0
"""Seconds without a line that are nothing to ask about, however fast the steps are."""
_LAG = 60.0
"""Seconds that a controller may take to see a line, such as one that was just restarted."""


def _stalls(clock_of: _ClockMap, trace: AttemptLines) -> tuple[Floats, Floats, Floats, Floats]:
    """Begin and seconds of saves, and of evaluations, by the run's clock."""
    saves = np.array(trace.saves, dtype=np.float64).reshape(-1, 2)
    evaluations = np.array(trace.evaluations, dtype=np.float64).reshape(-1, 2)
    return clock_of(saves[:, 0]), saves[:, 1], clock_of(evaluations[:, 0]), evaluations[:, 1]


def _within(begins: Floats, seconds: Floats, edges: Floats) -> Floats:
    """Seconds of what begins in each of the stretches between `edges`."""
    count = len(edges) - 1
    places = np.searchsorted(edges, begins, side="right") - 1
    inside = (places >= 0) & (places < count)
    return np.bincount(places[inside], weights=seconds[inside], minlength=count)[:count].astype(np.float64)


def _steps(
    builder: PartitionBuilder,
    number: int,
    trace: AttemptLines,
    times: Floats,
    held: Any,
    start: TimePart,
    lost: int | None,
    clock_of: _ClockMap,
) -> None:
    """From the start of the ranks to the last step line."""
    steps, busy = trace.step.astype(np.float64), trace.busy.astype(np.float64).copy()
    before = np.concatenate([[trace.begin if trace.begin is not None else steps[0] - 1], steps[:-1]])
    counts = np.maximum(steps - before, 1.0)
    if len(busy) >= 3:  # the first steps hold compilation and first use of everything
        usual = float(np.median(busy[1:] / counts[1:]))
        busy[0] = min(busy[0], 1.5 * usual * counts[0])
    resumed = clock_of(np.array([trace.resumed]))[0] if trace.resumed is not None else times[0] - busy[0]
    builder.append(min(float(resumed), float(times[0])), start, number)
    edges = np.maximum.accumulate(np.concatenate([[builder.end], times]))
    spans = np.diff(edges)
    saving = np.minimum(_within(held[0], held[1], edges), spans)
    evaluating = np.minimum(_within(held[2], held[3], edges), spans - saving)
    working = np.minimum(busy, spans - saving - evaluating)
    again = np.zeros(len(steps)) if lost is None else np.clip((steps - lost) / counts, 0.0, 1.0)
    begins = edges[:-1]
    cuts = np.stack(
        [
            begins + saving,
            begins + saving + evaluating,
            edges[1:] - working,
            edges[1:] - working * again,
            edges[1:],
        ],
        axis=1,
    )
    kinds = (
        TimePart.CHECKPOINT,
        TimePart.EVALUATION,
        TimePart.OVERHEAD,
        TimePart.PRODUCTIVE,
        TimePart.LOST_WORK,
    )
    parts = np.tile(np.array(kinds, dtype=np.int8), (len(steps), 1))
    parts[0, 2] = start
    builder.extend(cuts.reshape(-1), parts.reshape(-1), number)


def _tail(
    builder: PartitionBuilder, own: AttemptHistory, trace: AttemptLines, held: Any, clock_of: _ClockMap,
    fault: float | None, until: float, goes_on: bool,
) -> None:  # fmt: skip
    """From the last step line to the fault, or to the end of what the ranks had to do, or to now."""
    begin = builder.end
    edges = np.array([begin, np.inf])
    saving = float(_within(held[0], held[1], edges)[0])
    evaluating = float(_within(held[2], held[3], edges)[0])
    usual = float(np.median(np.diff(trace.time))) if len(trace.time) > 1 else float(trace.busy[-1])
    if fault is not None:
        end, work = fault, TimePart.LOST_WORK
    elif trace.ended is not None:
        end, work = float(clock_of(np.array([trace.ended]))[0]), TimePart.OVERHEAD
    elif goes_on and own.stop_clock is None:
        # What happens now counts as soon as its line comes; where none comes for long, something is to be found.
        end, work = min(until, begin + saving + evaluating + max(_QUIET, 3.0 * usual)), TimePart.PRODUCTIVE
    else:
        end, work = begin + saving + evaluating, TimePart.STOPPING
    end = min(end, until)
    builder.append(min(begin + saving, end), TimePart.CHECKPOINT, own.number)
    builder.append(min(begin + saving + evaluating, end), TimePart.EVALUATION, own.number)
    builder.append(end, work, own.number)
    if goes_on and fault is None and trace.ended is None and own.stop_clock is None:
        builder.append(until, TimePart.DETECTION, own.number)
