"""Groups of a layout: who is in which, by brute force, and what making them costs."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from configs.schema import ParallelConfig
from trainer.parallel.mesh import dense_groups, make_groups
from trainer.parallel.pipeline import cut, stages_of

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

LAYOUTS = [
    {"dp": 4, "ep": 2},
    {"pp": 2, "dp": 2, "cp": 2, "tp": 2, "ep": 4, "etp": 2},
    {"dp": 3, "tp": 2, "ep": 6},
    {"cp": 2, "tp": 4, "ep": 2, "etp": 4},
    {"pp": 3, "dp": 2, "ep": 2},
]


def _world(layout: dict[str, int]) -> int:
    return layout.get("pp", 1) * layout.get("dp", 1) * layout.get("cp", 1) * layout.get("tp", 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_are_those_of_the_coordinates(layout: dict[str, int]) -> None:
    """Ranks share a group along an axis where all their other coordinates of that view agree."""
    parallel = ParallelConfig(**layout)
    world = _world(layout)
    dense = ("pp", "dp", "cp", "tp")
    where = dict(enumerate(product(*(range(parallel.size(axis)) for axis in dense))))
    width = world // parallel.size("pp")
    edp = width // (parallel.size("ep") * parallel.size("etp"))
    sparse = {
        rank: (
            rank // width,
            *list(product(range(edp), range(parallel.size("ep")), range(parallel.size("etp"))))[rank % width],
        )
        for rank in range(world)
    }

    def sharing(rank: int, places: dict[int, tuple[int, ...]], free: set[int]) -> tuple[int, ...]:
        mine = places[rank]
        return tuple(
            other
            for other in range(world)
            if all(i in free or a == b for i, (a, b) in enumerate(zip(mine, places[other], strict=True)))
        )

    for rank in range(world):
        found = dense_groups(parallel, rank)
        for name, free in (
            ("pp", {0}), ("dp", {1}), ("cp", {2}), ("tp", {3}), ("dp_cp", {1, 2}), ("sample", {2, 3}), ("stage", {1, 2, 3}),
        ):  # fmt: skip
            assert found[name] == sharing(rank, where, free), name
        for name, free in (("edp", {1}), ("ep", {2}), ("etp", {3})):
            assert found[name] == sharing(rank, sparse, free), name


def test_layers_are_cut_evenly_and_stages_dealt_out() -> None:
    assert cut(61, 4) == [(0, 16), (16, 31), (31, 46), (46, 61)]
    assert cut(4, 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    interleaved = ParallelConfig(pp=2, schedule="interleaved", chunks=2)
    assert [stages_of(interleaved, rank) for rank in range(2)] == [[0, 2], [1, 3]]
    assert [stages_of(ParallelConfig(pp=3, schedule="zbv"), rank) for rank in range(3)] == [
        [0, 5],
        [1, 4],
        [2, 3],
    ]


class _Counting(dist.Store):
    """A store that counts what it is asked."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self._inner, self.asked = inner, 0

    def set(self, key: str, value: Any) -> None:
        self.asked += 1
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        self.asked += 1
        return self._inner.get(key)

    def add(self, key: str, amount: int) -> int:
        self.asked += 1
        return self._inner.add(key, amount)

    def wait(self, keys: Any, *timeout: Any) -> None:
        self.asked += 1
        self._inner.wait(keys, *timeout)

    def check(self, keys: Any) -> bool:
        self.asked += 1
        return self._inner.check(keys)

    def delete_key(self, key: str) -> bool:
        return self._inner.delete_key(key)


def _count(rank: int, world: int, port: int, answers: Any) -> None:
    store = _Counting(dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    before = store.asked
    groups = dense_groups(ParallelConfig(dp=world // 2, tp=2, ep=2), rank)
    # Groups whose size is the same in both worlds: gloo asks for the address of each member.
    make_groups({name: groups[name] for name in ("tp", "sample", "ep", "etp")}, rank, world)
    answers.put((world, store.asked - before))
    dist.barrier()


def test_what_a_rank_asks_of_the_store_does_not_grow_with_the_world() -> None:
    """MegaScale section 3.5: groups made with a barrier of all ranks each took 1,047 s at 2,048 ranks."""
    context = mp.get_context("spawn")
    answers = context.Queue()
    asked: dict[int, set[int]] = {4: set(), 8: set()}
    for world in asked:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [context.Process(target=_count, args=(r, world, server.port, answers)) for r in range(world)]
        for one in ranks:
            one.start()
        asked[world] |= {answers.get(timeout=100)[1] for _ in ranks}
        for one in ranks:
            one.join()
    assert min(asked[4]) > 0, "the count must count"
    assert asked[8] == asked[4]
