"""Pipelines over `torch.distributed.pipelining`: a step's micro-batches through the stages of a rank.

Imported where there is a pipeline alone: torch's module costs each start of a rank most of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
    _ComputationType,
)

from configs.schema import ModelConfig, ParallelConfig
from trainer.model.decoder import DecoderStage, boundary_width, inputs
from trainer.model.seams import MicroBatch
from trainer.parallel.mesh import Mesh
from trainer.parallel.stages import stages_of
from trainer.sizing.search.runnable import chunks_of


class _Chunk(nn.Module):
    """A stage as torch's schedules call it: with the number of a micro-batch, which they can cut out of a tensor.

    It also hides that the stage is sharded: when gradients are reduced is the engine's decision, under every schedule.
    """

    def __init__(self, stage: DecoderStage, micros: list[MicroBatch]) -> None:
        super().__init__()
        self.stage = stage
        self.micros = micros

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """The hidden state, or the loss as one number in a row."""
        out = self.stage(x, self.micros[int(index)])
        return out.view(1) if out.ndim == 0 else out


class _UnsplitBackward(PipelineStage):
    """A stage whose weights' gradients are worked out with those of its input, where a schedule wants them apart.

    torch goes back to a weight from all places at which it meets the input's way. Where one of them lies behind another, it
    goes a second time through what is between, which is gone by then.
    """

    def backward_maybe_with_nosync(
        self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """As torch calls it: `full`, or first `input` and later `weight`."""
        if backward_type == "weight":
            return (), None
        if backward_type == "input":
            (loss,) = bwd_kwargs["stage_output"]  # the last stage alone predicts
            bwd_kwargs = bwd_kwargs | {"stage_output": loss}
        gradients, _ = super().backward_maybe_with_nosync("full", bwd_kwargs, last_backward)
        return gradients, None


def reuses_weights(stage: DecoderStage) -> bool:
    """Whether a weight is used once more behind itself: several depths of prediction embed tokens, and a tied table is the
    head too."""
    return len(stage.mtp) + (stage.config.tie_embeddings and len(stage.mtp) > 0) > 1


@dataclass(frozen=True)
class _CachedSchedule:
    """A schedule for so many micro-batches of so many samples, with its stages."""

    sizes: tuple[int, int]
    schedule: Any
    parts: list[PipelineStage]

    def forget(self) -> None:
        """Give back what its micro-batches were received into: the objects hold each other, while collection is off."""
        for part in self.parts:
            part.args_recv_info.clear()
            part.grad_recv_info.clear()


class Pipeline:
    """This rank's stages and the schedules that run them: one to learn and one to evaluate, each for the number of
    micro-batches that it last had. It has memory for what all of them receive, and a batch that grew never shrinks."""

    def __init__(
        self, stages: Sequence[DecoderStage], mesh: Mesh, model: ModelConfig, parallel: ParallelConfig
    ) -> None:
        self._stages, self._mesh, self._model, self._parallel = stages, mesh, model, parallel
        self._micros: list[MicroBatch] = []
        self._chunks = [_Chunk(stage, self._micros) for stage in stages]
        self._schedules: dict[bool, _CachedSchedule] = {}
        """By whether they learn."""

    def run(self, micros: Sequence[MicroBatch], dtype: torch.dtype, learn: bool) -> Tensor:
        """All micro-batches forward, and backward where `learn`; this rank's share of the loss."""
        self._micros[:] = micros
        schedule = self._schedule(micros, dtype, learn)
        tokens = torch.cat([inputs(micro) for micro in micros])
        index = torch.arange(len(micros))
        losses: list[Tensor] = []
        last = any(stage.final_norm is not None for stage in self._stages)
        feed = (tokens,) if any(stage.first == 0 for stage in self._stages) else ()
        target = torch.zeros(len(micros)) if last else None
        run = schedule.step if learn else schedule.eval
        run(*feed, index=index, target=target, losses=losses)
        if not losses:
            return torch.zeros((), device=self._mesh.device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    def _schedule(self, micros: Sequence[MicroBatch], dtype: torch.dtype, learn: bool) -> Any:
        sizes = (len(micros), micros[0].tokens_BS.shape[0])
        known = self._schedules.get(learn)
        if known is not None and known.sizes == sizes:
            return known.schedule
        if known is not None:
            known.forget()
        shape = (sizes[1], micros[0].positions_S.numel())
        parts: list[Any] = [self._part(chunk, shape, dtype) for chunk in self._chunks]
        options: dict[str, Any] = {
            "n_microbatches": len(micros), "loss_fn": _as_loss, "scale_grads": False,
        }  # fmt: skip
        schedule: Any
        if self._parallel.schedule == "1f1b":
            schedule = Schedule1F1B(parts[0], **options)
        elif self._parallel.schedule == "interleaved":
            schedule = ScheduleInterleaved1F1B(parts, **options)
        else:
            schedule = ScheduleZBVZeroBubble(parts, **options)
            if not learn:
                _forward_alone(schedule)
        self._schedules[learn] = _CachedSchedule(sizes, schedule, parts)
        return schedule

    def _part(self, chunk: _Chunk, shape: tuple[int, int], dtype: torch.dtype) -> PipelineStage:
        """A stage with the shapes of what goes in and out, so that torch needn't run it to find out."""
        stage, (samples, tokens) = chunk.stage, shape
        own = tokens // self._mesh["tp"].size

        def boundary(layer: int) -> Tensor:
            return torch.empty(
                samples,
                own,
                boundary_width(self._model, layer),
                dtype=dtype,
                device="meta",
                requires_grad=True,
            )

        first = torch.empty(samples, tokens, dtype=torch.int64, device="meta")
        kind = _UnsplitBackward if reuses_weights(stage) else PipelineStage
        return kind(
            chunk,
            stage_index=stages_of(self._parallel, self._mesh["pp"].index)[self._chunks.index(chunk)],
            num_stages=self._mesh["pp"].size * chunks_of(self._parallel),
            device=self._mesh.device,
            input_args=(first if stage.first == 0 else boundary(stage.first),),
            output_args=(
                torch.empty(1, device="meta", requires_grad=True)
                if stage.final_norm is not None
                else boundary(stage.last),
            ),
            group=self._mesh["pp"].process_group,
        )


def _forward_alone(schedule: ScheduleZBVZeroBubble) -> None:
    """Leave the backward passes out. torch goes through them to evaluate too, and where two stages of a V lie on one rank,
    it misses the gradients that one would hand to the other."""
    kept = (_ComputationType.FORWARD, _ComputationType.SEND_F, _ComputationType.RECV_F)
    for rank, order in schedule.pipeline_order_with_comms.items():
        schedule.pipeline_order_with_comms[rank] = [one for one in order if one.computation_type in kept]


def _as_loss(output: Tensor, _target: Tensor) -> Tensor:
    return output.sum()
