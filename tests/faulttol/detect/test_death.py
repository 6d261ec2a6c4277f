"""Who died of a reason of its own, whatever was seen first."""

from __future__ import annotations

import itertools
import signal
from typing import Any

import pytest

from configs.errors import STOPPED_EXIT, UserError
from faulttol import exits
from faulttol.checkpoint.peers import capture_failure
from faulttol.detect import death
from faulttol.detect.snapshot import ExitReport, RankObservation, Snapshot
from faulttol.verdicts import Verdict, VerdictKind
from tests.faulttol.detect.seen import gang

pytestmark = [pytest.mark.unit, pytest.mark.timeout(20)]

GLOO = (
    "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:28372: Connection reset by peer. "
    "This is typically caused by a remote worker hanging or bugs in the application."
)
LATE = 200.0
"""When nothing more is to be expected."""


def died(rank: int, code: int | None, time: float = 100.0, words: str = "", **more: Any) -> RankObservation:
    return RankObservation(
        rank, 1000 + rank, code, time if code is not None else None, last_words=words, **more
    )


def lost_peer(rank: int, time: float = 100.0, code: int | None = 1) -> RankObservation:
    return died(rank, code, time, raised=ExitReport(time, GLOO, True))


def _judge(*ranks: RankObservation, now: float = LATE, **more: Any) -> list[Verdict]:
    return death.judge(gang(*ranks, now=now, **more))


def _culprits(*ranks: RankObservation, **more: Any) -> list[int | None]:
    return [verdict.rank for verdict in _judge(*ranks, **more)]


def test_nobody_died() -> None:
    assert _culprits() == [] and _culprits(died(0, 0), died(1, 0), died(2, None)) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGTERM])
def test_a_signal_is_named(number: signal.Signals) -> None:
    (verdict,) = _judge(died(0, None), died(1, None), died(2, -number))
    assert verdict.kind is VerdictKind.RANK_EXIT and verdict.detail == f"rank 2 was killed by {number.name}"
    assert (verdict.rank, verdict.node, verdict.time) == (2, "10.0.0.2", 100.0)
    assert verdict.evidence == "logs/00002.log"


def test_a_signal_without_a_name_has_its_number() -> None:
    (verdict,) = _judge(died(0, -200))
    assert "signal 200" in verdict.detail


def test_an_exit_tells_its_last_words_or_what_it_wrote() -> None:
    (verdict,) = _judge(died(1, 1, words="ValueError: too bad"))
    assert verdict.detail == "rank 1 exited with code 1: ValueError: too bad"
    (verdict,) = _judge(died(1, 1, words="frame #7", raised=ExitReport(99.0, "ValueError: too bad", False)))
    assert verdict.detail == "rank 1 exited with code 1: ValueError: too bad" and verdict.time == 99.0
    (verdict,) = _judge(died(1, 7))
    assert verdict.detail == "rank 1 exited with code 7"


def test_the_order_in_which_deaths_are_told_decides_nothing() -> None:
    """Four ranks, one killed: whoever of its peers is seen before it, the verdict is the same or still to come."""
    ranks = [lost_peer(0, 100.2), died(1, -9, 100.3), lost_peer(2, 100.1), lost_peer(3, 101.5)]
    for order in itertools.permutations(ranks):
        for told in range(1, 5):
            seen = [r if r in order[:told] else died(r.rank, None) for r in ranks]
            named = _culprits(*seen, now=102.0)
            assert named == ([1] if ranks[1] in order[:told] else []), (order, told)


def test_a_peer_on_a_node_that_has_told_nothing_is_waited_for() -> None:
    assert _culprits(lost_peer(0), lost_peer(1), world=4, now=101.0) == []
    assert _culprits(lost_peer(0), lost_peer(1), died(2, -9, 99.9), world=4, now=101.0) == [2]


def test_a_silent_node_is_waited_for_until_it_counts_as_lost() -> None:
    silent = {"10.0.0.2": 5.0}
    assert _culprits(lost_peer(0), lost_peer(1), world=4, now=105.0, silent=silent) == []
    assert _culprits(lost_peer(0), lost_peer(1), world=4, now=105.0, silent={"10.0.0.2": 0.5}) == [0]
    assert _culprits(lost_peer(0), lost_peer(1), world=4, now=114.0, silent=silent) == [0]


def test_the_earliest_own_reason_is_the_cause() -> None:
    late = died(0, 1, 103.0, raised=ExitReport(103.0, "KeyError: 1", False))
    assert _culprits(late, died(1, -9, 100.0)) == [1]
    assert _culprits(died(0, -9, 103.0), died(1, 1, 100.0, words="ValueError: mine")) == [1]
    assert _culprits(
        died(0, -9, 100.9), died(1, 1, 101.0, raised=ExitReport(100.2, "ValueError", False))
    ) == [
        1,
        0,
    ]


def test_two_killed_at_once_are_both_named_in_order() -> None:
    assert _culprits(died(5, -9, 100.5), died(4, -9, 100.2), lost_peer(0, 100.1), world=6) == [4, 5]


