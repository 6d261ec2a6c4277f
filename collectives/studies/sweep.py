"""A sweep: every operation, group, type, reduction and size that was asked for, one case after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import psutil
import torch
import torch.distributed as dist

from collectives.ops.exact import MOVED_ONLY, TYPES
from collectives.ops.groups import GroupPartition, partitions
from collectives.ops.operations import OPERATIONS, Operation, counts, largest, size_of, sizes
from collectives.ops.transfers import GroupMember, Transfer, TransferCase, matrix_of
from collectives.store.results import SweepRow, Timing
from collectives.studies.journal import Journal
from collectives.timing.measure import MeasurementSetup, Raw
from collectives.timing.team import Team
from configs.errors import UserError
from configs.fabric import CollectivesConfig

_BITWISE = ("band", "bor", "bxor")
_FEWEST_ON_A_SWITCH = 3
_MEMORY_SHARE = 0.8
"""Of the free memory, that the buffers of one case may take."""


@dataclass(frozen=True)
class CaseSeries:
    """Cases that differ in their size alone."""

    op: Operation
    partition: GroupPartition
    dtype: str
    redop: str
    root: int
    counts: list[int]
    sweep: int

    def row(self, count: int, matrix: tuple[tuple[int, ...], ...] | None) -> SweepRow:
        """The row of one size, without times."""
        width, ranks = TYPES[self.dtype].itemsize, self.partition.ranks
        size = (
            size_of(self.op, count, ranks, width) if matrix is None else largest([*map(list, matrix)]) * width
        )
        return SweepRow(
            op=self.op.name,
            group=self.partition.kind,
            ranks=ranks,
            groups=len(self.partition.groups),
            size=size,
            count=count,
            dtype=self.dtype,
            redop=self.redop,
            root=self.root,
            sweep=self.sweep,
        )


def series(settings: CollectivesConfig, nodes: list[int], layout: dict[str, int]) -> list[CaseSeries]:
    """Everything that a sweep goes through, in its order; a pass of the whole after the other.

    Of several types and reductions, pairs that no library has are left out.

    Raises:
        UserError: for what can't be measured, before anything is.
    """
    cases, refusals = list[CaseSeries](), list[str]()
    for sweep in range(settings.passes):
        for kind in settings.groups:
            for partition in partitions(kind, nodes, layout):
                for name in settings.ops:
                    cases += _of_operation(settings, partition, OPERATIONS[name], sweep, refusals)
    if not cases and refusals:
        raise UserError(refusals[0])
    if not cases:
        raise UserError(
            f"no size from {settings.min_size} to {settings.max_size} bytes has 16 bytes for each rank; raise "
            "collectives.max_size (-e)"
        )
    return cases


def _of_operation(
    settings: CollectivesConfig, partition: GroupPartition, op: Operation, sweep: int, refusals: list[str]
) -> Iterator[CaseSeries]:
    """Cases of one operation; what is wrong with those that can't be is appended to `refusals`."""
    root = settings.root
    if op.rooted and root >= partition.ranks:
        raise UserError(
            f"collectives.root={root} is not in a group of {partition.ranks} ranks; set it from 0 to "
            f"{partition.ranks - 1}"
        )
    roots = [*range(partition.ranks)] if settings.every_root else [root]
    for dtype in settings.dtypes if op.name != "barrier" else ("int8",):
        swept = sizes(settings.min_size, settings.max_size, settings.step_factor, settings.step_size)
        elements = counts(op, swept, partition.ranks, dtype)
        for redop in settings.reductions if op.reduces else ("none",):
            refusal = _refusal(redop, dtype, partition.ranks)
            if refusal:
                refusals.append(refusal)
            elif elements:
                for place in roots if op.rooted else [-1]:
                    yield CaseSeries(op, partition, dtype, redop, place, elements, sweep)


def _refusal(redop: str, dtype: str, ranks: int) -> str:
    """Why a type isn't reduced so; empty where it is."""
    if redop != "none" and dtype in MOVED_ONLY:
        return (
            f"collectives.dtypes={dtype} is moved and not reduced: its sums have no exact value to check; use bfloat16 or "
            "float, or an operation that reduces nothing, such as all_gather"
        )
    whole = not TYPES[dtype].is_floating_point
    if redop in _BITWISE and not whole:
        return f"collectives.reductions={redop} takes whole numbers, not {dtype}; use int8, uint8, int32 or int64"
    if redop == "avg" and whole:
        return f"collectives.reductions=avg takes half, bfloat16, float or double, not {dtype}; use sum"
    if redop == "avg" and ranks & (ranks - 1):
        return f"collectives.reductions=avg over {ranks} ranks has no exact value to check; use a power of two, or sum"
    return ""


