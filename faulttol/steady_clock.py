"""Seconds since the epoch that never step: what observers on a node date things by.

A wall clock may be set while ranks train. What ranks write is dated by the kernel's monotonic clock, which all
processes of a node share; a reader adds one offset of its own, taken once.
"""

from __future__ import annotations

import time

OFFSET_NS = time.time_ns() - time.monotonic_ns()
"""What this process adds to the monotonic clock; fixed when it starts."""


def now() -> float:
    """Seconds since the epoch, as they were when this process started, plus what has passed since."""
    return (time.monotonic_ns() + OFFSET_NS) / 1e9


def from_monotonic_ns(monotonic_ns: int) -> float:
    """The same for an instant of the node's monotonic clock."""
    return (monotonic_ns + OFFSET_NS) / 1e9
