"""A run as it goes: the progress line, what happens above it, and the log of a rank."""

from __future__ import annotations

import codecs
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from configs.metrics import (
    EndedLine,
    EvaluatedLine,
    MeasuredLine,
    MetricLine,
    ResumedLine,
    SavedLine,
    SaveFailedLine,
    StepLine,
)
from configs.paths import HomePaths, RunPaths
from orchestrator.commands.console import progress, save_cost
from orchestrator.commands.text import clean, plural, redacted, size
from orchestrator.record import summaries
from orchestrator.record.events import (
    AttemptPlaced,
    Decided,
    Event,
    EvidenceKept,
    FabricFinding,
    IncidentClosed,
    IncidentOpened,
    Parked,
    StateMoved,
    StopBegan,
    Unparked,
)
from orchestrator.record.following import Follower
from orchestrator.record.states import State

_POLL_SECONDS = 0.5
_PIECE = 1 << 20
"""Bytes of a log that are read at once."""
_PLAIN_EVERY = 10.0
"""Seconds between progress lines where they can't be rewritten in place."""


class LiveLine:
    """The progress line: rewritten in place on a terminal, printed now and then elsewhere."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._now = now
        self._terminal = stream.isatty()
        self._shown = ""
        self._printed_at: float | None = None

    def update(self, text: str) -> None:
        """Show the newest state."""
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + text[:width].ljust(min(len(self._shown), width)))
            self._shown = text[:width]
        elif text != self._shown and (
            self._printed_at is None or self._now() - self._printed_at >= _PLAIN_EVERY
        ):
            self._stream.write(text + "\n")
            self._shown, self._printed_at = text, self._now()
        self._stream.flush()

    def end(self) -> None:
        """Leave the progress line standing."""
        if self._terminal and self._shown:
            self._stream.write("\n")
        self._shown = ""

    def print_above(self, text: str) -> None:
        """Print a line that stays, above the progress line."""
        if self._terminal and self._shown:
            self._stream.write("\r" + " " * len(self._shown) + "\r")
        self._stream.write(text + "\n")
        if self._terminal and self._shown:
            self._stream.write(self._shown)
        self._stream.flush()


def watch(
    run: RunPaths,
    home: HomePaths,
    stream: TextIO,
    sleep: Callable[[float], None] = time.sleep,
) -> State:
    """Follow a run until it ends; its final state. Controllers may end and begin meanwhile."""
    follower, line, reader, silent = Follower(run), LiveLine(stream), summaries.RunReader(run), ""
    reader.summary({})
    while True:
        newest: StepLine | MeasuredLine | None = None
        state: State | None = None
        for item in follower.poll():
            if isinstance(item, StepLine | MeasuredLine):
                newest = item
            elif (text := describe(item)) is not None:
                line.print_above(text)
            if isinstance(item, Event) and isinstance(item.payload, StateMoved):
                state = item.payload.to
        if newest is not None:
            line.update(_newest(newest, reader.update().request.steps))
        if state is not None and state.terminal:
            line.end()
            return state
        queue = summaries.read_queue(home)
        before, silent = silent, summaries.controller_silence(queue, time.time())
        if bool(silent) != bool(before):  # said once, though its seconds pass
            line.print_above(silent or "the controller is back")
        row = reader.summary(queue)
        if row.position is not None:
            line.update(clean(f"queued, position {row.position}: {row.waiting_for}"))
        sleep(_POLL_SECONDS)


def _newest(line: StepLine | MeasuredLine, steps: int) -> str:
    if isinstance(line, MeasuredLine):
        return clean(line.text)
    eta = (steps - line.step) * line.step_seconds
    return progress(line.step, steps, line.loss, line.tokens_per_second, line.step_seconds, line.mfu, eta)


def describe(item: Event | MetricLine) -> str | None:
    """A line for what is worth one, without secrets; None for the rest."""
    text = _line(item)
    return None if text is None else clean(text)


def _line(item: Event | MetricLine) -> str | None:
    at = time.strftime("%H:%M:%S", time.localtime(item.time))
    match item:
        case Event(payload=StateMoved() as move):
            return f"{at} {move.to}" + (f": {move.detail}" if move.detail else "")
        case Event(payload=IncidentOpened() as incident):
            return f"{at} incident {incident.incident}: {incident.detail}"
        case Event(payload=Decided(action="warn") as decided):
            return f"{at} warning: {decided.detail}"
        case Event(payload=Decided() as decided):
            used = f"{decided.restarts_used} of {decided.restarts_allowed} restarts without progress"
            return (
                f"{at} decision: {decided.action} ({decided.reason}; {used}; wait {decided.wait_seconds:g} s)"
            )
        case Event(payload=StopBegan() as stop):
            return f"{at} ending its ranks ({stop.reason})" + (f": {stop.detail}" if stop.detail else "")
        case Event(payload=EvidenceKept() as kept):
            return f"{at} stacks of its ranks are in {kept.path}"
        case Event(payload=Parked() as parked):
            return f"{at} parked: {parked.error}; its ranks continue, and the controller tries again"
        case Event(payload=Unparked()):
            return f"{at} handled again"
        case Event(payload=AttemptPlaced(attempt=attempt, gang=gang)) if gang is not None:
            return f"{at} attempt {attempt} runs on {gang.ranks} slots, fewer than asked for"
        case Event(payload=IncidentClosed() as closed):
            again = f", {plural(closed.lost_steps, 'step')} again" if closed.lost_steps else ""
            return f"{at} incident {closed.incident} is over: {closed.resolution}{again}"
        case ResumedLine(step=step) if step:
            passed = f"; passed over {item.passed}" if item.passed else ""
            return f"{at} resumed from step {step}{passed}"
        case EvaluatedLine():
            return f"{at} step {item.step}: loss {item.loss:.4f} on {item.samples} held-out samples"
        case SavedLine(tier="store"):
            though = f", though {item.differs}" if item.differs else ""
            return f"{at} saved step {item.step} ({size(item.bytes)} {save_cost(item.seconds, item.held)}){though}"
        case SaveFailedLine():
            return f"{at} {item.words}"
        case Event(payload=FabricFinding(finding=finding)):
            return f"{at} {finding['severity']} {finding['kind']}: {finding['what']}"
        case EndedLine():
            return (
                f"{at} measured {item.step} cases" if item.loss is None else f"{at} trained {item.step} steps"
            )
    return None


def show_log(path: Path, stream: TextIO, follow: RunPaths | None) -> None:
    """Print a log without what looks like a secret; with `follow`, continue until that run has ended.

    A log that has grown long is copied aside and cut off; what follows is read from its new beginning. Whole lines are
    printed, since a secret may come in two pieces; the rest of the last one at the end.
    """
    reader = summaries.RunReader(follow) if follow is not None else None
    decoder, rest = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
    with path.open("rb") as file:
        while True:
            ended = reader is None or reader.summary({}).terminal
            if path.stat().st_size < file.tell():
                file.seek(0)
            while piece := file.read(_PIECE):
                lines, newline, rest = (rest + decoder.decode(piece)).rpartition("\n")
                stream.write(redacted(lines + newline))
            stream.write(redacted(rest) if ended else "")
            stream.flush()
            if ended:
                return
            time.sleep(_POLL_SECONDS)
