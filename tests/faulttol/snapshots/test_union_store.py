"""Several stores that are read as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from faulttol.checkpoint.store import CheckpointStore
from faulttol.snapshots.union_store import UnionStore

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


class _Counted(CheckpointStore):
    """A store that counts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.count = 0

    def read_into(self, name: str, start: int, into: memoryview) -> int:
        self.count += 1
        return super().read_into(name, start, into)


def test_a_union_reads_here_first_and_elsewhere_when_that_fails(tmp_path: Path) -> None:
    stores = [_Counted(tmp_path / str(n)) for n in range(3)]
    for store in stores:
        store.write("s/a", [b"0123"])
    stores[1].write("s/b", [b"b"])
    files = {"s/a": [0, 1, 2], "s/b": [1], "t/c": [0]}
    union = UnionStore(stores, files, own=1)
    assert union.names() == ["s", "t"] and union.names("s") == ["a", "b"] and union.names("u") == []
    assert union.read_range("s/a", 1, 3) == b"12" and [store.count for store in stores] == [0, 1, 0]
    (tmp_path / "1/s/a").unlink()
    memory = bytearray(3)
    for _ in range(2):
        assert union.read_range("s/a", 1, 3) == b"12"
    assert union.read_into("s/a", 2, memoryview(memory)) == 2 and memory == b"23\0"
    assert [store.count for store in stores] == [3, 2, 0], "what failed isn't asked first again"
    assert union.read("s/b") == b"b", "but for what nobody else has"
    (tmp_path / "0/s/a").unlink()
    assert union.read("s/a") == b"0123"
    (tmp_path / "2/s/a").unlink()
    for name in ("s/a", "t/c", "u/d"):
        with pytest.raises(FileNotFoundError):
            union.read(name)
    turned = [UnionStore(stores, {"s/a": [0, 1, 2]}, turn=turn) for turn in range(3)]
    for store in stores:
        store.write("s/a", [b"0123"])
        store.count = 0
    for one in turned:
        one.read_range("s/a", 0, 1)
    assert [store.count for store in stores] == [1, 1, 1], "ranks begin with different holders"
    for act in (
        lambda: union.write("s/a", [b"x"]),
        lambda: union.create("x", []),
        lambda: union.remove("s/a"),
    ):
        with pytest.raises(OSError, match="memory://all/.*: what nodes have kept is only read"):
            act()
