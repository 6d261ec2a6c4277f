"""A checkpoint is whole or doesn't exist, and what is loaded is what was saved."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from faulttol.checkpoint import load as loading
from faulttol.checkpoint import manifest
from faulttol.checkpoint import save as saving
from faulttol.checkpoint.manifest import Entry, Incomplete, Manifest, ShardFile
from faulttol.checkpoint.peers import Alone
from faulttol.checkpoint.pieces import Shard
from faulttol.checkpoint.save import Saved, save
from faulttol.checkpoint.store import Store
from tests.faulttol.ranks import LAYOUT, piece, same, shard, together

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def _save(root: Path, step: int, world: int = 2, keep: int = 2) -> list[Saved | Exception]:
    return together(world, lambda rank, peers: save(str(root), step, shard(rank, world, step), peers, keep))


def _restore(root: Path, world: int = 2) -> list[tuple[int | None, Shard | None, list[str]] | Exception]:
    return together(world, lambda rank, peers: loading.restore(str(root), LAYOUT, rank, peers))


def _only(root: Path, step: int, pattern: str) -> Path:
    (found,) = (root / loading.folder_of(step)).glob(pattern)
    return found


def _spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ---- saving and loading ----


@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_rank_gets_back_what_it_saved(tmp_path: Path, world: int) -> None:
    answers = _save(tmp_path, 30, world)
    assert all(isinstance(a, Saved) and a.step == 30 and a.bytes > 1000 * world for a in answers)
    assert {a.path for a in answers if isinstance(a, Saved)} == {f"{tmp_path}/step-0000000030"}
    for rank in range(world):
        assert same(loading.load(str(tmp_path), 30, LAYOUT, rank), shard(rank, world, 30))


def test_one_rank_needs_no_peers(tmp_path: Path) -> None:
    assert save(str(tmp_path), 1, shard(0, 1, 1), Alone(), keep=1).step == 1
    step, found, passed = loading.restore(str(tmp_path), LAYOUT, 0, Alone())
    assert step == 1 and found is not None and same(found, shard(0, 1, 1)) and passed == []


def test_pieces_are_aligned(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    found = loading.manifest_of(Store(str(tmp_path)), 1)
    assert all(entry.offset % 64 == 0 for file in found.shards for entry in file.entries)


def test_the_manifest_is_json_with_a_format(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    tree = json.loads(_only(tmp_path, 1, "manifest.json").read_text())
    assert tree["format"] == manifest.FORMAT and tree["layout"] == LAYOUT and tree["step"] == 1
    assert tree["scalars"] == {"loss": 1 / 7, "run": "r"}


def test_nothing_was_saved_yet(tmp_path: Path) -> None:
    assert _restore(tmp_path / "none") == [(None, None, [])] * 2


def test_the_newest_is_found_by_its_manifest(tmp_path: Path) -> None:
    _save(tmp_path, 9, keep=5)
    _save(tmp_path, 100, keep=5)
    _save(tmp_path, 20, keep=5)
    _only(tmp_path, 100, "manifest.json").unlink()
    assert loading.steps(Store(str(tmp_path))) == [9, 20]
    assert all(answer[0] == 20 for answer in _restore(tmp_path))


# ---- failures while saving ----


def test_one_rank_that_cannot_write_fails_all_and_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 10)
    write = Store.write

    def full(self: Store, name: str, chunks: object) -> int:
        if "/00001-" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, name, chunks)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "write", full)
    answers = _save(tmp_path, 20)
    assert all(isinstance(answer, Incomplete) for answer in answers)
    assert len({str(answer) for answer in answers}) == 1
    assert "step 20 was not saved" in str(answers[0]) and "rank 1: OSError" in str(answers[0])
    assert "No space left" in str(answers[0])
    assert list((tmp_path / loading.folder_of(20)).iterdir()) == [], "the room is given back"
    assert loading.steps(Store(str(tmp_path))) == [10]


def test_a_manifest_that_cannot_be_written_fails_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Store.write

    def refuse(self: Store, name: str, chunks: object) -> int:
        if name.endswith(manifest.FILE):
            raise PermissionError(errno.EACCES, "Permission denied")
        return write(self, name, chunks)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "write", refuse)
    answers = _save(tmp_path, 20)
    assert all(isinstance(a, Incomplete) and "Permission denied" in str(a) for a in answers)
    assert loading.steps(Store(str(tmp_path))) == []


def test_a_disk_that_fills_up_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError, match="No space left"):
        Store(str(tmp_path)).write("there/file", [b"x" * 100])
    assert list((tmp_path / "there").iterdir()) == []


def test_ranks_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    def overlapping(rank: int, _world: int) -> Shard:
        return Shard(rank, 2, LAYOUT, [piece("w", bytes(6), 10, 4 * rank)], {})

    answers = together(2, lambda rank, peers: save(str(tmp_path), 5, overlapping(rank, 2), peers, 2))
    assert all(
        isinstance(a, Incomplete) and "w has boxes at (0,) and (4,) that overlap" in str(a) for a in answers
    )


# ---- interrupted and repeated saves ----


def test_a_second_save_of_a_step_does_not_mix_with_the_first(tmp_path: Path) -> None:
    """An interrupted save has left one shard; the next one of the same step takes none of it."""
    _save(tmp_path, 10)
    left = _only(tmp_path, 10, "00001-*.bin")
    content = left.read_bytes()
    _only(tmp_path, 10, "manifest.json").unlink()
    _save(tmp_path, 10)
    files = {file.file for file in loading.manifest_of(Store(str(tmp_path)), 10).shards}
    assert left.name not in files and left.read_bytes() == content
    assert isinstance(_restore(tmp_path)[0], tuple)


def test_old_checkpoints_are_removed_after_the_commit(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [loading.folder_of(3), loading.folder_of(4)]


def test_leftovers_are_removed_and_newer_ones_left_alone(tmp_path: Path) -> None:
    (tmp_path / loading.folder_of(2)).mkdir()
    (tmp_path / loading.folder_of(2) / "00000-dead.bin").write_bytes(b"x")
    (tmp_path / loading.folder_of(9)).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    _save(tmp_path, 5, keep=1)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {loading.folder_of(5), loading.folder_of(9), "notes.txt"}


def test_the_manifest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a removal that is interrupted leaves a manifest without its shards."""
    _save(tmp_path, 1, keep=1)
    removed: list[str] = []
    monkeypatch.setattr(Store, "remove", lambda self, name: removed.append(name))
    _save(tmp_path, 2, keep=1)
    assert removed == [f"{loading.folder_of(1)}/manifest.json", loading.folder_of(1)]


