"""The interface between the training loop and an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trainer.model.seams import PackedDocuments
from trainer.state import Slice

PhaseRecorder = Callable[[str], AbstractContextManager[None]]
"""Records a phase of the step (`forward`, `backward`, `optimizer`) by its name."""


def never_stop() -> bool:
    """No rank is ever asked to stop."""
    return False


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank, on the device."""

    tokens_BS: Tensor
    """[micro_batch, sequence + 1] int64: the last token is only a target, the first only an input."""
    documents_BS: Tensor | None
    """Document of each input, [micro_batch, sequence]; None where every sample is one document or masks are off."""
    packed: PackedDocuments | None = None
    """Bounds of these documents (see `MicroBatch`)."""


@dataclass(frozen=True)
class DataParallelRank:
    """A rank's coordinate on the data-parallel axis; ranks with the same one train on the same samples."""

    index: int
    size: int


@dataclass(frozen=True)
class StepResult:
    """What a step computes. Tensors stay on the device; a value of the step is the sum of all ranks' shares."""

    loss: Tensor
    """This rank's share of the mean cross-entropy."""
    aux_loss: Tensor
    """This rank's share of the auxiliary losses, weighted as they went into the gradient."""
    dropped: Tensor
    """Token-expert pairs that this rank's routers dropped."""
    grad_norm: Tensor
    """Global norm before clipping, equal on all ranks: not a share."""
    skipped: Tensor
    """1 where the gradients weren't finite, so that the step changed nothing; equal on all ranks."""
    stop_requests: Tensor
    """How many ranks were asked to stop; equal on all ranks."""
    expert_load: Tensor
    """Token-expert pairs by MoE layer and expert over all ranks, [layers, experts] int64, on all ranks."""


class Engine(Protocol):
    """Trains one rank's share of a model."""

    data_parallel: DataParallelRank

    def step(
        self,
        batches: Sequence[Batch],
        samples: int,
        lr: float,
        phase: PhaseRecorder,
        stop_requested: Callable[[], bool] = never_stop,
    ) -> StepResult:
        """One optimizer step.

        Args:
            batches: this data-parallel rank's micro-batches, in order.
            samples: of the step, over all data-parallel ranks.
            lr: learning rate of the step.
            stop_requested: says whether this rank was asked to stop by now; reduced over all ranks with the norm.
        """

    def evaluate(self, batches: Sequence[Batch], samples: int) -> Tensor:
        """This rank's share of the mean cross-entropy over `samples`, without learning."""

    def state(self) -> Iterator[Slice]:
        """The state of a checkpoint, as live slices: masters, moments, router biases."""

    def after_load(self) -> None:
        """Called after the slices of `state` have been overwritten."""
