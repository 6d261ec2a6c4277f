"""The process beside a rank that digests and writes what was staged: no thread of training waits for its interpreter lock.

It doesn't import torch, so it starts in a fraction of a second and holds few megabytes. It ends with its rank.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from configs.rank import PARENT, die_with_parent
from faulttol.checkpoint import save as saving
from faulttol.checkpoint.coverage import FilePlan
from faulttol.checkpoint.folder import CheckpointCommit, run_tag
from faulttol.checkpoint.manifest import Identity, Incomplete, ShardFile
from faulttol.checkpoint.peers import failure_of
from faulttol.checkpoint.retention import Retention
from faulttol.checkpoint.shards import ShardLayout
from faulttol.checkpoint.store import CheckpointStore, StoreLike
from faulttol.snapshots.memory import ReplicatedStore, purge_older
from faulttol.snapshots.remote_store import RemoteStore, local_address_for, serve

_PROGRESS_BYTES = 16 << 20
"""Bytes after which progress is reported."""
_STEP = 4 << 20
"""Bytes that are taken out of a buffer at once: whole blocks."""
Progress = Callable[[int], None]
"""Called with the bytes that were digested and written so far."""


@dataclass(frozen=True)
class SealRequest:
    """Digest a staged file, complete it in place, and write it where a root is given; answered with its `ShardFile`."""

    buffer: str
    """Path of the buffer."""
    layout: ShardLayout
    token: str
    root: str | None


@dataclass(frozen=True)
class WriteRequest:
    """Write an already sealed file to another root."""

    buffer: str
    layout: ShardLayout
    token: str
    root: str


@dataclass(frozen=True)
class ServeRequest:
    """Take part in snapshots in memory: serve this node's folder to other nodes; answered with the address."""

    folder: str
    secret: bytes
    rank_zero_address: str
    """Address of rank 0's node."""


@dataclass(frozen=True)
class ReplicateRequest:
    """Make a sealed buffer this rank's file of a snapshot, and send another node its copy."""

    buffer: str
    layout: ShardLayout
    token: str
    partner: str | None
    """Address that the other node is served at."""


@dataclass(frozen=True)
class PurgeRequest:
    """Remove this node's snapshots that are older than a commit."""

    commit: CheckpointCommit


@dataclass(frozen=True)
class CommitRequest:
    """Commit what all ranks have written; answered with the bytes of all files."""

    root: str | None
    """None: in memory."""
    step: int
    token: str
    identity: Identity
    records: tuple[ShardFile, ...]
    plans: tuple[str, ...]
    """Digest of each rank's plan."""
    unknown: Mapping[str, bytes]
    """Plans that weren't sent before, packed, by digest."""
    facts: dict[str, Any]
    retention: Retention


@dataclass(frozen=True)
class DiscardRequest:
    """Remove what a failed save wrote."""

    root: str | None
    """None: in memory."""
    step: int
    token: str
    identity: Identity


WriterRequest = (
    SealRequest
    | WriteRequest
    | ServeRequest
    | ReplicateRequest
    | PurgeRequest
    | CommitRequest
    | DiscardRequest
)


class RequestHandler:
    """Carries out requests, in this process or in the writer's."""

    def __init__(self) -> None:
        self._stores: dict[str, CheckpointStore] = {}
        self._plans: dict[str, FilePlan] = {}
        self._snapshots: Snapshots | None = None

    def handle(self, request: WriterRequest, progress: Progress) -> Any:
        """The answer to a request."""
        match request:
            case SealRequest():
                return self._seal(request, progress)
            case WriteRequest():
                self._put(request, progress)
            case ServeRequest():
                self._snapshots = Snapshots(Path(request.folder), request.secret, request.rank_zero_address)
                return self._snapshots.address
            case ReplicateRequest():
                name = _file(request.layout, request.token)
                self._served().keep(Path(request.buffer), name, request.partner)
            case PurgeRequest():
                self._served().sweep(request.commit)
            case CommitRequest():
                return self._commit(request, progress)
            case DiscardRequest():
                saving.discard(self._store_of(request.root), request.step, request.token, request.identity)
        return None

    def close(self) -> None:
        """Stop serving."""
        if self._snapshots is not None:
            self._snapshots.close()

    def _served(self) -> Snapshots:
        if self._snapshots is None:
            raise Incomplete("this writer serves no snapshots in memory")
        return self._snapshots

    def _store_of(self, root: str | None) -> StoreLike:
        if root is None:
            return self._served().copies
        if root not in self._stores:
            self._stores[root] = CheckpointStore(root)
        return self._stores[root]

    def _seal(self, request: SealRequest, progress: Progress) -> ShardFile:
        layout, index = request.layout, list[bytes]()
        with _opened(request.buffer, layout) as view:
            view[: len(layout.header)] = layout.header
            chunks = _with_progress(layout.stream(_values(view, layout), index), progress)
            if request.root is None:
                for _ in chunks:
                    pass
            else:
                self._write(request.root, layout, request.token, chunks)
            view[layout.offsets[-1] : layout.size] = index[0]
        return layout.record(index[0])

    def _put(self, request: WriteRequest, progress: Progress) -> None:
        size = request.layout.size
        with _opened(request.buffer, request.layout) as view:
            chunks = (view[at : min(at + _STEP, size)] for at in range(0, size, _STEP))
            self._write(request.root, request.layout, request.token, _with_progress(chunks, progress))

    def _write(self, root: str, layout: ShardLayout, token: str, chunks: Iterator[memoryview]) -> None:
        name = _file(layout, token)
        size = self._store_of(root).write(name, chunks)
        if size != layout.size:
            raise Incomplete(f"{name} has {size} bytes, and {layout.size} were laid out")

    def _commit(self, request: CommitRequest, progress: Progress) -> int:
        self._plans.update({key: FilePlan.parse(packed) for key, packed in request.unknown.items()})
        written = [
            saving.ShardReceipt(record, self._plans[plan])
            for record, plan in zip(request.records, request.plans, strict=True)
        ]
        store = self._store_of(request.root)
        progress(0)
        size = saving.commit(store, request.step, request.token, request.identity, written, request.facts)
        progress(0)
        if request.root is not None:
            saving.prune_after_commit(
                store, request.step, request.token, request.identity, request.retention, request.facts
            )
        return size


