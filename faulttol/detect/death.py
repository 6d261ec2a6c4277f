"""Which rank died of a reason of its own, and of what.

When one rank dies its peers die of it: their collectives report a closed connection a moment later, and whoever is asked
first tells of its end first. So the order of polls decides nothing. Each rank says itself what it ends by
(`faulttol.exits`), and the kernel when it ended.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace

from configs.errors import STOPPED_EXIT, USER_ERROR_EXIT, ReplicasDiffer, WrongReplica
from faulttol.detect.snapshot import RankObservation, Snapshot
from faulttol.exits import text_blames_peer
from faulttol.verdicts import Verdict, VerdictKind

_SAME_MOMENT = 2.0
"""Seconds within which ranks that died of reasons of their own are all named: nodes' clocks differ."""
_HEARTBEATS = 3.0
"""Heartbeats for which a rank that died of a peer waits for the peer's end to be reported."""
_LEAST_WAIT = 3.0
"""Seconds for which it waits at least."""
_MAX_NAMED = 16
"""Ranks that are named where many died at once, the first ones."""
_LINGER = 10.0
"""Seconds after its exit report at which a rank that still lives counts as dead."""


def judge(snapshot: Snapshot) -> list[Verdict]:
    """Verdicts on the ranks that began it; none where every exit is 0.

    1. A user's mistake on any rank explains all: the others wait for that rank or die of it. Where all ranks learned of
       it, the one that met it is named.
    2. Where ranks have found that their copies of the state differ, those that hold a wrong one are named with their
       nodes; no rank and no node where nobody knows which is wrong.
    3. The earliest death of a rank's own reason is the cause: a signal, an error that blames no peer, any exit code
       without an error. Those within `_SAME_MOMENT` of it are named too.
    4. Where every dead rank blames a peer, the peer's own end may not have been reported yet. So nobody is named while a
       rank lives, or a node is silent, up to a bound; past it the living rank that is stopped is the cause, or the rank
       that ended with code 0 before them, else the network between them is.
    """
    dead = [rank for rank in snapshot.ranks.values() if _is_dead(rank, snapshot.now)]
    if not dead:
        return []
    dead.sort(key=lambda r: (_death_time(r, snapshot.now), r.rank))
    mistaken = [r for r in dead if r.exit_code == USER_ERROR_EXIT]
    if mistaken:
        # Of those that were only informed of it, none where one wasn't.
        first = min(mistaken, key=_blames_peer)
        if _blames_peer(first) and _cause_may_be_pending(snapshot, dead[0]):
            return []
        return [_verdict(snapshot, first, VerdictKind.USER_ERROR, _user_error_text(first))]
    own = [r for r in dead if not _blames_peer(r)]
    drifted = _replica_verdicts(snapshot, own)
    if drifted:
        return drifted
    sure = [r for r in own if not _may_be_a_watchdog(r)]
    if sure:
        own = sure
    elif _cause_may_be_pending(snapshot, dead[0]):
        return []
    if own:
        began = _death_time(own[0], snapshot.now)
        named = [r for r in own if _death_time(r, snapshot.now) - began <= _SAME_MOMENT]
        more = f"; and {len(named) - _MAX_NAMED} more ended then" if len(named) > _MAX_NAMED else ""
        return [
            _verdict(snapshot, r, VerdictKind.RANK_EXIT, _exit_text(r) + more * (r is named[0]))
            for r in named[:_MAX_NAMED]
        ]
    return _without_a_cause(snapshot, dead)


def any_dead(snapshot: Snapshot) -> bool:
    """Whether a rank ended by anything but code 0: what its peers do then is not a hang."""
    return any(_is_dead(rank, snapshot.now) for rank in snapshot.ranks.values())


def _is_dead(rank: RankObservation, now: float) -> bool:
    if rank.exit_code is not None:
        return rank.exit_code != 0
    return rank.raised is not None and now - rank.raised.time > _LINGER


def _death_time(rank: RankObservation, now: float) -> float:
    """When it began to end, by its exit report or else by the kernel."""
    times = [t for t in (rank.exit_time, rank.raised.time if rank.raised else None) if t is not None]
    return min(times, default=now)


def _blames_peer(rank: RankObservation) -> bool:
    if rank.exit_code is not None and rank.exit_code < 0 and -rank.exit_code != signal.SIGABRT:
        return False  # whatever it was about to say, it was killed
    return rank.raised.blames_peer if rank.raised else text_blames_peer(rank.last_words)


