"""Two clocks at once: one for people and one for timers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Instant:
    """An instant."""

    wall: float
    """Seconds since the epoch; may step. It dates what people read, and nothing is measured with it."""
    mono: float
    """Seconds of a clock that never steps, from an arbitrary start that changes with the process."""


Clock = Callable[[], Instant]


def system_clock() -> Instant:
    """This machine's clocks."""
    return Instant(time.time(), time.monotonic())
