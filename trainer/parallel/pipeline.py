"""Pipelines over `torch.distributed.pipelining`: the layers of a rank, and a step's micro-batches through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from configs.schema import ModelConfig, ParallelConfig
from trainer.model.decoder import DecoderStage, boundary_width, inputs
from trainer.model.seams import Micro
from trainer.parallel.apply import sharded
from trainer.parallel.mesh import Mesh
from trainer.sizing.search.runnable import chunks_of


def cut(layers: int, parts: int) -> list[tuple[int, int]]:
    """First and last layer (exclusive) of each of `parts` stages; the last ones, beside the head, are the shorter ones."""
    each, more = divmod(layers, parts)
    ends = [0]
    for part in range(parts):
        ends.append(ends[-1] + each + (part < more))
    return list(zip(ends, ends[1:], strict=False))


def stages_of(parallel: ParallelConfig, index: int) -> list[int]:
    """Stages that a pipeline rank has, ascending: round robin, or a V under `zbv`."""
    pp, chunks = parallel.size("pp"), chunks_of(parallel)
    if parallel.schedule == "zbv":
        return [index, 2 * pp - 1 - index]
    return [index + turn * pp for turn in range(chunks)]


class _Chunk(nn.Module):
    """A stage as torch's schedules call it: with the number of a micro-batch, which they can cut out of a tensor.

    It also hides that the stage is sharded: when gradients are reduced is the engine's decision, under every schedule.
    """

    def __init__(self, stage: DecoderStage, micros: list[Micro]) -> None:
        super().__init__()
        self.stage = stage
        self.micros = micros

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """The hidden state, or the loss as one number in a row."""
        out = self.stage(x, self.micros[int(index)])
        return out.view(1) if out.ndim == 0 else out


class Pipeline:
    """This rank's stages and the schedules that run them, one for each number of micro-batches."""

    def __init__(
        self, stages: Sequence[DecoderStage], mesh: Mesh, model: ModelConfig, parallel: ParallelConfig
    ) -> None:
        self._stages, self._mesh, self._model, self._parallel = stages, mesh, model, parallel
        self._micros: list[Micro] = []
        self._chunks = [_Chunk(stage, self._micros) for stage in stages]
        self._schedules: dict[tuple[Any, ...], Any] = {}

    def run(self, micros: Sequence[Micro], dtype: torch.dtype, learn: bool) -> Tensor:
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

    def _schedule(self, micros: Sequence[Micro], dtype: torch.dtype, learn: bool) -> Any:
        samples = micros[0].tokens_BS.shape[0]
        key = (len(micros), samples, learn)
        if key not in self._schedules:
            shape = (samples, micros[0].positions_S.numel())
            parts: list[Any] = [self._part(chunk, shape, dtype) for chunk in self._chunks]
            options: dict[str, Any] = {
                "n_microbatches": len(micros), "loss_fn": _as_loss, "scale_grads": False,
            }  # fmt: skip
            if self._parallel.schedule == "1f1b":
                self._schedules[key] = Schedule1F1B(parts[0], **options)
            elif self._parallel.schedule == "interleaved":
                self._schedules[key] = ScheduleInterleaved1F1B(parts, **options)
            else:
                self._schedules[key] = ScheduleZBVZeroBubble(parts, **options)
        return self._schedules[key]

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
        return PipelineStage(
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


def _as_loss(output: Tensor, _target: Tensor) -> Tensor:
    return output.sum()


def reduce_now(stage: DecoderStage) -> None:
    """Reduce the gradients that a sharded stage has gathered without reducing, as torch's own schedules do it."""
    if not isinstance(stage, FSDPModule):
        return
    for module in sharded(stage):
        module.set_is_last_backward(True)
        module.set_reshard_after_backward(True, recurse=False)
        module.set_requires_gradient_sync(True, recurse=False)
    shard: Any = fully_shard  # its type hides the attributes that it adds
    state = shard.state(stage)
    for part in state._state_ctx.all_states:
        groups = getattr(part, "_fsdp_param_groups", None)
        for group in [part._fsdp_param_group] if groups is None else groups:
            if group is not None:
                group.post_backward()
    state._root_post_backward_final_callback()
