"""One collective with its buffers: the call, what to put in, and what must come out.

Only `torch.distributed` is used, so that what is measured is what training runs. It reduces and broadcasts in
place only: out of place, what is sent is copied to where it is received before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from collectives.ops.exact import fill, mismatches, reduced, sent
from collectives.ops.operations import OPERATIONS, spread_counts

COPIED = ("all_reduce", "broadcast", "reduce")
"""Operations that torch.distributed has in place alone."""
_REDOPS = {
    "sum": dist.ReduceOp.SUM, "prod": dist.ReduceOp.PRODUCT, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN,
    "avg": dist.ReduceOp.AVG, "band": dist.ReduceOp.BAND, "bor": dist.ReduceOp.BOR, "bxor": dist.ReduceOp.BXOR,
}  # fmt: skip
# Renamed in torch 2.13; 2.11 has the older names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Seat:
    """This rank's place in its group."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    """Global ranks of the group."""
    index: int
    """Place of this rank among them."""
    device: torch.device

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return len(self.ranks)


@dataclass(frozen=True)
class TransferCase:
    """What is to be moved."""

    op: str
    count: int
    """Elements, in the sense of nccl-tests' `count`."""
    dtype: torch.dtype
    redop: str
    """`none` where nothing is reduced."""
    root: int
    """Place of the root in the group; -1 where there is none."""
    in_place: bool
    matrix: tuple[tuple[int, ...], ...] | None = None
    """Elements from each rank to each, of an `all_to_allv`."""
    unalign: int = 0
    """Elements by which buffers begin off their alignment."""


