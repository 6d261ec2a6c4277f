"""A run's log in the hands of its writer, and the folded view beside it that readers begin from."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.paths import RunPaths
from orchestrator.record import run_log
from orchestrator.record.events import (
    AttemptPlaced,
    AttemptResumed,
    CheckpointFailed,
    ControllerStarted,
    FabricFinding,
    Finished,
    Payload,
    StateMoved,
)
from orchestrator.record.log import Cursor, EventLog, Fenced, read_from
from orchestrator.record.run_log import RunLog, RunLogReader
from orchestrator.record.states import IllegalMove, Reason, State
from orchestrator.record.view import RunView, fold
from tests.orchestrator.record.life import LIFE, SHARES, at, until, view_of

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "demo")


def write(run: RunPaths, payloads: list[Payload], epoch: int = 1) -> RunLog:
    log = RunLog(run, epoch, at(0))
    for number, payload in enumerate(payloads):
        log.append([payload], at(number))
    return log


def published(run: RunPaths) -> RunLogReader | None:
    return run_log._published(run)


# ---- the writer ----


def test_the_writers_view_is_the_fold_of_its_log(run: RunPaths) -> None:
    log = RunLog(run, 1, at(0))
    for number, payload in enumerate(LIFE):
        log.append([payload], at(number))
        assert log.view == view_of(*LIFE[: number + 1]) == fold(read_from(run.events)[0])
    log.close()
    again = RunLog(run, 2, at(99))
    assert again.view == log.view and again.clock(at(99)) == 99.0
    again.close()


def test_a_turn_is_one_record_that_counts_as_a_whole(run: RunPaths) -> None:
    log = RunLog(run, 1, at(0))
    log.append(LIFE, at(5))
    log.close()
    data = run.events.read_bytes()
    assert data.count(b"\n") == 1 and log.view == RunLogReader.of(run).view
    assert log.view.state is State.SUCCEEDED and log.view.moved_clock == 5.0
    run.events.write_bytes(data[:-1])
    assert RunLogReader.of(run).view == RunView()


def test_an_empty_turn_writes_nothing(run: RunPaths) -> None:
    log = write(run, LIFE[:2])
    before = run.events.read_bytes()
    log.append([], at(9))
    log.close()
    assert run.events.read_bytes() == before


ROUTES = {
    State.FAILED: [*until(State.QUEUED), StateMoved(State.FAILED, Reason.USER_ERROR)],
    State.CANCELLING: [*until(State.RUNNING), StateMoved(State.CANCELLING, Reason.CANCEL_ASKED)],
    State.CANCELLED: [*until(State.QUEUED), StateMoved(State.CANCELLED, Reason.CANCEL_ASKED)],
}


@pytest.mark.parametrize("start", State)
def test_an_illegal_move_writes_nothing_of_its_record(
    run: RunPaths, start: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    for to in State:
        route = ROUTES.get(start) or until(start)
        run.events.unlink(missing_ok=True)
        log = RunLog(run, 1, at(0))
        log.append(route, at(0))
        before, view = run.events.read_bytes(), log.view
        assert view.state is start
        try:
            log.append([AttemptResumed(1, 3, None), StateMoved(to, Reason.ADMITTED)], at(1))
        except IllegalMove:
            assert run.events.read_bytes() == before and log.view is view, "nor the event before it"
            log.append([ControllerStarted(1)], at(2))
            assert read_from(run.events)[0][-1].seq == len(route), "the refused events took no number"
        else:
            assert log.view.state is to and log.view.resumed_step == 3
            assert run.events.read_bytes() != before
        log.close()


def test_what_would_be_is_not_yet(run: RunPaths) -> None:
    log = write(run, until(State.QUEUED))
    view = log.view
    tried = log.tentative(view, StateMoved(State.PLACING, Reason.ADMITTED), at(7))
    assert tried.state is State.PLACING and tried.moved_clock == 7.0 == log.clock(at(7))
    assert log.view is view and RunLogReader.of(run).view == view
    with pytest.raises(IllegalMove):
        log.tentative(view, StateMoved(State.RUNNING, Reason.FIRST_STEP), at(7))
    log.append([StateMoved(State.PLACING, Reason.ADMITTED)], at(7))
    assert log.view == tried, "what was decided is what is written"
    log.close()


@pytest.mark.parametrize("refusal", [OSError(28, "No space left on device"), Fenced("replaced")])
def test_a_view_holds_nothing_that_the_log_did_not_take(run: RunPaths, refusal: Exception) -> None:
    trouble: list[Exception] = []

    def fence() -> None:
        if trouble:
            raise trouble.pop()

    log = RunLog(run, 1, at(0), fence)
    log.append(LIFE[:2], at(0))
    view = log.view
    trouble.append(refusal)
    with pytest.raises(type(refusal)):
        log.append(LIFE[2:4], at(1))
    assert log.view is view
    log.append(LIFE[2:4], at(1))
    log.close()
    assert RunLogReader.of(run).view == log.view and log.view.state is State.PLACING


def test_a_newer_controllers_log_is_not_opened_and_an_older_ones_is_gone_on_with(run: RunPaths) -> None:
    write(run, LIFE[:8], epoch=2).close()
    with pytest.raises(Fenced):
        RunLog(run, 1, at(9))
    log = RunLog(run, 3, at(9))
    assert log.view.state is State.RUNNING
    log.close()


def test_what_an_older_controller_writes_while_this_one_opens_the_log_is_not_missed(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write(run, LIFE[:2], epoch=1)
    read_all = RunLogReader.of

    def late(run: RunPaths) -> RunLogReader:
        reader = read_all(run)
        old.append([LIFE[2]], at(2))
        return reader

    monkeypatch.setattr(RunLogReader, "of", late)
    log = RunLog(run, 2, at(3))
    monkeypatch.undo()
    assert log.view == RunLogReader.of(run).view and log.view.state is State.PLACING
    old.close()
    log.close()


# ---- the published view ----


def test_a_view_comes_back_as_it_was_wherever_in_a_life_it_is_published(run: RunPaths) -> None:
    log = RunLog(run, 1, at(0))
    for number, payload in enumerate(LIFE):
        log.append([payload], at(number))
        log.publish(final=True)
        reader = published(run)
        assert reader is not None, payload
        assert reader.view == log.view == view_of(*LIFE[: number + 1])
        assert reader.cursor == read_from(run.events)[1]
        # Equality takes a list for no tuple, but a text for a state.
        for name, value in vars(log.view).items():
            assert type(getattr(reader.view, name)) is type(value), name
    log.close()


def test_a_view_of_everything_that_a_life_has_not_comes_back(run: RunPaths) -> None:
    """What the life ends without: nodes that were not granted, damage, a snapshot, a stop."""
    life = [
        *until(State.PLACING),
        AttemptPlaced(1, SHARES, "g"),
        StateMoved(State.QUEUED, Reason.PLACEMENT_LOST),
    ]
    write(run, life).close()
    with run.events.open("ab") as file:
        file.write(b"\xffdamaged\n")
        for event in ({"kind": "moved", "to": "running", "reason": "first_step", "detail": "\u2028 ö"},):
            record = {"epoch": 1, "time": 1.7e9, "clock": 9.0, "events": [event]}
            file.write(json.dumps(record).encode() + b"\n")
    log = RunLog(run, 1, at(20))
    assert log.view.ungranted_nodes == {"10.0.0.1", "10.0.0.2"} and len(log.damage) == 2
    assert "byte" in log.damage[0] and "queued -> running" in log.damage[1]
    log.publish(final=True)
    log.close()
    reader = published(run)
    assert reader is not None and reader.view == log.view and reader.damage == log.damage


def test_a_reader_begins_from_the_view_and_reads_what_is_behind_it(run: RunPaths) -> None:
    log = write(run, LIFE[:20])
    log.publish(final=True)
    for payload in LIFE[20:]:
        log.append([payload], at(30))
    log.close()
    whole, data = RunLogReader(run.events).update(), run.events.read_bytes()
    reader = published(run)
    assert reader is not None and reader.cursor.seq == 20
    begun = reader.cursor.offset
    run.events.write_bytes(b"x" * (begun - 1) + b"\n" + data[begun:])
    assert RunLogReader.of(run) == whole == reader.update(), "what is before the view isn't read again"


def test_a_reader_goes_on_from_where_it_was(run: RunPaths) -> None:
    reader, log = RunLogReader.of(run), RunLog(run, 1, at(0))
    assert reader.view == RunView()
    for number, payload in enumerate(LIFE):
        log.append([payload], at(number))
        reader = reader.update()
        assert reader.view == log.view and reader.update() == reader
    log.close()
    assert reader == RunLogReader.of(run)


def test_the_damage_that_a_reader_met_stays_named(run: RunPaths) -> None:
    write(run, LIFE).close()
    lines = run.events.read_bytes().splitlines(keepends=True)
    lost = LIFE.index(StateMoved(State.QUEUED, Reason.BACKOFF_OVER))
    lines[lost] = b"{" + lines[lost]
    run.events.write_bytes(b"".join(lines))
    reader = RunLogReader.of(run)
    assert reader.view.state is State.SUCCEEDED
    named, followed = reader.damage
    assert named.startswith(f"{run.events} at byte ") and followed.endswith(
        "legal: cancelled, failed, queued"
    )
    log = RunLog(run, 2, at(99))
    assert log.damage == reader.damage == reader.update().damage
    log.publish(final=True)
    log.close()
    assert RunLogReader.of(run).damage == reader.damage


def test_what_a_replaced_writer_writes_behind_the_view_does_not_count(run: RunPaths) -> None:
    old = write(run, LIFE[:8], epoch=1)
    stale = run.events.read_bytes().splitlines(keepends=True)[-1]
    new = RunLog(run, 2, at(8))
    new.append([ControllerStarted(2, epoch=2)], at(8))
    new.publish(final=True)
    old.close()
    new.close()
    run.events.write_bytes(run.events.read_bytes() + stale.replace(b'"running"', b'"cancelling"'))
    reader = RunLogReader.of(run)
    assert reader.view == new.view and reader.view.state is State.RUNNING and reader.cursor.epoch == 2
    assert reader.cursor.offset == run.events.stat().st_size


def test_a_view_is_published_now_and_then_and_at_the_end(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    log = RunLog(run, 1, at(0))
    log.publish(final=True)
    assert not run.view.exists(), "there is nothing to tell"
    log.append(LIFE[:8], at(0))
    steps = [AttemptResumed(1, step, None) for step in range(500)]
    at_events = []
    for number, payload in enumerate(steps):
        log.append([payload], at(number))
        log.publish()
        reader = published(run)
        if reader is not None and reader.cursor.seq not in at_events:
            at_events.append(reader.cursor.seq)
    assert at_events == [200, 400]
    log.publish(final=True)
    reader = published(run)
    assert reader is not None and reader.cursor.seq == 508
    run.view.unlink()
    log.publish(final=True)
    assert not run.view.exists(), "nothing was written since"
    log.close()


def test_a_view_that_the_disk_refuses_leaves_the_one_before(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write(run, LIFE[:4])
    log.publish(final=True)
    before = run.view.read_bytes()
    log.append(LIFE[4:8], at(9))

    def full(path: Path, text: str, **options: str) -> int:
        path.write_bytes(text[:50].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        log.publish(final=True)
    monkeypatch.undo()
    assert run.view.read_bytes() == before and RunLogReader.of(run).view == log.view
    log.publish(final=True)
    log.close()
    assert (reader := published(run)) is not None and reader.view == log.view, "it is tried again"


@pytest.mark.parametrize("loss", [math.inf, -math.inf])
def test_numbers_that_are_not_finite_come_back(run: RunPaths, loss: float) -> None:
    """A loss may run away, and a ratio of speeds has no upper bound."""
    found = FabricFinding(1, {"kind": "slow_nic", "ratio": loss})
    log = write(run, [*LIFE[:8], found, Finished(40, loss, 1)])
    log.publish(final=True)
    log.close()
    reader = published(run)
    assert reader is not None and reader.view == log.view and reader.view.findings == (found,)
    assert reader.view.finished == Finished(40, loss, 1)


def test_text_that_is_no_utf_8_stops_nobody(run: RunPaths) -> None:
    """An error may name a file whose name isn't."""
    error = os.fsdecode(b"/data/\xe4: No space left on device")
    log = write(run, [*LIFE[:8], CheckpointFailed(1, 10, error, 1)])
    log.publish(final=True)
    log.close()
    reader = RunLogReader.of(run)
    assert reader.view == log.view and reader.view.failed is not None and reader.view.failed.error == error


