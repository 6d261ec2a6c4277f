"""Damage of every kind: found before it is used, named, and passed over by all ranks together."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faulttol.checkpoint import shards
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import CheckpointCommit, folder_of
from faulttol.checkpoint.load import Restored, newest, stored
from faulttol.checkpoint.manifest import Incomplete
from faulttol.checkpoint.peers import SoloPeers
from faulttol.checkpoint.pieces import TensorPiece
from faulttol.checkpoint.save import Retention, Saved, save
from faulttol.checkpoint.store import CheckpointStore
from tests.faulttol.checkpoint.forgery import forge
from tests.faulttol.ranks import identity, pieces, save_all, together

torch = pytest.importorskip("torch")
from tests.faulttol.tensors import (  # noqa: E402
    blank,
    equal,
    flat_bytes,
    layout,
    restore_layout,
    save_layout,
)

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]
WORLD = 3


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints of two ranks, steps 10 and 20."""
    save_all(tmp_path, 10)
    save_all(tmp_path, 20)
    return tmp_path


def _file(root: Path, step: int, rank: int) -> Path:
    (found,) = (root / folder_of(step)).glob(f"*.r{rank:05d}.*")
    return found


def _manifest(root: Path, step: int, run: str = "run-1", attempt: int = 1) -> Path:
    return root / CheckpointCommit(attempt, step, run).manifest


def _flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def _load(root: Path, step: int, attempt: int = 1) -> str:
    """Restore under another layout; that all ranks got `step` whole, and why newer ones were passed over."""
    parts = flat_bytes(2, step, WORLD)
    there = blank(parts)
    answers = restore_layout(root, there, attempt)
    assert all(isinstance(a, Restored) and a.step == step for a in answers), answers
    assert equal(there, parts)
    (passed,) = {a.passed for a in answers if isinstance(a, Restored)}
    return " | ".join(passed)


# ---- files ----


def test_a_flipped_bit_in_data_is_named_with_tensor_and_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK", 64)
    save_all(tmp_path, 10)
    save_all(tmp_path, 20)
    path = _file(tmp_path, 20, 1)
    data = path.read_bytes()
    (values,) = {p.tensor.numpy().tobytes()[1000:1064] for p in flat_bytes(2, 20, 1)[0] if p.name == "weight"}
    _flip(path, 8 * (data.index(values) + 5))
    told = _load(tmp_path, 10)
    at = data.index(values)
    assert told.startswith("step 20: ")
    assert f"{path} differs from what was saved in weight[1000:1064], bytes {at} to {at + 64}" in told


def test_a_range_in_many_dims_is_told_as_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK", 32)
    parts = layout({"w": torch.arange(60.0).view(3, 4, 5)}, 1, 1, "rows")
    save_layout(tmp_path, 1, parts)
    path = _file(tmp_path, 1, 0)
    _flip(path, 8 * path.read_bytes().index(torch.arange(16.0, 24.0).numpy().tobytes()))
    (answer,) = restore_layout(tmp_path, blank(parts))
    assert isinstance(answer, Incomplete)
    assert "differs from what was saved in w[0:1, 3:4, 1:5] [1:2, 0:1, 0:4], bytes" in str(answer)


def test_a_flipped_bit_anywhere_is_found_or_no_matter(tmp_path: Path) -> None:
    """Values are right or the checkpoint is passed over: only the header, which isn't read, may differ unnoticed."""
    noise, unnoticed = random.Random(3), 0
    save_all(tmp_path, 10)
    save_all(tmp_path, 20)
    for path in (_file(tmp_path, 20, 0), _file(tmp_path, 20, 1), _manifest(tmp_path, 20)):
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else 0
        for bit in noise.sample(range(8 * header, 8 * len(data)), 12):
            _flip(path, bit)
            assert path.name in _load(tmp_path, 10)
            path.write_bytes(data)
        if header:
            _flip(path, noise.randrange(8 * header))
            unnoticed += _load(tmp_path, 20) == ""
            path.write_bytes(data)
    assert unnoticed == 2 and _load(tmp_path, 20) == ""


@pytest.mark.parametrize("size", [0, 1, 500, -1, -200, -1500])
def test_a_truncated_file_is_named(root: Path, size: int) -> None:
    path = _file(root, 20, 0)
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is truncated: it ends before byte" in _load(root, 10)


