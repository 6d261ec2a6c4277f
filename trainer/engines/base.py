"""What the loop asks of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trainer.model.seams import PackedDocuments
from trainer.state import Slice

Phases = Callable[[str], AbstractContextManager[None]]
"""Records a phase of the step (`forward`, `backward`, `optimizer`) by its name."""


def never() -> bool:
    """Nobody asked."""
    return False


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel place, on the device."""

    tokens_BS: Tensor
    """[micro_batch, sequence + 1] int64: the last token is only a target, the first only an input."""
    documents_BS: Tensor | None
    """Document of each input, [micro_batch, sequence]; None where every sample is one document or masks are off."""
    packed: PackedDocuments | None = None
    """Where these documents lie, as `MicroBatch` has it."""


@dataclass(frozen=True)
class DataPlace:
    """Where a rank stands on the data-parallel axis: ranks of one place train on the same samples."""

    index: int
    size: int


@dataclass(frozen=True)
class StepResult:
    """What a step gives. Tensors stay on the device; a sum over all ranks gives the value of the step."""

    loss: Tensor
    """This rank's share of the mean cross-entropy."""
    aux_loss: Tensor
    """This rank's share of the auxiliary losses, weighted as they went into the gradient."""
    dropped: Tensor
    """Token-expert pairs that this rank's routers dropped."""
    grad_norm: Tensor
    """Global norm before clipping, equal on all ranks: not a share."""
    skipped: Tensor
    """1 where the gradients weren't finite, so that nothing moved; equal on all ranks."""
    wishes: Tensor
    """Ranks that were asked to stop; equal on all ranks."""
    load: Tensor
    """Token-expert pairs by MoE layer and expert over all ranks, [layers, experts] int64, on all ranks."""


class Engine(Protocol):
    """Trains one rank's share of a model."""

    place: DataPlace

    def step(
        self,
        batches: Sequence[Batch],
        samples: int,
        lr: float,
        phase: Phases,
        stopping: Callable[[], bool] = never,
    ) -> StepResult:
        """One optimizer step.

        Args:
            batches: this place's micro-batches, in order.
            samples: of the step, over all places.
            lr: learning rate of the step.
            stopping: whether this rank was asked to stop by now; sent to all ranks with the norm.
        """

    def evaluate(self, batches: Sequence[Batch], samples: int) -> Tensor:
        """This rank's share of the mean cross-entropy over `samples`, without learning."""

    def state(self) -> Iterator[Slice]:
        """What a resumed run needs and can't work out, as live slices: masters, moments, router biases."""

    def loaded(self) -> None:
        """Called after the slices of `state` have been overwritten."""
