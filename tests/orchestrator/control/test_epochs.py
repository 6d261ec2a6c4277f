"""Controllers of one home, one after the other: each has a number of its own, and the newest owns the home."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.paths import HomePaths
from orchestrator.control import epochs
from orchestrator.control.epochs import STALE_SECONDS, Epoch, claim, recorded_epochs
from orchestrator.record.log import Fenced

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


@pytest.fixture
def home(tmp_path: Path) -> HomePaths:
    return HomePaths(tmp_path / "home of mine")


@pytest.fixture(autouse=True)
def one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Homes whose first controller is number 1."""
    monkeypatch.setattr(epochs, "_first", lambda: 1)


def file_of(epoch: Epoch) -> Path:
    return epoch.folder / f"{epoch.number:08d}"


def fenced(epoch: Epoch) -> bool:
    try:
        epoch.check()
    except Fenced:
        return True
    return False


def test_controllers_are_counted_and_the_newest_owns_the_home(home: HomePaths) -> None:
    first = claim(home, "ray-a")
    assert first.number == 1 and not fenced(first)
    second = claim(home, "ray-a")
    assert second.number == 2 and not fenced(second)
    with pytest.raises(Fenced, match="controller 1 was replaced"):
        first.check()
    third = claim(home, "ray-a")
    assert [fenced(epoch) for epoch in (first, second, third)] == [True, True, False]
    assert recorded_epochs(home.epochs) == [1, 2, 3]


def test_a_controller_says_who_it_is(home: HomePaths) -> None:
    record = json.loads(file_of(claim(home, "ray-a", actor="abc")).read_text())
    assert record == {"cluster": "ray-a", "pid": os.getpid(), "host": socket.gethostname(), "actor": "abc"}


def test_a_controller_knows_whether_its_own_next_process_has_replaced_it(home: HomePaths) -> None:
    first = claim(home, "ray-a", actor="abc")
    second = claim(home, "ray-a", actor="abc")
    assert fenced(first) and not first.superseded_by_other() and not second.superseded_by_other()
    third = claim(home, "ray-a", actor="def")
    assert first.superseded_by_other() and second.superseded_by_other() and not third.superseded_by_other()
    file_of(third).write_text("{")
    assert not first.superseded_by_other(), "what isn't known ends nobody for good"


