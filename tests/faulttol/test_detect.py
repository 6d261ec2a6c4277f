"""Deaths, hangs and their verdicts, with the clock in hand."""

from __future__ import annotations

import json
import signal

import pytest

from configs.timeouts import Timeouts
from faulttol.detect import death, hang, overdue
from faulttol.detect.death import Exit
from faulttol.detect.overdue import Saves
from faulttol.recorder import Mark, Phase, Record
from faulttol.verdicts import Verdict, VerdictKind

pytestmark = [pytest.mark.unit, pytest.mark.timeout(20)]

GLOO = (
    "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:28372: Connection reset by peer. "
    "This is typically caused by a remote worker hanging or bugs in the application."
)


def _exit(rank: int, code: int, time: float = 100.0, words: str = "") -> Exit:
    return Exit(rank, "10.0.0.1", code, time, words)


def _culprits(*exits: Exit) -> list[int | None]:
    return [verdict.rank for verdict in death.judge(exits, evidence=lambda rank: f"{rank}.log")]


# ---- verdicts ----


@pytest.mark.parametrize("kind", list(VerdictKind))
def test_a_verdict_comes_back_from_json(kind: VerdictKind) -> None:
    verdict = Verdict(kind, "why", rank=3, node="10.0.0.2", time=5.5, evidence="ranks/00003.log")
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


# ---- death ----


def test_nobody_died() -> None:
    assert _culprits() == [] and _culprits(_exit(0, 0), _exit(1, 0)) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGTERM])
def test_a_signal_is_named(number: signal.Signals) -> None:
    (verdict,) = death.judge([_exit(2, -number)], evidence=lambda rank: f"ranks/{rank}.log")
    assert verdict.kind is VerdictKind.RANK_EXIT and verdict.detail == f"rank 2 was killed by {number.name}"
    assert (verdict.rank, verdict.node, verdict.time) == (2, "10.0.0.1", 100.0)
    assert verdict.evidence == "ranks/2.log"


def test_a_signal_without_a_name_has_its_number() -> None:
    (verdict,) = death.judge([_exit(0, -200)], evidence=str)
    assert "signal 200" in verdict.detail


def test_an_exit_tells_the_last_words() -> None:
    (verdict,) = death.judge([_exit(1, 1, words="ValueError: too bad")], evidence=str)
    assert verdict.detail == "rank 1 exited with code 1: ValueError: too bad"


def test_the_killed_rank_is_the_cause_and_its_peers_the_consequence() -> None:
    peers = [_exit(rank, 1, 100.4, GLOO) for rank in (0, 2, 3)]
    assert _culprits(*peers, _exit(1, -9, 100.3)) == [1]


def test_a_kill_beats_exits_that_were_seen_a_moment_before() -> None:
    """Agents are asked in turn, so a peer's exit may be seen before the death that caused it."""
    assert _culprits(_exit(0, 1, 100.0, GLOO), _exit(1, -9, 101.0)) == [1]


def test_a_kill_long_after_is_no_cause() -> None:
    assert _culprits(_exit(0, 1, 100.0, "ValueError: mine"), _exit(1, -9, 130.0)) == [0]


@pytest.mark.parametrize(
    "words",
    [
        GLOO,
        "RuntimeError: Connection closed by peer [10.0.0.2]:4433",
        "torch.distributed.DistNetworkError: Broken pipe",
        "DistStoreError: Failed to recv, got 0 bytes. Connection was likely closed. Did the server shut down?",
        "DistBackendError: NCCL error: remote process exited or there was a network error",
    ],
)
def test_an_error_of_ones_own_beats_the_loss_of_a_peer(words: str) -> None:
    assert _culprits(_exit(0, 1, 100.0, words), _exit(1, 1, 100.9, "ValueError: mine")) == [1]


def test_when_all_lost_their_peers_all_are_named() -> None:
    assert _culprits(_exit(1, 1, 100.2, GLOO), _exit(0, 1, 100.1, GLOO)) == [0, 1]


def test_an_abort_by_the_watchdog_is_no_kill() -> None:
    watchdog = _exit(
        0, -signal.SIGABRT, 100.0, "NCCL error: remote process exited or there was a network error"
    )
    assert _culprits(watchdog, _exit(3, -9, 101.0)) == [3]
    assert _culprits(watchdog, _exit(3, 1, 101.0, "ValueError: mine")) == [3]


def test_two_killed_at_once_are_both_named_in_order() -> None:
    assert _culprits(_exit(5, -9, 100.5), _exit(4, -9, 100.2), _exit(0, 1, 100.6, GLOO)) == [4, 5]


