"""The store on a disk, in memory and on a real S3 server, and the URLs that it refuses."""

from __future__ import annotations

import errno
import gc
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.errors import UserError
from faulttol.checkpoint.store import CheckpointStore, check_writable

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def test_a_bucket_that_does_not_exist(s3: str) -> None:
    with pytest.raises(UserError, match="checkpoint.path='s3://nowhere/x' can't be written"):
        check_writable("s3://nowhere/x")


def test_an_upload_that_lost_bytes_is_found(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(s3)
    monkeypatch.setattr(store._fs, "info", lambda path: {"size": 3})
    with pytest.raises(OSError, match="4 bytes were written, 3 are there"):
        store.write("a", [b"abcd"])


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    assert store.write("a/b", [b"one", memoryview(b"two")]) == 6
    assert store.read("a/b") == b"onetwo"
    assert store.write("a/b", [b"3"]) == 1 and store.read("a/b") == b"3"
    assert store.names("a") == ["b"] and store.names() == ["a"] and store.names("c") == []
    store.remove("a")
    store.remove("a")
    assert store.names() == []


def test_a_write_that_is_broken_off_leaves_the_old_file(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("the tensor is gone")

    store = CheckpointStore(str(tmp_path))
    store.write("a", [b"old"])
    with pytest.raises(RuntimeError, match="the tensor is gone"):
        store.write("a", chunks())
    assert store.read("a") == b"old" and store.names() == ["a"]


@pytest.mark.parametrize("size", [4, 6 << 20])
def test_an_upload_that_is_broken_off_leaves_the_old_object(s3: str, size: int) -> None:
    """To close an object's file is to put it in place; large ones go up in parts, which are given up too."""

    def chunks() -> Iterator[bytes]:
        yield bytes(size)
        raise RuntimeError("the tensor is gone")

    store = CheckpointStore(s3)
    store._fs.default_block_size = 5 << 20
    store.write("a", [b"old"])
    for name in ("a", "b"):
        with pytest.raises(RuntimeError, match="the tensor is gone"):
            store.write(name, chunks())
        gc.collect()
    assert store.read("a") == b"old" and store.names() == ["a"]
    assert store._fs.call_s3("list_multipart_uploads", Bucket="runs").get("Uploads", []) == []


def test_a_write_that_is_broken_off_leaves_nothing_where_names_come_first(memory: str) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("the tensor is gone")

    store = CheckpointStore(memory)
    with pytest.raises(RuntimeError, match="the tensor is gone"):
        store.write("a", chunks())
    assert store.names() == []


class _NoAnswer(Exception):
    """As libraries of object stores raise it: of no kind that others know."""


def test_errors_of_a_client_library_are_those_of_the_system(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(memory)
    store.write("a", [b"x"])

    def fail(*_: object, **__: object) -> None:
        raise _NoAnswer("could not connect")

    for name in ("cat_file", "ls", "rm", "open", "pipe_file"):
        monkeypatch.setattr(store._fs, name, fail)
    for act in (
        lambda: store.read("a"),
        lambda: store.read_range("a", 0, 1),
        store.names,
        lambda: store.remove("a"),
        lambda: store.write("a", [b"y"]),
        lambda: store.create("b", [b"y"]),
    ):
        with pytest.raises(OSError, match="_NoAnswer: could not connect") as met:
            act()
        assert met.value.errno == errno.EIO and isinstance(met.value.__cause__, _NoAnswer)


def test_everything_is_synced_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before its rename, its folder after it, and the folders that were made for it."""
    synced: list[str] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(tmp_path)))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    CheckpointStore(str(tmp_path / "top")).write("step/file", [b"x"])
    assert synced[:2] == ["", "/top"]
    assert synced[2].startswith("/top/step/.file.") and synced[3:] == ["/top/step"]


def test_a_mount_that_cannot_sync_folders_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").is_dir():
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    assert CheckpointStore(str(tmp_path)).write("a", [b"x"]) == 1


@pytest.mark.parametrize("root", ["s4://bucket/x", "nonsense://x"])
def test_an_unknown_protocol_is_a_users_mistake(root: str) -> None:
    with pytest.raises(UserError, match=f"checkpoint.path='{root}' can't be used: .*type a folder or a URL"):
        check_writable(root)


def test_a_protocol_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match="checkpoint.path='gs://b/x' can't be used: .*gcsfs"):
        check_writable("gs://b/x")


def test_a_file_in_the_way_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"checkpoint.path='.*/file/x' can't be written: .*File exists: '.*/file'"
    ):
        check_writable(str(tmp_path / "file" / "x"))


def test_a_folder_that_may_not_be_written() -> None:
    with pytest.raises(UserError, match="checkpoint.path='/proc/nothing' can't be written: "):
        check_writable("/proc/nothing")


def test_a_check_leaves_no_file(tmp_path: Path) -> None:
    check_writable(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("protocol", ["disk", "memory", "s3"])
def test_a_range_is_read_alone(tmp_path: Path, request: pytest.FixtureRequest, protocol: str) -> None:
    root = str(tmp_path) if protocol == "disk" else request.getfixturevalue(protocol)
    store = CheckpointStore(root)
    store.write("a", [b"0123456789"])
    assert store.read_range("a", 2, 5) == bytearray(b"234") and store.read_range("a", 8, 12) == b"89"
    assert store.read_range("a", 10, 12) == store.read_range("a", 20, 30) == b"", (
        "as of a file that was cut short"
    )
    memory = bytearray(b"......")
    assert [store.read_into("a", at, memoryview(memory)[2:5]) for at in (1, 8, 30)] == [3, 2, 0]
    assert memory == b"..893."
    for act in (lambda: store.read_range("b", 0, 1), lambda: store.read_into("b", 0, memoryview(memory))):
        with pytest.raises(FileNotFoundError):
            act()


# ---- files that may be made once ----


@pytest.mark.parametrize("protocol", ["disk", "memory", "s3"])
def test_a_name_is_given_once(tmp_path: Path, request: pytest.FixtureRequest, protocol: str) -> None:
    root = str(tmp_path) if protocol == "disk" else request.getfixturevalue(protocol)
    store = CheckpointStore(root)
    assert store.create("a/b", [b"one", memoryview(b"two")]) == 6
    with pytest.raises(FileExistsError):
        store.create("a/b", [b"three"])
    assert store.read("a/b") == b"onetwo" and store.names("a") == ["b"], "and nothing temporary is left"


@pytest.mark.parametrize("protocol", ["disk", "s3"])
def test_of_several_that_make_a_file_at_once_one_does(
    tmp_path: Path, request: pytest.FixtureRequest, protocol: str
) -> None:
    root = str(tmp_path) if protocol == "disk" else request.getfixturevalue(protocol)
    barrier = threading.Barrier(8)

    def make(number: int) -> int | None:
        store = CheckpointStore(root)
        barrier.wait(20)
        try:
            store.create("once", [b"%d" % number])
        except FileExistsError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        (made,) = [number for number in pool.map(make, range(8)) if number is not None]
    assert CheckpointStore(root).read("once") == b"%d" % made


def test_a_mount_without_links_still_gives_a_name_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = CheckpointStore(str(tmp_path))
    store.create("a", [b"x"])
    with pytest.raises(FileExistsError):
        store.create("a", [b"y"])
    assert store.read("a") == b"x" and store.names() == ["a"]
