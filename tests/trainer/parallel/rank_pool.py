"""Gloo ranks that wait for work: started once for a module's tests, since starting them takes longer than most checks."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from tests.forks import forks

PATIENCE = 90.0
"""Seconds that a check may take."""


class PooledRankFailed(RuntimeError):
    """A rank raised something, or didn't answer."""


class RankPool:
    """Processes that do pieces of work together, started when they are first needed. After one has failed all are started
    anew. They come from the program's default start method where it has set one, else from a fork server."""

    def __init__(self) -> None:
        self._number = 0
        self._pipes: list[Connection] = []
        self._workers: list[Any] = []

    def run(self, world: int, act: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`act(rank, world, store, *arguments)` on ranks 0 to `world` - 1: what each returned.

        `store` is one that only these ranks of this piece of work use.

        Raises:
            PooledRankFailed: with the rank's traceback.
        """
        for rank in range(len(self._workers), world):
            self._start(rank)
        self._number += 1
        pipes = self._pipes[:world]
        for pipe in pipes:
            pipe.send((self._number, world, act, arguments))
        found: dict[int, Any] = {}
        while len(found) < world:
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in found], PATIENCE)
            if not ready:
                self._fail(f"no answer from ranks {sorted(set(range(world)) - set(found))}")
            for pipe in ready:
                try:
                    went_well, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    went_well, value = False, "the process ended"
                if not went_well:
                    self._fail(value)
                found[pipes.index(pipe)] = value  # type: ignore[arg-type]
        return [found[rank] for rank in range(world)]

    def _start(self, rank: int) -> None:
        context = forks()
        if rank == 0:
            self._server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        here, there = context.Pipe()
        worker = context.Process(target=_serve, args=(rank, self._server.port, there), daemon=True)
        worker.start()
        there.close()
        self._pipes.append(here)
        self._workers.append(worker)

    def _fail(self, why: str) -> None:
        self.end()
        raise PooledRankFailed(why)

    def end(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._workers = [], []


def _serve(rank: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=PATIENCE))
    while True:
        try:
            number, world, act, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, act(rank, world, dist.PrefixStore(str(number), store), *arguments)))
        except Exception as error:
            pipe.send((False, f"rank {rank}: {error}\n{traceback.format_exc()}"))
