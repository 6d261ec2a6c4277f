"""Nodes, hangs, saves and their verdicts, with the clock in hand."""

from __future__ import annotations

import json

import pytest

from faulttol.detect import base, hang, nodes, overdue
from faulttol.detect.snapshot import RankObservation, SavesStatus, Snapshot
from faulttol.recorder import PhaseMark, RankPhase, Record
from faulttol.verdicts import Verdict, VerdictKind
from tests.faulttol.detect.seen import gang, of_records
from tests.faulttol.detect.seen import record as _record

pytestmark = [pytest.mark.unit, pytest.mark.timeout(20)]


# ---- verdicts and detectors ----


@pytest.mark.parametrize("kind", list(VerdictKind))
def test_a_verdict_comes_back_from_json(kind: VerdictKind) -> None:
    verdict = Verdict(kind, "why", rank=3, node="10.0.0.2", time=5.5, evidence="ranks/00003.log")
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


class _Broken:
    name = "broken"

    def judge(self, snapshot: Snapshot) -> list[Verdict]:
        raise KeyError(snapshot.world)


def test_a_detector_that_raises_finds_nothing_and_is_told_of() -> None:
    told: list[str] = []
    dead = gang(RankObservation(0, 1, -9, 100.0), now=200.0)
    found = base.judge_all(dead, told.append, (_Broken(), *base.DETECTORS))
    assert [v.kind for v in found] == [VerdictKind.RANK_EXIT]
    (text,) = told
    assert text.startswith("detector broken failed in test_detect.py:") and text.endswith("KeyError: 1")


def test_the_registry_asks_each_detector() -> None:
    assert [d.name for d in base.DETECTORS] == ["nodes", "death", "hang", "overdue"]
    saves = SavesStatus(501, 200, 100, 0, "", 3)
    stuck = of_records({0: _record(9, 3, 100.0), 1: _record(9, 3, 100.0)})
    whole = gang(*stuck, now=200.0, saves=saves, silent={"10.0.0.1": 60.0})
    kinds = [VerdictKind.NODE_LOST, VerdictKind.HANG, VerdictKind.CHECKPOINT_OVERDUE]
    assert [v.kind for v in base.judge_all(whole)] == kinds


# ---- nodes ----


def _nodes(**more: object) -> list[Verdict]:
    return nodes.judge(gang(*of_records(dict.fromkeys(range(4))), now=1000.0, **more))


def test_a_silent_node_counts_as_lost_past_the_bound() -> None:
    assert _nodes(silent={"10.0.0.1": 0.4, "10.0.0.2": 10.0}) == []
    (verdict,) = _nodes(silent={"10.0.0.1": 0.4, "10.0.0.2": 12.0})
    assert (verdict.kind, verdict.node, verdict.rank) == (VerdictKind.NODE_LOST, "10.0.0.2", 2)
    assert verdict.detail == "no answer from the node's agent for 12 s" and verdict.time == 988.0
    assert [v.node for v in _nodes(silent={"10.0.0.1": 11.0, "10.0.0.2": 12.0})] == ["10.0.0.2", "10.0.0.1"]


def test_a_lost_agent_and_an_unfit_node_are_told_with_their_reason() -> None:
    both = _nodes(lost={"10.0.0.2": "it died"}, unfit={"10.0.0.1": "EIO"}, silent={"10.0.0.2": 99.0})
    assert [(v.kind, v.node, v.rank, v.detail) for v in both] == [
        (VerdictKind.NODE_UNFIT, "10.0.0.1", 0, "EIO"),
        (VerdictKind.AGENT_LOST, "10.0.0.2", 2, "it died"),
    ]


def test_a_refusal_or_the_loss_of_all_is_told_alone() -> None:
    (verdict,) = _nodes(refused="no such folder", lost={"10.0.0.2": "it died"})
    assert (verdict.kind, verdict.detail) == (VerdictKind.USER_ERROR, "no such folder")
    (verdict,) = _nodes(gone="no agent knows the attempt", lost={"10.0.0.2": "it died"})
    assert (verdict.kind, verdict.detail) == (VerdictKind.CLUSTER_LOST, "no agent knows the attempt")


# ---- hang ----


def _judge(
    newest: dict[int, Record | None], now: float, *, started: float = 0.0, stepped: bool = True
) -> list[Verdict]:
    return hang.judge(gang(*of_records(newest), now=now, since_start=now - started, first_step_done=stepped))


