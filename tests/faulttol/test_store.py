"""The store on a disk, in memory and on a real S3 server, and the URLs that it refuses."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from configs.errors import UserError
from faulttol.checkpoint import load as loading
from faulttol.checkpoint.save import Saved, save
from faulttol.checkpoint.store import Store, check_writable
from tests.faulttol.ranks import LAYOUT, same, shard, together

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a bucket on a server of this test's own."""
    pytest.importorskip("s3fs")
    server_module: Any = pytest.importorskip("moto.server")
    boto3: Any = importlib.import_module("boto3")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="runs")
    fsspec.config.set_conf_env(fsspec.config.conf)
    yield "s3://runs/checkpoints"
    fsspec.config.conf.pop("s3", None)
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of an empty folder in memory."""
    yield "memory://runs/checkpoints"
    fsspec.filesystem("memory").store.clear()


def _round(root: str) -> None:
    """Save three times, damage the newest, restore."""
    check_writable(root)
    assert Store(root).names() == []
    for step in (1, 2, 3):
        answers = together(2, lambda rank, peers, s=step: save(root, s, shard(rank, 2, s), peers, 2))  # type: ignore[misc]
        assert all(isinstance(a, Saved) for a in answers), answers
    store = Store(root)
    assert loading.steps(store) == [2, 3]
    assert store.names() == [loading.folder_of(2), loading.folder_of(3)]
    for rank in (0, 1):
        assert same(loading.load(root, 3, LAYOUT, rank), shard(rank, 2, 3))
    folder = loading.folder_of(3)
    (name,) = (name for name in store.names(folder) if name.startswith("00001-"))
    store.write(f"{folder}/{name}", [bytes(10)])
    for answer in together(2, lambda rank, peers: loading.restore(root, LAYOUT, rank, peers)):
        assert isinstance(answer, tuple) and answer[0] == 2
        assert name in answer[2][0]


def test_a_round_on_a_disk(tmp_path: Path) -> None:
    _round(str(tmp_path / "new" / "checkpoints"))


def test_a_round_under_a_file_url_with_odd_characters(tmp_path: Path) -> None:
    folder = tmp_path / "with space 'n' ünïcode"
    folder.mkdir()
    _round(f"file://{folder}/c")
    assert (folder / "c" / loading.folder_of(2)).is_dir()


def test_a_round_in_memory(memory: str) -> None:
    _round(memory)


def test_a_round_on_s3(s3: str) -> None:
    _round(s3)


def test_a_bucket_that_does_not_exist(s3: str) -> None:
    with pytest.raises(UserError, match="checkpoint.path='s3://nowhere/x' can't be written"):
        check_writable("s3://nowhere/x")


def test_an_upload_that_lost_bytes_is_found(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3)
    monkeypatch.setattr(store._fs, "info", lambda path: {"size": 3})
    with pytest.raises(OSError, match="4 bytes were written, 3 are there"):
        store.write("a", [b"abcd"])


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
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

    store = Store(str(tmp_path))
    store.write("a", [b"old"])
    with pytest.raises(RuntimeError, match="the tensor is gone"):
        store.write("a", chunks())
    assert store.read("a") == b"old" and store.names() == ["a"]


def test_everything_is_synced_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before its rename, its folder after it, and the folders that were made for it."""
    synced: list[str] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(tmp_path)))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    Store(str(tmp_path / "top")).write("step/file", [b"x"])
    assert synced[:2] == ["", "/top"]
    assert synced[2].startswith("/top/step/.file.") and synced[3:] == ["/top/step"]


def test_a_mount_that_cannot_sync_folders_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").is_dir():
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    assert Store(str(tmp_path)).write("a", [b"x"]) == 1


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
