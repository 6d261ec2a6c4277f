"""The server of another node's files: what it gives, to whom, and that nothing that a client does harms it."""

from __future__ import annotations

import errno
import hmac
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from faulttol.snapshots import remote_store
from faulttol.snapshots.remote_store import FileServer, RemoteStore
from tests.conftest import readable

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]
SECRET = b"of this attempt"
MIB = 1 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    """Of a folder `served`, beside which something else lies."""
    (tmp_path / "private").write_bytes(b"private")
    (tmp_path / "served").mkdir()
    found = remote_store.serve(tmp_path / "served", SECRET)
    yield found
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "file-server"]


def until(state: object) -> None:
    """Wait for a state."""
    assert callable(state)
    while not state():
        time.sleep(0.002)


def test_it_is_a_store(server: FileServer, tmp_path: Path) -> None:
    remote = RemoteStore(server.address, SECRET)
    assert remote.names() == [] and remote.url == f"memory://{server.address}"
    assert remote.write("a/b", [b"one", memoryview(b""), b"", memoryview(b"two")]) == 6
    assert (tmp_path / "served/a/b").read_bytes() == b"onetwo"
    assert remote.read("a/b") == b"onetwo" and remote.names("a") == ["b"] and remote.names() == ["a"]
    assert remote.write("a/b", []) == 0 and remote.read("a/b") == b""
    assert remote.create("a/c", [b"new"]) == 3
    with pytest.raises(FileExistsError, match="a/c"):
        remote.create("a/c", [b"newer"])
    assert remote.read("a/c") == b"new" and remote.names("a") == ["b", "c"] and remote.names("no") == []
    remote.remove("a/c")
    remote.remove("a/c")
    remote.remove("a")
    assert remote.names() == []


def test_a_range_is_read_alone(server: FileServer) -> None:
    remote = RemoteStore(server.address, SECRET)
    data = bytes(range(256)) * 20000
    remote.write("a", [data])
    assert remote.read_range("a", 5, 4_000_000) == data[5:4_000_000]
    assert remote.read_range("a", len(data) - 3, len(data) + 9) == data[-3:]
    assert remote.read_range("a", len(data) + 1, len(data) + 9) == b""
    assert remote.read_range("a", 9, 9) == b"" == remote.read_range("a", 9, 3)
    memory = bytearray(9)
    assert remote.read_into("a", len(data) - 3, memoryview(memory)[4:]) == 3 and memory[4:7] == data[-3:]
    with pytest.raises(FileNotFoundError, match=f"{remote.url}/b"):
        remote.read_range("b", 0, 1)
    with pytest.raises(OSError, match="Is a directory"):
        RemoteStore(server.address, SECRET).write("d/e", [b""])
        remote.read("d")
    assert remote.read_range("a", 0, 2) == data[:2], "the connection continues after a refusal"
    assert len(remote._idle) == 1, "one connection was enough for all"


def test_several_threads_read_at_once(server: FileServer) -> None:
    remote, wrong = RemoteStore(server.address, SECRET), []
    blocks = [bytes([n]) * 300_000 for n in range(8)]
    remote.write("a", blocks)

    def read(n: int) -> None:
        for _ in range(20):
            if remote.read_range("a", n * 300_000, (n + 1) * 300_000) != blocks[n]:
                wrong.append(n)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 1 <= len(remote._idle) <= 8
    remote.close()
    until(lambda: not server._open)


# ---- who may ----


@pytest.mark.parametrize(
    "name",
    ["../private", "a/../../private", "/etc/passwd", "a//b", "./a", "a/.", "..", ".", "", "a/", "a\0b"],
)
def test_no_name_leads_out_of_the_folder(server: FileServer, tmp_path: Path, name: str) -> None:
    remote = RemoteStore(server.address, SECRET)
    for act in (
        lambda: remote.read(name),
        lambda: remote.write(name, [b"x"]),
        lambda: remote.create(name, [b"x"]),
        lambda: remote.remove(name),
        lambda: remote.names(name or "/"),
    ):
        with pytest.raises(OSError, match="not a name below the folder") as refused:
            act()
        assert refused.value.errno == errno.EINVAL
    assert (tmp_path / "private").read_bytes() == b"private" and list((tmp_path / "served").iterdir()) == []


def test_who_does_not_know_the_secret_is_refused(server: FileServer) -> None:
    RemoteStore(server.address, SECRET).write("a", [b"x"])
    stranger = RemoteStore(server.address, b"of another attempt")
    for act in (lambda: stranger.read("a"), lambda: stranger.write("a", [b"y"])):
        with pytest.raises(PermissionError, match="refused: it has another secret"):
            act()
    assert RemoteStore(server.address, SECRET).read("a") == b"x"


