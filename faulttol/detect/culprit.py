"""Which rank the others wait for: a sink of the wait-for graph, or a cycle in it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from faulttol.detect.snapshot import GroupStatus, RankObservation
from faulttol.progress_report import DEVICE
from faulttol.recorder import PhaseMark, RankPhase, Record

_SAME_MOMENT = 5.0
"""Seconds by which ranks that save may differ in their last sign of progress, which comes with each few MiB."""


@dataclass(frozen=True)
class Culprit:
    """The ranks that block the others."""

    ranks: list[int]
    reason: str = ""
    """What the others wait for them in; empty where records alone tell."""
    cycle: bool = False
    """They wait for each other."""


def stopped_ranks(living: Iterable[RankObservation], since: float) -> list[RankObservation]:
    """Ranks whose processes have been stopped since that time at least, the first one first."""
    stopped = [rank for rank in living if rank.held_since is not None and rank.held_since <= since]
    return sorted(stopped, key=lambda rank: (rank.held_since or 0.0, rank.rank))


def sleeping_ranks(
    living: Sequence[RankObservation], world: int, ranks: Mapping[int, RankObservation], since: float
) -> list[RankObservation]:
    """Ranks that sleep while all the others wait for them; none where one isn't known to do either.

    A rank that runs, or waits for a file, a device or another host, may come back, and so may what waits for it.

    Args:
        living: ranks that haven't ended.
        world: ranks of the gang.
        ranks: all that were seen.
        since: as of when they must have slept.
    """
    if len(ranks) < world:
        return []
    left = sorted((r for r in ranks.values() if r.exit_code == 0), key=lambda r: (r.exit_time or 0.0, r.rank))
    waiting = {rank.rank for rank in living if is_waiting(rank)}
    asleep_ones = [
        rank
        for rank in living
        # One without a record is still on its way into the program: it may sleep for a disk or a processor.
        if rank.newest is not None and rank.rank not in waiting
        if rank.asleep_since is not None and rank.asleep_since <= since
    ]
    if not asleep_ones:
        return left if left and len(waiting) == len(living) else []
    edges = _wait_for_graph(living)
    # A device may wait for peers: where its rank has entered a collective that a sleeper hasn't, it does.
    sleepers = {rank.rank for rank in asleep_ones}
    waiting |= {
        rank.rank for rank in living if rank.waits == DEVICE and edges.get(rank.rank, set()) & sleepers
    }
    # One that waits in a way that it doesn't tell of is seen to wait by the collective that it has entered.
    names = {rank.rank for rank in asleep_ones}
    behind_others = {to for one in names for to in edges.get(one, ()) if to in names}
    for one in names - behind_others:
        if edges.get(one, set()) & names:
            names, waiting = names - {one}, waiting | {one}
    if len(names) + len(waiting) < len(living) or not waiting:
        return []
    named = [rank for rank in asleep_ones if rank.rank in names]
    records = {rank.rank: rank.newest for rank in named if rank.newest is not None}
    first = lagging_ranks(records) if len(records) == len(named) else sorted(names)
    return sorted(named, key=lambda rank: (rank.rank not in first, rank.rank))


def is_waiting(rank: RankObservation) -> bool:
    """Whether its own report or record says that it waits for other ranks."""
    newest = rank.newest
    own_part_done = (
        newest is not None and newest.phase is RankPhase.COLLECTIVE and newest.mark is PhaseMark.BEGIN
    )
    return rank.waits not in ("", DEVICE) or own_part_done


def blocking_ranks(seen: Mapping[int, RankObservation]) -> Culprit:
    """The ranks that the others wait for.

    1. A stopped process, whatever it waited for.
    2. Of ranks that others wait for in a communicator, those that wait for nobody: they haven't entered the collective
       that the others have. Where each waits for another, they are a ring.
    3. Of ranks, those that don't stand in a distributed call.
    4. Of those, the ones that are furthest behind by their records.
    """
    stopped = [rank for rank in sorted(seen) if seen[rank].held_since is not None]
    if stopped:
        return Culprit(stopped, f", {seen[stopped[0]].held or 'stopped'}")
    edges = _wait_for_graph(seen.values())
    wanted = {to for targets in edges.values() for to in targets}
    candidates = sorted(rank for rank in wanted if not edges.get(rank))
    ring = bool(wanted) and not candidates
    if ring:
        return Culprit(sorted(wanted), "; each has entered a collective that another hasn't", cycle=True)
    because = _missing_collective(seen, candidates)
    candidates = candidates or sorted(seen)
    awake = [rank for rank in candidates if not is_waiting(seen[rank])]
    if awake and len(awake) < len(seen):
        candidates = awake
    records = {rank: record for rank in candidates if (record := seen[rank].newest) is not None}
    ranks = lagging_ranks(records) if records else candidates
    return Culprit(ranks, because)


def lagging_ranks(records: Mapping[int, Record]) -> list[int]:
    """Ranks with the fewest steps and, among these, the fewest records; where they save, those that stopped first.

    With one rank stopped, its peers have all entered the collective that it hasn't, so their newest records lie after its
    own. Of ranks that stand in one save, those are behind that stopped renewing their record first.
    """
    places = {rank: _progress(record) for rank, record in records.items()}
    least = min(places.values())
    last = sorted(rank for rank, place in places.items() if place == least)
    if all(records[r].phase is RankPhase.CHECKPOINT and records[r].mark is PhaseMark.BEGIN for r in last):
        first = min(records[rank].time for rank in last)
        last = [rank for rank in last if records[rank].time - first <= _SAME_MOMENT]
    return last


def _progress(record: Record) -> tuple[int, int]:
    """How far a rank is: its step, and its records so far. A save that follows the end of a step belongs to that step."""
    return record.step, record.sequence


def _wait_for_graph(seen: Iterable[RankObservation]) -> dict[int, set[int]]:
    """By rank, the ranks that it waits for: it has entered a collective that they haven't.

    Of a group's ranks only the most backward ones are waited for: the others may be waiting too.
    """
    groups: dict[str, dict[int, GroupStatus]] = {}
    for rank in seen:
        for group in rank.groups:
            groups.setdefault(group.name, {})[rank.rank] = group
    edges: dict[int, set[int]] = {}
    for members in groups.values():
        least = min(group.entered for group in members.values())
        last = {member for member, group in members.items() if group.entered == least}
        for member, group in members.items():
            if group.entered > least:
                edges.setdefault(member, set()).update(last)
    return edges


def _missing_collective(seen: Mapping[int, RankObservation], candidates: Sequence[int]) -> str:
    """The collective that the first of the candidates hasn't entered."""
    if not candidates:
        return ""
    for group in seen[candidates[0]].groups:
        ahead = [
            r for r in seen.values() for g in r.groups if g.name == group.name and g.entered > group.entered
        ]
        if ahead:
            doing = next((f" ({r.waits})" for r in ahead if r.waits), "")
            count = f"{len(ahead)} rank{'s wait' if len(ahead) > 1 else ' waits'}"
            return f": {count} for it in collective {group.entered + 1} of {group.name}{doing}"
    return ""
