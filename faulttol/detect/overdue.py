"""Whether a run trains on without its state being saved."""

from __future__ import annotations

from faulttol.detect.snapshot import Snapshot
from faulttol.verdicts import Verdict, VerdictKind

INTERVALS = 3
"""Intervals without a commit that are taken for one: a save beside training may lie behind by two."""


def judge(snapshot: Snapshot) -> list[Verdict]:
    """A verdict where `max_failed` saves in a row have failed, or none was committed for more than `INTERVALS` intervals.

    The second is counted in steps and not in time: a run that is slow or stands still is another detector's.
    """
    saves = snapshot.saves
    if saves is None:
        return []
    since = saves.step - saves.saved_step
    if saves.failing >= saves.max_failed:
        detail = f"{failed_saves(saves.failing)} since step {saves.saved_step}: {saves.error}"
    elif since > INTERVALS * saves.interval:
        detail = (
            f"nothing was saved for {since} steps, since step {saves.saved_step}, where a save is due every "
        )
        detail += f"{saves.interval}" + (f": {saves.error}" if saves.error else "")
    else:
        return []
    return [Verdict(VerdictKind.CHECKPOINT_OVERDUE, detail)]


def failed_saves(count: int) -> str:
    """1 save failed, 3 saves failed."""
    return f"{count} save{'' if count == 1 else 's'} failed"