class Transfer:
    """Buffers of one rank for one case, and the call on them. Making one allocates.

    Raises:
        RuntimeError, MemoryError: where the memory isn't to be had.
    """

    def __init__(self, case: TransferCase, seat: Seat) -> None:
        self._case, self._seat = case, seat
        n, me, count = seat.size, seat.index, case.count
        sends, receives = self._lengths()
        self.is_root = case.root in (-1, me)
        self._receive = self._zeros(receives)
        if not case.in_place:
            self._send = self._zeros(sends)
        elif case.op in ("all_gather", "gather") and receives == n * count:
            self._send = self._receive[me * count : (me + 1) * count]
        elif case.op in ("reduce_scatter", "scatter"):
            self._send = self._zeros(sends)
            if sends:
                self._receive = self._send[me * count : (me + 1) * count]
        elif case.op == "gather":
            self._send = self._zeros(sends)
        else:
            self._send = self._receive
        self.call: Callable[[], object] = getattr(self, f"_{case.op}")()

    def _zeros(self, count: int) -> Tensor:
        case = self._case
        return torch.zeros(count + case.unalign, dtype=case.dtype, device=self._seat.device)[case.unalign :]

    @staticmethod
    def bytes_needed(case: TransferCase, ranks: int, width: int) -> int:
        """Most that one rank allocates for a case."""
        whole = (case.count + case.unalign) * width * (ranks if OPERATIONS[case.op].parts else 1)
        return whole if case.in_place else 2 * whole

    def _lengths(self) -> tuple[int, int]:
        """Elements that this rank sends and receives."""
        n, me, count = self._seat.size, self._seat.index, self._case.count
        match self._case.op:
            case "all_gather":
                return count, n * count
            case "gather":
                return count, n * count * (self._case.root == me)
            case "reduce_scatter":
                return n * count, count
            case "scatter":
                return n * count * (self._case.root == me), count
            case "all_to_all":
                return n * count, n * count
            case "all_to_allv":
                sends, receives = self._splits()
                return sum(sends), sum(receives)
        return count, count

    def _splits(self) -> tuple[list[int], list[int]]:
        matrix, me = self._case.matrix, self._seat.index
        assert matrix is not None, "an all_to_allv has a matrix"
        return list(matrix[me]), [row[me] for row in matrix]

    # ---- the calls ----

    def _all_reduce(self) -> Callable[[], object]:
        receive, group, op = self._receive, self._seat.group, _REDOPS[self._case.redop]
        return lambda: dist.all_reduce(receive, op=op, group=group)

    def _reduce(self) -> Callable[[], object]:
        receive, group, op = self._receive, self._seat.group, _REDOPS[self._case.redop]
        root = self._seat.ranks[self._case.root]
        return lambda: dist.reduce(receive, root, op=op, group=group)

    def _broadcast(self) -> Callable[[], object]:
        receive, group, root = self._receive, self._seat.group, self._seat.ranks[self._case.root]
        return lambda: dist.broadcast(receive, root, group=group)

    def _all_gather(self) -> Callable[[], object]:
        send, receive, group = self._send, self._receive, self._seat.group
        return lambda: _all_gather(receive, send, group=group)

    def _reduce_scatter(self) -> Callable[[], object]:
        send, receive, group, op = self._send, self._receive, self._seat.group, _REDOPS[self._case.redop]
        return lambda: _reduce_scatter(receive, send, op=op, group=group)

    def _gather(self) -> Callable[[], object]:
        send, group, root = self._send, self._seat.group, self._seat.ranks[self._case.root]
        parts = list(self._receive.chunk(self._seat.size)) if self.is_root else None
        return lambda: dist.gather(send, parts, root, group=group)

    def _scatter(self) -> Callable[[], object]:
        receive, group, root = self._receive, self._seat.group, self._seat.ranks[self._case.root]
        parts = list(self._send.chunk(self._seat.size)) if self.is_root else None
        return lambda: dist.scatter(receive, parts, root, group=group)

    def _all_to_all(self) -> Callable[[], object]:
        send, receive, group = self._send, self._receive, self._seat.group
        return lambda: dist.all_to_all_single(receive, send, group=group)

    def _all_to_allv(self) -> Callable[[], object]:
        send, receive, group = self._send, self._receive, self._seat.group
        sends, receives = self._splits()
        return lambda: dist.all_to_all_single(receive, send, receives, sends, group=group)

    def _sendrecv(self) -> Callable[[], object]:
        """Each rank sends to the next of a ring and receives from the one before."""
        seat = self._seat
        after, before = seat.ranks[(seat.index + 1) % seat.size], seat.ranks[seat.index - 1]
        steps = [
            dist.P2POp(dist.isend, self._send, after, seat.group),
            dist.P2POp(dist.irecv, self._receive, before, seat.group),
        ]

        def exchange() -> None:
            for work in dist.batch_isend_irecv(steps):
                work.wait()

        return exchange

    def _barrier(self) -> Callable[[], object]:
        group = self._seat.group
        return lambda: dist.barrier(group=group)

    # ---- exact values ----

    def check(self) -> int:
        """Fill the buffers, call once, and count the elements of this rank that are wrong."""
        if self._case.op == "barrier":
            self.call()
            return 0
        self._receive.fill_(1)  # no expected value is all ones, so what isn't written is seen
        self._prepare()
        if (
            self._case.op in COPIED
            and not self._case.in_place
            and (self.is_root or self._case.op != "broadcast")
        ):
            self._receive.copy_(self._send)
        self.call()
        if self._seat.device.type == "cuda":
            torch.cuda.synchronize(self._seat.device)
        return self._count_wrong()

    def _tile(self, source: int, target: int, length: int) -> Tensor:
        case = self._case
        return sent(source, target, case.dtype, self._seat.size, case.redop, self._seat.device, length)

    def _reduced(self, target: int) -> Tensor:
        case, seat = self._case, self._seat
        return reduced(case.dtype, seat.size, case.redop, target, seat.device, len(self._receive))

    def _prepare(self) -> None:
        me, n, count = self._seat.index, self._seat.size, self._case.count
        match self._case.op:
            case "reduce_scatter":
                for target in range(n):
                    fill(self._send[target * count : (target + 1) * count], self._tile(me, target, count))
            case "scatter" | "all_to_all":
                for target, part in enumerate(self._send.split(count) if len(self._send) else ()):
                    fill(part, self._tile(me, target, count))
            case "all_to_allv":
                for target, part in enumerate(self._send.split(self._splits()[0])):
                    fill(part, self._tile(me, target, len(part)))
            case "broadcast":
                if self.is_root:
                    fill(self._send, self._tile(me, 0, count))
            case _:
                fill(self._send, self._tile(me, 0, count))

    def _count_wrong(self) -> int:
        case, me, n, receive = self._case, self._seat.index, self._seat.size, self._receive
        match case.op:
            case "all_reduce" | "reduce":
                return mismatches(receive, self._reduced(0)) if case.op == "all_reduce" or self.is_root else 0
            case "reduce_scatter":
                return mismatches(receive, self._reduced(me))
            case "broadcast":
                return mismatches(receive, self._tile(case.root, 0, case.count))
            case "scatter":
                return mismatches(receive, self._tile(case.root, me, case.count))
            case "sendrecv":
                return mismatches(receive, self._tile((me - 1) % n, 0, case.count))
            case "all_gather" | "gather":
                parts, target = receive.split(case.count) if len(receive) else (), 0
            case "all_to_all":
                parts, target = receive.split(case.count), me
            case _:
                parts, target = receive.split(self._splits()[1]), me
        return sum(
            mismatches(part, self._tile(source, target, len(part))) for source, part in enumerate(parts)
        )


def matrix_of(
    op: str, count: int, dtype: torch.dtype, ranks: int, spread: float
) -> tuple[tuple[int, ...], ...] | None:
    """Elements from each rank to each of an `all_to_allv` of this spread; None for other operations."""
    if op != "all_to_allv":
        return None
    return tuple(map(tuple, spread_counts(ranks, count, spread, dtype.itemsize)))