def test_what_was_overheard_opens_nothing(server: FileServer) -> None:
    """A proof holds for the number of one connection, and the server's own is not a client's."""
    host, port = server.address.split(":")
    number = bytes(32)
    with socket.create_connection((host, int(port))) as first:
        challenge = first.recv(32)
        proof = hmac.digest(SECRET, b"client" + challenge + number, "sha256")
        first.sendall(number + proof)
        answer = first.recv(32)
        assert answer == hmac.digest(SECRET, b"server" + number + challenge, "sha256")
    for overheard in (number + proof, challenge + answer, number + answer):
        with socket.create_connection((host, int(port))) as second:
            second.recv(32)
            second.sendall(overheard)
            assert second.recv(32) == b""


def test_a_server_that_does_not_know_the_secret_is_refused() -> None:
    """It lets anyone in, and would hand out files of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def welcome() -> None:
            with listener.accept()[0] as client:
                client.sendall(bytes(32))
                client.recv(64)
                client.sendall(bytes(32))
                client.recv(1)

        thread = threading.Thread(target=welcome)
        thread.start()
        with pytest.raises(PermissionError, match="it doesn't know the secret"):
            RemoteStore(f"127.0.0.1:{listener.getsockname()[1]}", SECRET).read("a")
        thread.join()


@pytest.mark.parametrize(
    "nonsense",
    [
        b"",
        b"\0\0\0\5null!",
        b"\0\0\0\4null",
        b"\xff\xff\xff\xff",
        b'\0\0\0\x10{"do": "format"}',
        b"\0\0\0\2{}",
    ],
)
def test_nonsense_ends_its_own_connection_alone(server: FileServer, nonsense: bytes) -> None:
    host, port = server.address.split(":")
    other = RemoteStore(server.address, SECRET)
    other.write("a", [b"x"])
    for known in (False, True):
        with socket.create_connection((host, int(port))) as client:
            challenge = client.recv(32)
            if known:
                client.sendall(bytes(32) + hmac.digest(SECRET, b"client" + challenge + bytes(32), "sha256"))
                client.recv(32)
            client.sendall(nonsense)
    until(lambda: len(server._open) <= 1)
    assert other.read("a") == b"x"
    with pytest.raises(OSError, match="not a range: "):
        other._request({"do": "range", "name": "a", "range": ["0", 1]})
    with pytest.raises(OSError, match="unknown request 'chmod'"):
        other._request({"do": "chmod", "name": "a"})


def test_a_head_of_gigabytes_is_not_waited_for(server: FileServer) -> None:
    link = RemoteStore(server.address, SECRET)._connect()
    link.settimeout(10)
    link.sendall(b"\xff\xff\xff\xff")
    assert link.recv(1) == b"", "it hangs up at once"
    link.close()


# ---- what goes wrong ----


def test_a_write_that_is_broken_off_leaves_the_old_file(server: FileServer, tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield bytes(MIB)
        until(lambda: len(list((tmp_path / "served").iterdir())) == 2)  # it is being written
        raise RuntimeError("the tensor is gone")

    remote = RemoteStore(server.address, SECRET)
    remote.write("a", [b"old"])
    for write in (remote.write, remote.create):
        with pytest.raises(RuntimeError, match="the tensor is gone"):
            write("a" if write == remote.write else "b", chunks())
        until(lambda: [path.name for path in (tmp_path / "served").iterdir()] == ["a"])
    assert remote.read("a") == b"old"


def test_a_write_that_cannot_be_is_told_before_all_was_sent(server: FileServer, tmp_path: Path) -> None:
    """As on a full node: the client isn't left to send gigabytes that nobody takes."""
    (tmp_path / "served/file").write_bytes(b"")
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(MIB)

    with pytest.raises(OSError, match=r"\[Errno \d+\].*file/a'"):
        RemoteStore(server.address, SECRET).write("file/a", endless())
    assert 1 <= sent < 200


def test_why_a_write_failed_is_told_while_the_client_is_stuck_in_sending(server: FileServer) -> None:
    """A full node takes nothing more; the reason must still arrive."""
    sent: list[int] = []

    def full(name: str, chunks: object) -> int:
        seen = -1
        while seen != len(sent) or not sent:  # until the kernel's buffers are full and the client waits
            seen = len(sent)
            time.sleep(0.2)
        raise OSError(errno.ENOSPC, "No space left on device")

    def endless() -> Iterator[bytes]:
        while True:
            sent.append(1)
            yield bytes(MIB)

    server._store.write = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space left on device: 'memory://.*/a'") as refused:
        RemoteStore(server.address, SECRET).write("a", endless())
    assert refused.value.errno == errno.ENOSPC


