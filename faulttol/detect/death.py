"""Which rank died first, and of what.

When one rank dies its peers die of it: their collectives report a closed connection a moment later. So a
death by a signal is a cause before an exit with an error is, and of the same kind the earliest is.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from configs.errors import USER_ERROR_EXIT
from faulttol.verdicts import Verdict, VerdictKind

_SAME_MOMENT = 2.0
"""Seconds within which exits are seen together: node agents are asked about once a second."""


@dataclass(frozen=True)
class Exit:
    """A rank that has ended."""

    rank: int
    node: str
    code: int
    """Negative for a signal, as `subprocess` has it."""
    time: float
    """When its node agent saw it."""
    last_words: str
    """Last line of its log."""


def judge(exits: Sequence[Exit], evidence: Callable[[int], str]) -> list[Verdict]:
    """Verdicts on the ranks that began it; none where every exit is 0.

    A user's mistake on any rank explains all: the others wait for that rank or die of it.
    """
    failed = [e for e in exits if e.code != 0]
    if not failed:
        return []
    mistaken = [e for e in failed if e.code == USER_ERROR_EXIT]
    if mistaken:
        first = min(mistaken, key=lambda e: e.rank)
        told = first.last_words.removeprefix("megaray: ") or "the program refused its configuration"
        return [
            Verdict(VerdictKind.USER_ERROR, told, first.rank, first.node, first.time, evidence(first.rank))
        ]
    began = min(e.time for e in failed)
    first_ones = [e for e in failed if e.time - began <= _SAME_MOMENT]
    # Some signals are how a program itself gives up on a lost peer, so they rank with the exits.
    killed = [e for e in first_ones if e.code < 0 and -e.code != signal.SIGABRT]
    culprits = killed or [e for e in first_ones if not _blames_a_peer(e.last_words)] or first_ones
    return [
        Verdict(VerdictKind.RANK_EXIT, _how(e), e.rank, e.node, e.time, evidence(e.rank))
        for e in sorted(culprits, key=lambda e: (e.time, e.rank))
    ]


_PEER_LOST = (
    "connection closed by peer",  # gloo
    "connection reset by peer",
    "broken pipe",
    "connection was likely closed",  # torch's rendezvous store
    "remote process exited",  # NCCL and RCCL
    "remote error",
)
"""How a library says that it lost its peer."""


def _blames_a_peer(words: str) -> bool:
    lower = words.lower()
    return any(sign in lower for sign in _PEER_LOST)


def _how(exit_: Exit) -> str:
    if exit_.code < 0:
        try:
            name = signal.Signals(-exit_.code).name
        except ValueError:
            name = f"signal {-exit_.code}"
        return f"rank {exit_.rank} was killed by {name}"
    words = f": {exit_.last_words}" if exit_.last_words else ""
    return f"rank {exit_.rank} exited with code {exit_.code}{words}"