# ---- views that don't fit ----


def sealed(text: str) -> str:
    """A view with its checksum, so that it isn't passed over for that."""
    return f"{text}{zlib.crc32(text.encode()):08x}\n"


def whole_and_view(run: RunPaths) -> tuple[RunLogReader, str]:
    log = write(run, LIFE[:20])
    log.publish(final=True)
    log.append(LIFE[20:], at(30))
    log.close()
    return RunLogReader(run.events).update(), run.view.read_text()


def test_a_view_that_is_cut_anywhere_is_passed_over(run: RunPaths) -> None:
    whole, text = whole_and_view(run)
    sizes = [*range(0, len(text) - 1, 23), text.index("\n"), text.index("\n") + 1, len(text) - 2]
    for size in sizes:
        run.view.write_text(text[:size])
        assert published(run) is None and RunLogReader.of(run) == whole, f"cut at {size}"


@pytest.mark.parametrize(
    "change",
    [
        lambda head, body: (json.dumps([head]), body),
        lambda head, body: ("5", body),
        lambda head, body: (json.dumps({"format": head["format"]}), body),
        lambda head, body: (json.dumps(head | {"format": [2, *head["format"][1:]]}), body),
        lambda head, body: (json.dumps(head | {"format": head["format"][:-1]}), body),
        lambda head, body: (json.dumps(head | {"format": 1}), body),
        lambda head, body: (json.dumps({"cursor": head["cursor"]}), body),
        lambda head, body: (json.dumps(head | {"cursor": head["cursor"] | {"more": 1}}), body),
        lambda head, body: (json.dumps(head | {"cursor": head["cursor"] | {"offset": "x"}}), body),
        lambda head, body: (json.dumps(head | {"cursor": head["cursor"] | {"damage": None}}), body),
        lambda head, body: (json.dumps(head), "[]"),
        lambda head, body: (json.dumps(head), body.replace('"recovering"', '"flying"')),
        lambda head, body: (json.dumps(head), body.replace('"attempt": 1', '"attempt": "one"', 1)),
        lambda head, body: (json.dumps(head), body.replace('"opened": ', '"begun": ')),
        lambda head, body: ("\x00" * 4096, "\x00" * 4096),
        lambda head, body: ("", ""),
    ],
)
def test_a_view_that_is_damaged_or_of_another_format_is_passed_over(
    run: RunPaths, change: Callable[[dict[str, Any], str], tuple[str, str]]
) -> None:
    whole, text = whole_and_view(run)
    head, body, _ = text.splitlines()
    assert sealed(f"{head}\n{body}\n") == text
    made = change(json.loads(head), body)
    assert made != (head, body)
    run.view.write_text(sealed("\n".join(made) + "\n"))
    assert published(run) is None and RunLogReader.of(run) == whole
    log = RunLog(run, 2, at(50))
    assert log.view == whole.view
    log.close()


