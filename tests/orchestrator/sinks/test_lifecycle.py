"""Sinks that aren't there, or don't last: when they are looked for again, and made anew."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from orchestrator.sinks.lifecycle import (
    FORGOTTEN_SECONDS,
    LONGEST_SECONDS,
    TRIES,
    SinkCheckSchedule,
    run_sink,
    temporary_files,
)

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


class Sink:
    """Raises where it is to; ends after some pumps."""

    def __init__(self, pumps: int = 3, fails_at: int = -1) -> None:
        self.pumps, self.fails_at, self.closed = pumps, fails_at, False

    def pump(self) -> bool:
        self.pumps, self.fails_at = self.pumps - 1, self.fails_at - 1
        if self.fails_at == -1:
            raise OSError(28, "No space left on device")
        return self.pumps <= 0

    def close(self) -> None:
        self.closed = True


def test_a_sink_is_looked_for_in_the_first_turn_and_ever_more_rarely_after_it() -> None:
    starts = SinkCheckSchedule()
    looks = [now for now in range(4000) if starts.due("a", float(now))]
    assert looks[:4] == [0, 5, 15, 35]
    assert {b - a for a, b in zip(looks[-4:], looks[-3:], strict=False)} == {LONGEST_SECONDS}
    assert starts.due("b", 4000.0), "each run by itself"


def test_a_run_that_comes_back_is_looked_at_at_once() -> None:
    """Its old sink may just have ended with the attempt before the resume."""
    starts = SinkCheckSchedule()
    for now in range(100):
        starts.due("a", float(now))
    assert not starts.due("a", 100.0)
    assert starts.due("a", 100.0 + FORGOTTEN_SECONDS)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TMPDIR", raising=False)
    return tmp_path


def test_what_a_killed_sink_left_goes_when_the_run_has_another(temporary: Path) -> None:
    with temporary_files("/home/runs/a"):
        (folder,) = temporary.iterdir()
        assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(folder), "of its children too"
        assert len(folder.name) < 30, "a socket's path is short"
    assert not list(temporary.iterdir()) and "TMPDIR" not in os.environ and tempfile.tempdir == str(temporary)
    folder.mkdir()
    (folder / "picture.png").touch()  # it was killed
    with temporary_files("/home/runs/b"):
        assert len(list(temporary.iterdir())) == 2, "each run has its own"
    with temporary_files("/home/runs/a"):
        assert list(temporary.iterdir()) == [folder] and not list(folder.iterdir())
    assert not list(temporary.iterdir())


def test_a_folder_that_is_anothers_is_left_alone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.sinks.lifecycle.shutil.rmtree", lambda *_, **__: None)
    with temporary_files("/home/runs/a"):
        (folder,) = temporary.iterdir()
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        with temporary_files("/home/runs/a"):
            assert tempfile.gettempdir() == str(temporary)
    assert folder.exists()


def test_a_sink_that_raises_is_made_anew_and_closed() -> None:
    made = [Sink(fails_at=2), Sink(fails_at=0), Sink()]
    left, waits = list(made), list[float]()
    run_sink(lambda: left.pop(0), waits.append)
    assert not left and all(sink.closed for sink in made)
    assert waits == [1.0, 1.0, 5.0, 10.0, 1.0, 1.0], "and the files are read once a second"


def test_a_sink_that_can_not_be_made_is_given_up() -> None:
    """Its actor leaves then: one that idled would be taken for one that works."""
    waits: list[float] = []

    def broken() -> Sink:
        raise PermissionError(13, "Permission denied")

    run_sink(broken, waits.append)
    assert len(waits) == TRIES and waits[0] < waits[1] and max(waits) == LONGEST_SECONDS