def test_of_many_that_died_at_once_the_first_are_named() -> None:
    found = _judge(*[died(rank, -9, 100.0 + rank / 1e4) for rank in range(5000)])
    assert [v.rank for v in found] == list(range(16))
    assert found[0].detail == "rank 0 was killed by SIGKILL; and 4984 more ended then"
    assert found[1].detail == "rank 1 was killed by SIGKILL"


@pytest.mark.parametrize(
    "words",
    [
        GLOO,
        "RuntimeError: Connection closed by peer [10.0.0.2]:4433",
        "torch.distributed.DistNetworkError: Broken pipe",
        "DistStoreError: Failed to recv, got 0 bytes. Connection was likely closed. Did the server shut down?",
        "DistBackendError: NCCL error: remote process exited or there was a network error",
        "RuntimeError: Timed out waiting 1800000ms for recv operation to complete",
        "what():  [PG ID 0 PG GUID 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)",
    ],
)
def test_an_error_of_ones_own_beats_the_loss_of_a_peer(words: str) -> None:
    own = died(1, 1, 100.9, "ValueError: mine")
    assert _culprits(died(0, 1, 100.0, words), own) == [1]
    assert _culprits(died(0, 1, 100.0, words), died(1, None), now=101.0) == []


def test_a_kill_is_a_ranks_own_whatever_it_was_about_to_say() -> None:
    assert _culprits(died(0, -9, 100.0, raised=ExitReport(99.9, GLOO, True)), lost_peer(1, 99.0)) == [0]


def test_an_abort_by_the_watchdog_is_the_last_that_is_believed() -> None:
    watchdog = died(0, -signal.SIGABRT, 100.0, "frame #8: clone + 0x3f")
    assert _culprits(watchdog, died(3, -9, 101.0)) == [3]
    assert _culprits(watchdog, died(3, 1, 101.0, "ValueError: mine")) == [3]
    assert _culprits(watchdog, died(3, None), now=101.0) == [], "its peer's end may be on its way"
    assert _culprits(watchdog, died(3, None)) == [0]
    assert _culprits(watchdog, lost_peer(3)) == [0], "the one that blames nobody"


def test_when_all_lost_their_peers_the_network_is_suspected() -> None:
    (verdict,) = _judge(lost_peer(1, 100.2), lost_peer(0, 100.1))
    assert verdict.rank == 0 and "look at the network" in verdict.detail


def test_a_stopped_rank_that_its_peers_gave_up_is_the_cause() -> None:
    stopped = died(2, None, held_since=40.0, held="stopped (state T)")
    assert _culprits(lost_peer(0), lost_peer(1), stopped, now=101.0) == []
    (verdict,) = _judge(lost_peer(0), lost_peer(1), stopped, now=104.0)
    assert verdict.kind is VerdictKind.HANG and verdict.rank == 2 and verdict.time == 40.0
    assert verdict.detail == "rank 2 is stopped (state T): rank 0 and 1 more died waiting for it"


def test_a_rank_that_gave_a_peer_up_and_is_stuck_in_its_end_is_not_the_cause() -> None:
    stuck = died(2, None, raised=ExitReport(90.0, GLOO, True), held_since=95.0, held="stopped (state T)")
    (verdict,) = _judge(lost_peer(0), lost_peer(1), stuck)
    assert verdict.kind is not VerdictKind.HANG and "look at the network" in verdict.detail


def test_a_rank_that_left_with_code_0_is_the_cause() -> None:
    (verdict,) = _judge(lost_peer(0, 100.2), died(1, 0, 100.0), lost_peer(2, 100.1))
    assert verdict.rank == 1 and verdict.kind is VerdictKind.RANK_EXIT
    assert (
        verdict.detail
        == "rank 1 ended with code 0 while its peers still worked: rank 2 and 1 more lost the connection to it"
    )
    assert _culprits(lost_peer(0, 99.0), died(1, 0, 100.0)) == [1], (
        "its connections were closed before its end was told"
    )
    assert _culprits(lost_peer(0, 97.0), died(1, 0, 100.0)) == [0]


def test_a_rank_that_raised_and_hangs_in_its_end_counts_as_dead_after_a_while() -> None:
    raised = died(1, None, raised=ExitReport(100.0, "ValueError: mine", False))
    assert _culprits(died(0, None), raised, now=105.0) == []
    (verdict,) = _judge(died(0, None), raised, now=111.0)
    assert (
        verdict.rank == 1 and verdict.detail == "rank 1 has raised an error and doesn't end: ValueError: mine"
    )


def test_a_user_error_explains_everything() -> None:
    (verdict,) = _judge(
        lost_peer(0, 99.0), died(1, 2, 100.0, "megaray: data.path='x' does not exist"), died(2, -9, 98.0)
    )
    assert verdict.kind is VerdictKind.USER_ERROR and verdict.detail == "data.path='x' does not exist"
    assert verdict.rank == 1
    (verdict,) = _judge(died(1, 2, raised=ExitReport(99.0, "UserError: data.path is wrong", False)))
    assert verdict.detail == "data.path is wrong"
    (verdict,) = _judge(died(1, 2))
    assert verdict.detail


