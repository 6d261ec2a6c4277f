"""Metric lines: however long, however torn, read right."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from configs import metrics
from configs.metrics import (
    EndedLine,
    MetricWriter,
    SavedLine,
    StepLine,
    StoppedLine,
    last_step,
    read_all,
    read_from,
)

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def _step(step: int, experts: int = 2, layers: int = 1) -> StepLine:
    return StepLine(
        time=1.0, attempt=1, step=step, loss=2.0, aux_loss=0.0, lr=1e-3, grad_norm=1.0, tokens=8, tokens_per_second=1.0,
        step_seconds=1.0, phase_seconds={}, mfu=None, expert_load=[[123_456_789] * experts for _ in range(layers)],
        balance_entropy=1.0, dropped=0, memory_bytes=1,
    )  # fmt: skip


def _written(path: Path, *lines: metrics.MetricLine) -> Path:
    writer = MetricWriter(path)
    for line in lines:
        writer.write(line)
    writer.close()
    return path


@pytest.mark.parametrize("layers", [58, 500], ids=["DeepSeek-V3", "beyond a MiB"])
def test_a_long_line_is_a_line(tmp_path: Path, layers: int) -> None:
    lines = [_step(number, 256, layers) for number in (1, 2, 3)]
    path = _written(tmp_path / "m", *lines)
    assert path.stat().st_size / 3 > (1 << 20 if layers == 500 else 1 << 17)
    assert last_step(path) == lines[-1]
    assert list(read_all(path)) == lines
    found, offset = read_from(path, 0, limit=1000)
    assert found == lines[:1] and read_from(path, offset, limit=1000)[0] == lines[1:2]


def test_the_newest_step_is_found_behind_lines_of_other_kinds(tmp_path: Path) -> None:
    saves = [SavedLine(1.0, 1, step, "x" * 4000, 1, 1.0) for step in range(100)]
    path = _written(tmp_path / "m", _step(1), _step(2), *saves)
    assert path.stat().st_size > 3 * (1 << 17)
    assert last_step(path) == _step(2)
    assert last_step(_written(tmp_path / "n", *saves)) is None
    assert last_step(tmp_path / "none") is None and read_from(tmp_path / "none", 7) == ([], 7)


def test_a_torn_line_in_the_middle_is_stepped_over_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _written(tmp_path / "m", _step(1))
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"kind": "step", "time": 1.0, "att')  # its writer died here
    assert read_from(path, 0) == ([_step(1)], size), "a torn last line stays for the next call"
    _written(path, _step(2), StoppedLine(1.0, 1, 2, True))
    with caplog.at_level(logging.WARNING):
        found, offset = read_from(path, 0)
    assert found == [_step(1), _step(2), StoppedLine(1.0, 1, 2, True)] and offset == path.stat().st_size
    assert [r.getMessage() for r in caplog.records] and f"byte {size}: stepped over" in caplog.records[
        0
    ].getMessage()
    assert last_step(path) == _step(2)


@pytest.mark.parametrize(
    "row",
    [
        b"[]",
        b"7",
        b'{"kind": "later"}',
        b'{"kind": "ended", "new": 1}',
        b"\x00\xff\x00",
        b"[" * 50_000 + b"]" * 50_000,
    ],
)
def test_a_line_of_another_version_is_stepped_over(tmp_path: Path, row: bytes) -> None:
    path = tmp_path / "m"
    path.write_bytes(row + b"\n")
    _written(path, _step(3))
    assert read_from(path, 0)[0] == [_step(3)] and last_step(path) == _step(3)


def test_a_file_without_lines_is_stepped_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_LONGEST", 1000)
    path = tmp_path / "m"
    path.write_bytes(b"\0" * 1500)
    _written(path, _step(4))
    assert list(read_all(path)) == [_step(4)]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:7])))
    path = _written(tmp_path / "m", _step(1), _step(2))
    assert list(read_all(path)) == [_step(1), _step(2)]


def test_on_a_full_disk_lines_wait_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = os.write, [20, 0]

    def full(fd: int, data: bytes) -> int:
        if not room:
            return write(fd, data)
        left = room.pop(0)
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, bytes(data[:left]))

    monkeypatch.setattr(os, "write", full)
    path, ended = tmp_path / "m", EndedLine(1.0, 1, 2, 2.0, 8)
    writer = MetricWriter(path)
    writer.write(_step(1))
    assert path.stat().st_size == 20 and read_from(path, 0) == ([], 0)
    writer.write(ended)
    writer.close()
    assert list(read_all(path)) == [_step(1), ended]


def test_what_the_file_never_takes_is_told_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(metrics, "_WAITS", (0.0,))
    writer = MetricWriter(tmp_path / "m")
    writer.write(_step(1))
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    monkeypatch.setattr(metrics, "_PENDING", 2000)
    with pytest.raises(OSError, match="No space left"):
        for number in range(100):
            writer.write(_step(number))
