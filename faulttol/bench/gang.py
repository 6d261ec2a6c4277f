"""Ranks of a measurement: processes over gloo that do one thing together and hand back plain data."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.rank import PARENT, die_with_parent
from faulttol.checkpoint.peers import exchange

if TYPE_CHECKING:
    import torch.distributed as dist

_PATIENCE = timedelta(minutes=30)


class RankFailed(RuntimeError):
    """A rank of a measurement raised something or ended."""


@dataclass(frozen=True)
class BenchRank:
    """Who a rank is, and how it speaks to the others: the `Peers` of a save or load too."""

    rank: int
    world: int
    store: dist.Store
    """Key-value store that rank 0 serves."""

    def gather(self, item: Any) -> list[Any] | None:
        """All ranks' items on rank 0, in rank order; None elsewhere."""
        import torch.distributed as dist

        items: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(item, items, dst=0)
        return items

    def broadcast(self, item: Any) -> Any:
        """Rank 0's item on all ranks."""
        import torch.distributed as dist

        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def exchange(self, out: Sequence[tuple[int, memoryview]], into: Sequence[tuple[int, memoryview]]) -> None:
        """Send bytes to ranks and fill buffers with what they send; see `Peers`."""
        exchange(out, into)

    def all(self, item: Any) -> list[Any]:
        """All ranks' items on all ranks, in rank order."""
        items: list[Any] = self.broadcast(self.gather(item))
        return items


def run_ranks(world: int, act: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`act(place, *arguments)` on ranks that are started for it: what each returned, in rank order.

    Raises:
        RankFailed: with a rank's traceback; the others are ended.
    """
    context: Any = multiprocessing.get_context("spawn")  # a fresh process: nobody's memory but its own
    with tempfile.TemporaryDirectory(prefix="megaray-bench-") as folder, _one_thread_each(world):
        pipes, ranks = [], []
        for rank in range(world):
            here, there = context.Pipe()
            target = (rank, world, folder, there, act, arguments)
            ranks.append(context.Process(target=_serve, args=target, daemon=False))
            ranks[-1].start()
            there.close()
            pipes.append(here)
        try:
            return _collect(pipes)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()


@contextmanager
def _one_thread_each(world: int) -> Iterator[None]:
    """The variables that ranks are started with: libraries make no more threads than there are cores."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // world))
    wanted = {"OMP_NUM_THREADS": threads, PARENT: str(os.getpid())}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _collect(pipes: Sequence[Connection]) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < len(pipes):
        for pipe in wait([pipe for rank, pipe in enumerate(pipes) if rank not in values]):
            rank = pipes.index(pipe)
            try:
                went_well, value = pipes[rank].recv()
            except EOFError:
                went_well, value = False, f"rank {rank} ended without a word"
            if not went_well:
                raise RankFailed(value)
            values[rank] = value
    return [values[rank] for rank in range(len(pipes))]


def _serve(
    rank: int, world: int, folder: str, pipe: Connection, act: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    die_with_parent(os.environ)
    os.dup2(2, 1)  # libraries print; standard output is for results
    try:
        pipe.send((True, _joined(rank, world, folder, act, arguments)))
    except Exception as error:
        pipe.send((False, f"rank {rank}: {error}\n{traceback.format_exc()}"))
    os._exit(0)  # without the teardown of communication libraries, which can hang


def _joined(rank: int, world: int, folder: str, act: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    files = dist.FileStore(str(Path(folder) / "rendezvous"), world)
    dist.init_process_group("gloo", store=files, rank=rank, world_size=world, timeout=_PATIENCE)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
        files.set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(files.get("port")), is_master=False, timeout=_PATIENCE)
    value = act(BenchRank(rank, world, store), *arguments)
    dist.barrier()  # rank 0 serves the store until all are done
    return value