class Snapshots:
    """This rank's part of the snapshots in memory: its node's folder, served to others, and its link to another node.

    Args:
        folder: of the node.
        secret: that all ranks know.
        rank_zero_address: address of rank 0's node.
    """

    def __init__(self, folder: Path, secret: bytes, rank_zero_address: str) -> None:
        self._folder, self._secret = folder, secret
        self._server = serve(folder, secret, local_address_for(rank_zero_address))
        self._partner: RemoteStore | None = None
        self._at: str | None = None
        self.copies = ReplicatedStore(folder, None)
        self.address = self._server.address

    def keep(self, buffer: Path, name: str, partner: str | None) -> None:
        """Give a sealed buffer its name, and send another node its copy.

        Raises:
            OSError: where the other node doesn't take it.
        """
        if partner != self._at:
            if self._partner is not None:
                self._partner.close()
            self._partner, self._at = RemoteStore(partner, self._secret) if partner else None, partner
            self.copies = ReplicatedStore(self._folder, self._partner)
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.hardlink_to(buffer)
        self.copies.push(name)

    def sweep(self, newest: CheckpointCommit) -> None:
        """Remove what is older than a commit of the run."""
        purge_older(self._folder, newest)

    def close(self) -> None:
        """Stop serving."""
        self._server.close()
        if self._partner is not None:
            self._partner.close()


def _file(layout: ShardLayout, token: str) -> str:
    who = layout.identity
    return CheckpointCommit(who.attempt, layout.step, run_tag(who.run)).shard(who.rank, token)


@contextmanager
def _opened(path: str, layout: ShardLayout) -> Iterator[memoryview]:
    """A buffer's memory."""
    with Path(path).open("r+b") as file:
        buffer = mmap.mmap(file.fileno(), layout.size)
    view = memoryview(buffer)
    try:
        yield view
    finally:
        view.release()
        # A write that failed has parts of it in its traceback; the memory goes with them.
        with suppress(BufferError):
            buffer.close()


def _values(view: memoryview, layout: ShardLayout) -> Iterator[Iterator[memoryview]]:
    for offset, size in zip(layout.offsets, layout.sizes(), strict=False):
        yield (view[offset + at : offset + min(at + _STEP, size)] for at in range(0, size, _STEP))


def _with_progress(chunks: Iterator[memoryview], progress: Progress) -> Iterator[memoryview]:
    done = reported = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        if done - reported >= _PROGRESS_BYTES:
            reported = done
            progress(done)


class InlineWriter:
    """Carries out requests in the calling thread: for saves that training waits for."""

    pid = None
    """There is no other process."""

    def __init__(self) -> None:
        self._work = RequestHandler()

    def ready(self) -> None:
        """Nothing has to be started."""

    def request(self, request: WriterRequest, progress: Progress) -> Any:
        """The answer to a request."""
        return self._work.handle(request, progress)

    def close(self) -> None:
        """Stop serving."""
        self._work.close()


class WriterProcess:
    """The writer process of this rank. One thread at a time sends it requests."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Of the process, where it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def ready(self) -> None:
        """Start it where it doesn't run; called by the main thread, since it ends with the thread that started it."""
        if self.pid is not None:
            return
        self._forget()
        ours, theirs = socket.socketpair()
        places = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            PARENT: str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(places),
        }
        command = f"from faulttol.staged.writer import main; main({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", command], pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
        )  # fmt: skip
        theirs.close()
        self._connection = Connection(ours.detach())

    def request(self, request: WriterRequest, progress: Progress) -> Any:
        """The answer to a request.

        Raises:
            Incomplete: where the process is gone, saying how it ended.
            Exception: what it raised, of a kind that `failure_of` keeps.
        """
        with self._lock:
            if self._connection is None:
                raise Incomplete("the writer process isn't there")
            try:
                self._connection.send(request)
                while True:
                    word, value = self._connection.recv()
                    if word == "progress":
                        progress(value)
                        continue
                    break
            except (EOFError, OSError):
                raise Incomplete(self._end()) from None
        if word == "failed":
            kind, text = value
            raise kind(text)
        return value

    def _end(self) -> str:
        process = self._process
        if process is None:
            return "the writer process isn't there"
        code = process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"the writer process {process.pid} {how}"

    def _forget(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def close(self) -> None:
        """End it; it is idle by now."""
        self._forget()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10.0)


def main(fd: int) -> None:
    """The writer process: requests come in on a socket, one after the other, until it is closed."""
    # For the rank, which may want to save first, and ends this process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(os.environ)
    work, connection = RequestHandler(), Connection(fd)
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):  # the rank is gone
            return
        try:
            answer = "done", work.handle(request, lambda done: connection.send(("progress", done)))
        except Exception as error:
            answer = "failed", failure_of(error)
        try:
            connection.send(answer)
        except OSError:  # the rank is gone
            return
