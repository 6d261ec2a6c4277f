"""The event log: what is written comes back, whenever the writer dies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_args

import pytest

from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.record import events as ev
from orchestrator.record.events import (
    Amended,
    CheckpointCommitted,
    CheckpointFailed,
    ControllerStarted,
    Decided,
    Event,
    FabricFinding,
    Finished,
    GangShape,
    IncidentClosed,
    IncidentOpened,
    Moved,
    NodeShare,
    Payload,
    Placed,
    RanksStarted,
    Resumed,
    Submitted,
    VerdictFound,
    parse,
    read,
)
from orchestrator.record.run_log import EventLog, RunView, fold
from orchestrator.record.states import IllegalMove, Reason, State

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

SHARES = (NodeShare("n1", "10.0.0.1", "höst 1", (0, 1)), NodeShare("n2", "10.0.0.2", "host2", (2, 3)))
SUBMITTED = Submitted(
    5, GangShape(4, 2, 2, "GPU"), 40, 3, 2.0, "demo", {"dp": 4, "ep": 2}, {"env": {"A": "\n"}}
)
VERDICT = VerdictFound(
    1, Verdict(VerdictKind.RANK_EXIT, "ended by SIGKILL", 1, "10.0.0.1", 5.0, "log").to_json()
)
FOUND = FabricFinding(1, {"kind": "slow_nic", "hosts": ["10.0.0.1"], "ranks": [1], "ratio": 0.25})
DECIDED = Decided(1, "restart", "rank_died", 1, 3, 2.0, "ended by SIGKILL")
OPENED = IncidentOpened(1, 1, "rank_exit", "ended by SIGKILL", 1, "10.0.0.1", 18, "00001.log")
AMENDED = Amended(
    1,
    ("parallel.ep=4",),
    (("parallel.ep", "2", "4"),),
    GangShape(8, 4, None, "GPU"),
    80,
    5,
    1.0,
    {"dp": 8, "ep": 4},
)
MENDED = IncidentClosed(1, "attempt 2 resumed from step 10", 8, 12.5)

#: A life with every kind of event in it, in an order that the table allows.
LIFE: list[Payload] = [
    SUBMITTED,
    Moved(State.QUEUED, Reason.SUBMITTED),
    Moved(State.PLACING, Reason.ADMITTED, "2 on 10.0.0.1"),
    Placed(1, SHARES, "demo-a001"),
    Moved(State.STARTING, Reason.PLACED),
    RanksStarted(1, {"0": 100, "1": 101}, "10.0.0.1:4711"),
    Resumed(1, 0, None),
    Moved(State.RUNNING, Reason.FIRST_STEP),
    CheckpointCommitted(1, 10, "memory://10", 4096, 0.5, 0.01, "store", 30),
    CheckpointFailed(1, 12, "rank 3: No space left on device", 1),
    VERDICT,
    FOUND,
    OPENED,
    DECIDED,
    Moved(State.RECOVERING, Reason.RANK_DIED, "ended by SIGKILL"),
    ControllerStarted(77, "no gang"),
    AMENDED,
    Moved(State.QUEUED, Reason.BACKOFF_OVER),
    Moved(State.PLACING, Reason.ADMITTED),
    Placed(2, SHARES, "demo-a002"),
    Moved(State.STARTING, Reason.PLACED),
    RanksStarted(2, {"0": 200}, "10.0.0.1:4712"),
    Resumed(2, 10, "memory://10"),
    Moved(State.RUNNING, Reason.FIRST_STEP),
    MENDED,
    CheckpointCommitted(2, 40, "memory://40", 4096, 0.5),
    Finished(40, 1.5, 40960),
    Moved(State.SUCCEEDED, Reason.COMPLETE),
]


def write(path: Path, payloads: list[Payload], start: float = 100.0) -> EventLog:
    log = EventLog(path)
    for number, payload in enumerate(payloads):
        log.append(payload, start + number)
    return log


def until(state: State) -> list[Payload]:
    """The life up to its first move to a state."""
    index = next(i for i, p in enumerate(LIFE) if isinstance(p, Moved) and p.to is state)
    return LIFE[: index + 1]


def test_the_life_has_every_kind() -> None:
    assert {type(p) for p in LIFE} == set(get_args(Payload)) == set(ev._KINDS.values())


@pytest.mark.parametrize("payload", LIFE, ids=lambda p: p.kind)
def test_an_event_comes_back_as_it_was(payload: Payload) -> None:
    event = Event(7, 123.25, payload)
    line = json.dumps(event.to_json())
    assert "\n" not in line and parse(line) == event and parse(line.encode()) == event


def test_a_log_comes_back_and_its_fold_is_the_writers_view(tmp_path: Path) -> None:
    path = tmp_path / "weird 'path'" / "events.jsonl"
    log = EventLog(path)
    views: list[RunView] = []
    for number, payload in enumerate(LIFE):
        log.append(payload, 100.0 + number)
        views.append(log.view)
    log.close()
    events = read(path)
    assert [e.payload for e in events] == LIFE
    assert [e.seq for e in events] == list(range(len(LIFE)))
    for number, view in enumerate(views, start=1):
        assert fold(events[:number]) == view


def test_a_new_writer_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    for number, payload in enumerate(LIFE):
        log = EventLog(tmp_path / "log")
        assert log.append(payload, float(number)).seq == number
        log.close()
    assert [e.payload for e in read(tmp_path / "log")] == LIFE


def test_a_writer_killed_at_any_byte_of_the_last_line_loses_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    whole = until(State.RUNNING)
    write(path, whole).close()
    data = path.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    for size in range(start, len(data)):
        path.write_bytes(data[:size])
        assert [e.payload for e in read(path)] == whole[:-1], f"cut at byte {size - start} of the line"
        log = EventLog(path)
        assert log.view.state is State.STARTING
        assert log.append(whole[-1], 100.0 + len(whole) - 1).seq == len(whole) - 1
        log.close()
        assert path.read_bytes() == data


def test_reading_leaves_a_torn_line_to_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, LIFE[:3]).close()
    path.write_bytes(path.read_bytes() + b'{"seq": 3, "ti')
    before = path.read_bytes()
    assert len(read(path)) == 3 and path.read_bytes() == before


def test_an_absent_log_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path / "none") == [] and fold([]) == RunView()


@pytest.mark.parametrize("start", State)
@pytest.mark.parametrize("to", State)
def test_an_illegal_move_writes_nothing(tmp_path: Path, start: State, to: State) -> None:
    path = tmp_path / "log"
    routes = {
        State.FAILED: [*until(State.QUEUED), Moved(State.FAILED, Reason.USER_ERROR)],
        State.CANCELLING: [*until(State.RUNNING), Moved(State.CANCELLING, Reason.CANCEL_ASKED)],
        State.CANCELLED: [*until(State.QUEUED), Moved(State.CANCELLED, Reason.CANCEL_ASKED)],
    }
    log = write(path, routes.get(start) or until(start))
    before, view = path.read_bytes(), log.view
    assert view.state is start
    try:
        log.append(Moved(to, Reason.ADMITTED), 1.0)
    except IllegalMove:
        assert path.read_bytes() == before and log.view is view
        seq = log.append(ControllerStarted(1, "no gang"), 2.0).seq
        assert seq == before.count(b"\n"), "the refused event took no number"
    else:
        assert path.read_bytes() != before and log.view.state is to
    log.close()


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    log = write(path, LIFE[:3])
    before, view, write_bytes = path.read_bytes(), log.view, os.write
    calls = []

    def full(fd: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write_bytes(fd, data[:5])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        log.append(LIFE[3], 1.0)
    monkeypatch.undo()
    assert len(calls) == 2 and path.read_bytes() == before and log.view is view
    log.append(LIFE[3], 103.0)
    log.close()
    assert [e.payload for e in read(path)] == LIFE[:4]


@pytest.mark.parametrize(
    "line",
    [
        "", "5", "[]", "null", "{}", "{", '"text"',
        '{"seq": 0, "time": 1, "kind": "unheard_of"}',
        '{"seq": 0, "time": 1, "kind": ["resumed"]}',
        '{"time": 1, "kind": "resumed", "attempt": 1, "step": 1, "path": null}',
        '{"seq": 0, "time": 1, "kind": "resumed", "attempt": 1}',
        '{"seq": 0, "time": 1, "kind": "resumed", "attempt": 1, "step": 1, "path": null, "more": 1}',
        '{"seq": 0, "time": 1, "kind": "moved", "to": "flying", "reason": "placed"}',
        '{"seq": 0, "time": 1, "kind": "moved", "to": "queued", "reason": "whim"}',
        '{"seq": 0, "time": 1, "kind": "placed", "attempt": 1, "shares": [3], "group": "g"}',
        '{"seq": 0, "time": 1, "kind": "submitted", "gang": 3}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not an event"):
        parse(line)


def test_a_damaged_line_in_the_middle_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, LIFE[:3]).close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:10] + b"\n" + lines[2])
    with pytest.raises(ValueError, match="not an event"):
        EventLog(path)


# ---- the fold ----


def view_of(*payloads: Payload) -> RunView:
    return fold(Event(i, 100.0 + i, p) for i, p in enumerate(payloads))


def test_a_new_checkpoint_resets_the_count_of_restarts_and_an_old_one_does_not() -> None:
    again = Decided(1, "restart", "rank_died", 2, 3)
    base = (SUBMITTED, CheckpointCommitted(1, 10, "a", 1, 0.1), DECIDED, again)
    assert view_of(*base).restarts == 2
    assert view_of(*base, CheckpointCommitted(2, 10, "b", 1, 0.1)).restarts == 2
    assert view_of(*base, CheckpointCommitted(2, 11, "b", 1, 0.1)).restarts == 0
    assert view_of(*base, Decided(1, "fail", "restarts_exhausted", 2, 2)).restarts == 2


def test_a_snapshot_in_memory_counts_where_it_is_newer_than_all() -> None:
    base = (SUBMITTED, CheckpointCommitted(1, 10, "a", 1, 0.1), DECIDED)
    for step, restarts in ((9, 1), (10, 1), (11, 0)):
        view = view_of(*base, CheckpointCommitted(1, step, "m", 1, 0.1, 0.0, "memory"))
        assert view.restarts == restarts and view.memory is not None and view.memory.step == step
        assert view.checkpoint is not None and view.checkpoint.path == "a", "storage has no newer one"
    seen = (*base, CheckpointCommitted(1, 19, "m", 1, 0.1, 0.0, "memory"), DECIDED)
    assert view_of(*seen, CheckpointCommitted(2, 18, "m", 1, 0.1, 0.0, "memory")).restarts == 1
    assert view_of(*seen, CheckpointCommitted(2, 12, "b", 1, 0.1)).restarts == 0, "storage has gone on"


def test_failed_saves_are_counted_until_storage_takes_one() -> None:
    life = [
        *LIFE[:8],
        *(CheckpointFailed(1, step, "full", n) for step, n in ((10, 1), (20, 2), (25, 0), (30, 3))),
    ]
    view = view_of(*life)
    assert view.failing == 3 and view.saved_step == 0, "one was only left out"
    assert view.failed is not None and view.failed.step == 30
    assert view_of(*life, CheckpointCommitted(1, 38, "m", 1, 0.1, 0.0, "memory")).failing == 3
    saved = view_of(*life, CheckpointCommitted(1, 40, "p", 1, 0.1))
    assert (saved.failing, saved.saved_step, saved.interval) == (0, 40, 40)
    assert view_of(*life, Moved(State.CANCELLING, Reason.CANCEL_ASKED), Moved(State.CANCELLED, Reason.CANCEL_ASKED),
                   Moved(State.QUEUED, Reason.RESUME_ASKED)).failing == 0  # fmt: skip


def test_the_interval_of_saves_is_the_attempts_own() -> None:
    life = [*LIFE[:8], CheckpointCommitted(1, 10, "p", 1, 0.1), CheckpointCommitted(1, 35, "p", 1, 0.1)]
    assert view_of(*life).interval == 25
    restarted = view_of(*LIFE[: LIFE.index(MENDED)])
    assert (restarted.interval, restarted.saved_step) == (0, 10)


def test_a_warning_stops_nothing_and_ends_with_a_save() -> None:
    warning = IncidentOpened(1, 1, VerdictKind.CHECKPOINT_OVERDUE, "full", None, None, 30, "")
    life = [*LIFE[:8], warning, Decided(1, "warn", "saves_failing", 0, 3)]
    view = view_of(*life)
    assert view.decision is None and view.restarts == 0 and view.retry_at == 0.0
    assert view.open_incidents[0].stops_nothing and view.open_incidents[0].saved_step is None
    saved = view_of(*life, OPENED, CheckpointCommitted(1, 40, "p", 1, 0.1))
    assert [i.saved_step for i in saved.incidents] == [40, None]


def test_what_a_resume_asked_holds_from_then_on_and_the_log_keeps_the_rest() -> None:
    view = view_of(*LIFE[: LIFE.index(AMENDED) + 1])
    assert view.submitted is not None and view.amendments == 1
    assert (view.submitted.gang, view.submitted.steps, view.submitted.layout) == (
        AMENDED.gang,
        80,
        {"dp": 8, "ep": 4},
    )
    assert (view.submitted.max_restarts, view.submitted.backoff_seconds) == (5, 1.0)
    assert (
        view.submitted.priority == SUBMITTED.priority and view.submitted.runtime_env == SUBMITTED.runtime_env
    )


def test_recovery_keeps_the_place_in_the_queue_and_resume_renews_it() -> None:
    recovered = view_of(*until(State.RECOVERING), Moved(State.QUEUED, Reason.BACKOFF_OVER))
    assert recovered.queued_at == 101.0 and recovered.restarts == 1
    failed = [*until(State.RECOVERING), Moved(State.FAILED, Reason.RESTARTS_EXHAUSTED)]
    resumed = view_of(*failed, Moved(State.QUEUED, Reason.RESUME_ASKED))
    assert resumed.queued_at == 100.0 + len(failed) and resumed.restarts == 0


def test_a_run_that_leaves_its_slots_holds_none() -> None:
    running, recovering = view_of(*until(State.RUNNING)), view_of(*until(State.RECOVERING))
    assert running.placed is not None and running.pids == {"0": 100, "1": 101}
    assert recovering.placed is None and not recovering.pids
    assert recovering.retry_at == 100.0 + LIFE.index(DECIDED) + 2.0


def test_the_whole_life_folds_to_its_end() -> None:
    view = view_of(*LIFE)
    assert view.state is State.SUCCEEDED and view.reason is Reason.COMPLETE and not view.open_incidents
    assert view.attempt == 2 and view.finished == Finished(40, 1.5, 40960)
    (incident,) = view.incidents
    assert incident.outcome is not None and incident.outcome.lost_steps == 8


def test_an_incident_remembers_how_it_was_first_mended() -> None:
    second = IncidentOpened(2, 2, "rank_exit", "again", 0, None, 17, "")
    life = [*LIFE[: LIFE.index(MENDED)], CheckpointCommitted(2, 15, "b", 1, 0.1), second,
            Moved(State.RECOVERING, Reason.RANK_DIED), Moved(State.QUEUED, Reason.BACKOFF_OVER),
            Moved(State.PLACING, Reason.ADMITTED), Placed(3, SHARES, "g"),
            Moved(State.STARTING, Reason.PLACED),
            Resumed(3, 15, "b"), Moved(State.RUNNING, Reason.FIRST_STEP)]  # fmt: skip
    first_mended, second_mended = view_of(*life).incidents
    assert (first_mended.resumed_step, second_mended.resumed_step) == (10, 15)
    assert (
        first_mended.training_at == 100.0 + LIFE.index(MENDED) - 1
        and second_mended.training_at == 100.0 + len(life) - 1
    )
    assert view_of(*until(State.RECOVERING)).incidents[0].resumed_step is None, (
        "its own attempt's start doesn't count"
    )
