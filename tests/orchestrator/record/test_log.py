"""The log: what is written comes back, whenever and however its writer dies, and whoever else writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.clock import Instant
from orchestrator.record.events import AttemptResumed, ControllerStarted, Payload
from orchestrator.record.log import Cursor, EventLog, Fenced, read, read_from
from tests.orchestrator.record.life import LIFE, WALL, at

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

TURNS = [LIFE[:2], LIFE[2:4], LIFE[4:5], LIFE[5:12], LIFE[12:]]
"""The life in records, as turns of a controller write it."""


def write(path: Path, records: list[list[Payload]], epoch: int = 1, start: float = 0.0) -> EventLog:
    log = EventLog(path, epoch, at(start))
    for number, payloads in enumerate(records):
        log.append(payloads, at(start + number))
    return log


def unsealed(path: Path) -> None:
    """Make the log one of a version whose records had no checksum."""
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "crc"}) + "\n" for r in records))


def payloads(path: Path) -> list[Payload]:
    return [event.payload for event in read(path)]


def test_a_log_comes_back_record_by_record(tmp_path: Path) -> None:
    path = tmp_path / "weird 'path'" / "events.jsonl"
    log = write(path, TURNS, epoch=7)
    written = log.append([ControllerStarted(1, epoch=7)], at(9.0))
    log.close()
    events, cursor = read_from(path)
    assert [e.payload for e in events[:-1]] == LIFE and events[-1:] == written
    assert [e.seq for e in events] == list(range(len(LIFE) + 1)), "no number is left out"
    assert [e.time for e in events[:5]] == [WALL, WALL, WALL + 1, WALL + 1, WALL + 2]
    assert [e.clock for e in events[:5]] == [0.0, 0.0, 1.0, 1.0, 2.0]
    assert cursor == log.cursor == Cursor(path.stat().st_size, len(LIFE) + 1, 7, WALL + 9, 9.0)
    assert path.read_bytes().count(b"\n") == len(TURNS) + 1, "a record is one line"


def test_a_reader_that_goes_on_reads_each_event_once(tmp_path: Path) -> None:
    log, cursor, found = EventLog(tmp_path / "log", 1, at(0)), Cursor(), []
    for number, record in enumerate(TURNS):
        log.append(record, at(number))
        events, cursor = read_from(tmp_path / "log", cursor)
        assert [e.payload for e in events] == record
        found += events
        assert read_from(tmp_path / "log", cursor) == ([], cursor)
    log.close()
    assert found == read(tmp_path / "log")


@pytest.mark.parametrize("limit", [1, 100, 10_000])
def test_a_log_is_read_in_parts_that_hold_a_record_each(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "log"
    write(path, TURNS).close()
    cursor, collected, parts = Cursor(), list[Payload](), 0
    while cursor.offset < path.stat().st_size:
        events, cursor = read_from(path, cursor, limit=limit)
        assert events and parts < len(TURNS), "each part has a whole record, however long that is"
        collected += [event.payload for event in events]
        parts += 1
    assert collected == LIFE and cursor == read_from(path)[1] and (parts == 1) == (limit == 10_000)


def test_a_new_writer_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    for number, payload in enumerate(LIFE):
        log = EventLog(tmp_path / "log", number, at(number))
        assert log.append([payload], at(number))[0].seq == number
        assert len(log.events) == number
        log.close()
    assert payloads(tmp_path / "log") == LIFE


def test_a_writer_killed_at_any_byte_of_a_record_loses_that_record_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the only slow part, and nothing of it is looked at
    path, last = tmp_path / "log", [LIFE[6], LIFE[7]]
    write(path, [*TURNS[:3], last]).close()
    data, before = path.read_bytes(), sum(TURNS[:3], [])
    start = data[:-1].rfind(b"\n") + 1
    for size in range(start, len(data)):
        path.write_bytes(data[:size])
        assert payloads(path) == before, f"cut at byte {size - start} of the record"
        log = EventLog(path, 1, at(3))
        assert log.append(last, at(3))[0].seq == len(before)
        log.close()
        assert path.read_bytes() == data


def test_reading_leaves_a_torn_line_to_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, TURNS[:2]).close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"epoch": 1, "ti')
    events, cursor = read_from(path)
    assert len(events) == 4 and cursor.offset == len(whole) and not cursor.damage
    assert path.read_bytes() == whole + b'{"epoch": 1, "ti'


def test_an_absent_log_is_empty(tmp_path: Path) -> None:
    assert read_from(tmp_path / "none") == ([], Cursor())


def test_nothing_to_append_writes_nothing(tmp_path: Path) -> None:
    def fence() -> None:
        raise Fenced

    log = EventLog(tmp_path / "log", 1, at(0), fence)
    assert log.append([], at(1)) == [] and (tmp_path / "log").read_bytes() == b""
    log.close()


# ---- damage ----


@pytest.mark.parametrize(
    "line",
    [
        b"", b"5", b"[]", b"null", b"{}", b"{", b'"text"', b"\x00\xff\xfe", b"\xff" * 5000, b"[" * 100_000,
        b'{"epoch": 1, "clock": 1.0, "events": []}',
        b'{"epoch": "x", "time": 1, "clock": 1.0, "events": []}',
        b'{"epoch": 1e999, "time": 1, "clock": 1.0, "events": []}',
        b'{"epoch": 1, "time": "x", "clock": 1.0, "events": []}',
        b'{"epoch": 1, "time": 1, "clock": 1.0, "events": 5}',
        b'{"epoch": 1, "time": 1, "clock": 1.0, "events": [5]}',
        b'{"epoch": 1, "time": 1, "clock": 1.0, "events": [{"kind": "unheard_of"}]}',
        b'{"seq": 0, "time": 1, "kind": "resumed", "attempt": 1}',
    ],
    ids=lambda line: line[:60].decode(errors="replace"),
)  # fmt: skip
def test_a_damaged_line_is_named_and_stepped_over(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "log"
    write(path, TURNS[:3]).close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + line + b"\n" + lines[2])
    events, cursor = read_from(path)
    assert [e.payload for e in events] == TURNS[0] + TURNS[2]
    assert [e.seq for e in events] == [0, 1, 2]
    assert len(cursor.damage) == 1, "the damaged line is named, once"
    named = cursor.damage[0]
    assert named.startswith(f"{path} at byte {len(lines[0])}: ") and len(named) < 400
    assert named.endswith(line[:80].decode(errors="replace").rstrip())


@pytest.mark.parametrize("damaged", range(3))
def test_a_damaged_line_is_stepped_over_wherever_it_is(tmp_path: Path, damaged: int) -> None:
    path = tmp_path / "log"
    write(path, TURNS[:3]).close()
    lines = path.read_bytes().splitlines(keepends=True)
    begin = sum(len(line) for line in lines[:damaged])
    lines[damaged] = b"?\n"
    path.write_bytes(b"".join(lines))
    events, cursor = read_from(path)
    assert [e.payload for e in events] == sum((t for i, t in enumerate(TURNS[:3]) if i != damaged), [])
    assert len(cursor.damage) == 1 and f" at byte {begin}: " in cursor.damage[0]
    assert cursor.offset == path.stat().st_size


def test_a_record_with_one_damaged_event_does_not_count_at_all(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, TURNS).close()
    unsealed(path)
    path.write_bytes(path.read_bytes().replace(b'"kind": "incident_opened"', b'"kind": "incident_apened"'))
    events, cursor = read_from(path)
    assert [e.payload for e in events] == LIFE[:12] and len(cursor.damage) == 1
    assert "incident_apened" in cursor.damage[0]


def test_a_writer_goes_on_behind_damage_and_leaves_it_there(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, TURNS[:3]).close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:10] + b"\n" + lines[2])
    before = path.read_bytes()
    log = EventLog(path, 1, at(3))
    damage = log.cursor.damage
    log.append(TURNS[3], at(3))
    assert path.read_bytes().startswith(before) and len(damage) == 1 and log.cursor.damage == damage
    log.close()
    events, cursor = read_from(path, Cursor(len(lines[0]), 2, 1, WALL, 0.0, ("earlier",)))
    assert [e.payload for e in events] == TURNS[2] + TURNS[3]
    assert cursor.damage == ("earlier", *damage), "what was found before stays named"


@pytest.mark.parametrize("flip", [0x01, 0x02, 0x10, 0x20, 0x80])
def test_a_record_with_a_flipped_bit_is_never_believed(tmp_path: Path, flip: int) -> None:
    path = tmp_path / "log"
    write(path, TURNS[:3], epoch=3).close()
    first, second, third = path.read_bytes().splitlines(keepends=True)
    for place in range(len(second)):
        flipped = bytearray(second)
        flipped[place] ^= flip
        path.write_bytes(first + flipped + third)
        events, cursor = read_from(path)
        read_back = [event.payload for event in events]
        # Without its end it is one line with the next one, which is lost with it.
        assert read_back == TURNS[0] + (TURNS[2] if place < len(second) - 1 else []), f"byte {place}"
        assert cursor.damage and cursor.epoch == 3


@pytest.mark.parametrize("byte", [b" ", b"\t", b"\n", b"\r", b"9", b'"', b",", b"}", b"\x00"])
def test_a_record_with_another_byte_anywhere_is_never_believed(tmp_path: Path, byte: bytes) -> None:
    path = tmp_path / "log"
    write(path, TURNS[:3]).close()
    first, second, third = path.read_bytes().splitlines(keepends=True)
    for place in range(len(second) - 1):
        if second[place : place + 1] != byte:
            path.write_bytes(first + second[:place] + byte + second[place + 1 :] + third)
            events, cursor = read_from(path)
            assert [e.payload for e in events] == TURNS[0] + TURNS[2], f"byte {place}"
            assert cursor.damage


def test_a_flipped_digit_of_an_epoch_fences_nobody(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, TURNS[:3], epoch=3).close()
    first, second, third = path.read_bytes().splitlines(keepends=True)
    raised = second.replace(b'"epoch": 3', b'"epoch": 7')
    path.write_bytes(first + raised + third)
    log = EventLog(path, 3, at(3))
    log.append(TURNS[3], at(3))
    log.close()
    events, cursor = read_from(path)
    assert [e.payload for e in events] == TURNS[0] + TURNS[2] + TURNS[3] and cursor.epoch == 3
    (damage,) = cursor.damage
    assert damage.startswith(f"{path} at byte {len(first)}: its checksum is wrong: ")


def test_records_without_a_checksum_are_read_as_before_and_written_on_with_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, TURNS[:3], epoch=2).close()
    whole = read_from(path)[0]
    unsealed(path)
    assert b"crc" not in path.read_bytes()
    assert read_from(path)[0] == whole and not read_from(path)[1].damage
    log = EventLog(path, 2, at(3))
    log.append(TURNS[3], at(3))
    log.close()
    assert payloads(path) == sum(TURNS[:4], [])
    assert [b'"crc"' in line for line in path.read_bytes().splitlines()] == [False] * 3 + [True]


# ---- more than one writer ----


def test_what_a_replaced_writer_still_writes_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "log"
    parts = []
    for number, epoch in enumerate((1, 2, 1, 2, 3, 2)):
        write(
            tmp_path / "one", [[AttemptResumed(1, number, None)]], epoch, 100.0 * (epoch == 1) + number
        ).close()
        parts.append((tmp_path / "one").read_bytes())
        (tmp_path / "one").unlink()
    path.write_bytes(b"".join(parts))
    events, cursor = read_from(path)
    assert [p.step for p in payloads(path) if isinstance(p, AttemptResumed)] == [0, 1, 3, 4]
    assert [e.seq for e in events] == [0, 1, 2, 3] and cursor.damage == ()
    assert (cursor.epoch, cursor.time, cursor.offset) == (3, WALL + 4, path.stat().st_size)
    for end in range(1, len(parts)):
        _, halfway = read_from(_cut(path, parts[:end]))
        path.write_bytes(b"".join(parts))
        assert read_from(path, halfway)[1] == cursor, "the epoch is kept between two reads"


def _cut(path: Path, parts: list[bytes]) -> Path:
    path.write_bytes(b"".join(parts))
    return path


def test_a_log_of_a_newer_controller_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, TURNS[:1], epoch=5).close()
    path.write_bytes(path.read_bytes() + b"torn")
    before = path.read_bytes()
    with pytest.raises(Fenced, match="controller 5, and this is 4"):
        EventLog(path, 4, at(9))
    assert path.read_bytes() == before, "a torn line is not this one's to cut off"
    EventLog(path, 5, at(9)).close()


def test_the_fence_is_asked_before_each_record(tmp_path: Path) -> None:
    replaced = False

    def fence() -> None:
        if replaced:
            raise Fenced("replaced")

    log = EventLog(tmp_path / "log", 1, at(0), fence)
    log.append(TURNS[0], at(0))
    replaced, before = True, ((tmp_path / "log").read_bytes(), log.cursor)
    with pytest.raises(Fenced, match="replaced"):
        log.append(TURNS[1], at(1))
    assert ((tmp_path / "log").read_bytes(), log.cursor) == before
    log.close()


def test_a_writer_that_finds_foreign_records_ends_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log"
    old = write(path, TURNS[:1], epoch=1)
    new = EventLog(path, 2, at(1))
    new.append([ControllerStarted(2, epoch=2)], at(1))
    before = path.read_bytes()
    with pytest.raises(Fenced, match="somebody else"):
        old.append(TURNS[1], at(2))
    assert path.read_bytes() == before
    new.append(TURNS[1], at(2))
    old.close()
    new.close()
    assert payloads(path) == [*TURNS[0], ControllerStarted(2, epoch=2), *TURNS[1]]


def test_a_writer_that_cuts_the_log_makes_the_other_one_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = write(path, TURNS[:2])
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(Fenced):
        log.append(TURNS[2], at(2))
    log.close()


def test_two_that_write_at_the_same_instant_destroy_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one has looked, the new one writes, and only then the old one does."""
    path = tmp_path / "log"
    old = write(path, TURNS[:1], epoch=1)
    new = EventLog(path, 2, at(1))
    write_bytes = os.write

    def late(fd: int, data: bytes) -> int:
        monkeypatch.undo()
        new.append([ControllerStarted(2, epoch=2)], at(1))
        return write_bytes(fd, data)

    monkeypatch.setattr(os, "write", late)
    old.append(TURNS[1], at(2))
    assert payloads(path) == [*TURNS[0], ControllerStarted(2, epoch=2)], (
        "what the old one wrote doesn't count"
    )
    assert path.read_bytes().count(b"\n") == 3, "and lies whole behind the new one's"
    assert new.append(TURNS[1], at(3))[0].seq == 3, "the newer one steps over it"
    with pytest.raises(Fenced):
        old.append(TURNS[2], at(4))
    old.close()
    new.close()
    assert payloads(path) == [*TURNS[0], ControllerStarted(2, epoch=2), *TURNS[1]]


