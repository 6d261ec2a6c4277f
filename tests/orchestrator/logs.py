"""A run's log as the controller writes it, with the time as a number."""

from __future__ import annotations

from configs.paths import RunPaths
from orchestrator.record.clock import Instant
from orchestrator.record.events import Payload
from orchestrator.record.run_log import RunLog


class Writer:
    """Writes each event as a record of its own."""

    def __init__(self, run: RunPaths) -> None:
        self._log = RunLog(run, epoch=1, now=Instant(0.0, 0.0))

    def append(self, payload: Payload, at: float) -> None:
        """Add an event at time `at`, by all clocks."""
        self._log.append([payload], Instant(at, at))

    def publish(self) -> None:
        """Write the folded view."""
        self._log.publish(final=True)

    def close(self) -> None:
        """Close the file."""
        self._log.close()