def test_of_a_mistake_that_all_were_told_of_the_rank_that_met_it_is_named() -> None:
    told = [died(r, 2, 100.0, raised=ExitReport(100.0, "UserError: no", True)) for r in (0, 2)]
    assert _culprits(*told, died(1, 2, 100.2, raised=ExitReport(100.2, "UserError: no", False))) == [1]
    assert _culprits(*told) == [0]
    assert _culprits(*told, died(1, None), now=101.0) == [], "the one that met it ends soon"


def test_a_stop_from_outside_names_who_was_asked() -> None:
    follows = died(
        0, STOPPED_EXIT, 100.0, raised=ExitReport(99.0, "a peer was asked to stop at step 3", True)
    )
    asked = died(1, STOPPED_EXIT, 100.1, raised=ExitReport(99.1, "Stopped: SIGTERM at step 3", False))
    (verdict,) = _judge(follows, asked)
    assert verdict.rank == 1
    assert verdict.detail == "rank 1 was asked to stop by SIGTERM from outside: Stopped: SIGTERM at step 3"


# ---- what ranks write ----


class DistNetworkError(RuntimeError):
    """Named like torch's."""


def _chained(first: Exception, then: Exception) -> Exception:
    try:
        try:
            raise first
        finally:
            raise then
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "blames"),
    [
        (RuntimeError(GLOO), True),
        (DistNetworkError("whatever it says"), True),
        (RuntimeError("CUDA error: an illegal memory access"), False),
        (ValueError("connection closed by peer"), False),
        (BrokenPipeError("Broken pipe"), False),
        (UserError("data.path"), False),
        (MemoryError(), False),
        (KeyboardInterrupt(), False),
        (_chained(ValueError("mine"), RuntimeError(GLOO)), False),
        (_chained(RuntimeError(GLOO), ValueError("in the clean-up")), True),
    ],
)
def test_whose_error_it_is(error: BaseException, blames: bool) -> None:
    assert exits.blames_peer(error) is blames


def test_an_error_that_all_raise_is_that_of_the_rank_that_met_it() -> None:
    text = f"block {id(object())} differs"
    assert exits.blames_peer(exits.mark_as_peers(ValueError(f"no checkpoint can be read: {text}")))
    mine, failure = capture_failure(lambda: _raise(OSError(text)))
    assert mine is None and failure is not None
    assert not exits.blames_peer(exits.mark_as_peers(ValueError(f"no checkpoint can be read: {text}")))
    assert not exits.blames_peer(ValueError("mine alone"))


WRONG = "WrongReplica: w of rank 1 on b isn't as the other ranks have it"
DIFFER = "ReplicasDiffer: w isn't the same on rank 0 on a, rank 1 on b, and no majority says which is right"


def ended(rank: int, error: str, own: bool, time: float = 100.0) -> RankObservation:
    return died(rank, 1, time + 0.2, raised=ExitReport(time, error, not own))


def test_the_rank_whose_copy_is_wrong_is_named_with_its_node() -> None:
    (verdict,) = _judge(ended(0, WRONG, False, 99.0), ended(1, WRONG, True), ended(2, WRONG, False))
    assert verdict.kind is VerdictKind.REPLICAS_DIFFER
    assert (verdict.rank, verdict.node, verdict.time) == (1, "10.0.0.1", 100.0)
    assert verdict.detail == "w of rank 1 on b isn't as the other ranks have it"
    assert verdict.evidence == "logs/00001.log"
    both = _judge(ended(0, WRONG, True), ended(1, WRONG, False), ended(2, WRONG, True))
    assert [v.rank for v in both] == [0, 2]
    other = died(2, 1, 100.1, raised=ExitReport(100.0, "ValueError: in the clean-up", False))
    assert [v.rank for v in _judge(ended(1, WRONG, True), other)] == [1], (
        "what else broke then is a consequence"
    )


def test_a_wrong_copy_is_waited_for_while_only_its_peers_have_ended() -> None:
    assert _judge(ended(0, WRONG, False), died(1, None), ended(2, WRONG, False), now=100.5) == []


def test_copies_that_differ_name_no_node_where_nobody_knows_which_is_wrong() -> None:
    for ranks in ([ended(0, DIFFER, True)], [ended(1, DIFFER, True), ended(0, DIFFER, True, 100.1)]):
        (verdict,) = _judge(*ranks, world=2)
        assert (verdict.kind, verdict.rank, verdict.node) == (VerdictKind.REPLICAS_DIFFER, None, None)
        assert verdict.detail == DIFFER.partition(": ")[2] and verdict.evidence


def _raise(error: Exception) -> None:
    raise error


def test_a_chain_that_ends_in_itself_is_judged_too() -> None:
    one, two = ValueError("1"), RuntimeError(GLOO)
    one.__context__, two.__context__ = two, one
    assert exits.blames_peer(one) in (True, False)


def test_the_snapshot_is_all_that_is_looked_at() -> None:
    empty = Snapshot(
        now=0,
        since_start=0,
        world=0,
        ranks={},
        nodes={},
        timeouts=gang(now=0).timeouts,
        first_step_done=False,
    )
    assert death.judge(empty) == []
