"""Ranks that are processes of their own, each with its node's folder, as the tests and the bench of memory need them.

`python -m tests.faulttol.snapshots.memory_nodes JSON` is one rank. What ranks tell each other goes through a hub in the
process that started them, over a socket that is a file: so it also passes between network namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Self

from faulttol.checkpoint import save as saving
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import CheckpointCommit, run_tag
from faulttol.checkpoint.load import Tier, restore, stored
from faulttol.checkpoint.manifest import Identity
from faulttol.checkpoint.pieces import TensorPiece
from faulttol.snapshots import memory, remote_store
from tests.namespaces import Host

RUN = "run-1"
_LAYOUT = {"dp": 1}


# ---- ranks that tell each other things ----


class Hub:
    """Joins ranks into a group; serves them in threads until it is closed."""

    def __init__(self, folder: Path, world: int) -> None:
        self._listener = Listener(str(folder / f"hub-{secrets.token_hex(4)}"), "AF_UNIX", backlog=world)
        self.address = str(self._listener.address)
        self._world = world
        self._barrier = threading.Barrier(world, timeout=60.0)
        self._items: list[Any] = [None] * world
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            for _ in range(self._world):
                threading.Thread(target=self._one, args=(self._listener.accept(),), daemon=True).start()

    def _one(self, link: Connection[Any, Any]) -> None:
        try:
            rank = link.recv()
            while True:
                everyone, item = link.recv()
                self._items[rank] = item
                self._barrier.wait()
                items = list(self._items) if rank == 0 or everyone else self._items[0]
                self._barrier.wait()
                link.send(items)
        except (EOFError, OSError, threading.BrokenBarrierError):
            self._barrier.abort()  # a rank is gone: its peers are told, as a process group does
        finally:
            link.close()

    def close(self) -> None:
        """End it."""
        self._listener.close()


class HubPeers:
    """`Peers` of one rank of a hub."""

    def __init__(self, address: str, rank: int) -> None:
        self._link = Client(address, "AF_UNIX")
        self._link.send(rank)
        self._rank = rank

    def _exchange(self, item: Any, everyone: bool = False) -> Any:
        self._link.send((everyone, item))
        return self._link.recv()

    def gather(self, item: Any) -> list[Any] | None:
        """All ranks' items on rank 0, in rank order; None elsewhere."""
        items = self._exchange(item)
        return items if self._rank == 0 else None

    def broadcast(self, item: Any) -> Any:
        """Rank 0's item on all ranks."""
        items = self._exchange(item if self._rank == 0 else None)
        return items[0] if self._rank == 0 else items

    def everyone(self, item: Any) -> list[Any]:
        """All ranks' items on all ranks."""
        return list(self._exchange(item, everyone=True))


# ---- one rank ----


@dataclass(frozen=True)
class MemoryNodeJob:
    """What one rank does."""

    rank: int
    nodes: list[str]
    """By rank, of the attempt."""
    hub: str
    memory: str
    """Base of this node's folder: in truth each node has memory of its own."""
    store: str
    attempt: int = 1
    elements: int = 1 << 16
    """That each rank that saves has of the one tensor, which is of int32."""
    saved: int = 0
    """Ranks that saved."""
    to_memory: list[int] = field(default_factory=list)
    to_store: list[int] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)
    """Steps whose snapshot isn't committed any more."""
    rank_zero_address: str = "127.0.0.1"
    tiers: list[str] = field(default_factory=list)
    """To be restored from, in turn; `all`: from all at once."""
    evict: bool = False
    """Whether the store's files are dropped from the page cache first, as after the loss of a whole machine."""

    @property
    def world(self) -> int:
        """Ranks."""
        return len(self.nodes)

    @property
    def identity(self) -> Identity:
        """Who the rank is."""
        return Identity(RUN, self.attempt, _LAYOUT, self.rank, self.world)

    @property
    def folder(self) -> Path:
        """Of its node."""
        os.environ["MEGARAY_MEMORY"] = self.memory
        return memory.folder(self.nodes[self.rank], RUN)


def _values(step: int, first: int, count: int) -> memoryview:
    """A part of what is saved at a step, as int32: no two of its elements are equal, nor those of two steps."""
    import numpy as np

    at = np.arange(first, first + count, dtype=np.uint32)
    return memoryview((at * np.uint32(2654435761) + np.uint32(step)).view(np.uint8))


def _pieces(job: MemoryNodeJob, step: int) -> list[TensorPiece]:
    size, first = job.elements * job.world, job.elements * job.rank
    box = Box((size,), (first,), (job.elements,))
    return [TensorPiece("weight", "int32", box, _values(step, first, job.elements))]


def _save(store: Any, job: MemoryNodeJob, step: int, peers: HubPeers, commits: bool = True) -> float:
    """Save one step; seconds."""
    pieces = _pieces(job, step)
    peers.gather(None)
    token = peers.broadcast(saving.new_token())
    began = time.monotonic()
    written = saving.write(store, step, token, job.identity, pieces)
    answers = peers.gather((written, None))
    if answers is not None and commits:
        saving.commit(store, step, token, job.identity, saving.collect_receipts(answers), {"step": step})
    peers.broadcast(None)
    return time.monotonic() - began


