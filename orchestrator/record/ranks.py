"""What the ranks of a run do now: their newest steps by part, and what their nodes' agents saw last."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.paths import RunPaths
from faulttol.timeline.reader import AttemptSteps
from orchestrator.record.rank_status import RankStatus, RankStatusReader

PARTS = ("compute", "data", "wait", "save")
"""Of a rank's step, as `faulttol.timeline` records them."""
_STEPS = 8
"""Newest steps that are reported as their mean."""


@dataclass
class RankActivity:
    """What a rank was last seen doing."""

    rank: int
    seconds: dict[str, float]
    """Of a step, by part; empty where nothing is recorded."""
    doing: str = ""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


class RankReader:
    """Reads what the ranks of a run's newest attempt do."""

    def __init__(self, run: RunPaths) -> None:
        self._run = run
        self._attempt = 0
        self._looks: RankStatusReader | None = None
        self._steps: AttemptSteps | None = None

    def read(self, attempt: int) -> list[RankActivity]:
        """The ranks of an attempt; empty where nothing tells of them."""
        if attempt != self._attempt or self._looks is None or self._steps is None:
            paths = self._run.attempt(attempt)
            self.close()
            self._attempt, self._looks, self._steps = (
                attempt,
                RankStatusReader(paths.seen),
                AttemptSteps(paths.root),
            )
        activities: dict[int, RankActivity] = {}
        try:
            for look in self._looks.update():
                activities[look.rank] = RankActivity(look.rank, {}, _doing(look))
            self._add_steps(self._steps, activities)
        except (OSError, ValueError):
            pass  # storage that can't be read now is read again in a moment
        return [activities[rank] for rank in sorted(activities)]

    @staticmethod
    def _add_steps(steps: AttemptSteps, activities: dict[int, RankActivity]) -> None:
        if (known := steps.span) is None:
            return
        for name in PARTS:
            window = steps.window(name, known[1] - _STEPS, known[1], 1)
            if not window.mean.size:
                continue
            for rank, value in zip(window.ranks.tolist(), window.mean[:, -1].tolist(), strict=True):
                if math.isfinite(value):
                    activities.setdefault(rank, RankActivity(rank, {})).seconds[name] = value

    def close(self) -> None:
        """Close files."""
        if self._steps is not None:
            self._steps.close()


def _doing(look: RankStatus) -> str:
    if look.exit_code is not None:
        return f"ended with {look.exit_code}"
    waits = f"waits in {look.waits}" if look.waits else look.phase
    return ", ".join(
        text for text in (f"step {look.step}" if look.step is not None else "", waits, look.held) if text
    )