def test_a_removal_that_fails_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Store, name: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    _save(tmp_path, 1, keep=1)
    monkeypatch.setattr(Store, "remove", refuse)
    with caplog.at_level(logging.WARNING):
        assert all(isinstance(a, Saved) for a in _save(tmp_path, 2, keep=1))
    assert "could not remove old checkpoints" in caplog.text and "Permission denied" in caplog.text


# ---- damage ----


def test_a_damaged_shard_is_passed_over_by_all_ranks(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    _save(tmp_path, 20)
    _spoil(_only(tmp_path, 20, "00001-*.bin"))
    with pytest.raises(Incomplete, match=r"00001-.*\.bin differs from what was saved"):
        loading.load(str(tmp_path), 20, LAYOUT, 1)
    for rank, answer in enumerate(_restore(tmp_path)):
        assert isinstance(answer, tuple)
        step, found, passed = answer
        assert step == 10 and found is not None and same(found, shard(rank, 2, 10))
        assert len(passed) == 1 and passed[0].startswith("step 20: ") and "00001-" in passed[0]


@pytest.mark.parametrize("damage", ["missing", "short", "manifest", "format", "unreadable"])
def test_other_damage_is_passed_over_too(tmp_path: Path, damage: str) -> None:
    _save(tmp_path, 10)
    _save(tmp_path, 20)
    file = _only(tmp_path, 20, "00000-*.bin")
    told = _only(tmp_path, 20, "manifest.json")
    match damage:
        case "missing":
            file.unlink()
        case "short":
            file.write_bytes(file.read_bytes()[:-1])
        case "manifest":
            told.write_bytes(told.read_bytes()[:-20])
        case "format":
            told.write_text(json.dumps(json.loads(told.read_text()) | {"format": 99}))
        case "unreadable":
            file.unlink()
            file.mkdir()
    for answer in _restore(tmp_path):
        assert isinstance(answer, tuple) and answer[0] == 10 and answer[2][0].startswith("step 20: ")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    _save(tmp_path, 20)
    file = _only(tmp_path, 20, "00001-*.bin")
    file.unlink()
    for step, _, passed in _restore(tmp_path):
        assert step == 10 and file.name in passed[0]


def test_when_none_can_be_read_nothing_starts_afresh(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    _spoil(_only(tmp_path, 10, "00000-*.bin"))
    for answer in _restore(tmp_path):
        assert isinstance(answer, Incomplete)
        assert "no checkpoint in" in str(answer) and "checkpoint.path" in str(answer)


def test_training_goes_on_over_a_damaged_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    _save(tmp_path, 20)
    _spoil(_only(tmp_path, 20, "00001-*.bin"))
    _save(tmp_path, 20)
    assert [a[0] for a in _restore(tmp_path) if isinstance(a, tuple)] == [20, 20]


def test_another_layout_is_a_users_mistake(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    other = LAYOUT | {"ep": 1}
    with pytest.raises(
        UserError, match=r"saved under pp=1 dp=2 ep=2, and this run is pp=1 dp=2 ep=1.*parallel"
    ):
        loading.load(str(tmp_path), 10, other, 0)
    answers = together(2, lambda rank, peers: loading.restore(str(tmp_path), other, rank, peers))
    assert all(isinstance(answer, UserError) for answer in answers)


def test_a_manifest_that_is_missing_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(Incomplete, match="step 3 has no manifest"):
        loading.load(str(tmp_path), 3, LAYOUT, 0)


# ---- coverage ----


def _entry(
    start: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...], kind: str = "float32"
) -> Entry:
    return Entry("w", kind, shape, whole, start, 0, 0)


def _shards(*boxes: Entry) -> list[ShardFile]:
    return [ShardFile(rank, f"{rank}", 0, "", (box,)) for rank, box in enumerate(boxes)]


def test_every_rank_must_be_there_once() -> None:
    box = _entry((0,), (4,), (4,))
    with pytest.raises(Incomplete, match="of ranks 0 to 2, ranks"):
        manifest.check(_shards(box, box), world=3)
    with pytest.raises(Incomplete, match="of ranks 0 to 1, ranks"):
        manifest.check([*_shards(box)] * 2, world=2)


@pytest.mark.parametrize(
    ("boxes", "why"),
    [
        ([((0,), (4,)), ((4,), (5,))], "10 elements, and the ranks saved 9"),
        ([((0,), (6,)), ((5,), (5,))], "overlap"),
        ([((0,), (5,)), ((0,), (5,))], "10 elements, and the ranks saved 5"),
        ([((0,), (5,)), ((0,), (4,)), ((9,), (1,))], "overlap"),
        ([((0,), (5,)), ((5,), (6,))], "outside"),
        ([((-1,), (5,)), ((4,), (6,))], "outside"),
    ],
)
def test_a_cover_that_is_wrong_is_refused(
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], why: str
) -> None:
    shards = _shards(*(_entry(start, shape, (10,)) for start, shape in boxes))
    with pytest.raises(Incomplete, match=why):
        manifest.check(shards, world=len(shards))


@pytest.mark.parametrize("changed", [{"kind": "bfloat16"}, {"whole": (5, 2)}])
def test_ranks_must_agree_on_a_tensor(changed: dict[str, object]) -> None:
    whole = changed.get("whole", (10,))
    assert isinstance(whole, tuple)
    other = _entry((0,) * len(whole), whole, whole, str(changed.get("kind", "float32")))
    with pytest.raises(Incomplete, match="w is float32.* on one rank and .* on rank 1"):
        manifest.check(_shards(_entry((0,), (10,), (10,)), other), world=2)


def _cut(box: tuple[tuple[int, ...], tuple[int, ...]], noise: random.Random) -> list[Entry]:
    """A box cut at random into boxes that tile it."""
    start, shape = box
    dims = [d for d, size in enumerate(shape) if size > 1]
    if not dims or noise.random() < 0.25:
        return [_entry(start, shape, (6, 5, 7))]
    d = noise.choice(dims)
    at = noise.randrange(1, shape[d])
    low = (*shape[:d], at, *shape[d + 1 :])
    high = (*shape[:d], shape[d] - at, *shape[d + 1 :])
    then = (*start[:d], start[d] + at, *start[d + 1 :])
    return _cut((start, low), noise) + _cut((then, high), noise)


def test_random_tilings_are_whole_and_any_change_to_them_is_not() -> None:
    for seed in range(60):
        noise = random.Random(seed)
        boxes = _cut(((0, 0, 0), (6, 5, 7)), noise)
        noise.shuffle(boxes)
        manifest.check(_shards(*boxes), world=len(boxes))
        if len(boxes) < 2:
            continue
        with pytest.raises(Incomplete):
            manifest.check(_shards(*boxes[1:]), world=len(boxes) - 1)
        one, other = boxes[0], boxes[1]
        moved = _entry(other.start, one.shape, one.global_shape)
        with pytest.raises(Incomplete):
            manifest.check(_shards(moved, *boxes[1:]), world=len(boxes))


def test_a_tensor_without_dims_and_an_empty_one() -> None:
    manifest.check(_shards(_entry((), (), ())), world=1)
    manifest.check(_shards(_entry((0, 0), (0, 4), (0, 4))), world=1)
    manifest.check(_shards(_entry((), (), ()), _entry((), (), ())), world=2)


def test_a_manifest_comes_back() -> None:
    told = Manifest(5, LAYOUT, (ShardFile(0, "a", 4, "ff", (_entry((0,), (1,), (1,)),)),), {"loss": 0.1})
    assert Manifest.parse(told.dump()) == told and told.bytes == 4


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"format": 1}', b'{"format": 2}', b"\xff", b"null"])
def test_a_manifest_that_is_none_is_incomplete(text: bytes) -> None:
    with pytest.raises(Incomplete):
        Manifest.parse(text)


