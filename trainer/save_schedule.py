"""When the next save is due, and how the last ones went."""

from __future__ import annotations

import time
from dataclasses import dataclass

from configs.metrics import read_from
from configs.rank import RankContext
from configs.schema import CheckpointConfig
from faulttol.checkpoint.interval import interval, mtbf
from faulttol.staged.saver import SaveOutcome

_MAX_STEPS = 1_000_000
"""Steps between saves that are never exceeded."""
_HOUR = 3600.0


@dataclass(frozen=True)
class SaveTimings:
    """What an interval depends on. Each rank measures its own; all use the largest of each, so that they save alike."""

    step_seconds: float
    held_seconds: float
    """Of the last save that was committed; 0 before the first."""
    durable_seconds: float
    """From the call to the commit, likewise."""
    hours: float
    """Since the run's first attempt began; 0 where a rank doesn't know."""


class SaveSchedule:
    """Says when to save. All ranks decide alike."""

    def __init__(self, config: CheckpointConfig, rank: RankContext) -> None:
        self._config, self._attempt = config, rank.attempt
        self._began = _first_line_time(rank) if rank.rank == 0 else None
        self._next = self._steps = 0
        self._last: SaveOutcome | None = None
        self.failed_in_a_row = 0
        """Saves that failed since the last commit."""

    def start(self, step: int) -> None:
        """Training starts after `step`."""
        self._next = step + self._config.every

    def due(self, step: int) -> bool:
        """Whether the state behind `step` is saved."""
        if self._config.interval == "fixed":
            return step % self._config.every == 0
        return step >= self._next

    @property
    def next_due(self) -> int | None:
        """Step of the next save; None where it is `checkpoint.every` steps behind the last."""
        return self._next if self._config.interval == "young_daly" else None

    def tiers(self, step: int, last: bool) -> list[str]:
        """Where the state behind `step` is saved: `memory`, `store`, both or nowhere."""
        every = self._config.memory_every
        stored = ["store"] if last or self.due(step) else []
        return [*(["memory"] if every is not None and step % every == 0 and not last else []), *stored]

    def record(self, outcome: SaveOutcome) -> None:
        """Record how a save ended."""
        if outcome.tier != "store":
            return
        if outcome.error is None:
            self._last, self.failed_in_a_row = outcome, 0
        elif not outcome.skipped:
            self.failed_in_a_row += 1

    def timings(self, step_seconds: float) -> SaveTimings:
        """This rank's measurements."""
        held, durable = (self._last.held, self._last.seconds) if self._last else (0.0, 0.0)
        hours = (time.time() - self._began) / _HOUR if self._began is not None else 0.0
        return SaveTimings(step_seconds, held, durable, hours)

    def update_interval(self, step: int, worst: SaveTimings) -> str | None:
        """Choose the interval after a save at `step`; returns the reason where it changes.

        Args:
            worst: the largest of all ranks' numbers.
        """
        if self._config.interval == "fixed" or not self.due(step):
            return None
        if worst.durable_seconds == 0.0:
            self._next = step + self._config.every
            return None
        between = mtbf(self._config.mtbf_hours, self._attempt - 1, worst.hours) * _HOUR
        chosen = interval(
            worst.step_seconds,
            worst.held_seconds,
            worst.durable_seconds,
            between,
            self._config.budget,
            least=1,
            most=_MAX_STEPS,
        )
        changed, self._steps = chosen.steps != self._steps, chosen.steps
        self._next = step + chosen.steps
        return chosen.reason if changed else None


def _first_line_time(rank: RankContext) -> float:
    """When the run's first attempt wrote its first line; now, where it hasn't."""
    lines, _ = read_from(rank.run.attempt(1).metrics, 0, 1 << 16)
    return lines[0].time if lines else time.time()