def test_a_write_that_lost_bytes_is_found(server: FileServer) -> None:
    server._store.write = lambda name, chunks: sum(len(chunk) for chunk in chunks) - 1  # type: ignore[method-assign]
    with pytest.raises(OSError, match="4 bytes were sent and 3 written"):
        RemoteStore(server.address, SECRET).write("a", [b"abcd"])


def test_a_file_that_is_cut_off_within_a_frame_does_not_come_to_be(
    server: FileServer, tmp_path: Path
) -> None:
    for cut in (b"\0\0", b"\0\0\0\x64", b"\0\0\0\x64" + bytes(50), b"\0\0\0\1x"):
        link = RemoteStore(server.address, SECRET)._connect()
        remote_store._send_head(link, {"do": "write", "name": "a"})
        link.sendall(cut)
        until(lambda: list((tmp_path / "served").iterdir()))  # it is being written
        link.close()
        until(lambda: not server._open)
        assert list((tmp_path / "served").iterdir()) == []


def test_a_closed_server_is_no_answer(tmp_path: Path) -> None:
    server = remote_store.serve(tmp_path, SECRET)
    remote = RemoteStore(server.address, SECRET)
    remote.write("a", [b"x"])
    entered, leave = threading.Event(), threading.Event()
    failure: list[Exception] = []

    def chunks() -> Iterator[bytes]:
        yield b"half"
        entered.set()
        leave.wait(20)
        yield bytes(8 * MIB)

    def write() -> None:
        try:
            remote.write("b", chunks())
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    entered.wait(20)
    server.close()
    leave.set()
    thread.join()
    assert "no answer" in str(failure[0]) and [path.name for path in tmp_path.iterdir()] == ["a"]
    for act in (lambda: remote.read("a"), lambda: remote.write("a", [b"y"]), lambda: remote.names()):
        with pytest.raises(ConnectionError, match=f"no answer: .*{remote.url}"):
            act()
    server.close()


def test_a_node_that_says_nothing_is_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        remote = RemoteStore(f"127.0.0.1:{listener.getsockname()[1]}", SECRET, timeout=0.05)
        with pytest.raises(ConnectionError, match="no answer: timed out"):
            remote.read("a")


@pytest.mark.parametrize("idle", [0.05, remote_store._IDLE_SECONDS])
def test_idle_connections_make_room_and_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle: float
) -> None:
    """At once: a restart waits for a node for less time than a connection may be idle."""
    monkeypatch.setattr(remote_store, "_CONNECTIONS", 2)
    monkeypatch.setattr(remote_store, "_IDLE_SECONDS", idle)
    server = remote_store.serve(tmp_path, SECRET)
    (tmp_path / "a").write_bytes(b"x")
    clients = [RemoteStore(server.address, SECRET, 10.0) for _ in range(5)]
    for _ in range(2):
        for client in clients:
            assert client.read("a") == b"x"
    assert all(len(client._idle) == 1 for client in clients)
    server.close()


def test_a_connection_at_work_makes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "_CONNECTIONS", 1)
    server = remote_store.serve(tmp_path, SECRET)
    first, second = (RemoteStore(server.address, SECRET, 20.0) for _ in range(2))
    later = threading.Thread(target=second.write, args=("b", [b"y"]))

    def chunks() -> Iterator[bytes]:
        yield b"one"
        later.start()
        until(lambda: readable(server._listener, 0))
        yield b"two"

    assert first.write("a", chunks()) == 6
    later.join()
    assert (tmp_path / "a").read_bytes() == b"onetwo" and (tmp_path / "b").read_bytes() == b"y"
    server.close()


def test_the_server_holds_little_of_what_it_passes_on(server: FileServer) -> None:
    remote, block = RemoteStore(server.address, SECRET), memoryview(bytes(32 * MIB))
    remote.write("warm", [b""])
    tracemalloc.start()
    try:
        remote.write("a", [block] * 4)
        assert tracemalloc.get_traced_memory()[1] < 3 * MIB
        tracemalloc.reset_peak()
        for at in range(0, 128 * MIB, 2 * MIB):
            remote.read_range("a", at, at + 2 * MIB)
        assert tracemalloc.get_traced_memory()[1] < 7 * MIB, "two ranges, one of which is given up"
    finally:
        tracemalloc.stop()


def test_the_address_that_others_reach(tmp_path: Path) -> None:
    assert remote_store.local_address_for("127.0.0.1") == "127.0.0.1"
    assert remote_store.local_address_for("localhost") in ("127.0.0.1", "::1")
    with pytest.raises(OSError, match="Name|name|address"):
        remote_store.local_address_for("no-such-host.invalid")
    server = remote_store.serve(tmp_path, SECRET, "127.0.0.5")
    assert server.address.startswith("127.0.0.5:")
    assert RemoteStore(server.address, SECRET).names() == []
    server.close()
