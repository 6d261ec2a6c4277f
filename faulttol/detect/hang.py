"""Whether a gang has stopped making records, and which ranks the others wait for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from configs.timeouts import Timeouts
from faulttol.recorder import Mark, Phase, Record
from faulttol.verdicts import Verdict, VerdictKind

SAVE_FACTOR = 4.0
"""A rank in a save may be silent for this many times `hang`: it renews its record while bytes flow, but one fsync or one
request may take long, and nobody sees how it gets on. It holds where the ranks that are furthest behind are saving."""
PREPARE_FACTOR = 20.0
"""A start may take this many times `start` while every rank prepares data: a corpus is tokenised once."""
_SAME_MOMENT = 5.0
"""Seconds by which ranks that save may differ in their last sign of progress, which comes with each few MiB."""
_NAMED = 8


def judge(
    newest: Mapping[int, Record | None],
    *,
    now: float,
    started: float,
    timeouts: Timeouts,
    first_step_done: bool,
) -> list[Verdict]:
    """A verdict where no rank has made or renewed a record for longer than a rank may be silent.

    Whatever takes long and makes progress renews its record (`Recorder.touch`), so a save or a load may take as long as it
    gets on.

    Args:
        newest: each rank's newest record; None before its first.
        now: seconds since the epoch.
        started: when the ranks were started.
        timeouts: `start` holds until the first step is done, `hang` after it.
        first_step_done: the gang has finished a step in this attempt.

    The culprits are the ranks that are furthest behind: with one rank stopped, its peers have all entered the
    collective that it hasn't, so their newest records lie after its own. Of ranks that stand in one save, those are that
    stopped renewing their record first.
    """
    records = {rank: record for rank, record in newest.items() if record is not None}
    if not first_step_done:
        waited = now - started
        preparing = len(records) == len(newest) and all(_is_in(r, Phase.DATA, 0) for r in records.values())
        limit = timeouts.seconds("start") * (PREPARE_FACTOR if preparing else 1.0)
        if waited <= limit or _gets_on(records.values(), now, timeouts):
            return []
        missing = [rank for rank in sorted(newest) if newest[rank] is None]
        who = f"ranks {_listed(missing)} made no record" if missing else _behind_text(records)
        detail = f"no step was finished in {waited:.0f} s: {who}"
        return [Verdict(VerdictKind.START_TIMEOUT, detail, missing[0] if missing else _behind(records)[0])]
    if not records:
        return []
    last = max(records.values(), key=lambda r: r.time)
    behind = _behind(records)
    saving = all(_is_in(records[rank], Phase.CHECKPOINT) for rank in behind)
    silence = now - last.time
    if silence <= timeouts.seconds("hang") * (SAVE_FACTOR if saving else 1.0):
        return []
    detail = f"no rank made a record for {silence:.0f} s: {_behind_text(records)}"
    return [Verdict(VerdictKind.HANG, detail, behind[0], time=last.time)]


def _is_in(record: Record, phase: Phase, step: int | None = None) -> bool:
    """The rank has begun `phase` (of `step`) and nothing since."""
    return record.phase is phase and record.mark is Mark.BEGIN and step in (None, record.step)


def _gets_on(records: Iterable[Record], now: float, timeouts: Timeouts) -> bool:
    """A rank that begins or loads has shown progress lately."""
    hang = timeouts.seconds("hang")
    return any(
        (_is_in(r, Phase.START) or _is_in(r, Phase.CHECKPOINT)) and now - r.time <= hang for r in records
    )


def _behind(records: Mapping[int, Record]) -> list[int]:
    """Ranks with the fewest steps and, among these, the fewest records; where they save, those that got on the least."""
    places = {rank: _place(record) for rank, record in records.items()}
    least = min(places.values())
    behind = sorted(rank for rank, place in places.items() if place == least)
    if all(_is_in(records[rank], Phase.CHECKPOINT) for rank in behind):
        first = min(records[rank].time for rank in behind)
        behind = [rank for rank in behind if records[rank].time - first <= _SAME_MOMENT]
    return behind


def _place(record: Record) -> tuple[int, int]:
    """Where a rank is: index of the step it is in, and its records so far.

    `step` n says that n steps are finished; what follows it, such as a save, belongs to the same step's end.
    """
    return record.step - (record.mark is Mark.STEP), record.sequence


def _behind_text(records: Mapping[int, Record]) -> str:
    ranks = _behind(records)
    record = records[ranks[0]]
    if len(ranks) == len(records):
        return f"all ranks stand {_where(record)}"
    one = len(ranks) == 1
    return f"rank{'' if one else 's'} {_listed(ranks)} {'is' if one else 'are'} behind, {_where(record)}"


def _where(record: Record) -> str:
    if record.mark is Mark.STEP:
        return f"after the end of step {record.step}"
    return (
        f"{'in' if record.mark is Mark.BEGIN else 'after'} {record.phase.name.lower()} of step {record.step}"
    )


def _listed(ranks: list[int]) -> str:
    more = len(ranks) - _NAMED
    return ", ".join(map(str, ranks[:_NAMED])) + (f" and {more} more" if more > 0 else "")
