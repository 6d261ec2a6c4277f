"""Files of another node over TCP: ranges, listings and whole-file writes below one folder, for who knows a secret.

Both sides prove with HMAC-SHA256 that they know it, each over a number that the other has just made up, before either says
a word more. What follows is neither encrypted nor signed: who can change packets between the nodes can change what is
read, which a checkpoint's digests then find.

A request and the head of an answer are JSON behind their length in four bytes; the bytes of files follow as they are.
Nothing is unpickled, and a connection takes at most `_BUFFER` bytes of memory here, whatever is asked.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from configs.errors import from_json
from faulttol.checkpoint.store import CheckpointStore, copy_into

_NONCE = 32
"""Bytes of a number made up for one connection, and of a proof."""
_LENGTH = struct.Struct("!I")
_HEAD = 64 << 10
"""Most bytes of a request or of an answer's head."""
_BUFFER = 1 << 20
_CONNECTIONS = 256
"""Served at once; more wait in the kernel's queue, and idle ones make room."""
_HELLO_SECONDS = 10.0
_IDLE_SECONDS = 30.0
_MAX_REPLY = 1 << 62
"""An end behind that of any file."""


def local_address_for(host: str) -> str:
    """The own address from which packets to `host` go; so one by which that host reaches this one.

    Raises:
        OSError: where the host isn't known or there is no way to it.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing: it only picks the route
        return str(probe.getsockname()[0])


def serve(folder: Path, secret: bytes, host: str = "127.0.0.1") -> FileServer:
    """Serve the files below a folder until `close`.

    Args:
        folder: made by the first write where it isn't there; symbolic links in it are followed, so it must be the
            user's own.
        secret: what clients must know.
        host: own address to listen at; `local_address_for` finds the one that another node reaches.

    Raises:
        OSError: where the address can't be listened at.
    """
    return FileServer(folder, secret, host)


class FileServer:
    """Threads that answer requests for one folder's files; `serve` makes it."""

    def __init__(self, folder: Path, secret: bytes, host: str) -> None:
        self._folder, self._secret = folder, secret
        self._store = CheckpointStore(str(folder))
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=_CONNECTIONS)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        """`host:port`, as `RemoteStore` takes it."""
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        self._lock = threading.Lock()
        self._closing = False
        self._open: dict[socket.socket, threading.Thread] = {}
        self._idle: dict[socket.socket, None] = {}
        """Connections between two requests, the longest idle first."""
        self._thread = threading.Thread(target=self._accept, name="file-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cut all connections and wait for their threads; a file that is being written then doesn't come to be."""
        with self._lock:
            self._closing = True
            ending = dict(self._open)
        for one in (self._listener, *ending):
            with contextlib.suppress(OSError):  # gone by itself
                one.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in (self._thread, *ending.values()):
            thread.join()

    def _accept(self) -> None:
        while self._slot():
            try:
                client, _ = self._listener.accept()
            except OSError:
                self._slots.release()
                if self._closing:
                    return
                time.sleep(0.1)  # out of file descriptors, or a client that left again
                continue
            thread = threading.Thread(target=self._serve, args=(client,), name="file-server", daemon=True)
            with self._lock:
                if self._closing:
                    client.close()
                    return
                self._open[client] = thread
            thread.start()

    def _slot(self) -> bool:
        """Wait for a slot; False at the end. Where a client waits for one, the connection that is idle longest makes room:
        ranks keep theirs, so a thousand of them would shut each other out.
        """
        waits = select.poll()
        waits.register(self._listener, select.POLLIN)
        while not self._closing:
            if self._slots.acquire(blocking=False):
                return True
            if waits.poll(500):
                self._evict_idle()
                if self._slots.acquire(timeout=0.5):
                    return True
        return False

    def _evict_idle(self) -> None:
        with self._lock:
            if self._idle:
                client = next(iter(self._idle))
                del self._idle[client]
                with contextlib.suppress(OSError):  # gone by itself
                    client.shutdown(socket.SHUT_RDWR)

    def _serve(self, client: socket.socket) -> None:
        try:
            # A client that is gone, silent or talks nonsense ends its connection and nothing else.
            with contextlib.suppress(OSError, ValueError), client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.settimeout(_HELLO_SECONDS)
                if self._authenticate(client):
                    client.settimeout(_IDLE_SECONDS)
                    # Not idle before: a new connection's first request isn't repeated.
                    request = _recv_head(client)
                    while self._answer(client, request):
                        with self._lock:
                            self._idle[client] = None
                        request = _recv_head(client)
                        with self._lock:
                            self._idle.pop(client, None)
        finally:
            with self._lock:
                self._idle.pop(client, None)
                del self._open[client]
            self._slots.release()

    def _authenticate(self, client: socket.socket) -> bool:
        ours = secrets.token_bytes(_NONCE)
        client.sendall(ours)
        theirs, proof = _recv_exactly(client, _NONCE), _recv_exactly(client, _NONCE)
        if not hmac.compare_digest(proof, _proof(self._secret, b"client", ours, theirs)):
            return False
        client.sendall(_proof(self._secret, b"server", theirs, ours))
        return True

    def _answer(self, client: socket.socket, request: dict[str, Any]) -> bool:
        """Answer one request; whether another may follow on this connection."""
        what, name = request.get("do"), str(request.get("name"))
        try:
            _check_name(name, empty=what == "names")
            if what == "range":
                return self._send_range(client, name, request.get("range"))
            body, written = b"", {}
            if what in ("write", "create"):
                take = self._store.create if what == "create" else self._store.write
                written["count"] = take(name, _frames(client))
            elif what == "names":
                body = json.dumps(self._store.names(name)).encode()
            elif what == "remove":
                self._store.remove(name)
            else:
                raise OSError(errno.EINVAL, f"unknown request {what!r}")
        except _Disconnected:
            return False
        except OSError as error:
            _send_head(client, {"errno": error.errno or errno.EIO, "error": error.strerror or str(error)})
            if what in ("write", "create"):
                _drain(client)
                return False
            return True
        _send_head(client, {"bytes": len(body), **written})
        client.sendall(body)
        return True

    def _send_range(self, client: socket.socket, name: str, ends: Any) -> bool:
        if not isinstance(ends, list) or [type(end) for end in ends] != [int, int]:
            raise OSError(errno.EINVAL, f"not a range: {ends!r}")
        with (self._folder / name).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            start, end = (min(max(place, 0), size) for place in ends)
            count = max(end - start, 0)
            _send_head(client, {"bytes": count})
            try:
                return not count or client.sendfile(file, start, count) == count
            except OSError as error:  # too late to tell it: the head is out
                raise _Disconnected from error


class _Disconnected(Exception):
    """The other side can't be sent anything any more."""


class RemoteStore:
    """The folder of a `FileServer`: a `StoreLike` whose files lie on another node. Several threads may use it at once.

    Every method raises OSError where the node doesn't answer, and PermissionError where it doesn't know the secret.

    Args:
        address: the server's.
        secret: the server's.
        timeout: seconds that the other side may be silent.
    """

    def __init__(self, address: str, secret: bytes, timeout: float = 60.0) -> None:
        self.url = f"memory://{address}"
        self._secret, self._timeout = secret, timeout
        host, port = address.rsplit(":", 1)
        self._address = host, int(port)
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []

    def close(self) -> None:
        """Close the connections that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for one in idle:
            one.close()

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: where it isn't there.
        """
        return bytes(self.read_range(name, 0, _MAX_REPLY))

    def read_range(self, name: str, start: int, end: int) -> bytearray:
        """Bytes `[start, end)` of a file; fewer where it ends before.

        Raises:
            FileNotFoundError: where it isn't there.
        """
        return self._request({"do": "range", "name": name, "range": [start, end]})

    def read_into(self, name: str, start: int, into: memoryview) -> int:
        """Fill memory with the bytes of a file from `start` on; how many there were. Raises as `read_range` does."""
        return copy_into(into, self.read_range(name, start, start + len(into)))

    def names(self, folder: str = "") -> list[str]:
        """Names in a folder, sorted; none where it isn't there."""
        return [str(name) for name in from_json(self._request({"do": "names", "name": folder}))]

    def remove(self, name: str) -> None:
        """Remove a file or folder; it may be gone already."""
        self._request({"do": "remove", "name": name})

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        """Write a file that appears whole or not at all; its size in bytes."""
        return self._send({"do": "write", "name": name}, chunks)

    def create(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        """`write` that raises FileExistsError where the name exists, and then changes nothing."""
        return self._send({"do": "create", "name": name}, chunks)

    def _request(self, request: dict[str, Any]) -> bytearray:
        """An answer's body. A kept connection that the server has closed meanwhile is replaced by another."""
        while True:
            with self._lock:
                kept = self._idle.pop() if self._idle else None
            link = kept or self._connect()
            try:
                _send_head(link, request)
                head = _recv_head(link)
                body = _recv_exactly(link, int(head.get("bytes", 0)))
            except (OSError, ValueError) as error:
                link.close()
                if kept is None:
                    raise self._lost(error) from None
                continue
            except BaseException:
                link.close()
                raise
            self._return_to_pool(link)
            self._refused(head, request)
            return body

    def _send(self, request: dict[str, Any], chunks: Iterable[bytes | memoryview]) -> int:
        """Send a file on a connection of its own, as its chunks can't be had twice."""
        link = self._connect()
        try:
            _send_head(link, request)
            count = _stream(link, chunks)
            head = _recv_head(link)
            self._refused(head, request)
        except BaseException as error:
            link.close()
            if isinstance(error, (ConnectionError, TimeoutError, ValueError)):
                raise self._lost(error) from None
            raise
        self._return_to_pool(link)
        if head["count"] != count:
            raise OSError(
                errno.EIO, f"{count} bytes were sent and {head['count']} written", self._path(request)
            )
        return count

    def _connect(self) -> socket.socket:
        try:
            link = socket.create_connection(self._address, self._timeout)
        except OSError as error:
            raise self._lost(error) from None
        try:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            theirs, ours = _recv_exactly(link, _NONCE), secrets.token_bytes(_NONCE)
            link.sendall(ours + _proof(self._secret, b"client", theirs, ours))
            proof = _recv_exactly(link, _NONCE)
        except OSError as error:
            link.close()
            if isinstance(error, _Closed):
                raise PermissionError(errno.EACCES, "refused: it has another secret", self.url) from None
            raise self._lost(error) from None
        if not hmac.compare_digest(proof, _proof(self._secret, b"server", ours, theirs)):
            link.close()
            raise PermissionError(errno.EACCES, "it doesn't know the secret", self.url)
        return link

    def _return_to_pool(self, link: socket.socket) -> None:
        with self._lock:
            self._idle.append(link)

    def _path(self, request: dict[str, Any]) -> str:
        return f"{self.url}/{request['name']}"

    def _refused(self, head: dict[str, Any], request: dict[str, Any]) -> None:
        if "errno" in head:
            raise OSError(int(head["errno"]), str(head["error"]), self._path(request))

    def _lost(self, error: Exception) -> OSError:
        return ConnectionError(errno.ECONNABORTED, f"no answer: {error or type(error).__name__}", self.url)


class _Closed(ConnectionError):
    """The other side has closed the connection."""


def _proof(secret: bytes, role: bytes, challenge: bytes | bytearray, own: bytes | bytearray) -> bytes:
    """What only who knows the secret can say of two numbers; `role` keeps an answer from being sent back as one."""
    return hmac.digest(secret, role + challenge + own, "sha256")


def _check_name(name: str, empty: bool) -> None:
    """Refuse a name that could lead out of the folder.

    Raises:
        OSError: where it does.
    """
    parts = [] if empty and not name else name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise OSError(errno.EINVAL, f"not a name below the folder: {name!r}")


def _frames(client: socket.socket) -> Iterator[memoryview]:
    """A file's bytes as they arrive; each view is good until the next is taken.

    Raises:
        _Gone: where they end too soon.
    """
    view = memoryview(bytearray(_BUFFER))
    try:
        while left := _LENGTH.unpack(_recv_exactly(client, _LENGTH.size))[0]:
            while left:
                count = client.recv_into(view[: min(left, _BUFFER)])
                if not count:
                    raise _Closed("closed")
                yield view[:count]
                left -= count
    except OSError as error:
        raise _Disconnected from error


def _stream(link: socket.socket, chunks: Iterable[bytes | memoryview]) -> int:
    """Send a file's bytes in frames and count them; stops where the server answers before the end: it can't write."""
    count, answered = 0, select.poll()
    answered.register(link, select.POLLIN)
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for at in range(0, len(view), _BUFFER):
            part = view[at : at + _BUFFER]
            if answered.poll(0):
                return count
            link.sendall(_LENGTH.pack(len(part)))
            link.sendall(part)
            count += len(part)
    link.sendall(_LENGTH.pack(0))
    return count


def _drain(client: socket.socket) -> None:
    """Take what was sent already until the client has seen the answer: closed at once, the kernel would drop it."""
    client.shutdown(socket.SHUT_WR)
    view, end = bytearray(_BUFFER), time.monotonic() + _HELLO_SECONDS
    while time.monotonic() < end and client.recv_into(view):
        pass


def _send_head(link: socket.socket, tree: dict[str, Any]) -> None:
    text = json.dumps(tree).encode()
    link.sendall(_LENGTH.pack(len(text)) + text)


def _recv_head(link: socket.socket) -> dict[str, Any]:
    """A request or an answer's head.

    Raises:
        ValueError: where it isn't one.
    """
    length = _LENGTH.unpack(_recv_exactly(link, _LENGTH.size))[0]
    if length > _HEAD:
        raise ValueError(f"a head of {length} bytes")
    tree = from_json(_recv_exactly(link, length))
    if not isinstance(tree, dict):
        raise ValueError("a head that is not an object")
    return tree


def _recv_exactly(link: socket.socket, count: int) -> bytearray:
    """So many bytes.

    Raises:
        _Closed: where the other side closes before.
    """
    data = bytearray(count)
    view, at = memoryview(data), 0
    while at < count:
        got = link.recv_into(view[at:])
        if not got:
            raise _Closed("the connection was closed")
        at += got
    view.release()
    return data
