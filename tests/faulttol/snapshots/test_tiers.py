"""From which of several places a run begins, and what it may not pass over."""

from __future__ import annotations

from pathlib import Path

import pytest

from faulttol.checkpoint.folder import folder_of
from faulttol.checkpoint.load import Restored, Tier, newest, restore
from faulttol.checkpoint.manifest import Incomplete
from faulttol.checkpoint.store import CheckpointStore
from tests.faulttol.ranks import ThreadPeers, identity, save_all, together

torch = pytest.importorskip("torch")
from faulttol.checkpoint.pieces import LoadTarget  # noqa: E402
from tests.faulttol.tensors import Layout, blank, equal, flat_bytes  # noqa: E402

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


def _tiers(*places: tuple[str, object, bool, int | None]) -> list[Tier]:
    return [Tier(name, CheckpointStore(str(root)), owner, step) for name, root, owner, step in places]


def _from(tiers: list[Tier], parts: Layout, attempt: int = 3) -> list[Restored | None | Exception]:
    def one(rank: int, peers: ThreadPeers) -> Restored | None:
        wanted = [LoadTarget.from_slice(p.name, p.tensor, p.box) for p in parts[rank]]
        head = newest(tiers, peers)
        found = restore(tiers, wanted, peers, identity(rank, len(parts), attempt=attempt))
        assert found is None or head is None or found.passed or head.step == found.step
        return found

    return together(len(parts), one)


def _taken(tiers: list[Tier], step: int, name: str) -> tuple[str, ...]:
    parts = flat_bytes(2, step, 3)
    there = blank(parts)
    answers = _from(tiers, there)
    assert all(isinstance(a, Restored) and (a.step, a.tier) == (step, name) for a in answers), answers
    assert equal(there, parts)
    (passed,) = {a.passed for a in answers if isinstance(a, Restored)}
    return passed


def test_the_newest_of_all_tiers_is_taken_and_the_first_at_equal_ones(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    both = _tiers(("memory", fast, True, None), ("store", slow, True, None))
    save_all(slow, 10)
    assert _taken(both, 10, "store") == ()
    save_all(fast, 10)
    assert _taken(both, 10, "memory") == ()
    save_all(fast, 12)
    assert _taken(both, 12, "memory") == ()
    save_all(slow, 11, attempt=2)
    assert _taken(both, 11, "store") == (), "the newest attempt comes before the highest step"


def test_a_tier_that_is_damaged_or_gone_is_passed_over(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    both = _tiers(("memory", fast, True, None), ("store", slow, True, None))
    for root, step in ((slow, 10), (slow, 20), (fast, 20), (fast, 25)):
        save_all(root, step)
    for path in (fast / folder_of(25)).glob("*.r00001.*"):
        path.write_bytes(b"")
    (passed,) = _taken(both, 20, "memory")
    assert passed.startswith("step 25 in memory: ") and "is truncated" in passed
    for path in (fast / folder_of(20)).glob("*.r00000.*"):
        path.unlink()
    assert [why.split(":")[0] for why in _taken(both, 20, "store")] == [
        "step 25 in memory",
        "step 20 in memory",
    ]


def test_a_tier_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    save_all(slow, 10)
    names = CheckpointStore.names

    def refuse(self: CheckpointStore, folder: str = "") -> list[str]:
        if "fast" in self.url:
            raise OSError(5, "Input/output error")
        return names(self, folder)

    monkeypatch.setattr(CheckpointStore, "names", refuse)
    both = _tiers(("memory", fast, True, None), ("store", slow, True, None))
    (passed,) = _taken(both, 10, "store")
    assert "memory" in passed and "can't be listed" in passed and "Input/output error" in passed
    answers = _from([both[0], *_tiers(("another run", slow, False, None))], blank(flat_bytes(2, 10, 3)))
    assert all(isinstance(a, Incomplete) and "can't be listed" in str(a) for a in answers), (
        "what can't be listed may hold the run's own"
    )


def test_another_runs_checkpoint_is_read_where_the_run_has_none(tmp_path: Path) -> None:
    other, own = tmp_path / "other", tmp_path / "own"
    for step in (10, 20):
        save_all(other, step, run="run-2", attempt=7)
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    both = _tiers(("store", own, True, None), ("another run", other, False, None))
    assert _taken(both, 20, "another run") == ()
    assert (
        _taken(_tiers(("store", own, True, None), ("another run", other, False, 10)), 10, "another run") == ()
    )
    assert {path: path.stat().st_mtime_ns for path in other.rglob("*")} == before, "nothing was written there"
    save_all(own, 5)
    assert _taken(both, 5, "store") == (), "its own come first, however few steps they have"
    for path in (own / folder_of(5)).glob("*.r00001.*"):
        path.write_bytes(b"")
    answers = _from(both, blank(flat_bytes(2, 5, 3)))
    assert all(isinstance(a, Incomplete) for a in answers), "its own are never left for another's in silence"


def test_a_step_that_is_not_there_is_a_users_mistake(tmp_path: Path) -> None:
    for step in (10, 20):
        save_all(tmp_path, step, run="run-2")
    tiers = _tiers(("store", tmp_path / "own", True, None), ("another run", tmp_path, False, 15))
    told = {str(answer) for answer in _from(tiers, blank(flat_bytes(2, 10, 3)))}
    (text,) = told
    assert f"resume='{tmp_path}/{folder_of(15)}' isn't a committed checkpoint" in text
    assert "the last steps there are 10, 20; name one of them" in text
