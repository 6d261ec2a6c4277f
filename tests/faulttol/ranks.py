"""Several ranks in one process: threads that gather and broadcast, and the pieces they save."""

from __future__ import annotations

import pickle
import queue
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.pieces import TensorPiece
from faulttol.checkpoint.save import Identity, Retention, Saved, save

T = TypeVar("T")
LAYOUT = {"pp": 1, "dp": 2, "ep": 2}
_PATIENCE = 20.0


class _Meeting:
    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.items = [b""] * world
        self.sent: dict[tuple[int, int], queue.Queue[bytes]] = {
            (a, b): queue.Queue() for a in range(world) for b in range(world)
        }


class ThreadPeers:
    """`Peers` of one of several threads; what they tell each other is pickled, as it is between processes."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def _exchange(self, item: Any) -> list[Any]:
        self._meeting.items[self._rank] = pickle.dumps(item)
        self._meeting.barrier.wait(_PATIENCE)
        items = [pickle.loads(told) for told in self._meeting.items]
        self._meeting.barrier.wait(_PATIENCE)
        return items

    def gather(self, item: Any) -> list[Any] | None:
        items = self._exchange(item)
        return items if self._rank == 0 else None

    def broadcast(self, item: Any) -> Any:
        return self._exchange(item)[0]

    def exchange(self, out: Sequence[tuple[int, memoryview]], into: Sequence[tuple[int, memoryview]]) -> None:
        for rank, data in out:
            self._meeting.sent[self._rank, rank].put(bytes(data))
        for rank, data in into:
            data[:] = self._meeting.sent[rank, self._rank].get(timeout=_PATIENCE)


def together(world: int, act: Callable[[int, ThreadPeers], T]) -> list[T | Exception]:
    """`act(rank, peers)` on all ranks at once: what each returned or raised."""
    meeting = _Meeting(world)

    def one(rank: int) -> T | Exception:
        try:
            return act(rank, ThreadPeers(meeting, rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def identity(rank: int, world: int, run: str = "run-1", attempt: int = 1) -> Identity:
    """Who a rank is."""
    return Identity(run, attempt, LAYOUT, rank, world)


def piece(name: str, data: bytes, whole: int, start: int) -> TensorPiece:
    """A stretch of a flat tensor of bytes."""
    return TensorPiece(name, "uint8", Box((whole,), (start,), (len(data),)), memoryview(data))


def values(world: int, step: int, size: int = 1000) -> dict[str, bytes]:
    """A state of bytes by name: a tensor that the ranks share, a small one, and an odd one for each rank."""
    noise = random.Random(step)
    own = {f"own/{rank}": noise.randbytes(7) for rank in range(world)}
    return {"weight": noise.randbytes(size * world), "bias": b"%010d" % step, **own}


def pieces(rank: int, world: int, step: int, size: int = 1000) -> list[TensorPiece]:
    """A rank's share of `values`."""
    state = values(world, step, size)
    share = state["weight"][size * rank : size * (rank + 1)]
    mine = [
        piece("weight", share, size * world, size * rank),
        piece(f"own/{rank}", state[f"own/{rank}"], 7, 0),
    ]
    return mine + [piece("bias", state["bias"], 10, 0)] * (rank == world - 1)


def save_all(
    root: object,
    step: int,
    world: int = 2,
    keep: int = 2,
    run: str = "run-1",
    attempt: int = 1,
    every: int | None = None,
) -> list[Saved | Exception]:
    """Save `values` on all ranks."""
    return together(
        world,
        lambda rank, peers: save(
            str(root),
            step,
            pieces(rank, world, step),
            identity(rank, world, run, attempt),
            {"loss": step / 7},
            peers,
            Retention(keep, every),
        ),
    )
