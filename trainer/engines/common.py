"""The parts of a step that all engines share: micro-batches, gradient norm, clipping, router biases, results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from configs.model import ModelConfig
from trainer.engines.base import Batch, StepResult
from trainer.kernels.choice import LEAST, usable
from trainer.model.decoder import DecoderStage
from trainer.model.router import update_biases
from trainer.model.seams import MicroBatch, Tally
from trainer.state import Box, Slice

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtype of the weights that matmuls use, by `train.precision`."""
_CHUNK_ELEMENTS = 1 << 16
"""Elements of a gradient that a CPU squares in fp64 at a time."""


def micro_batches(
    batches: Sequence[Batch], samples: int, positions_S: Tensor, tally: Tally
) -> list[MicroBatch]:
    """A step's micro-batches as inputs of the model, each sample's losses weighted by 1 / `samples`."""
    weight = 1.0 / samples
    return [MicroBatch(b.tokens_BS, positions_S, b.documents_BS, weight, tally, b.packed) for b in batches]


def clip_factor_and_skip(norm: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The clipping factor of gradients with a global norm, and 1 where that isn't finite, so that the step is skipped; both
    on the device.

    Args:
        limit: of the norm; 0 for none.
    """
    factor = (limit / (norm + 1e-6)).clamp(max=1.0) if limit > 0 else torch.ones_like(norm)
    return factor, (~torch.isfinite(norm)).to(torch.float32)


def global_norm(
    gradients: Sequence[Tensor], world: int, device: torch.device, stop_requested: bool = False
) -> tuple[Tensor, Tensor]:
    """L2 norm of gradients that are sharded over the ranks, each element once; fp32, equal on all ranks. And how many
    ranks were asked to stop: both need one all-reduce.

    Args:
        gradients: this rank's parts.
        stop_requested: whether this rank was.
    """
    square = torch.zeros((), dtype=torch.float64, device=device)
    if gradients and usable(device):
        square = _squared_norm(gradients)
    elif gradients and device.type == "cpu":
        square = _squared_norm_on_cpu(gradients)
    elif gradients:
        square = torch.stack(torch._foreach_norm(list(gradients))).double().square().sum()
    sums = torch.stack([square, torch.full_like(square, float(stop_requested))])
    if world > 1:
        dist.all_reduce(sums)
    return sums[0].sqrt().float(), sums[1]


def _squared_norm_on_cpu(gradients: Sequence[Tensor]) -> Tensor:
    """The squared norm in fp64. A CPU adds squares one after the other: in fp32 those of 8 million elements are off by
    2e-4. In chunks that stay in its cache: a whole copy in fp64 takes four times as long."""
    buffer_fp64, parts = gradients[0].new_empty(_CHUNK_ELEMENTS, dtype=torch.float64), list[Tensor]()
    for gradient in gradients:
        for chunk in gradient.flatten().split(_CHUNK_ELEMENTS):
            chunk_fp64 = buffer_fp64[: len(chunk)].copy_(chunk)
            parts.append(torch.dot(chunk_fp64, chunk_fp64))
    return torch.stack(parts).sum()


def _squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The squared norm in fp64, of gradients in either precision; large ones by a kernel in one pass."""
    from trainer.kernels import adamw

    large: list[Tensor] = []
    small: list[Tensor] = []
    for gradient in gradients:
        (large if gradient.numel() >= LEAST and gradient.is_contiguous() else small).append(gradient)
    parts = [adamw.squares(large)] if large else []
    if small:
        norms = torch._foreach_norm(small, 2, torch.float32)
        parts.append(torch.stack(list(norms)).double().square().sum())
    return torch.stack(parts).sum()


@torch.no_grad()
def balance_experts(
    stages: Iterable[DecoderStage],
    model: ModelConfig,
    tally: Tally,
    applied_and_skip: tuple[Tensor, Tensor],
    world: int,
) -> Tensor:
    """Sum a step's expert loads over all ranks and update the router biases by them.

    Args:
        stages: of this rank.
        applied_and_skip: number of applied steps, this one among them; and 1 where this one is skipped.

    Returns:
        Token-expert pairs, [MoE layers, experts] int64, in the order of `ModelConfig.router_layers`.
    """
    applied, skip = applied_and_skip
    row = {layer: place for place, layer in enumerate(model.router_layers)}
    none = torch.zeros(model.experts, dtype=torch.int64, device=skip.device)
    counts = [tally.counts.get(layer, none) for layer in row]
    load = torch.stack(counts) if row else none.new_zeros(0, model.experts)
    if world > 1 and row:
        dist.all_reduce(load)
    routers = {layer: router for stage in stages for layer, router in stage.routers().items()}
    if routers:
        local_loads = [load[row[layer]] for layer in routers]
        update_biases(list(routers.values()), torch.stack(local_loads), applied, skip)
    return load


def step_result(
    loss: Tensor, tally: Tally, norm: tuple[Tensor, Tensor], skip: Tensor, load: Tensor
) -> StepResult:
    """The result of a step, with norm and stop requests from `global_norm`; `loss` and `tally` are this rank's shares."""
    zero = torch.zeros((), device=skip.device)
    return StepResult(
        loss=loss,
        aux_loss=torch.stack(tally.losses).sum() if tally.losses else zero,
        dropped=torch.stack(tally.dropped).sum() if tally.dropped else zero.long(),
        grad_norm=norm[0],
        stop_requests=norm[1],
        skipped=skip,
        expert_load=load,
    )


def replicated_slice(name: str, tensor: Tensor, index: int, size: int) -> Slice:
    """The slice of a tensor that `size` ranks have copies of, on the rank with that index."""
    return Slice(name, tensor, Box.full(tuple(tensor.shape)), index, size)
