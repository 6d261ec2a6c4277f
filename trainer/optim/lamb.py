"""LAMB (You et al. 2020): Adam's direction, scaled to each tensor's norm, for large batches (MegaScale section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from configs.training import OptimConfig
from trainer.optim.adamw import AdamW, Numbers, update
from trainer.optim.common import (
    Rate,
    check,
    check_names,
    chunk_of,
    device_of,
    gradient,
    moment_dtype,
    ranges,
    rate_of,
    refresh,
)
from trainer.optim.slots import Slot, StagePeers
from trainer.state import Box


@dataclass(frozen=True)
class _Row:
    """A slot whose norms count, with its moments."""

    slot: Slot
    rate: Rate
    mean: Tensor
    square: Tensor
    units_L: Tensor
    """Number in the stage of each tensor that has a ratio of its own: of each matrix, or of the embedding."""

    def parts(self, tensor: Tensor) -> Tensor:
        """The tensor as [units, rows, columns]."""
        return tensor.view(self.units_L.shape[0], -1, tensor.shape[-1])


class Lamb:
    """The protocol `trainer.optim.slots.Optimizer`.

    The trust ratio ||w|| / ||r|| is that of the whole tensor, each matrix of a stack on its own, whatever the sharding: a
    step has one all-reduce, of two numbers for each tensor of the stage. Vectors have ratio 1, which is AdamW.
    """

    def __init__(self, slots: Sequence[Slot], optim: OptimConfig, width: int, peers: StagePeers) -> None:
        """Moments of zero for `slots` of a model of `width`."""
        check(slots)
        check_names(slots, peers)
        self._optim, self._peers = optim, peers
        dtype = moment_dtype(optim)
        self._rest = AdamW([slot for slot in slots if slot.kind == "vector"], optim, width, device_of(slots))
        starts, self._units = _numbering(slots, peers)
        self._rows = [
            _Row(
                slot,
                rate_of(slot.kind, optim, width),
                torch.zeros_like(slot.tensor, dtype=dtype),
                torch.zeros_like(slot.tensor, dtype=dtype),
                torch.tensor(_numbers(slot.box, slot.kind, starts[slot.name]), device=slot.tensor.device),
            )
            for slot in slots
            if slot.kind != "vector"
        ]

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, skip: Tensor) -> None:
        """Move the masters; see the protocol. Ranks of the stage step together."""
        stopped = skip != 0
        numbers = self._rest.numbers(factor, skip)
        norms = torch.zeros(2, self._units, dtype=torch.float64, device=stopped.device)
        live = [row for row in self._rows if row.slot.tensor.numel()]
        directions = [self._direction(row, numbers, norms) for row in live]
        if self._peers.size > 1:
            dist.all_reduce(norms, group=self._peers.group)
        weights, moves = norms.sqrt()
        ratios = torch.where((weights > 0) & (moves > 0), weights / moves, 1.0).float()
        for row, direction in zip(live, directions, strict=True):
            # A direction of 0 times a negative number is -0, which changes nothing where the step is skipped.
            change_L11 = ratios[row.units_L].mul_(-lr * row.rate.scale).view(-1, 1, 1)
            row.parts(row.slot.tensor).addcmul_(row.parts(direction.masked_fill_(stopped, 0.0)), change_L11)
        refresh(row.slot for row in live)
        self._rest.step(lr, factor, skip)

    def state(self) -> Iterator[tuple[str, Tensor, Slot | None]]:
        """Both moments of every slot, and the count of applied steps."""
        for row in self._rows:
            yield "exp_avg", row.mean, row.slot
            yield "exp_avg_sq", row.square, row.slot
        yield from self._rest.state()

    def _direction(self, row: _Row, numbers: Numbers, norms: Tensor) -> Tensor:
        """Move the slot's moments; what Adam would take from it, in its gradient's place.

        The squared norms of values and direction are added to `norms`, [2, units], by the first copy of each box.
        """
        direction = gradient(row.slot)
        columns = [row.parts(t) for t in (row.slot.tensor, direction, row.mean, row.square)]
        units, rows, width = columns[0].shape
        most = chunk_of(direction.device)
        for first, last in ranges(units, max(1, most // (rows * width))):
            for start, end in ranges(rows, max(1, most // ((last - first) * width))):
                value, grad, mean, square = (column[first:last, start:end] for column in columns)
                # AdamW's kernel, at a rate of -1, adds to zeros just what it would take from values at a rate of 1.
                taken = torch.zeros_like(grad)
                update([[taken], [grad], [mean], [square]], self._optim, -1.0, 0.0, numbers)
                torch.add(taken, value, alpha=row.rate.decay, out=grad)
                if row.slot.replica == 0:
                    for total, part in zip(norms, (value, grad), strict=True):
                        total.index_add_(0, row.units_L[first:last], _squares(part))
        return direction


def _squares(part_LRC: Tensor) -> Tensor:
    """Squared norm of each unit's part, in fp64. Only a row is summed in fp32: over millions that loses digits on CPUs."""
    return torch.linalg.vector_norm(part_LRC, dim=-1).double().square().sum(-1)


def _numbering(slots: Sequence[Slot], peers: StagePeers) -> tuple[dict[str, int], int]:
    """Number of the first unit of each slot name, alike on all ranks, and the number of units of the stage."""
    kinds = {slot.name: slot.kind for slot in slots}
    wholes = {name: box.whole for listed in peers.slots for name, box, _, _ in listed}
    starts, count = {}, 0
    for name in sorted(wholes):
        starts[name] = count
        count += {"matrix": prod(wholes[name][:-2]), "embedding": 1, "vector": 0}[kinds[name]]
    return starts, count


def _numbers(box: Box, kind: str, first: int) -> list[int]:
    """Numbers of the units in a box."""
    if kind == "embedding":
        return [first]
    spans = zip(box.start[:-2], box.shape[:-2], strict=True)
    numbers = []
    for lead in product(*(range(start, start + length) for start, length in spans)):
        flat = 0
        for index, size in zip(lead, box.whole[:-2], strict=True):
            flat = flat * size + index
        numbers.append(first + flat)
    return numbers
