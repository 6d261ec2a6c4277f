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
from trainer.optim.adamw import AdamW, StepScalars, fused_adamw
from trainer.optim.common import (
    Hyperparameters,
    check_masters,
    check_peers,
    chunk_elements,
    chunk_ranges,
    copy_masters_to_weights,
    device_of,
    gradient_or_zeros,
    hyperparameters,
    moment_dtype,
)
from trainer.optim.shards import ParameterShard, StagePeers
from trainer.state import Box


@dataclass(frozen=True)
class _MomentState:
    """The moments of a shard that has trust ratios."""

    shard: ParameterShard
    hyper: Hyperparameters
    exp_avg: Tensor
    exp_avg_sq: Tensor
    units_L: Tensor
    """Index in the stage of each unit, a tensor with a trust ratio of its own: each matrix of a stack, or the embedding."""

    def parts(self, tensor: Tensor) -> Tensor:
        """The tensor as [units, rows, columns]."""
        return tensor.view(self.units_L.shape[0], -1, tensor.shape[-1])


class Lamb:
    """The protocol `trainer.optim.shards.Optimizer`.

    The trust ratio ||w|| / ||r|| is that of the whole tensor, each matrix of a stack on its own, whatever the sharding: a
    step has one all-reduce, of two numbers for each tensor of the stage. Vectors have ratio 1, which is AdamW.
    """

    def __init__(
        self, shards: Sequence[ParameterShard], optim: OptimConfig, width: int, peers: StagePeers
    ) -> None:
        """Moments of zero for `shards` of a model of `width`."""
        check_masters(shards)
        check_peers(shards, peers)
        self._optim, self._peers = optim, peers
        dtype = moment_dtype(optim)
        self._adamw = AdamW(
            [shard for shard in shards if shard.kind == "vector"], optim, width, device_of(shards)
        )
        starts, self._units = _number_units(shards, peers)
        self._states = [
            _MomentState(
                shard,
                hyperparameters(shard.kind, optim, width),
                torch.zeros_like(shard.tensor, dtype=dtype),
                torch.zeros_like(shard.tensor, dtype=dtype),
                torch.tensor(
                    _unit_numbers(shard.box, shard.kind, starts[shard.name]), device=shard.tensor.device
                ),
            )
            for shard in shards
            if shard.kind != "vector"
        ]

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, skip: Tensor) -> None:
        """Update the masters (see the protocol). Ranks of the stage step together."""
        skipped = skip != 0
        scalars = self._adamw.step_scalars(factor, skip)
        norms = torch.zeros(2, self._units, dtype=torch.float64, device=skipped.device)
        nonempty = [state for state in self._states if state.shard.tensor.numel()]
        directions = [self._adam_direction(state, scalars, norms) for state in nonempty]
        if self._peers.size > 1:
            dist.all_reduce(norms, group=self._peers.group)
        weight_norms, direction_norms = norms.sqrt()
        nonzero = (weight_norms > 0) & (direction_norms > 0)
        ratios = torch.where(nonzero, weight_norms / direction_norms, 1.0).float()
        for state, direction in zip(nonempty, directions, strict=True):
            # A direction of 0 times a negative number is -0, which changes nothing where the step is skipped.
            change_L11 = ratios[state.units_L].mul_(-lr * state.hyper.lr_scale).view(-1, 1, 1)
            state.parts(state.shard.tensor).addcmul_(
                state.parts(direction.masked_fill_(skipped, 0.0)), change_L11
            )
        copy_masters_to_weights(state.shard for state in nonempty)
        self._adamw.step(lr, factor, skip)

    def state(self) -> Iterator[tuple[str, Tensor, ParameterShard | None]]:
        """Both moments of every shard, and the count of applied steps."""
        for state in self._states:
            yield "exp_avg", state.exp_avg, state.shard
            yield "exp_avg_sq", state.exp_avg_sq, state.shard
        yield from self._adamw.state()

    def _adam_direction(self, state: _MomentState, scalars: StepScalars, norms: Tensor) -> Tensor:
        """Update the shard's moments; Adam's direction with the weight decay, which overwrites the gradient.

        The squared norms of values and direction are added to `norms`, [2, units], by replica 0 of each box.
        """
        direction = gradient_or_zeros(state.shard)
        columns = [state.parts(t) for t in (state.shard.tensor, direction, state.exp_avg, state.exp_avg_sq)]
        units, rows, width = columns[0].shape
        limit = chunk_elements(direction.device)
        for first, last in chunk_ranges(units, max(1, limit // (rows * width))):
            for start, end in chunk_ranges(rows, max(1, limit // ((last - first) * width))):
                value, grad, mean, square = (column[first:last, start:end] for column in columns)
                # AdamW's kernel, at a rate of -1, adds to zeros just what it would take from values at a rate of 1.
                update = torch.zeros_like(grad)
                fused_adamw([[update], [grad], [mean], [square]], self._optim, -1.0, 0.0, scalars)
                torch.add(update, value, alpha=state.hyper.weight_decay, out=grad)
                if state.shard.replica == 0:
                    for total, part in zip(norms, (value, grad), strict=True):
                        total.index_add_(0, state.units_L[first:last], _squares(part))
        return direction


def _squares(part_LRC: Tensor) -> Tensor:
    """Squared norm of each unit's part, in fp64. Only a row is summed in fp32: over millions that loses digits on CPUs."""
    return torch.linalg.vector_norm(part_LRC, dim=-1).double().square().sum(-1)


def _number_units(shards: Sequence[ParameterShard], peers: StagePeers) -> tuple[dict[str, int], int]:
    """Number of the first unit of each shard name, alike on all ranks, and the number of units of the stage."""
    kinds = {shard.name: shard.kind for shard in shards}
    wholes = {name: box.whole for listed in peers.shards for name, box, _, _ in listed}
    starts, count = {}, 0
    for name in sorted(wholes):
        starts[name] = count
        count += {"matrix": prod(wholes[name][:-2]), "embedding": 1, "vector": 0}[kinds[name]]
    return starts, count


def _unit_numbers(box: Box, kind: str, first: int) -> list[int]:
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
