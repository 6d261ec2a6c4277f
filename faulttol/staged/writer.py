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
from faulttol.checkpoint.folder import CheckpointCommit, tag
from faulttol.checkpoint.manifest import Identity, Incomplete, ShardFile
from faulttol.checkpoint.peers import failure_of
from faulttol.checkpoint.retention import Retention
from faulttol.checkpoint.shards import ShardLayout
from faulttol.checkpoint.store import CheckpointStore, StoreLike
from faulttol.checkpoint.survey import FilePlan
from faulttol.snapshots.memory import Copies, sweep
from faulttol.snapshots.ranges import RemoteStore, address_towards, serve

_TOLD = 16 << 20
"""Bytes after which progress is reported."""
_STEP = 4 << 20
"""Bytes that are taken out of a buffer at once: whole blocks."""
Progress = Callable[[int], None]
"""Called with the bytes that were digested and written so far."""


@dataclass(frozen=True)
class Seal:
    """Digest a staged file, complete it in place, and write it where a root is given; answered with its `ShardFile`."""

    buffer: str
    """Path of the buffer."""
    layout: ShardLayout
    token: str
    root: str | None


@dataclass(frozen=True)
class Put:
    """Write a file that was sealed before."""

    buffer: str
    layout: ShardLayout
    token: str
    root: str


@dataclass(frozen=True)
class Serve:
    """Take part in snapshots in memory: serve this node's folder to other nodes; answered with the address."""

    folder: str
    secret: bytes
    towards: str
    """Address of rank 0's node."""


@dataclass(frozen=True)
class Keep:
    """Make a sealed buffer this rank's file of a snapshot, and send another node its copy."""

    buffer: str
    layout: ShardLayout
    token: str
    partner: str | None
    """Address that the other node is served at."""


@dataclass(frozen=True)
class SweepSnapshots:
    """Remove this node's snapshots that are older than a commit."""

    commit: CheckpointCommit


@dataclass(frozen=True)
class CommitOrder:
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
class Discard:
    """Remove what a failed save wrote."""

    root: str | None
    """None: in memory."""
    step: int
    token: str
    identity: Identity


Order = Seal | Put | Serve | Keep | SweepSnapshots | CommitOrder | Discard


class OrderWorker:
    """Carries out orders, in this process or in the writer's."""

    def __init__(self) -> None:
        self._stores: dict[str, CheckpointStore] = {}
        self._plans: dict[str, FilePlan] = {}
        self._snapshots: Snapshots | None = None

    def do(self, order: Order, progress: Progress) -> Any:
        """The answer to an order."""
        match order:
            case Seal():
                return self._seal(order, progress)
            case Put():
                self._put(order, progress)
            case Serve():
                self._snapshots = Snapshots(Path(order.folder), order.secret, order.towards)
                return self._snapshots.address
            case Keep():
                name = _file(order.layout, order.token)
                self._shown().keep(Path(order.buffer), name, order.partner)
            case SweepSnapshots():
                self._shown().sweep(order.commit)
            case CommitOrder():
                return self._commit(order, progress)
            case Discard():
                saving.discard(self._place(order.root), order.step, order.token, order.identity)
        return None

    def close(self) -> None:
        """Stop serving."""
        if self._snapshots is not None:
            self._snapshots.close()

    def _shown(self) -> Snapshots:
        if self._snapshots is None:
            raise Incomplete("this writer serves no snapshots in memory")
        return self._snapshots

    def _place(self, root: str | None) -> StoreLike:
        if root is None:
            return self._shown().copies
        if root not in self._stores:
            self._stores[root] = CheckpointStore(root)
        return self._stores[root]

    def _seal(self, order: Seal, progress: Progress) -> ShardFile:
        layout, index = order.layout, list[bytes]()
        with _opened(order.buffer, layout) as view:
            view[: len(layout.header)] = layout.header
            chunks = _told(layout.stream(_values(view, layout), index), progress)
            if order.root is None:
                for _ in chunks:
                    pass
            else:
                self._write(order.root, layout, order.token, chunks)
            view[layout.offsets[-1] : layout.size] = index[0]
        return layout.record(index[0])

    def _put(self, order: Put, progress: Progress) -> None:
        size = order.layout.size
        with _opened(order.buffer, order.layout) as view:
            chunks = (view[at : min(at + _STEP, size)] for at in range(0, size, _STEP))
            self._write(order.root, order.layout, order.token, _told(chunks, progress))

    def _write(self, root: str, layout: ShardLayout, token: str, chunks: Iterator[memoryview]) -> None:
        name = _file(layout, token)
        size = self._place(root).write(name, chunks)
        if size != layout.size:
            raise Incomplete(f"{name} has {size} bytes, and {layout.size} were laid out")

    def _commit(self, order: CommitOrder, progress: Progress) -> int:
        self._plans.update({key: FilePlan.parse(packed) for key, packed in order.unknown.items()})
        written = [
            saving.Written(record, self._plans[plan])
            for record, plan in zip(order.records, order.plans, strict=True)
        ]
        store = self._place(order.root)
        progress(0)
        size = saving.commit(store, order.step, order.token, order.identity, written, order.facts)
        progress(0)
        if order.root is not None:
            saving.retire(store, order.step, order.token, order.identity, order.retention, order.facts)
        return size


