"""The rank that the others wait for, by communicators, and hangs that are named early on evidence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from configs.timeouts import Timeouts
from faulttol.detect import culprit, hang
from faulttol.detect.snapshot import GroupStatus, RankObservation
from faulttol.recorder import PhaseMark, RankPhase
from faulttol.verdicts import Verdict, VerdictKind
from tests.faulttol.detect.seen import gang, record

pytestmark = [pytest.mark.unit, pytest.mark.timeout(20)]

NOW = 112.0
"""Twelve seconds after the last record of all."""


def _rank(rank: int, *groups: tuple[str, int], sequence: int = 9, **more: Any) -> RankObservation:
    """A silent rank in the forward of step 3, with what it has entered of its groups."""
    seen = tuple(GroupStatus(name, (), entered, entered) for name, entered in groups)
    newest = more.pop("newest", record(sequence, 3, 100.0))
    return RankObservation(rank, 1000 + rank, newest=newest, groups=seen, **more)


def _waited(*ranks: RankObservation) -> culprit.Culprit:
    return culprit.blocking_ranks({rank.rank: rank for rank in ranks})


def _judge(*ranks: RankObservation, now: float = NOW, **more: Any) -> list[Verdict]:
    return hang.judge(gang(*ranks, now=now, **more))


# ---- the graph ----


def test_the_rank_that_has_not_entered_is_waited_for() -> None:
    found = _waited(
        _rank(0, ("world", 8)), _rank(1, ("world", 7)), _rank(2, ("world", 8), waits="all_reduce")
    )
    assert found.ranks == [1]
    assert found.reason == ": 2 ranks wait for it in collective 8 of world (all_reduce)"


def test_a_chain_of_groups_leads_to_the_one_that_waits_for_nobody() -> None:
    """0 and 1 share `a`, 1 and 2 share `b`: 0 waits for 1, which waits for 2. Records say the opposite."""
    ranks = (
        _rank(0, ("a", 5), sequence=1),
        _rank(1, ("a", 4), ("b", 9), sequence=2),
        _rank(2, ("b", 8), sequence=3),
    )
    assert _waited(*ranks).ranks == [2]


def test_of_several_the_one_outside_of_any_call_is_waited_for() -> None:
    """A pipeline: rank 1 waits in a receive, which communicators don't count, for rank 3; 0 and 2 wait for both."""
    ranks = (
        _rank(0, ("dp.0", 3), waits="all_reduce"), _rank(1, ("dp.0", 2), waits="recv"),
        _rank(2, ("dp.1", 3), waits="all_reduce"), _rank(3, ("dp.1", 2)),
    )  # fmt: skip
    assert _waited(*ranks).ranks == [3]
    assert _waited(*[replace(rank, groups=()) for rank in ranks]).ranks == [3]


def test_ranks_that_wait_for_each_other_are_a_ring() -> None:
    found = _waited(_rank(0, ("a", 5), ("b", 3)), _rank(1, ("a", 4), ("b", 4)))
    assert found.cycle and found.ranks == [0, 1]
    (verdict,) = _judge(_rank(0, ("a", 5), ("b", 3)), _rank(1, ("a", 4), ("b", 4)), now=131.0)
    told = "ranks 0, 1 wait for each other; each has entered a collective that another hasn't"
    assert verdict.detail == f"no rank has made progress for 31 s: {told}"


def test_without_signs_records_tell() -> None:
    assert _waited(_rank(0), _rank(1, sequence=8)).ranks == [1]


def test_a_stopped_process_is_waited_for_wherever_it_stands() -> None:
    stopped = _rank(0, ("world", 8), held_since=100.0, held="stopped (state T)", waits="all_reduce")
    found = _waited(stopped, _rank(1, ("world", 7)))
    assert found.ranks == [0] and found.reason == ", stopped (state T)"


# ---- early, on evidence ----

WAITS = {"waits": "all_reduce"}
ASLEEP: dict[str, Any] = {"asleep_since": 103.0, "held": "asleep in clock_nanosleep"}


def test_a_stopped_rank_is_named_after_a_fifth_of_the_patience() -> None:
    stopped = _rank(1, state="T", held_since=100.5, held="stopped (state T)")
    assert _judge(_rank(0, **WAITS), stopped, now=105.9) == []
    (verdict,) = _judge(_rank(0, **WAITS), stopped, now=106.1)
    assert verdict.kind is VerdictKind.HANG and (verdict.rank, verdict.time) == (1, 100.0)
    where = "in forward of step 3"
    assert verdict.detail == (
        f"rank 1 is stopped (state T), {where}, and no rank has made progress for 6 s: the others wait for it"
    )
    assert verdict.node == "10.0.0.2" and verdict.evidence == "logs/00001.log"


def test_a_sleeper_is_named_after_a_quarter() -> None:
    ranks = _rank(0, **WAITS), _rank(1, **ASLEEP)
    assert _judge(*ranks, now=107.4) == []
    assert [v.rank for v in _judge(*ranks, now=107.6)] == [1]


def test_what_a_silent_node_last_told_is_no_evidence() -> None:
    stopped = _rank(1, held_since=101.0, held="stopped (state T)")
    assert len(_judge(_rank(0), stopped, silent={"10.0.0.2": 2.0})) == 1
    assert _judge(_rank(0), stopped, silent={"10.0.0.2": 4.0}) == []


