"""Parameters as an optimizer sees them: fp32 master shards with their boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from trainer.state import Box


@dataclass
class ComputeWeight:
    """The bf16 copy of an fp32 master that matmuls use, and its gradient."""

    tensor: Tensor
    """bf16, of the master's shape and contiguous."""
    gradient: Tensor | None = None
    """Of the step, bf16 or fp32; used instead of the master's `grad`."""


@dataclass(frozen=True)
class ParameterShard:
    """This rank's shard of one parameter.

    The engine puts the reduced fp32 gradient of the same box in `tensor.grad`; None stands for zeros, so that an
    update doesn't depend on which rank used a parameter. A step may overwrite the gradient.
    """

    name: str
    """Of the parameter in the whole model."""
    tensor: Tensor
    """fp32 master values, plain, local and contiguous, changed in place. May have no elements."""
    box: Box
    kind: str
    """`matrix`: its last two dims are a matrix, dims before them count matrices (experts; gate and up); `embedding`: the
    embedding table or output projection; `vector`: everything else."""
    replica: int
    """Which of `replicas` equal copies of this box on the ranks of the stage this is."""
    replicas: int
    compute_weight: ComputeWeight | None = None
    """Every step that updates the master writes it too."""

    @property
    def gradient(self) -> Tensor | None:
        """The step's gradient, where the engine has set one."""
        return self.tensor.grad if self.compute_weight is None else self.compute_weight.gradient

    def set_gradient(self, gradient: Tensor) -> None:
        """Keep the step's gradient until `clear_gradient`."""
        if self.compute_weight is None:
            self.tensor.grad = gradient
        else:
            self.compute_weight.gradient = gradient

    def clear_gradient(self) -> None:
        """Free the gradient, as `zero_grad(set_to_none=True)` does."""
        self.tensor.grad = None
        if self.compute_weight is not None:
            self.compute_weight.gradient = None


@dataclass(frozen=True)
class StagePeers:
    """The ranks of a pipeline stage, which together hold every parameter of it, each box perhaps several times.

    Every rank has a shard of every parameter of the stage, if only an empty one; copies of a box are equal boxes.
    """

    group: dist.ProcessGroup | None
    """None for a rank alone."""
    rank: int
    """In `group`, and in `shards`."""
    size: int
    shards: Sequence[Sequence[tuple[str, Box, int, int]]]
    """By rank: name, box, replica and replicas of all its shards, in its order; the same on all ranks."""


class Optimizer(Protocol):
    """One update rule over all shards of a rank."""

    def step(self, lr: float, factor: Tensor, skip: Tensor) -> None:
        """Update the masters.

        Args:
            lr: of this step.
            factor: clipping factor of the gradients, on the device.
            skip: on the device, 1 where the step changes nothing, not even moments and the count of steps; else 0.
        """

    def state(self) -> Iterator[tuple[str, Tensor, ParameterShard | None]]:
        """Live state: name of a moment (`exp_avg`, …), its tensor and shard; or, with None, the full name of a tensor
        that is equal on all ranks (the count of applied steps)."""
