"""How long each phase of a rank's start takes, from the start of the process to the first step."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from faulttol import proc, steady_clock
from faulttol.recorder import RankPhase, Recorder


class Startup:
    """Records the phases of a start and counts their seconds.

    Args:
        recorder: of this rank.
        env: where `MEGARAY_STARTED`, in seconds of `steady_clock.now`, says when the rank was asked for; without it the
            process's own start counts.
    """

    def __init__(self, recorder: Recorder, env: Mapping[str, str] = os.environ) -> None:
        self._recorder = recorder
        self._phase = RankPhase.IMPORTS
        self._began = _started(env)
        self.seconds: dict[str, float] = {}
        """By phase, of those that have ended."""
        recorder.begin(RankPhase.IMPORTS, 0)

    def enter(self, phase: RankPhase) -> None:
        """A phase begins, and the one before has ended."""
        self.end()
        self._phase = phase
        self._recorder.begin(phase, 0)

    def end(self) -> None:
        """The phase before has ended."""
        now = steady_clock.now()
        name = self._phase.name.lower()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + max(0.0, now - self._began), 3)
        self._began = now


def _started(env: Mapping[str, str]) -> float:
    started = env.get("MEGARAY_STARTED", "")
    try:
        return float(started) if started else steady_clock.now() - _age()
    except ValueError:
        return steady_clock.now()


def _age() -> float:
    """Seconds since this process was made."""
    own = proc.row(os.getpid())
    return 0.0 if own is None else max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - own.begun)
