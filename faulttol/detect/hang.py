"""Whether a gang has stopped getting on, and which rank the others wait for.

Past `timeouts.hang` without a record from any rank, silence itself is the verdict. Before, it needs evidence that nothing
will come of waiting: past a fifth of it a process that is stopped, past a quarter one that sleeps while all the others wait
for it. Work that takes long has none of this: it runs, or waits for a file or a host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from configs.timeouts import Timeouts
from faulttol.detect import culprit, death
from faulttol.detect.snapshot import RankObservation, Snapshot
from faulttol.recorder import PhaseMark, RankPhase, Record
from faulttol.verdicts import Verdict, VerdictKind

SAVE_FACTOR = 4.0
"""A rank in a save may be silent for this many times `hang`: it renews its record while bytes flow, but one fsync or one
request may take long, and nobody sees how it gets on. It holds where the ranks that are furthest behind are saving."""
PREPARE_FACTOR = 20.0
"""A start may take this many times `start` while every rank prepares data: a corpus is tokenised once."""
HELD, ASLEEP = 1 / 5, 1 / 4
"""Of `hang`: silence after which a stopped process is named, and one that sleeps."""
LEAST_EARLY = 5.0
"""Seconds of silence that either takes at least."""
_SEEN = 0.5
"""Of that silence: for how long the evidence must have been there."""
_HEARTBEATS = 3.0
"""Heartbeats without an answer after which what a node last reported is not evidence any more."""
_BEGINNING = (
    RankPhase.START,
    RankPhase.IMPORTS,
    RankPhase.RENDEZVOUS,
    RankPhase.BUILD,
    RankPhase.LOAD,
    RankPhase.CHECKPOINT,
)
"""Phases before the first step that renew their records."""


def judge(snapshot: Snapshot) -> list[Verdict]:
    """A verdict where the gang has stopped getting on.

    Whatever takes long and makes progress renews its record (`Recorder.touch`), so a save or a load may take as long as it
    gets on. `culprit` says who is named. Nothing is judged here once a rank is dead: its peers wait for it.
    """
    if not snapshot.ranks or death.any_dead(snapshot) or snapshot.refused or snapshot.gone:
        return []
    return _stuck_rank(snapshot) or (
        _hang_timeout(snapshot) if snapshot.first_step_done else _start_timeout(snapshot)
    )


def _stuck_rank(snapshot: Snapshot) -> list[Verdict]:
    beat, hang = snapshot.timeouts.seconds("heartbeat"), snapshot.timeouts.seconds("hang")
    living = [rank for rank in snapshot.ranks.values() if not rank.ended]
    times = [rank.newest.time for rank in living if rank.newest is not None]
    if not times or any(seconds > _HEARTBEATS * beat for seconds in snapshot.silent.values()):
        return []
    silence, named = snapshot.now - max(times), list[RankObservation]()
    held, asleep = max(hang * HELD, LEAST_EARLY), max(hang * ASLEEP, LEAST_EARLY)
    if silence >= held:
        named = culprit.stopped_ranks(living, snapshot.now - held * _SEEN)
    if not named and silence >= asleep:
        named = culprit.sleeping_ranks(living, snapshot.world, snapshot.ranks, snapshot.now - asleep * _SEEN)
    if not named:
        return []
    one = named[0]
    where = f", {_position_text(one.newest)}" if one.newest else ""
    also = (
        f"; so {'is' if len(named) == 2 else 'are'} {_ranks([r.rank for r in named[1:]])}"
        if named[1:]
        else ""
    )
    kind = VerdictKind.HANG
    if one.exit_code == 0:
        kind = VerdictKind.RANK_EXIT
        detail = f"rank {one.rank} ended with code 0{also}"
        detail += f", and no rank has made progress for {silence:.0f} s: the others wait for it"
    else:
        waiting = "" if len(living) == len(named) else ": the others wait for it"
        detail = f"rank {one.rank} is {one.held}{where}{also}, and no rank has made progress for {silence:.0f} s{waiting}"
    return [_verdict(snapshot, one.rank, kind, detail, max(times))]


def _start_timeout(snapshot: Snapshot) -> list[Verdict]:
    """Before the first step, by `timeouts.start`."""
    timeouts, waited, records = snapshot.timeouts, snapshot.since_start, _records(snapshot)
    preparing = len(records) == snapshot.world and all(
        _in_phase(r, RankPhase.DATA, 0) for r in records.values()
    )
    limit = timeouts.seconds("start") * (PREPARE_FACTOR if preparing else 1.0)
    if waited <= limit or _makes_progress(records.values(), snapshot.now, timeouts):
        return []
    missing = [rank for rank in range(snapshot.world) if rank not in records]
    if missing:
        who, rank = f"{_ranks(missing)} recorded nothing", missing[0]
    else:
        blamed = culprit.blocking_ranks({rank: snapshot.ranks[rank] for rank in records})
        who, rank = _lag_text(blamed, records), blamed.ranks[0]
    return [
        _verdict(snapshot, rank, VerdictKind.START_TIMEOUT, f"no step was finished in {waited:.0f} s: {who}")
    ]


def _hang_timeout(snapshot: Snapshot) -> list[Verdict]:
    """After the first step, by `timeouts.hang`."""
    records = _records(snapshot)
    if not records:
        return []
    last, hang = max(record.time for record in records.values()), snapshot.timeouts.seconds("hang")
    silence = snapshot.now - last
    if silence <= hang:
        return []
    blamed = culprit.blocking_ranks({rank: snapshot.ranks[rank] for rank in records})
    saving = all(_in_phase(records[rank], RankPhase.CHECKPOINT) for rank in blamed.ranks)
    if saving and silence <= hang * SAVE_FACTOR:
        return []
    detail = f"no rank has made progress for {silence:.0f} s: {_lag_text(blamed, records)}"
    return [_verdict(snapshot, blamed.ranks[0], VerdictKind.HANG, detail, last)]


def _records(snapshot: Snapshot) -> dict[int, Record]:
    """Newest records of the ranks that haven't ended."""
    return {r.rank: r.newest for r in snapshot.ranks.values() if r.newest is not None and not r.ended}