def test_a_view_with_a_flipped_bit_is_passed_over(run: RunPaths) -> None:
    whole, text = whole_and_view(run)
    for place in [*range(0, len(text), 7), *range(len(text) - 10, len(text))]:
        flipped = bytearray(text.encode())
        flipped[place] ^= 1
        run.view.write_bytes(flipped)
        assert published(run) is None, f"byte {place}"
    assert RunLogReader.of(run) == whole


def test_a_view_that_is_no_text_is_passed_over(run: RunPaths) -> None:
    whole, _ = whole_and_view(run)
    run.view.write_bytes(b"\xff\xfe\xff")
    assert RunLogReader.of(run) == whole
    run.view.unlink()
    run.view.mkdir()
    assert RunLogReader.of(run) == whole


def test_a_view_that_is_newer_than_the_log_is_passed_over(run: RunPaths) -> None:
    """The log was brought back from a copy."""
    log = write(run, LIFE)
    log.publish(final=True)
    log.close()
    lines = run.events.read_bytes().splitlines(keepends=True)
    for kept in (0, 3, len(lines) - 1):
        run.events.write_bytes(b"".join(lines[:kept]))
        assert published(run) is None and RunLogReader.of(run).view == view_of(*LIFE[:kept])
    run.events.unlink()
    assert RunLogReader.of(run).view == RunView()


def test_a_torn_line_behind_the_view_is_its_writers(run: RunPaths) -> None:
    whole, _ = whole_and_view(run)
    run.events.write_bytes(run.events.read_bytes() + b'{"epoch": 1')
    assert RunLogReader.of(run) == whole
    log = RunLog(run, 2, at(50))
    log.append([ControllerStarted(2, epoch=2)], at(50))
    log.close()
    assert RunLogReader.of(run).cursor.damage == () and RunLogReader.of(run).cursor.seq == len(LIFE) + 1


def test_events_without_a_submission_are_a_view_too(run: RunPaths) -> None:
    log = EventLog(run.events, 1, at(0))
    log.append(LIFE[1:], at(0))
    log.close()
    reader = RunLogReader.of(run)
    assert reader.view.submitted is None and reader.view.state is State.SUCCEEDED
    assert reader.cursor == Cursor(run.events.stat().st_size, len(LIFE) - 1, 1, at(0).wall, 0.0)