def _saves(job: MemoryNodeJob, peers: HubPeers) -> dict[str, float]:
    """Save as the job says, then wait for the end; the server must live as long as others may push."""
    secret = peers.broadcast(secrets.token_bytes(32))
    server = remote_store.serve(job.folder, secret, remote_store.local_address_for(job.rank_zero_address))
    addresses = peers.everyone(server.address)
    keeper = memory.partners(job.nodes)[job.rank]
    partner = remote_store.RemoteStore(addresses[keeper], secret) if keeper is not None else None
    copies = memory.ReplicatedStore(job.folder, partner)
    seconds = {}
    for step in job.to_memory:
        seconds["memory"] = _save(copies, job, step, peers)
        memory.purge_older(job.folder, CheckpointCommit(job.attempt, step, run_tag(RUN)))
    for step in job.to_store:
        seconds["store"] = _save(stored(job.store)[0].store, job, step, peers)
    for step in job.begun:
        _save(copies, job, step, peers, commits=False)
    return seconds


@dataclass(frozen=True)
class _Place:
    """`LoadTarget` in plain memory: torch takes seconds to import, in each of these processes."""

    name: str
    dtype: str
    box: Box
    values: bytearray
    on_device: bool = False

    def fill(self, given: memoryview, source: Box) -> None:
        """Take over what this and `source` share, along the one dim."""
        (start,), (first,) = self.box.start, source.start
        low, high = max(start, first), min(start + self.box.shape[0], first + source.shape[0])
        self.values[4 * (low - start) : 4 * (high - start)] = given[4 * (low - first) : 4 * (high - first)]


def _restores(job: MemoryNodeJob, peers: HubPeers) -> list[dict[str, Any]]:
    saved = job.saved or job.world
    size = job.elements * saved
    first, last = (size * turn // job.world for turn in (job.rank, job.rank + 1))
    place = _Place("weight", "int32", Box((size,), (first,), (last - first,)), bytearray(4 * (last - first)))
    wanted: list[Any] = [place]
    told = []
    secret = peers.broadcast(secrets.token_bytes(32))
    for which in job.tiers:
        place.values[:] = bytes(len(place.values))
        if job.evict and job.rank == 0:
            _evict(Path(job.store))
        peers.gather(None)
        peers.broadcast(None)
        began = time.monotonic()
        use = memory.tier if which != "store" else _no_tier
        with use(job.folder, peers, job.identity, secret, job.rank_zero_address) as found:
            tiers = ([found] if found else []) + (stored(job.store) if which != "memory" else [])
            answer = restore(tiers, wanted, peers, job.identity) if tiers else None
        seconds = time.monotonic() - began
        step = answer.step if answer else -1
        right = bool(answer) and place.values == _values(step, first, last - first)
        told.append(
            {
                "step": step,
                "tier": answer.tier if answer else "",
                "right": right,
                "seconds": seconds,
                "passed": list(answer.passed) if answer else [],
            }
        )
    return told


def _evict(store: Path) -> None:
    for path in store.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _no_tier(*_: Any) -> Iterator[Tier | None]:
    yield None


def main() -> None:
    """One rank."""
    job = MemoryNodeJob(**json.loads(sys.argv[1]))
    peers = HubPeers(job.hub, job.rank)
    answer: Any = _restores(job, peers) if job.tiers else _saves(job, peers)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    sys.stdin.read()  # until it is told to end, or killed


# ---- nodes, as the process that starts them sees them ----


class Nodes:
    """Runs attempts on nodes, which are folders or, where hosts are given, network namespaces as well.

    Leaving the context kills what still runs.
    """

    def __init__(self, folder: Path, hosts: Sequence[Host] = ()) -> None:
        self._folder, self._hosts = folder, hosts
        self.running: list[subprocess.Popen[str]] = []

    def memory(self, node: str) -> Path:
        """Base of a node's folder."""
        return self._folder / f"memory-of-{node}"

    def run(self, nodes: list[str], **job: Any) -> list[Any]:
        """Start a rank on each of the nodes; what they answer. They then wait, with their servers, to be killed."""
        hub = Hub(self._folder, len(nodes))
        towards = self._hosts[int(nodes[0])].ip if self._hosts else "127.0.0.1"
        for rank, node in enumerate(nodes):
            told = MemoryNodeJob(
                rank, nodes, hub.address, str(self.memory(node)), rank_zero_address=towards, **job
            )
            words = [sys.executable, "-m", "tests.faulttol.snapshots.memory_nodes", json.dumps(asdict(told))]
            command = self._hosts[int(node)].command(*words) if self._hosts else words
            self.running.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=Path(__file__).parents[3],
                )
            )
        try:
            answers = [process.stdout.readline() for process in self.running if process.stdout]
            if not all(answers):
                raise RuntimeError("a rank has ended without an answer; its error is above")
            return [json.loads(answer) for answer in answers]
        finally:
            hub.close()

    def kill(self) -> None:
        """Kill all ranks at once, as a crash does."""
        for process in self.running:
            process.send_signal(signal.SIGKILL)
        for process in self.running:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self.running = []

    def lose(self, node: str) -> None:
        """Let all that is in a node's memory be gone."""
        shutil.rmtree(self.memory(node))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


if __name__ == "__main__":
    main()