@pytest.mark.parametrize("size", [0, 1, 100, -1, -20])
def test_a_torn_manifest_is_named(root: Path, size: int) -> None:
    path = _manifest(root, 20)
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path}: its manifest is unreadable" in _load(root, 10)


def _directory(root: Path, step: int) -> Path:
    (found,) = (root / folder_of(step)).glob("*.directory.*")
    return found


def test_a_flipped_bit_in_the_directory_is_named_with_its_tensors(root: Path) -> None:
    path = _directory(root, 20)
    data = path.read_bytes()
    first, second = data.index(b"bias"), data.rindex(b'"')
    for place, what in ((first, "4 tensors from bias on"), (second - 3, "2 files from 0 on")):
        _flip(path, 8 * place)
        told = _load(root, 10)
        assert f"{path} differs from what was saved in bytes" in told and f"which tell of {what}" in told
        path.write_bytes(data)
    for size in (0, 10, -1):
        path.write_bytes(data[:size])
        assert f"{path} is truncated in bytes" in _load(root, 10)
    path.unlink()
    assert f"{path} is missing" in _load(root, 10)


def test_a_directory_of_another_save_is_named(root: Path) -> None:
    path = _directory(root, 20)
    path.write_bytes(_directory(root, 10).read_bytes())
    assert f"{path} differs from what was saved in bytes" in _load(root, 10)


def test_an_expert_that_is_missing_is_named_before_anything_is_committed(tmp_path: Path) -> None:
    """Hazard 28: each rank of ep saves its experts, and one forgets its last."""

    def parts(rank: int) -> list[TensorPiece]:
        box = Box((4, 6), (2 * rank, 0), (2 - rank, 6))
        return [TensorPiece("blocks.0.feed.experts.up", "uint8", box, memoryview(bytes(box.elements)))]

    answers = together(
        2, lambda rank, peers: save(str(tmp_path), 1, parts(rank), identity(rank, 2), {}, peers, Retention(2))
    )
    assert {type(answer) for answer in answers} == {Incomplete}
    assert "blocks.0.feed.experts.up[3:4, 0:6] of [4, 6] has no source: 18 of 24" in str(answers[0])
    assert not list(tmp_path.rglob("*.json"))


def test_a_missing_file_is_named(root: Path) -> None:
    path = _file(root, 20, 1)
    path.unlink()
    assert f"{path} is missing" in _load(root, 10)


def test_what_cannot_be_read_is_named(root: Path) -> None:
    path = _file(root, 20, 0)
    path.unlink()
    path.mkdir()
    assert f"{path} can't be read" in _load(root, 10)


def test_one_rank_that_cannot_read_takes_all_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, bad = CheckpointStore.read_into, set()

    def fail(self: CheckpointStore, name: str, start: int, into: memoryview) -> int:
        if folder_of(20) in name and not bad:
            bad.add(name)
            raise OSError(errno.EIO, "Input/output error")
        return read(self, name, start, into)

    monkeypatch.setattr(CheckpointStore, "read_into", fail)
    assert "Input/output error" in _load(root, 10) and len(bad) == 1


def test_when_none_can_be_read_nothing_starts_afresh(root: Path) -> None:
    for step in (10, 20):
        _file(root, step, 0).write_bytes(b"x")
    answers = restore_layout(root, blank(flat_bytes(2, 20, WORLD)))
    assert all(isinstance(answer, Incomplete) for answer in answers)
    assert len({str(answer) for answer in answers}) == 1
    told = str(answers[0])
    assert (
        "no checkpoint in" in told
        and "step 20: " in told
        and "step 10: " in told
        and "checkpoint.path" in told
    )
    for step in (10, 20):
        _manifest(root, step).write_bytes(b"x")
    with pytest.raises(Incomplete, match="no checkpoint in .* can be read: step 20: .* step 10: "):
        newest(stored(str(root)), SoloPeers())


def test_training_goes_on_over_a_damaged_checkpoint(root: Path) -> None:
    _flip(_file(root, 20, 1), 8 * (_file(root, 20, 1).stat().st_size - 300))
    assert "differs from what was saved" in _load(root, 10)
    save_all(root, 20, attempt=2)
    assert _load(root, 20, attempt=2) == ""


