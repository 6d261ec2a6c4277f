"""How much memory the buffers of a case may take, and what is said where it isn't there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch

from collectives.ops.transfers import GroupMember, Transfer, TransferCase
from collectives.studies import sweep
from collectives.studies.sweep import SweepRunner

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]

MIB = 1 << 20


class MadeTransfer:
    """In a transfer's place: how much room it was given."""

    bytes_needed = staticmethod(Transfer.bytes_needed)

    def __init__(self, case: TransferCase, member: GroupMember, room: int) -> None:
        self.room = room
        if case.root == 7:
            raise RuntimeError("CUDA out of memory. Tried\nto allocate")
        if case.root == 6:
            raise MemoryError


class Machine:
    """A runner of rank 3 of four on a device with some MiB free; ranks 2 and 3 share a machine."""

    def __init__(self, device: str, free: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.emptied, self.others = 0, [""] * 3
        self.runner: Any = object.__new__(SweepRunner)
        self.runner._settings = SimpleNamespace(max_size=32 * MIB)
        members = [{"machine": name} for name in "abcc"]
        tree = SimpleNamespace(all_gather=lambda one: [*self.others, one])
        self.device = torch.device(device)
        self.runner._team = SimpleNamespace(
            rank=SimpleNamespace(rank=3), device=self.device, members=members, tree=tree
        )
        monkeypatch.setattr(sweep, "Transfer", MadeTransfer)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty)
        # What torch keeps for itself isn't free until it is given back.
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * MIB) if self.emptied else 0, 0))
        # Twice that of a rank, as two share it.
        available = SimpleNamespace(available=int(2 * free * MIB))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: available)

    def empty(self) -> None:
        self.emptied += 1

    def allocate(
        self, count: int, root: int = -1, in_place: bool = False, idle: bool = False
    ) -> tuple[Any, str]:
        """What comes of a case of so many MiB for each of its two ranks."""
        member = GroupMember(cast(Any, None), (2, 3), 1, self.device)
        case = TransferCase("all_gather", count * MIB, torch.int8, "none", root, in_place)
        transfer, refusal = self.runner._allocate(case, None if idle else member)
        return transfer, cast(str, refusal)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_fifth_of_what_is_free_stays_free(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(device, 100, monkeypatch)
    assert machine.runner._usable() == 80 * MIB
    for count, in_place in ((20, False), (40, True)):  # 80 MiB, of two buffers or one
        assert machine.allocate(count, in_place=in_place)[1] == ""
    for count, in_place in ((21, False), (41, True)):
        needed = 4 * count if not in_place else 2 * count
        assert machine.allocate(count, in_place=in_place) == (
            None,
            f"out of memory, rank 3: {needed / 1024:.3g} GiB of buffers, 0.0977 GiB free for it; larger sizes are left out",
        )


@pytest.mark.parametrize(
    ("device", "free", "room"),
    [
        ("cuda", 1000, 32),  # as much as nccl-tests' largest message
        ("cuda", 70, 28),  # of 56 usable MiB, a half for each of two buffers
        ("cuda", 5, 2),
        ("cpu", 1000, 0),
    ],
)
def test_buffers_have_room_for_the_largest_message_or_half_of_the_memory(
    device: str, free: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer, refusal = Machine(device, free, monkeypatch).allocate(1)
    assert (transfer.room, refusal) == (room * MIB, "")


def test_where_one_rank_has_no_memory_none_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("cuda", 1000, monkeypatch)
    out = "out of memory, {}; larger sizes are left out"
    assert machine.allocate(1, root=7) == (None, out.format("rank 3: CUDA out of memory. Tried"))
    assert machine.allocate(1, root=6) == (None, out.format("rank 3: MemoryError"))
    assert machine.allocate(1, idle=True) == (None, "")
    machine.others[1] = "rank 1: 3 GiB of buffers, 1 GiB free for it"
    assert machine.allocate(1) == machine.allocate(1, idle=True) == (None, out.format(machine.others[1]))


@pytest.mark.parametrize(
    ("op", "in_place"),
    [(op, in_place) for op in ("all_reduce", "all_gather", "gather", "scatter", "reduce_scatter", "all_to_all")
     for in_place in (False, True)][:-1],
)  # fmt: skip
def test_what_is_counted_is_what_is_allocated(
    op: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rank that has most, beside what keeps a buffer off its alignment."""
    sizes: list[int] = []
    zeros = torch.zeros

    def allocated(count: int, **look: Any) -> torch.Tensor:
        sizes.append(count * 4)
        return zeros(count, **look)

    monkeypatch.setattr(torch, "zeros", allocated)
    case = TransferCase(
        op, 12, torch.float, "sum", 1 if op in ("gather", "scatter") else -1, in_place, None, 3
    )
    assert Transfer(case, GroupMember(cast(Any, None), (0, 1, 2), 1, torch.device("cpu")))
    assert len(sizes) == 1 + (not in_place)
    needed = Transfer.bytes_needed(case, 3, 4)
    assert sum(sizes) <= needed <= sum(sizes) + len(sizes) * 2 * 3 * 4