@pytest.mark.parametrize(
    "phase", [RankPhase.CHECKPOINT, RankPhase.LOAD, RankPhase.RENDEZVOUS, RankPhase.DATA, RankPhase.BUILD]
)
@pytest.mark.parametrize("stepped", [True, False])
def test_it_is_named_in_every_phase(phase: RankPhase, stepped: bool) -> None:
    stopped = _rank(1, held_since=101.0, held="stopped (state T)", newest=record(3, 0, 100.0, phase))
    (verdict,) = _judge(_rank(0), stopped, first_step_done=stepped)
    assert verdict.kind is VerdictKind.HANG and verdict.rank == 1
    asleep = _rank(1, newest=record(3, 0, 100.0, phase), **ASLEEP)
    (verdict,) = _judge(_rank(0, **WAITS), asleep, first_step_done=stepped)
    assert verdict.kind is VerdictKind.HANG and verdict.rank == 1


def test_a_rank_that_was_stopped_just_now_is_not_named() -> None:
    assert _judge(_rank(0), _rank(1, held_since=NOW - 2.0, held="stopped (state T)")) == []


def test_while_another_rank_gets_on_nothing_is_said() -> None:
    stopped = _rank(1, held_since=90.0, held="stopped (state T)")
    assert _judge(_rank(0, newest=record(9, 3, 107.0)), stopped) == []


def test_a_sleeper_is_named_where_all_the_others_wait() -> None:
    (verdict,) = _judge(_rank(0, **WAITS), _rank(1, **ASLEEP), _rank(2, **WAITS))
    assert verdict.rank == 1 and verdict.detail.startswith(
        "rank 1 is asleep in clock_nanosleep, in forward of step 3"
    )


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({}, id="works"),
        pytest.param({"state": "D"}, id="waits for a file"),
        pytest.param({"state": "R"}, id="compiles"),
        pytest.param(
            {"waits": "", "asleep_since": None, "newest": record(9, 3, 100.0, RankPhase.DATA)},
            id="reads data",
        ),
    ],
)
def test_while_one_rank_may_come_back_no_sleeper_is_named(other: dict[str, Any]) -> None:
    assert _judge(_rank(0, **WAITS), _rank(1, **ASLEEP), _rank(2, **other)) == []
    assert _judge(_rank(0, **WAITS), _rank(1, **ASLEEP), world=3) == [], "a rank that has told nothing"


def test_all_asleep_is_a_pause_of_all() -> None:
    """As between two tries of the last save."""
    assert _judge(_rank(0, **ASLEEP), _rank(1, **ASLEEP)) == []


def test_a_sleeper_must_have_slept_for_long() -> None:
    assert _judge(_rank(0, **WAITS), _rank(1, asleep_since=NOW - 3.0, held="asleep")) == []


def test_a_sleeper_that_waits_for_another_by_its_group_is_not_named() -> None:
    """Rank 0 stands in a collective in a way that it doesn't tell of."""
    ranks = _rank(0, ("a", 5), **ASLEEP), _rank(1, ("a", 4), **ASLEEP)
    (verdict,) = _judge(*ranks)
    assert verdict.rank == 1


def test_of_two_sleepers_the_one_behind_comes_first() -> None:
    ranks = _rank(0, sequence=10, **ASLEEP), _rank(1, sequence=8, **ASLEEP), _rank(2, **WAITS)
    (verdict,) = _judge(*ranks)
    assert verdict.rank == 1 and "; so is rank 0" in verdict.detail


def test_ranks_that_wait_for_a_save_wait_by_their_record() -> None:
    waiting = record(10, 3, 100.0, RankPhase.COLLECTIVE)
    saving = _rank(1, newest=record(9, 3, 100.0, RankPhase.CHECKPOINT), **ASLEEP)
    (verdict,) = _judge(_rank(0, newest=waiting), saving)
    assert verdict.rank == 1 and "in checkpoint of step 3" in verdict.detail
    over = replace(waiting, mark=PhaseMark.END)
    assert _judge(_rank(0, newest=over), saving) == []


def test_a_device_waits_for_a_sleeper_whose_collective_it_has_entered() -> None:
    sleeper = _rank(1, ("dp", 4), **ASLEEP)
    (verdict,) = _judge(_rank(0, ("dp", 9), waits="device", state="R"), sleeper)
    assert verdict.rank == 1
    assert _judge(_rank(0, ("dp", 4), waits="device", state="R"), sleeper) == [], "it computes"
    assert _judge(_rank(0, ("dp", 9), state="R"), sleeper) == [], "its host works"


def test_a_rank_that_left_with_code_0_is_waited_for() -> None:
    left = RankObservation(1, 1001, 0, 100.0)
    (verdict,) = _judge(_rank(0, **WAITS), left)
    assert verdict.rank == 1 and verdict.kind is VerdictKind.RANK_EXIT
    assert (
        verdict.detail
        == "rank 1 ended with code 0, and no rank has made progress for 12 s: the others wait for it"
    )
    assert _judge(_rank(0), left) == []


def test_a_dead_rank_makes_no_hang_of_its_peers() -> None:
    assert _judge(_rank(0, **WAITS), RankObservation(1, 1001, -9, 100.0), now=500.0) == []
    assert _judge(_rank(0), _rank(1), now=131.0, refused="no") == []


def test_the_early_bound_follows_the_patience() -> None:
    stopped = _rank(1, held_since=100.0, held="stopped (state T)")
    long = Timeouts(patience=300.0)
    assert _judge(_rank(0), stopped, now=159.0, timeouts=long) == []
    assert len(_judge(_rank(0), stopped, now=161.0, timeouts=long)) == 1
    short = Timeouts(patience=6.0)
    assert _judge(_rank(0), stopped, now=104.5, timeouts=short) == []
    assert len(_judge(_rank(0), stopped, now=105.5, timeouts=short)) == 1


def test_before_the_first_record_nothing_is_named_early() -> None:
    nothing = [RankObservation(rank, rank, held_since=1.0, held="stopped (state T)") for rank in range(2)]
    assert _judge(*nothing, now=100.0, first_step_done=False) == []