def test_a_commit_is_never_replaced(root: Path) -> None:
    """Compare-and-set: a step that an attempt has committed stays what it is, whoever comes second."""
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    (told,) = {str(answer) for answer in save_all(root, 20)}
    assert "attempt 1 has committed this step already" in told
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_newest_falls_back_from_a_damaged_manifest(root: Path) -> None:
    _manifest(root, 20).write_bytes(b"{}")
    found = newest(stored(str(root)), SoloPeers())
    assert found is not None and found.step == 10


# ---- mixtures ----


def test_a_file_of_another_step_is_named(root: Path) -> None:
    path = _file(root, 20, 1)
    path.write_bytes(_file(root, 10, 1).read_bytes())
    told = _load(root, 10)
    assert (
        f"{path}: it is the file of step 10, attempt 1 of run run-1, in a checkpoint of step 20, attempt 1"
        in told
    )


def test_a_file_of_another_run_is_named(root: Path, tmp_path: Path) -> None:
    save_all(tmp_path / "other", 20, run="run-2")
    path = _file(root, 20, 0)
    path.write_bytes(_file(tmp_path / "other", 20, 0).read_bytes())
    assert "it is the file of step 20, attempt 1 of run run-2, in a checkpoint of" in _load(root, 10)


def test_a_file_of_another_rank_is_named(root: Path) -> None:
    first, second = _file(root, 20, 0), _file(root, 20, 1)
    first.write_bytes(second.read_bytes())
    assert f"{first}: its index differs from what was saved" in _load(root, 10)


def test_a_file_of_another_save_of_the_step_is_named(root: Path, tmp_path: Path) -> None:
    """Same run, attempt, step and shapes, other values."""
    together(
        2,
        lambda rank, peers: save(
            str(tmp_path / "other"), 20, pieces(rank, 2, 99), identity(rank, 2), {}, peers, Retention(2)
        ),
    )
    path, other = _file(root, 20, 1), _file(tmp_path / "other", 20, 1)
    assert path.stat().st_size == other.stat().st_size
    path.write_bytes(other.read_bytes())
    assert f"{path}: its index differs from what was saved: it is rank 1's of another save" in _load(root, 10)


def test_a_manifest_of_another_step_is_named(root: Path) -> None:
    path = _manifest(root, 20)
    path.write_bytes(_manifest(root, 10).read_bytes())
    assert f"{path} is that of step 10, attempt 1 of run run-1: files of two checkpoints are mixed" in _load(
        root, 10
    )


def test_a_manifest_of_another_run_under_this_ones_name_is_named(root: Path, tmp_path: Path) -> None:
    save_all(tmp_path / "other", 20, run="run-2")
    path = _manifest(root, 20)
    path.write_bytes(_manifest(tmp_path / "other", 20, "run-2").read_bytes())
    assert "is that of step 20, attempt 1 of run run-2: files of two checkpoints are mixed" in _load(root, 10)


# ---- indexes that contradict the manifest, with every digest right ----


def _missing(rows: list[Any]) -> None:
    rows.remove(next(row for row in rows if row[0].startswith("own")))


def _twice(rows: list[Any]) -> None:
    rows.append(next(row for row in rows if row[0] == "weight"))


def _moved(rows: list[Any]) -> None:
    next(row for row in rows if row[0] == "weight")[3][0] += 5


def _shaped(rows: list[Any]) -> None:
    next(row for row in rows if row[0] == "weight")[4][0] -= 5


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_missing, "own/0[0:3] of [7] has no source: 0 of 3"),
        (_twice, " has two sources, the boxes"),
        (_moved, "weight[0:5] of [2000] has no source"),
        (_shaped, "weight[995:1000] of [2000] has no source"),
    ],
)
def test_an_index_without_a_whole_cover_is_refused(
    root: Path, change: Callable[[list[Any]], None], why: str
) -> None:
    forge(root, 20, 0, lambda rows: None)
    assert _load(root, 20) == "", "the forger's work is sound"
    forge(root, 20, 0, change)
    told = _load(root, 10)
    assert why in told and str(_manifest(root, 20)) in told


def test_all_kinds_of_damage_leave_a_save_possible(root: Path) -> None:
    for path in (root / folder_of(20)).iterdir():
        path.write_bytes(b"")
    assert all(isinstance(a, Saved) for a in save_all(root, 30))
    assert _load(root, 30) == ""