# ---- the disk ----


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "log"
    log = write(path, TURNS[:1])
    before, cursor, write_bytes = path.read_bytes(), log.cursor, os.write
    calls = []

    def some(fd: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write_bytes(fd, data[:5])

    def refuse(fd: int) -> None:
        calls.append(fd)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, some if fails == "write" else refuse)
    with pytest.raises(OSError, match="No space left"):
        log.append(TURNS[1], at(1))
    monkeypatch.undo()
    assert calls and path.read_bytes() == before and log.cursor == cursor
    assert log.append(TURNS[1], at(2))[0].seq == 2
    log.close()
    assert payloads(path) == LIFE[:4]


def test_a_disk_that_takes_a_part_at_a_time_gets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write_bytes(fd, data[:7]))
    write(tmp_path / "log", TURNS).close()
    monkeypatch.undo()
    assert payloads(tmp_path / "log") == LIFE


# ---- the clock ----


def test_the_clock_goes_on_over_restarts_whatever_the_machine_counts_from(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log", 1, Instant(WALL, 5_000.0))
    log.append(TURNS[0], Instant(WALL + 10, 5_010.0))
    log.close()
    log = EventLog(tmp_path / "log", 2, Instant(WALL + 40, 3.0))
    assert log.clock(Instant(WALL + 40, 3.0)) == 40.0, "10 s before, and 30 s in which nobody ran"
    log.append(TURNS[1], Instant(WALL + 42, 5.0))
    log.close()
    assert [e.clock for e in read(tmp_path / "log")] == [10.0, 10.0, 42.0, 42.0]


@pytest.mark.parametrize("step", [-1e6, -30.0, 30.0, 1e6])
def test_a_wall_clock_that_steps_while_the_writer_lives_moves_no_timer(tmp_path: Path, step: float) -> None:
    log = EventLog(tmp_path / "log", 1, at(0))
    log.append(TURNS[0], at(1))
    log.append(TURNS[1], Instant(WALL + 2 + step, 2.0))
    log.append(TURNS[2], Instant(WALL + 3 + step, 3.0))
    assert log.clock(Instant(WALL + 4 + step, 4.0)) == 4.0
    log.close()
    assert [e.clock for e in read(tmp_path / "log")] == [1.0, 1.0, 2.0, 2.0, 3.0]
    assert read(tmp_path / "log")[-1].time == WALL + 3 + step, "what people see is the wall clock's"


def test_a_wall_clock_that_was_set_back_between_two_writers_adds_nothing(tmp_path: Path) -> None:
    write(tmp_path / "log", TURNS[:2]).close()
    log = EventLog(tmp_path / "log", 2, Instant(WALL - 1e6, 7.0))
    assert log.clock(Instant(WALL - 1e6, 7.0)) == 1.0
    log.append(TURNS[2], Instant(WALL - 1e6 + 5, 12.0))
    log.close()
    assert [e.clock for e in read(tmp_path / "log")] == [0.0, 0.0, 1.0, 1.0, 6.0]
    log = EventLog(tmp_path / "log", 3, Instant(WALL - 1e6 + 9, 0.0))
    assert log.clock(Instant(0.0, 0.0)) == 10.0, "and the next one counts from there"
    log.close()


def test_the_clock_never_goes_back(tmp_path: Path) -> None:
    log = write(tmp_path / "log", TURNS[:2], start=50.0)
    assert log.clock(Instant(0.0, 0.0)) == 0.0 == log.clock(at(50.0))
    log.close()
    again = EventLog(tmp_path / "log", 2, at(60.0))
    assert again.clock(Instant(0.0, 0.0)) == 10.0 == again.clock(at(60.0))
    again.close()


def test_other_logs_are_read_by_their_own_payloads(tmp_path: Path) -> None:
    def decode(tree: dict[str, Any]) -> Any:
        if tree["kind"] != "moved":
            raise ValueError("only moves")
        return tree["to"]

    write(tmp_path / "log", [[LIFE[1]], [LIFE[0]], [LIFE[2]]]).close()
    events, cursor = read_from(tmp_path / "log", decode=decode)
    assert [e.payload for e in events] == ["queued", "placing"] and "only moves" in cursor.damage[0]
    log = EventLog(tmp_path / "log", 1, at(3), decode=decode)
    assert [e.payload for e in log.events] == ["queued", "placing"]
    log.close()
