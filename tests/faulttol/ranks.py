"""Several ranks in one process: threads that gather and broadcast, and the shards they save."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from faulttol.checkpoint.pieces import Piece, Shard

T = TypeVar("T")
LAYOUT = {"pp": 1, "dp": 2, "ep": 2}
_PATIENCE = 20.0


class _Meeting:
    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.items: list[Any] = [None] * world


class ThreadPeers:
    """`Peers` of one of several threads."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def _exchange(self, item: Any) -> list[Any]:
        self._meeting.items[self._rank] = item
        self._meeting.barrier.wait(_PATIENCE)
        items = list(self._meeting.items)
        self._meeting.barrier.wait(_PATIENCE)
        return items

    def gather(self, item: Any) -> list[Any] | None:
        items = self._exchange(item)
        return items if self._rank == 0 else None

    def broadcast(self, item: Any) -> Any:
        return self._exchange(item)[0]


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


def piece(name: str, data: bytes, whole: int, start: int) -> Piece:
    """A stretch of a flat tensor of bytes."""
    return Piece(name, "uint8", (len(data),), (whole,), (start,), memoryview(data))


def shard(rank: int, world: int, step: int, size: int = 1000) -> Shard:
    """A rank's share of a tensor, a replica that all have, and an odd-sized piece of its own."""
    noise = random.Random(f"{step}/{rank}")
    pieces = [
        piece("weight", noise.randbytes(size), size * world, size * rank),
        piece("bias", b"%010d" % step, 10, 0),
        piece(f"own/{rank}", noise.randbytes(7), 7, 0),
    ]
    return Shard(rank, world, LAYOUT, pieces, {"loss": step / 7, "run": "r"})


def same(one: Shard, other: Shard) -> bool:
    """Whether two shards hold the same bytes under the same names."""
    return (one.rank, one.world, one.layout, one.scalars) == (
        other.rank,
        other.world,
        other.layout,
        other.scalars,
    ) and [_plain(p) for p in one.pieces] == [_plain(p) for p in other.pieces]


def _plain(p: Piece) -> tuple[Any, ...]:
    return p.name, p.dtype, p.shape, p.global_shape, p.start, bytes(p.data)
