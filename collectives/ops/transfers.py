"""One collective with its buffers: the call, what to put in, and what must come out.

Collectives are `torch.distributed`'s, so that what is measured is what training runs, but for those to which torch adds
something of its own (`collectives.ops.nccl`). It reduces and broadcasts in place only: out of place, what is sent is
copied to where it is received before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.distributed as dist
from torch import Tensor

from collectives.ops.exact import expected_reduced, expected_sent, fill, mismatches
from collectives.ops.nccl import Communicator, Message
from collectives.ops.operations import OPERATIONS, spread_counts

COPIED = ("all_reduce", "broadcast", "reduce")
"""Operations that torch.distributed has in place alone."""
MESSAGES = ("all_to_allv", "gather", "scatter", "sendrecv")
"""Operations that are groups of sends and receives."""
BY_LIBRARY = (*MESSAGES, "broadcast")
"""Operations for which the library is called itself, where that can be."""
_TURNS = 128
"""Most calls in a row that each have memory of their own."""
_REDOPS = {
    "sum": dist.ReduceOp.SUM, "prod": dist.ReduceOp.PRODUCT, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN,
    "avg": dist.ReduceOp.AVG, "band": dist.ReduceOp.BAND, "bor": dist.ReduceOp.BOR, "bxor": dist.ReduceOp.BXOR,
}  # fmt: skip
# Renamed in torch 2.13; 2.11 has the older names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class GroupMember:
    """This rank's place in its group."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    """Global ranks of the group."""
    index: int
    """Place of this rank among them."""
    device: torch.device
    communicator: Communicator | None = None
    """The library's own, where messages go through it (see `collectives.ops.nccl`)."""

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

    Args:
        room: bytes that each buffer may take where they are more than its own, so that calls in a row move other
            memory: what is in a cache already moves faster. Source: `startColl` in nccl-tests' `src/common.cu`, which
            goes through `maxbytes`.

    Raises:
        RuntimeError, MemoryError: where the memory isn't to be had.
    """

    def __init__(self, case: TransferCase, member: GroupMember, room: int = 0) -> None:
        self._case, self._member = case, member
        self.is_root = case.root in (-1, member.index)
        each = max(self._lengths())
        turns = max(1, min(_TURNS, room // (each * case.dtype.itemsize))) if each else 1
        receive = self._zeros(turns * each)
        send = receive if case.in_place else self._zeros(turns * each)
        buffers = [self._buffers(send[turn * each :], receive[turn * each :]) for turn in range(turns)]
        self._send, self._receive = buffers[0]
        self._by_library = case.op in BY_LIBRARY and member.communicator is not None
        make = self._of_library if self._by_library else getattr(self, f"_{case.op}")
        self._calls: list[Callable[[], object]] = [make(*one) for one in buffers]
        self._turns = cycle(self._calls)

    def call(self) -> None:
        """Queue or make one call, on the memory whose turn it is."""
        next(self._turns)()

    def _zeros(self, count: int) -> Tensor:
        case = self._case
        return torch.zeros(count + case.unalign, dtype=case.dtype, device=self._member.device)[case.unalign :]

    def _buffers(self, send: Tensor, receive: Tensor) -> tuple[Tensor, Tensor]:
        """What is sent and what is received, of memory that begins with them; in place, one is a part of the other."""
        case, count, me = self._case, self._case.count, self._member.index
        sends, receives = self._lengths()
        whole = receive[: max(sends, receives)]
        mine = slice(me * count, (me + 1) * count)
        if not case.in_place:
            return send[:sends], receive[:receives]
        if case.op in ("all_gather", "gather") and receives > count:
            return whole[mine], whole
        if case.op in ("reduce_scatter", "scatter") and sends:
            return whole, whole[mine]
        return whole[:sends], whole[:receives]

    @staticmethod
    def bytes_needed(case: TransferCase, ranks: int, width: int) -> int:
        """Most that one rank allocates for a case, without room."""
        whole = (case.count + case.unalign) * width * (ranks if OPERATIONS[case.op].parts else 1)
        return whole if case.in_place else 2 * whole

    def _lengths(self) -> tuple[int, int]:
        """Elements that this rank sends and receives."""
        n, me, count = self._member.size, self._member.index, self._case.count
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
        matrix, me = self._case.matrix, self._member.index
        assert matrix is not None, "an all_to_allv has a matrix"
        return list(matrix[me]), [row[me] for row in matrix]

    # ---- the calls ----

    def _of_library(self, send: Tensor, receive: Tensor) -> Callable[[], object]:
        assert self._member.communicator is not None, "chosen where there is one"
        if self._case.op == "broadcast":
            return self._member.communicator.broadcast(send, receive, self._case.root)
        return self._member.communicator.exchange(*self.messages(send, receive))

    def messages(self, send: Tensor, receive: Tensor) -> tuple[list[Message], list[Message]]:
        """What this rank sends and receives, of an operation that is made of messages.

        `sendrecv` is a ring: each rank sends to the next and receives from the one before.
        """
        n, me, root = self._member.size, self._member.index, self._case.root
        match self._case.op:
            case "sendrecv":
                return [((me + 1) % n, send)], [((me - 1) % n, receive)]
            case "gather":
                return [(root, send)], list(enumerate(receive.chunk(n))) if self.is_root else []
            case "scatter":
                return list(enumerate(send.chunk(n))) if self.is_root else [], [(root, receive)]
        sends, receives = self._splits()
        return list(enumerate(send.split(sends))), list(enumerate(receive.split(receives)))

    def _all_reduce(self, _send: Tensor, receive: Tensor) -> Callable[[], object]:
        group, op = self._member.group, _REDOPS[self._case.redop]
        return lambda: dist.all_reduce(receive, op=op, group=group)

    def _reduce(self, _send: Tensor, receive: Tensor) -> Callable[[], object]:
        group, op = self._member.group, _REDOPS[self._case.redop]
        root = self._member.ranks[self._case.root]
        return lambda: dist.reduce(receive, root, op=op, group=group)

    def _broadcast(self, _send: Tensor, receive: Tensor) -> Callable[[], object]:
        group, root = self._member.group, self._member.ranks[self._case.root]
        return lambda: dist.broadcast(receive, root, group=group)

    def _all_gather(self, send: Tensor, receive: Tensor) -> Callable[[], object]:
        group = self._member.group
        return lambda: _all_gather(receive, send, group=group)

    def _reduce_scatter(self, send: Tensor, receive: Tensor) -> Callable[[], object]:
        group, op = self._member.group, _REDOPS[self._case.redop]
        return lambda: _reduce_scatter(receive, send, op=op, group=group)

    def _gather(self, send: Tensor, receive: Tensor) -> Callable[[], object]:
        group, root = self._member.group, self._member.ranks[self._case.root]
        parts = list(receive.chunk(self._member.size)) if self.is_root else None
        return lambda: dist.gather(send, parts, root, group=group)

    def _scatter(self, send: Tensor, receive: Tensor) -> Callable[[], object]:
        group, root = self._member.group, self._member.ranks[self._case.root]
        parts = list(send.chunk(self._member.size)) if self.is_root else None
        return lambda: dist.scatter(receive, parts, root, group=group)

    def _all_to_all(self, send: Tensor, receive: Tensor) -> Callable[[], object]:
        group = self._member.group
        return lambda: dist.all_to_all_single(receive, send, group=group)

    def _all_to_allv(self, send: Tensor, receive: Tensor) -> Callable[[], object]:
        group = self._member.group
        sends, receives = self._splits()
        return lambda: dist.all_to_all_single(receive, send, receives, sends, group=group)

    def _sendrecv(self, send: Tensor, receive: Tensor) -> Callable[[], object]:
        member, (((after, _),), ((before, _),)) = self._member, self.messages(send, receive)
        steps = [
            dist.P2POp(dist.isend, send, member.ranks[after], member.group),
            dist.P2POp(dist.irecv, receive, member.ranks[before], member.group),
        ]

        def exchange() -> None:
            for work in dist.batch_isend_irecv(steps):
                work.wait()

        return exchange

    def _barrier(self, _send: Tensor, _receive: Tensor) -> Callable[[], object]:
        group = self._member.group
        return lambda: dist.barrier(group=group)

    # ---- exact values ----

    def check(self) -> int:
        """Fill the buffers, call once, and count the elements of this rank that are wrong."""
        if self._case.op == "barrier":
            self._calls[0]()
            return 0
        self._receive.fill_(1)  # no expected value is all ones, so what isn't written is seen
        self._prepare()
        if (
            self._case.op in COPIED
            and not self._by_library
            and not self._case.in_place
            and (self.is_root or self._case.op != "broadcast")
        ):
            self._receive.copy_(self._send)
        self._calls[0]()
        if self._member.device.type == "cuda":
            torch.cuda.synchronize(self._member.device)
        return self._count_wrong()

    def _tile(self, source: int, target: int, length: int) -> Tensor:
        case = self._case
        return expected_sent(
            source, target, case.dtype, self._member.size, case.redop, self._member.device, length
        )

    def _reduced(self, target: int) -> Tensor:
        case, member = self._case, self._member
        return expected_reduced(
            case.dtype, member.size, case.redop, target, member.device, len(self._receive)
        )

    def _prepare(self) -> None:
        me, n, count = self._member.index, self._member.size, self._case.count
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
        case, me, n, receive = self._case, self._member.index, self._member.size, self._receive
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