class SweepRunner:
    """Runs the cases on one rank; every rank goes through the same ones."""

    def __init__(self, bench: MeasurementSetup, journal: Journal, layout: dict[str, int]) -> None:
        self._bench, self._team, self._journal = bench, bench.team, journal
        self._settings = bench.settings
        self._series = series(self._settings, self._team.nodes, layout)

    @property
    def cases(self) -> int:
        """Rows in all."""
        return sum(len(one.counts) for one in self._series)

    def run(self, done: frozenset[tuple[str | int, ...]]) -> None:
        """Measure what isn't done."""
        for one in self._series:
            member = self._team.membership(one.partition)
            for count in one.counts:
                case = self._case(one, count, in_place=True)
                row = one.row(count, case.matrix)
                if row.key in done:
                    continue
                row = self._measured(one, row, case, member)
                self._journal.row(replace(row, time=time.time()))
                if row.note:
                    break  # larger sizes need more memory still

    def _case(self, one: CaseSeries, count: int, in_place: bool) -> TransferCase:
        dtype = TYPES[one.dtype]
        matrix = matrix_of(one.op.name, count, dtype, one.partition.ranks, self._settings.spread)
        return TransferCase(
            one.op.name, count, dtype, one.redop, one.root, in_place, matrix, self._settings.unalign
        )

    def _measured(
        self, one: CaseSeries, row: SweepRow, case: TransferCase, member: GroupMember | None
    ) -> SweepRow:
        for placement in self._settings.placements:
            in_place = placement == "in_place"
            if in_place and not one.op.in_place:
                continue
            if one.op.name == "barrier" and not in_place and "in_place" in self._settings.placements:
                continue  # it has no buffers, and so one placement
            placed = replace(case, in_place=in_place)
            transfer, refusal = self._allocate(placed, member)
            if refusal:
                return replace(row, note=refusal)
            timing = self._timed(one, row.size, transfer, member)
            row = replace(row, in_place=timing) if in_place else replace(row, out_of_place=timing)
            del transfer
        return row

    def _allocate(self, case: TransferCase, member: GroupMember | None) -> tuple[Transfer | None, str]:
        """The buffers, or why not all ranks have them."""
        transfer, refusal = None, ""
        if member is not None:
            needed, usable = Transfer.bytes_needed(case, member.size, case.dtype.itemsize), self._usable()
            refusal = self._too_large(needed, usable)
            if not refusal:
                # Of two buffers each may take half. A CPU's benchmarks, OSU's among them, use the same memory again.
                room = min(self._settings.max_size, usable // 2) if member.device.type == "cuda" else 0
                try:
                    transfer = Transfer(case, member, room)
                # Torch's own out-of-memory errors are RuntimeErrors.
                except (MemoryError, RuntimeError) as error:
                    first = (str(error).splitlines() or [type(error).__name__])[0]
                    refusal = f"rank {self._team.rank.rank}: {first}"
        refusal = next((reason for reason in self._team.tree.all_gather(refusal) if reason), "")
        return (None, f"out of memory, {refusal}; larger sizes are left out") if refusal else (transfer, "")

    def _usable(self) -> int:
        """Bytes of free memory that the buffers of a case may take."""
        rank, device = self._team.rank, self._team.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            return int(torch.cuda.mem_get_info(device)[0] * _MEMORY_SHARE)
        here = sum(
            member["machine"] == self._team.members[rank.rank]["machine"] for member in self._team.members
        )
        return int(psutil.virtual_memory().available // here * _MEMORY_SHARE)

    def _too_large(self, needed: int, usable: int) -> str:
        """Why the buffers won't fit; a CPU's allocation never fails, it kills a process later."""
        if needed <= usable:
            return ""
        free = usable / _MEMORY_SHARE
        return f"rank {self._team.rank.rank}: {needed / 2**30:.3g} GiB of buffers, {free / 2**30:.3g} GiB free for it"

    def _timed(
        self, one: CaseSeries, size: int, transfer: Transfer | None, member: GroupMember | None
    ) -> Timing | None:
        # A barrier waits on the host, which a graph can't hold.
        call = transfer.call if transfer is not None else None
        raw = self._bench.time(
            call, member.group if member is not None else None, capturable=one.op.name != "barrier"
        )
        wrong = self._check(one, transfer, raw) if self._settings.check else None
        if raw is None:
            return None
        multicast = _multicast(self._team, one.partition)
        timing = raw.timing(one.op, size, one.partition.ranks, self._settings, multicast)
        return replace(timing, wrong=wrong)

    def _check(self, one: CaseSeries, transfer: Transfer | None, raw: Raw | None) -> int | None:
        if one.op.name == "barrier":
            known = raw is not None and raw.comparable and self._team.one_machine
            return raw.left_early(one.partition.groups) if known and raw is not None else None
        times = range(self._settings.check)
        return self._team.tree.total(sum(transfer.check() for _ in times) if transfer is not None else 0)


def _multicast(team: Team, partition: GroupPartition) -> bool:
    """Whether the groups' devices hang on a switch that multiplies and reduces: NVLink SHARP, from Hopper on.

    NCCL uses it among three devices or more of one node, unless its environment forbids it.
    """
    if team.device.type != "cuda" or torch.version.hip is not None or not dist.is_nccl_available():
        return False
    if partition.ranks < _FEWEST_ON_A_SWITCH or os.environ.get("NCCL_NVLS_ENABLE") == "0":
        return False
    nodes = team.nodes
    within = all(len({nodes[rank] for rank in ranks}) == 1 for ranks in partition.groups)
    return within and torch.cuda.get_device_capability(team.device) >= (9, 0)