def test_work_is_no_hang() -> None:
    """One rank is silent, the others still record: a collective will stop them soon enough."""
    assert _judge({0: _record(9, 3, 100.0), 1: _record(5, 2, 10.0)}, now=129.9) == []


def test_a_hang_names_the_rank_that_is_behind() -> None:
    newest = {rank: _record(90, 7, 100.0, RankPhase.BACKWARD) for rank in range(4)}
    newest[2] = _record(87, 7, 98.0, RankPhase.FORWARD)
    (verdict,) = _judge(dict(newest), now=131.0)
    assert verdict.kind is VerdictKind.HANG and verdict.rank == 2 and verdict.time == 100.0
    assert verdict.detail == "no rank has made progress for 31 s: rank 2 is behind, in forward of step 7"


def test_many_behind_are_counted() -> None:
    newest: dict[int, Record | None] = {rank: _record(9, 3, 100.0) for rank in range(20)}
    newest[20] = _record(10, 3, 100.0)
    (verdict,) = _judge(newest, now=200.0)
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more are behind" in verdict.detail


def test_all_in_one_place() -> None:
    (verdict,) = _judge({0: _record(9, 3, 100.0), 1: _record(9, 3, 101.0)}, now=200.0)
    assert "all ranks are stuck in forward of step 3" in verdict.detail and verdict.rank == 0


def test_a_rank_without_a_record_after_the_first_step_is_no_alarm() -> None:
    assert _judge({0: None, 1: None}, now=1000.0) == []


def test_the_end_of_a_step_is_before_the_save_that_follows_it() -> None:
    """`step(8)` closes step 8, and the save after it is recorded under step 8 too."""
    stuck = _record(21, 8, 100.0, mark=PhaseMark.STEP)
    saving = _record(22, 8, 100.0, RankPhase.CHECKPOINT)
    (verdict,) = _judge({0: saving, 1: stuck}, now=131.0)
    assert verdict.rank == 1 and "after the end of step 8" in verdict.detail


def test_a_rank_after_a_phase_is_told_so() -> None:
    newest = {0: _record(21, 7, 100.0, RankPhase.BACKWARD), 1: _record(20, 7, 100.0, mark=PhaseMark.END)}
    (verdict,) = _judge(dict(newest), now=131.0)
    assert "rank 1 is behind, after forward of step 7" in verdict.detail


def test_a_save_that_gets_on_is_no_hang_however_long() -> None:
    saving: dict[int, Record | None] = {rank: _record(9, 3, 100.0, RankPhase.CHECKPOINT) for rank in range(2)}
    renewed = saving | {1: _record(9, 3, 5000.0, RankPhase.CHECKPOINT)}
    assert _judge(renewed, now=5029.0) == [], "one rank still writes"
    assert _judge(renewed, now=5000.0 + 30.0 * hang.SAVE_FACTOR) == [], "its fsync takes long"
    assert _judge(renewed, now=5001.0 + 30.0 * hang.SAVE_FACTOR)


def test_the_culprit_in_a_save_is_the_rank_that_stopped_getting_on() -> None:
    saving = {rank: _record(9, 3, 400.0 + rank, RankPhase.CHECKPOINT) for rank in range(4)}
    saving[2] = _record(9, 3, 250.0, RankPhase.CHECKPOINT)
    (verdict,) = _judge(dict(saving), now=530.0)
    assert verdict.rank == 2 and "rank 2 is behind, in checkpoint of step 3" in verdict.detail
    assert verdict.detail.startswith("no rank has made progress for 127 s")


def test_ranks_that_stop_together_in_a_save_all_stand_there() -> None:
    (verdict,) = _judge(
        {rank: _record(9, 3, 100.0 + rank, RankPhase.CHECKPOINT) for rank in range(4)}, now=999.0
    )
    assert "all ranks are stuck in checkpoint of step 3" in verdict.detail


def test_a_rank_that_waits_for_the_save_of_another_is_not_behind() -> None:
    """It begins to wait once its own part is done, which is one record more."""
    waiting = _record(10, 4, 300.0, RankPhase.COLLECTIVE)
    newest: dict[int, Record | None] = {0: waiting, 1: _record(9, 3, 350.0, RankPhase.CHECKPOINT), 2: waiting}
    assert _judge(newest, now=469.0) == []
    (verdict,) = _judge(newest, now=471.0)
    assert verdict.rank == 1 and "rank 1 is behind, in checkpoint" in verdict.detail


