"""Decisions, times and texts among many ranks, over few connections: a tree of small groups.

A gloo group connects each of its ranks with each other one, so one over 1,024 ranks has 1,023 sockets a rank. Here 16
neighbours form a group, of 16 such groups the first ranks form the next one, and so on: a rank has at most 15 peers on
each level, 1,024 ranks have three levels, and rank 0 gets their arrays through 33 connections.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

N = TypeVar("N", bound=np.generic)

WIDTH = 16
"""Ranks of a group."""


@dataclass(frozen=True)
class TreeLevel:
    """A group of the tree: its first rank leads it, and stands for it on the next level."""

    number: int
    """0 among neighbours."""
    ranks: tuple[int, ...]
    below: tuple[int, ...]
    """Ranks that each of `ranks` stands for, itself among them: they are consecutive."""


class TreeCarrier(Protocol):
    """Bytes from rank to rank within a level's group."""

    def send(self, level: int, to: int, data: NDArray[np.uint8]) -> None:
        """Until the bytes are on their way."""

    def receive(self, level: int, source: int, size: int) -> NDArray[np.uint8]:
        """`size` bytes of `source`."""


def levels(rank: int, world: int, width: int = WIDTH) -> list[TreeLevel]:
    """The groups of a rank, from its neighbours' up; those in which it is not the first end the list."""
    groups, stride, number = list[TreeLevel](), 1, 0
    while stride < world and rank % stride == 0:
        first = rank // (stride * width) * stride * width
        ranks = tuple(range(first, min(world, first + stride * width), stride))
        if len(ranks) > 1:
            groups.append(TreeLevel(number, ranks, tuple(min(stride, world - one) for one in ranks)))
        stride, number = stride * width, number + 1
    return groups


class ControlTree:
    """What ranks of a measurement exchange beside what is measured. Methods are called by every rank at the same point.

    Args:
        rank: of all.
        groups: the rank's groups, from `levels`.
        carrier: how bytes go.
    """

    def __init__(self, rank: int, groups: list[TreeLevel], carrier: TreeCarrier) -> None:
        self._rank, self._groups, self._carrier = rank, groups, carrier

    def gather(self, array: NDArray[N]) -> NDArray[N] | None:
        """All ranks' arrays of one shape and type on rank 0, [ranks, ...]; None elsewhere."""
        mine = np.asarray(array)[None]
        for group in self._groups:
            if group.ranks[0] != self._rank:
                self._carrier.send(group.number, group.ranks[0], _bytes(mine))
                return None
            parts = [mine]
            for source, count in zip(group.ranks[1:], group.below[1:], strict=True):
                data = self._carrier.receive(group.number, source, count * array.nbytes)
                parts.append(data.view(array.dtype).reshape(count, *array.shape))
            mine = np.concatenate(parts)
        return mine

    def broadcast(self, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Rank 0's bytes, of a size that all know, on all ranks."""
        for group in reversed(self._groups):
            if group.ranks[0] == self._rank:
                for peer in group.ranks[1:]:
                    self._carrier.send(group.number, peer, data)
            else:
                data = self._carrier.receive(group.number, group.ranks[0], data.nbytes)
        return data

    def broadcast_int(self, number: int) -> int:
        """Rank 0's number, on all ranks."""
        return int(self.broadcast(_bytes(np.array([number], dtype=np.int64))).view(np.int64)[0])

    def broadcast_object(self, item: Any) -> Any:
        """Rank 0's item, on all ranks."""
        data = _bytes(np.frombuffer(pickle.dumps(item), dtype=np.uint8))
        size = self.broadcast_int(len(data))
        return pickle.loads(self.broadcast(data if self._rank == 0 else np.empty(size, np.uint8)).tobytes())  # noqa: S301

    def all_gather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on all ranks."""
        packed = [pickle.dumps(item)]
        for group in self._groups:
            if group.ranks[0] != self._rank:
                self._send_object(group.number, group.ranks[0], packed)
                break
            for source in group.ranks[1:]:
                packed += self._receive_object(group.number, source)
        return [pickle.loads(one) for one in self.broadcast_object(packed)]  # noqa: S301

    def total(self, number: int) -> int:
        """The sum of all ranks' numbers, on all ranks."""
        every = self.gather(np.array(number, dtype=np.int64))
        return self.broadcast_int(0 if every is None else int(every.sum()))

    def wait(self) -> None:
        """Until all ranks are here."""
        self.total(0)

    def _send_object(self, level: int, to: int, item: Any) -> None:
        data = np.frombuffer(pickle.dumps(item), dtype=np.uint8)
        self._carrier.send(level, to, _bytes(np.array([len(data)], dtype=np.int64)))
        self._carrier.send(level, to, _bytes(data))

    def _receive_object(self, level: int, source: int) -> Any:
        size = int(self._carrier.receive(level, source, 8).view(np.int64)[0])
        return pickle.loads(self._carrier.receive(level, source, size).tobytes())  # noqa: S301


class GlooCarrier:
    """Over a gloo group for each level, made by its members alone.

    `dist.new_group` would have each of 1,024 ranks go through all 69 groups, or give them names that depend on how many
    groups a rank has made before.

    Args:
        rank: of all.
        groups: the rank's groups, from `levels`.
        store: of all ranks.
        limit: of one message.
        world: a gloo group of all ranks, where there is one anyway: it is used instead.
    """

    def __init__(
        self,
        rank: int,
        groups: list[TreeLevel],
        store: dist.Store,
        limit: timedelta,
        world: dist.ProcessGroup | None = None,
    ) -> None:
        self._groups: dict[int, tuple[Any, tuple[int, ...] | None]] = {}
        for group in groups:
            if world is not None:
                self._groups[group.number] = (world, None)
                continue
            mine = dist.PrefixStore(f"megaray-tree/{group.number}/{group.ranks[0]}", store)
            made = dist.ProcessGroupGloo(mine, group.ranks.index(rank), len(group.ranks), limit)
            self._groups[group.number] = (made, group.ranks)

    def send(self, level: int, to: int, data: NDArray[np.uint8]) -> None:
        """As `TreeCarrier.send`."""
        group, ranks = self._groups[level]
        group.send([torch.from_numpy(data)], to if ranks is None else ranks.index(to), 0).wait()

    def receive(self, level: int, source: int, size: int) -> NDArray[np.uint8]:
        """As `TreeCarrier.receive`."""
        data = torch.empty(size, dtype=torch.uint8)
        group, ranks = self._groups[level]
        group.recv([data], source if ranks is None else ranks.index(source), 0).wait()
        return data.numpy()


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of an array as one that torch may read from."""
    return np.frombuffer(bytearray(array.tobytes()), dtype=np.uint8)
