"""What is kept: the newest, every k-th, what has a name, what is read, and never less than one that is whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from configs.errors import UserError
from faulttol.checkpoint import retention
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder, folder_of
from faulttol.checkpoint.retention import (
    PruneCandidate,
    Retention,
    pin,
    pin_agreed,
    pins,
    plan,
    prune,
    read_lease,
    remove,
    unpin,
)
from faulttol.checkpoint.store import CheckpointStore
from tests.faulttol.ranks import save_all

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]
NOW = 1e9


@dataclass
class _Shelf:
    """Commits without files."""

    commits: list[CheckpointCommit]
    pins: dict[CheckpointCommit, list[str]] = field(default_factory=dict)
    torn: Sequence[CheckpointCommit] = ()
    uses: dict[CheckpointCommit, list[float]] = field(default_factory=dict)
    looked: list[CheckpointCommit] = field(default_factory=list)

    def whole(self, commit: CheckpointCommit) -> bool:
        self.looked.append(commit)
        return commit not in self.torn

    def lease_times(self, commit: CheckpointCommit) -> list[float]:
        return self.uses.get(commit, [])


def _commits(*steps: int, attempt: int = 1) -> list[CheckpointCommit]:
    return [CheckpointCommit(attempt, step, "run-1") for step in steps]


def _goes(shelf: _Shelf, rule: Retention, broken: Sequence[CheckpointCommit] = ()) -> list[int]:
    return [one.commit.step for one in plan(shelf, rule, NOW, broken)]


@pytest.mark.parametrize(
    ("rule", "goes"),
    [
        (Retention(1), [10, 20, 30, 40]),
        (Retention(2), [10, 20, 30]),
        (Retention(5), []),
        (Retention(9), []),
        (Retention(1, every=20), [10, 30]),
        (Retention(2, every=25), [10, 20, 30]),
        (Retention(2, every=1), []),
    ],
)
def test_the_newest_and_every_kth_stay(rule: Retention, goes: list[int]) -> None:
    assert _goes(_Shelf(_commits(10, 20, 30, 40, 50)), rule) == goes


def test_only_as_many_manifests_are_read_as_are_kept() -> None:
    shelf = _Shelf(_commits(*range(100)))
    plan(shelf, Retention(3), NOW)
    assert len(shelf.looked) == 3


def test_the_newest_attempt_counts_first_and_a_left_branch_goes() -> None:
    shelf = _Shelf(sorted([*_commits(40, 50, 60), *_commits(45, 50, attempt=2)]))
    doomed = plan(shelf, Retention(1, every=10), NOW)
    assert [(one.commit.attempt, one.commit.step) for one in doomed] == [(1, 50), (2, 45)]
    assert "attempt 2 has saved this step again" in doomed[0].why
    assert doomed[1].why == "older than the newest 1, and not a multiple of 10"


def test_what_is_pinned_or_read_stays() -> None:
    first, second, third, *_ = commits = _commits(10, 20, 30, 40, 50)
    shelf = _Shelf(commits, pins={first: ["best"]}, uses={second: [NOW - 3599], third: [NOW - 3601]})
    assert _goes(shelf, Retention(1)) == [30, 40]


def test_what_is_damaged_does_not_count_as_kept() -> None:
    """Else the only checkpoint that can be loaded would go."""
    commits = _commits(10, 20, 30, 40, 50)
    assert _goes(_Shelf(commits, torn=commits[3:]), Retention(1)) == [10, 20]
    assert _goes(_Shelf(commits), Retention(1), broken=commits[2:]) == [10]
    assert _goes(_Shelf(commits, torn=commits[1:]), Retention(2)) == []
    assert _goes(_Shelf(commits, torn=commits), Retention(1)) == []
    assert _goes(_Shelf([]), Retention(1)) == []


# ---- on a disk ----


def _steps(root: Path) -> list[int]:
    return [commit.step for commit in CheckpointFolder(CheckpointStore(str(root))).commits]


def test_what_a_run_keeps(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    for step in range(1, 9):
        save_all(tmp_path, step, world=1, keep=2, every=4)
        if step == 2:
            assert pin(store, 2, "first_good") == CheckpointCommit(1, 2, "run-1")
    assert _steps(tmp_path) == [2, 4, 7, 8]
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder_of(s) for s in (2, 4, 7, 8)]
    assert pins(store) == {CheckpointCommit(1, 2, "run-1"): ["first_good"]}
    unpin(store, 2, "first_good")
    assert prune(store, Retention(1)) == [
        PruneCandidate(CheckpointCommit(1, step, "run-1"), "older than the newest 1") for step in (2, 4, 7)
    ]
    assert [p.name for p in tmp_path.iterdir()] == [folder_of(8)]


def test_what_a_person_unpins_is_not_pinned_again_by_the_saves_that_follow(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    for step in (1, 2):
        save_all(tmp_path, step, keep=9)
    pin_agreed(store, 1)
    pin_agreed(store, 3)
    assert {commit.step: names for commit, names in pins(store).items()} == {1: ["agreed-1"]}, "3 isn't there"
    unpin(store, 1, "agreed-1")
    pin_agreed(store, 1)
    assert pins(store) == {}
    pin_agreed(store, 2)
    assert {commit.step: names for commit, names in pins(store).items()} == {2: ["agreed-2"]}, "a newer step"
    pin(store, 1, "agreed-1")
    assert len(pins(store)) == 2, "a person may pin it again"
    unpin(store, 1, "agreed-1")
    unpin(store, 2, "agreed-2")
    save_all(tmp_path, 3, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [folder_of(3)], "what says so goes with its step"


def test_pins_that_are_refused(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    save_all(tmp_path, 1)
    save_all(tmp_path, 2)
    for name in ("", "a.b", "a/b", "x" * 65, "ü"):
        with pytest.raises(UserError, match=f"can't be pinned as '{name}': type letters"):
            pin(store, 1, name)
    with pytest.raises(UserError, match="step 3 isn't a checkpoint of .*; the last are 1, 2"):
        pin(store, 3, "a")
    with pytest.raises(
        UserError, match="step 1 isn't a checkpoint of .*: name another run or folder, since it has none"
    ):
        pin(CheckpointStore(str(tmp_path / "empty")), 1, "a")
    pin(store, 1, "a")
    pin(store, 1, "a")
    with pytest.raises(UserError, match="the pin 'a' holds step 1 of .*: unpin it there first"):
        pin(store, 2, "a")
    with pytest.raises(UserError, match="step 2 of .* isn't pinned as 'a'"):
        unpin(store, 2, "a")


def test_a_reader_keeps_what_it_reads_and_leaves_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(str(tmp_path))
    save_all(tmp_path, 1)
    save_all(tmp_path, 2)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    commit = CheckpointCommit(1, 1, "run-1")
    with read_lease(store, commit):
        assert prune(store, Retention(1)) == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    store.write(f"{commit.prefix}use-dead", [repr(time.time() - retention.LEASE_SECONDS - 1).encode()])
    store.write(f"{commit.prefix}use-torn", [b""])
    assert [one.commit for one in prune(store, Retention(1))] == [commit], "what a killed reader left"
    assert not (tmp_path / folder_of(1)).exists()


def test_a_lease_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_RENEW_SECONDS", 0.01)
    store, commit = CheckpointStore(str(tmp_path)), CheckpointCommit(1, 1, "run-1")
    save_all(tmp_path, 1)
    with read_lease(store, commit):
        (first,) = CheckpointFolder(store).lease_times(commit)
        while CheckpointFolder(store).lease_times(commit) in ([first], []):
            time.sleep(0.001)


def test_a_folder_that_may_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_all(tmp_path, 1)

    def refuse(self: CheckpointStore, name: str, chunks: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(CheckpointStore, "write", refuse)
    with read_lease(CheckpointStore(str(tmp_path)), CheckpointCommit(1, 1, "run-1")):
        assert _steps(tmp_path) == [1]


def test_a_pin_that_comes_after_the_plan_counts(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    for step in (1, 2, 3):
        save_all(tmp_path, step, keep=3)
    doomed = plan(CheckpointFolder(store), Retention(1), time.time())
    pin(store, 1, "late")
    assert [one.commit.step for one in remove(store, doomed)] == [2] and _steps(tmp_path) == [1, 3]


def test_the_only_whole_one_is_never_removed_whatever_is_asked(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    for step in (1, 2, 3):
        save_all(tmp_path, step, keep=3)
    (tmp_path / CheckpointCommit(1, 3, "run-1").manifest).write_bytes(b"torn")
    every = [PruneCandidate(commit, "asked for") for commit in CheckpointFolder(store).commits]
    assert [one.commit.step for one in remove(store, every)] == [1, 3] and _steps(tmp_path) == [2]


def test_a_removal_that_is_broken_off_leaves_no_manifest_without_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every place where it can stop, what has a manifest is whole, and the next removal ends the work."""
    calls, act = 0, CheckpointStore.remove
    while True:
        root, left = tmp_path / str(calls), [calls]
        for step in (1, 2, 3, 4):
            save_all(root, step, world=1, keep=9)
        (root / folder_of(1) / "notes.txt").write_text("not ours")

        def stop(self: CheckpointStore, name: str, left: list[int] = left) -> None:
            if not left[0]:
                raise OSError(5, "killed here")
            left[0] -= 1
            act(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(CheckpointStore, "remove", stop)
            try:
                prune(CheckpointStore(str(root)), Retention(1))
                ended = True
            except OSError:
                ended = False
        folder = CheckpointFolder(CheckpointStore(str(root)))
        assert folder.commits[-1].step == 4 and all(folder.whole(commit) for commit in folder.commits)
        save_all(root, 5, world=1, keep=1)
        assert [
            str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and folder_of(5) not in str(p)
        ] == [f"{folder_of(1)}/notes.txt"]
        if ended:
            break
        calls += 1
    assert calls > 5
