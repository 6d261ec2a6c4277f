"""Control messages over a tree: each rank is reached, none has many connections, and real ranks agree with flat ones."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch.distributed as dist
from numpy.typing import NDArray

from collectives.timing.tree import ControlTree, GlooCarrier, TreeLevel, levels
from configs.rank import RankContext
from tests.collectives.ranks import together

pytestmark = [pytest.mark.timeout(120)]


class QueueCarrier:
    """Ranks as threads: a queue for each pair of ranks on each level."""

    def __init__(self, rank: int, queues: dict[tuple[int, int, int], queue.SimpleQueue[bytes]]) -> None:
        self._rank, self._queues = rank, queues
        self.peers: set[tuple[int, int]] = set()

    def send(self, level: int, to: int, data: NDArray[np.uint8]) -> None:
        self.peers.add((level, to))
        self._queues[level, self._rank, to].put(data.tobytes())

    def receive(self, level: int, source: int, size: int) -> NDArray[np.uint8]:
        self.peers.add((level, source))
        data = self._queues[level, source, self._rank].get(timeout=20)
        assert len(data) == size
        return np.frombuffer(bytearray(data), dtype=np.uint8)


def exchanged(tree: ControlTree, rank: int) -> tuple[Any, ...]:
    """One of each kind of message."""
    gathered = tree.gather(np.array([rank, rank * rank], dtype=np.int32))
    flags = tree.gather(np.array(rank % 3 == 0))
    number = tree.broadcast_int(41 + rank)
    item = tree.broadcast_object({"from": rank, "text": "x" * 100})
    shared = tree.all_gather("" if rank % 2 else f"rank {rank}")
    return gathered, flags, number, item, shared, tree.total(rank)


def check(answers: list[tuple[Any, ...]]) -> None:
    world = len(answers)
    gathered, flags = answers[0][:2]
    assert gathered.tolist() == [[rank, rank * rank] for rank in range(world)] and gathered.dtype == np.int32
    assert flags.tolist() == [rank % 3 == 0 for rank in range(world)]
    assert all(one[0] is None and one[1] is None for one in answers[1:])
    want = (41, {"from": 0, "text": "x" * 100}, ["" if r % 2 else f"rank {r}" for r in range(world)])
    for one in answers:
        assert one[2:] == (*want, world * (world - 1) // 2)


def simulated(world: int, width: int) -> tuple[list[tuple[Any, ...]], int]:
    """Answers of all ranks, and the most peers that one exchanged messages with."""
    queues: dict[tuple[int, int, int], queue.SimpleQueue[bytes]] = defaultdict(queue.SimpleQueue)
    for rank in range(world):  # beforehand: threads must not make them at once
        for group in levels(rank, world, width):
            for peer in group.ranks:
                queues[group.number, rank, peer], queues[group.number, peer, rank]
    answers: list[Any] = [None] * world
    carriers = [QueueCarrier(rank, queues) for rank in range(world)]

    def run(rank: int) -> None:
        answers[rank] = exchanged(ControlTree(rank, levels(rank, world, width), carriers[rank]), rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=40)
    assert all(answer is not None for answer in answers)
    return answers, max(len(carrier.peers) for carrier in carriers)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("world", "width"), [(2, 16), (16, 16), (17, 16), (7, 2), (10, 3), (37, 4), (300, 16)]
)
def test_every_rank_is_reached(world: int, width: int) -> None:
    answers, _ = simulated(world, width)
    check(answers)


@pytest.mark.unit
@pytest.mark.parametrize("world", [1024, 12288])
def test_a_rank_has_few_connections(world: int) -> None:
    """Each group connects each of its ranks with each other one."""
    sockets = [sum(len(group.ranks) - 1 for group in levels(rank, world)) for rank in range(world)]
    assert max(sockets) <= 64 and min(sockets) >= 1
    led = [rank for rank in range(world) for group in levels(rank, world) if group.ranks[0] != rank]
    assert sorted(led) == list(range(1, world)), "each but the first has one leader"


def on_gloo(rank: RankContext, flat: bool) -> tuple[Any, ...]:
    """The same over gloo, with groups of two or over the group of all; and how many connections that took."""
    limit = timedelta(seconds=30)
    store = dist.TCPStore(rank.master_addr, rank.master_port, rank.world, rank.rank == 0, limit)
    world = None
    if flat:
        dist.init_process_group("gloo", store=store, rank=rank.rank, world_size=rank.world, timeout=limit)
        world = dist.group.WORLD
    before = connections()
    groups = levels(rank.rank, rank.world, width=2)
    carrier = GlooCarrier(rank.rank, groups, store, limit, world)
    answer = exchanged(ControlTree(rank.rank, groups, carrier), rank.rank)
    made = connections() - before
    store.add("over", 1)
    while store.add("over", 0) < rank.world:  # rank 0 holds the store
        time.sleep(0.01)
    return answer, made, 0 if flat else sum(len(group.ranks) - 1 for group in groups)


def connections() -> int:
    return sum(
        one.status == psutil.CONN_ESTABLISHED for one in psutil.Process(os.getpid()).net_connections("tcp")
    )


@pytest.mark.dist
@pytest.mark.parametrize("flat", [False, True])
def test_real_ranks_exchange_the_same(tmp_path: Path, flat: bool) -> None:
    found = together(6, tmp_path, on_gloo, flat)
    check([answer for answer, _, _ in found])
    for _, made, expected in found:
        assert made == expected, "no connection but those of its groups"


@pytest.mark.unit
def test_levels_are_of_consecutive_ranks() -> None:
    assert levels(0, 5, width=2) == [
        TreeLevel(0, (0, 1), (1, 1)),
        TreeLevel(1, (0, 2), (2, 2)),
        TreeLevel(2, (0, 4), (4, 1)),
    ]
    assert levels(3, 5, width=2) == [TreeLevel(0, (2, 3), (1, 1))]
    assert levels(4, 5, width=2) == [TreeLevel(2, (0, 4), (4, 1))]
