"""Parameters as an optimizer sees them: fp32 master shards with their boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from trainer.state import Box


@dataclass
class Cast:
    """The weights that matmuls use beside an fp32 master, and their gradient."""

    weight: Tensor
    """bf16, of the master's shape and contiguous."""
    gradient: Tensor | None = None
    """Of the step, bf16 or fp32; stands in place of the master's `grad`."""


@dataclass(frozen=True)
class Slot:
    """This rank's shard of one parameter.

    The engine puts the reduced fp32 gradient of the same box in `tensor.grad`; None stands for zeros, so that what moves
    doesn't depend on which rank saw a parameter used. A step may write over the gradient.
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
    cast: Cast | None = None
    """Written by every step that moves the master."""

    @property
    def gradient(self) -> Tensor | None:
        """As the engine left it."""
        return self.tensor.grad if self.cast is None else self.cast.gradient

    def receive(self, gradient: Tensor) -> None:
        """Take the step's gradient."""
        if self.cast is None:
            self.tensor.grad = gradient
        else:
            self.cast.gradient = gradient

    def forget(self) -> None:
        """Let the gradient go."""
        self.tensor.grad = None
        if self.cast is not None:
            self.cast.gradient = None


@dataclass(frozen=True)
class StagePeers:
    """The ranks of a pipeline stage, which together hold every parameter of it, each box perhaps several times.

    Every rank has a slot of every parameter of the stage, if only an empty one; copies of a box are equal boxes.
    """

    group: dist.ProcessGroup | None
    """None for a rank alone."""
    rank: int
    """In `group`, and in `slots`."""
    size: int
    slots: Sequence[Sequence[tuple[str, Box, int, int]]]
    """By rank: name, box, replica and replicas of all its slots, in its order; the same on all ranks."""


class Optimizer(Protocol):
    """One update rule over all slots of a rank."""

    def step(self, lr: float, factor: Tensor, skip: Tensor) -> None:
        """Move the masters.

        Args:
            lr: of this step.
            factor: number on the device that gradients are multiplied by (clipping).
            skip: 1 on the device where nothing may move, neither values nor moments nor the count of steps; 0 elsewhere.
        """

    def state(self) -> Iterator[tuple[str, Tensor, Slot | None]]:
        """Live state: name of a slot's part (`exp_avg`, …) with the tensor and its slot; or, with None, the full name of
        something that all ranks have alike (the count of applied steps, a number)."""
