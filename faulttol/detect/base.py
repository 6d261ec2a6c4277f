"""One protocol for all detectors, and the registry of those that judge a gang."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Protocol

from faulttol.detect import death, hang, nodes, overdue
from faulttol.detect.snapshot import Snapshot
from faulttol.verdicts import Verdict

_log = logging.getLogger("megaray.detect")


class Detector(Protocol):
    """Looks at a snapshot of a gang and says what is wrong. Pure: no clock, no files."""

    @property
    def name(self) -> str:
        """Of the module, such as `hang`."""

    def judge(self, snapshot: Snapshot) -> list[Verdict]:
        """What is wrong, the cause first; empty where nothing is."""


class _Module:
    """A module with a function `judge`."""

    def __init__(self, name: str, judge: Callable[[Snapshot], list[Verdict]]) -> None:
        self.name = name
        self._judge = judge

    def judge(self, snapshot: Snapshot) -> list[Verdict]:
        """As the module says."""
        return self._judge(snapshot)


DETECTORS: tuple[Detector, ...] = (
    _Module("nodes", nodes.judge),
    _Module("death", death.judge),
    _Module("hang", hang.judge),
    _Module("overdue", overdue.judge),
)
"""In the order in which they are asked."""


def judge_all(
    snapshot: Snapshot,
    report: Callable[[str], None] = _log.error,
    detectors: tuple[Detector, ...] = DETECTORS,
) -> list[Verdict]:
    """What all detectors find.

    A detector that raises finds nothing: its own fault never stops training.

    Args:
        snapshot: the gang now.
        report: gets each detector that raised, in one line with the place.
    """
    verdicts: list[Verdict] = []
    for detector in detectors:
        try:
            verdicts += detector.judge(snapshot)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
            report(f"detector {detector.name} failed in {where}: {type(error).__name__}: {error}")
    return verdicts
