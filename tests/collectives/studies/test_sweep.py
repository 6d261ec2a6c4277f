"""Every operation, type, reduction, placement and group on real ranks, exact; and what is corrupted, counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from collectives.ops import transfers
from collectives.ops.exact import MOVED_ONLY, TYPES
from collectives.ops.groups import AXES, GroupPartition
from collectives.ops.operations import OPERATIONS
from collectives.ops.transfers import COPIED, GroupMember, Transfer, TransferCase, matrix_of
from collectives.store.results import ResultStore, SweepRow
from collectives.studies.sweep import SweepRunner, _multicast, series
from collectives.timing.team import Team, choose_device
from configs.compose import compose
from configs.errors import UserError
from configs.paths import RunPaths
from configs.rank import RankContext
from tests.collectives.ranks import measure, quick, together
from tests.collectives.store.test_results import SCHEMA, strays

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

PERIOD = 65_521
ONE = dict.fromkeys(AXES, 1)


# ---- every case ----


def reductions(op: str, dtype: str) -> tuple[str, ...]:
    """The legal ones."""
    if not OPERATIONS[op].reduces:
        return ("none",)
    own = ("avg",) if TYPES[dtype].is_floating_point else ("band", "bor", "bxor")
    return ("sum", "prod", "max", "min", *own)


def every_case(world: int) -> Iterator[TransferCase]:
    """Every operation, type, reduction and placement; odd counts, and for some types more than a period."""
    for op, dtype in product(OPERATIONS.values(), sorted({*TYPES} - {*MOVED_ONLY})):
        long = {2: ("int8", "bfloat16", "double"), 4: ("half", "int32"), 8: ("float",)}[world]
        for count in (*((1, 6) if world == 2 else ()), 1001, *((PERIOD + 13,) if dtype in long else ())):
            for redop, in_place in product(reductions(op.name, dtype), (False, True)):
                if in_place and not op.in_place:
                    continue
                for root in {0, world - 1} if op.rooted and count > 1 else {0 if op.rooted else -1}:
                    matrix = matrix_of(op.name, count, TYPES[dtype], world, 1.0)
                    yield TransferCase(op.name, count, TYPES[dtype], redop, root, in_place, matrix)


def check_every_case(rank: RankContext) -> tuple[int, list[str]]:
    """Cases checked, and those of which this rank saw wrong elements."""
    team = Team.join(quick(), rank)
    seat = team.membership(GroupPartition("world", (tuple(range(rank.world)),)))
    assert seat is not None
    cases = list(every_case(rank.world))
    return len(cases), [str(case) for case in cases if Transfer(case, seat).check()]


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.long)])
def test_no_element_of_any_case_is_wrong(world: int, tmp_path: Path) -> None:
    for checked, wrong in together(world, tmp_path, check_every_case):
        assert checked > 400
        assert not wrong


# ---- every group ----

LAYOUTS = [ONE | {"pp": 2, "dp": 2, "tp": 2, "ep": 2, "etp": 2}, ONE | {"dp": 2, "cp": 4, "ep": 4, "etp": 2}]
KINDS = ["world", "node", "across", "pairs", "MOD2", "DIV2", "AND0x1", "OR0x1"]


def check_groups(rank: RankContext) -> list[tuple[str, str, int, int]]:
    """All operations over all kinds of groups, as if every two ranks were on a node of their own.

    Of each case: operation, kind of group, groups that ran at once, and wrong elements of this rank.
    """
    config = quick(
        "collectives.ops=" + ",".join(OPERATIONS), "collectives.dtypes=bfloat16",
        "collectives.min_size=6000", "collectives.max_size=6000", "collectives.root=1",
    )  # fmt: skip
    team, found = Team.join(config, rank), []
    for member in team.members:
        member["hostname"] = f"node-{member['rank'] // 2}"
    axes = [(layout, [axis for axis in AXES if layout[axis] > 1]) for layout in LAYOUTS if rank.world == 8]
    for layout, kinds in [(ONE, KINDS), *axes]:
        settings = config.collectives.model_copy(update={"groups": tuple(kinds)})
        for one in series(settings, team.nodes, layout):
            seat, op, dtype, n = (
                team.membership(one.partition),
                one.op.name,
                TYPES[one.dtype],
                one.partition.ranks,
            )
            assert seat is not None
            for count, in_place in product(one.counts, (False, True)[: 1 + one.op.in_place]):
                case = TransferCase(
                    op, count, dtype, one.redop, one.root, in_place, matrix_of(op, count, dtype, n, 0.5)
                )
                found.append(
                    (op, one.partition.kind, len(one.partition.groups), Transfer(case, seat).check())
                )
    return found


@pytest.mark.parametrize("world", [4, 8])
def test_no_element_is_wrong_in_any_group(world: int, tmp_path: Path) -> None:
    kinds = {*KINDS, *(f"pairs{i}" for i in range(1, world))} - {"pairs"}
    if world == 8:
        kinds |= {"pp", "dp", "cp", "tp", "ep", "etp"}
    for cases in together(world, tmp_path, check_groups):
        assert not [case for case in cases if case[-1]]
        assert {case[:2] for case in cases} == set(product(OPERATIONS, kinds))
        assert {kind: groups for _, kind, groups, _ in cases}.items() >= {
            "world": 1,
            "node": world // 2,
        }.items()


# ---- what is corrupted ----

CALLS: dict[str, tuple[Any, str, int]] = {
    "all_reduce": (dist, "all_reduce", 0), "all_gather": (transfers, "_all_gather", 0),
    "reduce_scatter": (transfers, "_reduce_scatter", 0), "all_to_all": (dist, "all_to_all_single", 0),
    "all_to_allv": (dist, "all_to_all_single", 0), "broadcast": (dist, "broadcast", 0), "reduce": (dist, "reduce", 0),
    "gather": (dist, "gather", 1), "scatter": (dist, "scatter", 0), "sendrecv": (dist, "batch_isend_irecv", 0),
}  # fmt: skip
"""The call of each operation, and which of its arguments holds what is received."""
BATCH = dist.batch_isend_irecv
FIRST, LAST, BOTH, MANY = (0,), (-1,), (0, 1, -2, -1), tuple(range(100))
CORRUPTED = [
    # operation, type, reduction, bytes, groups, places in what is received, ranks that corrupt them
    ("all_reduce", "float", "sum", 4004, "world", FIRST, {0}),
    ("all_reduce", "bfloat16", "avg", 2 * PERIOD + 2, "world", LAST, {3}),
    ("all_reduce", "int8", "band", 1001, "MOD2", BOTH, {1, 2}),
    ("all_gather", "half", "none", 8192, "world", LAST, {2}),
    ("all_gather", "int64", "none", 8192, "DIV2", MANY, {0, 1, 3}),
    ("reduce_scatter", "double", "prod", 8192, "world", FIRST, {1}),
    ("reduce_scatter", "uint8", "bxor", 8192, "world", BOTH, {0, 1, 2, 3}),
    ("all_to_all", "int32", "none", 8192, "world", LAST, {2}),
    ("all_to_allv", "bfloat16", "none", 8192, "world", BOTH, {0, 3}),
    ("broadcast", "uint8", "none", 999, "world", LAST, {3}),
    ("broadcast", "half", "none", 8192, "MOD2", MANY, {2, 3}),
    ("reduce", "int32", "max", 8192, "world", FIRST, {1}),
    ("reduce", "float", "min", 4 * PERIOD + 4, "world", BOTH, {1}),
    ("gather", "int8", "none", 8192, "world", LAST, {1}),
    ("scatter", "double", "none", 8192, "world", BOTH, {0, 2}),
    ("sendrecv", "bfloat16", "none", 1002, "world", MANY, {2}),
]


def corrupting(real: Callable[..., Any], index: int, places: tuple[int, ...]) -> Callable[..., Any]:
    """The call, after which some elements of what was received are others."""

    @wraps(real)
    def call(*arguments: Any, **options: Any) -> Any:
        result, received = real(*arguments, **options), arguments[index]
        if real is BATCH:
            for work in result:
                work.wait()
            result, received = [], [step.tensor for step in received if step.op is dist.irecv]
        parts = [received] if isinstance(received, Tensor) else list(received or ())
        if parts and parts[0].dim() == 1 and len(parts[0]) > 8:  # not the ranks' own messages about times
            for place in places:
                part = parts[0 if place >= 0 else -1]
                part[place] = 0 if part[place] else 1
        return result

    return call


def sweep_corrupted(rank: RankContext) -> list[SweepRow]:
    team, found = Team.join(quick(), rank), []
    for i, (op, dtype, redop, size, groups, places, ranks) in enumerate(CORRUPTED):
        config = quick(
            f"collectives.ops={op}", f"collectives.dtypes={dtype}", f"collectives.groups={groups}",
            f"collectives.reductions={'sum' if redop == 'none' else redop}", f"collectives.min_size={size}",
            f"collectives.max_size={size}", "collectives.root=1",
        )  # fmt: skip
        owner, name, index = CALLS[op]
        changed = corrupting(getattr(owner, name), index, places)
        with mock.patch.object(owner, name, changed if rank.rank in ranks else getattr(owner, name)):
            found += measure(team, config, ONE, rank.run.root / str(i))
    return found


def test_corrupted_elements_are_counted_exactly(tmp_path: Path) -> None:
    rows = together(4, tmp_path, sweep_corrupted)[0]
    for row, (op, dtype, redop, *_, places, ranks) in zip(rows, CORRUPTED, strict=True):
        assert (row.op, row.dtype, row.redop) == (op, dtype, redop)
        assert [timing.wrong for timing in row.timings] == [len(places) * len(ranks)] * len(row.timings), row
        assert len(row.timings) == 1 + OPERATIONS[op].in_place


def sweep_with_barriers(rank: RankContext) -> list[SweepRow]:
    config = quick(
        "collectives.ops=all_reduce", "collectives.groups=pairs", "collectives.sync=barrier",
        "collectives.min_size=64", "collectives.max_size=64",
    )  # fmt: skip
    return measure(Team.join(config, rank), config, ONE, rank.run.root)


@pytest.mark.timeout(90)
def test_an_idle_rank_does_not_wait_at_barriers_of_the_others(tmp_path: Path) -> None:
    rows = together(3, tmp_path, sweep_with_barriers)[0]
    assert [row.group for row in rows] == ["pairs1", "pairs2", "pairs3"], "of three ranks one is idle in each"
    assert all(timing.wrong == 0 for row in rows for timing in row.timings)


def sweep_of_barriers(rank: RankContext) -> list[SweepRow]:
    config = quick("collectives.ops=barrier", "collectives.groups=pairs")
    return measure(Team.join(config, rank), config, ONE, rank.run.root)


@pytest.mark.timeout(90)
def test_a_barrier_of_some_ranks_is_not_wrong(tmp_path: Path) -> None:
    """What the idle rank and other groups did meanwhile was counted as leaving early, a critical finding."""
    rows = together(3, tmp_path, sweep_of_barriers)[0]
    assert [[timing.wrong for timing in row.timings] for row in rows] == [[0]] * 3


# ---- a real run, through nccl-tests' own reader where it is there ----


def small_sweep(rank: RankContext) -> None:
    config = quick(
        "collectives.ops=all_reduce,all_gather", "collectives.min_size=64", "collectives.max_size=128"
    )
    measure(Team.join(config, rank), config, ONE, rank.run.root)


def test_a_real_measurement_conforms_and_nccl_tests_reads_it(tmp_path: Path) -> None:
    together(2, tmp_path, small_sweep)
    store = ResultStore(tmp_path / "measurement")
    for name in ("all_reduce.world", "all_gather.world"):
        tree = json.loads((store.folder / f"{name}.json").read_text())
        assert strays(tree, SCHEMA) == []
        assert [r["out_of_place"]["nwrong"] for r in tree["results"]] == [0, 0]
    if not (tools := os.environ.get("NCCL_TESTS_TOOLS")):
        pytest.skip("NCCL_TESTS_TOOLS doesn't name nccl-tests' folder tools; the schema alone was checked")
    for placement in ((), ("--in-place",)):
        reader = [
            sys.executable,
            f"{tools}/analyze_perf_json.py",
            str(store.folder / "all_reduce.world.json"),
        ]
        done = subprocess.run([*reader, "--all", *placement], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Process rows: 2" in done.stdout
        assert "over process rows, " in done.stdout and "): PASS" in done.stdout
        for part in (
            "PER-ITERATION STATS",
            "STRAGGLER ANALYSIS",
            "SPIKE ANALYSIS",
            "ITERATION 0",
            "PER-NODE ANALYSIS (1 nodes",
        ):
            assert part in done.stdout


# ---- what can't be measured ----


@pytest.mark.parametrize(
    ("words", "world", "told"),
    [
        ("min_size=10 step_size=4", 2, "a size of 10 bytes is not whole elements of float (4 bytes each)"),
        ("reductions=band", 2, "reductions=band takes whole numbers, not float; use int8"),
        (
            "reductions=avg dtypes=int8",
            2,
            "reductions=avg takes half, bfloat16, float or double, not int8; use sum",
        ),
        ("reductions=avg", 3, "reductions=avg over 3 ranks has no exact value to check"),
        (
            "ops=reduce dtypes=f8e4m3",
            2,
            "dtypes=f8e4m3 is moved and not reduced: its sums have no exact value",
        ),
        ("ops=broadcast root=2", 2, "root=2 is not in a group of 2 ranks; set it from 0 to 1"),
        ("ops=broadcast root=2 groups=MOD2", 4, "root=2 is not in a group of 2 ranks"),
        ("groups=nodes", 4, "groups=nodes is not a kind of group (did you mean 'node'?)"),
        ("ops=all_gather max_size=60", 4, "no size from 8 to 60 bytes has 16 bytes for each rank; raise"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: str, world: int, told: str) -> None:
    config = compose(["workload=collectives", *(f"collectives.{word}" for word in words.split())])
    with pytest.raises(UserError) as caught:
        series(config.collectives, [0] * world, ONE | {"dp": world})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_several_types_and_reductions_the_pairs_that_there_are_are_measured() -> None:
    words = "dtypes=int32,float,f8e5m2 reductions=sum,avg,band ops=all_reduce,all_gather,reduce max_size=8 every_root=true"
    config = compose(["workload=collectives", *(f"collectives.{word}" for word in words.split())])
    found = series(
        config.collectives.model_copy(update={"max_size": 64, "min_size": 64}), [0, 0], ONE | {"dp": 2}
    )
    pairs = [("int32", "sum"), ("int32", "band"), ("float", "sum"), ("float", "avg")]
    assert [(one.op.name, one.dtype, one.redop, one.root) for one in found] == [
        *(("all_reduce", *pair, -1) for pair in pairs),
        *(("all_gather", dtype, "none", -1) for dtype in ("int32", "float", "f8e5m2")),
        *(("reduce", *pair, root) for pair in pairs for root in (0, 1)),
    ]
    assert [one.row(one.counts[0], None).size for one in found] == [64] * len(found)


# ---- one rank: what is in a call, and what isn't ----


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[GroupMember]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield GroupMember(dist.group.WORLD, (0,), 0, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("op", COPIED)
def test_out_of_place_nothing_is_copied_in_a_call(op: str, lone: GroupMember) -> None:
    """It was: 256 MiB took 15 % longer than in nccl-tests."""
    transfer = Transfer(
        TransferCase(op, 1000, torch.float, "sum", 0 if op != "all_reduce" else -1, False), lone
    )
    transfer._send.fill_(5)
    transfer.call()
    assert not transfer._receive.any()
    assert transfer._receive.data_ptr() != transfer._send.data_ptr()
    assert transfer.check() == 0


@pytest.mark.parametrize(
    ("op", "in_place"), [("all_reduce", False), ("all_gather", True), ("all_to_all", False)]
)
def test_buffers_begin_where_they_should(op: str, in_place: bool, lone: GroupMember) -> None:
    for unalign in (0, 1, 3):
        transfer = Transfer(TransferCase(op, 1000, torch.float, "sum", -1, in_place, None, unalign), lone)
        for buffer in (transfer._send, transfer._receive):
            assert (buffer.data_ptr() % 64, len(buffer)) == (4 * unalign, 1000)
        assert transfer.check() == 0


@pytest.mark.parametrize(
    ("groups", "hosts", "multiplies"),
    [
        ([(0, 1, 2, 3)], "aaaa", True),
        ([(0, 1, 2, 3)], "aabb", False),
        ([(0, 1), (2, 3)], "aaaa", False),  # two devices talk to each other directly
        ([(0, 1, 2), (3, 4, 5)], "aaabbb", True),  # a group of each node, of a world of several
    ],
)
def test_a_switch_multiplies_for_groups_of_one_node(
    groups: list[tuple[int, ...]], hosts: str, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    team: Any = SimpleNamespace(device=torch.device("cuda"), nodes=list(hosts))
    partition = GroupPartition("node", tuple(groups))
    assert _multicast(team, partition) is multiplies
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    assert not _multicast(team, partition)


def test_elements_are_checked_as_often_as_typed() -> None:
    runner: Any = object.__new__(SweepRunner)
    runner._team = SimpleNamespace(tree=SimpleNamespace(total=lambda number: number))
    runner._settings = SimpleNamespace(check=4)
    one: Any = SimpleNamespace(op=OPERATIONS["reduce"])
    assert runner._check(one, SimpleNamespace(check=lambda: 3), None) == 12
    assert runner._check(one, None, None) == 0


# ---- devices ----


@pytest.mark.parametrize(
    ("hardware", "available", "hip", "told"),
    [
        ("h100", False, None, "hardware=h100 needs a GPU, and torch"),
        ("mi300x", False, None, "choose hardware=cpu or install the ROCm build of torch"),
        ("mi300x", True, None, "hardware=mi300x is a rocm device, but this torch is built for CUDA"),
        ("h100", True, "7.0", "hardware=h100 is a cuda device, but this torch is built for ROCm"),
        (
            "h100",
            True,
            None,
            "rank 1 is number 1 of this node, which has 1 devices; start at most 1 ranks on it",
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    hardware: str,
    available: bool,
    hip: str | None,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", hip)
    rank = RankContext(1, 2, 1, 2, "127.0.0.1", 0, RunPaths(tmp_path), 1)
    with pytest.raises(UserError) as caught:
        choose_device(compose(["workload=collectives", f"hardware={hardware}"]), rank)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
