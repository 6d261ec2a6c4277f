"""Where each second of a step goes: from the rings of ranks to what their node keeps."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from faulttol import recorder, steady_clock
from faulttol.recorder import RankPhase, Recorder
from faulttol.timeline import rings, trace
from faulttol.timeline.reader import AttemptSteps
from faulttol.timeline.steps import FIELDS, RankSteps, StepRows
from faulttol.timeline.store import StepStore
from faulttol.timeline.trace import CollectiveCall, Op, TraceWriter, WaitLane
from tests.conftest import descriptors
from tests.faulttol.timeline.made_rings import MS, Did, MadeRank, gang

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

PRECISION = 3e-4


def _steps(made: MadeRank) -> RankSteps:
    return RankSteps(made.files.ring, trace.trace_of(made.files))


def _seconds(rows: StepRows | None, field: str) -> list[float]:
    assert rows is not None
    return [round(value, 6) for value in rows.seconds[FIELDS.index(field)].tolist()]


# ---- rings and traces ----


def test_the_ring_reads_as_the_recorder_reads_it(tmp_path: Path) -> None:
    ring = Recorder(tmp_path / "r", rank=0, capacity=16)
    for step in range(9):
        ring.begin(RankPhase.DATA, step)
        ring.end(RankPhase.DATA, step)
        ring.step(step)
    for after in (0, 14, 20, 27):
        mine, theirs = rings.read(tmp_path / "r", after), recorder.read(tmp_path / "r", after)
        assert [(r["sequence"], r["mark"], r["phase"], r["step"]) for r in mine] == [
            (r.sequence, r.mark, r.phase, r.step) for r in theirs
        ]
        assert [steady_clock.from_monotonic_ns(int(r["ns"])) for r in mine] == [r.time for r in theirs]
    assert len(rings.read(tmp_path / "none")) == 0
    (tmp_path / "odd").write_bytes(b"x" * 5000)
    assert len(rings.read(tmp_path / "odd")) == 0


@pytest.mark.parametrize("word", range(4))
def test_a_torn_record_of_the_ring_is_left_out(tmp_path: Path, word: int) -> None:
    ring = Recorder(tmp_path / "r", rank=0, capacity=4)
    for step in range(4):
        ring.begin(RankPhase.DATA, step)
    ring.close()
    data = bytearray((tmp_path / "r").read_bytes())
    data[64 + 32 + 8 * word] ^= 1
    (tmp_path / "r").write_bytes(data)
    assert rings.read(tmp_path / "r")["sequence"].tolist() == [1, 3, 4]


def test_the_trace_wraps_and_names_what_is_lost(tmp_path: Path) -> None:
    made = TraceWriter(tmp_path / "t", 3, capacity=8)
    for count in range(21):
        made.write(
            CollectiveCall(Op.SEND, count, 9, count, 2, 10 * count), count + 1, count + 3, WaitLane.MAIN
        )
    found = trace.read(tmp_path / "t")
    assert found.records["sequence"].tolist() == list(range(14, 22))
    assert found.records["count"].tolist() == list(range(13, 21)) and set(found.records["peer"]) == {2}
    assert found.records["total"].tolist() == [2 * n for n in range(14, 22)]
    assert trace.read(tmp_path / "t", 19).records["sequence"].tolist() == [20, 21]
    assert trace.read(tmp_path / "t", 21).there and not trace.read(tmp_path / "none").there
    data = bytearray((tmp_path / "t").read_bytes())
    data[8 * 16 + 8 * 12 * 4 + 16] ^= 4  # the begin of the record in the fifth slot
    (tmp_path / "t").write_bytes(data)
    assert 21 not in trace.read(tmp_path / "t").records["sequence"].tolist()


def test_the_total_counts_what_held_the_step_up_and_each_wait_once(tmp_path: Path) -> None:
    made = TraceWriter(tmp_path / "t", 0, capacity=8)
    call = CollectiveCall(Op.SEND, 0, 9, 0, 2, 1)
    made.write(call, 10, 15, WaitLane.MAIN)
    made.write(call, 10, 15, WaitLane.MAIN, trace.BATCHED)
    made.write(call, 20, 90, WaitLane.BESIDE)
    made.write(call, 20, 21, WaitLane.AUTOGRAD, device=(30, 37))
    assert trace.read(tmp_path / "t").records["total"].tolist() == [5, 5, 5, 12]


def test_records_lost_within_a_step_leave_its_parts_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeRank(tmp_path, 0, monkeypatch, capacity=24)
    steps = _steps(made)
    made.started()
    made.step(0)
    made.phase(RankPhase.DATA, 1, 2)
    steps.gather()
    for _ in range(40):
        made.phase(RankPhase.FORWARD, 1, 1)
    made.step(2)
    made.phase(RankPhase.DATA, 3, 1)
    rows = steps.gather()
    assert rows is not None and (rows.first, rows.count) == (1, 2)
    assert rows.seconds[0] == pytest.approx([0.042, 0.027])
    assert np.isnan(rows.seconds[1:, 0]).all() and not np.isnan(rows.seconds[1:, 1]).any()


def test_the_trace_tells_the_wait_that_never_ends(tmp_path: Path) -> None:
    made = TraceWriter(tmp_path / "t", 0, capacity=8)
    assert trace.read(tmp_path / "t").waiting is None
    made.begin_wait(CollectiveCall(Op.RECEIVE, 5, 77, 4, 3, 0), 6)
    assert trace.read(tmp_path / "t").waiting == trace.OngoingWait(6, Op.RECEIVE, 77, 4, 3)
    made.begin_wait(CollectiveCall(Op.ALL_REDUCE, 5, 77, 4, -1, 0), 6)
    found = trace.read(tmp_path / "t").waiting
    assert found is not None and found.peer == -1
    made.end_wait()
    assert trace.read(tmp_path / "t").waiting is None


# ---- a rank's steps ----


def test_the_seconds_of_a_step_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeRank(tmp_path, 0, monkeypatch)
    made.started()
    did = [Did(), Did(data=30, compute=7, wait=11), Did(save=40, wait=3), Did(beside=500)]
    for number, one in enumerate(did):
        made.step(number, one)
    made.phase(RankPhase.DATA, 4, 1)
    rows = _steps(made).gather()
    assert rows is not None and rows.first == 0 and rows.count == 4
    for field in ("data", "compute", "wait", "save"):
        assert _seconds(rows, field) == [getattr(one, field) / 1e3 for one in did], field
    assert _seconds(rows, "step") == [(o.data + o.compute + o.wait + o.save) / 1e3 for o in did]


def test_steps_are_found_bit_by_bit_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeRank(tmp_path, 0, monkeypatch)
    steps = _steps(made)
    assert steps.gather() is None
    made.started()
    assert steps.gather() is None
    told = []
    for number in range(7):
        made.step(number, Did(compute=10 + number, save=4 * (number % 3 == 2)))
        found = steps.gather()
        if found is not None:
            told += [(found.first + i, value) for i, value in enumerate(_seconds(found, "compute"))]
    last = steps.finish()
    assert last is not None and last.first == 6 and _seconds(last, "compute") == [0.016]
    assert told == [(n, (10 + n) / 1e3) for n in range(6)]
    assert steps.finish() is None


def test_a_resumed_attempt_begins_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeRank(tmp_path, 0, monkeypatch)
    made.started()
    for number in (500, 501, 502):
        made.step(number)
    rows = _steps(made).gather()
    assert rows is not None and rows.first == 500 and rows.count == 2


def test_without_a_trace_waits_are_unknown_and_the_rest_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeRank(tmp_path, 0, monkeypatch)
    made.started()
    for number in range(3):
        made.step(number)
    trace.trace_of(made.files).unlink()
    rows = _steps(made).gather()
    assert _seconds(rows, "step") == [0.027, 0.027] and _seconds(rows, "data") == [0.002, 0.002]
    assert rows is not None and np.isnan(rows.seconds[[FIELDS.index("wait"), FIELDS.index("compute")]]).all()


def test_calls_that_were_overwritten_within_a_step_still_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeRank(tmp_path, 0, monkeypatch, calls=8)
    steps = _steps(made)
    made.started()
    made.step(0)
    steps.gather()
    made.phase(RankPhase.DATA, 1, 1)
    made.waits(2)
    steps.gather()
    for _ in range(29):  # more than the trace keeps
        made.waits(2)
    made.step(2)
    rows = steps.gather()
    assert _seconds(rows, "wait") == [0.06] and _seconds(rows, "compute") == [0.0]


def test_calls_lost_across_steps_leave_them_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeRank(tmp_path, 0, monkeypatch, calls=8)
    made.started()
    for number in range(12):
        made.step(number)
    rows = _steps(made).gather()
    assert rows is not None
    waits = rows.seconds[FIELDS.index("wait")]
    assert np.isnan(waits[:9]).all() and waits[-1] == pytest.approx(0.005)
    assert not np.isnan(rows.seconds[FIELDS.index("step")]).any()


def test_records_lost_across_steps_leave_them_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeRank(tmp_path, 0, monkeypatch, capacity=24)
    steps = _steps(made)
    made.started()
    for number in range(2):
        made.step(number)
    steps.gather()
    for number in range(2, 9):
        made.step(number)
    rows = steps.gather()
    assert rows is not None and (rows.first, rows.count) == (1, 7)
    step = rows.seconds[FIELDS.index("step")]
    assert np.isnan(step[0]) and step[-2:] == pytest.approx([0.027] * 2)


def test_a_step_waits_for_the_times_of_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeRank(tmp_path, 0, monkeypatch)
    steps = _steps(made)
    made.started()
    made.step(0)
    began = made.now
    made.trace.mark_pending(began + 1)
    made.step(1)
    made.step(2)
    rows = steps.gather()
    assert rows is not None and (rows.first, rows.count) == (0, 1)
    call = CollectiveCall(Op.ALL_TO_ALL, began + 5 * MS, 7, 99, -1, 0)
    made.trace.write(call, began + 5 * MS, began + 6 * MS, WaitLane.AUTOGRAD, device=(began, began + 9 * MS))
    made.trace.mark_pending(0)
    made.step(3)
    rows = steps.gather()
    assert rows is not None and rows.first == 1 and _seconds(rows, "wait")[0] == 0.014


# ---- the store ----


def _store(tmp_path: Path, ranks: list[int], node: str = "10.0.0.1") -> StepStore:
    return StepStore(tmp_path / "attempt", node, ranks, tmp_path / "rings")


def test_the_store_keeps_what_the_ranks_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = gang(tmp_path / "rings", [4, 5], monkeypatch)
    store = _store(tmp_path, [4, 5])
    for number in range(30):
        for place, one in enumerate(ranks):
            one.step(number, Did(compute=10 + 5 * place, wait=8 - 5 * place, save=6 * (number % 10 == 9)))
        store.append()
    store.close()
    found = AttemptSteps(tmp_path / "attempt")
    assert found.span == (0, 30) and found.nodes == {"10.0.0.1": (4, 5)}
    window = found.window("compute", 0, 30, 30)
    assert window.mean[0] == pytest.approx([0.010] * 30, rel=PRECISION)
    assert window.mean[1] == pytest.approx([0.015] * 30, rel=PRECISION)
    assert found.window("save", 9, 10, 1).mean[:, 0] == pytest.approx([0.006] * 2, rel=PRECISION)
    assert found.window("wait", 3, 4, 1).mean[:, 0] == pytest.approx([0.008, 0.003], rel=PRECISION)


def test_one_begin_of_a_column_is_of_the_first_rank_and_lag_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = MadeRank(tmp_path / "rings", 0, monkeypatch)
    second = MadeRank(tmp_path / "rings", 1, monkeypatch, start=first.now + 7 * MS)
    for one in (first, second):
        one.started()
        for number in range(4):
            one.step(number)
    store = _store(tmp_path, [0, 1])
    store.append()
    store.close()
    lag = AttemptSteps(tmp_path / "attempt").window("lag", 0, 4, 4)
    assert lag.mean[0] == pytest.approx([0.0] * 4) and lag.mean[1] == pytest.approx(
        [0.007] * 4, rel=PRECISION
    )


def test_a_rank_that_hangs_leaves_its_steps_unknown_and_the_others_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = gang(tmp_path / "rings", [0, 1], monkeypatch)
    store = _store(tmp_path, [0, 1])
    for number in range(400):
        for place, one in enumerate(ranks):
            if place == 0 or number < 20:
                one.step(number)
        if number % 50 == 0:
            store.append()
    store.gather()
    store.write(everything=True)
    found = AttemptSteps(tmp_path / "attempt")
    window = found.window("compute", 0, 400, 400)
    assert 100 < window.edges[-1] < 300  # the newest wait for the other rank a while
    assert not np.isnan(window.mean[0]).any() and np.isnan(window.mean[1][25:]).all()
    store.close()
    assert AttemptSteps(tmp_path / "attempt").span == (0, 400)


def test_storage_that_takes_nothing_loses_nothing_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (one,) = gang(tmp_path / "rings", [0], monkeypatch)
    store = _store(tmp_path, [0])
    (tmp_path / "attempt").write_text("in the way")
    for number in range(100):
        one.step(number)
        store.gather()
        store.write(everything=True)
    assert caplog.text.count("takes no steps") == 1
    (tmp_path / "attempt").unlink()
    store.close()
    assert AttemptSteps(tmp_path / "attempt").span == (0, 100)
    assert not np.isnan(AttemptSteps(tmp_path / "attempt").window("step", 0, 100, 100).mean).any()


@pytest.mark.parametrize("failing", range(8))
def test_a_write_that_failed_in_the_middle_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Each level knows its columns by their number alone: one that was lost would move all later ones."""
    (one,) = gang(tmp_path / "rings", [0], monkeypatch)
    store, inner, writes = _store(tmp_path, [0]), os.pwrite, 0

    def pwrite(fd: int, data: bytes, at: int) -> int:
        nonlocal writes
        writes += 1
        if writes in (20 + failing, 31 + failing):
            raise OSError(28, "No space left on device")
        return inner(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    before = descriptors()
    for number in range(600):
        one.step(number, Did(compute=1 + number))
        if number % 60 == 59:
            store.gather()
            store.write(everything=True)
    store.close()
    assert writes > 40 and descriptors() <= before
    for columns in (600, 150, 37):
        window = AttemptSteps(tmp_path / "attempt").window("compute", 0, 600, columns)
        middle = (window.edges[:-1] + window.edges[1:] - 1) / 2
        assert window.mean[0] == pytest.approx((1 + middle) / 1e3, rel=PRECISION)


def test_more_than_memory_holds_is_dropped_oldest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from faulttol.timeline import store as storing

    monkeypatch.setattr(storing, "_WIDTH", 64)
    (one,) = gang(tmp_path / "rings", [0], monkeypatch)
    store = _store(tmp_path, [0])
    for number in range(150):
        one.step(number, Did(compute=1 + number))
        store.gather()
    store.close()
    window = AttemptSteps(tmp_path / "attempt").window("compute", 0, 150, 150)
    assert window.edges[0] == 86 and window.edges[-1] == 150
    assert window.mean[0] == pytest.approx([(1 + n) / 1e3 for n in range(86, 150)], rel=PRECISION)


def test_writes_are_some_seconds_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = gang(tmp_path / "rings", [0], monkeypatch)
    store = _store(tmp_path, [0])
    for number in range(5):
        one.step(number)
        store.append()
    assert not (tmp_path / "attempt").exists()


def test_a_ring_that_breaks_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = gang(tmp_path / "rings", [0, 1], monkeypatch)
    for number in range(5):
        for one in ranks:
            one.step(number)
    inner = RankSteps.gather

    def broken(self: RankSteps) -> StepRows | None:
        if self._ring == ranks[0].files.ring:
            raise ValueError("odd")
        return inner(self)

    monkeypatch.setattr(RankSteps, "gather", broken)
    store = _store(tmp_path, [0, 1])
    store.append()
    store.close()
    window = AttemptSteps(tmp_path / "attempt").window("step", 0, 9, 9)
    assert np.isnan(window.mean[0]).all() and not np.isnan(window.mean[1]).any() and "rank 0" in caplog.text