def test_a_user_error_explains_everything() -> None:
    exits = [_exit(0, 1, 99.0, GLOO), _exit(1, 2, 100.0, "megaray: data.path='x' does not exist")]
    (verdict,) = death.judge(exits, evidence=str)
    assert verdict.kind is VerdictKind.USER_ERROR and verdict.detail == "data.path='x' does not exist"
    assert verdict.rank == 1


def test_a_user_error_without_words_still_says_something() -> None:
    (verdict,) = death.judge([_exit(1, 2)], evidence=str)
    assert verdict.detail


# ---- hang ----

TIMEOUTS = Timeouts(patience=30.0)  # hang 30, start 180


def _record(
    sequence: int, step: int, time: float, phase: Phase = Phase.FORWARD, mark: Mark = Mark.BEGIN
) -> Record:
    return Record(sequence, time, mark, phase, step)


def _judge(
    newest: dict[int, Record | None], now: float, *, started: float = 0.0, stepped: bool = True
) -> list[Verdict]:
    return hang.judge(newest, now=now, started=started, timeouts=TIMEOUTS, first_step_done=stepped)


def test_work_is_no_hang() -> None:
    """One rank is silent, the others still record: a collective will stop them soon enough."""
    assert _judge({0: _record(9, 3, 100.0), 1: _record(5, 2, 10.0)}, now=129.9) == []


def test_a_hang_names_the_rank_that_is_behind() -> None:
    newest = {rank: _record(90, 7, 100.0, Phase.BACKWARD) for rank in range(4)}
    newest[2] = _record(87, 7, 98.0, Phase.FORWARD)
    (verdict,) = _judge(dict(newest), now=131.0)
    assert verdict.kind is VerdictKind.HANG and verdict.rank == 2 and verdict.time == 100.0
    assert verdict.detail == "no rank made a record for 31 s: rank 2 is behind, in forward of step 7"


def test_many_behind_are_counted() -> None:
    newest: dict[int, Record | None] = {rank: _record(9, 3, 100.0) for rank in range(20)}
    newest[20] = _record(10, 3, 100.0)
    (verdict,) = _judge(newest, now=200.0)
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more are behind" in verdict.detail


def test_all_in_one_place() -> None:
    (verdict,) = _judge({0: _record(9, 3, 100.0), 1: _record(9, 3, 101.0)}, now=200.0)
    assert "all ranks stand in forward of step 3" in verdict.detail and verdict.rank == 0


def test_a_rank_without_a_record_after_the_first_step_is_no_alarm() -> None:
    assert _judge({0: None, 1: None}, now=1000.0) == []


def test_the_end_of_a_step_is_before_the_save_that_follows_it() -> None:
    """`step(8)` closes step index 7, and the save after it is recorded under index 7 too."""
    stuck = _record(21, 8, 100.0, mark=Mark.STEP)
    saving = _record(22, 7, 100.0, Phase.CHECKPOINT)
    (verdict,) = _judge({0: saving, 1: stuck}, now=131.0)
    assert verdict.rank == 1 and "after the end of step 8" in verdict.detail


def test_a_rank_after_a_phase_is_told_so() -> None:
    newest = {0: _record(21, 7, 100.0, Phase.BACKWARD), 1: _record(20, 7, 100.0, mark=Mark.END)}
    (verdict,) = _judge(dict(newest), now=131.0)
    assert "rank 1 is behind, after forward of step 7" in verdict.detail


def test_a_save_that_gets_on_is_no_hang_however_long() -> None:
    saving: dict[int, Record | None] = {rank: _record(9, 3, 100.0, Phase.CHECKPOINT) for rank in range(2)}
    renewed = saving | {1: _record(9, 3, 5000.0, Phase.CHECKPOINT)}
    assert _judge(renewed, now=5029.0) == [], "one rank still writes"
    assert _judge(renewed, now=5000.0 + 30.0 * hang.SAVE_FACTOR) == [], "its fsync takes long"
    assert _judge(renewed, now=5001.0 + 30.0 * hang.SAVE_FACTOR)


def test_the_culprit_in_a_save_is_the_rank_that_stopped_getting_on() -> None:
    saving = {rank: _record(9, 3, 400.0 + rank, Phase.CHECKPOINT) for rank in range(4)}
    saving[2] = _record(9, 3, 250.0, Phase.CHECKPOINT)
    (verdict,) = _judge(dict(saving), now=530.0)
    assert verdict.rank == 2 and "rank 2 is behind, in checkpoint of step 3" in verdict.detail
    assert verdict.detail.startswith("no rank made a record for 127 s")


def test_ranks_that_stop_together_in_a_save_all_stand_there() -> None:
    (verdict,) = _judge({rank: _record(9, 3, 100.0 + rank, Phase.CHECKPOINT) for rank in range(4)}, now=999.0)
    assert "all ranks stand in checkpoint of step 3" in verdict.detail


