"""Hot experts are lent: where tokens are gathered, a rank whose experts got more rows than those of others has some of them
computed by ranks that got fewer.

All ranks of an ep group have all its tokens and know all its choices, so that no row travels for it. Whoever borrows an
expert gets its weights before its rows are computed, and sends their gradient back when it is made. The gradient is that
of the same rows in the same order, so that a lent expert learns what it would have learned at home. Nothing outlasts the
backward pass of a micro-batch: checkpoints and layouts know nothing of it. MoonEP (2026) copies hot experts inside a node
likewise.

Shape letters: E experts, B experts that a rank borrows, R rows, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.model.deferred import GradientBuffer
from trainer.parallel.mesh import Axis

_PERCENT = 104
"""Rows of the fullest rank, of the mean, up to which nothing is lent."""
_MOST = 8
"""Experts that a rank borrows at most: their weights stay until the backward pass."""


class Loan(NamedTuple):
    """An expert that another rank of ep computes, for one micro-batch."""

    expert: int
    owner: int
    """Place in the ep group."""
    borrower: int


@dataclass(frozen=True)
class LendingTerms:
    """On which experts are lent; equal on all ranks of an ep group."""

    node: int
    """Neighbours in the group that share a node; nobody lends beyond it."""
    least: int
    """Rows of an expert that is worth its weights' way."""
    most: int = _MOST
    percent: int = _PERCENT


def plan(counts: Sequence[int], ranks: int, terms: LendingTerms) -> list[Loan]:
    """Who lends what to whom, so that the fullest rank of each node has as few rows as whole experts allow.

    The fullest rank lends to the emptiest the expert that leaves the fuller of the two with the fewest rows, until nothing
    is gained. Pure, so that ranks which know the same numbers need not speak. `trainer.kernels.lending` has the same for a
    device.

    Args:
        counts: rows of each expert; ranks have equal, consecutive parts of them.
        ranks: of the group.
    """
    local = len(counts) // ranks
    loans: list[Loan] = []
    for first in range(0, ranks, terms.node):
        members = range(first, min(first + terms.node, ranks))
        rows = {rank: sum(counts[rank * local : (rank + 1) * local]) for rank in members}
        borrowed = dict.fromkeys(members, 0)
        home = {
            rank: [
                expert for expert in range(rank * local, (rank + 1) * local) if counts[expert] >= terms.least
            ]
            for rank in members
        }
        while True:
            fullest = max(members, key=rows.__getitem__)
            free = [rank for rank in members if borrowed[rank] < terms.most and rank != fullest]
            enough = rows[fullest] * len(members) * 100 <= terms.percent * sum(rows.values())
            if enough or not free or not home[fullest]:
                break
            emptiest = min(free, key=rows.__getitem__)
            apart = rows[fullest] - rows[emptiest]
            best = min(home[fullest], key=lambda expert: abs(2 * counts[expert] - apart))
            if counts[best] >= apart:  # the emptiest would have more than the fullest has
                break
            home[fullest].remove(best)
            rows[fullest] -= counts[best]
            rows[emptiest] += counts[best]
            borrowed[emptiest] += 1
            loans.append(Loan(best, fullest, emptiest))
    return loans


@cache
def _weight_stream(device: int) -> torch.cuda.Stream:
    """The stream on which weights travel, apart from what computes."""
    return torch.cuda.Stream(device)


@dataclass
class Lending:
    """A rank's part of the loans of one micro-batch in one layer: `trainer.model.seams.ExpertLending`.

    All ranks that take part call `begin` and `return_gradients`, each in the same place among the group's collectives.

    Args:
        loans: of the group, in an order that all ranks share.
        axis: the ep group.
        first: the rank's first expert.
    """

    loans: Sequence[Loan]
    axis: Axis
    first: int
    _works: list[Any] = field(default_factory=list)
    _posted: list[Any] = field(default_factory=list)
    _out: list[tuple[int, Tensor]] = field(default_factory=list)
    _into: list[tuple[int, Tensor]] = field(default_factory=list)
    _ready: torch.cuda.Event | None = None

    @cached_property
    def lent(self) -> list[Loan]:
        """Of this rank's experts."""
        return [loan for loan in self.loans if loan.owner == self.axis.index]

    @cached_property
    def borrowed(self) -> list[Loan]:
        """By this rank."""
        return [loan for loan in self.loans if loan.borrower == self.axis.index]

    def keys(self, chosen: Tensor, experts: int, local: int) -> Tensor:
        """Choices as places among the experts that this rank computes, its own before those that it borrows; -1 for those
        that others compute."""
        slots = [-1] * (experts + 1)  # the last one for the choice -1
        slots[self.first : self.first + local] = range(local)
        for loan in self.lent:
            slots[loan.expert] = -1
        for number, loan in enumerate(self.borrowed):
            slots[loan.expert] = local + number
        return torch.tensor(slots, dtype=chosen.dtype, device=chosen.device)[chosen]

    def begin(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Take this rank's lent weights as they are now, for `send`.

        Args:
            weights: of all local experts, [L, ...] each.

        Returns:
            Those of the borrowed experts, [B, ...] each, which nobody may read before `wait`.
        """
        theirs = [weight.new_empty(len(self.borrowed), *weight.shape[1:]) for weight in weights]
        self._out = [
            (loan.borrower, weight[loan.expert - self.first].detach())
            for loan in self.lent
            for weight in weights
        ]
        self._into = [
            (loan.owner, weight[number]) for number, loan in enumerate(self.borrowed) for weight in theirs
        ]
        if weights[0].is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(weights[0].device))
        return theirs

    def send(self) -> None:
        """Start to send what `begin` took, beside all that was queued since: that takes the host a while, in which the
        device has work."""
        if self._ready is None:
            self._post(self._out, self._into)
        else:
            with torch.cuda.stream(_weight_stream(torch.cuda.current_device())):
                self._ready.wait()
                self._post(self._out, self._into)
        self._out, self._into, self._ready = [], [], None

    def return_gradients(self, grads: Sequence[Tensor], buffers: Sequence[GradientBuffer]) -> None:
        """Start to send gradients of borrowed weights, and to receive those of lent ones.

        Args:
            grads: [B, ...] each; nothing where none is borrowed.
            buffers: by weight, what allocates a buffer for a lent expert's gradient.
        """
        self._post(
            [(loan.owner, grad[number]) for number, loan in enumerate(self.borrowed) for grad in grads],
            [(loan.borrower, buffer(loan.expert - self.first)) for loan in self.lent for buffer in buffers],
        )

    def wait(self) -> None:
        """Have what follows on the device wait for all that is under way."""
        for work in self._works:
            work.wait()
        self._works, self._posted = [], []

    def _post(self, out: Sequence[tuple[int, Tensor]], into: Sequence[tuple[int, Tensor]]) -> None:
        """Start sends to and receipts from places in the group."""
        group = self.axis.process_group
        steps = [dist.P2POp(dist.isend, tensor, group=group, group_peer=to) for to, tensor in out]
        steps += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=by) for by, tensor in into]
        if steps:
            self._works += dist.batch_isend_irecv(steps)
            self._posted += steps  # holds the tensors
