"""Save, retire, damage and restore on a disk, in memory and on a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

from faulttol.checkpoint.folder import CheckpointFolder, folder_of
from faulttol.checkpoint.load import Restored
from faulttol.checkpoint.save import Saved
from faulttol.checkpoint.store import CheckpointStore, check_writable
from tests.faulttol.ranks import save_all

pytest.importorskip("torch")
from tests.faulttol.tensors import blank, equal, flat_bytes, restore_layout  # noqa: E402

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]


def _round(root: str) -> None:
    """Save three times, restore under another layout, damage the newest in two ways, restore again."""
    check_writable(root)
    store = CheckpointStore(root)
    assert store.names() == []
    for step in (1, 2, 3):
        assert all(isinstance(a, Saved) for a in save_all(root, step))
    assert [c.step for c in CheckpointFolder(store).commits] == [2, 3]
    assert store.names() == [folder_of(2), folder_of(3)]
    _restored(root, 3, "")
    folder = folder_of(3)
    (name,) = (name for name in store.names(folder) if ".r00001." in name)
    data = bytearray(store.read(f"{folder}/{name}"))
    values = 8 + int.from_bytes(data[:8], "little") + 100
    for spoiled in (data[:10], data[:values] + bytes([data[values] ^ 1]) + data[values + 1 :]):
        store.write(f"{folder}/{name}", [spoiled])
        _restored(root, 2, name)
    store.remove(f"{folder}/{name}")
    _restored(root, 2, f"{name} is missing")


def _restored(root: str, step: int, told: str) -> None:
    parts = flat_bytes(2, step, 3)
    there = blank(parts)
    for answer in restore_layout(root, there):
        assert isinstance(answer, Restored) and answer.step == step, answer
        assert told in " ".join(answer.passed) and bool(told) == bool(answer.passed)
    assert equal(there, parts)


def test_on_a_disk(tmp_path: Path) -> None:
    _round(str(tmp_path / "new" / "checkpoints"))


def test_under_a_file_url_with_odd_characters(tmp_path: Path) -> None:
    folder = tmp_path / "with space 'n' ünïcode"
    folder.mkdir()
    _round(f"file://{folder}/c")
    assert (folder / "c" / folder_of(2)).is_dir()


def test_in_memory(memory: str) -> None:
    _round(memory)


def test_on_s3(s3: str) -> None:
    _round(s3)