def test_a_rank_that_waits_for_the_save_of_another_is_not_behind() -> None:
    """It begins to wait once its own part is done, which is one record more."""
    waiting = _record(10, 4, 300.0, Phase.COLLECTIVE)
    newest: dict[int, Record | None] = {0: waiting, 1: _record(9, 3, 350.0, Phase.CHECKPOINT), 2: waiting}
    assert _judge(newest, now=469.0) == []
    (verdict,) = _judge(newest, now=471.0)
    assert verdict.rank == 1 and "rank 1 is behind, in checkpoint" in verdict.detail


def test_a_rank_that_never_came_to_the_save_has_no_exemption() -> None:
    newest: dict[int, Record | None] = {0: _record(9, 3, 100.0, Phase.CHECKPOINT), 1: _record(8, 3, 100.0)}
    (verdict,) = _judge(newest, now=131.0)
    assert verdict.rank == 1


def test_the_end_of_a_save_has_no_exemption() -> None:
    newest: dict[int, Record | None] = {0: _record(9, 3, 100.0, Phase.CHECKPOINT, Mark.END)}
    assert len(_judge(newest, now=131.0)) == 1


def test_before_the_first_step_the_start_timeout_holds() -> None:
    newest: dict[int, Record | None] = {0: _record(1, 0, 2.0, Phase.START), 1: None, 2: None}
    assert _judge(newest, now=190.0, started=10.0, stepped=False) == []
    (verdict,) = _judge(newest, now=191.0, started=10.0, stepped=False)
    assert verdict.kind is VerdictKind.START_TIMEOUT and verdict.rank == 1
    assert verdict.detail == "no step was finished in 181 s: ranks 1, 2 made no record"


def test_preparing_data_may_take_longer_than_a_start() -> None:
    preparing: dict[int, Record | None] = {rank: _record(1, 0, 1.0, Phase.DATA) for rank in range(2)}
    assert _judge(preparing, now=180.0 * hang.PREPARE_FACTOR, stepped=False) == []
    assert _judge(preparing, now=181.0 * hang.PREPARE_FACTOR, stepped=False)
    assert _judge(preparing | {1: _record(2, 0, 5.0, Phase.START)}, now=181.0, stepped=False)
    assert _judge(preparing | {1: None}, now=181.0, stepped=False)


def test_a_load_that_gets_on_may_take_longer_than_a_start() -> None:
    loading: dict[int, Record | None] = {rank: _record(2, 0, 390.0, Phase.START) for rank in range(2)}
    assert _judge(loading, now=420.0, stepped=False) == []
    assert _judge(loading, now=421.0, stepped=False)
    assert _judge(loading | {0: _record(3, 0, 400.0, Phase.CHECKPOINT)}, now=429.0, stepped=False) == []
    stepping: dict[int, Record | None] = {rank: _record(5, 0, 399.0) for rank in range(2)}
    assert _judge(stepping, now=400.0, stepped=False), "a first step has no end of its own"


def test_a_start_that_all_entered_names_where_they_stand() -> None:
    newest: dict[int, Record | None] = {0: _record(4, 0, 2.0), 1: _record(1, 0, 2.0, Phase.START)}
    (verdict,) = _judge(newest, now=191.0, stepped=False)
    assert verdict.rank == 1 and "rank 1 is behind, in start of step 0" in verdict.detail


# ---- saves ----


def _overdue(step: int, saved: int, interval: int = 100, failing: int = 0, error: str = "") -> list[Verdict]:
    return overdue.judge(Saves(step, saved, interval, failing, error), max_failed=3)


def test_failed_saves_are_a_verdict_from_the_bound_on() -> None:
    assert _overdue(290, 200, failing=2, error="No space left") == []
    for failing in (3, 4):
        (verdict,) = _overdue(290, 200, failing=failing, error="rank 3: No space left")
        assert verdict.kind is VerdictKind.CHECKPOINT_OVERDUE and verdict.rank is None
        assert verdict.detail == f"{failing} saves failed since step 200: rank 3: No space left"


def test_steps_without_a_commit_are_a_verdict_without_a_failure() -> None:
    assert _overdue(500, 200) == [] and _overdue(50, 50) == []
    (verdict,) = _overdue(501, 200)
    assert verdict.detail == "nothing was saved for 301 steps, since step 200, where a save is due every 100"
    (verdict,) = _overdue(501, 200, failing=1, error="no answer")
    assert verdict.detail.endswith("every 100: no answer")


def test_failures_are_counted_in_words() -> None:
    assert overdue.failed(1) == "1 save failed" and overdue.failed(2) == "2 saves failed"