# ---- kill -9 ----

_SAVER = """
import itertools, sys
from faulttol.checkpoint.peers import Alone
from faulttol.checkpoint.save import save
from tests.faulttol.ranks import shard
print("ready", flush=True)
for step in itertools.count(int(sys.argv[2])):
    save(sys.argv[1], step, shard(0, 1, step, size=200_000), Alone(), keep=2)
    print(step, flush=True)
"""


def test_a_saver_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Twenty processes that do nothing but save, each killed after a random time."""
    noise, first, committed = random.Random(5), 1, 0
    for _ in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", _SAVER, str(tmp_path), str(first)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(noise.uniform(0, 0.03))  # where in a save the kill lands, not how long a test waits
        child.kill()
        told = [int(row) for row in child.stdout.read().split("\n")[:-1]]
        child.wait()
        child.stdout.close()
        committed = max([committed, *told])
        step, found, passed = loading.restore(str(tmp_path), LAYOUT, 0, Alone())
        assert passed == [] and (step or 0) >= committed
        if step is not None:
            assert found is not None and same(found, shard(0, 1, step, size=200_000))
            first = step + 1
        left = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert len(left) < 12, "leftovers of earlier saves are removed"
    assert committed > 0


def test_the_words_in_shard_names_are_new_each_time(tmp_path: Path) -> None:
    names = set()
    for _, step in itertools.product(range(3), (1,)):
        save(str(tmp_path), step, shard(0, 1, step), Alone(), keep=1)
        names |= {file.file for file in loading.manifest_of(Store(str(tmp_path)), step).shards}
    assert len(names) == 3


def test_the_module_has_no_torch() -> None:
    code = f"import sys, {saving.__name__}, {loading.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