def test_the_rank_that_commits_is_not_told_from_its_later_record() -> None:
    """Rank 0 has waited like the others, and then begins to commit: it has one record more, and still they wait for it."""
    waiting = _record(10, 4, 300.0, RankPhase.COLLECTIVE)
    newest: dict[int, Record | None] = {
        0: _record(11, 4, 350.0, RankPhase.CHECKPOINT),
        1: waiting,
        2: waiting,
    }
    assert _judge(newest, now=469.0) == []
    (verdict,) = _judge(newest, now=471.0)
    assert verdict.rank == 0


def test_a_rank_that_never_came_to_the_save_has_no_exemption() -> None:
    newest: dict[int, Record | None] = {
        0: _record(9, 3, 100.0, RankPhase.CHECKPOINT),
        1: _record(8, 3, 100.0),
    }
    (verdict,) = _judge(newest, now=131.0)
    assert verdict.rank == 1


def test_the_end_of_a_save_has_no_exemption() -> None:
    newest: dict[int, Record | None] = {0: _record(9, 3, 100.0, RankPhase.CHECKPOINT, PhaseMark.END)}
    assert len(_judge(newest, now=131.0)) == 1


def test_before_the_first_step_the_start_timeout_holds() -> None:
    newest: dict[int, Record | None] = {0: _record(1, 0, 2.0, RankPhase.START), 1: None, 2: None}
    assert _judge(newest, now=190.0, started=10.0, stepped=False) == []
    (verdict,) = _judge(newest, now=191.0, started=10.0, stepped=False)
    assert verdict.kind is VerdictKind.START_TIMEOUT and verdict.rank == 1
    assert verdict.detail == "no step was finished in 181 s: ranks 1, 2 recorded nothing"


def test_of_several_ranks_behind_before_the_first_step_the_first_is_named() -> None:
    newest: dict[int, Record | None] = {
        0: _record(5, 1, 9.0), 1: _record(2, 1, 8.0), 2: _record(2, 1, 8.0), 3: _record(5, 1, 9.0)
    }  # fmt: skip
    (verdict,) = _judge(newest, now=191.0, stepped=False)
    assert verdict.rank == 1 and "ranks 1, 2 are behind" in verdict.detail


def test_preparing_data_may_take_longer_than_a_start() -> None:
    preparing: dict[int, Record | None] = {rank: _record(1, 0, 1.0, RankPhase.DATA) for rank in range(2)}
    assert _judge(preparing, now=180.0 * hang.PREPARE_FACTOR, stepped=False) == []
    assert _judge(preparing, now=181.0 * hang.PREPARE_FACTOR, stepped=False)
    assert _judge(preparing | {1: _record(2, 0, 5.0, RankPhase.START)}, now=181.0, stepped=False)
    assert _judge(preparing | {1: None}, now=181.0, stepped=False)


def test_a_load_that_gets_on_may_take_longer_than_a_start() -> None:
    loading: dict[int, Record | None] = {rank: _record(2, 0, 390.0, RankPhase.START) for rank in range(2)}
    assert _judge(loading, now=420.0, stepped=False) == []
    assert _judge(loading, now=421.0, stepped=False)
    assert _judge(loading | {0: _record(3, 0, 400.0, RankPhase.CHECKPOINT)}, now=429.0, stepped=False) == []
    stepping: dict[int, Record | None] = {rank: _record(5, 0, 399.0) for rank in range(2)}
    assert _judge(stepping, now=400.0, stepped=False), "a first step has no end of its own"


def test_a_start_that_all_entered_names_where_they_stand() -> None:
    newest: dict[int, Record | None] = {0: _record(4, 0, 2.0), 1: _record(1, 0, 2.0, RankPhase.START)}
    (verdict,) = _judge(newest, now=191.0, stepped=False)
    assert verdict.rank == 1 and "rank 1 is behind, in start" in verdict.detail


# ---- saves ----


def _overdue(step: int, saved: int, interval: int = 100, failing: int = 0, error: str = "") -> list[Verdict]:
    return overdue.judge(gang(now=0.0, saves=SavesStatus(step, saved, interval, failing, error, 3)))


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
    assert overdue.failed_saves(1) == "1 save failed" and overdue.failed_saves(2) == "2 saves failed"
