"""Exit records: whole or not at all, the first one stays, and writing never hurts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from faulttol import exits, steady_clock

pytestmark = [pytest.mark.unit, pytest.mark.timeout(20)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "00003.raised"
    assert exits.read(path) is None
    before = steady_clock.now()
    exits.write(path, ValueError("two\nlines " + "x" * 5000))
    told = exits.read(path)
    assert told is not None and told.error.startswith("ValueError: two lines xxx") and len(told.error) == 2000
    assert before <= told.time <= steady_clock.now() and not told.blames_peer
    assert [p.name for p in tmp_path.iterdir()] == ["00003.raised"], "nothing else is left"


def test_the_first_error_stays(tmp_path: Path) -> None:
    exits.write(tmp_path / "r", ValueError("first"))
    exits.write(tmp_path / "r", RuntimeError("Connection closed by peer"))
    exits.write_as_peers(tmp_path / "r", "a peer")
    told = exits.read(tmp_path / "r")
    assert told is not None and told.error == "ValueError: first"
    exits.remove(tmp_path / "r")
    exits.remove(tmp_path / "r")
    exits.write_as_peers(tmp_path / "r", "a peer was asked")
    told = exits.read(tmp_path / "r")
    assert told is not None and told.error == "a peer was asked" and told.blames_peer


def test_where_nothing_can_be_written_nothing_is_raised(tmp_path: Path) -> None:
    exits.write(tmp_path / "none" / "r", ValueError("mine"))
    (tmp_path / "r").mkdir()
    exits.write(tmp_path / "r", ValueError("mine"))
    assert exits.read(tmp_path / "r") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"time_ns": "x"}', b"\xff"])
def test_what_is_no_record_says_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r").write_bytes(content)
    assert exits.read(tmp_path / "r") is None


def test_a_wall_clock_that_is_set_changes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    before = steady_clock.now()
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= steady_clock.now() - before < 10
    assert abs(steady_clock.from_monotonic_ns(time.monotonic_ns()) - steady_clock.now()) < 10
