"""A file that is replaced at once: by several processes that write, where the disk refuses, and with which rights."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from configs.paths import default_home, write_whole

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

WRITERS, TIMES, LENGTH = 4, 150, 50_000


def _write(path: Path, mark: str) -> None:
    for _ in range(TIMES):
        write_whole(path, mark * LENGTH)


def test_processes_that_write_one_file_at_once_never_mix_their_texts(tmp_path: Path) -> None:
    path = tmp_path / "queue.json"
    path.write_text("a" * LENGTH)
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write, args=(path, mark)) for mark in "abcdefgh"[:WRITERS]]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        text = path.read_text()
        assert len(text) == LENGTH and len(set(text)) == 1, "one writer's text, whole"
        seen.add(text[0])
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * WRITERS, "no writer is in another's way"
    assert len(seen) > 1, "they did write at once"
    assert os.listdir(tmp_path) == ["queue.json"]


@pytest.mark.parametrize("fails", ["write", "replace"])
def test_a_disk_that_refuses_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "view.json"
    write_whole(path, "old")

    def full(*words: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "replace":
        monkeypatch.setattr(Path, "replace", full)
        text = "new"
    else:
        text = "new \ud800"  # no UTF-8 has it: what is written so far is a part
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_whole(path, text)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["view.json"]


def test_whoever_may_read_the_folder_may_read_the_file(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "queue.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "queue.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "spelled", ["{0}/real", "{0}/link", "{0}/link/../real", "{0}/./real/", "{0}/link/new", ""]
)
def test_a_home_has_one_path_however_it_is_spelled(
    tmp_path: Path, spelled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two paths would be two controllers, each of which believes that the other one has replaced it."""
    home = tmp_path.resolve()
    (home / "real").mkdir()
    (home / "link").symlink_to("real")
    (home / "loop").symlink_to("loop")
    monkeypatch.setenv("MEGARAY_HOME", spelled.format(home))
    monkeypatch.setenv("HOME", str(home / "link"))
    expected = {"": home / "real" / ".megaray", "{0}/link/new": home / "real" / "new"}
    assert default_home() == expected.get(spelled, home / "real")
    monkeypatch.chdir(home / "link")
    monkeypatch.setenv("MEGARAY_HOME", ".")
    assert default_home() == home / "real"
    monkeypatch.setenv("MEGARAY_HOME", str(home / "loop"))
    assert default_home() == home / "loop", "whoever makes it says that it can't be made"
