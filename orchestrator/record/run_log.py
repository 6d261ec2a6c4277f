"""A run's log in the hands of its one writer, and the folded view that saves readers from folding a long log again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from configs.errors import from_json
from configs.paths import RunPaths, write_whole
from orchestrator.record.clock import Instant
from orchestrator.record.events import Event, Payload
from orchestrator.record.log import Cursor, EventLog, checksum, read_from
from orchestrator.record.view import Incident, RunView, apply, fold

_FORMAT = [1, *(field.name for kind in (RunView, Incident) for field in fields(kind))]
"""Of the published view: a number, which counts changes of what its fields mean, and the fields. One of another format is
passed over."""
_PUBLISH_EVERY = 200
"""Events after which the view is published again: what a reader folds by itself at most, but for a turn's."""


@dataclass(frozen=True)
class RunLogReader:
    """A run as far as it was read; `update` continues from there."""

    path: Path
    view: RunView = RunView()
    cursor: Cursor = Cursor()

    @classmethod
    def of(cls, run: RunPaths) -> RunLogReader:
        """A run as it is now, from its published view on where there is one.

        Raises:
            OSError: where the log can't be read.
        """
        return (_published(run) or cls(run.events)).update()

    def update(self) -> RunLogReader:
        """The same with what was written since."""
        events, cursor = read_from(self.path, self.cursor)
        return RunLogReader(self.path, fold(events, self.view), cursor)

    @property
    def damage(self) -> tuple[str, ...]:
        """Lines that were stepped over, and moves that don't follow for it."""
        return self.cursor.damage + self.view.damage


class RunLog:
    """The one writer of a run's log, with the run folded beside it.

    Args:
        run: the run's paths.
        epoch: of the controller.
        now: the present.
        fence: raises `Fenced` where a newer controller has begun.

    Raises:
        Fenced: where a newer controller has written it.
        OSError: where it can't be read or opened.
    """

    def __init__(
        self, run: RunPaths, epoch: int, now: Instant, fence: Callable[[], None] = lambda: None
    ) -> None:
        self._run = run
        reader = RunLogReader.of(run)
        self._log = EventLog(run.events, epoch, now, fence, reader.cursor)
        self.view = fold(self._log.events, reader.view)  # an older controller may have written meanwhile
        self.damage = self._log.cursor.damage + self.view.damage
        self._published = 0

    def clock(self, now: Instant) -> float:
        """Seconds that the run has been on record, by clocks that never step."""
        return self._log.clock(now)

    def tentative(self, view: RunView, payload: Payload, now: Instant) -> RunView:
        """What `view` would be after one more event.

        Raises:
            IllegalMove: where the event moves the run against the table.
        """
        return apply(view, Event(self._log.cursor.seq, now.wall, payload, self.clock(now)))

    def append(self, payloads: Sequence[Payload], now: Instant) -> None:
        """Write events as one record, all or none.

        Raises:
            IllegalMove: where one moves the run against the table; nothing is written then.
            Fenced: where another controller owns the log.
            OSError: where the disk doesn't take it; nothing of it is left.
        """
        if not payloads:
            return
        view = self.view
        for payload in payloads:
            view = self.tentative(view, payload, now)
        self._log.append(payloads, now)
        self.view = view

    def publish(self, final: bool = False) -> None:
        """Write the folded view beside the log, where enough has happened since the last time.

        Raises:
            OSError: where the disk doesn't take it; the log itself is whole.
        """
        cursor = self._log.cursor
        if cursor.seq - self._published < (1 if final else _PUBLISH_EVERY):
            return
        tree = {"format": _FORMAT, "cursor": asdict(cursor)}
        # As the log is written: whatever the log takes, such as a loss that isn't finite, this takes too.
        text = f"{json.dumps(tree)}\n{json.dumps(asdict(self.view), default=sorted)}\n"
        # A flipped digit in it would hold for as long as the run is read.
        write_whole(self._run.view, f"{text}{checksum(text.encode())}\n")
        self._published = cursor.seq

    def close(self) -> None:
        """Close the file."""
        self._log.close()


@cache
def _adapter() -> TypeAdapter[RunView]:
    return TypeAdapter(RunView)


def _published(run: RunPaths) -> RunLogReader | None:
    """The published view; None where there is none that fits the log."""
    try:
        whole = run.view.read_bytes()
        text, sum_line = whole[:-9], whole[-9:]
        if sum_line != f"{checksum(text)}\n".encode():
            return None
        head, _, body = text.decode().partition("\n")
        tree: dict[str, Any] = from_json(head)
        if tree["format"] != _FORMAT:
            return None
        cursor = Cursor(**tree["cursor"] | {"damage": tuple(tree["cursor"]["damage"])})
        if run.events.stat().st_size < cursor.offset:
            return None
        return RunLogReader(run.events, _adapter().validate_json(body), cursor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
        return None
