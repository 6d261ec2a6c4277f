"""Groups of a layout: who is in which, by brute force, and what making them costs."""

from __future__ import annotations

import ast
import os
import threading
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import trainer
from configs.compose import compose
from configs.library_environment import Applied
from configs.schema import ParallelConfig
from tests.forks import forks
from tests.trainer.parallel.rank_pool import RankPool
from trainer.loop import make_engine
from trainer.parallel import apply
from trainer.parallel import mesh as meshes
from trainer.parallel.apply import axes_in_use
from trainer.parallel.mesh import (
    Axis,
    CommunicatorSetup,
    Mesh,
    assemble,
    collective_timeout,
    dense_groups,
    make_groups,
)
from trainer.parallel.stages import split_layers, stages_of

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
    assert split_layers(61, 4) == [(0, 16), (16, 31), (31, 46), (46, 61)]
    assert split_layers(4, 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]
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
    limit = timedelta(minutes=1)
    make_groups({name: groups[name] for name in ("tp", "sample", "ep", "etp")}, rank, world, limit)
    answers.put((world, store.asked - before))
    dist.barrier()


def test_what_a_rank_asks_of_the_store_does_not_grow_with_the_world() -> None:
    """MegaScale section 3.5: groups made with a barrier of all ranks each took 1,047 s at 2,048 ranks."""
    context = forks()
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


# ---- how long a collective may take ----