def _in_phase(record: Record, phase: RankPhase, step: int | None = None) -> bool:
    """The rank has begun `phase` (of `step`) and nothing since."""
    return record.phase is phase and record.mark is PhaseMark.BEGIN and step in (None, record.step)


def _makes_progress(records: Iterable[Record], now: float, timeouts: Timeouts) -> bool:
    """Whether a rank that begins or loads made a record lately."""
    hang = timeouts.seconds("hang")
    return any(r.phase in _BEGINNING and r.mark is PhaseMark.BEGIN and now - r.time <= hang for r in records)


def _lag_text(blamed: culprit.Culprit, records: Mapping[int, Record]) -> str:
    """Who is behind and where."""
    ranks, record = blamed.ranks, records[blamed.ranks[0]]
    if blamed.cycle:
        return f"{_ranks(ranks)} wait for each other{blamed.reason}"
    if len(ranks) == len(records):
        return f"all ranks are stuck {_position_text(record)}"
    return f"{_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} behind, {_position_text(record)}{blamed.reason}"


def _position_text(record: Record) -> str:
    if record.mark is PhaseMark.STEP:
        return f"after the end of step {record.step}"
    of = f" of step {record.step}" if record.step else ""  # a start has none, whichever step it begins at
    return f"{'in' if record.mark is PhaseMark.BEGIN else 'after'} {record.phase.name.lower()}{of}"


def _ranks(ranks: list[int]) -> str:
    """`rank 3`, `ranks 1, 2 and 5 more`."""
    most = 8
    more = len(ranks) - most
    listed = ", ".join(map(str, ranks[:most])) + (f" and {more} more" if more > 0 else "")
    return f"rank{'' if len(ranks) == 1 else 's'} {listed}"


def _verdict(
    snapshot: Snapshot, rank: int, kind: VerdictKind, detail: str, time: float | None = None
) -> Verdict:
    node, evidence = snapshot.nodes.get(rank), snapshot.log(rank)
    return Verdict(kind, detail, rank, node, time, evidence)