def _may_be_a_watchdog(rank: RankObservation) -> bool:
    """Ended as communication libraries end a process that has lost its peer: by an abort, without an error in Python."""
    return rank.raised is None and rank.exit_code == -signal.SIGABRT


def _cause_may_be_pending(snapshot: Snapshot, first: RankObservation) -> bool:
    """Whether the exit that caused the others may not have been reported yet."""
    waited = snapshot.now - _death_time(first, snapshot.now)
    beat = snapshot.timeouts.seconds("heartbeat")
    living = sum(not rank.ended for rank in snapshot.ranks.values()) + snapshot.world - len(snapshot.ranks)
    bound = max(_LEAST_WAIT, _HEARTBEATS * beat)
    if living and waited < bound:
        return True
    silent = any(seconds > _HEARTBEATS * beat for seconds in snapshot.silent.values())
    return silent and waited < bound + snapshot.timeouts.seconds("agent")


def _replica_verdicts(snapshot: Snapshot, own: Sequence[RankObservation]) -> list[Verdict]:
    """Verdicts on replicas that differ; a named node may be cordoned, so without proof none is named."""
    words: dict[str, list[tuple[RankObservation, str]]] = {}
    for rank in own:
        name, _, text = rank.raised.error.partition(": ") if rank.raised else ("", "", "")
        words.setdefault(name, []).append((rank, text))
    kind = VerdictKind.REPLICAS_DIFFER
    wrong = words.get(WrongReplica.__name__, [])
    if wrong:
        return [_verdict(snapshot, rank, kind, text) for rank, text in wrong[:_MAX_NAMED]]
    unsure = words.get(ReplicasDiffer.__name__, [])
    return [replace(_verdict(snapshot, rank, kind, text), rank=None, node=None) for rank, text in unsure[:1]]


def _without_a_cause(snapshot: Snapshot, dead: Sequence[RankObservation]) -> list[Verdict]:
    """The verdict where every dead rank blames a peer."""
    first = _death_time(dead[0], snapshot.now)
    why = f"rank {dead[0].rank} and {len(dead) - 1} more" if len(dead) > 1 else f"rank {dead[0].rank}"
    living = [r for r in snapshot.ranks.values() if not _is_dead(r, snapshot.now) and not r.ended]
    stuck = [r for r in living if r.held_since is not None]
    if stuck:
        one = min(stuck, key=lambda r: (r.held_since or 0.0, r.rank))
        detail = f"rank {one.rank} is {one.held or 'stopped'}: {why} died waiting for it"
        return [_verdict(snapshot, one, VerdictKind.HANG, detail, one.held_since)]
    # The kernel closes a process's connections a little before it reports the end.
    left = [
        r
        for r in snapshot.ranks.values()
        if r.exit_code == 0 and (r.exit_time or first) <= first + _SAME_MOMENT
    ]
    if left:
        one = min(left, key=lambda r: (r.exit_time or first, r.rank))
        detail = (
            f"rank {one.rank} ended with code 0 while its peers still worked: {why} lost the connection to it"
        )
        return [_verdict(snapshot, one, VerdictKind.RANK_EXIT, detail)]
    how = _exit_text(dead[0])
    detail = f"{how}; every dead rank blames a peer: look at the network between their nodes"
    verdict = _verdict(snapshot, dead[0], VerdictKind.RANK_EXIT, detail)
    return [verdict]


def _user_error_text(rank: RankObservation) -> str:
    words = rank.last_words.removeprefix("megaray: ")
    if not words and rank.raised is not None:
        words = rank.raised.error.removeprefix("UserError: ")
    return words or "the program refused its configuration"


def _exit_text(rank: RankObservation) -> str:
    reason = rank.raised.error if rank.raised else rank.last_words
    words = f": {reason}" if reason else ""
    code = rank.exit_code
    if code is None:
        return f"rank {rank.rank} has raised an error and doesn't end{words}"
    if code == STOPPED_EXIT:
        return f"rank {rank.rank} was asked to stop by SIGTERM from outside{words}"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"rank {rank.rank} was killed by {name}"
    return f"rank {rank.rank} exited with code {code}{words}"


def _verdict(
    snapshot: Snapshot, rank: RankObservation, kind: VerdictKind, detail: str, time: float | None = None
) -> Verdict:
    when = _death_time(rank, snapshot.now) if time is None else time
    node, evidence = snapshot.nodes.get(rank.rank), snapshot.log(rank.rank)
    return Verdict(kind, detail, rank.rank, node, when, evidence)