_LAYOUTS_BY_ENGINE = {
    "native": ("parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "model.tie_embeddings=true"),
    "deepspeed": ("parallel.dp=4", "parallel.ep=2"),
}


def _limits(rank: int, world: int, store: Any, engine: str) -> tuple[timedelta, Counter[timedelta]]:
    """What is configured, and how many groups have which."""
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed wants it
    config = compose(
        ["model=demo", "hardware=cpu", f"train.engine={engine}", "train.precision=fp32", "train.micro_batch=1",
         "train.global_batch=8", "data.sequence=32", "resilience.timeouts.patience=13", *_LAYOUTS_BY_ENGINE[engine]]
    )  # fmt: skip
    limit = collective_timeout(config)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    try:
        cpu = torch.device("cpu")
        mesh = assemble(config, rank, world, cpu, dist.group.WORLD, Applied())  # type: ignore[arg-type]
        running = make_engine(config, mesh)
        groups = tuple(dist.distributed_c10d._world.pg_map)
        limits = Counter(group._get_backend(cpu).options._timeout for group in groups)
        del running
        return limit, limits
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("engine", _LAYOUTS_BY_ENGINE)
def test_every_group_has_the_configured_limit(engine: str) -> None:
    pool = RankPool()
    try:
        for limit, limits in pool.run(4, _limits, engine):
            assert limit == timedelta(seconds=130)
            assert set(limits) == {limit} and limits[limit] >= 4
    finally:
        pool.end()


def test_no_group_is_made_without_a_limit() -> None:
    """Those of GPUs alone too, whose torch waits for ten or thirty minutes otherwise."""
    calls = {}
    for file in Path(trainer.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".new_group"):
                calls[file.name, node.lineno] = {keyword.arg for keyword in node.keywords}
    assert len(calls) >= 4
    assert [place for place, keywords in calls.items() if "timeout" not in keywords] == []


class _Group:
    """A process group whose communicator is made, or can't be."""

    def __init__(self, made: list[_Group], error: Exception | None = None) -> None:
        self._made, self._error = made, error

    def _get_backend(self, device: torch.device) -> _Group:
        assert device == torch.device("cuda", 1)
        return self

    def eager_connect_single_device(self, device: torch.device) -> None:
        assert device == torch.device("cuda", 1)
        if self._error is not None:
            raise self._error
        self._made.append(self)

    def size(self) -> int:
        return 2


class _Slow(_Group):
    """One whose communicator takes its time."""

    def __init__(self) -> None:
        super().__init__([])
        self.may, self.done = threading.Event(), threading.Event()

    def eager_connect_single_device(self, device: torch.device) -> None:
        assert device == torch.device("cuda", 1) and self.may.wait(30.0)


def _of_two(groups: dict[str, Any], device: torch.device) -> Mesh:
    axes = {name: Axis(group, (0, 1), 1) for name, group in groups.items()}
    axes["tp"] = Axis(None, (1,), 0)
    axes["edp"] = Axis(_Group([], RuntimeError("one rank needs none")), (1,), 0)  # type: ignore[arg-type]
    return Mesh(1, 2, {}, device, axes, None, Applied())  # type: ignore[arg-type]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """Communicators that were used once, and their ranks; one that waits says that it was."""
    uses: list[tuple[Any, int]] = []

    def use(group: _Group, size: int, device: torch.device) -> None:
        assert device == torch.device("cuda", 1)
        uses.append((group, size))
        if isinstance(group, _Slow):
            group.done.set()

    monkeypatch.setattr(meshes, "_use", use)
    return uses


def test_communicators_are_made_once_each_in_the_order_of_axes(used: list[tuple[Any, int]]) -> None:
    made: list[_Group] = []
    world, wide, unused = _Group(made), _Group(made), _Group(made)
    mesh = _of_two({"stage": world, "dp": unused, "ep": world, "ep_wide": wide}, torch.device("cuda", 1))
    mesh.communicators.wait()
    assert not made, "nothing was begun"
    names = ("stage", "edp", "ep", "ep_wide", "tp")
    mesh.communicators.begin({name: mesh[name] for name in names}, mesh.device)
    mesh.communicators.wait()
    mesh.communicators.wait()
    assert made == [world, wide] and list(mesh.communicators.seconds) == ["stage", "ep_wide"]
    assert used == [(world, 2), (wide, 2)], "only then are the ranks connected"
    nothing = CommunicatorSetup()
    nothing.begin({"stage": mesh["stage"]}, torch.device("cpu"))
    nothing.wait()
    assert len(made) == 2 and not nothing.seconds, "gloo has no communicators to make"


def test_a_communicator_that_cannot_be_made_ends_the_start() -> None:
    made: list[_Group] = []
    broken, after = _Group(made, dist.DistBackendError("unhandled system error")), _Group(made)
    mesh = _of_two({"stage": broken, "ep": after}, torch.device("cuda", 1))
    mesh.communicators.begin({"stage": mesh["stage"], "ep": mesh["ep"]}, mesh.device)
    errors: list[dist.DistBackendError] = []

    def wait() -> None:
        for _ in range(2):
            try:
                mesh.communicators.wait()
            except dist.DistBackendError as error:
                errors.append(error)

    waits = threading.Thread(target=wait, daemon=True)
    waits.start()
    waits.join(10.0)
    assert [str(error) for error in errors] == ["unhandled system error"] * 2, "at once, and each time"
    assert not made


def test_the_first_step_uses_the_tokens_own_communicator_only_where_they_are_gathered() -> None:
    mesh = _of_two({"ep": _Group([])}, torch.device("cpu"))
    mesh.axes["etp"] = Axis(None, (1,), 0)
    assert "ep_wide" in axes_in_use(mesh, 2) and "ep_wide" not in axes_in_use(mesh, 1)


@pytest.mark.usefixtures("used")
def test_no_collective_of_the_build_comes_before_its_communicator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that ask for the communicator of one group make two, and the ranks hang."""
    world, other, seen = _Slow(), _Slow(), list[bool]()
    mesh = _of_two({"dp_cp": world, "ep_wide": other}, torch.device("cuda", 1))
    mesh.communicators.begin({name: mesh[name] for name in ("dp_cp", "ep_wide")}, mesh.device)
    module = SimpleNamespace(
        unshard=lambda: seen.append(world.done.is_set()), reshard=lambda: seen.append(world.done.is_set())
    )
    monkeypatch.setattr(apply, "sharded", lambda _: [module])
    threading.Timer(0.2, world.may.set).start()
    apply.materialize(torch.nn.Module(), {}, None, replace(mesh, device=torch.device("cpu")))  # type: ignore[arg-type]
    assert seen == [True, True] and not other.done.is_set(), "it waits for no other"
    other.may.set()
    mesh.communicators.wait()
    assert other.done.is_set()
