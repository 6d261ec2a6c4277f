"""The ring: what is written survives its writer, and what is half written isn't believed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from faulttol import recorder
from faulttol.recorder import PhaseMark, RankPhase, Recorder

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

_ENDLESS = """
import sys
from pathlib import Path
from faulttol.recorder import RankPhase, Recorder
ring = Recorder(Path(sys.argv[1]), rank=7, capacity=int(sys.argv[2]))
step = 0
while True:
    ring.begin(RankPhase.FORWARD, step)
    ring.end(RankPhase.FORWARD, step)
    step += 1
    ring.step(step)
    if step == 1000:
        print("under way", flush=True)
"""


def _endless(path: Path, capacity: int) -> subprocess.Popen[str]:
    """A process that writes records as fast as it can; returns when the ring has wrapped."""
    child = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(path), str(capacity)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "under way\n"
    return child


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def _is_consistent(record: recorder.Record) -> bool:
    """The endless writer's marks follow from the sequence number; a mix of two records breaks this."""
    step, place = divmod(record.sequence - 1, 3)
    return record.mark == place and record.step == step + (place == 2)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "made" / "00003.ring"
    ring = Recorder(path, rank=3, capacity=8)
    ring.begin(RankPhase.CHECKPOINT, 41)
    ring.end(RankPhase.CHECKPOINT, 41)
    ring.step(1 << 40)
    found = recorder.read(path)
    assert [(r.sequence, r.mark, r.phase, r.step) for r in found] == [
        (1, PhaseMark.BEGIN, RankPhase.CHECKPOINT, 41),
        (2, PhaseMark.END, RankPhase.CHECKPOINT, 41),
        (3, PhaseMark.STEP, RankPhase.START, 1 << 40),
    ]
    assert found[0].time <= found[1].time <= found[2].time
    assert recorder.newest(path) == found[-1]
    assert recorder.read(path, after=2) == found[2:]
    ring.close()
    assert recorder.read(path) == found


def test_every_phase_and_mark_comes_back(tmp_path: Path) -> None:
    ring = Recorder(tmp_path / "r", rank=0, capacity=64)
    for phase in RankPhase:
        ring.begin(phase, 5)
        ring.end(phase, 5)
    told = [(r.phase, r.mark) for r in recorder.read(tmp_path / "r")]
    assert told == [(phase, mark) for phase in RankPhase for mark in (PhaseMark.BEGIN, PhaseMark.END)]


def test_the_ring_wraps_and_keeps_the_newest(tmp_path: Path) -> None:
    ring = Recorder(tmp_path / "r", rank=0, capacity=4)
    for step in range(1, 11):
        ring.step(step)
    assert [r.sequence for r in recorder.read(tmp_path / "r")] == [7, 8, 9, 10]
    assert [r.sequence for r in recorder.read(tmp_path / "r", after=8)] == [9, 10]
    assert recorder.read(tmp_path / "r", after=10) == []


def test_a_new_recorder_starts_afresh(tmp_path: Path) -> None:
    Recorder(tmp_path / "r", rank=0).step(1)
    Recorder(tmp_path / "r", rank=0, capacity=2)
    assert recorder.read(tmp_path / "r") == [] and recorder.newest(tmp_path / "r") is None


@pytest.mark.parametrize("content", [None, b"", b"MEGARAY2", b"x" * 500, b"MEGARAY2" + bytes(56)])
def test_a_file_that_is_no_ring_has_no_records(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "r"
    if content is not None:
        path.write_bytes(content)
    assert recorder.read(path) == [] and recorder.newest(path) is None


def test_a_folder_in_its_place_has_no_records(tmp_path: Path) -> None:
    assert recorder.read(tmp_path) == [] and recorder.newest(tmp_path) is None


def test_a_ring_cut_short_gives_what_is_left(tmp_path: Path) -> None:
    ring = Recorder(tmp_path / "r", rank=0, capacity=4)
    for step in range(4):
        ring.step(step)
    ring.close()
    os.truncate(tmp_path / "r", 64 + 2 * 32 + 10)
    assert [r.sequence for r in recorder.read(tmp_path / "r")] == [1, 2]


@pytest.mark.parametrize("word", range(4))
def test_a_torn_record_is_not_believed(tmp_path: Path, word: int) -> None:
    """Whichever word of the newest record still has its old value, the one before is the newest."""
    path = tmp_path / "r"
    ring = Recorder(path, rank=0, capacity=4)
    for step in range(4):
        ring.begin(RankPhase.DATA, step)
    old = path.read_bytes()
    ring.begin(RankPhase.FORWARD, 4)  # overwrites the first slot
    ring.close()
    data = bytearray(path.read_bytes())
    at = 64 + 8 * word
    assert data[at : at + 8] != old[at : at + 8]
    data[at : at + 8] = old[at : at + 8]
    path.write_bytes(data)
    assert [r.sequence for r in recorder.read(path)] == [2, 3, 4]
    last = recorder.newest(path)
    assert last is not None and last.sequence == 4


def test_a_killed_writer_leaves_its_last_records(tmp_path: Path) -> None:
    path = tmp_path / "r"
    child = _endless(path, 64)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    _end(child)
    found = recorder.read(path)
    # The one slot that it was killed in may be torn.
    assert len(found) >= 63 and all(_is_consistent(record) for record in found)
    assert recorder.newest(path) == found[-1]


def test_a_stopped_writer_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "r"
    child = _endless(path, 64)
    try:
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        first, second = recorder.newest(path), recorder.newest(path)
        assert first is not None and first == second and _is_consistent(first)
    finally:
        _end(child)


def test_reading_while_it_is_written(tmp_path: Path) -> None:
    """With a ring of four records the reader is overtaken all the time."""
    path = tmp_path / "r"
    child = _endless(path, 4)
    try:
        last = 0
        for _ in range(3000):
            record = recorder.newest(path)
            if record is not None:
                assert _is_consistent(record)
                last = max(last, record.sequence)
            assert all(_is_consistent(r) for r in recorder.read(path))
        assert last > 3000
    finally:
        _end(child)


def test_no_room_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Recorder(tmp_path / "r", rank=0)


def test_the_benchmark_writes_a_ratio() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "faulttol.bench_recorder"], capture_output=True, text=True, check=True
    )
    assert "ns a record" in done.stdout and "ratio" in done.stdout
