"""When a sink is looked for again, where it keeps temporary files, how it is pumped to its end. Neither Ray nor W&B."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.decide import backoff

FIRST_SECONDS = 5.0
"""Between the first two looks whether a run's sink is there; doubles up to `LONGEST_SECONDS`."""
LONGEST_SECONDS = 300.0
FORGOTTEN_SECONDS = 30.0
"""A run that nobody has spoken of for so long is looked at at once: it may have been resumed meanwhile."""
TRIES = 10
"""Failures in a row after which a sink gives up; while its run has ranks, another is started then."""
_PUMP_SECONDS = 1.0

log = logging.getLogger("megaray.sinks")


@dataclass
class _SinkCheck:
    spoken: float
    due: float
    times: int = 0


class SinkCheckSchedule:
    """The runs whose sinks were looked for, and when the next look at each is due."""

    def __init__(self) -> None:
        self._looks: dict[str, _SinkCheck] = {}

    def due(self, run_root: str, now: float) -> bool:
        """Whether to look for a run's sink now; counts as a look where it is.

        Args:
            run_root: of a run that has ranks; spoken of again and again.
            now: monotonic seconds.
        """
        look = self._looks.get(run_root)
        if look is None or now - look.spoken >= FORGOTTEN_SECONDS:
            known = {r: one for r, one in self._looks.items() if now - one.spoken < FORGOTTEN_SECONDS}
            look = _SinkCheck(now, now)
            self._looks = known | {run_root: look}
        look.spoken = now
        if now < look.due:
            return False
        look.times += 1
        look.due = now + backoff.exponential_backoff(FIRST_SECONDS, look.times, LONGEST_SECONDS)
        return True


class PumpedSink(Protocol):
    """A sink."""

    def pump(self) -> bool:
        """Log what is new; True at the end."""

    def close(self) -> None:
        """End it."""


@contextmanager
def temporary_files(run_root: str) -> Iterator[None]:
    """Have this process and its children keep temporary files in a folder of the run on this node, which is removed after.

    A sink that is killed removes nothing, and W&B keeps pictures and a socket there; the run's next sink finds it by
    its name, empties it and removes it. Its path is short, as a socket's must be, and on the node, where one can be.
    """
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    name = f"megaray-sink-{hashlib.sha256(run_root.encode()).hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir()) / name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:  # another's, or no room: then where all have theirs
        log.warning("temporary files aren't kept in %s: %s", folder, error)
        yield
        return
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before[1]
        if before[0] is None:
            os.environ.pop("TMPDIR", None)
        else:
            os.environ["TMPDIR"] = before[0]
        shutil.rmtree(folder, ignore_errors=True)


def run_sink(make: Callable[[], PumpedSink], wait: Callable[[float], None] = time.sleep) -> None:
    """Make a sink and pump it until it has logged all.

    One that raises, as its files do on a full disk, is made anew after a while, ever more rarely and `TRIES` times in a row
    at most; where it stopped is in its own cursor.
    """
    failures = 0
    while failures < TRIES:
        try:
            sink = make()
            try:
                while not sink.pump():
                    failures = 0
                    wait(_PUMP_SECONDS)
            finally:
                sink.close()
            return
        except Exception:  # of whatever kind: nothing else looks after the sink
            failures += 1
            log.exception("a sink failed (%d in a row)", failures)
            wait(backoff.exponential_backoff(FIRST_SECONDS, failures, LONGEST_SECONDS))
    log.error("a sink is given up after %d failures in a row", failures)