class Snapshots:
    """This rank's part of the snapshots in memory: its node's folder, served to others, and its link to another node.

    Args:
        folder: of the node.
        secret: that all ranks know.
        towards: address of rank 0's node.
    """

    def __init__(self, folder: Path, secret: bytes, towards: str) -> None:
        self._folder, self._secret = folder, secret
        self._server = serve(folder, secret, address_towards(towards))
        self._partner: RemoteStore | None = None
        self._at: str | None = None
        self.copies = Copies(folder, None)
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
            self.copies = Copies(self._folder, self._partner)
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.hardlink_to(buffer)
        self.copies.push(name)

    def sweep(self, newest: CheckpointCommit) -> None:
        """Remove what is older than a commit of the run."""
        sweep(self._folder, newest)

    def close(self) -> None:
        """Stop serving."""
        self._server.close()
        if self._partner is not None:
            self._partner.close()


def _file(layout: ShardLayout, token: str) -> str:
    who = layout.identity
    return CheckpointCommit(who.attempt, layout.step, tag(who.run)).shard(who.rank, token)


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


def _told(chunks: Iterator[memoryview], progress: Progress) -> Iterator[memoryview]:
    done = reported = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        if done - reported >= _TOLD:
            reported = done
            progress(done)


class Inline:
    """Carries out orders in the calling thread: for saves that training waits for."""

    pid = None
    """There is no other process."""

    def __init__(self) -> None:
        self._work = OrderWorker()

    def ready(self) -> None:
        """Nothing has to be started."""

    def request(self, order: Order, progress: Progress) -> Any:
        """The answer to an order."""
        return self._work.do(order, progress)

    def close(self) -> None:
        """Stop serving."""
        self._work.close()


class WriterProcess:
    """The writer process of this rank. One thread at a time asks it."""

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

    def request(self, order: Order, progress: Progress) -> Any:
        """The answer to an order.

        Raises:
            Incomplete: where the process is gone, saying how it ended.
            Exception: what it raised, of a kind that `failure_of` keeps.
        """
        with self._lock:
            if self._connection is None:
                raise Incomplete("the writer process isn't there")
            try:
                self._connection.send(order)
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
    """The writer process: orders come in on a socket, one after the other, until it is closed."""
    # For the rank, which may want to save first, and ends this process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(os.environ)
    work, connection = OrderWorker(), Connection(fd)
    while True:
        try:
            order = connection.recv()
        except (EOFError, OSError):  # the rank is gone
            return
        try:
            answer = "done", work.do(order, lambda done: connection.send(("progress", done)))
        except Exception as error:
            answer = "failed", failure_of(error)
        try:
            connection.send(answer)
        except OSError:  # the rank is gone
            return