def test_controllers_that_begin_at_once_get_numbers_of_their_own(home: HomePaths) -> None:
    begun, taken, count = threading.Barrier(8), [], 8

    def begin() -> None:
        begun.wait()
        for _ in range(4):
            taken.append(claim(home, "ray-a"))

    threads = [threading.Thread(target=begin) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({epoch.number for epoch in taken}) == len(taken) == 4 * count
    assert [epoch.number for epoch in taken if not fenced(epoch)] == [recorded_epochs(home.epochs)[-1]]


def test_one_that_loses_the_race_for_a_number_looks_again(
    home: HomePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, real = claim(home, "ray-a"), recorded_epochs
    stale: list[list[int]] = [[], []]
    monkeypatch.setattr(epochs, "recorded_epochs", lambda folder: stale.pop() if stale else real(folder))
    assert claim(home, "ray-a").number == 2 and fenced(first) and not stale
    stale = [[]]
    with pytest.raises(UserError, match="another Ray cluster"):
        claim(home, "ray-b")


def test_one_that_sleeps_while_it_looks_gets_no_number_that_was_taken_before(
    home: HomePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, real = [claim(home, "ray-a") for _ in range(40)], recorded_epochs
    stale: list[list[int]] = [[5]]
    monkeypatch.setattr(epochs, "recorded_epochs", lambda folder: stale.pop() if stale else real(folder))
    late = claim(home, "ray-a")
    assert late.number == 41 and not fenced(late)
    assert all(fenced(epoch) for epoch in taken)


def test_a_home_that_is_made_anew_continues_above_the_numbers_of_the_old_one(
    home: HomePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agents outlive the folder, and refuse whoever comes below the highest number that they have heard of."""
    monkeypatch.undo()
    before = int(time.time())
    old = [claim(home, "ray-a") for _ in range(3)][-1]
    assert before + 2 <= old.number <= int(time.time()) + 2
    shutil.rmtree(home.home)
    monkeypatch.setattr(epochs.time, "time", lambda: before + 60.0)
    assert claim(home, "ray-a").number > old.number and fenced(old)


def test_two_that_begin_a_home_at_once_with_numbers_apart_are_ordered(
    home: HomePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else neither would find the number after its own taken."""
    firsts, real = [9, 5], recorded_epochs
    monkeypatch.setattr(epochs, "_first", firsts.pop)
    one = claim(home, "ray-a")
    stale: list[list[int]] = [[]]
    monkeypatch.setattr(epochs, "recorded_epochs", lambda folder: stale.pop() if stale else real(folder))
    other = claim(home, "ray-a")
    assert (one.number, other.number, firsts) == (5, 6, [])
    assert fenced(one) and not fenced(other) and recorded_epochs(home.epochs) == [5, 6]


# ---- another cluster ----


def test_a_home_that_another_cluster_serves_is_refused_with_who_does(home: HomePaths) -> None:
    holder = claim(home, "ray-a")
    with pytest.raises(UserError) as refused:
        claim(home, "ray-b")
    for told in (
        str(home.home),
        f"process {os.getpid()} ",
        socket.gethostname(),
        "set MEGARAY_HOME to another folder",
    ):
        assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert recorded_epochs(home.epochs) == [1] and not fenced(holder), "and nothing is taken from it"


def test_a_controller_of_another_cluster_is_replaced_once_it_is_silent(home: HomePaths) -> None:
    holder = claim(home, "ray-a")
    looked: list[Path] = []

    def age(seconds: float) -> Callable[[Path], float]:
        def of(path: Path) -> float:
            looked.append(path)
            return seconds

        return of

    with pytest.raises(UserError):
        claim(home, "ray-b", age(STALE_SECONDS - 0.1))
    assert claim(home, "ray-b", age(STALE_SECONDS)).number == 2 and fenced(holder)
    assert set(looked) == {file_of(holder)}
    with pytest.raises(UserError):
        claim(home, "ray-a", age(0.0))
    assert claim(home, "ray-b", age(0.0)).number == 3, "its own is replaced at once"


def test_a_beat_keeps_the_home(home: HomePaths) -> None:
    holder = claim(home, "ray-a")
    before = os.stat(file_of(holder)).st_mtime - STALE_SECONDS - 5
    os.utime(file_of(holder), (before, before))
    holder.beat()
    with pytest.raises(UserError, match="another Ray cluster"):
        claim(home, "ray-b")
    os.utime(file_of(holder), (before, before))
    assert claim(home, "ray-b").number == 2
    holder.beat()
    with pytest.raises(UserError, match="another Ray cluster"):
        claim(home, "ray-a")


def test_a_beat_that_the_disk_refuses_is_let_pass(home: HomePaths) -> None:
    holder = claim(home, "ray-a")
    file_of(holder).unlink()
    holder.beat()
    assert not file_of(holder).exists(), "a beat makes nobody the owner"


@pytest.mark.parametrize("left", ["", "{", '{"cluster": "ray-a"', "\x00\x00"])
def test_one_that_died_while_it_began_holds_nothing(home: HomePaths, left: str) -> None:
    home.epochs.mkdir(parents=True)
    (home.epochs / "00000001").write_text(left)
    assert claim(home, "ray-b").number == 2


# ---- files ----


def test_few_files_are_kept_and_a_controller_older_than_all_is_fenced_still(home: HomePaths) -> None:
    """One that slept for a day finds neither its own file nor the next one's."""
    taken = [claim(home, "ray-a") for _ in range(40)]
    assert recorded_epochs(home.epochs) == list(range(25, 41))
    assert [epoch.number for epoch in taken if not fenced(epoch)] == [40]
    assert claim(home, "ray-a").number == 41


def test_other_files_are_no_epochs(home: HomePaths) -> None:
    claim(home, "ray-a")
    for name in ("00000007.tmp", ".nfs0001", "README"):
        (home.epochs / name).write_text("")
    assert recorded_epochs(home.epochs) == [1] and claim(home, "ray-a").number == 2
    assert (home.epochs / "README").exists()


def test_a_home_that_can_not_be_written_is_told_in_one_line(home: HomePaths) -> None:
    home.home.parent.mkdir(parents=True, exist_ok=True)
    home.home.write_text("a file")
    with pytest.raises(
        UserError, match=r"^MEGARAY_HOME=.* can't be written \(.+\); set it to a folder"
    ) as told:
        claim(home, "ray-a")
    assert "\n" not in str(told.value)


def test_a_full_disk_takes_no_home_over(home: HomePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = claim(home, "ray-a")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="No space left on device"):
        claim(home, "ray-a")
    monkeypatch.undo()
    assert not fenced(holder)
